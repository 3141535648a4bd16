"""Signals: an orderly end of the run on SIGTERM or an interrupt."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class StopRequest:
    """A record of whether SIGTERM or an interrupt (Ctrl-C) was received.

    An interrupt ends the run immediately, or at the next step if other code swallowed the exception. Lightning checks
    for SIGTERM only between batches, and under DDP its handler waits for ranks that may be busy for minutes. The
    library therefore checks at every step of its work.
    """

    def __init__(self) -> None:
        self.received = self.interrupted = False

    def check(self, trainer: Trainer) -> None:
        """Raise the exception of a signal that was received.

        Raises:
            SIGTERMException: After SIGTERM; the class is that of the Trainer's package.
            KeyboardInterrupt: After an interrupt.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        if self.received:
            package = type(trainer).__module__.split(".trainer")[0]
            raise importlib.import_module(f"{package}.utilities.exceptions").SIGTERMException

    @contextmanager
    def watching(self, world: int) -> Iterator[None]:
        """Record SIGTERM and interrupts inside the ``with`` block.

        On a single process the previous handler of SIGTERM is called too. Interrupts are recorded only where Python's
        default handler is installed, which is then called. Afterwards, a handler is put back only where the one of this
        record is still installed: Lightning restores its own handlers before the callbacks' teardown.

        Args:
            world: Number of processes.
        """
        # Only the main thread may set handlers.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGTERM)
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler

        def handle(signum: int, frame: Any) -> None:
            self.received = True
            if world == 1 and callable(previous):
                previous(signum, frame)

        def interrupt(signum: int, frame: Any) -> None:
            self.interrupted = True
            signal.default_int_handler(signum, frame)

        signal.signal(signal.SIGTERM, handle)
        if is_default:  # a handler of the user may give interrupts another meaning
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is handle:  # None: a handler that Python did not set
                signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
            if signal.getsignal(signal.SIGINT) is interrupt:
                signal.signal(signal.SIGINT, signal.default_int_handler)
