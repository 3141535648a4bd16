"""A pass over all units that captures and tunes each: what both modes share, and sequential mode."""

from __future__ import annotations

import time
from dataclasses import asdict

from lightning_ptq.activations.shards import Part
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.network.units import Unit, set_unit_states, unit_qconfigs, unit_states
from lightning_ptq.runtime.journal import Piece
from lightning_ptq.tuning.reconstruct import UnitResult
from lightning_ptq.tuning.run import Run


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
