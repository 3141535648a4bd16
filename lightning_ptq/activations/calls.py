"""Calls of a module, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_ptq.network.layers import Mode, layers_in_mode


@dataclass
class Call:
    """One call of a module: a nested structure taken apart.

    Attributes:
        leaves: Tensors and other values.
        spec: How to put them together again.
        devices: Of each tensor; those of a GPU may be kept in files.
    """

    leaves: list[Any]
    spec: TreeSpec
    devices: list[torch.device | None]

    @classmethod
    def of(cls, tree: Any, keep: Callable[[Tensor], Any] = lambda tensor: tensor) -> Call:
        """Take ``tree`` apart; tensors pass through ``keep``."""
        leaves, spec = tree_flatten(tree)
        devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        return cls([keep(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec, devices)

    def tree(self) -> Any:
        """The structure put together, of copies on the tensors' devices."""
        leaves = []
        for leaf, device in zip(self.leaves, self.devices, strict=True):
            absent = isinstance(leaf, _Absent)
            leaves.append(leaf.zeros(device) if absent else leaf.to(device, copy=True) if device is not None else leaf)
        return tree_unflatten(leaves, self.spec)

    def drop(self) -> None:
        """Let go of the tensors; their shapes stay."""
        self.leaves = [_Absent(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]


class _Absent:
    """Stands for a tensor that nobody needs any more; only its shape is kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def zeros(self, device: torch.device | None) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def run_unit(unit: nn.Module, args: Any, kwargs: Any, mode: Mode) -> Any:
    """The unit's output without gradients."""
    with torch.no_grad(), layers_in_mode(unit, mode):
        return unit(*args, **kwargs)


def float_leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors in a nested structure."""
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
