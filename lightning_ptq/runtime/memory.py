"""Sizes in bytes: reading them, showing them, and how much room there is."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
import tempfile

from lightning_ptq.errors import QConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes in a size such as ``"2GiB"``, ``"500MB"`` or a plain number.

    Raises:
        QConfigError: If the text is no size.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes(1000)
        (2147483648, 1000)
    """
    if isinstance(text, int) and text >= 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", str(text).upper())
    if match is None or (match[2] and match[2] not in _UNITS):
        raise QConfigError(f"cannot read {text!r} as a size in bytes. Write for example '2GiB' or '500MB'.")
    return int(float(match[1]) * _UNITS[match[2]])


def disk_room(directory: str | None = None) -> int:
    """Bytes that activations may take of the disk with the temporary files: nine tenths of what is free."""
    return int(shutil.disk_usage(directory or tempfile.gettempdir()).free * 0.9)


def trim_heap() -> None:
    """Give freed memory that the C library keeps for later back to the system (glibc only; elsewhere nothing happens).

    Forwards and tuning leave some hundred megabytes of it, in pieces that do not fit what comes next.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


DEFAULT_MEMORY_LIMIT = "4GiB"
