"""Parallel mode: units are independent, so each is tuned at every candidate, by one rank."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import groupby
from typing import Any

from lightning_ptq.activations.shards import Shard
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.calibration.layer_costs import layer_work
from lightning_ptq.errors import UnitError
from lightning_ptq.network.units import Unit, set_unit_states, unit_qconfigs, unit_states
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.journal import JournalEntry, LayerStates
from lightning_ptq.runtime.ranks import Ranks, assign_to_ranks
from lightning_ptq.tuning.reconstruct import UnitResult
from lightning_ptq.tuning.run import AdaQuantResult, Run

# Time of a step per output value, weight, and layer, in multiply-accumulates: least squares over the units of
# ResNet-20, MobileNetV2, EfficientNet-Lite0 and a small vision transformer on a CPU.
_OUTPUT, _WEIGHT, _LAYER = 230.0, 330.0, 24e6


class ParallelRun(Run):
    """Each unit gets the float model's inputs and is tuned at every candidate; each unit belongs to one rank."""

    def __post_init__(self) -> None:
        self.ranks = self.calibration.ranks
        self.names = self.candidates or [self.calibration.prepared.qconfig.default]
        self.kept = self.journal.keys()
        costs = self._costs()
        self.owners = assign_to_ranks(costs, self.ranks.gather(self.kept & set(costs)))
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.tuned: LayerStates = {}
        super().__post_init__()

    def owns(self, unit: Unit) -> bool:
        """Return True if this rank tunes the unit."""
        return self.owners[unit.name] == self.ranks.rank

    def steps_of(self, unit: Unit) -> int:
        """Return the optimization steps of a unit at all candidates together; equal candidates are tuned once."""
        return sum(self._steps(qconfigs) for qconfigs, _ in groupby(sorted(self._choices(unit), key=str)))

    def _costs(self) -> dict[str, float]:
        """Estimate the time of each unit, in multiply-accumulates."""
        if self.ranks.world == 1:
            return dict.fromkeys((unit.name for unit in self.units), 1.0)
        costs = {unit.name: 0.0 for unit in self.units}
        work = layer_work(self.calibration)
        for unit in self.units:
            for name, layer in unit.layers.items():
                of_samples = self.config.batch_size * (work[name].macs + _OUTPUT * work[name].outputs)
                costs[unit.name] += of_samples + _WEIGHT * layer.weight_count + _LAYER
        return {unit.name: costs[unit.name] * self.steps_of(unit) for unit in self.units}

    def all(self) -> AdaQuantResult:
        """Tune this rank's units, then merge the results of all ranks."""
        super().all()
        rows, tuned = self.ranks.merge(self.rows), self.ranks.merge(self.tuned)
        self.result.seconds_tuning = max(self.ranks.gather(self.result.seconds_tuning))
        for unit in self.units:
            results = [UnitResult.of(row) for row in rows[unit.name]]
            self.result.units += results
            for row in results if unit.name not in self.rows else ():  # other ranks' units are reported here too
                self.on_unit(row)
            self._put(unit, {key: state for key, state in tuned.items() if key in self._keys(unit)})
        return self.result

    def unit(self, index: int) -> float:
        """Capture a unit, and tune it at each candidate or read its journal entry."""
        unit = self.work[index]
        entry = self.journal.read(unit.name) if unit.name in self.kept else None
        data, failure = [], ""
        try:
            data = self._capture(index, targets=entry is None)
        except UnitError as error:
            failure = str(error)
        start = time.perf_counter()
        if entry is None:
            entry = self._tune_candidates(unit, data, failure)
            self.journal.write(unit.name, entry)
        else:
            self.steps_done += self.steps_of(unit)
            for row in entry.facts["rows"]:
                self.on_unit(UnitResult.of(row))
        self.rows[unit.name] = entry.facts["rows"]
        self.tuned.update(entry.states)
        return time.perf_counter() - start

    def _tune_candidates(self, unit: Unit, data: list[tuple[Shard, UnitData]], failure: str) -> JournalEntry:
        """Tune at each candidate, from the float weights; the calibrated specs stay in place.

        After a failure to capture the unit, all candidates are rounded to nearest.
        """
        calibrated, choices = unit_qconfigs(unit), self._choices(unit)
        rows: list[dict[str, Any]] = []
        states: LayerStates = {}
        for qconfigs in choices:
            key = _key(qconfigs)
            if all(f"{key}:{name}" in states for name in unit.layers):
                continue  # first and last layer, for example, have the same bit widths at several candidates
            self._round_to_nearest(unit, qconfigs)
            rows.append(asdict(self._refuse(unit, failure) if failure else self._tune(unit, data, Ranks())))
            states |= {f"{key}:{name}": state for name, state in unit_states(unit).items()}
        self._round_to_nearest(unit, calibrated)
        return JournalEntry(states, {"rows": rows})

    def _keys(self, unit: Unit) -> set[str]:
        return {f"{_key(qconfigs)}:{name}" for qconfigs in self._choices(unit) for name in unit.layers}

    def _put(self, unit: Unit, states: LayerStates) -> None:
        """Keep the tuned states by candidate; those at the calibrated specs go into the layers."""
        calibrated, choices = unit_qconfigs(unit), self._choices(unit)
        for candidate, qconfigs in zip(self.names, choices, strict=True):
            of_unit = {name: states[f"{_key(qconfigs)}:{name}"] for name in unit.layers}
            self.result.states.setdefault(str(candidate), {}).update(of_unit)
            if qconfigs == calibrated:
                set_unit_states(unit, of_unit)

    def _round_to_nearest(self, unit: Unit, qconfigs: list[LayerQConfig]) -> None:
        for name, pair in zip(unit.layers, qconfigs, strict=True):
            self.calibration.round_to_nearest(name, pair)

    def _choices(self, unit: Unit) -> list[list[LayerQConfig]]:
        """Return the specs of the unit's layers at each candidate; the calibrated ones if there are no candidates."""
        if not self.candidates:
            return [unit_qconfigs(unit)]
        return [[self.calibration.qconfig_at(name, candidate) for name in unit.layers] for candidate in self.candidates]


def _key(qconfigs: list[LayerQConfig]) -> str:
    return "/".join(map(str, qconfigs))
