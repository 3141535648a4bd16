"""Kinds of layers beside convolutions and linear layers: embeddings, computed weights, Conv1D, bilinear layers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import build, relative_error, seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from lightning_ptq import (
    Candidates,
    QConfig,
    ReconstructionConfig,
    adaquant,
    apply_allocation,
    calibrate,
    load_packed,
    measure_sensitivity,
    para_normalize,
    prepare,
    save_packed,
    size_cost,
    tune_bias,
)
from lightning_ptq.errors import BakedWeightWarning, PTQWarning, UnreachedLayerWarning
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.units import find_units
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::lightning_ptq.errors.{name}")
    for name in ("RolledBackWarning", "TiedWeightWarning", "BakedWeightWarning")
]
STEPS = ReconstructionConfig(steps=40, batch_size=16)


def old_weight_norm(layer: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, name)


class Conv1D(nn.Module):
    """The layer of GPT-2 as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.3), nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Decoder(nn.Module):
    """A block of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.c_attn, self.c_proj = nn.LayerNorm(16), Conv1D(48, 16), Conv1D(16, 16)
        self.up, self.down = Conv1D(32, 16), Conv1D(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        attention = F.scaled_dot_product_attention(*self.c_attn(self.norm(x)).chunk(3, -1), is_causal=True)
        x = x + self.c_proj(attention)
        return x + self.down(F.gelu(self.up(x)))


class Language(nn.Module):
    """A decoder whose head has the weight of the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 16), nn.Embedding(8, 16)
        self.blocks, self.norm = nn.ModuleList([Decoder(), Decoder()]), nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(30, 8, mode="sum", sparse=True, padding_idx=0)
        self.item = nn.Embedding(20, 8, padding_idx=0, sparse=True)
        self.top = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, history: Tensor, rating: Tensor, item: Tensor) -> Tensor:
        return self.top(torch.cat([self.history(history, per_sample_weights=rating), self.item(item)], -1))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.bilinear = nn.Linear(6, 6), nn.Bilinear(6, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(self.first(x), input2=x[..., :5])


class Double(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def audio(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    up = norm(nn.ConvTranspose1d(8, 4, 3))
    return nn.Sequential(norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), up, nn.Flatten(), norm(nn.Linear(40, 3)))


def discriminator(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    first, second = norm(nn.Conv2d(3, 8, 3, 2, 1)), norm(nn.Conv2d(8, 8, 3, 2, 1))
    return nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), nn.Flatten(), norm(nn.Linear(32, 2)))


def mlp(change: Callable[[nn.Module], Any]) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    change(net[0])
    return net


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "bias", Double())


def whole(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def interaction(seed: int) -> dict[str, Tensor]:
    return {"history": whole(seed, 30, 16, 5), "rating": seeded(seed, 16, 5).abs(), "item": whole(seed, 20, 16)}


IMAGES, SOUNDS, ROWS = (3, 8, 8), (4, 10), (8,)
NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "conv1d": (Language, lambda seed: whole(seed, 50, 16, 8)),
    "embedding bag": (Recommender, interaction),
    "bilinear": (Pair, (6,)),
    "transpose3d": (
        lambda: nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, groups=2)),
        (2, 3, 3, 3),
    ),
    "weight norm": (lambda: audio(weight_norm), SOUNDS),
    "old weight norm": (lambda: audio(old_weight_norm), SOUNDS),
    "spectral norm": (lambda: discriminator(spectral_norm), IMAGES),
    "old spectral norm": (lambda: discriminator(old_spectral_norm), IMAGES),
    "orthogonal": (lambda: mlp(orthogonal), ROWS),
    "pruned": (lambda: mlp(lambda layer: prune.l1_unstructured(layer, "weight", 0.3)), ROWS),
    "own, of the bias": (
        lambda: mlp(doubled),
        ROWS,
    ),
}


def make(kind: str, seed: int = 0) -> nn.Module:
    """The net after two forwards in train mode, which change the estimates of spectral norm."""
    net = build(NETS[kind][0], seed).train()
    for index in range(2):
        call(net, samples(kind, index))
    return net.eval()


