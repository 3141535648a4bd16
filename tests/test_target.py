"""The search for the cheapest network within an accepted drop, on drops that a formula gives."""

from __future__ import annotations

import math

import pytest

from lightning_ptq.allocation.costs import Cost
from lightning_ptq.allocation.sensitivity_table import SensitivityTable
from lightning_ptq.allocation.target import (
    LAST_MARGIN,
    MARGIN,
    WORTHWHILE,
    Measurement,
    _Search,
    as_frontier,
    fine_frontier,
    search_drop,
)
from lightning_ptq.errors import AllocationError

NAMES = [f"layer{i}" for i in range(12)]
RISES = {name: {"w8a8": 0.0, "w4a8": 0.01 * (i + 1), "w2a8": 0.3 * (i + 1)} for i, name in enumerate(NAMES)}
SIZE = Cost("size", {name: {"w8a8": 800.0, "w4a8": 400.0, "w2a8": 200.0} for name in NAMES}, 100.0, 40000.0, "bytes")
TABLE = SensitivityTable("kl", dict.fromkeys(NAMES, "w8a8"), 0.0, RISES)
POINTS = fine_frontier(TABLE, [SIZE], "size")


class Network:
    """Measures a drop that is a function of the predicted rise, and counts how often it was asked."""

    def __init__(self, drop, error=0.0):
        self.drop, self.error, self.asked = drop, error, []

    def __call__(self, allocation):
        self.asked.append(allocation)
        return Measurement(0.9 - self.drop(allocation.rise), self.drop(allocation.rise), self.error)


def search(drop, max_drop, tries=8, error=0.0, untuned=None):
    network = Network(drop, error)
    trials = search_drop(POINTS, max_drop, "size", network, untuned, tries)
    (chosen,) = [trial for trial in trials if trial.chosen]
    return chosen, trials, network


def test_the_frontier_ascends_in_cost_and_descends_in_rise():
    assert [point.costs["size"] for point in POINTS] == sorted({point.costs["size"] for point in POINTS})
    assert [point.rise for point in POINTS] == sorted({point.rise for point in POINTS}, reverse=True)
    assert POINTS[0].costs["size"] == 2500
    assert POINTS[-1].costs["size"] == 9700
    assert len(POINTS) > 15
    assert max(point.costs["size"] for point in fine_frontier(TABLE, [SIZE], "size", 0.2)) <= 8000
    assert [p.predicted for p in as_frontier(POINTS, TABLE, [SIZE], "size").points] == [p.rise for p in POINTS]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("max_drop", [0.001, 0.01, 0.1])
def test_enough_trials_find_the_cheapest_choice_within(power, max_drop):
    def drop(rise):
        return 0.1 * (rise / 5) ** power

    chosen, trials, _ = search(drop, max_drop, tries=30)
    best = next(point for point in POINTS if drop(point.rise) <= max_drop)
    assert chosen.costs["size"] <= 1.02 * best.costs["size"]
    assert chosen.within
    assert chosen.drop <= max_drop
    assert len(trials) < 12


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_few_trials_suffice_where_the_rounded_network_shows_where_to_start(tries):
    untuned = Network(lambda rise: 0.8 * rise / 5)
    chosen, _, network = search(lambda rise: 0.1 * rise / 5, 0.02, tries, untuned=untuned)
    best = next(point for point in POINTS if 0.1 * point.rise / 5 <= 0.02)
    assert len(network.asked) <= tries + 1
    assert len(untuned.asked) <= 6
    assert chosen.costs["size"] <= (2.0 if tries == 1 else 1.1) * best.costs["size"]


def test_if_everything_is_within_the_cheapest_choice_is_the_result():
    chosen, _, _ = search(lambda rise: -0.001, 0.01)
    assert chosen.costs["size"] == POINTS[0].costs["size"]


def test_the_widest_candidates_are_tried_before_the_search_gives_up():
    chosen, trials, _ = search(lambda rise: 0.0 if rise == 0 else 1.0, 0.01, tries=2)
    assert len(trials) == 3
    assert chosen.costs["size"] == POINTS[-1].costs["size"]
    with pytest.raises(AllocationError, match=r"max_drop=0\.01: the best one drops by 0\.5, to 0\.4"):
        search(lambda rise: 0.5 + rise, 0.01, tries=2)


@pytest.mark.parametrize(("share", "settled"), [(0.85, False), (0.95, True)])
def test_noise_settles_only_trials_of_nearly_the_same_cost(share, settled):
    inside = len(POINTS) - 1
    outside = next(i for i, point in enumerate(POINTS) if point.costs["size"] > share * POINTS[inside].costs["size"])
    for error in (0.0, 0.5):
        points = [*POINTS[:outside], POINTS[outside], POINTS[inside - 1], POINTS[inside]]
        search = _Search(points, 0.01, "size", costly=False)
        search.add(outside, Measurement(0.9, 0.02, error))
        search.add(outside + 2, Measurement(0.9, 0.0, error))
        assert (search.next() is None) == (settled and error > 0)


def test_after_a_trial_within_the_next_one_is_halfway_to_the_cheapest_choice_or_beyond():
    for drop in (0.01, 0.0):
        search = _Search(POINTS, 0.01, "size")
        search.add(20, Measurement(0.9, drop, 0.005))
        middle = math.sqrt(POINTS[0].costs["size"] * POINTS[20].costs["size"])
        assert POINTS[search.next() - 1].costs["size"] < middle


