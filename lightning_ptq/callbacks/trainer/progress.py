"""Progress of the stages: tasks on the Trainer's rich or tqdm bar, or lines where the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from lightning_ptq.callbacks.trainer.lightning import rank_zero_info
from lightning_ptq.runtime.progress import Progress, no_progress

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ProgressBar

_PAUSE = 10.0  # seconds between two lines


@contextmanager
def progress_task(trainer: Trainer, title: str, check_stop: Callable[[], None]) -> Iterator[Progress]:
    """Show the progress of a stage; nothing is shown if the Trainer's progress bar is disabled.

    Args:
        trainer: Trainer of the run.
        title: Title of the task.
        check_stop: Called at each report of progress; raises if the run is to stop.
    """
    with _task(trainer.progress_bar_callback, title) as show:

        def report(done: int, total: int, text: str) -> None:
            show(done, total, text)
            check_stop()

        yield report


def _task(bar: ProgressBar | None, title: str) -> AbstractContextManager[Progress]:
    """Return a task that suits the kind of progress bar and the output."""
    rich = getattr(bar, "progress", None)
    if bar is None or not getattr(bar, "is_enabled", False):
        return _silence()
    if rich is not None and (rich.console.is_terminal or rich.console.is_jupyter):
        return _rich_task(rich, title)
    if hasattr(bar, "init_train_tqdm") and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return _tqdm_task(bar.init_train_tqdm(), title)
    return _lines(title)


@contextmanager
def _silence() -> Iterator[Progress]:
    yield no_progress


@contextmanager
def _rich_task(rich: Any, title: str) -> Iterator[Progress]:
    task = rich.add_task(f"[white]{title}", total=1)
    count = 1

    def update(done: int, total: int, text: str) -> None:
        nonlocal count
        count = total
        rich.update(task, completed=done, total=total, description=f"[white]{title} {text}")
        if done % 10 == 0:  # Lightning's bar has no automatic refresh
            rich.refresh()

    yield update
    rich.update(task, completed=count, total=count, description=f"[white]{title}")  # finished tasks stay visible
    rich.refresh()


@contextmanager
def _tqdm_task(tqdm: Any, title: str) -> Iterator[Progress]:
    tqdm.set_description(title)

    def update(done: int, total: int, text: str) -> None:
        tqdm.total = total
        if tqdm.desc != f"{title} {text}: ":
            tqdm.set_description(f"{title} {text}")
        tqdm.update(done - tqdm.n)

    try:
        yield update
        tqdm.set_description(title)
    finally:
        tqdm.close()


@contextmanager
def _lines(title: str) -> Iterator[Progress]:
    """Print a line about every ten seconds, for a log file."""
    start = shown = time.monotonic()

    def update(done: int, total: int, text: str) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _PAUSE and 0 < done < total:
            shown, left = now, (now - start) * (total - done) / done
            rank_zero_info(f"{title}: {done / total:.0%}, at {text}; {now - start:.0f} s, about {left:.0f} s left")

    yield update
    rank_zero_info(f"{title}: done in {time.monotonic() - start:.0f} s")