def samples(kind: str, seed: int) -> Any:
    batch = NETS[kind][1]
    return seeded(seed, 16, *batch) if isinstance(batch, tuple) else batch(seed)


def call(net: nn.Module, x: Any) -> Tensor:
    return net(**x) if isinstance(x, dict) else net(x)


@pytest.mark.parametrize("kind", NETS)
def test_all_of_it_is_quantized_and_close_to_float(kind: str) -> None:
    net, x = make(kind), samples(kind, 0)
    expected, state = call(net, x).detach(), copy.deepcopy(net.state_dict())
    found = inspect_module(net, x, "w4a8")
    assert found.covered >= 0.99
    assert {layer.status for layer in found.layers} == {"quantized"}
    assert not [row.module for row in found.float_parameters if "parametrizations" in row.module]
    assert found.covered_parameters > 0.75
    assert torch.equal(call(net, x), expected)
    calibration = calibrate(net, [x], "w8a8")
    assert relative_error(call(net, x), expected) < 0.04
    calibration.prepared.undo()
    assert torch.equal(call(net, x), expected)
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    call(net.train(), x).square().mean().backward()


@pytest.mark.parametrize("kind", NETS)
def test_it_is_tuned_copied_and_reloaded(kind: str, tmp_path: Any) -> None:
    net, batches = make(kind), [samples(kind, seed) for seed in range(3)]
    x = batches[0]
    expected = call(net, x).detach()
    calibration = calibrate(net, batches, QConfig.parse("w4a8", first_last_bits=None))
    before = relative_error(call(net, x), expected)
    adaquant(calibration, config=STEPS)
    assert relative_error(call(net, x), expected) < 1.2 * before
    for step in (para_normalize, tune_bias):
        step(calibration, measure="mse")
    quantized = call(net, x).detach()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(call(other, x), quantized)
    save_packed(net, tmp_path / "net.safetensors")
    loaded = load_packed(make(kind, 1), tmp_path / "net.safetensors")
    assert torch.equal(call(loaded, x), quantized)
    fresh, prepared = make(kind, 2), make(kind, 3)
    prepare(prepared, "w8a8")
    for other in (fresh, prepared):
        other.load_state_dict(net.state_dict())
        assert torch.equal(call(other, x), quantized)
    assert torch.equal(call(net.train().eval(), x), quantized)  # nothing is computed again
    calibration.prepared.undo()
    assert torch.equal(call(net, x), expected)


# Embeddings.


def test_each_row_of_a_table_has_a_scale_and_padding_stays_zero() -> None:
    net, x = make("embedding bag"), interaction(0)
    bag, item = net.history, net.item
    weights = {"history": bag.weight, "item": item.weight}
    calibrate(net, [x], QConfig.parse("w3a8", first_last_bits=None))
    assert bag.weight_fake_quant.scale.shape == (30, 1)
    assert torch.equal(item(torch.zeros(1, dtype=torch.long)), torch.zeros(1, 8))
    grid = bag.weight_fake_quant(weights["history"])
    wanted = F.embedding_bag(x["history"], grid, mode="sum", per_sample_weights=x["rating"], padding_idx=0)
    torch.testing.assert_close(bag(x["history"], per_sample_weights=x["rating"]), wanted)
    assert "mode='sum'" in repr(bag)
    assert "'quantized'" not in repr(bag)
    call(net, x).sum().backward()  # the quantizer takes no sparse gradients
    assert not item.weight.grad.is_sparse


