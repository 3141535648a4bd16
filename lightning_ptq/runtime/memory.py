"""Sizes in bytes: parse them, format them, and measure how much room there is."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
import tempfile
from numbers import Integral

from rich.filesize import decimal

from lightning_ptq.errors import QConfigError

DEFAULT_MEMORY_LIMIT = "auto"
"""Default limit of the activations that are held in memory."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B?)\s*")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes in a size such as ``"2GiB"``, ``"500MB"`` or a plain number.

    Raises:
        QConfigError: If the text is not a size.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes(1000)
        (2147483648, 1000)
    """
    if isinstance(text, Integral) and not isinstance(text, bool) and text >= 0:
        return int(text)
    match = _SIZE.fullmatch(text.upper()) if isinstance(text, str) else None
    if match is None or match[2] not in _UNITS or (match[2] == "" and "." in match[1]):
        raise QConfigError(f"cannot read {text!r} as a size in bytes. Write for example '2GiB' or '500MB'.")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_limit(text: str | int) -> int | None:
    """Return the bytes of a memory limit; None for ``"auto"``, which depends on the network.

    Raises:
        QConfigError: If the text is neither.
    """
    if text == "auto":
        return None
    try:
        return parse_bytes(text)
    except QConfigError as error:
        raise QConfigError(f"memory_limit: {error} Or write 'auto'.") from None


def format_bytes(count: float) -> str:
    """Return a number of bytes as text for people, in powers of 1000.

    Example:
        >>> format_bytes(1234567)
        '1.2 MB'
    """
    return decimal(round(count))


def disk_room(directory: str | None = None) -> int:
    """Return the bytes that activations may take on the disk of the temporary files: 90 % of the free space."""
    return int(shutil.disk_usage(directory or tempfile.gettempdir()).free * 0.9)


def trim_heap() -> None:
    """Return unused heap memory to the system. This has an effect with glibc only.

    Forwards and tuning steps leave hundreds of megabytes of it, in pieces that do not fit the next allocations.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl, for example, does not have it
        if trim is not None:
            trim(0)
