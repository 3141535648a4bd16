"""Ending a run in good order when the system asks for it."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether SIGTERM or an interrupt (Ctrl-C) has come.

    An interrupt ends the run at once, and at the next step where code that ran meanwhile has swallowed it. Lightning
    looks for SIGTERM between batches only, and its handler, under DDP, waits for ranks that may be busy for minutes.
    The library looks at each step of its work.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = False

    def check(self, trainer: Any) -> None:
        """Raise Lightning's ``SIGTERMException`` if SIGTERM has come, ``KeyboardInterrupt`` if an interrupt has."""
        if self.interrupted:
            raise KeyboardInterrupt
        if self.received:
            package = type(trainer).__module__.split(".trainer")[0]
            raise importlib.import_module(f"{package}.utilities.exceptions").SIGTERMException

    @contextmanager
    def watching(self, world: int) -> Iterator[None]:
        """Take SIGTERM inside the ``with`` block; a handler that is there is called too, on a single process.

        Interrupts are noted where Python's own handler is in place, which is called then.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, ours = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT) is signal.default_int_handler

        def handle(signum: int, frame: Any) -> None:
            self.received = True
            if world == 1 and callable(before):
                before(signum, frame)

        def interrupt(signum: int, frame: Any) -> None:
            self.interrupted = True
            signal.default_int_handler(signum, frame)

        signal.signal(signal.SIGTERM, handle)
        if ours:  # another one may mean something else by it
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
