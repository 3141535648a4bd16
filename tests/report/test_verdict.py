from __future__ import annotations

import dataclasses
import math

import pytest

from lightning_ptq import ReconstructionConfig
from lightning_ptq.allocation.frontier import Frontier, FrontierPoint
from lightning_ptq.allocation.search import AllocationResult
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.solver import BitAllocation
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.errors import UntunableUnitWarning
from lightning_ptq.report import PTQReport
from lightning_ptq.report.reasons import why_not_kept, why_undone
from lightning_ptq.report.record import LayerRecord, MetricChange
from lightning_ptq.report.verdict import patterns_of
from lightning_ptq.statistics.acceptance import StatisticsResult
from lightning_ptq.tuning.reconstruct import UnitResult
from lightning_ptq.tuning.run import AdaQuantResult

STAGE = "AdaQuant sequential"


def layer(name, widths="w4a4"):
    return LayerRecord(name, "Conv2d", widths, 100, 1.0, size=50)


def unit(name, before, after, bits="w4a4", steps=100):
    return UnitResult(name, bits, before, after, steps > 0 and after < before, steps, 1.0)


def report(*units, settings=None, **fields):
    layers = [layer(f"{row.name}.conv", row.bits) for row in units]
    tuning = {STAGE: AdaQuantResult(list(units))} if units else {}
    fields = {"layers": layers, "samples": 512, "float_bytes": 670, "packed_bytes": 100, "tuning": tuning, **fields}
    return PTQReport("net", settings or {}, **fields)


def trial(drop, error, within=True, chosen=False, size=100.0):
    return Trial({"size": size, "bops": 2e9}, 0.01, 0.98 - drop, drop, error, within, chosen)


GOOD = [unit("a", 0.1, 0.001), unit("b", 0.1, 0.002)]
STEP = unit("c", 0.4, 0.2)
HEAD = unit("head", 0.3, 0.25, "w8a8")  # the error of the units before it, which 8 bits cannot lower


def test_the_unit_whose_error_rises_most_gets_more_bits():
    (found,) = report(*GOOD, STEP, HEAD).verdict()
    assert "rises most in c, from 0.002 to 0.2; the median of 4 units is 0.101" in found.text
    assert found.code == "overrides={'c.*': 'w8a8'}"
    assert str(found) == f"{found.text} {found.remedy} {found.code}"


def test_a_unit_that_was_not_kept_has_its_initial_error():
    rows = [unit("a", 0.1, 0.02), unit("b", 0.2, 0.9), unit("c", 0.25, 0.24)]
    found = report(*rows).verdict()
    assert "rises most in b, from 0.02 to 0.2" in found[0].text
    assert found[1].text.startswith("1 of 3 units was not improved by tuning")
    assert "b 0.2 -> 0.9" in found[1].text
    assert found[1].code == "CalibrationCapture(num_samples=2048)"


def test_errors_far_above_the_initial_ones_need_lower_rates():
    rows = [unit("a", 0.1, 0.02), unit("b", 0.02, math.inf), unit("c", 0.02, 0.5)]
    settings = {STAGE: {"config": dataclasses.asdict(ReconstructionConfig(weight_lr=0.5))}}
    found = report(*rows, settings=settings).verdict()
    assert found[-1].text.startswith("2 of 3 units were not improved")
    assert found[-1].code == "AdaQuantLayerwise(weight_lr=0.05)"


def test_small_errors_need_nothing():
    (found,) = report(*GOOD).verdict()
    assert "the largest relative error is 0.002, in b" in found.text
    assert (found.remedy, found.code) == ("", "")


def test_units_below_the_tolerance_are_named_with_its_option():
    rows = [unit("a", 0.001, 0.001, "w8a8", 0), unit("b", 0.0015, 0.0015, "w8a8", 0)]
    (found,) = report(*rows).verdict()
    assert found.text.startswith("All 2 units are below the tolerance from the start, with errors up to 0.0015")
    assert found.code == "AdaQuantLayerwise(tolerance=0)"


def test_units_that_cannot_be_tuned_are_named_with_their_reason():
    note = UntunableUnitWarning("a and more", {"a": "it returns a string"})
    rows = [unit("a", math.nan, math.nan, steps=0), *GOOD[1:]]
    found = report(*rows, warnings=[note]).verdict()
    assert found[-1].text == "1 of 2 units cannot be tuned, such as a: it returns a string."
    assert why_not_kept(rows[0], note.details) == "it cannot be tuned: it returns a string"


def test_narrow_layers_without_tuning_are_named():
    (found,) = report(layers=[layer("a"), layer("b", "w8a8")]).verdict()
    assert found.text.startswith("1 layer below 8 bits had no AdaQuant")
    assert "AdaQuantLayerwise()" in found.code
    (found,) = report(layers=[layer("b", "w8a8")]).verdict()
    assert found.text == "The packed module is 6.7 times smaller."


@pytest.mark.parametrize(("drop", "noise"), [(0.001, "within the noise"), (0.003, "larger than the noise")])
def test_the_drop_of_the_chosen_trial_is_held_against_its_standard_error(drop, noise):
    found = report(*GOOD, trials=[trial(0.1, 0.001, within=False), trial(drop, 0.001, chosen=True)]).verdict()
    assert f"{drop} with a standard error of 0.001" in found[0].text
    assert noise in found[0].text


