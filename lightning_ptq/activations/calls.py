"""Calls of a module: their arguments or outputs, flattened for storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_ptq.network.op import Mode, ops_in_mode


@dataclass
class Call:
    """The arguments or the output of one call, as a flattened nested structure.

    Attributes:
        leaves: Tensors and other values.
        spec: Structure of the leaves.
        devices: Device of each tensor; tensors of a GPU may be stored in files.
    """

    leaves: list[Any]
    spec: TreeSpec
    devices: list[torch.device | None]

    @classmethod
    def of(cls, tree: Any, keep: Callable[[Tensor], Any] = lambda tensor: tensor) -> Call:
        """Flatten ``tree``; tensors pass through ``keep``."""
        leaves, spec = tree_flatten(tree)
        # Kept beside the leaves: a stored tensor may be in a file, on the CPU.
        devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        return cls([keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec, devices)

    def tree(self) -> Any:
        """Return the nested structure, with copies of the tensors on their devices."""
        leaves = []
        for leaf, device in zip(self.leaves, self.devices, strict=True):
            absent = isinstance(leaf, _Absent)
            # Copies, because a module may change its inputs in place and the stored tensor is used again.
            leaves.append(leaf.zeros(device) if absent else leaf.to(device, copy=True) if device is not None else leaf)
        return tree_unflatten(leaves, self.spec)

    def release(self) -> None:
        """Free the tensors and keep their shapes."""
        self.leaves = [_Absent(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]


class _Absent:
    """The shape of a tensor that no later unit needs."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def zeros(self, device: torch.device | None) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def run_unit(unit: nn.Module, args: Any, kwargs: Any, mode: Mode) -> Any:
    """Return the unit's output, without gradients."""
    with torch.no_grad(), ops_in_mode(unit, mode):
        return unit(*args, **kwargs)


def float_leaves(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in a nested structure."""
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
