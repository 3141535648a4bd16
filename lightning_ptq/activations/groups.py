"""Calls of one shape, concatenated, so that their rows can be mixed in mini-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ptq.activations.calls import Call
from lightning_ptq.runtime.isolation import RandomState
from lightning_ptq.runtime.structure import Structure, is_dense


@dataclass
class Target:
    """One output of the float unit, over all calls of a group.

    Attributes:
        calls: The output of each call.
        whole: Their concatenation; None where their shapes do not fit.
        device: Device on which the unit computes them.
        real: For each call, the values at positions with data, broadcastable to the output; None for all of them.
    """

    calls: list[Tensor]
    whole: Tensor | None
    device: torch.device
    real: list[Tensor | None] = field(default_factory=list)

    def of_call(self, call: int) -> Tensor:
        """Return the output of a call on its device, 0 where there is padding."""
        output, real = self.calls[call].to(self.device), self.real[call] if self.real else None
        return output if real is None else output * real.to(output)


@dataclass
class Picked:
    """What a step reads of some rows.

    Attributes:
        spec: Structure of the arguments.
        leaves: Leaves of (args, kwargs).
        targets: Outputs of the float unit, 0 at positions of padding.
        real: For each target, which of its values belong to positions with data; None for all of them.
    """

    spec: Structure
    leaves: list[Any]
    targets: list[Tensor]
    real: list[Tensor | None]

    def arguments(self) -> tuple[Any, Any]:
        """Return (args, kwargs)."""
        args, kwargs = self.spec.build(self.leaves)
        return args, kwargs

    def without_padding(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return outputs with 0 at positions of padding."""
        return masked(outputs, self.real)

    def clone(self) -> Picked:
        """Return a copy whose tensors have places of their own."""

        def copied(values: Sequence[Any]) -> list[Any]:
            return [value.clone() if isinstance(value, Tensor) else value for value in values]

        return Picked(self.spec, copied(self.leaves), copied(self.targets), copied(self.real))

    def copy_(self, other: Picked) -> None:
        """Take over the values of the tensors of another one, of the same shapes."""
        pairs = ((self.leaves, other.leaves), (self.targets, other.targets), (self.real, other.real))
        for own, others in pairs:
            for to, value in zip(own, others, strict=True):
                if isinstance(to, Tensor):
                    to.copy_(value)


@dataclass
class Group:
    """Calls of one shape, concatenated.

    Attributes:
        inputs: Leaves of (args, kwargs). Sample-wise ones are concatenated over all calls, the others are shared.
        devices: Device of each leaf in the unit; leaves of a GPU may be stored in files.
        spec: Structure of the leaves.
        sample_wise: True for leaves that have one row per sample.
        bounds: First row of each call, and the end of the last call.
        calls: (batch, call) of each call.
        random: Random state before each call.
        targets: Outputs of the float unit.
    """

    inputs: list[Any]
    devices: list[torch.device | None]
    spec: Structure
    sample_wise: list[bool]
    bounds: list[int]
    calls: list[tuple[int, int]]
    random: list[RandomState | None]
    targets: list[Target] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of all calls together."""
        return self.bounds[-1]

    def pick(self, rows: Tensor | slice) -> Picked:
        """Return what a step reads of some rows."""
        return Picked(self.spec, self._leaves(rows), self.wanted(rows), self._real(rows))

    def arguments(self, rows: Tensor | slice) -> tuple[Any, Any]:
        """Return (args, kwargs) of some rows, copied, because a unit may change its inputs in place."""
        args, kwargs = self.spec.build(self._leaves(rows))
        return args, kwargs

    def _leaves(self, rows: Tensor | slice) -> list[Any]:
        picked = []
        for leaf, device, wise in zip(self.inputs, self.devices, self.sample_wise, strict=True):
            part = leaf[rows] if wise else leaf
            is_view = isinstance(rows, slice) or not wise
            if device is None:
                picked.append(part.clone() if isinstance(part, Tensor) else part)  # sparse or nested
            else:
                picked.append(part.to(device, copy=is_view))
        return picked

    def random_of(self, rows: Tensor | slice) -> RandomState | None:
        """Return the random state before the call of some rows; None for rows of several calls."""
        return self.random[self.bounds.index(rows.start)] if isinstance(rows, slice) else None

    def wanted(self, rows: Tensor | slice) -> list[Tensor]:
        """Return the targets of some rows, or of a whole call, whose outputs may have other rows than its inputs."""
        if isinstance(rows, slice):
            call = self.bounds.index(rows.start)
            return [target.of_call(call) for target in self.targets or []]
        whole = [cast(Tensor, target.whole)[rows].to(target.device) for target in self.targets or []]
        return self.without_padding(whole, rows)

    def without_padding(self, outputs: Sequence[Tensor], rows: Tensor | slice) -> list[Tensor]:
        """Return outputs of some rows with 0 at positions of padding, so that these add nothing to a loss."""
        return masked(outputs, self._real(rows))

    def _real(self, rows: Tensor | slice) -> list[Tensor | None]:
        """Return for each target which values of some rows belong to positions with data; None for all of them."""
        found: list[Tensor | None] = []
        for target in self.targets or ():
            if all(real is None for real in target.real):
                found.append(None)
            elif isinstance(rows, slice):
                found.append(target.real[self.bounds.index(rows.start)])
            else:
                found.append(torch.cat([part for part in target.real if part is not None])[rows].to(target.device))
        return found

    def slices(self) -> Iterator[slice]:
        """Return the rows of each call."""
        return (slice(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False))


def masked(outputs: Sequence[Tensor], real: Sequence[Tensor | None]) -> list[Tensor]:
    """Return outputs with 0 where they hold no data."""
    return [output if mask is None else output * mask.to(output) for output, mask in zip(outputs, real, strict=True)]


def count_of(rows: Tensor | slice) -> int:
    """Return the number of rows that an index or a slice picks."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def rows_of(call: Call) -> int:
    """Return the rows of the first floating-point tensor; samples may share integer inputs, such as an order."""
    leaves = [leaf for leaf in call.leaves if is_dense(leaf) and leaf.dim()]
    return next((leaf.shape[0] for leaf in leaves if leaf.is_floating_point()), leaves[0].shape[0] if leaves else 1)


def sample_wise(call: Call) -> list[bool]:
    """Return for each leaf whether it has one row per sample."""
    rows = rows_of(call)
    return [is_dense(leaf) and leaf.dim() > 0 and leaf.shape[0] == rows for leaf in call.leaves]


def signature(call: Call) -> Any:
    """Return a key that is equal for calls whose rows can be concatenated."""
    wise = sample_wise(call)
    parts: list[Any] = []
    for leaf, device, is_wise in zip(call.leaves, call.devices, wise, strict=True):
        if is_wise:
            parts.append(("rows", tuple(leaf.shape[1:]), leaf.dtype, device))
        elif is_dense(leaf):
            # Shared by all rows, so calls with other values must not be concatenated.
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts.append(("tensor", tuple(leaf.shape), leaf.dtype, hashlib.sha1(data).hexdigest()))
        elif isinstance(leaf, (bool, int, float, complex, str, bytes, type(None))):
            parts.append(("value", repr(leaf)))
        else:
            parts.append(("object", id(leaf)))
    # Calls without rows are apart: a call is found by its first row, which they would share with the next call.
    return call.spec.key(), tuple(parts), rows_of(call) == 0
