"""Which module runs its forward in this thread, for functions that are counted by the module that calls them."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any


class Frame:
    """One forward of a module that calls functions.

    Attributes:
        owner: The module.
        name: Its qualified name, while calls are discovered.
        counts: Number of calls so far, by the name of the function.
        layers: Names of the layers whose weights were passed to functions, while calls are discovered.
        parameters: Dimension of output channels of parameters that it multiplied by, while calls are discovered.
        read: Parameters that it has read from the operations that hold them.
        tied: Parameters of operations that have been called, which it has read.
    """

    __slots__ = ("counts", "layers", "name", "owner", "parameters", "read", "tied")

    def __init__(self, owner: Any, name: str = "") -> None:
        self.owner = owner
        self.name = name
        self.counts: dict[str, int] = {}
        self.layers: list[str] = []
        self.parameters: dict[str, int] = {}
        self.read: list[Any] = []
        self.tied: list[Any] = []

    def next(self, function: str) -> int:
        """Count a call of a function and return its position in this forward, from 1."""
        self.counts[function] = position = self.counts.get(function, 0) + 1
        return position


class Frames(threading.local):
    """The frames of this thread.

    Attributes:
        stack: Frames, the innermost last; None where calls do not count, as inside an operation.
        watched: True while a mode watches this thread's calls.
        discovering: True while all modules have frames, and not only those whose calls are operations.
        layers: Names of layers by the ids of their weights, while calls are discovered.
        parameters: Parameters outside operations by name, while calls are discovered.
    """

    def __init__(self) -> None:
        self.stack: list[Frame | None] = []
        self.watched = False
        self.discovering = False
        self.layers: dict[int, str] = {}
        self.parameters: dict[str, Any] = {}


frames = Frames()


class Outside:
    """Inside the ``with`` block, calls of functions are nobody's: they are part of an operation, or the library's."""

    __slots__ = ()

    def __enter__(self) -> None:
        frames.stack.append(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        frames.stack.pop()


outside = Outside()
