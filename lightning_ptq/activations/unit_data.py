"""The calibration samples of one unit: inputs and float targets, ready for mini-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from lightning_ptq.activations.calls import Call, float_leaves, run_unit
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.network.op import Mode
from lightning_ptq.runtime.patching import hooked


@dataclass
class Target:
    """One output of the float unit, over all calls of a group.

    Attributes:
        calls: The output of each call.
        whole: Their concatenation; None where their shapes do not fit.
        device: Device on which the unit computes them.
    """

    calls: list[Tensor]
    whole: Tensor | None
    device: torch.device


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
        targets: Outputs of the float unit.
    """

    inputs: list[Any]
    devices: list[torch.device | None]
    spec: TreeSpec
    sample_wise: list[bool]
    bounds: list[int]
    calls: list[tuple[int, int]]
    targets: list[Target] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of all calls together."""
        return self.bounds[-1]

    def arguments(self, rows: Tensor | slice) -> tuple[Any, Any]:
        """Return (args, kwargs) of some rows, copied, because a unit may change its inputs in place."""
        picked = []
        for leaf, device, wise in zip(self.inputs, self.devices, self.sample_wise, strict=True):
            part = leaf[rows] if wise else leaf
            is_view = isinstance(rows, slice) or not wise
            picked.append(part if device is None else part.to(device, copy=is_view))
        args, kwargs = tree_unflatten(picked, self.spec)
        return args, kwargs

    def wanted(self, rows: Tensor | slice) -> list[Tensor]:
        """Return the targets of some rows, or of a whole call, whose outputs may have other rows than its inputs."""
        if isinstance(rows, slice):
            call = self.bounds.index(rows.start)
            return [target.calls[call].to(target.device) for target in self.targets or []]
        return [cast(Tensor, target.whole)[rows].to(target.device) for target in self.targets or []]

    def slices(self) -> Iterator[slice]:
        """Return the rows of each call."""
        return (slice(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False))


class UnitData:
    """The calibration samples of one unit: calls grouped by shape, whose rows may be mixed freely if ``separable``.

    Rows are separable if the unit treats them independently. A trial on the first call decides. A unit that mixes rows
    (attention over the first dimension, for example) is tuned on whole calls.
    """

    def __init__(self, calls: list[list[Call]], store: ActivationStore) -> None:
        self.store = store
        self.groups: list[Group] = []
        self.separable = True
        self.row_bytes = 1  # bytes per row of the largest activation inside the unit
        gathered: dict[Any, list[tuple[tuple[int, int], Call]]] = {}
        for batch, of_batch in enumerate(calls):
            for index, call in enumerate(of_batch):
                gathered.setdefault(_signature(call), []).append(((batch, index), call))
            of_batch.clear()  # the groups own the calls now
        for key in list(gathered):
            self.groups.append(self._stack(gathered.pop(key)))

    def _stack(self, members: list[tuple[tuple[int, int], Call]]) -> Group:
        first = members[0][1]
        sample_wise = _sample_wise(first)
        sizes = [_rows(call) for _, call in members]
        leaves: list[Any] = []
        for i, wise in enumerate(sample_wise):
            if wise:
                parts: list[Any] = []
                for _, call in members:
                    parts.append(call.leaves[i])
                    call.leaves[i] = None  # so that calls are freed as they are concatenated
                leaves.append(self.store.stack(parts, cast(torch.device, first.devices[i])))
            else:
                leaves.append(first.leaves[i])
        bounds = [0, *accumulate(sizes)]
        return Group(leaves, first.devices, first.spec, sample_wise, bounds, [key for key, _ in members])

    def set_targets(self, outputs: list[list[Call]], unit: nn.Module) -> None:
        """Use the float unit's outputs, by batch and call, as targets; the calls then hold views of the targets."""
        for group in self.groups:
            calls = [outputs[batch][index] for batch, index in group.calls]
            group.targets = []
            for column, first in enumerate(calls[0].leaves):
                if isinstance(first, Tensor) and first.is_floating_point():
                    group.targets.append(self._stack_column(calls, column))
        self.separable = self._check_separable(unit)

    def _stack_column(self, calls: list[Call], column: int) -> Target:
        device = cast(torch.device, calls[0].devices[column])
        parts = [call.leaves[column] for call in calls]
        if not parts[0].dim() or len({part.shape[1:] for part in parts}) > 1:
            return Target(parts, None, device)
        rows = [len(part) for part in parts]
        for call in calls:
            call.leaves[column] = None
        whole = self.store.stack(parts, device)
        views = list(whole.split(rows))
        for call, view in zip(calls, views, strict=True):
            call.leaves[column] = view
        return Target(views, whole, device)

    def drop_targets(self) -> None:
        """Free the targets."""
        for group in self.groups:
            group.targets = None

    def outputs(self, unit: nn.Module, batches: int, mode: Mode) -> list[list[Call]]:
        """Return the unit's outputs on its inputs, by batch and call.

        :meth:`~lightning_ptq.activations.replay.Replay.finish` takes them in this form.
        """
        outputs: dict[tuple[int, int], Call] = {}
        for group in self.groups:
            for key, rows in zip(group.calls, group.slices(), strict=True):
                outputs[key] = Call.of(run_unit(unit, *group.arguments(rows), mode=mode), self.store.put)
        return [[outputs[key] for key in sorted(outputs) if key[0] == batch] for batch in range(batches)]

    def _check_separable(self, unit: nn.Module) -> bool:
        for group in self.groups:
            rows = next(group.slices())
            size = rows.stop - rows.start
            # Rows of outputs must correspond to rows of inputs, or a mini-batch has no targets.
            whole = [target.whole for target in group.targets or []]
            if not whole or any(tensor is None or len(tensor) != group.rows for tensor in whole):
                return False
            if size < 2:
                continue
            # The second half alone must give what it gives in the whole call; the first would hide position effects.
            part = slice(rows.start + size // 2, rows.stop)
            with _largest_output(unit) as largest:
                outputs = float_leaves(run_unit(unit, *group.arguments(rows), mode="float"))
            self.row_bytes = max(self.row_bytes, largest[0] // size)
            try:
                half = float_leaves(run_unit(unit, *group.arguments(part), mode="float"))
            except RuntimeError:  # the unit accepts whole calls only
                return False
            for all_rows, some in zip(outputs, half, strict=True):
                expected = all_rows[size // 2 :]
                if some.shape != expected.shape:
                    return False
                if (some - expected).abs().max() > 1e-3 * expected.abs().max():
                    return False
        return True

    def split(self, held_out: float, generator: torch.Generator) -> tuple[list[Sample], list[Sample]]:
        """Split into samples to tune on and samples held out: rows if separable, else whole calls."""
        samples = [
            (index, row)
            for index, group in enumerate(self.groups)
            for row in range(group.rows if self.separable else len(group.calls))
        ]
        order = [
            samples[i] for i in torch.randperm(len(samples), generator=generator, device=generator.device).tolist()
        ]
        cut = max(1, round(len(samples) * held_out)) if held_out and len(samples) > 1 else 0
        cut = min(cut, len(samples) - 1)  # one sample at least is left to tune on
        return order[cut:], order[:cut] or order  # with nothing held out, all samples decide

    def chunks(self, rows: Tensor | slice) -> list[tuple[Tensor | slice, float]]:
        """Split a mini-batch into chunks, each with its share of the rows, to keep activations small.

        Gradients add up to those of the mini-batch. On the CPU small chunks are several times faster, because the
        allocator maps activations above about 32 MB again on each use, page by page.
        """
        if isinstance(rows, slice) or self.device.type != "cpu":
            return [(rows, 1.0)]
        size = max(1, _CHUNK_BYTES // self.row_bytes)
        return [(chunk, len(chunk) / len(rows)) for chunk in rows.split(size)]

    @property
    def device(self) -> torch.device:
        """Device on which the unit computes: the GPU if any of its inputs is there."""
        devices = (device for group in self.groups for device in group.devices if device is not None)
        return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))

    def batches(self, samples: list[Sample], size: int, generator: torch.Generator | None = None) -> list[Minibatch]:
        """Return the samples in mini-batches of one group each, shuffled if a generator is given."""
        result: list[Minibatch] = []
        for index, group in enumerate(self.groups):
            rows = torch.tensor([row for of, row in samples if of == index], dtype=torch.long)
            if not len(rows):
                continue
            if generator is not None:
                rows = rows[_shuffle(len(rows), generator)]
            else:
                rows = rows.sort().values
            if self.separable:
                result += [(group, part) for part in rows.split(size)]
            else:
                result += [(group, slice(group.bounds[r], group.bounds[r + 1])) for r in rows.tolist()]
        if generator is not None:
            result = [result[i] for i in _shuffle(len(result), generator).tolist()]
        return result


Sample = tuple[int, int]
Minibatch = tuple[Group, Tensor | slice]


_CHUNK_BYTES = 2**24


def _shuffle(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()


@contextmanager
def _largest_output(module: nn.Module) -> Iterator[list[int]]:
    """Yield a list of one number: the bytes of the largest output of any module below ``module``, kept up to date."""
    largest = [1]

    def compare(name: str, child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        largest[0] = max([largest[0], *(leaf.numel() * leaf.element_size() for leaf in float_leaves(output))])

    with hooked(dict(module.named_modules()), after=compare):
        yield largest


def _rows(call: Call) -> int:
    """Return the rows of the first floating-point tensor; samples may share integer inputs, such as an order."""
    leaves = [leaf for leaf in call.leaves if isinstance(leaf, Tensor) and leaf.dim()]
    return next((leaf.shape[0] for leaf in leaves if leaf.is_floating_point()), leaves[0].shape[0] if leaves else 1)


def _sample_wise(call: Call) -> list[bool]:
    rows = _rows(call)
    return [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows for leaf in call.leaves]


def _signature(call: Call) -> Any:
    """Return a key that is equal for calls whose rows can be concatenated."""
    wise = _sample_wise(call)
    parts: list[Any] = []
    for leaf, device, is_wise in zip(call.leaves, call.devices, wise, strict=True):
        if is_wise:
            parts.append(("rows", tuple(leaf.shape[1:]), leaf.dtype, device))
        elif isinstance(leaf, Tensor):
            # Shared by all rows, so calls with other values must not be concatenated.
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts.append(("tensor", tuple(leaf.shape), leaf.dtype, hashlib.sha1(data).hexdigest()))
        else:
            parts.append(("value", repr(leaf)))
    return str(call.spec), tuple(parts)