def test_tables_stay_float_where_only_layers_are_wanted() -> None:
    net, x = make("embedding bag"), interaction(0)
    layers = QConfig.parse("w4a8", operations="layers")
    found = inspect_module(net, x, layers)
    assert [layer.name for layer in found.layers] == ["top.0", "top.2"]
    assert found.warnings == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", PTQWarning)
        calibration = calibrate(net, [x], layers)
    assert type(net.item) is nn.Embedding
    other = make("embedding bag", 1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(call(other, x), call(net, x))
    assert not other.item.is_quantized
    assert list(calibration.layers) == ["top.0", "top.2"]


def test_a_table_takes_no_place_at_the_edges_and_no_time_of_tuning() -> None:
    net, batches = make("embedding bag"), [interaction(seed) for seed in range(2)]
    calibration = calibrate(net, batches, "w4a4")
    assert calibration.edges == ("top.0", "top.2")
    assert str(calibration.layers["item"].qconfig) == "w4a4"
    assert [unit.is_lookup for unit in find_units(net, calibration.trace, "layer")] == [True, True, False, False]
    assert [row.name for row in adaquant(calibration, granularity="layer", config=STEPS).units] == ["top.0", "top.2"]
    assert [unit.name for unit in inspect_module(make("embedding bag"), batches[0], granularity="layer").units] == [
        "top.0", "top.2",
    ]  # fmt: skip


def test_the_allocator_chooses_the_width_of_tables() -> None:
    net, batches = make("embedding bag"), [interaction(seed) for seed in range(2)]
    calibration = calibrate(net, batches, QConfig.parse("w8a8", first_last_bits=None))
    result = adaquant(calibration, mode="parallel", candidates=["w8a8", "w4a8"], config=STEPS)
    table = measure_sensitivity(calibration, ["w8a8", "w4a8"], measure="mse", states=result.states)
    assert table.rises["history"]["w4a8"] > table.rises["history"]["w8a8"] == 0
    sizes, choices = size_cost(calibration, Candidates(calibration, ["w8a8", "w4a8"])).values, {"history": "w4a8"}
    assert sizes["history"] == {"w8a8": 30 * 8 + 30 * 4, "w4a8": 30 * 4 + 30 * 4}
    apply_allocation(calibration, {**dict.fromkeys(calibration.layers, "w8a8"), **choices}, result.states)
    assert str(net.history.qconfig) == "w4a8"


def test_a_net_of_tables_alone() -> None:
    net = build(lambda: nn.Sequential(nn.Embedding(10, 4)))
    calibration = calibrate(net, [whole(0, 10, 8)], "w4a8")
    assert adaquant(calibration, config=STEPS).units == []
    assert str(net[0].qconfig) == "w4a8"


def test_a_table_that_is_read_as_a_tensor_stays_float_without_a_warning() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.head = nn.Embedding(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.queries.weight.sum(0))

    net = build(Queries)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreachedLayerWarning)
        assert list(calibrate(net, [seeded(0, 8, 8)], "w4a8").layers) == ["head"]


def test_a_head_that_has_the_weight_of_the_embedding_has_the_same_grid() -> None:
    net = make("conv1d")
    calibrate(net, [samples("conv1d", 0)], QConfig.parse("w4a8", first_last_bits=None))
    assert net.head.weight is net.tokens.weight
    assert torch.equal(net.head.weight_fake_quant.scale, net.tokens.weight_fake_quant.scale)


# Computed weights.


@pytest.mark.parametrize("kind", ["weight norm", "old weight norm", "spectral norm", "old spectral norm", "pruned"])
def test_a_computed_weight_becomes_a_parameter_and_is_named(kind: str) -> None:
    net, x = make(kind), samples(kind, 0)
    layer, expected = net[0], call(net, x).detach()
    hook = layer.register_forward_pre_hook(lambda module, args: None)
    names = [name for name, child in net.named_children() if next(child.parameters(), None) is not None]
    baked = ["0"] if kind == "pruned" else names
    with pytest.warns(BakedWeightWarning, match=rf"^{', '.join(baked)}: the weight is computed") as caught:
        prepared = prepare(net, "w8a8")
    assert len(caught) == 1
    assert list(prepared.layers) == names
    assert set(layer._parameters) == {"weight", "bias"}
    torch.testing.assert_close(call(net, x), expected)
    assert "Parametrized" not in repr(net)
    user = layer.register_forward_pre_hook(lambda module, args: None)
    prepared.undo()
    assert torch.equal(call(net, x), expected)
    for handle in (hook, user):  # handles of before and of meanwhile
        assert handle.id in layer._forward_pre_hooks
        handle.remove()
        assert handle.id not in layer._forward_pre_hooks


