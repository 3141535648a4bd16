"""How calls of functions pass their operands, and where the parameters that they multiply by are."""

from __future__ import annotations

import copy
from fnmatch import fnmatch

import pytest
import torch
from helpers import Snapshot, build, idle_quantizers, relative_error, seeded
from torch import nn
from torch.nn import functional as F

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate, load_packed, prepare, save_packed
from lightning_ptq.errors import CalibrationError, SurgeryError
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")


class Called(nn.Module):
    """A linear layer, then what a function of the module and its output computes."""

    def __init__(self, run, **children) -> None:
        super().__init__()
        self.enter, self.run = nn.Linear(8, 8), run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.run(self, self.enter(x).relu())


class Holder(nn.Module):
    """A parameter that others multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4) * 0.3)

    def forward(self):
        return self.weight


class Times(nn.Module):
    def forward(self, x, weight):
        return x @ weight


class Pool(nn.Module):
    """Attention over all positions by torch's function, on the weights of linear layers, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = x.transpose(0, 1)
        return F.multi_head_attention_forward(
            x[:1], x, x, 8, 2, None, torch.cat([self.q.bias, self.k.bias, self.v.bias]), None, None, False, 0.0,
            self.out.weight, self.out.bias, training=False, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0][0]  # fmt: skip


def parameters(*shapes):
    return nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.3) for shape in shapes])


SITES = {"matmul_1", "matmul_2"}
CASES = {
    "by keyword": (lambda m, h: torch.matmul(input=torch.bmm(h, mat2=h.mT).softmax(-1), other=h), {}, SITES),
    "of linalg": (lambda m, h: torch.linalg.matmul(h.matmul(other=h.mT).softmax(-1), h), {}, SITES),
    "sum by keyword": (
        lambda m, h: torch.zeros(1).baddbmm(batch1=h, batch2=h.mT, beta=0.5, alpha=0.3).softmax(-1), {}, {"baddbmm_1"}
    ),
    "list of parameters": (
        lambda m, h: F.linear(h @ m.list[0], m.list[1]), {"list": lambda: parameters((8, 6), (4, 6))},
        {"list.0_weight_1", "linear_1", "list.1_weight_0", "linear_2"},
    ),
    "dictionary of parameters": (
        lambda m, h: h @ m.named["last"],
        {"named": lambda: nn.ParameterDict({"last": nn.Parameter(torch.randn(8, 4))})},
        {"named.last_weight_1", "linear_1"},
    ),
    "of a child": (lambda m, h: h @ m.child.weight, {"child": Holder}, {"child.weight_weight_1", "linear_1"}),
    "handed out by a child": (lambda m, h: h @ m.child(), {"child": Holder}, {"child.weight_weight_1", "linear_1"}),
    "given to a child": (  # the child cannot know that it is a parameter
        lambda m, h: m.times(h, m.child.weight), {"child": Holder, "times": Times}, {"times.matmul_1"},
    ),
    "sum of products": (
        lambda m, h: torch.einsum("bld,od->blo", h, m.list[0]), {"list": lambda: parameters((4, 8))},
        {"list.0_weight_0", "linear_1"},
    ),
    "experts": (
        lambda m, h: torch.einsum("edo,bld->beo", m.list[0], h), {"list": lambda: parameters((3, 8, 4))},
        {"list.0_weight_2", "linear_1"},
    ),
    "heads": (  # channels in two dimensions: no weight
        lambda m, h: torch.einsum("bld,dho->blho", h, m.list[0]), {"list": lambda: parameters((8, 2, 4))}, {"einsum_1"},
    ),
    "attention": (
        lambda m, h: m.pool(h), {"pool": Pool},
        {"pool.q", "pool.k", "pool.v", "pool.out", "pool.attention_1_scores", "pool.attention_1_values"},
    ),
}  # fmt: skip


def network(name) -> nn.Module:
    run, children, _ = CASES[name]
    return build(lambda: Called(run, **{key: child() for key, child in children.items()})).eval()


