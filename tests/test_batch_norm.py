"""Folding of batch norms that are more than one, lie behind views or before their layers, or are frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from lightning_ptq import (
    QConfig,
    ReconstructionConfig,
    adaquant,
    calibrate,
    load_packed,
    prepare,
    reestimate_batch_norm,
    save_packed,
)
from lightning_ptq.errors import UnfoldedBatchNormWarning
from lightning_ptq.network.batch_norm import FoldableBatchNorm, fold_batch_norms, folded_norms
from lightning_ptq.network.trace import trace


def randomized(net: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for child in net.modules():
            if hasattr(child, "running_mean"):
                for name, low, high in (("running_mean", -1, 1), ("running_var", 0.3, 2), ("weight", 0.3, 2)):
                    nn.init.uniform_(getattr(child, name), low, high)
                nn.init.uniform_(child.bias, -1, 1)
    return net.eval()


def fold(net: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Prepare, fold by the traces of the forwards on all inputs, and compare the outputs."""
    with torch.no_grad():
        expected = [net(x) for x in inputs]
        prepare(net, "w8a8")
        folded = fold_batch_norms(net, [trace(net, lambda x=x: net(x)) for x in inputs], lambda: net(inputs[0]))
        for x, output in zip(inputs, expected, strict=True):
            torch.testing.assert_close(net(x), output, rtol=1e-4, atol=1e-4)
    return folded


class NormAct(nn.BatchNorm2d):
    """The pattern of timm: a batch norm whose own forward also drops out and activates."""

    def __init__(self, channels: int, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("images only")
        normalizes = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, normalizes, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Squashed(nn.BatchNorm2d):
    """Its affine parameters are not those of a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight.tanh(), self.bias)


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 3.0


def test_an_activation_in_a_norm_stays_though_it_does_nothing_on_the_batch() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(2, 4, 1), NormAct(4)))
    with torch.no_grad():
        net[1].bias.fill_(50.0)  # so that the ReLU passes everything on
    x = seeded(0, 4, 2, 5, 5)
    assert fold(net, x) == {"1": "0"}
    far = -100 * seeded(1, 4, 4, 5, 5).abs()
    assert torch.equal(net[1](far), torch.zeros_like(far))
    near = seeded(2, 4, 4, 5, 5)
    assert torch.equal(net[1](near), near.relu())
    net[1].train()
    net[1].drop.eval()
    assert torch.equal(net[1](near), near.relu())  # in train mode it does not normalize either
    with pytest.raises(ValueError, match="images only"):
        net[1](seeded(0, 4, 4))


def test_a_norm_of_another_function_is_not_folded() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(2, 4, 1), Squashed(4)))
    with pytest.warns(UnfoldedBatchNormWarning, match="1: .*Squashed does more, or something else"):
        assert fold(net, seeded(0, 4, 2, 5, 5)) == {}


def test_what_follows_the_normalization_stays() -> None:
    assert fold(randomized(nn.Sequential(nn.Conv2d(2, 4, 1), Shifted(4))), seeded(0, 4, 2, 5, 5)) == {"1": "0"}


class ActivatedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_an_activation_in_a_layer_keeps_the_norm_from_folding() -> None:
    net = randomized(nn.Sequential(ActivatedConv(2, 4, 1), nn.BatchNorm2d(4)))
    with torch.no_grad():
        net[0].bias.fill_(50.0)
    with pytest.warns(UnfoldedBatchNormWarning, match="1: folding it into 0 changes the model's output.*ActivatedConv"):
        assert fold(net, seeded(0, 4, 2, 5, 5)) == {}


class DetrFrozenBatchNorm2d(nn.Module):
    """The class of transformers, with its constant in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, variance, mean = (
            buffer.reshape(1, -1, 1, 1) for buffer in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, DetrFrozenBatchNorm2d])
def test_a_frozen_norm_is_folded_and_saved(norm: Any, tmp_path: Any) -> None:
    def make() -> nn.Module:
        return randomized(nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 1)))

    net, x = make(), seeded(0, 16, 2, 6, 6)
    float_output = net(x)
    calibration = calibrate(net, [x], "w4a8")
    assert calibration.folded == {"1": "0"}
    values = 100 * seeded(1, 2, 4, 3, 3)
    assert torch.equal(net[1](values), values)
    reestimate_batch_norm(calibration, held_out=0)
    expected = net(x)
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(make(), tmp_path / "net.safetensors")(x), expected)
    calibration.prepared.undo()
    assert type(net[1]) is norm
    assert torch.equal(net(x), float_output)


def test_parameters_of_an_activation_in_a_folded_norm_are_saved(tmp_path: Any) -> None:
    def make(slope: float) -> nn.Module:
        net = nn.Sequential(nn.Conv2d(2, 4, 3), NormAct(4, nn.PReLU(init=slope)), nn.Conv2d(4, 3, 1))
        return randomized(net)

    net, x = make(0.7), seeded(0, 16, 2, 6, 6)
    calibration = calibrate(net, [x], "w4a8")
    assert calibration.folded == {"1": "0"}
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(make(0.1), tmp_path / "net.safetensors")(x), net(x))
    twin = make(0.1)
    prepare(twin, "w8a8")
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(twin(x), net(x))


