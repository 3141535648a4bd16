from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ptq.calibration.calibrator import merge_observers
from lightning_ptq.numerics.observers import MinMaxObserver, MSEObserver, PercentileObserver, make_observer
from lightning_ptq.numerics.quantize import choose_qparams, fake_quantize
from lightning_ptq.numerics.spec import QuantSpec
from lightning_ptq.numerics.weight_scales import weight_qparams
from lightning_ptq.runtime.ranks import Ranks

OBSERVERS = ["minmax", "percentile", "mse"]

DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x + 0.5,
    "relu": lambda x: x.relu(),
    "heavy_tail": lambda x: x.exp() - 0.3,
    "uniform": lambda x: torch.special.ndtr(x),
    "uniform_around_0": lambda x: torch.special.ndtr(x) - 0.5,
    "negative": lambda x: -x.square(),
    "pixels": lambda x: torch.special.ndtr(x).mul(255).round() / 255,
}


def values(name: str, size: int = 6000, seed: int = 0) -> Tensor:
    return DATA[name](torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def watched(spec: QuantSpec, *batches: Tensor) -> MinMaxObserver:
    observer = make_observer(spec)
    for batch in batches:
        observer.update(batch)
    return observer


def squared_error(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    return (fake_quantize(x, scale, zero, spec.quant_min, spec.quant_max) - x).square().sum(-1)


def test_the_name_chooses_the_class() -> None:
    classes = [type(make_observer(QuantSpec(8, observer=name))) for name in OBSERVERS]
    assert classes == [MinMaxObserver, PercentileObserver, MSEObserver]


def test_minmax_is_the_range_of_all_batches() -> None:
    batches = [values("normal").view(2, 3000).t(), values("heavy_tail", seed=1).half(), torch.tensor(-7.5)]
    low, high = watched(QuantSpec(8, observer="minmax"), *batches).compute()
    assert low == -7.5
    assert high == max(batch.max().float() for batch in batches)


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
@pytest.mark.parametrize("name", DATA)
def test_percentiles_are_those_of_torch_quantile(name: str, percentile: float) -> None:
    x = values(name, 20_000)
    found = watched(QuantSpec(8, observer="percentile", percentile=percentile), *x.chunk(3)).compute()
    expected = x.quantile(torch.tensor([1 - percentile / 100, percentile / 100]))
    torch.testing.assert_close(torch.stack(found), expected, rtol=0.01, atol=1e-3)


def grid_error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> float:
    return squared_error(x, *choose_qparams(low, high, spec), spec).item()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", DATA)
def test_mse_search_against_brute_force(name: str, bits: int) -> None:
    spec, x = QuantSpec(bits, symmetric=False), values(name, 3000)
    found = grid_error(x, *watched(spec, *x.chunk(2)).compute(), spec)
    low, high = x.min(), x.max()
    tiny = 1e-9 * x.square().sum().item()
    # The histogram knows the values to within half a bin, and the errors of the ranges accordingly.
    assert found <= 1.02 * grid_error(x, low, high, spec) + tiny

    steps = torch.linspace(0.02, 1, 50)
    both = low < 0 < high
    ends = [(low * i, high * j) for i in steps for j in steps] if both else [(low * i, high * i) for i in steps.sqrt()]
    best = min(grid_error(x, i, j, spec) for i, j in ends)
    assert found <= 1.02 * best + tiny


def test_mse_search_of_a_symmetric_grid() -> None:
    spec, x = QuantSpec(3), values("heavy_tail", 3000)
    found = grid_error(x, *watched(spec, x).compute(), spec)
    span = x.abs().max()
    assert found <= 1.02 * min(grid_error(x, -span * i, span * i, spec) for i in torch.linspace(0.01, 1, 400))


class Pair(Ranks):
    """This rank and another one, which has the observer given."""

    world = 2

    def __init__(self, other: MinMaxObserver) -> None:
        self.states = iter(other.metric_state.values())

    def gather(self, value: Any) -> list[Any]:
        return [value, next(self.states) if isinstance(value, Tensor) else value]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("empty", [False, True], ids=["", "one_saw_nothing"])
def test_merged_states_equal_one_observer_exactly(observer: str, empty: bool) -> None:
    spec = QuantSpec(4, symmetric=False, observer=observer, percentile=99)
    batches = list(values("normal", 999).split([400, 1, 300, 298]))
    together = watched(spec, *batches)
    ranks = [watched(spec, *batches), watched(spec)] if empty else [watched(spec, *batches[i::2][::-1]) for i in (1, 0)]
    merged = merge_observers(Pair(ranks[1]), {"layer": ranks[0]}, lambda name: make_observer(spec))["layer"]
    for name, state in together.metric_state.items():
        assert torch.equal(merged.metric_state[name], state)
    assert merged._cache is None  # nothing kept of what the rank had alone
    assert torch.equal(torch.stack(ranks[0].compute()), torch.stack(together.compute()))
    for ours, theirs in zip(ranks[0].qparams(), together.qparams(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_raise_and_leave_the_state(observer: str, bad: float) -> None:
    watching = watched(QuantSpec(8, observer=observer), values("normal", 10))
    before = {name: copy.deepcopy(getattr(watching, name)) for name in watching._reductions}
    with pytest.raises(ValueError, match="NaN or an infinity"):
        watching.update(torch.tensor([100.0, bad, -100.0]))
    assert all(torch.equal(getattr(watching, name), state) for name, state in before.items())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 0), (3, 1, 2)], ids=str)
def test_tensors_of_any_shape_are_watched(observer: str, shape: tuple[int, ...]) -> None:
    spec = QuantSpec(8, symmetric=False, observer=observer, percentile=100)
    x, more = values("normal", 50), torch.full(shape, 9.0)
    found, expected = watched(spec, x, more).compute(), watched(spec, torch.cat([x, more.flatten()])).compute()
    assert torch.equal(torch.stack(found), torch.stack(expected))


def rows() -> Tensor:
    """Channels of very different size: normal ones, one with an outlier, one without negative values, one of zeros."""
    x = torch.randn(16, 400, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 16)[:, None]
    x[3, 7] = 15 * x[3].std()
    x[5] = x[5].abs()
    x[9] = 0
    return x


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize(("observer", "percentile"), [("minmax", 100), ("percentile", 95)])
def test_weight_range_of_every_channel(observer: str, percentile: float, symmetric: bool) -> None:
    spec = QuantSpec(4, symmetric, per_channel=True, observer=observer, percentile=percentile, signed_scale=False)
    scale, zero = weight_qparams(rows(), spec)
    for i, row in enumerate(rows()):
        low, high = row.quantile(1 - percentile / 100), row.quantile(percentile / 100)
        expected_scale, expected_zero = choose_qparams(low, high, spec)
        torch.testing.assert_close(scale[i], expected_scale)
        assert zero[i] == expected_zero


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_weights_are_never_worse_than_minmax_in_any_channel(bits: int, symmetric: bool) -> None:
    errors = {}
    for observer in ("mse", "minmax"):
        spec = QuantSpec(bits, symmetric, per_channel=True, observer=observer)
        scale, zero = weight_qparams(rows(), spec)
        errors[observer] = squared_error(rows(), scale[:, None], zero[:, None], spec)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()
    if bits < 5:
        assert errors["mse"].sum() < 0.9 * errors["minmax"].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_weights_are_close_to_brute_force(bits: int) -> None:
    spec = QuantSpec(bits, per_channel=True)
    x, (scale, zero) = rows(), weight_qparams(rows(), spec)
    found = squared_error(x, scale[:, None], zero[:, None], spec)
    tried = (x.abs().amax(1) * torch.linspace(0.005, 1, 400)[:, None] / spec.quant_max).clamp(min=1e-9)
    tried = torch.cat([tried, -tried])
    best = torch.stack([squared_error(x, step[:, None], zero[:, None], spec) for step in tried]).amin(0)
    assert (found <= 1.02 * best).all()


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_the_level_more_is_on_the_side_where_a_channel_needs_it(observer: str) -> None:
    signed = QuantSpec(2, per_channel=True, observer=observer, percentile=95)
    unsigned = replace(signed, signed_scale=False)
    x = rows()
    errors = {}
    for name, spec, weight in (("signed", signed, x), ("mirrored", signed, -x), ("unsigned", unsigned, x)):
        scale, zero = weight_qparams(weight, spec)
        errors[name] = squared_error(weight, scale[:, None], zero[:, None], spec)
        assert not zero.any()
        assert bool((scale < 0).any()) == (name != "unsigned")
    torch.testing.assert_close(errors["signed"], errors["mirrored"])
    assert (errors["signed"] <= errors["unsigned"]).all()
    assert errors["signed"][5] < 0.8 * errors["unsigned"][5]  # no negative values, so three levels in place of two


@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, symmetric=False)], ids=["8 bits", "affine"])
def test_other_grids_have_positive_scales(spec: QuantSpec) -> None:
    scale, _ = weight_qparams(rows(), spec)
    assert (scale > 0).all()
