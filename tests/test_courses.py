"""Forwards that take another course on every batch: branches, mixtures of experts, layers that run 0 to n times."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import build, seeded
from torch import nn
from torch.nn import functional as F

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.allocation.costs import size_cost
from lightning_ptq.allocation.search import search_allocation
from lightning_ptq.allocation.sensitivity import measure_sensitivity
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.calibration.layer_costs import layer_work
from lightning_ptq.errors import UntunableUnitWarning
from lightning_ptq.statistics.bias import tune_bias
from lightning_ptq.statistics.normalization import para_normalize


class Branch(nn.Module):
    """A layer that some batches do not reach, the first among them."""

    def __init__(self):
        super().__init__()
        self.first, self.late, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x).relu()
        if x.mean() > 0:
            h = h + self.late(h).relu()
        return self.last(h)


class Repeated(nn.Module):
    """A layer that runs as often as the first sample says."""

    def __init__(self):
        super().__init__()
        self.first, self.step, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x).relu()
        for _ in range(int(x[0, 0].abs() * 3) % 3):
            h = self.step(h).relu()
        return self.last(h)


class Mixture(nn.Module):
    """A mixture of experts; ``dense`` calls every expert, also without rows."""

    def __init__(self, dense=False, bias=0.0):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.router = nn.Linear(8, 4)
        with torch.no_grad():
            self.router.weight.mul_(5)  # all experts are chosen by some samples
            self.router.bias[3] += bias
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4))
        self.dense = dense

    def forward(self, x):
        h = self.first(x).relu()
        weights, chosen = self.router(h).softmax(-1).topk(2, -1)
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            row, place = torch.where(chosen == index)
            if self.dense or len(row):
                out.index_add_(0, row, expert(h[row]) * weights[row, place, None])
        return self.last(h + out)


NETS = {
    "branch": Branch,
    "repeated": Repeated,
    "mixture": Mixture,
    "dense mixture": lambda: Mixture(dense=True),
    "an expert without rows": lambda: Mixture(dense=True, bias=-50.0),
}
MIX = seeded(3, 2, 8)


def samples(seed, shift):
    """Samples whose 8 features depend on two factors, so that tuning can gain over rounding to nearest."""
    return seeded(seed, 64, 2) @ MIX + shift


BATCHES = [samples(i, -0.3 + 0.3 * i) for i in range(4)]


def calibrated(make, qconfig="w3a8"):
    net = build(make).eval()
    # The router stays float, as usual, so that errors come from what is tuned and not from other choices of experts.
    exclude = ["router"] if isinstance(net, Mixture) else []
    qconfig = QConfig.parse(qconfig, first_last_bits=None, exclude=exclude)
    return copy.deepcopy(net), calibrate(net, BATCHES, qconfig)


def error(float_net, net):
    parts = [samples(i + 50, -0.3 + 0.3 * i) for i in range(4)]
    with torch.no_grad():
        expected = torch.cat([float_net(part) for part in parts])
        return float(F.mse_loss(torch.cat([net(part) for part in parts]), expected) / expected.square().mean())


def test_a_layer_that_first_runs_in_a_later_batch_is_quantized():
    _, calibration = calibrated(Branch)
    assert list(calibration.layers) == ["first", "late", "last"]
    assert calibration.trace.calls["late"] == 1
    assert calibration.varies


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UntunableUnitWarning")
@pytest.mark.parametrize(
    ("name", "granularity", "mode"),
    [
        *((name, "layer", "sequential") for name in NETS if name != "dense mixture"),
        ("branch", "block", "parallel"),
        ("dense mixture", "block", "sequential"),
    ],
)
def test_every_course_is_tuned(name, granularity, mode):
    float_net, calibration = calibrated(NETS[name])
    before = error(float_net, calibration.module)
    result = adaquant(calibration, granularity=granularity, mode=mode, config=ReconstructionConfig(steps=100))
    assert any(row.accepted for row in result.units)
    assert error(float_net, calibration.module) < 1.2 * before


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_an_expert_without_rows_is_named_and_keeps_its_quantization():
    _, calibration = calibrated(lambda: Mixture(dense=True, bias=-50.0))
    before = calibration.layers["experts.3.0"].state()
    with pytest.warns(UntunableUnitWarning, match=r"experts\.3.*no calibration sample reaches it"):
        adaquant(calibration, granularity="layer", config=ReconstructionConfig(steps=4))
    after = calibration.layers["experts.3.0"].state()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", NETS)
def test_sensitivities_and_allocation_work_on_every_course(name):
    _, calibration = calibrated(NETS[name], "w8a8")
    for measure in ("mse", "fisher"):
        table = measure_sensitivity(calibration, ["w8a8", "w2a8"], measure=measure)
        assert table.rises["last"]["w2a8"] > 0
    choices = Candidates(calibration, ["w8a8", "w2a8"])
    result = search_allocation(calibration, ["w8a8", "w2a8"], [size_cost(calibration, choices)], {"size": 0.32})
    assert set(result.allocation.choice.values()) == {"w8a8", "w2a8"}
    assert all(work.macs >= 0 for work in layer_work(calibration).values())


@pytest.mark.parametrize("name", NETS)
def test_statistics_work_on_every_course(name):
    _, calibration = calibrated(NETS[name])
    result = para_normalize(calibration, measure="mse")
    assert ("experts.3.0" in result.skipped) is (name == "an expert without rows")
    assert tune_bias(calibration, measure="mse", steps=5).layers
