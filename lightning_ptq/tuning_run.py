"""A pass over all units that captures and tunes each: what both modes share, and sequential mode."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import ClassVar, cast

import torch

from lightning_ptq.calibrated import Calibration
from lightning_ptq.journal import Journal, LayerStates, Piece
from lightning_ptq.plan import agreed_to_keep, plan_memory
from lightning_ptq.qconfig import LayerQConfig
from lightning_ptq.ranks import Ranks
from lightning_ptq.reconstruct import UnitResult, reconstruct_unit
from lightning_ptq.replay import Replay
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
    """What both modes share."""

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
        counts = self.steps_by_unit()
        self.steps = sum(counts)
        self.plan = plan_memory(
            self.calibration, self.units, self.store.limit, counts, self.config.batch_size, self.sequential
        )
        self.keep = agreed_to_keep(self.ranks, self.plan.where)
        self.float_stream = Replay(self.calibration, self.units, self.store, "float", keep=self.keep)

    @abstractmethod
    def steps_by_unit(self) -> list[int]:
        """Optimisation steps of each unit on this rank."""

    def all(self) -> AdaQuantResult:
        """Every unit, one after the other."""
        for index, unit in enumerate(self.units):
            start = time.perf_counter()
            self.progress(self.steps_done, self.steps, unit.name)
            seconds = self.unit(index)
            self.result.seconds_tuning += seconds
            self.result.seconds_capture += time.perf_counter() - start - seconds
        return self.result

    @abstractmethod
    def unit(self, index: int) -> float:
        """Capture and tune; returns the seconds of the tuning."""

    def _tune(self, unit: Unit, data: UnitData, ranks: Ranks, restart: Callable[[], None] = lambda: None) -> UnitResult:
        generator = torch.Generator(self.calibration.device).manual_seed(self.seed)
        before, steps = self.steps_done, self._steps(unit_qconfigs(unit))

        def on_step(step: int) -> None:
            self.progress(before + step, self.steps, unit.name)

        row = reconstruct_unit(unit, data, self.config, steps, generator, on_step, ranks, restart)
        self.steps_done = before + steps
        self.on_unit(row)
        return row

    def _steps(self, widths: list[LayerQConfig]) -> int:
        return self.config.steps_for(widths, self.calibration.samples)


class SequentialRun(Run):
    """Each unit gets the inputs that it gets in the quantized model; all ranks share its steps."""

    sequential = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantized_stream = Replay(self.calibration, self.units, self.store, "quantized", keep=self.keep)

    def steps_by_unit(self) -> list[int]:
        """Optimisation steps of each unit on this rank."""
        return [self._steps(unit_qconfigs(unit)) for unit in self.units]

    def unit(self, index: int) -> float:
        """Capture, tune or take from the journal, and hand the quantized outputs on."""
        unit, batches = self.units[index], len(self.calibration.batches)
        data = UnitData(self.float_stream.inputs(index), self.store)
        outputs = data.outputs(unit.module, batches, "float")
        if self.quantized_stream.needs_others(index):
            del data  # before as much again is captured
            data = UnitData(self.quantized_stream.inputs(index), self.store)
        known = self.ranks.first(lambda: self.journal.read(unit.name) if self.journal else None)
        if known is None:
            data.set_targets(outputs, unit.module)
        self.float_stream.finish(index, outputs)
        start = time.perf_counter()
        self.result.units.append(self._tune_and_keep(unit, data) if known is None else self._take(unit, known))
        seconds = time.perf_counter() - start
        data.drop_targets()
        if self.keep:
            self.quantized_stream.finish(index, data.outputs(unit.module, batches, "quantized"))
        return seconds

    def _tune_and_keep(self, unit: Unit, data: UnitData) -> UnitResult:
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
