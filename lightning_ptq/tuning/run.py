"""A pass over all units that captures and tunes each: what both modes share."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from lightning_ptq.activations.memory_plan import agreed_to_keep, plan_memory
from lightning_ptq.activations.replay import Replay, Stream
from lightning_ptq.activations.shards import Part, deal_parts
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import batch_size
from lightning_ptq.network.units import Unit, unit_qconfigs
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.journal import Journal, LayerStates
from lightning_ptq.runtime.progress import Progress
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.reconstruct import UnitResult, reconstruct_unit

OnUnit = Callable[[UnitResult], None]


@dataclass
class AdaQuantResult:
    """What :func:`adaquant` did.

    Attributes:
        units: A row per unit (and candidate), in the order of the work.
        states: For each candidate, the tuned state of every layer; parallel mode only.
        seconds_tuning: Time spent in optimisation steps and held-out checks.
        seconds_capture: Time spent on inputs and targets.
        peak_activation_bytes: Most bytes of activations held in memory at a time.
    """

    units: list[UnitResult] = field(default_factory=list)
    states: dict[str, LayerStates] = field(default_factory=dict)
    seconds_tuning: float = 0.0
    seconds_capture: float = 0.0
    peak_activation_bytes: int = 0


@dataclass
class Run:
    """What both modes share.

    Attributes:
        work: The units that this rank has to do with.
        parts: The parts of the calibration set that this rank captures.
    """

    calibration: Calibration
    units: list[Unit]
    store: ActivationStore
    config: ReconstructionConfig
    seed: int
    progress: Progress
    journal: Journal | None
    candidates: list[LayerQConfig]
    on_unit: OnUnit
    result: AdaQuantResult = field(default_factory=AdaQuantResult)
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.ranks = self.calibration.ranks
        self.steps_done = 0
        samples = [batch_size(batch) for batch in self.calibration.batches]
        parts = deal_parts(samples, self.config.parts, self.config.batch_size)
        self.parts = [part for part in parts if not self.sequential or self.ranks.mine(part.index)]
        self.work = [unit for unit in self.units if self.mine(unit)]
        counts = [self.steps_of(unit) for unit in self.work]
        self.steps = sum(counts)
        self.plan = plan_memory(
            self.calibration, self.work, self.store.limit, counts, self.config.batch_size, self.sequential, self.parts
        )
        self.keep = agreed_to_keep(self.ranks, self.plan.where)
        self.float_streams = self._streams("float")
        self.quantized_streams = self._streams("quantized") if self.sequential else []

    def _streams(self, stream: Stream) -> list[Replay]:
        return [
            Replay(self.calibration, self.work, self.store, stream, keep=self.keep, batches=part.batches)
            for part in self.parts
        ]

    def mine(self, unit: Unit) -> bool:
        """Whether this rank has to do with the unit."""
        return True

    def steps_of(self, unit: Unit) -> int:
        """Optimisation steps of a unit of this rank's."""
        return self._steps(unit_qconfigs(unit))

    def all(self) -> AdaQuantResult:
        """Every unit, one after the other."""
        for index, unit in enumerate(self.work):
            start = time.perf_counter()
            self.progress(self.steps_done, self.steps, unit.name)
            seconds = self.unit(index)
            self.result.seconds_tuning += seconds
            self.result.seconds_capture += time.perf_counter() - start - seconds
            self.progress(self.steps_done, self.steps, unit.name)  # also where there was nothing to tune
        return self.result

    @abstractmethod
    def unit(self, index: int) -> float:
        """Capture and tune; returns the seconds of the tuning."""

    def _capture(self, index: int, targets: bool) -> list[tuple[Part, UnitData]]:
        """The unit's samples of each part, with targets if wanted; the float outputs go on to later units."""
        return [(part, self._capture_part(index, place, targets)) for place, part in enumerate(self.parts)]

    def _capture_part(self, index: int, place: int, targets: bool) -> UnitData:
        module, stream = self.work[index].module, self.float_streams[place]
        data = UnitData(stream.inputs(index), self.store)
        outputs = data.outputs(module, len(stream.batches), "float")
        if self.sequential and self.quantized_streams[place].needs_others(index):
            del data  # before as much again is captured
            data = UnitData(self.quantized_streams[place].inputs(index, stream.proof), self.store)
        if targets:
            data.set_targets(outputs, module)
        stream.finish(index, outputs)
        return data

    def _tune(
        self,
        unit: Unit,
        data: list[tuple[Part, UnitData]],
        ranks: Ranks,
        restart: Callable[[], None] = lambda: None,
    ) -> UnitResult:
        before, steps = self.steps_done, self._steps(unit_qconfigs(unit))

        def on_step(step: int) -> None:
            self.progress(before + step, self.steps, unit.name)

        row = reconstruct_unit(unit, data, self.config, steps, self.seed, on_step, ranks, restart)
        self.steps_done = before + steps
        self.on_unit(row)
        return row

    def _steps(self, widths: list[LayerQConfig]) -> int:
        return self.config.steps_for(widths, self.calibration.samples)
