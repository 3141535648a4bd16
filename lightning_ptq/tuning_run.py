"""A pass over all units that captures and tunes each: what both modes share, and sequential mode."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import ClassVar, cast

from lightning_ptq.calibrated import Calibration
from lightning_ptq.forward import batch_size
from lightning_ptq.journal import Journal, LayerStates, Piece
from lightning_ptq.parts import Part, deal_parts
from lightning_ptq.plan import agreed_to_keep, plan_memory
from lightning_ptq.qconfig import LayerQConfig
from lightning_ptq.ranks import Ranks
from lightning_ptq.reconstruct import UnitResult, reconstruct_unit
from lightning_ptq.replay import Replay, Stream
from lightning_ptq.store import ActivationStore
from lightning_ptq.tuners import ReconstructionConfig, layer_state, set_layer_state
from lightning_ptq.unit_data import UnitData
from lightning_ptq.units import Unit

Progress = Callable[[int, int, str], None]
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


class SequentialRun(Run):
    """Each unit gets the inputs that it gets in the quantized model; ranks share its steps, each with its own parts."""

    sequential = True

    def unit(self, index: int) -> float:
        """Capture, tune or take from the journal, and hand the quantized outputs on."""
        unit = self.work[index]
        known = self.ranks.first(lambda: self.journal.read(unit.name) if self.journal else None)
        data = self._capture(index, targets=known is None)
        start = time.perf_counter()
        self.result.units.append(self._tune_and_keep(unit, data) if known is None else self._take(unit, known))
        seconds = time.perf_counter() - start
        for stream in self.quantized_streams if self.keep else ():
            _, of_part = data.pop(0)  # let go of it before the next one's outputs are there
            of_part.drop_targets()
            stream.finish(index, of_part.outputs(unit.module, len(stream.batches), "quantized"))
        return seconds

    def _tune_and_keep(self, unit: Unit, data: list[tuple[Part, UnitData]]) -> UnitResult:
        def from_float() -> None:
            # Where parallel tuning came before, going on from its state fits the samples more and the task less.
            for name, pair in zip(unit.layers, unit_qconfigs(unit), strict=True):
                self.calibration.round_to_nearest(name, pair)

        row = self._tune(unit, data, self.ranks, from_float)
        if self.journal is not None and self.ranks.rank == 0:
            self.journal.write(unit.name, Piece(unit_states(unit), asdict(row)))
        return row

    def _take(self, unit: Unit, piece: Piece) -> UnitResult:
        set_unit_states(unit, piece.states)
        self.steps_done += self._steps(unit_qconfigs(unit))
        row = UnitResult.of(piece.facts)
        self.on_unit(row)
        return row


def unit_states(unit: Unit) -> LayerStates:
    """The state of each layer of a unit."""
    return {name: layer_state(layer) for name, layer in unit.layers.items()}


def set_unit_states(unit: Unit, states: LayerStates) -> None:
    """Put back what :func:`unit_states` copied."""
    for name, state in states.items():
        set_layer_state(unit.layers[name], state)


def unit_qconfigs(unit: Unit) -> list[LayerQConfig]:
    """The widths of a unit's layers."""
    return [cast(LayerQConfig, layer.qconfig) for layer in unit.layers.values()]