@pytest.mark.parametrize("power", [0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(("left", "margin"), [(2, MARGIN), (1, LAST_MARGIN)])
def test_after_a_trial_beyond_the_limit_drops_follow_the_power_of_the_rise_that_they_have_without_tuning(
    power, left, margin
):
    search = _Search(POINTS, 0.01, "size")
    search.untuned = {index: POINTS[index].rise ** power for index in (2, 5, 11)}
    search.add(5, Measurement(0.9, 0.03, 0.02))
    expected = POINTS[5].rise * (margin * 0.01 / 0.02) ** (1 / min(power, 1.0))  # half a standard error less
    found = search.next(left)
    assert POINTS[found].rise <= expected * (1 + 1e-9)
    assert POINTS[found - 1].rise > expected * (1 - 1e-9)


def test_without_drops_of_several_rises_drops_are_proportional_to_the_rise():
    for untuned in ({}, {5: 0.3}, {5: 0.3, len(POINTS) - 1: 0.0}):
        search = _Search(POINTS, 0.01, "size")
        search.untuned = untuned
        search.add(5, Measurement(0.9, 0.018, None))
        assert POINTS[search.next()].rise <= POINTS[5].rise / 2 < POINTS[search.next() - 1].rise


def test_a_tuning_is_not_worth_it_where_the_limit_is_predicted_close_to_the_trial_within():
    for drop, settled in ((0.011, False), (0.05, True)):
        search = _Search(POINTS, 0.01, "size")
        search.add(8, Measurement(0.9, drop, 0.0))
        search.add(20, Measurement(0.9, 0.008, 0.0))
        assert POINTS[8].costs["size"] < 0.75 * POINTS[20].costs["size"]
        assert (search.next() is None) == settled


def test_a_drop_of_exactly_the_limit_is_within_in_single_precision():
    torch = pytest.importorskip("torch")
    rejected = 0
    for right in range(100, 1001):
        before, value = (float(torch.tensor(count / 1000)) for count in (right, right - 10))
        rejected += not Measurement(value, before - value, None).within(0.01)
    assert rejected == 0
    assert not Measurement(0.8399, 0.0101, None).within(0.01)


def test_a_metric_that_is_not_finite_is_no_drop_and_no_error_of_arithmetic():
    search = _Search(POINTS, 0.01, "size")
    search.untuned = {5: math.inf, 11: 0.2, 20: 0.02}
    search.add(5, Measurement(math.nan, math.inf, None))
    assert 5 < search.next() < len(POINTS) - 1
    with pytest.raises(AllocationError, match="the metric of every network that was tried is nan"):
        search_drop(POINTS, 0.01, "size", lambda _: Measurement(math.nan, math.inf, None), None, 2)


def test_a_trial_within_at_the_widest_candidates_does_not_end_the_search():
    search = _Search(POINTS, 0.01, "size")
    search.add(5, Measurement(0.9, 0.02, 0.0))
    search.add(len(POINTS) - 1, Measurement(0.9, 0.0, 0.0))
    assert 5 < search.next() < len(POINTS) - 2


@pytest.mark.parametrize("costly", [True, False])
def test_a_tuned_trial_that_could_save_less_than_a_tenth_is_not_made(costly):
    search = _Search(POINTS, 0.01, "size", costly)
    search.add(2, Measurement(0.9, 0.0, 0.0))
    assert POINTS[2].costs["size"] < POINTS[0].costs["size"] / WORTHWHILE**2
    assert (search.next() is None) == costly


def test_trials_hold_what_was_tried():
    chosen, trials, network = search(lambda rise: 0.1 * rise / 5, 0.02, error=0.003)
    assert [trial.rise for trial in trials] == [allocation.rise for allocation in network.asked]
    assert chosen.choice.keys() == set(NAMES)
    assert chosen.error == 0.003
    assert math.isclose(chosen.value, 0.9 - chosen.drop)


@pytest.mark.parametrize("scale", [1.0, 0.04, 1e-6])
@pytest.mark.parametrize("free", [False, True])
def test_costs_of_any_magnitude_and_free_candidates_are_swept(scale, free):
    values = {name: {"w8a8": 8 * scale, "w4a8": 4 * scale, "w2a8": 0.0 if free else 2 * scale} for name in NAMES}
    points = fine_frontier(TABLE, [Cost("table", values)], "table")
    assert points[0].choice == dict.fromkeys(NAMES, "w2a8")
    assert points[-1].choice == dict.fromkeys(NAMES, "w8a8")
    assert len(points) > 15


def test_between_two_trials_the_drop_is_linear_in_the_logarithm_of_the_rise():
    low, high = POINTS[-2].rise, POINTS[0].rise  # the widest choice but one, and the narrowest

    def drop(rise):
        return 0.1 * math.log(rise / low) / math.log(high / low)

    search = _Search(POINTS, 0.06, "size")
    for index in (0, len(POINTS) - 2):
        search.add(index, Measurement(0.0, drop(POINTS[index].rise), 0.0))
    found = search.next()
    assert drop(POINTS[found].rise) <= 0.06 < drop(POINTS[found - 1].rise)
