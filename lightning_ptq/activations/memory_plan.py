"""Estimates memory and time of a run over the units before it starts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_ptq.activations.shards import Shard
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import CalibrationError
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.network.trace import RESULT
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.memory import disk_room, format_bytes, parse_limit
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.runtime.structure import dense, tensors_in

Place = Literal["memory", "disk", "recomputed"]
# Measured on residual networks: copies of a unit's weights in a step (its start, the variables, Adam's moments, the
# gradients of the shards, tensors of the fake quantization), and copies of each layer's input and output.
_COPIES = 20
_TEMPORARY = 3
MOST_INPUTS = 3 * 3 * 512
"""Greatest number of inputs of an output for which the closed form is solved: its time is cubic, its memory square."""
_SOLVING = 10  # copies of the second moments of a layer's inputs in the closed form that tuning starts from
_LEAST = 2**28  # bytes that "auto" allows in any case; Python and torch take more
_STEP = 6.0  # forwards of the float unit that take as long as a tuning step on the same samples, measured on ResNet-20


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate of how much is stored, and where.

    Attributes:
        most: Upper bound of the bytes of activations held at a time.
        limit: Bytes that may be in memory.
        unit: The unit at which most are held.
        where: ``"memory"``; ``"disk"``: what exceeds the limit goes to memory-mapped files; ``"recomputed"``: the disk
            is too small, so each unit's inputs come from a forward from the start.
        seconds: Estimated duration.
        weights: Bytes of the weights: the module's tensors, the float reference, the quantized weights, and in parallel
            mode the tuned state of each candidate.
        tuning: Bytes that a step takes at the unit that takes most: gradients, optimizer state, temporary tensors.
    """

    most: int
    limit: int
    unit: str
    where: Place
    seconds: float
    weights: int = 0
    tuning: int = 0

    @property
    def rest(self) -> int:
        """Bytes that no memory limit changes: weights and tuning."""
        return self.weights + self.tuning

    @property
    def peak(self) -> int:
        """Estimated peak of the memory of the run, without Python and its libraries; right within a factor of two."""
        return self.rest + (self.most if self.where == "memory" else min(self.most, self.limit))

    def __str__(self) -> str:
        place = {
            "memory": "all in memory",
            "disk": f"{format_bytes(max(0, self.most - self.limit))} of them in memory-mapped files, as memory_limit"
            f" allows {format_bytes(self.limit)}",
            "recomputed": "nothing kept between units, as the disk is too small: each is computed from the start",
        }[self.where]
        return (
            f"up to {format_bytes(self.most)} of activations at a time (at {self.unit}), {place};"
            f" about {format_bytes(self.peak)} in all, of which {format_bytes(self.weights)} are weights and"
            f" {format_bytes(self.tuning)} tune the largest unit, whatever memory_limit is;"
            f" about {max(1, round(self.seconds))} s"
        )


def limit_of(memory_limit: str | int, calibration: Calibration, batch: int = 32) -> int:
    """Return the bytes of activations that may be in memory.

    ``"auto"`` allows what a forward and backward pass of the float network takes. A tuning step takes at most as much
    again, so the peak stays within twice that of such a pass, plus the weights.

    Args:
        memory_limit: A size, or ``"auto"``.
        calibration: The calibrated module.
        batch: Samples of the pass, as many as in a tuning step.

    Raises:
        QConfigError: If ``memory_limit`` cannot be read.
    """
    limit = parse_limit(memory_limit)
    if limit is not None:
        return limit
    sizes, first = _measure(calibration, ())[0], Batch(calibration.batches[0]).samples
    # Autograd keeps what layers read, and what normalizations and activations read from them.
    kept = sum(sum(size) for size in sizes.values()) * min(batch, calibration.samples) / first
    return max(_LEAST, round(kept))


