"""Sensitivities: the degradation of the network when one layer gets fewer bits (Hubara et al., ICML 2021, sec. 4).

They are measured exactly, layer by layer and candidate by candidate, or estimated together from one backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, cast

import torch

from lightning_ptq import arguments
from lightning_ptq.activations.calls import same_up_to_rounding, unit_errors
from lightning_ptq.activations.memory_plan import keep_outputs, limit_of
from lightning_ptq.activations.replay import Replay
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.allocation.fisher import fisher_rises, layer_calls
from lightning_ptq.allocation.sensitivity_table import MEASURES, Measure, SensitivityTable
from lightning_ptq.arguments import one_of, text_table
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates, Choice, TunedStates
from lightning_ptq.calibration.checks import check_calibration
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.calibration.outputs import ChooseOutput, Meter
from lightning_ptq.errors import QConfigError, UnitError
from lightning_ptq.network.units import Unit, find_units
from lightning_ptq.runtime.eager import no_inference_mode
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal, JournalEntry
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.runtime.progress import Progress, no_progress
from lightning_ptq.runtime.ranks import assign_to_ranks

_Rises = dict[str, dict[str, list[float]]]  # by layer, candidate and batch


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
    progress: Progress = no_progress,
    journal: Journal = NO_JOURNAL,
) -> SensitivityTable:
    """Measure the sensitivity of every layer at every candidate on the calibration set.

    Blocks before the layer return stored outputs instead of running again. Several ranks share the work.

    Args:
        calibration: What :func:`~lightning_ptq.calibration.calibrate.calibrate` returned; its module stays unchanged.
        candidates: Bit widths, such as ``["w8a8", "w4a8", "w4a4", "w2a4"]``.
        base: The candidate of all other layers, or one for each layer; by default each layer's widest.
        measure: See :data:`~lightning_ptq.allocation.sensitivity_table.Measure`; ``"loss"`` needs labels,
            and :func:`~lightning_ptq.allocation.fisher.fisher_rises` explains ``"fisher"``.
        states: Tuned states by candidate and layer (``AdaQuantResult.states``); other layers are rounded to nearest.
        output: The tensor of the network's output that is compared: a key, an index, or a function; None to find it.
        memory_limit: Memory for activations, as in :func:`lightning_ptq.adaquant`.
        seed: Seed of the random signs of ``"fisher"``.
        progress: Called with the entries done, the entries in total, and the name of the layer.
        journal: Where finished entries are saved, for a resumed run; by default nowhere.

    Raises:
        QConfigError: If the base of a layer is not one of its candidates, or an argument is unknown.
        SensitivityError: If there is no loss, the measure is not finite, or the output is not a tensor.

    Example:
        >>> from torch import nn, randn
        >>> from lightning_ptq import QConfig, calibrate
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> calibration = calibrate(net, [randn(64, 8)], QConfig.parse("w8a8", first_last_bits=None))
        >>> table = measure_sensitivity(calibration, ["w8a8", "w2a8"])
        >>> table.rises["0"]["w2a8"] > table.rises["0"]["w8a8"] == 0
        True
    """
    check_calibration(calibration, batches=True)
    one_of("measure", measure, MEASURES)
    seed, start = arguments.seed(seed), time.perf_counter()
    choices = Candidates(calibration, candidates, states)
    at_base = base_choice(choices, base)
    with no_inference_mode(), eval_mode(calibration.module), choices.restored(), ExitStack() as stack:
        store = stack.enter_context(ActivationStore(limit_of(memory_limit, calibration)))
        choices.put_all(at_base)
        meter = _meter(calibration, measure, output)
        before = meter.measure_all()
        if measure == "fisher":
            rises = _journaled(calibration, journal, fisher_rises, choices, at_base, meter.reader, seed, progress)
        else:
            rises = _Sweep(calibration, choices, at_base, meter, before, store, progress, journal).rises()
    means, errors = (_over_batches(statistic, rises, meter.samples) for statistic in (_mean, _standard_error))
    seconds = time.perf_counter() - start
    return SensitivityTable(measure, at_base, _mean(before, meter.samples), means, errors, calibration.samples, seconds)


def measure_choice(
    calibration: Calibration,
    choice: Choice,
    *,
    measure: Measure = "kl",
    states: TunedStates | None = None,
    output: ChooseOutput | None = None,
) -> float:
    """Measure the network on the calibration set with every layer at its choice; the module is left unchanged.

    Args:
        calibration: A calibrated module.
        choice: Candidate of each layer.
        measure: As in :func:`measure_sensitivity`; ``"fisher"`` measures ``"kl"``, which it estimates.
        states: As in :func:`measure_sensitivity`.
        output: As in :func:`measure_sensitivity`.
    """
    check_calibration(calibration, batches=True)
    one_of("measure", measure, MEASURES)
    choices = Candidates(calibration, sorted(set(choice.values())), states)
    with no_inference_mode(), eval_mode(calibration.module), choices.restored():
        choices.put_all(choice)
        meter = _meter(calibration, measure, output)
        return _mean(meter.measure_all(), meter.samples)


def check_measure(
    calibration: Calibration, candidates: Sequence[str], measure: Measure, output: ChooseOutput | None
) -> None:
    """Check that :func:`measure_sensitivity` can measure, on one batch of each course of the forward.

    Args:
        calibration: A calibrated module; it is left unchanged.
        candidates: The widest of them are measured; if there are none, the module as it is.
        measure: As in :func:`measure_sensitivity`.
        output: As in :func:`measure_sensitivity`.

    Raises:
        QConfigError: If a candidate cannot be parsed.
        SensitivityError: As in :func:`measure_sensitivity`.
    """
    some = calibration.part(calibration.one_batch_per_course())
    with ExitStack() as stack:
        stack.enter_context(no_inference_mode())
        stack.enter_context(eval_mode(calibration.module))
        if candidates:
            choices = Candidates(calibration, candidates)
            stack.enter_context(choices.restored())
            choices.put_all(choices.widest())
        meter = _meter(some, measure, output)
        meter.each()
        for batch in range(len(some.batches) if measure == "fisher" else 0):
            layer_calls(some, meter.reader, batch, torch.Generator(some.device).manual_seed(0))


def base_choice(choices: Candidates, base: str | Choice | None) -> dict[str, str]:
    """Return the base of each layer: the given one, or by default its widest candidate.

    Raises:
        QConfigError: If the base of a layer is not one of its candidates.
    """
    if isinstance(base, str):
        chosen = choices.uniform(base)
    else:
        chosen = choices.widest() if base is None else text_table("base", base, "{'head': 'w8a8'}")
    for name, candidates in choices.by_layer.items():
        if chosen.get(name) not in candidates:
            raise QConfigError(
                f"the base {chosen.get(name)!r} of layer {name!r} is not one of its candidates {list(candidates)}."
                " Add it to the candidates, or choose another base."
            )
    return chosen


def _meter(calibration: Calibration, measure: Measure, output: ChooseOutput | None) -> Meter:
    """Return the meter of a measure; ``"fisher"`` only estimates rises of ``"kl"``, its base value is the exact one."""
    return Meter(calibration, "kl" if measure == "fisher" else measure, output)


def _journaled(calibration: Calibration, journal: Journal, work: Callable[..., _Rises], *arguments: Any) -> _Rises:
    """Return the outcome of ``work(calibration, *arguments)``, which is journaled; a resumed run reads it back."""
    entry = calibration.ranks.on_rank_zero(lambda: journal.read("all"))
    if entry is not None:
        return cast(_Rises, entry.facts["rises"])
    rises = work(calibration, *arguments)
    if calibration.ranks.rank == 0:
        journal.write("all", JournalEntry(facts={"rises": rises}))
    return rises


class _Sweep:
    """Measures every layer at every candidate, block by block, running only what comes after the stored outputs.

    The entries, one for each layer and candidate other than its base, are distributed over the ranks.
    """

    def __init__(
        self,
        calibration: Calibration,
        choices: Candidates,
        base: Choice,
        meter: Meter,
        before: list[float],
        store: ActivationStore,
        progress: Progress,
        journal: Journal,
    ) -> None:
        self.calibration, self.choices, self.base, self.meter = calibration, choices, base, meter
        self.before, self.store, self.progress, self.journal = before, store, progress, journal
        self.units = find_units(calibration.module, calibration.trace)
        keep = keep_outputs(calibration, self.units, store.limit, whole=True)
        self.replay = Replay(calibration, self.units, store, "quantized", whole=True, keep=keep)
        self.batches = range(len(calibration.batches))
        entries = [f"{n} {c}" for n, candidates in choices.by_layer.items() for c in candidates if c != base[n]]
        self.journaled = journal.keys() & set(entries)
        # Ranks need not share a folder, so a finished entry stays with a rank that has it on disk.
        self.owners = assign_to_ranks(dict.fromkeys(entries, 1.0), calibration.ranks.gather(self.journaled))
        self.entries = sum(rank == calibration.ranks.rank for rank in self.owners.values())
        self.done = 0

    def rises(self) -> _Rises:
        """Return the rise by layer, candidate and batch."""
        own: dict[str, list[float]] = {}
        for index, unit in enumerate(self.units):
            replace = self._replaceable()
            for name in unit.layers:
                for candidate in self.choices.by_layer[name]:
                    key = f"{name} {candidate}"
                    if self.owners.get(key) == self.calibration.ranks.rank:
                        own[key] = self._entry(key, name, candidate, replace)
                self.choices.put(name, self.base[name])
            if self.replay.keep and index + 1 < len(self.units):
                self._finish(index, unit)
        merged = self.calibration.ranks.merge(own)
        zeros = [0.0] * len(self.before)  # the base has no entry
        return {n: {c: merged.get(f"{n} {c}", zeros) for c in row} for n, row in self.choices.by_layer.items()}

    def _entry(self, key: str, name: str, candidate: str, replace: bool) -> list[float]:
        """Return the rises of one entry by batch, measured or read from the journal."""
        self.progress(self.done, self.entries, key)
        entry = self.journal.read(key) if key in self.journaled else None
        rises = entry.facts["rises"] if entry else self._rise(name, candidate, replace)
        if entry is None:
            self.journal.write(key, JournalEntry(facts={"rises": rises}))
        self.done += 1
        self.progress(self.done, self.entries, key)
        return cast("list[float]", rises)

    def _rise(self, name: str, candidate: str, replace: bool) -> list[float]:
        self.choices.put(name, candidate)
        what = f"layer {name!r} at {candidate}"
        values = [self.meter(b, partial(self.replay.run, b, replace), what) for b in self.batches]
        return [value - base for value, base in zip(values, self.before, strict=True)]

    def _replaceable(self) -> bool:
        """Return True if stored outputs give the same result as a full run, on one batch of each trace."""
        if self.calibration.varies:  # another candidate may change the course of the forward
            return False
        last_batches = {id(trace): batch for batch, trace in enumerate(self.calibration.traces)}
        reader, replay = self.meter.reader, self.replay
        for batch in last_batches.values():
            full = reader.read(partial(replay.run, batch, replace=False))[0]
            try:
                with unit_errors():
                    replaced = reader.read(partial(replay.run, batch))[0]
            except UnitError:  # a finished unit was needed for more than its output
                return False
            if not same_up_to_rounding(replaced, full):
                return False
        return True

    def _finish(self, index: int, unit: Unit) -> None:
        """Store the outputs of unit ``index`` at its base, so that it need not run for the layers after it."""
        data = UnitData(self.replay.inputs(index), self.store, self.calibration.isolation)
        with suppress(UnitError), unit_errors():  # a unit that cannot run alone is not replaced by stored outputs
            self.replay.finish(index, data.outputs(unit.module, len(self.batches), "quantized"))


def _over_batches(
    statistic: Callable[[list[float], list[int]], float], rises: _Rises, samples: list[int]
) -> dict[str, dict[str, float]]:
    """Return a statistic of each rise over the batches, given the samples of each batch."""
    return {name: {c: statistic(values, samples) for c, values in row.items()} for name, row in rises.items()}


def _mean(values: Sequence[float], samples: Sequence[int]) -> float:
    return sum(value * count for value, count in zip(values, samples, strict=True)) / sum(samples)


def _standard_error(values: Sequence[float], samples: Sequence[int]) -> float:
    """Return the standard error of the mean of batches, weighted by their samples; NaN for a single batch."""
    count = len(values)
    if count < 2:
        return math.nan
    mean, total = _mean(values, samples), sum(samples)
    variance = sum((n / total * (value - mean)) ** 2 for value, n in zip(values, samples, strict=True))
    return math.sqrt(variance * count / (count - 1))
