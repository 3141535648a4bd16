"""Parallel mode: units are independent, so each is tuned at every candidate, and by one rank."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import groupby
from typing import Any

from torch import Tensor

from lightning_ptq.activations.shards import Part
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.calibration.layer_costs import layer_work
from lightning_ptq.network.units import Unit, set_unit_states, unit_qconfigs, unit_states
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.journal import LayerStates, Piece
from lightning_ptq.runtime.ranks import Ranks, deal_out
from lightning_ptq.tuning.reconstruct import UnitResult
from lightning_ptq.tuning.run import AdaQuantResult, Run


class ParallelRun(Run):
    """Each unit gets the float model's inputs and is tuned at every candidate; each is one rank's."""

    def __post_init__(self) -> None:
        self.ranks = self.calibration.ranks
        self.names = self.candidates or [self.calibration.prepared.qconfig.default]
        self.kept = self.journal.keys() if self.journal else set()
        costs = self._costs()
        self.owners = deal_out(costs, self.ranks.gather(self.kept & set(costs)))
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.tuned: LayerStates = {}
        super().__post_init__()

    def mine(self, unit: Unit) -> bool:
        """Whether this rank tunes the unit."""
        return self.owners[unit.name] == self.ranks.rank

    def steps_of(self, unit: Unit) -> int:
        """Optimisation steps of a unit, at all candidates together."""
        return sum(self._steps(pairs) for pairs, _ in groupby(sorted(self._choices(unit), key=str)))

    def _costs(self) -> dict[str, float]:
        """Estimated time of each unit, in multiply-accumulates."""
        if self.ranks.world == 1:
            return dict.fromkeys((unit.name for unit in self.units), 1.0)
        steps = {unit.name: 0.0 for unit in self.units}
        work = layer_work(self.calibration)
        for unit in self.units:
            for name, layer in unit.layers.items():
                of_samples = self.config.batch_size * (work[name].macs + _OUTPUT * work[name].outputs)
                steps[unit.name] += of_samples + _WEIGHT * layer.weight.numel() + _LAYER
        return {unit.name: steps[unit.name] * self.steps_of(unit) for unit in self.units}

    def all(self) -> AdaQuantResult:
        """The own units, and an exchange."""
        super().all()
        everything = self.ranks.gather((self.rows, self.tuned, self.result.seconds_tuning))
        rows = {name: found for of_rank, _, _ in everything for name, found in of_rank.items()}
        tuned = {name: found for _, of_rank, _ in everything for name, found in of_rank.items()}
        self.result.seconds_tuning = max(seconds for _, _, seconds in everything)
        for unit in self.units:
            found = [UnitResult.of(row) for row in rows[unit.name]]
            self.result.units += found
            for row in found if unit.name not in self.rows else ():
                self.on_unit(row)
            self._put(unit, {key: state for key, state in tuned.items() if key in self._keys(unit)})
        return self.result

    def unit(self, index: int) -> float:
        """Capture, and tune at each candidate or take from the journal."""
        unit = self.work[index]
        piece = self.journal.read(unit.name) if self.journal and unit.name in self.kept else None
        data = self._capture(index, targets=piece is None)
        start = time.perf_counter()
        if piece is None:
            piece = self._tune_candidates(unit, data)
            if self.journal is not None:
                self.journal.write(unit.name, piece)
        else:
            self.steps_done += self.steps_of(unit)
            for row in piece.facts["rows"]:
                self.on_unit(UnitResult.of(row))
        self.rows[unit.name] = piece.facts["rows"]
        self.tuned.update(piece.states)
        return time.perf_counter() - start

    def _tune_candidates(self, unit: Unit, data: list[tuple[Part, UnitData]]) -> Piece:
        """Tune at each candidate, from the float weights; the calibrated widths stay in place."""
        own, choices = unit_qconfigs(unit), self._choices(unit)
        rows: list[dict[str, Any]] = []
        states: dict[str, dict[str, Tensor]] = {}
        for pairs in choices:
            key = _key(pairs)
            if all(f"{key}:{name}" in states for name in unit.layers):
                continue  # the first and last layer, for example, are alike at several candidates
            self._round_to_nearest(unit, pairs)
            rows.append(asdict(self._tune(unit, data, Ranks())))
            states |= {f"{key}:{name}": state for name, state in unit_states(unit).items()}
        self._round_to_nearest(unit, own)
        return Piece(states, {"rows": rows})

    def _keys(self, unit: Unit) -> set[str]:
        return {f"{_key(pairs)}:{name}" for pairs in self._choices(unit) for name in unit.layers}

    def _put(self, unit: Unit, states: LayerStates) -> None:
        """Note the tuned states by candidate; those at the calibrated widths go into the layers."""
        own, choices = unit_qconfigs(unit), self._choices(unit)
        for candidate, pairs in zip(self.names, choices, strict=True):
            found = {name: states[f"{_key(pairs)}:{name}"] for name in unit.layers}
            self.result.states.setdefault(str(candidate), {}).update(found)
            if pairs == own:
                set_unit_states(unit, found)

    def _round_to_nearest(self, unit: Unit, pairs: list[LayerQConfig]) -> None:
        for name, pair in zip(unit.layers, pairs, strict=True):
            self.calibration.round_to_nearest(name, pair)

    def _choices(self, unit: Unit) -> list[list[LayerQConfig]]:
        """The widths of the unit's layers at each candidate; the calibrated ones if there are no candidates."""
        if not self.candidates:
            return [unit_qconfigs(unit)]
        return [[self.calibration.qconfig_at(name, candidate) for name in unit.layers] for candidate in self.candidates]


# What a step takes for each value put out, each weight, and each layer, in multiply-accumulates: least squares over the
# units of ResNet-20, MobileNetV2, EfficientNet-Lite0 and a small vision transformer on a CPU.
_OUTPUT, _WEIGHT, _LAYER = 230.0, 330.0, 24e6


def _key(pairs: list[LayerQConfig]) -> str:
    return "/".join(map(str, pairs))
