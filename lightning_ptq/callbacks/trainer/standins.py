"""Stand-ins for what a step may read but not use during calibration: loggers, optimizers and schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

_PLACES = ("name", "version", "save_dir", "root_dir", "log_dir", "sub_dir")
"""Attributes of a logger that say where it writes."""


class Silent:
    """An object that takes every call, item and attribute access, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a protocol that this object does not have
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Silent:  # noqa: D102  (a method that every object may have)
        return self

    def __getitem__(self, key: Any) -> Silent:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *args: object) -> None:
        return None


class MutedLogger(Silent):
    """A logger that writes nothing. It is an instance of the same classes, and says where the other one writes."""

    def __init__(self, logger: Logger) -> None:
        self.__dict__["_logger"] = logger

    @property  # type: ignore[misc]  # object declares it as an attribute that can be written
    def __class__(self) -> type:
        # Steps ask for the kind of logger by isinstance before they log an image, for example.
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logger, name) if name in _PLACES else getattr(_SILENT, name)


_SILENT = Silent()


class ReadOnly:
    """An optimizer or scheduler that can be read but not stepped.

    Args:
        original: What the module's ``configure_optimizers`` returned; None if there is nothing to read.
        refuse: Called when the step calls ``step``.
    """

    def __init__(self, original: Any, refuse: Callable[..., Any]) -> None:
        groups = original.param_groups if isinstance(original, Optimizer) else [{"lr": 0.0}]
        # Without the parameters, so that the step cannot change them through a group.
        self.param_groups = [{**group, "params": []} for group in groups]
        self.defaults = dict(getattr(original, "defaults", {}))
        self.last_epoch = getattr(original, "last_epoch", 0)
        self._rates = original.get_last_lr() if hasattr(original, "get_last_lr") else []
        self.step = refuse

    @property
    def optimizer(self) -> ReadOnly:
        """The optimizer itself, as of Lightning's wrapper or of a scheduler."""
        return self

    def get_last_lr(self) -> list[float]:
        """Return the learning rates of a scheduler."""
        return list(self._rates)

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups; there is no state."""
        return {"state": {}, "param_groups": self.param_groups}

    def __getattr__(self, name: str) -> Any:
        return getattr(_SILENT, name)  # zero_grad, toggle_model, ...


class Planned(Sequence[Any]):
    """The optimizers that a module would train with, made when one is first asked for.

    Args:
        configure: The module's own ``configure_optimizers``; None if it has none.
        refuse: Returns the function to call when a step calls the method of this name.
    """

    def __init__(self, configure: Callable[[], Any] | None, refuse: Callable[[str], Callable[..., Any]]) -> None:
        self._configure = configure
        self._refuse = refuse
        self._made: tuple[list[ReadOnly], list[ReadOnly]] | None = None

    def _make(self) -> tuple[list[ReadOnly], list[ReadOnly]]:
        if self._made is None:
            try:
                found = list(_flat(self._configure() if self._configure else None))
            except Exception:  # it may need a training that does not take place; a rate of 0 is read then
                found = []
            optimizers: list[Any] = [each for each in found if isinstance(each, Optimizer)] or [None]
            schedulers = [each for each in found if hasattr(each, "get_last_lr")]
            self._made = (
                [ReadOnly(each, self._refuse("self.optimizers().step()")) for each in optimizers],
                [ReadOnly(each, self._refuse("self.lr_schedulers().step()")) for each in schedulers],
            )
        return self._made

    def __len__(self) -> int:
        return len(self._make()[0])

    def __getitem__(self, index: Any) -> Any:
        return self._make()[0][index]

    def optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``LightningModule.optimizers`` would: a single optimizer, or a list."""
        made = self._make()[0]
        return made[0] if len(made) == 1 else made

    def lr_schedulers(self) -> Any:
        """Return what ``LightningModule.lr_schedulers`` would: a single scheduler, a list, or None."""
        made = self._make()[1]
        return made[0] if len(made) == 1 else made or None


def _flat(found: Any) -> Iterator[Any]:
    """Yield optimizers and schedulers from any form that ``configure_optimizers`` may return."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        for each in found:
            yield from _flat(each)
    else:
        yield found