def test_trials_that_all_drop_too_much_are_named():
    found = report(*GOOD, trials=[trial(0.1, 0.001, within=False), trial(0.2, None, within=False)]).verdict()
    assert found[0].text == "None of 2 trials is within the accepted drop; the least drop is 0.1."


def solved(candidate, size):
    return BitAllocation({"a": candidate}, 0.1, {"size": size}, {"size": size}, True, 0.1, 0.0, 1.0, "CBC")


def allocated(**fields):
    table = SensitivityTable("kl", {"a": "w8a8"}, 0.0, {"a": {"w8a8": 0.01, "w4a4": 0.1, "w2a4": 0.4}})
    choices = [solved(*pair) for pair in (("w2a4", 1e3), ("w4a4", 2e3), ("w8a8", 4e3))]
    points = [FrontierPoint(c.costs["size"], table.predict(c.choice), None, c) for c in choices]
    result = AllocationResult(choices[1], table, 0.1, **fields)
    return {"allocation": result, "frontier": Frontier("size", "kl", "bytes", points)}


def test_an_allocation_names_the_next_budget_and_uncertain_layers():
    found = report(**allocated(stability={"a": 0.3, "b": 0.9}), layers=[layer("a")], tuning={}).verdict()
    budget = next(each for each in found if "instead of" in each.text)
    assert "With a size of 4.0 kB instead of 2.0 kB, the predicted kl falls from 0.1 to 0.01" in budget.text
    assert budget.code == "BitAllocator(size=4000)"
    (uncertain,) = [each for each in found if "redraws" in each.text]
    assert uncertain.text.startswith("The bit widths of 1 of 2 layers are uncertain")
    assert uncertain.text.endswith("(a).")


def test_after_an_allocation_widths_are_pinned():
    found = report(*GOOD, STEP, **allocated()).verdict()
    assert found[0].code == "pins={'c.*': 'w8a8'}"


def test_there_are_four_statements_at_most():
    steps = [StatisticsResult("bias", 0.2, 0.1, True)]
    rows = [unit("a", 0.1, 0.02), unit("b", 0.2, 0.9), unit("c", math.nan, math.nan, steps=0)]
    trials = [trial(0.001, 0.001, chosen=True)]
    found = report(*rows, trials=trials, statistics=steps, **allocated(stability={"a": 0.1})).verdict()
    assert len(found) == 4
    assert "The drop of the metric" in found[0].text


@pytest.mark.parametrize(
    ("unit", "layers", "patterns"),
    [
        ("head", ["head", "header.conv"], ["head"]),
        ("blocks.1", ["blocks.1.a", "blocks.11.a"], ["blocks.1.*"]),
        ("0-2", ["0", "1", "2", "3"], ["0", "1", "2"]),
        ("net.2-3", ["net.2.conv", "net.3", "2"], ["net.2.*", "net.3"]),
        ("gone", ["head"], []),
    ],
)
def test_patterns_match_the_layers_of_a_unit_only(unit, layers, patterns):
    assert patterns_of(unit, layers) == patterns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (unit("a", 0.1, 0.05), ""),
        (unit("a", 0.1, 0.13), "left 1.3 times the initial error"),
        (unit("a", 0.1, math.inf), "not finite"),
        (unit("a", 0.1, 0.1, steps=0), "below the tolerance"),
        (unit("a", math.nan, math.nan, steps=0), "it cannot be tuned"),
    ],
)
def test_every_unit_that_is_not_kept_says_why(row, reason):
    assert reason in why_not_kept(row, {})
    assert bool(why_not_kept(row, {})) == bool(reason)


@pytest.mark.parametrize(
    ("before", "after", "accepted", "reason"),
    [
        (0.2, 0.1, True, ""),
        (0.2, 0.3, False, "did not fall"),
        (0.2, 0.19, False, "twice its standard error"),
        (0.2, math.nan, False, "not finite"),
        (math.nan, math.nan, False, "left out: no outputs"),
    ],
)
def test_every_step_that_is_not_kept_says_why(before, after, accepted, reason):
    why = why_undone(StatisticsResult("bias", before, after, accepted, skipped={"every layer": "no outputs"}))
    assert reason in why
    assert bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("metrics", "layers", "line"),
    [
        ([("val_loss", 0.1, 0.2), ("val_acc", 0.9885, 0.98751)], [], "val_acc 0.9885 -> 0.9875, 6.7 times smaller"),
        ([("val_loss", 2.3456789, 2.3457012)], [], "val_loss 2.34568 -> 2.34570, 6.7 times smaller"),
        ([("top1", 92.31, 92.31)], [], "top1 92.31 -> 92.31, 6.7 times smaller"),
        ([("psnr", 31.4159, 28.9)], [], "psnr 31.42 -> 28.90, 6.7 times smaller"),
        ([("acc", math.nan, 0.5)], [], "acc nan -> 0.5, 6.7 times smaller"),
        ([], ["w4a4", "w4a4"], "6.7 times smaller, w4a4, 2 layers quantized"),
        ([], ["w4a4", "w4a4", "w8a8"], "6.7 times smaller, w4a4 in 2 of 3 layers"),
        ([], ["w4a4", "w8a8"], "6.7 times smaller, 4.0 bits per weight, 2 layers quantized"),
        ([], ["w8a8"], "6.7 times smaller, w8a8, 1 layer quantized"),
    ],
)
def test_the_headline(metrics, layers, line):
    rows = [layer(str(i), widths) for i, widths in enumerate(layers)]
    assert report(layers=rows, metrics=[MetricChange(*row) for row in metrics]).headline() == line
