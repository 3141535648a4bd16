"""A pass over all units that captures and tunes each: what both modes share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lightning_ptq.activations.calls import Call, unit_errors
from lightning_ptq.activations.memory_plan import agree_to_keep, plan_memory
from lightning_ptq.activations.replay import Replay, Stream
from lightning_ptq.activations.shards import Shard, make_shards
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import CalibrationError, MemoryWarning, UnitError, warn
from lightning_ptq.network.units import Unit, unit_qconfigs
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.journal import Journal, LayerStates
from lightning_ptq.runtime.progress import Progress
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.reconstruct import UnitResult, reconstruct_unit

OnUnit = Callable[[UnitResult], None]
"""Function that is called with the result of each unit."""


@dataclass
class AdaQuantResult:
    """The result of :func:`~lightning_ptq.tuning.adaquant.adaquant`.

    Attributes:
        units: A result per unit (and candidate), in the order of the work.
        states: For each candidate, the tuned state of every layer; parallel mode only.
        seconds_tuning: Time spent in optimization steps and on held-out errors.
        seconds_capture: Time spent on inputs and targets.
        peak_activation_bytes: Most bytes of activations held in memory at a time.
    """

    units: list[UnitResult] = field(default_factory=list)
    states: dict[str, LayerStates] = field(default_factory=dict)
    seconds_tuning: float = 0.0
    seconds_capture: float = 0.0
    peak_activation_bytes: int = 0


@dataclass
class Run(ABC):
    """A pass over the units, in either mode.

    Attributes:
        refused: Why units could not be tuned, by name.
        work: The units that this rank tunes.
        shards: The shards of the calibration set that this rank captures.
    """

    calibration: Calibration
    units: list[Unit]
    store: ActivationStore
    config: ReconstructionConfig
    seed: int
    progress: Progress
    journal: Journal
    candidates: list[LayerQConfig]
    on_unit: OnUnit
    result: AdaQuantResult = field(default_factory=AdaQuantResult)
    refused: dict[str, str] = field(default_factory=dict)
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.ranks = self.calibration.ranks
        self.steps_done = 0  # over all units, for the progress
        self.most_rows: int | None = None  # samples that a forward takes at most; None for those of a step
        samples = [Batch(batch).samples for batch in self.calibration.batches]
        shards = make_shards(samples, self.config.parts, self.config.batch_size)
        # Sequential mode shares the steps of each unit, so a rank holds its own shards; parallel mode shares the units.
        self.shards = [shard for shard in shards if not self.sequential or self.ranks.owns(shard.index)]
        self.work = [unit for unit in self.units if self.owns(unit)]
        # Embeddings, for example: the units after them get other inputs than in the float model.
        self.untuned = self.calibration.layers.keys() - {name for unit in self.units for name in unit.layers}
        counts = [self.steps_of(unit) for unit in self.work]
        self.steps = sum(counts)
        states = 0 if self.sequential else max(1, len(self.candidates))
        self.plan = plan_memory(
            self.calibration, self.work, self.store.limit, counts, self.config.batch_size, self.sequential, self.shards,
            states,
        )  # fmt: skip
        self.keep = agree_to_keep(self.ranks, self.plan.where)
        self.float_streams = self._streams("float")
        self.quantized_streams = self._streams("quantized") if self.sequential else []

    def _streams(self, stream: Stream) -> list[Replay]:
        return [
            Replay(self.calibration, self.work, self.store, stream, keep=self.keep, batches=shard.batches)
            for shard in self.shards
        ]

    def owns(self, unit: Unit) -> bool:
        """Return True if this rank tunes the unit."""
        return True

    def steps_of(self, unit: Unit) -> int:
        """Return the optimization steps of a unit of this rank."""
        return self._steps(unit_qconfigs(unit))

    def all(self) -> AdaQuantResult:
        """Tune every unit, one after the other."""
        for index, unit in enumerate(self.work):
            start = time.perf_counter()
            self.progress(self.steps_done, self.steps, unit.name)
            seconds = self.unit(index)
            self.result.seconds_tuning += seconds
            self.result.seconds_capture += time.perf_counter() - start - seconds
            self.progress(self.steps_done, self.steps, unit.name)  # again, for a unit that needed no steps
        return self.result

    @abstractmethod
    def unit(self, index: int) -> float:
        """Capture and tune a unit; return the seconds of the tuning."""

    def _capture(self, index: int, targets: bool) -> list[tuple[Shard, UnitData]]:
        """Return the unit's samples of each shard, with targets if wanted; later units get the float outputs.

        Raises:
            UnitError: If the unit cannot run alone on these samples. Later units then see its real outputs.
        """
        return [(shard, self._captured(index, place, targets)) for place, shard in enumerate(self.shards)]

    def _captured(self, index: int, place: int, targets: bool) -> UnitData:
        """Capture a shard; if the device runs out of memory, once more with all activations in files."""
        try:
            return self._capture_shard(index, place, targets)
        except torch.OutOfMemoryError as error:
            if not self.store.limit:
                raise CalibrationError(
                    f"the device ran out of memory in a forward up to unit {self.work[index].name!r}: {error}."
                    " Calibrate with smaller batches."
                ) from error
        self.store.limit = 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(
            f"the device ran out of memory in a forward up to unit {self.work[index].name!r}. The forward is repeated,"
            " and activations go to files from here on.",
            MemoryWarning,
            stacklevel=2,
        )
        return self._capture_shard(index, place, targets)

    def _capture_shard(self, index: int, place: int, targets: bool) -> UnitData:
        unit, stream, isolation = self.work[index], self.float_streams[place], self.calibration.isolation
        calls = stream.inputs(index)
        shapes = _shapes(calls)
        padding = [self.calibration.padding(batch) for batch in stream.batches]
        data = UnitData(calls, self.store, isolation, padding)
        with unit_errors():
            outputs = data.outputs(unit.module, len(stream.batches), "float")
        paired = True
        if self.sequential and (self.untuned or self.quantized_streams[place].needs_others(index)):
            del data  # freed before the quantized inputs, which take as much, are captured
            calls = self.quantized_streams[place].inputs(index, stream.proof)
            # Experts of a mixture, for example, may get other samples when the units before them are quantized.
            paired = unit.name not in stream.picked and _shapes(calls) == shapes
            data = UnitData(calls, self.store, isolation, padding)
        if targets:
            with unit_errors():
                own = outputs if paired else data.outputs(unit.module, len(stream.batches), "float")
                data.set_targets(own, unit.module)
        stream.finish(index, outputs)
        return data

    def _tune(
        self,
        unit: Unit,
        data: list[tuple[Shard, UnitData]],
        ranks: Ranks,
        restart: Callable[[], None] | None = None,
    ) -> UnitResult:
        before, steps = self.steps_done, self._steps(unit_qconfigs(unit))

        def on_step(step: int) -> None:
            self.progress(before + step, self.steps, unit.name)

        while True:
            for _, samples in data:
                samples.most_rows = self.most_rows
            try:
                row = reconstruct_unit(unit, data, self.config, steps, self.seed, on_step, ranks, restart)
                break
            except UnitError as error:
                if ranks.world > 1:  # other ranks may be in the middle of a step
                    raise CalibrationError(
                        f"unit {unit.name!r} cannot be tuned: {error}. Choose other blocks=."
                    ) from error
                return self._refuse(unit, str(error))
            except torch.OutOfMemoryError as error:
                self._lower(unit, ranks, all(samples.separable for _, samples in data), error)
        self.steps_done = before + steps
        self.on_unit(row)
        return row

    def _lower(self, unit: Unit, ranks: Ranks, separable: bool, error: torch.OutOfMemoryError) -> None:
        """Have steps take fewer samples at a time, whose gradients add up, after the device ran out of memory.

        Raises:
            CalibrationError: If that is not possible.
        """
        rows = self.most_rows or max(shard.size for shard in self.shards)
        if rows == 1 or not separable or ranks.world > 1:  # other ranks are in the middle of a step
            raise CalibrationError(
                f"the device ran out of memory while unit {unit.name!r} was tuned: {error}. Write a smaller batch_size"
                f" (now {self.config.batch_size}), a smaller memory_limit, or choose smaller units by blocks=."
            ) from error
        self.most_rows = rows // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(
            f"the device ran out of memory while unit {unit.name!r} was tuned. The unit is tuned again, with"
            f" {self.most_rows} samples at a time instead of {rows}.",
            MemoryWarning,
            stacklevel=2,
        )

    def _refuse(self, unit: Unit, why: str) -> UnitResult:
        """Return the result of a unit that keeps its initial quantization, because it cannot be tuned."""
        self.refused[unit.name] = why
        self.steps_done += self._steps(unit_qconfigs(unit))
        bits = "/".join(sorted({str(pair) for pair in unit_qconfigs(unit)}))
        row = UnitResult(unit.name, bits, float("nan"), float("nan"), False, 0, 0.0)
        self.on_unit(row)
        return row

    def _steps(self, qconfigs: list[LayerQConfig]) -> int:
        return self.config.steps_for(qconfigs, self.calibration.samples)


def _shapes(calls: list[list[Call]]) -> list[list[list[Any]]]:
    return [[call.shapes() for call in of_batch] for of_batch in calls]
