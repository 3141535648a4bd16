"""Multi-head attention: its projections are one operation, its products two, its output projection a layer."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq import (
    QConfig,
    ReconstructionConfig,
    adaquant,
    calibrate,
    load_packed,
    measure_sensitivity,
    para_normalize,
    prepare,
    save_packed,
    tune_bias,
)
from lightning_ptq.errors import FunctionalOpWarning
from lightning_ptq.network.attention import QuantMultiheadAttention
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")


class Wrapped(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


def made(cls: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(*args, **kwargs).eval()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "widths": {"kdim": 6, "vdim": 10},
    "widths, no bias": {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
    "further keys": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS: dict[str, Any] = {
    "none": lambda: {},
    "padding": lambda: {"key_padding_mask": torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [2]])},
    "boolean": lambda: {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(2)},
    "float 3-d": lambda: {"attn_mask": seeded(5, 3 * 2, 4, 5)},
    "both": lambda: {
        "attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(2),
        "key_padding_mask": torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [2]]),
    },
    "causal": lambda: {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(1), "is_causal": True},
}


def arguments(module: nn.MultiheadAttention) -> list[Tensor]:
    sizes = ((4, module.embed_dim), (5, module.kdim), (5, module.vdim))
    values = [seeded(i, length, 3, width) for i, (length, width) in enumerate(sizes)]
    return [x.transpose(0, 1) for x in values] if module.batch_first else values


@pytest.mark.parametrize(("options", "masks"), list(product(OPTIONS, MASKS)))
def test_it_computes_what_torch_computes(options: str, masks: str) -> None:
    module = made(nn.MultiheadAttention, 8, 2, **OPTIONS[options])
    args, settings = arguments(module), MASKS[masks]()
    calls = [{}, {"need_weights": False}, {"average_attn_weights": False}]
    expected = [module(*args, **settings, **call) for call in calls]
    prepare(Wrapped(module), "w8a8")
    assert isinstance(module, QuantMultiheadAttention)
    for call, (output, weights) in zip(calls, expected, strict=True):
        found, shown = module(*args, **settings, **call)
        torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shown, weights, rtol=1e-5, atol=1e-6)


def test_a_single_sample_without_a_batch_dimension() -> None:
    module, x = made(nn.MultiheadAttention, 8, 2, batch_first=True), seeded(0, 4, 8)
    mask = torch.tensor([False, False, False, True])
    expected = module(x, x, x, key_padding_mask=mask, average_attn_weights=False)
    prepare(Wrapped(module), "w8a8")
    for found, wanted in zip(module(x, x, x, key_padding_mask=mask, average_attn_weights=False), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_dropout_in_training_draws_what_torch_draws() -> None:
    module, x = made(nn.MultiheadAttention, 8, 2, dropout=0.5).train(), seeded(0, 4, 3, 8)
    for options in ({}, {"need_weights": False}):
        expected, float_module = [], copy.deepcopy(module)
        prepared = prepare(Wrapped(module), "w8a8")
        for either in (float_module, module):
            torch.manual_seed(1)
            expected.append(either(x, x, x, **options))
        torch.testing.assert_close(expected[1][0], expected[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(expected[1][1], expected[0][1], rtol=1e-5, atol=1e-6)
        prepared.undo()


class Classifier(nn.Module):
    """Attention with a residual connection and a head."""

    def __init__(self, attention: Any = None) -> None:
        super().__init__()
        self.attention = attention or nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


SAMPLES = [seeded(i, 32, 5, 3) @ seeded(99, 3, 8) for i in range(4)]  # white inputs leave nothing to tune
SITES = ["attention.attention_1_scores", "attention.attention_1_values"]


def test_every_product_has_quantizers_of_its_own() -> None:
    net = made(Classifier)
    calibration = calibrate(net, SAMPLES, QConfig.parse("w4a5", first_last_bits=None))
    assert list(calibration.layers) == ["attention", *SITES, "attention.out_proj", "head"]
    attention, x = net.attention, seeded(9, 2, 5, 8)
    weight = attention.in_proj_weight_fake_quant(attention.in_proj_weight)
    assert attention.in_proj_weight_fake_quant.scale.shape == (24, 1)
    q, k, v = (
        F.linear(attention.get_submodule(f"{name}_fake_quant")(x), w, b).view(2, 5, 2, 4).transpose(1, 2)
        for name, w, b in zip(("query", "key", "value"), weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    )
    scores, values = attention.attention_1_scores, attention.attention_1_values
    logits = scores.left_fake_quant(q) @ scores.right_fake_quant(k.transpose(-2, -1)) * 0.5
    attended = values.left_fake_quant(logits.softmax(-1)) @ values.right_fake_quant(v)
    expected = attention.out_proj(attended.transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(attention(x, x, x)[0], expected)
    torch.testing.assert_close(attention(query=x, key=x, value=x, need_weights=False)[0], expected)
    assert float(values.left_fake_quant.zero_point) == values.left_fake_quant.spec.quant_min  # weights are not negative


def test_operations_layers_leaves_the_products_float() -> None:
    net, other = made(Classifier), made(Classifier)
    calibration = calibrate(net, SAMPLES, QConfig.parse("w4a4", operations="layers"))
    assert list(calibration.layers) == ["attention", "attention.out_proj", "head"]
    found = inspect_module(other, SAMPLES[0], QConfig.parse("w4a4", operations="layers"))
    assert {row.name: row.status for row in found.layers}["attention.attention_1_scores"] == "excluded"
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(SAMPLES[0]), net(SAMPLES[0]))


def test_w8a8_is_close_and_undo_is_exact() -> None:
    net = made(Classifier)
    before, expected = copy.deepcopy(net.state_dict()), net(SAMPLES[0])
    calibration = calibrate(net, SAMPLES, QConfig.parse("w8a8"))
    assert float((net(SAMPLES[0]) - expected).detach().norm() / expected.detach().norm()) < 0.03
    calibration.prepared.undo()
    assert type(net.attention) is nn.MultiheadAttention
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(SAMPLES[0]), expected)


@pytest.mark.parametrize("widths", [{}, {"kdim": 8, "vdim": 8, "add_bias_kv": True}])
def test_all_stages(tmp_path: Any, widths: dict[str, Any]) -> None:
    def build(seed: int) -> Any:
        attention = made(nn.MultiheadAttention, 8, 2, batch_first=True, seed=seed, **widths)
        if widths:  # torch has separate weights for other widths only
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                attention = Mixed()
        return made(Classifier, attention, seed=seed)

    net = build(0)
    calibration = calibrate(net, SAMPLES, QConfig.parse("w4a8", first_last_bits=None))
    rises = measure_sensitivity(calibration, ["w8a8", "w3a3"], measure="mse").rises
    assert all(rises[name]["w3a3"] > 0 for name in calibration.layers)
    names = net.attention.weight_names
    before = {name: net.attention.weights[name].detach().clone() for name in names}
    out = net.attention.out_proj.weight.detach().clone()
    config = ReconstructionConfig(steps=80, batch_size=32)
    result = adaquant(calibration, granularity="layer", config=config)
    assert [unit.name for unit in result.units] == ["attention", "head"]
    assert result.units[0].accepted
    assert result.units[0].error_after < result.units[0].error_before
    assert not any(torch.equal(before[name], net.attention.weights[name]) for name in names)
    assert not torch.equal(out, net.attention.out_proj.weight)
    assert para_normalize(calibration, measure="mse", every_layer=True).skipped["attention"]
    tune_bias(calibration, steps=2, measure="mse")
    expected = net(SAMPLES[0])
    save_packed(net, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(build(1), tmp_path / "net.safetensors")(SAMPLES[0]), expected)
    other = build(2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(SAMPLES[0]), expected)
    assert torch.equal(copy.deepcopy(net)(SAMPLES[0]), expected)
    if not widths:
        assert torch.equal(pickle.loads(pickle.dumps(net))(SAMPLES[0]), expected)


class Mixed(nn.MultiheadAttention):
    """A forward of its own, with other arguments, and keys and values of another width."""

    def __init__(self) -> None:
        super().__init__(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x: Tensor, *_: Any) -> Any:  # type: ignore[override]
        return super().forward(x, x[..., :6], value=x[..., 2:], need_weights=False)


def test_a_derived_class_with_a_forward_of_its_own() -> None:
    net = made(Classifier, made(Mixed))
    expected = net(SAMPLES[0])
    calibration = calibrate(net, SAMPLES, "w8a8")
    assert {key for key in calibration.observers if key[0] == "attention"} == {
        ("attention", name) for name in ("query", "key", "value")
    }
    assert calibration.trace.calls[SITES[0]] == 1
    assert list(net.attention.weight_quantizers) == ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert 0 < float((net(SAMPLES[0]) - expected).detach().norm() / expected.detach().norm()) < 0.03


class Twice(nn.MultiheadAttention):
    """Calls the forward of torch twice."""

    def forward(self, x: Tensor, *_: Any) -> Any:  # type: ignore[override]
        once, _ = super().forward(x, x, x)
        return super().forward(once, x, x)


def test_a_derived_class_that_attends_twice() -> None:
    net = made(Classifier, made(Twice, 8, 2, batch_first=True))
    calibration = calibrate(net, SAMPLES, "w8a8")
    assert list(calibration.layers) == ["attention", *SITES, "attention.out_proj", "head"]


class Direct(nn.MultiheadAttention):
    """Multiplies without torch's function of attention."""

    def forward(self, x: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return (self.out_proj((q @ k.transpose(-1, -2)).softmax(-1) @ v),)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnreachedLayerWarning")
def test_a_derived_class_with_products_of_its_own_stays_float() -> None:
    net = made(Classifier, made(Direct, 8, 2, batch_first=True))
    with pytest.warns(FunctionalOpWarning, match="inputs are not known, so they stay float: attention"):
        calibration = calibrate(net, SAMPLES, "w8a8")
    assert list(calibration.layers) == ["attention.out_proj", "head"]
    assert calibration.trace.calls["attention.out_proj"] == 1


def test_it_can_be_compiled_and_exported() -> None:
    net = made(Classifier)
    calibrate(net, SAMPLES, "w8a8")
    with torch.no_grad():
        expected = net(SAMPLES[0])
        assert torch.equal(torch.compile(net, backend="eager")(SAMPLES[0]), expected)
        assert torch.equal(torch.export.export(net, (SAMPLES[0],), strict=False).module()(SAMPLES[0]), expected)


class Nets:
    """Networks with attention of torch, and their batches."""

    @staticmethod
    def transformer() -> tuple[nn.Module, Any]:
        net = made(nn.Transformer, 8, 2, 1, 1, 16, batch_first=True)
        return net, {"src": seeded(0, 4, 6, 8), "tgt": seeded(1, 4, 5, 8)}

    @staticmethod
    def encoder() -> tuple[nn.Module, Any]:
        layer = made(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)
        mask = torch.arange(6).expand(4, 6) >= torch.tensor([[6], [4], [3], [6]])
        return made(nn.TransformerEncoder, layer, 2), {"src": seeded(0, 4, 6, 8), "src_key_padding_mask": mask}

    @staticmethod
    def decoder() -> tuple[nn.Module, Any]:
        net = made(nn.TransformerDecoderLayer, 8, 2, 16)
        causal = nn.Transformer.generate_square_subsequent_mask(6)
        batch = {"tgt": seeded(0, 6, 4, 8), "memory": seeded(1, 5, 4, 8), "tgt_mask": causal, "tgt_is_causal": True}
        return net, batch

    @staticmethod
    def vit() -> tuple[nn.Module, Any]:
        from torchvision.models import VisionTransformer

        net = made(VisionTransformer, 16, 8, 2, 2, 16, 32, num_classes=4)
        nn.init.ones_(net.heads.head.weight[:, ::2].detach())  # torchvision starts with zeros
        return net, seeded(0, 2, 3, 16, 16)


@pytest.mark.parametrize("name", ["transformer", "encoder", "decoder", "vit"])
def test_networks_are_covered_and_keep_their_output(name: str) -> None:
    net, batch = getattr(Nets, name)()

    def forward(module: nn.Module, given: Any) -> Any:
        return module(**given) if isinstance(given, dict) else module(given)

    with torch.no_grad():
        expected = unchanged = forward(net, batch)
        found = inspect_module(net, batch, "w8a8", forward=forward)
        assert found.covered >= 0.99, [(row.name, row.status, row.macs) for row in found.layers]
        assert sum(row.macs for row in found.layers) <= found.macs * 1.0001
        assert torch.equal(forward(net, batch), expected)
        calibration = calibrate(net, [batch], "w8a8", forward=forward)
        result = forward(net, batch)
        if name == "encoder":  # torch's fused path gives zeros for padding
            result, expected = (x[~batch["src_key_padding_mask"]] for x in (result, expected))
        assert 0 < float((result - expected).norm() / expected.norm()) < 0.1
        calibration.prepared.undo()
        assert torch.equal(forward(net, batch), unchanged)
