"""Integers of few bits, packed into bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """Integers from 0 to ``2**bits - 1``, any shape, as a bit stream of bytes (uint8, 1-d), lowest bit first.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0]), 2).tolist()
        [57]
    """
    flat = integers.flatten().to(torch.uint8).cpu().numpy()
    stream = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``count`` integers (uint8, 1-d)."""
    flags = np.unpackbits(stream.numpy(), count=bits * count, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(flags, axis=1, bitorder="little")[:, 0])