@pytest.mark.parametrize("name", CASES)
def test_every_product_is_quantized_tuned_saved_and_undone(name, tmp_path):
    net, batches = network(name), [seeded(i, 16, 5, 8) for i in range(3)]
    before, expected = Snapshot(net), net(batches[0])
    assert inspect_module(net, batches[0], "w4a4").covered == 1
    before.assert_unchanged()
    config = QConfig.parse("w8a8", first_last_bits=None)
    calibration = calibrate(net, batches, config)
    assert set(calibration.layers) == {"enter"} | CASES[name][2]
    assert relative_error(net(batches[0]), expected) < 1e-3
    assert idle_quantizers(calibration, batches[0]) == []
    adaquant(calibration, config=ReconstructionConfig(steps=3, tolerance=0))
    quantized = net(batches[0])
    save_packed(net, tmp_path / "packed")
    assert torch.equal(load_packed(network(name), tmp_path / "packed")(batches[0]), quantized)
    again = network(name)
    prepare(again, config)
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(again(batches[0]), quantized)
    assert torch.equal(copy.deepcopy(net)(batches[0]), quantized)
    calibration.prepared.undo()
    assert torch.equal(net(batches[0]), expected)
    before.assert_unchanged()


class Bare(nn.Module):
    """No layers, only parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 16) * 0.3), nn.Parameter(torch.randn(4, 16) * 0.3)

    def forward(self, x):
        return F.linear((x @ self.first).relu(), self.second)


def test_a_network_of_parameters_alone_is_quantized(tmp_path):
    net, x = build(Bare).eval(), seeded(0, 16, 8)
    before, expected = Snapshot(net), net(x)
    calibration = calibrate(net, [x], "w8a8")
    assert list(calibration.layers) == ["first_weight_1", "linear_1", "second_weight_0", "linear_2"]
    assert relative_error(net(x), expected) < 1e-3
    quantized = net(x)
    save_packed(net, tmp_path / "packed")
    assert torch.equal(load_packed(build(Bare).eval(), tmp_path / "packed")(x), quantized)
    again = build(Bare).eval()
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(again(x), quantized)
    calibration.prepared.undo()
    before.assert_unchanged()
    with pytest.raises(SurgeryError, match="nothing to quantize"):
        calibrate(net, [x], QConfig.parse("w8a8", operations="layers"))


def test_a_layer_that_is_the_whole_network_is_quantized():
    net, x = nn.Linear(8, 4), seeded(0, 16, 8)
    expected = net(x)
    calibration = calibrate(net, [x], "w8a8")
    assert list(calibration.layers) == ["weight_weight_0", "linear_1"]
    assert relative_error(net(x), expected) < 1e-3


def test_a_network_whose_parameters_are_not_multiplied_has_nothing_to_quantize():
    class Added(Bare):
        def forward(self, x):
            return x + self.first[:, 0]

    net = build(Added).eval()
    before = Snapshot(net)
    with pytest.raises(CalibrationError, match="reached no layer"):
        calibrate(net, [seeded(0, 16, 8)], "w8a8")
    before.assert_unchanged()


def test_calls_that_a_later_batch_adds_know_the_parameters_of_earlier_ones():
    def run(m, h):
        for _ in range(1 + int(h.mean() > 0.5)):
            h = (h @ m.square[0]).relu()
        return h

    net = build(lambda: Called(run, square=parameters((8, 8)))).eval()
    batches = [seeded(i, 16, 5, 8) * scale for i, scale in enumerate((0.1, 9))]
    calibration = calibrate(net, batches, "w8a8")
    assert set(calibration.layers) == {"enter", "square.0_weight_1", "linear_1", "linear_2"}


def repeated(m, h):
    for _ in range(12):
        h = (h @ m.square[0] / 8).relu() @ h.mT @ h
    return h


@pytest.mark.parametrize("pattern", ["linear_1", "linear_*", "matmul_12", "*_17"])
def test_overrides_and_exclusions_name_every_site(pattern):
    net = build(lambda: Called(repeated, square=parameters((8, 8)))).eval()
    names = list(calibrate(net, [seeded(0, 4, 5, 8)], "w4a8").layers)
    wanted = [name for name in names if fnmatch(name, pattern)]
    assert wanted
    net = build(lambda: Called(repeated, square=parameters((8, 8)))).eval()
    config = QConfig.parse("w4a8", overrides={pattern: "w8a4"})
    calibration = calibrate(net, [seeded(0, 4, 5, 8)], config)
    assert {name for name, op in calibration.layers.items() if str(op.qconfig) == "w8a4"} == set(wanted)
    net = build(lambda: Called(repeated, square=parameters((8, 8)))).eval()
    calibration = calibrate(net, [seeded(0, 4, 5, 8)], QConfig.parse("w4a8", exclude=[pattern]))
    assert set(calibration.layers) == set(names) - set(wanted)
