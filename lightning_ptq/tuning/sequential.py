"""Sequential mode: each unit is tuned on the outputs of the quantized units before it."""

from __future__ import annotations

import time
from dataclasses import asdict

from lightning_ptq.activations.shards import Shard
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.errors import UnitError
from lightning_ptq.network.units import Unit, set_unit_states, unit_qconfigs, unit_states
from lightning_ptq.runtime.journal import JournalEntry
from lightning_ptq.tuning.reconstruct import UnitResult
from lightning_ptq.tuning.run import Run


class SequentialRun(Run):
    """Each unit gets the inputs that it gets in the quantized model.

    Ranks share its steps: each computes its own shards.
    """

    sequential = True

    def unit(self, index: int) -> float:
        """Capture a unit, tune it or read its journal entry, and pass the quantized outputs on."""
        unit = self.work[index]
        # All ranks follow the journal of rank 0: a step that only some of them take would never end.
        entry = self.ranks.on_rank_zero(lambda: self.journal.read(unit.name))
        data, failure = [], ""
        try:
            data = self._capture(index, targets=entry is None)
        except UnitError as error:
            failure = str(error)
        failure = next(filter(None, self.ranks.gather(failure)), "")
        start = time.perf_counter()
        if failure:
            self.result.units.append(self._refuse(unit, failure))
            return 0.0
        self.result.units.append(self._tune_and_save(unit, data) if entry is None else self._restore(unit, entry))
        seconds = time.perf_counter() - start
        for stream in self.quantized_streams if self.keep else ():
            _, of_shard = data.pop(0)  # freed before the outputs of the next shard are computed
            of_shard.drop_targets()
            stream.finish(index, of_shard.outputs(unit.module, len(stream.batches), "quantized"))
        return seconds

    def _tune_and_save(self, unit: Unit, data: list[tuple[Shard, UnitData]]) -> UnitResult:
        def restart_from_float() -> None:
            # After parallel tuning, continuing from the tuned state would fit the samples more and the task less.
            for name, pair in zip(unit.layers, unit_qconfigs(unit), strict=True):
                self.calibration.round_to_nearest(name, pair)

        row = self._tune(unit, data, self.ranks, restart_from_float)
        if self.ranks.rank == 0:
            self.journal.write(unit.name, JournalEntry(unit_states(unit), asdict(row)))
        return row

    def _restore(self, unit: Unit, entry: JournalEntry) -> UnitResult:
        set_unit_states(unit, entry.states)
        self.steps_done += self._steps(unit_qconfigs(unit))
        row = UnitResult.of(entry.facts)
        self.on_unit(row)
        return row
