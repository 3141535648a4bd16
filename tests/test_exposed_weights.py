"""Weights of quantized layers that the network also reads by other code: heads that use the table of an embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Snapshot, build, idle_quantizers, relative_error, seeded
from torch import nn
from torch.nn import functional as F

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate, load_packed, save_packed
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")


class Tied(nn.Module):
    """A language model whose head is a function of the weight of its embedding."""

    def __init__(self, head) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), head

    def forward(self, ids):
        return self.head(self.body(self.table(ids)).relu(), self.table.weight)


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 6)

    def forward(self, x):
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t())


IDS = [torch.randint(20, (16, 5), generator=torch.Generator().manual_seed(i)) for i in range(2)]
ROWS = [seeded(i, 16, 8) for i in range(2)]
CASES = {
    "linear": (lambda: Tied(F.linear), IDS),
    "matmul": (lambda: Tied(lambda h, weight: h @ weight.to(h.dtype).T), IDS),
    "normalized": (lambda: Tied(lambda h, weight: h @ F.normalize(weight).T), IDS),
    "transposed": (AutoEncoder, ROWS),
}


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("operations", ["layers", "products"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_packed_file(name, operations, tuned, tmp_path):
    make, batches = CASES[name]
    float_net = build(make).eval()
    net = build(make).eval()
    before = Snapshot(net)
    calibration = calibrate(net, batches, QConfig.parse("w3a8", first_last_bits=None, operations=operations))
    with torch.no_grad():
        if tuned:
            adaquant(calibration, config=ReconstructionConfig(steps=5))
        quantized = net(batches[0])
        save_packed(net, tmp_path / "packed")
        assert torch.equal(load_packed(build(make).eval(), tmp_path / "packed")(batches[0]), quantized)
        with ops_in_mode(net, "float"):  # also where it is read as a tensor
            torch.testing.assert_close(net(batches[0]), float_net(batches[0]))
    again, state = build(make).eval(), copy.deepcopy(net.state_dict())
    again.load_state_dict(state)
    assert torch.equal(again(batches[0]), quantized)
    calibration.prepared.undo()
    before.assert_unchanged()


def test_other_weights_are_not_rounded_in_place():
    net = build(lambda: Tied(F.linear)).eval()
    table, body = net.table.weight.detach().clone(), net.body.weight.detach().clone()
    calibrate(net, IDS, "w4a8")
    assert not torch.equal(net.table.weight, table)
    assert torch.equal(net.body.weight, body)


@pytest.mark.parametrize("name", ["linear", "matmul", "transposed"])
def test_products_with_the_weight_of_a_layer_that_runs_are_quantized(name):
    make, batches = CASES[name]
    net = build(make).eval()
    assert inspect_module(net, batches[0], "w4a4").covered == 1
    calibration = calibrate(net, batches, "w8a8")
    assert "tied_1" in calibration.layers
    assert idle_quantizers(calibration, batches[0]) == []
    assert relative_error(net(batches[0]), build(make).eval()(batches[0])) < 1e-3


def test_a_weight_of_a_layer_that_does_not_run_is_an_activation():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.keys, self.body = nn.Embedding(20, 8), nn.Embedding(6, 8), nn.Linear(8, 8)

        def forward(self, ids):
            return self.body(self.table(ids)) @ self.keys.weight.T

    net = build(Unused).eval()
    calibration = calibrate(net, IDS, "w8a8")
    assert list(calibration.layers) == ["table", "body", "matmul_1"]
    assert idle_quantizers(calibration, IDS[0]) == []
