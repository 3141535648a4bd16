"""Signs of life and announcements of failure between the processes of a run, over the store of their process group."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

_LOOK = 1.0  # most seconds between two looks for an announced failure
_SLOW = 5.0  # seconds without an answer after which the store counts as gone when this rank leaves
_BEAT = 10.0  # most seconds between two looks for the signs of life of others, which cost one request per rank


class Heartbeat:
    """Shows the other ranks that this process is alive, and watches whether they are.

    A daemon thread counts up a number in the store. It does so also during a long forward, a solver or a loader that
    reports no progress, and ceases when the process is stopped, killed, or cut off with its node. A deadlock of the
    main thread is therefore not noticed.

    The thread alone talks to the store: while the process that serves the store is stopped, every request blocks, and a
    main thread would not receive signals.

    Args:
        store: Store of the process group.
        key: Prefix of the keys, which is the same on all ranks and differs between runs.
        rank: Index of this process.
        world: Number of processes.
        timeout: Seconds without a sign of life after which a rank counts as silent.

    Attributes:
        failure: What a failed rank announced; empty if none has.
        lost: Why the store can no longer be reached; empty if it can.
    """

    def __init__(self, store: Any, key: str, rank: int, world: int, timeout: float) -> None:
        self.failure = self.lost = ""
        self._store, self._key, self._rank, self._timeout = store, key, rank, timeout
        self._look, self._beat = min(_LOOK, timeout / 10), min(_BEAT, timeout / 10)
        self._answered = time.monotonic()
        self._counts = {other: (0, self._answered) for other in range(world) if other != rank}
        self._rounds = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightning_ptq heartbeat", daemon=True)
        self._thread.start()

    def silent(self) -> list[int]:
        """Return the ranks without a sign of life; rank 0, which usually serves the store, if the store is silent."""
        last = time.monotonic() - self._timeout
        if not self._overdue(last):
            return []
        # A process that was stopped itself has heard nothing meanwhile, so it listens once more.
        self.refresh(2 * self._beat + 1)
        return self._overdue(last)

    def _overdue(self, last: float) -> list[int]:
        if self._answered < last:
            return [0]
        return [other for other, (_, heard) in self._counts.items() if heard < last]

    def refresh(self, seconds: float) -> None:
        """Wait until the store has been read once more, a failure is known, or some seconds are over."""
        wanted, deadline = self._rounds + 2, time.monotonic() + seconds
        while self._rounds < wanted and not (self.lost or self.failure) and time.monotonic() < deadline:
            time.sleep(0.02)

    def announce(self, text: str, patience: float) -> None:
        """Announce that this rank has failed, and wait for some seconds until all ranks that are alive know."""
        if time.monotonic() - self._answered > _SLOW:  # the store does not answer, so nobody can be told
            patience = min(patience, 1.0)
        thread = threading.Thread(target=self._announce, args=(text, patience), daemon=True)
        thread.start()
        thread.join(patience)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_SLOW)  # its last request may take a while on a busy machine

    def _announce(self, text: str, patience: float) -> None:
        deadline = time.monotonic() + patience
        with suppress(RuntimeError):  # the store is gone, and nobody is left to be told
            if not self._store.check([self._key]):
                self._store.set(self._key, text)
            self._store.add(f"{self._key} known", 1)  # counts the ranks that are leaving
            while time.monotonic() < deadline:
                alive = len(self._counts) + 1 - len(self._overdue(time.monotonic() - self._timeout))
                if self._store.add(f"{self._key} known", 0) >= alive:
                    return
                time.sleep(0.02)

    def _run(self) -> None:
        looked = 0.0
        while not self._closed.is_set():
            try:
                if not self.failure and self._store.check([self._key]):
                    self.failure = self._store.get(self._key).decode()
                if time.monotonic() - looked >= self._beat:
                    looked = time.monotonic()
                    self._listen()
            except RuntimeError as error:
                self.lost = str(error)
                return
            self._answered = time.monotonic()
            self._closed.wait(self._look)

    def _listen(self) -> None:
        self._store.add(f"{self._key} beats of {self._rank}", 1)
        for other, (count, _) in self._counts.items():
            now = self._store.add(f"{self._key} beats of {other}", 0)
            if now != count:
                self._counts[other] = now, time.monotonic()
        self._rounds += 1
