"""What a run over the units will hold and how long it will take, told before the work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_ptq.activations.shards import Part
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import batch_size
from lightning_ptq.errors import CalibrationError
from lightning_ptq.network.layers import layers_in_mode
from lightning_ptq.network.trace import RESULT
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.memory import _bytes, disk_room
from lightning_ptq.runtime.ranks import Ranks

Place = Literal["memory", "disk", "recomputed"]
_STEP = 6.0  # forwards of the float unit that a step of tuning takes for the same samples, measured on ResNet-20


@dataclass(frozen=True)
class MemoryPlan:
    """Where activations will be.

    Attributes:
        most: Bytes of activations held at a time, at most.
        limit: What of it may be in memory.
        unit: The unit at which that is.
        where: ``"memory"``; ``"disk"``: what exceeds the limit goes to memory-mapped files; ``"recomputed"``: the disk
            is too small for all, so each unit's inputs come from a forward from the start.
        seconds: Estimated time.
    """

    most: int
    limit: int
    unit: str
    where: Place
    seconds: float

    def __str__(self) -> str:
        place = {
            "memory": "all in memory",
            "disk": f"{_bytes(max(0, self.most - self.limit))} of them in memory-mapped files",
            "recomputed": "with nothing kept between units, for the disk is too small: each is computed from the start",
        }[self.where]
        return (
            f"up to {_bytes(self.most)} of activations at a time (at {self.unit}), {place};"
            f" about {max(1, round(self.seconds))} s"
        )


def plan_memory(
    calibration: Calibration,
    units: Sequence[Unit],
    limit: int,
    steps: Sequence[int],
    batch: int,
    sequential: bool,
    parts: Sequence[Part],
) -> MemoryPlan:
    """Work out what tuning will hold, from one watched forward of the first batch.

    Args:
        calibration: The calibrated module.
        units: In execution order.
        limit: Bytes that may be in memory.
        steps: Optimisation steps of each unit here.
        batch: Samples a step.
        sequential: Two streams are kept, the float and the quantized one.
        parts: Those of the calibration set that are captured and tuned on here.

    Raises:
        CalibrationError: If what a single unit needs fits neither into the limit nor onto the disk.
    """
    share = sum(part.weight for part in parts)
    if not units or not parts:
        return MemoryPlan(0, limit, "no unit", "memory", 0.0)
    streams = 2 if sequential else 1
    sizes, seconds = _watch(calibration, units)
    alone, kept = ([share * most for most in found] for found in _held(calibration, units, sizes, streams, len(parts)))
    where, most = _place(kept, limit), max(kept)
    if max(alone) > (room := limit + disk_room()):
        worst = units[alone.index(max(alone))].name
        raise CalibrationError(
            f"the inputs and outputs of unit {worst!r} take {_bytes(max(alone))}, but memory_limit and the free disk"
            f" space make {_bytes(room)}. Calibrate with fewer samples, raise memory_limit, point TMPDIR to a larger"
            " disk, or choose smaller units."
        )
    per_sample = {name: value / batch_size(calibration.batches[0]) for name, value in seconds.items()}
    runs = streams * (len(units) / 2 if where == "recomputed" else 2)
    forwards = sum(per_sample.values()) * calibration.samples * runs
    tuning = sum(_STEP * per_sample[unit.name] * n * batch for unit, n in zip(units, steps, strict=True))
    return MemoryPlan(round(most), limit, units[kept.index(most)].name, where, share * (forwards + tuning))


def keep_outputs(calibration: Calibration, units: Sequence[Unit], limit: int, whole: bool = False) -> bool:
    """Whether a pass over the units keeps the outputs of finished ones; the same on all ranks.

    Not if a rank's memory and disk are too small for them: then each forward is one from the start.

    Args:
        calibration: The calibrated module.
        units: In execution order.
        limit: Bytes that may be in memory.
        whole: What reaches the forward's result is kept too, as by :class:`~lightning_ptq.activations.replay.Replay`.
    """
    _, kept = _held(calibration, units, _watch(calibration, units)[0], whole=whole)
    return agreed_to_keep(calibration.ranks, _place(kept, limit))


def agreed_to_keep(ranks: Ranks, where: Place) -> bool:
    """Whether no rank has to compute outputs again."""
    return "recomputed" not in ranks.gather(where)


def _place(kept: Sequence[float], limit: int) -> Place:
    return "memory" if max(kept) <= limit else "disk" if max(kept) <= limit + disk_room() else "recomputed"


def _held(
    calibration: Calibration,
    units: Sequence[Unit],
    sizes: Mapping[str, tuple[int, int]],
    streams: int = 1,
    parts: int = 1,
    whole: bool = False,
) -> tuple[list[float], list[float]]:
    """Bytes held at each unit at most, from those of the first batch: for the unit alone, and with the outputs kept for
    it and for later units. One part is captured after the other, and then handed on after the other.
    """
    scale = calibration.samples / batch_size(calibration.batches[0])
    needed = calibration.trace.needed_outputs([unit.name for unit in units])
    alone, kept = [], []

    def crossing(index: int, first: int) -> float:
        """Bytes of the outputs of units before ``index`` that the ``first`` and those behind it need, in a stream."""
        later = set().union(*(needed[other.name] for other in units[first:]), needed[RESULT] if whole else ())
        return scale * sum(sizes[other.name][1] for other in units[:index] if other.name in later)

    for index, unit in enumerate(units):
        inputs, outputs = (scale * size for size in sizes[unit.name])
        before, after = crossing(index, index), crossing(index, index + 1)
        held = streams * after + inputs + outputs
        capture = max(streams * before + inputs, (streams - 1) * before + after + inputs + outputs) / parts
        capture += max(inputs, outputs) / parts  # counted twice while they are put behind one another
        rest = max(streams * before, held) * (parts - 1) / parts
        alone.append(inputs + outputs + max(inputs, outputs) / parts)
        kept.append(max(capture + rest, held + (streams - 1) * outputs / parts))
    return alone, kept


def _watch(calibration: Calibration, units: Sequence[Unit]) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Bytes of inputs and outputs of each unit for the first batch, and seconds of its forward."""
    sizes = {unit.name: (0, 0) for unit in units}
    seconds = {unit.name: 0.0 for unit in units}
    started: dict[str, float] = {}

    def before(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            started[name] = time.perf_counter()
            sizes[name] = sizes[name][0] + _size((args, kwargs)), sizes[name][1]

        return hook

    def after(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seconds[name] += time.perf_counter() - started[name]
            sizes[name] = sizes[name][0], sizes[name][1] + _size(output)

        return hook

    handles = [unit.module.register_forward_pre_hook(before(unit.name), with_kwargs=True) for unit in units]
    handles += [unit.module.register_forward_hook(after(unit.name)) for unit in units]
    try:
        with layers_in_mode(calibration.module, "float"):
            calibration.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return sizes, seconds


def _size(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
