"""The type of the functions that long work reports its progress to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Function of the steps done, the steps in total, and a text that names the current piece of work."""


def no_progress(done: int, total: int, text: str) -> None:
    """Report nothing."""
