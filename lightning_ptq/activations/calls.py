"""Calls of a module: their arguments or outputs, flattened for storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.errors import PTQError, UnitError
from lightning_ptq.network.op import Mode, ops_in_mode
from lightning_ptq.runtime.isolation import Isolation, RandomState
from lightning_ptq.runtime.structure import Structure, flatten, is_dense


@dataclass
class Call:
    """The arguments or the output of one call, as a flattened nested structure.

    Attributes:
        leaves: Tensors and other values.
        spec: Structure of the leaves.
        devices: Device of each dense tensor; tensors of a GPU may be stored in files.
        random: Random state before the call, or after it for an output; None if forwards draw no random numbers.
    """

    leaves: list[Any]
    spec: Structure
    devices: list[torch.device | None]
    random: RandomState | None = None

    @classmethod
    def of(
        cls, tree: Any, keep: Callable[[Tensor], Any] = lambda tensor: tensor, random: RandomState | None = None
    ) -> Call:
        """Flatten ``tree``; dense tensors pass through ``keep``, sparse and nested ones are copied."""
        leaves, spec = flatten(tree)
        # Kept beside the leaves: a stored tensor may be in a file, on the CPU.
        devices = [leaf.device if is_dense(leaf) else None for leaf in leaves]
        return cls([keep(leaf) if is_dense(leaf) else _copied(leaf) for leaf in leaves], spec, devices, random)

    def tree(self) -> Any:
        """Return the nested structure, with copies of the tensors on their devices and of all objects."""
        leaves = []
        for leaf, device in zip(self.leaves, self.devices, strict=True):
            absent = isinstance(leaf, _Absent)
            # Copies, because a module may change its inputs in place and the stored tensor is used again.
            kept = leaf.to(device, copy=True) if device is not None and not absent else _copied(leaf)
            leaves.append(leaf.zeros(device) if absent else kept)
        return self.spec.build(leaves)

    def shapes(self) -> list[Any]:
        """Return the shape of each dense tensor, and None for other leaves."""
        return [None if device is None else leaf.shape for leaf, device in zip(self.leaves, self.devices, strict=True)]

    def release(self) -> None:
        """Free the tensors and keep their shapes."""
        self.leaves = [_Absent(leaf) if is_dense(leaf) else leaf for leaf in self.leaves]


class _Absent:
    """The shape of a tensor that no later unit needs."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def zeros(self, device: torch.device | None) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@contextmanager
def unit_errors() -> Iterator[None]:
    """Raise what a user's module raises inside the ``with`` block as a :class:`UnitError`.

    The library's own errors, and that memory is exhausted, are passed on.
    """
    try:
        yield
    except (PTQError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A context manager would take the cause StopIteration for its own end, and pass that on instead.
        cause = None if isinstance(error, StopIteration) else error
        raise UnitError(f"its forward or backward pass fails with {type(error).__name__}: {error}") from cause


def run_unit(
    unit: nn.Module,
    args: Any,
    kwargs: Any,
    mode: Mode,
    isolation: Isolation | None = None,
    random: RandomState | None = None,
) -> Any:
    """Return the unit's output, without gradients.

    Args:
        unit: The unit.
        args: Positional arguments.
        kwargs: Keyword arguments.
        mode: Whether its operations compute in float.
        isolation: Leaves the unit unchanged; see :class:`~lightning_ptq.runtime.isolation.Isolation`.
        random: Random state for the call.
    """
    with torch.no_grad(), ops_in_mode(unit, mode), (isolation or Isolation()).forward(unit, random):
        return unit(*args, **kwargs)


def same_leaves(left: Call, right: Call) -> bool:
    """Return True if two calls have tensors of the same shapes and, up to rounding, the same values."""
    if left.shapes() != right.shapes():
        return False
    return all(same_up_to_rounding(a, b) for a, b in zip(left.leaves, right.leaves, strict=True) if is_dense(a))


def same_up_to_rounding(left: Tensor, right: Tensor) -> bool:
    """Return True if two tensors are equal up to the rounding of the kernels."""
    if left.shape != right.shape:
        return False
    if not left.numel():
        return True
    left = left.to(right.device)  # either may be in a file on the CPU
    if not left.is_floating_point():
        return bool(torch.equal(left, right))
    # Kernels round differently for other batch sizes; a misplaced value differs by far more.
    difference = (left - right).float().square().mean()
    return bool(difference <= 1e-4 * right.float().square().mean() + 1e-12)
