"""The calibration samples of one unit: inputs and float targets, ready for mini-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.activations.calls import Call, run_unit, unit_errors
from lightning_ptq.activations.groups import Group, Target, rows_of, sample_wise, signature
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.errors import UnitError
from lightning_ptq.network.op import Mode
from lightning_ptq.runtime.isolation import Isolation, RandomState
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.structure import float_tensors_in, is_float


class UnitData:
    """The calibration samples of one unit: calls grouped by shape, whose rows may be mixed freely if ``separable``.

    Rows are separable if the unit treats them independently. A trial on the first call decides. A unit that mixes rows
    (attention over the first dimension, for example) is tuned on whole calls.
    """

    def __init__(
        self,
        calls: list[list[Call]],
        store: ActivationStore,
        isolation: Isolation | None = None,
        padding: Sequence[Tensor | None] = (),
    ) -> None:
        self.store = store
        self.padding = padding
        self.isolation = isolation or Isolation()
        self.groups: list[Group] = []
        self.separable = True
        self.row_bytes = 1  # bytes per row of the largest activation inside the unit
        self.most_rows: int | None = None  # rows that a forward takes at most, if separable
        gathered: dict[Any, list[tuple[tuple[int, int], Call]]] = {}
        for batch, of_batch in enumerate(calls):
            for index, call in enumerate(of_batch):
                gathered.setdefault(signature(call), []).append(((batch, index), call))
            of_batch.clear()  # the groups own the calls now
        for key in list(gathered):
            self.groups.append(self._stack(gathered.pop(key)))

    def _stack(self, members: list[tuple[tuple[int, int], Call]]) -> Group:
        first = members[0][1]
        wise = sample_wise(first)
        sizes = [rows_of(call) for _, call in members]
        leaves: list[Any] = []
        for i, is_wise in enumerate(wise):
            if is_wise:
                parts: list[Any] = []
                for _, call in members:
                    parts.append(call.leaves[i])
                    call.leaves[i] = None  # so that calls are freed as they are concatenated
                leaves.append(self.store.stack(parts, cast(torch.device, first.devices[i])))
            else:
                leaves.append(first.leaves[i])
        bounds = [0, *accumulate(sizes)]
        random = [call.random for _, call in members]
        return Group(leaves, first.devices, first.spec, wise, bounds, [key for key, _ in members], random)

    def run(self, unit: nn.Module, group: Group, rows: Tensor | slice, mode: Mode) -> Any:
        """Return the unit's output on some rows of a group, without gradients."""
        args, kwargs = group.arguments(rows)
        return run_unit(unit, args, kwargs, mode, self.isolation, group.random_of(rows))

    def set_targets(self, outputs: list[list[Call]], unit: nn.Module) -> None:
        """Use the float unit's outputs, by batch and call, as targets; the calls then hold views of the targets.

        Raises:
            UnitError: If the unit returns no floating-point tensor, or other numbers of them for calls of one shape.
        """
        for group in self.groups:
            calls = [outputs[batch][index] for batch, index in group.calls]
            columns = {tuple(i for i, leaf in enumerate(call.leaves) if is_float(leaf)) for call in calls}
            if columns == {()} or len(columns) > 1:
                raise UnitError("it returns no floating-point tensor" if columns == {()} else _VARY)
            group.targets = [self._stack_column(calls, column) for column in columns.pop()]
            for target in group.targets if self.padding else ():
                masks = (self.padding[batch] for batch, _ in group.calls)
                target.real = _real(target.calls, masks)
        if len({len(group.targets or []) for group in self.groups}) > 1:
            raise UnitError(_VARY)
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

    def padding_of(self, group: Group, rows: Tensor | slice) -> Tensor | None:
        """Return which positions of some rows hold data, (rows, positions); None if all do, or it is not known."""
        masks = [self.padding[batch] if self.padding else None for batch, _ in group.calls]
        if isinstance(rows, slice):
            return masks[group.bounds.index(rows.start)]
        sizes = [part.stop - part.start for part in group.slices()]
        by_row = [
            mask if mask is None or len(mask) == size else mask.flatten()
            for mask, size in zip(masks, sizes, strict=True)
        ]
        if any(mask is None or len(mask) != size for mask, size in zip(by_row, sizes, strict=True)):
            return None
        found = cast(list[Tensor], by_row)
        return torch.cat(found)[rows] if len({mask.shape[1:] for mask in found}) == 1 else None

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
                outputs[key] = self._output(unit, group, rows, mode)
        return [[outputs[key] for key in sorted(outputs) if key[0] == batch] for batch in range(batches)]

    def _output(self, unit: nn.Module, group: Group, rows: slice, mode: Mode) -> Call:
        """Return the output of one call, with the random state after it."""
        after: list[RandomState | None] = [None]
        # Taken in a hook, because the state from before the run is back after it.
        watched = {"": unit} if self.isolation.draws else {}
        with hooked(watched, after=lambda *_: after.append(self.isolation.random_state())):
            output = self.run(unit, group, rows, mode)
        return Call.of(output, self.store.put, after[-1])

    def _check_separable(self, unit: nn.Module) -> bool:
        for group in self.groups:
            if not group.rows:
                continue
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
                outputs = float_tensors_in(self.run(unit, group, rows, "float"))
            self.row_bytes = max(self.row_bytes, largest[0] // size)
            try:
                with unit_errors():
                    half = float_tensors_in(self._half(unit, group, part))
            except UnitError:  # the unit accepts whole calls only
                return False
            for all_rows, some in zip(outputs, half, strict=True):
                expected = all_rows[size // 2 :]
                if some.shape != expected.shape:
                    return False
                if (some - expected).abs().max() > 1e-3 * expected.abs().max():
                    return False
        return True

    def _half(self, unit: nn.Module, group: Group, part: slice) -> Any:
        """Return the unit's float output on some rows of the first call, with the random state of that call."""
        args, kwargs = group.arguments(part)
        return run_unit(unit, args, kwargs, "float", self.isolation, group.random[0])

    def split(self, held_out: float, generator: torch.Generator) -> tuple[list[Sample], list[Sample]]:
        """Split into samples to tune on and samples held out: rows if separable, else whole calls."""
        samples = [
            (index, row)
            for index, group in enumerate(self.groups)
            for row in range(group.rows if self.separable else len(group.calls))
            if group.rows  # an expert may be called without any row
        ]
        order = [
            samples[i] for i in torch.randperm(len(samples), generator=generator, device=generator.device).tolist()
        ]
        cut = max(1, round(len(samples) * held_out)) if held_out and len(samples) > 1 else 0
        cut = max(0, min(cut, len(samples) - 1))  # one sample at least is left to tune on
        return order[cut:], order[:cut] or order  # with nothing held out, all samples decide

    def chunks(self, rows: Tensor | slice) -> list[tuple[Tensor | slice, float]]:
        """Split a mini-batch into chunks, each with its share of the rows, to keep activations small.

        Gradients add up to those of the mini-batch. On the CPU small chunks are several times faster, because the
        allocator maps activations above about 32 MB again on each use, page by page.
        """
        if isinstance(rows, slice):
            return [(rows, 1.0)]
        size = max(1, _CHUNK_BYTES // self.row_bytes) if self.device.type == "cpu" else len(rows)
        size = min(size, self.most_rows or size)
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


def _real(outputs: list[Tensor], masks: Iterator[Tensor | None]) -> list[Tensor | None]:
    """Return which values of each output are no padding; the positions are found in all outputs, or in none."""
    found = [where_real(output, mask, square=True) for output, mask in zip(outputs, masks, strict=True)]
    if any(real is None or len(real) != len(output) for real, output in zip(found, outputs, strict=True)):
        return [None] * len(found)
    return found


Sample = tuple[int, int]
Minibatch = tuple[Group, Tensor | slice]


_CHUNK_BYTES = 2**24
_VARY = "it returns other numbers of tensors in other calls"


def _shuffle(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()


@contextmanager
def _largest_output(module: nn.Module) -> Iterator[list[int]]:
    """Yield a list of one number: the bytes of the largest output of any module below ``module``, kept up to date."""
    largest = [1]

    def compare(name: str, child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        largest[0] = max([largest[0], *(leaf.numel() * leaf.element_size() for leaf in float_tensors_in(output))])

    with hooked(dict(module.named_modules()), after=compare):
        yield largest
