from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import mip
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_ptq import Cost, SensitivityTable, allocate_bits
from lightning_ptq.errors import AllocationError, QConfigError, UnprovenAllocationWarning

CANDIDATES = ["w8a8", "w4a4", "w2a4"]
NUMBER = st.integers(0, 1000)


def table(draw_values, layers):
    return {layer: dict(zip(CANDIDATES, row, strict=True)) for layer, row in zip(layers, draw_values, strict=True)}


@st.composite
def problems(draw):
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 5)))]

    def values(number=NUMBER):
        rows = st.lists(number, min_size=3, max_size=3)
        return table(draw(st.lists(rows, min_size=len(layers), max_size=len(layers))), layers)

    rises = values(st.integers(-50, 1000))
    costs = [Cost(name, values(), fixed=draw(NUMBER)) for name in ["size", "bops"][: draw(st.integers(1, 2))]]
    ties = draw(st.sampled_from([[], ["layer[01]"], ["layer[12]", "layer[34]"]]))
    ties = [t for t in ties if any(f"layer{c}" in layers for c in t[6:8])]
    pins = draw(st.sampled_from([{}, {"layer0": "w4a4"}]))
    return rises, costs, ties, pins


def feasible(problem):
    """All choices that ties and pins allow."""
    rises, _, ties, pins = problem
    for combination in itertools.product(CANDIDATES, repeat=len(rises)):
        choice = dict(zip(rises, combination, strict=True))
        tied = all(len({choice[f"layer{c}"] for c in tie[6:8] if f"layer{c}" in choice}) == 1 for tie in ties)
        if tied and all(choice[layer] == candidate for layer, candidate in pins.items()):
            yield choice


def between(least, most, share):
    """An integer limit, as all tables are of integers: a solver meets limits up to a tolerance of about 1e-6."""
    return least + math.floor(share * (most - least))


def rise(rises, choice):
    return sum(rises[layer][candidate] for layer, candidate in choice.items())


@settings(max_examples=60, deadline=None)
@given(problems(), st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2))
def test_the_choice_is_as_good_as_brute_force(problem, shares):
    rises, costs, ties, pins = problem
    limits = {}
    for cost, share in zip(costs, shares, strict=False):
        totals = [cost.total(choice) for choice in feasible(problem)]
        limits[cost.name] = between(min(totals), max(totals), share)
    assume(all(limit > 0 for limit in limits.values()))
    within = [c for c in feasible(problem) if all(cost.total(c) <= limits[cost.name] for cost in costs)]
    if not within:
        with pytest.raises(AllocationError, match="no choice meets all budgets together"):
            allocate_bits(rises, costs, limits, ties=ties, pins=pins)
        return
    found = allocate_bits(rises, costs, limits, ties=ties, pins=pins)
    assert found.choice in list(feasible(problem))
    assert found.rise == rise(rises, found.choice) == min(rise(rises, choice) for choice in within)
    for cost in costs:
        assert found.costs[cost.name] == cost.total(found.choice) <= limits[cost.name]
    assert (found.proven, found.gap, found.bound) == (True, 0.0, found.rise)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.0, 1.0))
def test_the_cheapest_choice_within_a_degradation_is_as_good_as_brute_force(problem, share):
    rises, costs, ties, pins = problem
    every = list(feasible(problem))
    least, most = (pick(rise(rises, choice) for choice in every) for pick in (min, max))
    limit = between(least, most, share)
    found = allocate_bits(rises, costs, max_degradation=limit, minimise=costs[-1].name, ties=ties, pins=pins)
    best = min(costs[-1].total(choice) for choice in every if rise(rises, choice) <= limit)
    assert found.rise <= limit
    assert found.costs[costs[-1].name] == best == found.bound


CHEAP, DEAR, TINY = st.floats(0.3, 3), st.sampled_from([1e6, 1e9, math.inf]), st.floats(1e-9, 1e-8)


