"""Integers of few bits, packed into bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """Pack integers from 0 to ``2**bits - 1``, of any shape, into a bit stream of bytes (uint8, 1-d), lowest bit first.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0]), 2).tolist()
        [57]
    """
    flat = integers.flatten().to(torch.uint8).cpu().numpy()
    stream = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """Unpack ``count`` integers (uint8, 1-d); the inverse of :func:`pack_bits`."""
    flags = np.unpackbits(stream.numpy(), count=bits * count, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(flags, axis=1, bitorder="little")[:, 0])
