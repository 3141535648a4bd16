from __future__ import annotations

import csv
import itertools
import json

import pytest
import torch
from helpers import same_state, seeded, state
from PIL import Image
from torch import nn

from lightning_ptq import (
    Candidates,
    QConfig,
    SensitivityTable,
    allocate_bits,
    apply_allocation,
    bops_cost,
    calibrate,
    frontier,
    load_packed,
    measure_choice,
    measure_sensitivity,
    save_packed,
    search_allocation,
    size_cost,
)
from lightning_ptq.errors import AllocationError
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.report.tables import allocation_table

CANDIDATES = ["w8a8", "w4a4", "w2a4"]


def net_of():
    torch.manual_seed(0)
    sizes = [(6, 24), (24, 24), (24, 24), (24, 24), (24, 5)]
    layers = [part for size in sizes for part in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def calibrated():
    net = net_of()
    with torch.no_grad():
        net[-1].weight.mul_(8)
    return calibrate(net, list(seeded(1, 256, 6).split(64)), QConfig.parse("w8a8", first_last_bits=None))


@pytest.fixture
def calibration():
    return calibrated()


@pytest.fixture(scope="module")
def every_choice():
    """All 243 choices, each with its size in bytes and its divergence from a forward over all samples at once."""
    calibration = calibrated()
    samples, choices = torch.cat(list(calibration.batches)), Candidates(calibration, CANDIDATES)
    cost = size_cost(calibration, choices)
    with torch.no_grad(), ops_in_mode(calibration.module, "float"):
        target = calibration.module(samples).double().log_softmax(1)
    found = []
    for combination in itertools.product(CANDIDATES, repeat=len(calibration.layers)):
        choice = dict(zip(calibration.layers, combination, strict=True))
        choices.put_all(choice)
        with torch.no_grad():
            output = calibration.module(samples).double().log_softmax(1)
        found.append((choice, cost.total(choice), (target.exp() * (target - output)).sum(1).mean().item()))
    return found


def cost_of(calibration):
    return size_cost(calibration, Candidates(calibration, CANDIDATES))


def test_the_search_finds_the_best_choice_and_leaves_the_module_unchanged(calibration, every_choice):
    before = state(calibration.module)
    reports = []
    cost = cost_of(calibration)
    found = search_allocation(
        calibration, CANDIDATES, cost, {"size": 0.2}, rounds=4, progress=lambda *report: reports.append(report)
    )
    assert same_state(state(calibration.module), before)
    within = [(value, choice) for choice, size, value in every_choice if size <= 0.2 * cost.of_float]
    assert len(within) == 48
    best, choice = min(within, key=lambda pair: pair[0])
    assert (found.measured, found.allocation.choice) == (pytest.approx(best), choice)
    assert found.measured == min(r.measured for r in found.rounds)
    assert found.rounds[0].accepted
    assert found.allocation.costs["size"] == cost.total(choice)
    plain = allocate_bits(found.sensitivity, cost, {"size": 0.2})
    assert found.rounds[0].measured == pytest.approx(measure_choice(calibration, plain.choice))
    assert found.rounds[0].predicted == pytest.approx(found.sensitivity.predict(plain.choice))
    predicted = found.sensitivity.predict(found.allocation.choice)
    assert found.allocation.rise == pytest.approx(predicted - found.sensitivity.base_value)
    assert reports[0][0] == 0
    assert {report[1] for report in reports} == {2 * 5}
    assert 0 <= min(found.stability.values()) <= max(found.stability.values()) <= 1
    assert found.stability.keys() == calibration.layers.keys()


def test_later_rounds_correct_a_misleading_table(calibration, every_choice):
    right = measure_sensitivity(calibration, CANDIDATES)
    upside_down = {n: {c: -v for c, v in row.items()} for n, row in right.rises.items()}
    misled = SensitivityTable("kl", right.base, right.base_value, upside_down)
    cost = cost_of(calibration)
    found = search_allocation(calibration, CANDIDATES, cost, {"size": 0.2}, rounds=3, sensitivity=misled)
    within = [(choice, value) for choice, size, value in every_choice if size <= 0.2 * cost.of_float]
    worst_predicted = max(within, key=lambda pair: right.predict(pair[0]))
    assert found.rounds[0].measured == pytest.approx(worst_predicted[1])
    assert found.measured == min(r.measured for r in found.rounds) < 1.2 * min(value for _, value in within)
    assert found.stability == {}  # no standard errors


def test_the_least_size_within_a_measured_degradation_is_found(calibration, every_choice):
    worst = measure_choice(calibration, dict.fromkeys(calibration.layers, "w2a4"))
    found = search_allocation(calibration, CANDIDATES, cost_of(calibration), max_degradation=worst / 4, rounds=3)
    limit = found.sensitivity.base_value + worst / 4
    assert found.measured <= limit
    assert found.allocation.costs["size"] == min(size for _, size, value in every_choice if value <= limit)


def test_an_allocation_is_applied_and_survives_the_packed_file(calibration, tmp_path):
    choice = dict(zip(calibration.layers, ["w8a8", "w4a4", "w2a4", "w4a4", "w8a8"], strict=True))
    apply_allocation(calibration, choice)
    assert {name: str(layer.qconfig) for name, layer in calibration.layers.items()} == choice
    save_packed(calibration.module, tmp_path / "packed.safetensors")
    again = load_packed(net_of(), tmp_path / "packed.safetensors")
    x = seeded(9, 16, 6)
    assert torch.equal(again(x), calibration.module(x))


@pytest.mark.parametrize(("choice", "message"), [
    ({"nowhere": "w8a8"}, "layer 'nowhere' cannot become w8a8"),
    ({"0": "w4a4"}, r"layer '0' cannot become w4a4, it can be \['w8a8'\].*First and last"),
])  # fmt: skip
def test_an_allocation_that_does_not_fit_is_refused(choice, message):
    calibration = calibrate(net_of(), [seeded(1, 64, 6)], "w8a8")
    before = state(calibration.module)
    with pytest.raises(AllocationError, match=message):
        apply_allocation(calibration, choice)
    assert same_state(state(calibration.module), before)


def test_the_frontier_serves_every_budget_with_one_table(calibration, tmp_path):
    table = measure_sensitivity(calibration, CANDIDATES)
    costs = [cost_of(calibration), bops_cost(calibration, Candidates(calibration, CANDIDATES))]
    budgets = [0.01, 0.16, 0.17, 0.18, 0.2, 0.22]
    sweep = frontier(table, costs, budgets, measure=lambda choice: measure_choice(calibration, choice))
    assert sweep.skipped == [0.01]
    assert [point.budget for point in sweep.points] == budgets[1:]
    predicted = [point.predicted for point in sweep.points]
    assert predicted == sorted(predicted, reverse=True)
    for point in sweep.points:
        assert point.allocation.choice == allocate_bits(table, costs, {"size": point.budget}).choice
        assert point.measured == pytest.approx(measure_choice(calibration, point.allocation.choice))
    for ending in ("json", "csv", "png"):
        sweep.save(tmp_path / f"frontier.{ending}")
    assert len(json.loads((tmp_path / "frontier.json").read_text())["points"]) == 5
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert [float(row["predicted"]) for row in rows] == predicted
    assert [row["0"] for row in rows] == [point.allocation.choice["0"] for point in sweep.points]
    with Image.open(tmp_path / "frontier.png") as image:
        assert image.size == (900, 600)
    with pytest.raises(AllocationError, match=r"End the name in .json, .csv or .png"):
        sweep.save(tmp_path / "frontier.txt")
    with pytest.raises(AllocationError, match=r"none of the budgets \[0.01\] can be met.*below the least cost"):
        frontier(table, costs, [0.01])


def test_the_table_shows_prediction_measurement_and_proof(calibration):
    found = search_allocation(calibration, CANDIDATES, cost_of(calibration), {"size": 0.2}, rounds=1)
    table = allocation_table(found)
    assert "proven optimal" in table.note
    assert f"measured {found.measured:.4g}" in table.note
    assert [row[0] for row in table.rows] == list(calibration.layers)
    assert [row[1] for row in table.rows] == list(found.allocation.choice.values())


def test_rounds_below_one_are_refused(calibration):
    with pytest.raises(AllocationError, match="rounds must be 1 or more, got 0"):
        search_allocation(calibration, CANDIDATES, cost_of(calibration), {"size": 0.2}, rounds=0)