@st.composite
def wild_problems(draw):
    """Tables whose entries differ by up to eighteen orders of magnitude, and a share of the possible totals."""
    layers = [f"layer{i}" for i in range(draw(st.integers(1, 4)))]

    def values(*numbers):
        rows = st.lists(st.one_of(*numbers), min_size=3, max_size=3)
        return table(draw(st.lists(rows, min_size=len(layers), max_size=len(layers))), layers)

    kinds = draw(st.sampled_from([(CHEAP, CHEAP, DEAR), (CHEAP, TINY), (TINY, DEAR), (CHEAP, TINY, DEAR)]))
    costs = [Cost(name, values(*kinds), fixed=draw(st.sampled_from([0, 1.5]))) for name in ("table", "size")]
    return values(CHEAP, TINY, st.just(1e6)), costs, draw(st.lists(st.floats(0, 1), min_size=2, max_size=2))


@settings(max_examples=120, deadline=None)
@given(wild_problems())
def test_no_choice_is_over_a_budget_whatever_the_magnitudes(problem):
    rises, costs, shares = problem
    every = [dict(zip(rises, c, strict=True)) for c in itertools.product(CANDIDATES, repeat=len(rises))]
    possible = [choice for choice in every if all(cost.total(choice) < math.inf for cost in costs)]
    assume(possible)
    limits = {}
    for cost, share in zip(costs, shares, strict=True):
        totals = sorted(cost.total(choice) for choice in possible)
        limits[cost.name] = totals[int(share * (len(totals) - 1))]  # met exactly by one of them
    within = [c for c in possible if all(cost.total(c) <= limits[cost.name] for cost in costs)]
    if not within:
        with pytest.raises(AllocationError, match="no choice meets all budgets together"):
            allocate_bits(rises, costs, limits)
        return
    found = allocate_bits(rises, costs, limits)
    assert found.proven
    for cost in costs:
        assert found.costs[cost.name] == cost.total(found.choice) <= limits[cost.name]
    assert found.rise == pytest.approx(min(rise(rises, choice) for choice in within), rel=1e-12)


@pytest.mark.parametrize("missing", [1e6, 1e9, math.inf])
def test_a_prohibitive_cost_does_not_hide_the_others(missing):
    generator = random.Random(0)
    layers = [f"layer{i}" for i in range(6)]
    for _ in range(15):
        rises = {
            n: dict(zip(CANDIDATES, (0.0, generator.random(), 1 + generator.random()), strict=True)) for n in layers
        }
        latency = {n: dict(zip(CANDIDATES, (3.0, 1 + generator.random(), 0.3), strict=True)) for n in layers}
        for row in generator.sample(list(latency.values()), 3):
            row["w4a4"] = missing  # this kernel does not exist
        cost, limit = Cost("latency", latency), 9.0
        every = [dict(zip(layers, c, strict=True)) for c in itertools.product(CANDIDATES, repeat=len(layers))]
        best = min(rise(rises, choice) for choice in every if cost.total(choice) <= limit)
        found = allocate_bits(rises, cost, {"latency": limit})
        assert cost.total(found.choice) <= limit
        assert found.rise == pytest.approx(best)


def test_a_forbidden_candidate_is_never_chosen():
    size = Cost("size", {**SIZE.values, "b": {"w8a8": math.inf, "w4a4": 4}}, fixed=2)
    assert allocate_bits(RISES, size, max_degradation=9.0).choice["b"] == "w4a4"
    with pytest.raises(AllocationError, match=r"budget of 9 for size is below the least cost.*from 10 to 14"):
        allocate_bits(RISES, size, {"size": 9})
    with pytest.raises(AllocationError, match=r"no candidate is left for \['b'\].*infinite"):
        allocate_bits(RISES, size, {"size": 12}, pins={"b": "w8a8"})


def test_a_solution_over_a_budget_becomes_an_error(monkeypatch):
    def note(search, node, chosen, bound, proven):
        search.found.choice, search.found.objective = {"a": "w8a8", "b": "w8a8"}, 0.0
        return []

    monkeypatch.setattr("lightning_ptq.allocation.branching.Search._note", note)
    with pytest.raises(AllocationError, match="breaks a limit of 14"):
        allocate_bits(RISES, SIZE, {"size": 14})


