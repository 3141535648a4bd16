"""Sensitivities: how much worse the network gets when one layer alone is lowered (Hubara et al., ICML 2021, sec. 4).

Measured exactly, layer by layer and candidate by candidate, or estimated for all of them from one backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

from lightning_ptq.activations.memory_plan import keep_outputs
from lightning_ptq.activations.replay import Replay, near
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.allocation.fisher import fisher_rises
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Choice, Choices, TunedStates
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.calibration.outputs import ChooseOutput, Meter
from lightning_ptq.errors import QConfigError
from lightning_ptq.network.units import Unit, find_units
from lightning_ptq.runtime.journal import Journal, Piece
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.runtime.progress import Progress
from lightning_ptq.runtime.ranks import deal_out

Measure = Literal["kl", "mse", "loss", "fisher"]
_Rises = dict[str, dict[str, list[float]]]
MEASURES = ("kl", "mse", "loss", "fisher")


def measure_sensitivity(
    calibration: Calibration,
    candidates: Sequence[str],
    *,
    base: str | Choice | None = None,
    measure: Measure = "kl",
    states: TunedStates | None = None,
    output: ChooseOutput | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = lambda done, total, text: None,
    journal: Journal | None = None,
) -> SensitivityTable:
    """Measure the sensitivity of every layer at every candidate on the calibration set.

    Only the lowered layer's block and what comes behind it run: the blocks before it hand out their stored outputs.

    Args:
        calibration: What :func:`~lightning_ptq.calibration.calibrator.calibrate` returned. Its module stays as it is.
        candidates: Bit widths, such as ``["w8a8", "w4a8", "w4a4", "w2a4"]``.
        base: The candidate that all other layers have, or one for each layer; by default each layer's widest.
        measure: ``"kl"`` or ``"mse"`` between the outputs of the float and the quantized network; ``"loss"``: the
            module's own, as its calibration forward returns it (this needs labels); ``"fisher"``: an estimate of
            ``"kl"`` from one backward pass, see :func:`~lightning_ptq.allocation.fisher.fisher_rises`.
        states: Tuned states by candidate and layer (``AdaQuantResult.states``); layers without are rounded to nearest.
        output: Which tensor of the network's output is compared: a key, an index, or a function of the output.
        memory_limit: For activations, as in :func:`lightning_ptq.adaquant`.
        seed: Of the random signs of ``"fisher"``.
        progress: Called with entries done, entries in all, and the layer's name.
        journal: Where finished entries are kept, and found again.

    Several ranks (``calibration.ranks``) share the entries, or for ``"fisher"`` the batches.

    Raises:
        QConfigError: If the candidates do not contain the base, or an argument is unknown.
        SensitivityError: If there is no loss, or it is NaN; or if the output is not a tensor.

    Example:
        >>> from torch import nn, randn
        >>> from lightning_ptq import QConfig, calibrate
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> calibration = calibrate(net, [randn(64, 8)], QConfig.parse("w8a8", first_last_bits=None))
        >>> table = measure_sensitivity(calibration, ["w8a8", "w2a8"])
        >>> table.rises["0"]["w2a8"] > table.rises["0"]["w8a8"] == 0
        True
    """
    if measure not in MEASURES:
        raise QConfigError(f"measure must be one of {list(MEASURES)}, got {measure!r}.")
    start = time.perf_counter()
    choices = Choices(calibration, candidates, states)
    at_base = base_choice(choices, base)
    with ActivationStore(memory_limit) as store, eval_mode(calibration.module), choices.restored():
        choices.put_all(at_base)
        meter = Meter(calibration, measure, output)
        before = meter.measure_all()
        if measure == "fisher":
            rises = _kept(calibration, journal, lambda: fisher_rises(
                calibration, choices, at_base, meter.reader, seed, progress
            ))  # fmt: skip
        else:
            rises = _Sweep(calibration, choices, at_base, meter, before, store, progress, journal).rises()
    means = {name: {c: _mean(v, meter.samples) for c, v in row.items()} for name, row in rises.items()}
    errors = {name: {c: _standard_error(v, meter.samples) for c, v in row.items()} for name, row in rises.items()}
    value, seconds = _mean(before, meter.samples), time.perf_counter() - start
    return SensitivityTable(measure, at_base, value, means, errors, calibration.samples, seconds)


def _kept(calibration: Calibration, journal: Journal | None, work: Callable[[], _Rises]) -> _Rises:
    """What ``work`` finds, or has found in a run that was cut off behind it."""
    known = calibration.ranks.first(lambda: journal.read("all") if journal else None)
    if known is not None:
        return cast(_Rises, known.facts["rises"])
    rises = work()
    if journal is not None and calibration.ranks.rank == 0:
        journal.write("all", Piece(facts={"rises": rises}))
    return rises


def measure_choice(
    calibration: Calibration,
    choice: Choice,
    *,
    measure: Measure = "kl",
    states: TunedStates | None = None,
    output: ChooseOutput | None = None,
) -> float:
    """The measure on the calibration set with every layer at its choice; the module stays as it is.

    Args: as in :func:`measure_sensitivity`.
    """
    choices = Choices(calibration, sorted(set(choice.values())), states)
    with eval_mode(calibration.module), choices.restored():
        choices.put_all(choice)
        meter = Meter(calibration, measure, output)
        return _mean(meter.measure_all(), meter.samples)


def base_choice(choices: Choices, base: str | Choice | None) -> dict[str, str]:
    """Each layer's base: as given, or its widest candidate.

    Raises:
        QConfigError: If a layer's base is none of its candidates.
    """
    found = choices.widest() if base is None else choices.at(base) if isinstance(base, str) else dict(base)
    for name, own in choices.of.items():
        if found.get(name) not in own:
            raise QConfigError(
                f"the base {found.get(name)!r} of layer {name!r} is none of its candidates {list(own)}."
                " Add it to the candidates, or choose another base."
            )
    return found


class _Sweep:
    """Every layer at every candidate, block after block, running only what comes behind."""

    def __init__(
        self,
        calibration: Calibration,
        choices: Choices,
        base: Choice,
        meter: Meter,
        before: list[float],
        store: ActivationStore,
        progress: Progress,
        journal: Journal | None,
    ) -> None:
        self.calibration, self.choices, self.base, self.meter = calibration, choices, base, meter
        self.before, self.store, self.progress, self.journal = before, store, progress, journal
        self.units = find_units(calibration.module, calibration.trace)
        keep = keep_outputs(calibration, self.units, store.limit, whole=True)
        self.replay = Replay(calibration, self.units, store, "quantized", whole=True, keep=keep)
        self.batches = range(len(calibration.batches))
        entries = [f"{n} {c}" for n, own in choices.of.items() for c in own if c != base[n]]
        self.kept = journal.keys() & set(entries) if journal else set()
        self.owners = deal_out(dict.fromkeys(entries, 1.0), calibration.ranks.gather(self.kept))
        self.entries = sum(rank == calibration.ranks.rank for rank in self.owners.values())
        self.done = 0

    def rises(self) -> _Rises:
        """The rise by layer, candidate and batch."""
        found: dict[str, list[float]] = {}
        for index, unit in enumerate(self.units):
            replace = self._replaceable()
            for name in unit.layers:
                for candidate in self.choices.of[name]:
                    key = f"{name} {candidate}"
                    if self.owners.get(key) == self.calibration.ranks.rank:
                        found[key] = self._entry(key, name, candidate, replace)
                self.choices.put(name, self.base[name])
            if self.replay.keep and index + 1 < len(self.units):
                self._finish(index, unit)
        merged = {key: values for of_rank in self.calibration.ranks.gather(found) for key, values in of_rank.items()}
        zeros = [0.0] * len(self.before)
        return {n: {c: merged.get(f"{n} {c}", zeros) for c in own} for n, own in self.choices.of.items()}

    def _entry(self, key: str, name: str, candidate: str, replace: bool) -> list[float]:
        """Measured, or from the journal."""
        self.progress(self.done, self.entries, key)
        known = self.journal.read(key) if self.journal and key in self.kept else None
        rises = known.facts["rises"] if known else self._rise(name, candidate, replace)
        if self.journal is not None and known is None:
            self.journal.write(key, Piece(facts={"rises": rises}))
        self.done += 1
        self.progress(self.done, self.entries, key)
        return cast("list[float]", rises)

    def _rise(self, name: str, candidate: str, replace: bool) -> list[float]:
        self.choices.put(name, candidate)
        what = f"layer {name!r} at {candidate}"
        values = [self.meter(b, partial(self.replay.run, b, replace), what) for b in self.batches]
        return [value - base for value, base in zip(values, self.before, strict=True)]

    def _replaceable(self) -> bool:
        """Whether handing out stored outputs gives what a full run gives, tried on one batch of each kind."""
        kinds = {id(trace): batch for batch, trace in enumerate(self.calibration.traces)}
        reader, replay = self.meter.reader, self.replay
        for batch in kinds.values():
            full = reader.read(partial(replay.run, batch, replace=False))[0]
            if not near(reader.read(partial(replay.run, batch))[0], full):
                return False
        return True

    def _finish(self, index: int, unit: Unit) -> None:
        data = UnitData(self.replay.inputs(index), self.store)
        self.replay.finish(index, data.outputs(unit.module, len(self.batches), "quantized"))


def _mean(values: Sequence[float], samples: Sequence[int]) -> float:
    return sum(value * count for value, count in zip(values, samples, strict=True)) / sum(samples)


def _standard_error(values: Sequence[float], samples: Sequence[int]) -> float:
    """Of the weighted mean of several batches; NaN for one batch."""
    count = len(values)
    if count < 2:
        return math.nan
    mean, whole = _mean(values, samples), sum(samples)
    variance = sum((n / whole * (value - mean)) ** 2 for value, n in zip(values, samples, strict=True))
    return math.sqrt(variance * count / (count - 1))