@pytest.mark.parametrize("kind", ["weight norm", "old weight norm", "spectral norm", "old spectral norm", "pruned"])
def test_a_prepared_net_loads_what_the_float_one_saved(kind: str) -> None:
    other, net = make(kind, 1), make(kind)
    x = samples(kind, 0)
    expected = call(other, x).detach()
    prepared = prepare(net, "w8a8")
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(call(net, x), expected)
    prepared.undo()
    assert torch.equal(call(net, x), expected)


def test_a_state_dict_of_the_old_weight_norm_loads_into_a_net_of_the_new_one() -> None:
    old, net = make("old weight norm", 1), make("weight norm")
    expected = call(old, samples("weight norm", 0)).detach()
    prepare(net, "w8a8")
    net.load_state_dict(old.state_dict())
    torch.testing.assert_close(call(net, samples("weight norm", 0)), expected)


def test_undo_follows_a_computed_weight_to_another_dtype() -> None:
    for kind in ("weight norm", "old spectral norm"):
        net, x = make(kind), samples(kind, 0)
        expected = call(net, x).detach()
        calibration = calibrate(net, [x], "w4a8")
        net.double()
        calibration.prepared.undo()
        assert {t.dtype for t in (*net.parameters(), *net.buffers())} == {torch.float64}
        torch.testing.assert_close(call(net, x.double()), expected.double(), rtol=1e-4, atol=1e-5)


def test_undo_keeps_train_mode_where_it_is() -> None:
    net, x = make("spectral norm").train(), samples("spectral norm", 0)
    prepared = prepare(net, "w8a8")
    net.eval()
    prepared.undo()
    assert not any(child.training for child in net.modules())
    assert torch.equal(net(x), net(x))


def test_layers_that_compute_their_weights_from_the_same_tensors() -> None:
    net = build(lambda: nn.Sequential(old_weight_norm(nn.Linear(8, 8)), nn.ReLU(), old_weight_norm(nn.Linear(8, 8))))
    net[2].weight_v = net[0].weight_v
    expected = net(seeded(0, 16, 8)).detach()
    calibration = calibrate(net, [seeded(0, 16, 8)], "w4a8")
    adaquant(calibration, config=STEPS)
    calibration.prepared.undo()
    assert net[2].weight_v is net[0].weight_v
    assert torch.equal(net(seeded(0, 16, 8)), expected)


def test_a_computed_table_and_an_excluded_layer() -> None:
    def net() -> nn.Module:
        return nn.Sequential(spectral_norm(nn.Embedding(10, 8)), weight_norm(nn.Linear(8, 8)), nn.Linear(8, 2))

    x, quantized = whole(0, 10, 16), build(net).eval()
    calibrate(quantized, [x], QConfig.parse("w4a8", exclude=["1"]))
    other = build(net, 1).eval()
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))
    assert quantized[0].is_quantized
    assert not quantized[1].is_quantized


# Layers of other packages, by name.


def test_a_class_that_only_has_the_name_is_no_layer() -> None:
    def odd(name: str, *bases: type) -> Any:
        return type(name, bases, {})

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    net = nn.Sequential(odd("Conv1D", Wrapper)(), odd("Conv1D", nn.Conv1d)(2, 2, 1), odd("CausalConv1D", Wrapper)())
    with warnings.catch_warnings():
        warnings.simplefilter("error", PTQWarning)
        layers = prepare(net, "w4").layers
    assert list(layers) == ["0.inner", "1", "2.inner"]
    assert all(isinstance(layer, nn.Conv1d) for layer in layers.values())


def test_a_bilinear_layer_is_counted_and_corrected_by_channel() -> None:
    net, x = make("bilinear"), samples("bilinear", 0)
    found = {layer.name: layer.macs for layer in inspect_module(net, x, "w4a8").layers}
    assert found == {"first": 36, "bilinear": 4 * 6 * 5}
    calibration = calibrate(net, [x], QConfig.parse("w2a8", first_last_bits=None))
    layer: QuantizedOp = net.bilinear
    assert set(layer.input_quantizers) == {"input1", "input2"}
    assert layer.weight_fake_quant.scale.shape == (4, 1, 1)
    assert "bilinear" in para_normalize(calibration, measure="mse", held_out=0.0).layers