class Tokens(nn.Module):
    """The pattern of LeViT: a norm of flattened tokens, and one behind a transposition that copies."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.other = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = F.hardswish(self.norm(y.flatten(0, 1)).reshape_as(y))
        y = self.second(y)  # 5 x 6 x 6: tokens and channels can be mistaken for each other
        y = y if self.wrong else y.transpose(1, 2).contiguous()
        return self.other(y)


def test_norms_behind_views_and_copies_are_folded() -> None:
    x = seeded(0, 5, 6, 4)
    assert fold(randomized(Tokens()), x) == {"norm": "first", "other": "second"}
    with pytest.warns(UnfoldedBatchNormWarning, match="other: .*its channels are not those of the norm"):
        assert fold(randomized(Tokens(wrong=True)), x) == {"norm": "first"}


class Branches(nn.Module):
    """A norm between an activation and parallel layers."""

    def __init__(self, *layers: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.flat = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), flat
        self.branches = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.relu(self.stem(x)))
        y = y.flatten(1) if self.flat else y
        return torch.cat([branch(y).flatten(1) for branch in self.branches], 1)


AHEAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv": (lambda: Branches(nn.Conv2d(4, 3, 3)), "branches.0"),
    "grouped": (lambda: Branches(nn.Conv2d(4, 6, 3, groups=2, bias=False)), "branches.0"),
    "reflect": (lambda: Branches(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")), "branches.0"),
    "parallel": (lambda: Branches(nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 3, stride=2)), "branches.0, branches.1"),
    "flattened": (lambda: Branches(nn.Linear(64, 3), flat=True), "branches.0"),
}


@pytest.mark.parametrize("name", AHEAD)
def test_a_norm_is_folded_into_the_layers_after_it(name: str) -> None:
    make, layers = AHEAD[name]
    net, x = randomized(make()), seeded(0, 4, 2, 6, 6)
    assert fold(net, x) == {"norm": layers}
    values = seeded(1, 4, 4, 4, 4)
    assert torch.equal(net.norm(values), values)


BLOCKED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding": (lambda: Branches(nn.Conv2d(4, 3, 3, padding=1)), "it pads with zeros"),
    "transposed": (lambda: Branches(nn.ConvTranspose2d(4, 3, 3)), "it pads with zeros"),
    "one of two": (lambda: Branches(nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3, padding=1)), "it pads with zeros"),
    "own class": (lambda: Branches(ActivatedConv(4, 4, 3, padding=1)), "it pads with zeros"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_a_norm_stays_where_the_next_layer_cannot_take_it(name: str) -> None:
    make, reason = BLOCKED[name]
    with pytest.warns(UnfoldedBatchNormWarning, match=f"norm: it does not directly follow .*{reason}"):
        assert fold(randomized(make()), seeded(0, 4, 2, 6, 6)) == {}


def test_zero_padding_does_not_matter_to_a_norm_without_a_shift() -> None:
    for layer in (nn.Conv2d(4, 3, 3, padding=1), nn.ConvTranspose2d(4, 3, 3, bias=False)):
        net = randomized(Branches(layer))
        net.norm.running_mean.zero_()
        nn.init.zeros_(net.norm.bias)
        assert fold(net, seeded(0, 4, 2, 6, 6)) == {"norm": "branches.0"}


def test_a_norm_that_equalizes_the_channels_of_a_quantized_input_stays() -> None:
    net = randomized(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    net[0].running_var.copy_(torch.tensor([1e-4, 1.0, 1e2, 1e4]))
    with pytest.warns(UnfoldedBatchNormWarning, match="0: .*the grid of its quantized input would be .* as coarse"):
        assert fold(net, seeded(0, 64, 4)) == {}


def test_layers_after_a_folded_norm_observe_their_new_inputs(tmp_path: Any) -> None:
    def make() -> nn.Module:
        return randomized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False)))

    net, batches = make(), [seeded(i, 32, 6) for i in range(3)]
    expected = torch.cat([net(x) for x in batches])
    calibration = calibrate(net, batches, QConfig.parse("w8a8", first_last_bits=None))
    assert calibration.folded == {"2": "3"}
    assert net[3].input_fake_quant.zero_point.item() == 0  # its input is that of the norm, so never negative
    assert (torch.cat([net(x) for x in batches]) - expected).abs().max() < 0.03 * expected.abs().max()
    assert reestimate_batch_norm(calibration, held_out=0).layers == ()  # the norm says nothing about the layer's output
    adaquant(calibration, config=ReconstructionConfig(steps=5, batch_size=16))
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(make(), tmp_path / "net.safetensors")(batches[0]), net(batches[0]))
    twin = make()
    prepare(twin, "w8a8")
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(twin(batches[0]), net(batches[0]))
    calibration.prepared.undo()
    assert torch.equal(torch.cat([net(x) for x in batches]), expected)


class Gated(nn.Module):
    """On some batches, something else reads what the norm normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y) if x.sum() > 0 else self.norm(y) + y


def test_all_batches_decide() -> None:
    first, second = seeded(0, 4, 4).abs(), -seeded(1, 4, 4).abs()
    assert fold(randomized(Gated()), first) == {"norm": "layer"}
    with pytest.warns(UnfoldedBatchNormWarning, match="norm: folding it into layer .*aten::add reads its output too"):
        assert fold(randomized(Gated()), first, second) == {}


def test_a_weight_that_is_read_elsewhere_keeps_the_norm_from_folding() -> None:
    class Reused(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self[0].weight.sum()

    net = randomized(Reused(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.warns(UnfoldedBatchNormWarning, match="1: folding it into 0 .*aten::sum reads its parameters"):
        assert fold(net, seeded(0, 4, 4)) == {}


def test_every_norm_of_timms_efficientnet_lite_is_folded() -> None:
    timm = pytest.importorskip("timm")
    net = randomized(timm.create_model("tf_efficientnet_lite0"))
    assert len(fold(net, seeded(0, 1, 3, 64, 64))) == 49
    assert len(folded_norms(net)) == sum(isinstance(child, FoldableBatchNorm) for child in net.modules())