RISES = {"a": {"w8a8": 0.0, "w4a4": 1.0}, "b": {"w8a8": 0.0, "w4a4": 3.0}}
SIZE = Cost("size", {"a": {"w8a8": 8, "w4a4": 4}, "b": {"w8a8": 8, "w4a4": 4}}, fixed=2, of_float=64, unit="bytes")
BOPS = Cost("bops", {"a": {"w8a8": 9, "w4a4": 1}, "b": {"w8a8": 1, "w4a4": 9}})


def test_a_budget_of_at_most_one_is_a_fraction_of_the_float_model():
    assert allocate_bits(RISES, SIZE, {"size": 14 / 64}).choice == {"a": "w4a4", "b": "w8a8"}
    assert allocate_bits(RISES, SIZE, {"size": 14}).limits == {"size": 14.0}
    assert allocate_bits(RISES, SIZE, {"size": 13.9}).choice == {"a": "w4a4", "b": "w4a4"}


def changed(layer, candidate, value):
    return {**RISES, layer: {**RISES[layer], candidate: value}}


BAD = {
    "too small": (
        {"budgets": {"size": 9}},
        "budget of 9 for size is below the least cost.*from 10 to 18 bytes.*0.1562",
    ),
    "too large": (
        {"budgets": {"size": 19}},
        "budget of 19 for size is above the greatest cost.*from 10 to 18 bytes",
    ),
    "no budget": ({}, "no budget. Give one"),
    "unknown": ({"budgets": {"latency": 3}}, r"budget for \['latency'\], but only the costs \['size'\]"),
    "negative": ({"budgets": {"size": -1}}, "must be a positive number, got -1"),
    "degradation": ({"max_degradation": -1}, "max_degradation=-1 is below the least rise of the candidates, 0"),
    "minimise": ({"max_degradation": 1, "minimise": "watts"}, "minimise='watts' is not one of"),
    "pinned apart": ({"budgets": {"size": 12}, "ties": ["*"], "pins": {"a": "w4a4", "b": "w8a8"}}, "no candidate is"),
    "true": ({"budgets": {"size": True}}, "must be a positive number, got True"),
    "text": ({"budgets": {"size": "small"}}, "must be a positive number, got 'small'"),
    "time": ({"budgets": {"size": 12}, "time_limit": math.nan}, "time_limit must be a number of seconds, got nan"),
    "rise": ({"max_degradation": "much"}, "max_degradation='much' is below"),
    "unknown pin": ({"budgets": {"size": 12}, "pins": {"a": "w3a3"}}, r"no candidate is left for \['a'\].*w3a3"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_impossible_requests_are_explained(options, message):
    with pytest.raises(AllocationError, match=message):
        allocate_bits(RISES, SIZE, **options)


@pytest.mark.parametrize(
    ("rises", "cost", "message"),
    [
        (changed("a", "w4a4", math.nan), SIZE, "sensitivity table has nan for layer 'a' at w4a4"),
        (RISES, Cost("size", changed("b", "w8a8", -1.0)), "size table has -1.0 for layer 'b' at w8a8"),
        (RISES, Cost("size", changed("b", "w8a8", math.nan)), "size table has nan for layer 'b' at w8a8"),
        (changed("a", "w4a4", math.inf), SIZE, "sensitivity table has inf for layer 'a' at w4a4"),
        (changed("a", "w4a4", "low"), SIZE, "sensitivity table has low for layer 'a' at w4a4"),
        (RISES, Cost("size", SIZE.values, fixed=math.nan), "fixed part of size must be a finite number, got nan"),
        (RISES, Cost("size", {"a": RISES["a"]}), "size table has no entry for layer 'b' at w8a8"),
        ({}, SIZE, "table is empty"),
    ],
)
def test_tables_that_do_not_fit_are_refused(rises, cost, message):
    with pytest.raises(AllocationError, match=message):
        allocate_bits(rises, cost, {"size": 12})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ties": "a"}, "ties must be a list, got the text 'a'"), ({"pins": ["a"]}, "pins must be a dictionary")],
)
def test_ties_and_pins_of_a_wrong_type_are_refused(options, message):
    with pytest.raises(QConfigError, match=message):
        allocate_bits(RISES, SIZE, {"size": 12}, **options)


@pytest.mark.parametrize("options", [{"ties": ["c*"]}, {"pins": {"c": "w8a8"}}])
def test_a_pattern_that_matches_nothing_is_refused(options):
    with pytest.raises(QConfigError, match=r"no layer matches 'c"):
        allocate_bits(RISES, SIZE, {"size": 12}, **options)


def test_budgets_that_exclude_each_other_are_each_explained():
    with pytest.raises(AllocationError, match=r"together: size 10 \(at least 14 under.*bops 9 \(at least 10 under"):
        allocate_bits(RISES, [SIZE, BOPS], {"size": 10, "bops": 9})


def test_a_time_limit_returns_the_incumbent_and_says_so(monkeypatch):
    def optimize(model, max_seconds):
        assert max_seconds == 7.0
        own(model)
        return mip.OptimizationStatus.FEASIBLE

    own = mip.Model.optimize
    monkeypatch.setattr(mip.Model, "optimize", optimize)
    monkeypatch.setattr(mip.Model, "objective_bound", property(lambda model: 0.25 / 3))  # in units of the largest rise
    with pytest.warns(UnprovenAllocationWarning, match="time limit of 7.0 s.*within 75.00%"):
        found = allocate_bits(RISES, SIZE, {"size": 14}, time_limit=7.0)
    assert (found.proven, found.rise, found.bound) == (False, 1.0, pytest.approx(0.25))


def test_a_solver_leaves_the_number_of_threads_of_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = allocate_bits(RISES, SIZE, {"size": 14})
        assert (found.solver, torch.get_num_threads()) == (mip.CBC, 3)
    finally:
        torch.set_num_threads(threads)


def test_highs_solves_where_cbc_does_not_load(monkeypatch):
    def model(solver_name):
        if solver_name == mip.CBC:
            raise OSError("no such library")
        return own(solver_name=solver_name)

    own = mip.Model
    monkeypatch.setattr(mip, "Model", model)
    found = allocate_bits(RISES, SIZE, {"size": 14})
    assert (found.solver, found.choice, found.proven) == (mip.HIGHS, {"a": "w4a4", "b": "w8a8"}, True)


WITHOUT_CBC = {
    "its library cannot be loaded": "import os; os.environ['PMIP_CBC_LIBRARY'] = os.path.abspath(__file__)",
    "its library does not exist": "import os; os.environ['PMIP_CBC_LIBRARY'] = '/nowhere/libCbc.so'",
    "its package is not installed": "import sys; sys.modules['cbcbox'] = None",
}


@pytest.mark.parametrize("cause", WITHOUT_CBC)
def test_a_process_without_cbc_says_once_that_highs_takes_its_place(cause, tmp_path):
    code = f"""
{WITHOUT_CBC[cause]}
from lightning_ptq import allocate_bits
from lightning_ptq.allocation.costs import Cost
rises, size = {RISES!r}, Cost("size", {SIZE.values!r})
for _ in range(2):
    found = allocate_bits(rises, size, {{"size": 14}})
    print(found.solver, found.proven, *found.choice.values())
"""
    (tmp_path / "run.py").write_text(code)
    ran = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True)
    assert ran.stdout.splitlines() == [f"{mip.HIGHS} True w4a4 w8a8"] * 2, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith("bit allocation uses the solver HiGHS, because CBC: ")


def test_no_solver_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr(mip, "Model", lambda solver_name: 1 / 0)
    with pytest.raises(AllocationError, match=r"no solver loads.*pip install"):
        allocate_bits(RISES, SIZE, {"size": 14})


def test_a_sensitivity_table_can_be_passed_directly():
    base = {"a": "w8a8", "b": "w8a8"}
    found = allocate_bits(SensitivityTable("kl", base, 0.5, RISES), SIZE, {"size": 14})
    assert found.rise == 1.0
    assert found.to_dict()["choice"] == found.choice
