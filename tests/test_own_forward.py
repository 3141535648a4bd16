"""Forwards that are set on an instance, as libraries that move or log tensors do."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import Snapshot, build, idle_quantizers, seeded
from torch import nn

from lightning_ptq import calibrate, load_packed, save_packed

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")


def wrap(module: nn.Module) -> None:
    """Wrap the forward as accelerate does: the former one is an attribute of the module."""
    former = module.forward
    module.former = former
    module.forward = functools.partial(lambda m, *args, **kwargs: m.former(*args, **kwargs), module)


def through_the_class(module: nn.Module) -> None:
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


class Network(nn.Module):
    """All kinds of operations: an embedding, a recurrent layer, attention, call sites and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(11, 8), nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.product = Product()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.rnn(self.table(ids))[0]
        x = x + self.attention(x, x, x)[0]
        return self.head(self.norm(self.product(x).mean(1)))


class Product(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def network(change) -> nn.Module:
    net = build(Network).eval()
    for child in net.children():
        change(child)
    return net


IDS = [torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("change", [wrap, through_the_class])
def test_a_forward_of_an_instance_computes_with_quantized_tensors(change, tmp_path):
    net = network(change)
    before, expected = Snapshot(net), net(IDS[0])
    calibration = calibrate(net, IDS, "w8a8")
    assert set(calibration.layers) == {
        "table", "rnn", "attention", "attention.attention_1_scores", "attention.attention_1_values",
        "attention.out_proj", "product.matmul_1", "product.matmul_2", "head",
    }  # fmt: skip
    assert idle_quantizers(calibration, IDS[0]) == []
    quantized = net(IDS[0])
    save_packed(net, tmp_path / "packed")
    assert torch.equal(load_packed(network(change), tmp_path / "packed")(IDS[0]), quantized)
    assert torch.equal(load_packed(network(lambda child: None), tmp_path / "packed")(IDS[0]), quantized)
    calibration.prepared.undo()
    assert torch.equal(net(IDS[0]), expected)
    before.assert_unchanged()


def test_the_former_forward_may_be_put_back_after_the_run():
    net = network(wrap)
    calibration = calibrate(net, IDS, "w8a8")
    quantized = net(IDS[0])
    for child in net.children():
        child.forward = child.former
    assert torch.equal(net(IDS[0]), quantized)
    assert idle_quantizers(calibration, IDS[0]) == []


def test_a_batch_norm_with_a_forward_of_its_own_is_not_folded():
    def make():
        net = build(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
        former = net[1].forward
        net[1].forward = lambda x: former(x).relu()
        return net.eval()

    net, x = make(), seeded(0, 32, 8)
    calibration = calibrate(net, [x], "w8a8")
    assert calibration.folded == {}
    assert (net(x) - make()(x)).abs().max() < 0.1