def plan_memory(
    calibration: Calibration,
    units: Sequence[Unit],
    limit: int,
    steps: Sequence[int],
    batch: int,
    sequential: bool,
    shards: Sequence[Shard],
    states: int = 0,
) -> MemoryPlan:
    """Work out what tuning will hold, from one forward of the first batch.

    Args:
        calibration: The calibrated module.
        units: Units of this rank, in execution order.
        limit: Bytes that may be in memory.
        steps: Optimization steps of each unit.
        batch: Samples per step.
        sequential: True if two streams are kept, the float and the quantized one.
        shards: Shards of the calibration set that this rank holds.
        states: Number of tuned states of each layer that the run keeps.

    Raises:
        CalibrationError: If what a single unit needs fits neither into the limit nor onto the disk.
    """
    share = sum(shard.weight for shard in shards)
    if not units or not shards:
        return MemoryPlan(0, limit, "no unit", "memory", 0.0)
    streams = 2 if sequential else 1
    sizes, seconds = _measure(calibration, units)
    alone, kept = ([share * most for most in found] for found in _held(calibration, units, sizes, streams, len(shards)))
    where, most = _place(kept, limit), max(kept)
    if max(alone) > (room := limit + disk_room()):
        worst = units[alone.index(max(alone))].name
        raise CalibrationError(
            f"the inputs and outputs of unit {worst!r} take {format_bytes(max(alone))}, but memory_limit and the free"
            f" disk space make {format_bytes(room)}. Calibrate with fewer samples, raise memory_limit, point TMPDIR to"
            " a larger disk, or choose smaller units."
        )
    # Each stream runs about twice through the network, or half of it for each unit if nothing is kept.
    per_sample = {name: value / Batch(calibration.batches[0]).samples for name, value in seconds.items()}
    runs = streams * (len(units) / 2 if where == "recomputed" else 2)
    forwards = sum(per_sample.values()) * calibration.samples * runs
    tuning = sum(_STEP * per_sample[unit.name] * n * batch for unit, n in zip(units, steps, strict=True))
    at, total = units[kept.index(most)].name, share * (forwards + tuning)
    weights, step = _weights(calibration, states), _step(calibration, units, sizes, batch)
    return MemoryPlan(round(most), limit, at, where, total, weights, step)


def _weights(calibration: Calibration, states: int) -> int:
    """Return the bytes of all tensors of the module, its reference, its quantized weights, states and observers."""
    tensors = {id(t): t for t in (*calibration.module.parameters(), *calibration.module.buffers())}
    observers = (state for observer in calibration.observers.values() for state in observer.metric_state.values())
    layers = sum(_parameter_bytes(layer) for layer in calibration.layers.values())
    return _size([*tensors.values(), *observers]) + (2 + states) * layers


def _step(calibration: Calibration, units: Sequence[Unit], sizes: Mapping[str, tuple[int, int]], batch: int) -> int:
    """Return the bytes that a tuning step takes at the unit that takes most."""
    first = Batch(calibration.batches[0]).samples

    def of(unit: Unit) -> float:
        passing = sum(sum(sizes[name]) for name in unit.layers) * min(batch, calibration.samples) / first
        solving = _SOLVING * max((_moment_bytes(layer) for layer in unit.layers.values()), default=0)
        return _COPIES * sum(map(_parameter_bytes, unit.layers.values())) + _TEMPORARY * passing + solving

    return round(max(map(of, units)))


def _moment_bytes(layer: Any) -> int:
    """Return the bytes of the products of all pairs of inputs of a convolution's output, for all groups of channels."""
    inputs = max((weight[0].numel() for weight in layer.weights.values() if weight.dim() > 2), default=0)
    return int(getattr(layer, "groups", 1) * inputs**2 * 4) if inputs <= MOST_INPUTS else 0


def _parameter_bytes(layer: nn.Module) -> int:
    return _size(list(layer.parameters()))


def keep_outputs(calibration: Calibration, units: Sequence[Unit], limit: int, whole: bool = False) -> bool:
    """Return True if a pass over the units keeps the outputs of finished ones; the same on all ranks.

    If the memory and disk of any rank are too small for them, every forward runs from the start instead.

    Args:
        calibration: The calibrated module.
        units: Units in execution order.
        limit: Bytes that may be in memory.
        whole: As in :class:`~lightning_ptq.activations.replay.Replay`.
    """
    _, kept = _held(calibration, units, _measure(calibration, units)[0], whole=whole)
    return agree_to_keep(calibration.ranks, _place(kept, limit))


