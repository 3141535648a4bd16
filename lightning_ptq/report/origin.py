"""When, with which versions and by which command a run was recorded."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

_LIBRARIES = ("lightning_ptq", "torch", "pytorch_lightning", "lightning")
_SECRET = re.compile(r"(^|[-_.])(key|token|secret|password|passwd)s?$", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """Where the figures of a record come from.

    Attributes:
        date: Local date and time with the offset from UTC, in ISO 8601, such as ``"2026-03-01T14:05:09+01:00"``.
        command: Command line, with file names in place of paths and without secrets.
        versions: Version by library, of those that are loaded, and of Python.
    """

    date: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Origin:
        """Return the origin of what this process records at this moment."""
        # A library that nobody has imported took no part in the run, and importing it here would cost seconds.
        loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in _LIBRARIES}
        versions = {name: str(version) for name, version in loaded.items() if version is not None}
        date = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(date, shortened(sys.argv), {**versions, "Python": platform.python_version()})


def shortened(arguments: Sequence[str]) -> str:
    """Return a command line with file names in place of paths, and without the values of keys and passwords.

    Args:
        arguments: Program and arguments.

    Example:
        >>> shortened(["/home/me/train.py", "--data=/mnt/images.npz", "--steps", "20", "--api_key", "3141"])
        'train.py --data=images.npz --steps 20 --api_key ***'
    """
    words, hidden = [], False
    for word in arguments:
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        value = "***" if value and (hidden or _SECRET.search(name)) else re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        words.append(shlex.quote(f"{name}{equals}{value}") if value != "***" else f"{name}{equals}***")
        hidden = not equals and bool(_SECRET.search(word)) and word.startswith("-")
    return " ".join(words)
