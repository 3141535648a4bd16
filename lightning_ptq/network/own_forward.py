"""Counterparts with a forward, of float modules that may have one set on the instance, as some libraries do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lightning_ptq.network.swapping import Swapped


class _Running(threading.local):
    """Ids of the modules whose own forward runs in this thread."""

    def __init__(self) -> None:
        self.ids: set[int] = set()


_running = _Running()


class SwappedForward(Swapped):
    """A counterpart whose forward stands before the float module's.

    Python would call a forward that is set on the instance, such as ``layer.forward = wrapped``, in place of the
    counterpart's. So it is kept under another name, and the counterpart's forward calls it.
    """

    added_names: ClassVar[tuple[str, ...]] = ("own_forward",)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # libraries that wrap a forward put the former one back later
            self.__dict__["own_forward"] = value
        else:
            super().__setattr__(name, value)

    def _keep_own_forward(self) -> None:
        """Have the counterpart's forward run, which then runs the instance's."""
        if "forward" in self.__dict__:
            self.__dict__["own_forward"] = self.__dict__.pop("forward")

    def _run_float_forward(self, of_class: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of the float module.

        Args:
            of_class: The forward of its class, bound to the module.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        own = self.__dict__.get("own_forward")
        if own is None:
            return of_class(*args, **kwargs)
        _running.ids.add(id(self))
        try:
            return own(*args, **kwargs)
        finally:
            _running.ids.discard(id(self))

    @property
    def runs_own_forward(self) -> bool:
        """True while the instance's forward runs in this thread. It may call the forward of the present class."""
        return bool(_running.ids) and id(self) in _running.ids


def has_own_forward(module: nn.Module) -> bool:
    """Return True if a forward was set on the instance of a module."""
    # What counterparts have under this name is the library's, for the moment.
    return ("own_forward" if isinstance(module, SwappedForward) else "forward") in vars(module)