def agree_to_keep(ranks: Ranks, where: Place) -> bool:
    """Return True if no rank has to recompute outputs."""
    return "recomputed" not in ranks.gather(where)


def _place(kept: Sequence[float], limit: int) -> Place:
    return "memory" if max(kept) <= limit else "disk" if max(kept) <= limit + disk_room() else "recomputed"


def _held(
    calibration: Calibration,
    units: Sequence[Unit],
    sizes: Mapping[str, tuple[int, int]],
    streams: int = 1,
    shards: int = 1,
    whole: bool = False,
) -> tuple[list[float], list[float]]:
    """Return upper bounds of the bytes held at each unit, scaled from the first batch to the whole set.

    The first list is for the unit alone, the second includes the outputs kept for it and for later units.
    """
    scale = calibration.samples / Batch(calibration.batches[0]).samples
    names, needed = [unit.name for unit in units], dict[str, set[str]]()
    for trace in {id(trace): trace for trace in calibration.traces}.values():
        for name, others in trace.needed_outputs(names).items():
            needed[name] = needed.get(name, set()) | others
    alone, kept = [], []

    def crossing(index: int, first: int) -> float:
        """Return the bytes of outputs of units before ``index`` that unit ``first`` or a later one needs."""
        later = set().union(*(needed[other.name] for other in units[first:]), needed[RESULT] if whole else ())
        return float(scale * sum(sizes[other.name][1] for other in units[:index] if other.name in later))

    for index, unit in enumerate(units):
        inputs, outputs = (scale * size for size in sizes[unit.name])
        before, after = crossing(index, index), crossing(index, index + 1)
        # One shard is captured after the other: the present one peaks either with all outputs that cross the boundary
        # before the unit, or with its own outputs added; the other shards wait before (`before`) or after (`held`).
        held = streams * after + inputs + outputs
        capture = max(streams * before + inputs, (streams - 1) * before + after + inputs + outputs) / shards
        capture += max(inputs, outputs) / shards  # calls and their concatenation exist together for a moment
        rest = max(streams * before, held) * (shards - 1) / shards
        alone.append(inputs + outputs + max(inputs, outputs) / shards)
        # After tuning, shard by shard, the quantized outputs exist beside the float targets.
        kept.append(max(capture + rest, held + (streams - 1) * outputs / shards))
    return alone, kept


def _measure(calibration: Calibration, units: Sequence[Unit]) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Return what a batch takes at most, by one forward of each course.

    Returns:
        The bytes of inputs and outputs of each unit and each layer, and the seconds of each unit.
    """
    modules: dict[str, nn.Module] = {**calibration.layers, **{unit.name: unit.module for unit in units}}
    sizes = dict.fromkeys(modules, (0, 0))
    seconds = dict.fromkeys(modules, 0.0)
    started: dict[str, float] = {}

    def before(name: str, module: Any, args: Any, kwargs: Any) -> None:
        started[name] = time.perf_counter()
        sizes[name] = sizes[name][0] + _size((args, kwargs)), sizes[name][1]

    def after(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seconds[name] += time.perf_counter() - started[name]
        sizes[name] = sizes[name][0], sizes[name][1] + _size(output)

    most, longest = dict(sizes), dict(seconds)
    with hooked(modules, before, after), ops_in_mode(calibration.module, "float"):
        for batch in calibration.one_batch_per_course():
            sizes.update(dict.fromkeys(modules, (0, 0)))
            seconds.update(dict.fromkeys(modules, 0.0))
            calibration.run(batch)
            most = {name: (max(a, sizes[name][0]), max(b, sizes[name][1])) for name, (a, b) in most.items()}
            longest = {name: max(value, seconds[name]) for name, value in longest.items()}
    return most, {unit.name: longest[unit.name] for unit in units}


def _size(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in dense(tensors_in(tree)))
