from __future__ import annotations

import io
import json
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ResNet, Snapshot, Transformer, build, rng_state, seeded, token_batches
from models import Zoo, randomize_norms
from rich.console import Console
from torch import Tensor, nn

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate, errors, save_packed
from lightning_ptq.allocation.costs import multiply_accumulates
from lightning_ptq.calibration.forward import default_forward
from lightning_ptq.calibration.layer_costs import count_macs, count_work, macs_below
from lightning_ptq.calibration.operator_macs import _FORMULAS
from lightning_ptq.errors import CalibrationError, PTQWarning, QConfigError, SurgeryError
from lightning_ptq.export.packed import packed_tensors
from lightning_ptq.report.inspect_module import inspect_module

quiet = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")
IMAGES = seeded(0, 8, 2, 6, 6)


class Mixed(nn.Module):
    """A folded norm, a norm between two ReLUs, a grouped layer, an excluded one, a product without a layer, a spare."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)  # 4 x 2 x 9 weights, 36 positions
        self.norm = nn.BatchNorm2d(4)
        self.late_norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)  # 4 x 2 weights, 36 positions
        self.gate = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4, 5))
        self.spare = nn.Linear(4, 4)
        self.spare_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.late_norm(F.relu(self.norm(self.conv(x)))))).mean((2, 3))
        return self.head((x * self.gate(x).sigmoid()) @ self.table)


MACS = {"conv": 2592, "grouped": 288, "gate": 16, "head": 15, "spare": 0}
PRODUCT = 20  # the row of 4 by the table of 4 x 5
ALL = sum(MACS.values()) + PRODUCT
QCONFIG = QConfig.parse("w4a6", exclude=["gate"], operations="layers")
PRODUCTS = QConfig.parse("w4a6", exclude=["gate"])


def mixed(qconfig=QCONFIG):
    return inspect_module(build(Mixed), IMAGES, qconfig)


def test_the_layers_their_widths_and_their_work():
    found = {layer.name: layer for layer in mixed().layers}
    assert list(found) == ["conv", "grouped", "gate", "head", "spare"]
    assert {name: layer.macs for name, layer in found.items()} == MACS
    assert [layer.widths for layer in found.values()] == ["w8a8", "w4a6", "float", "w8a8", "float"]
    assert [layer.status for layer in found.values()] == [
        "quantized", "quantized", "excluded", "quantized", "never called",
    ]  # fmt: skip
    assert [layer.place for layer in found.values()] == ["first", "", "", "last", ""]
    assert [layer.parameters for layer in found.values()] == [4 * 18 + 4, 4 * 2 + 4, 20, 18, 20]
    assert (found["grouped"].kind, found["grouped"].shape) == ("Conv2d", (4, 2, 1, 1))
    assert [layer.norm for layer in found.values()] == ["norm", "", "", "", ""]


def test_the_share_of_the_work_that_is_quantized():
    found = mixed()
    assert found.macs == ALL
    assert found.covered == pytest.approx((2592 + 288 + 15) / ALL)
    bits = 2592 * 64 + 288 * 24 + 15 * 64
    assert found.bops == pytest.approx(bits / (32 * 32 * (2592 + 288 + 15)))


def test_norms_that_are_folded_and_why_others_are_not():
    found = mixed()
    assert found.folded == {"norm": "conv"}
    assert found.unfolded == {
        "late_norm": "it does not directly follow a layer that runs once",
        "spare_norm": "it was never called",
    }


def test_products_outside_any_layer():
    (product,) = mixed().products
    assert (product.module, product.operators, product.macs) == ("", ("mm",), PRODUCT)


def test_a_product_with_a_parameter_is_among_the_layers():
    found = mixed(PRODUCTS)
    layers = {layer.name: layer for layer in found.layers}
    table, product = layers.pop("table_weight_1"), layers.pop("linear_1")
    assert (table.kind, table.shape, table.parameters, table.macs) == ("Parameter", (4, 5), 20, 0)
    assert (product.kind, product.shape, product.parameters, product.macs) == ("linear", (), 0, PRODUCT)
    assert (table.widths, table.status, product.widths, product.status) == ("w4a6", "quantized", "w4a6", "quantized")
    assert [*layers.values()] == mixed().layers  # the others are as they were
    assert not found.products
    assert found.macs == ALL
    assert found.covered == pytest.approx((2592 + 288 + 15 + PRODUCT) / ALL)
    bits = 2592 * 64 + 288 * 24 + 15 * 64 + PRODUCT * 6 * 4
    float_bits = 32 * 32 * (2592 + 288 + 15 + PRODUCT)
    assert found.bops == pytest.approx(bits / float_bits)
    assert found.covered_parameters == pytest.approx((72 + 8 + 15 + 20) / 190)
    tables = {table.key: table for table in found.tables()}
    assert "products" not in tables
    assert {row[0]: row[1:3] for row in tables["widths"].rows} == {
        "w8a8": (2, 2607), "w4a6": (3, 288 + PRODUCT), "float": (2, 16),
    }  # fmt: skip
    assert sorted(warning.category for warning in found.warnings) == [
        "UnfoldedBatchNormWarning", "UnreachedLayerWarning",
    ]  # fmt: skip
    # 20 weights of 32 bits become 20 of 4 bits, and a scale for each of the 5 columns.
    assert mixed().packed_bytes - found.packed_bytes == 20 * 4 - (20 // 2 + 5 * 4)


def test_a_bilinear_layer_is_counted():
    net = nn.Sequential(nn.Linear(4, 4), Twofold(nn.Bilinear(4, 4, 3)), nn.Linear(3, 2))
    found = inspect_module(net, seeded(0, 8, 4))
    # Each of the three outputs is a sum over 4 x 4 pairs of features.
    assert [(layer.kind, layer.shape, layer.macs) for layer in found.layers] == [
        ("Linear", (4, 4), 16), ("Bilinear", (3, 4, 4), 48), ("Linear", (2, 3), 6),
    ]  # fmt: skip
    assert (found.products, found.covered, found.macs) == ([], 1, 70)


class Twofold(nn.Module):
    """Gives a layer its input twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def test_a_product_that_torch_has_no_formula_for():
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.weight)

    class Nearest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both, self.last = nn.Linear(4, 4), Distances(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.both(self.first(x)))

    found = inspect_module(build(Nearest), seeded(0, 8, 4))
    assert [(product.module, product.macs) for product in found.products] == [("both", None)]
    assert found.macs == 16 + 8
    assert "100.0% of those that torch can count" in str(found.tables()[0].rows)
    assert "no formula" in next(table for table in found.tables() if table.key == "products").note


def test_fused_attention_is_counted_in_its_parts():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.attention(x, x, x, need_weights=False)[0]

    found = inspect_module(build(Attending), seeded(0, 8, 3, 4))
    # Queries, keys and values of three tokens; two products of 3 x 3 x 4; the projection.
    assert {row.name.rpartition(".")[2]: row.macs for row in found.layers} == {
        "first": 48, "attention": 144, "attention_1_scores": 36, "attention_1_values": 36, "out_proj": 48,
    }  # fmt: skip
    assert not found.products
    assert found.covered == 1
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    """A recurrent layer and a classifier of its last output."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(8, 16, batch_first=True, **options)
        self.head = nn.Linear(16 * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_are_counted(kind, gates, options, mode):
    steps, directions = 10, 2 if options else 1
    inputs = [8, 16 * directions] if options else [8]
    expected = steps * directions * gates * 16 * sum(size + 16 for size in inputs)
    net, x = build(lambda: Recurrent(kind, **options)), seeded(0, 4, steps, 8)
    with mode():
        assert macs_below(count_macs(net, lambda: net.eval()(x)), "layer") == 4 * expected
        found = inspect_module(net, x)
    assert {row.name: row.macs for row in found.layers} == {"layer": expected, "head": 16 * directions * 4}
    assert not found.products
    assert found.covered == 1
    assert not found.uncounted


def test_recurrent_layers_on_packed_sequences_and_cells_are_counted():
    packed = nn.utils.rnn.pack_sequence([seeded(0, 5, 8), seeded(1, 3, 8)])
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        layer, cell = kind(8, 16), getattr(nn, f"{kind.__name__}Cell")(8, 16)
        with torch.no_grad():
            assert count_macs(layer, lambda layer=layer: layer(packed)) == {"": 8 * gates * 16 * (8 + 16)}
            assert count_macs(cell, lambda cell=cell: cell(seeded(0, 3, 8))) == {"": 3 * gates * 16 * (8 + 16)}


class Experts(nn.Module):
    """A router and experts whose weights are one tensor each, as in recent mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 32) / 4), nn.Parameter(torch.randn(4, 32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, 5, dtype=torch.int32) * (len(x) // 4)
        hidden = torch._grouped_mm(self.first(x), self.up, offs=ends).relu()
        return self.last(torch._grouped_mm(hidden, self.down, offs=ends))


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped products")
def test_grouped_products_are_counted():
    net, x = build(Experts), seeded(0, 16, 16)
    try:
        net(x)
    except RuntimeError:
        pytest.skip("this torch has grouped products for GPUs only")
    parameters = 256 + 16 + 64 + 4 + 2 * 2048
    found = inspect_module(net, x, QConfig.parse("w4a4", operations="layers"))
    assert [(product.operators, product.macs) for product in found.products] == [(("_grouped_mm",), 2 * 16 * 32)]
    assert found.covered == pytest.approx((256 + 64) / (256 + 64 + 1024))
    assert found.covered_parameters == pytest.approx((256 + 64) / parameters)
    found = inspect_module(net, x)
    assert [(layer.name, layer.shape, layer.parameters, layer.macs) for layer in found.layers] == [
        ("first", (16, 16), 272, 256), ("up_weight_2", (4, 16, 32), 2048, 0), ("linear_1", (), 0, 512),
        ("down_weight_2", (4, 32, 16), 2048, 0), ("linear_2", (), 0, 512), ("last", (4, 16), 68, 64),
    ]  # fmt: skip
    assert (found.products, found.covered) == ([], 1)
    assert found.covered_parameters == pytest.approx((parameters - 16 - 4) / parameters)  # biases stay float


@pytest.mark.parametrize(
    ("x", "y", "macs"),
    [
        ((8, 4), (2, 4, 3), 8 * 4 * 3),
        ((2, 5, 4), (2, 4, 3), 2 * 5 * 4 * 3),
        ((2, 5, 4), (4, 6), 5 * 4 * 6),
        ((5, 8), (8, 6), 5 * 8 * 6),
    ],
)
def test_the_formula_of_grouped_products(x, y, macs):
    assert _FORMULAS["aten::_grouped_mm"](torch.empty(x), torch.empty(y), out=None) == macs


def test_attention_with_fewer_heads_of_keys_is_counted():
    query, key = seeded(0, 2, 8, 5, 4), seeded(1, 2, 2, 7, 4)
    counted = count_macs(nn.Module(), lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True))
    assert counted == {"": 2 * 2 * 8 * 5 * 7 * 4}


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.irfft(torch.fft.rfft(self.first(x)), n=8)
        return self.last(F.normalize(x).softmax(-1) @ torch.eye(8))


def test_what_has_no_formula_is_in_a_line_of_its_own():
    found = inspect_module(build(Spectral), seeded(0, 8, 8), QConfig.parse("w4a4", operations="layers"))
    assert [(product.operators, product.macs) for product in found.products] == [
        (("mm",), 64), (("_fft_c2r", "_fft_r2c"), None),
    ]  # fmt: skip
    overview = dict(found.tables()[0].rows)
    assert overview["operators not counted"] == "_fft_c2r, _fft_r2c"
    assert overview["share in quantized layers"] == "55.6% of those that torch can count"
    assert "operators not counted" not in dict(mixed().tables()[0].rows)
    found = inspect_module(build(Spectral), seeded(0, 8, 8))
    assert [(product.operators, product.macs) for product in found.products] == [(("_fft_c2r", "_fft_r2c"), None)]
    assert [(layer.name, layer.kind, layer.macs) for layer in found.layers] == [
        ("first", "Linear", 64), ("matmul_1", "matmul", 64), ("last", "Linear", 16),
    ]  # fmt: skip
    assert dict(found.tables()[0].rows)["share in quantized layers"] == "100.0% of those that torch can count"


def test_operators_of_other_packages_are_named_if_their_inputs_are_large():
    @torch.library.custom_op("ptq_tests::scan", mutates_args=())
    def scan(x: Tensor) -> Tensor:
        return x.cumsum(-1)

    for rows, uncounted in ((8, {}), (256, {"": {"ptq_tests::scan"}})):
        assert count_work(nn.Module(), lambda rows=rows: scan(torch.ones(rows, 8))).uncounted == uncounted


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(100, 8), nn.Embedding(50, 8)
        self.first, self.norm, self.last = nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.again = self.users

    def forward(self, pairs: Tensor) -> Tensor:
        x = torch.cat([self.users(pairs[:, 0]), self.items(pairs[:, 1])], 1)
        return self.last(self.norm(self.first(x)).relu())


def test_parameters_that_stay_float_are_stated():
    found = inspect_module(build(Recommender), torch.randint(50, (8, 2)), QConfig.parse("w4a4", operations="layers"))
    total, quantized = 800 + 400 + 68 + 8 + 5, 64 + 4
    assert found.covered == 1
    assert found.parameters == total
    assert found.covered_parameters == pytest.approx(quantized / total)
    assert [(row.module, row.kind, row.parameters) for row in found.float_parameters] == [
        ("users", "Embedding", 800), ("items", "Embedding", 400), ("norm", "BatchNorm1d", 8), ("first", "Linear", 4),
        ("last", "Linear", 1),
    ]  # fmt: skip
    overview = dict(found.tables()[0].rows)
    assert overview["share of the parameters that is quantized"] == f"{100 * quantized / total:.1f}%"
    assert overview["float parameters are in"] == (
        "users (Embedding, 62.5%), items (Embedding, 31.2%), norm (BatchNorm1d, 0.6%), and 2 other modules"
    )
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["covered_parameters"] == found.covered_parameters
    assert facts["float_parameters"][0] == {"module": "users", "kind": "Embedding", "parameters": 800}


def test_a_small_share_is_not_rounded_to_nothing():
    net = build(lambda: nn.Sequential(nn.Embedding(4000, 8), nn.Linear(8, 1)))
    rows = inspect_module(net, torch.arange(8), QConfig.parse("w4a4", operations="layers")).tables()[0].rows
    (share,) = [value for name, value in rows if "parameters that" in name]
    assert share == "0.025%"


class Expanded(nn.Module):
    """Gives a module a parameter that was expanded, as learned queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.first = nn.Parameter(torch.randn(1, 3, 8)), nn.Linear(8, 8)
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(self.query.expand(len(x), -1, -1)), x, x)[0])


def test_a_module_that_gets_an_expanded_parameter():
    found = inspect_module(build(Expanded), seeded(0, 4, 5, 8))
    assert {layer.name.rpartition(".")[2]: layer.macs for layer in found.layers} == {
        "first": 192, "attention": 3 * 64 + 2 * 5 * 64, "attention_1_scores": 3 * 5 * 8,
        "attention_1_values": 3 * 5 * 8, "out_proj": 3 * 64, "last": 48,
    }  # fmt: skip
    assert not found.products


class Marked(Tensor):
    """A tensor subclass, as images that know their format are."""


def test_tensors_of_other_classes_are_counted():
    net, x = build(Mixed), IMAGES.as_subclass(Marked)
    assert inspect_module(net, x, QCONFIG).macs == ALL
    found = count_macs(net, lambda: net.eval()(x))
    assert {name: macs / 8 for name, macs in found.items()} == {k: v for k, v in MACS.items() if v} | {"": PRODUCT}


class ModeLinear(nn.Linear):
    mode = "fan_in"


def test_a_layer_that_cannot_be_swapped():
    net = nn.Sequential(nn.Linear(4, 8), ModeLinear(8, 8), nn.Linear(8, 2))
    found = inspect_module(net, seeded(0, 8, 4), QConfig.parse("w4a4", operations="layers"))
    status = {layer.name: (layer.kind, layer.status, layer.macs) for layer in found.layers}
    assert status["1"] == ("ModeLinear", "not supported", 64)
    assert [warning.category for warning in found.warnings] == ["UnsupportedLayerWarning", "FunctionalOpWarning"]
    assert found.products == []  # it is among the layers already
    assert found.covered == pytest.approx((32 + 16) / (32 + 64 + 16))


def test_the_warnings_are_collected_and_neither_printed_nor_raised():
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        found = mixed()
    assert not [warning for warning in printed if issubclass(warning.category, PTQWarning)]
    by_category = {warning.category: warning for warning in found.warnings}
    assert sorted(by_category) == ["FunctionalOpWarning", "UnfoldedBatchNormWarning", "UnreachedLayerWarning"]
    assert "spare" in by_category["UnreachedLayerWarning"].message
    assert all(warning.remedy == getattr(errors, warning.category).remedy for warning in found.warnings)


@quiet
def test_the_sizes_are_those_of_the_file(tmp_path):
    found, net = mixed(), build(Mixed)
    in_float = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    calibrate(net, [IMAGES], QCONFIG)
    tensors = packed_tensors(net)[0].values()
    assert found.float_bytes == in_float
    assert found.packed_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.packed_bytes < save_packed(net, tmp_path / "net.safetensors")


@quiet
@pytest.mark.parametrize("make", [lambda: randomize_norms(Zoo()), lambda: Transformer(8)])
def test_torch_counts_what_the_shapes_say(make):
    net = build(make)
    batch = seeded(1, 4, 3, 8, 8) if isinstance(net, Zoo) else token_batches(1)[0]
    size = 4 if isinstance(net, Zoo) else 8
    counted = count_macs(net, lambda: default_forward(net.eval(), batch))
    modules = {name for name, _ in net.named_modules()}
    expected: dict[str, float] = {}
    for name, macs in multiply_accumulates(calibrate(net, [batch], "w8a8")).items():
        place = name if name in modules else name.rpartition(".")[0]  # a call site's products are those of its module
        expected[place] = expected.get(place, 0.0) + macs
    assert {name: counted.get(name, 0.0) / size for name in expected} == pytest.approx(expected)
    assert sum(counted.values()) / size == pytest.approx(sum(expected.values()))  # there is nothing else
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in build(make).modules())


def test_the_count_tells_modules_from_what_is_around_them():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))
    counted = count_macs(net, lambda: net[1](net[0](torch.ones(3, 4))) @ torch.ones(2, 5))
    assert counted == {"0": 48, "1.0": 24, "": 30}
    assert (macs_below(counted, "1"), macs_below(counted, "")) == (24, 102)


def test_the_units_and_their_steps():
    found = inspect_module(build(ResNet), IMAGES, "w4a4", samples=1024)
    assert [(unit.name, unit.steps, unit.widths) for unit in found.units] == [
        ("stem", 40, ("w8a8",)),
        ("blocks.0", 100, ("w4a4",)),
        ("blocks.1", 100, ("w4a4",)),
        ("head", 40, ("w8a8",)),
    ]
    fewer = inspect_module(build(ResNet), IMAGES, "w3a3", samples=256, granularity="layer")
    assert [unit.steps for unit in fewer.units] == [40, 100, 100, 100, 100, 40]


NETS = {
    "resnet": lambda: (build(ResNet), seeded(1, 40, 2, 6, 6).split(8)),
    "transformer": lambda: (build(lambda: Transformer(16)), token_batches(5)),
}
IMAGE_BYTES = 40 * 6 * 36 * 4  # output of a convolution of the ResNet, all samples
TOKEN_BYTES, MASK_BYTES, SCORE_BYTES = 40 * 5 * 16 * 4, 40 * 5, 40 * 5 * 5 * 4
# What is held at the worst unit. The estimate is at the capture of the second of two equal shards: two streams and the
# inputs of its half, these inputs once more while they are concatenated, and what the other half holds. The peak is
# measured on shards of three and two batches.
HELD = [
    # blocks.1.conv2: each stream keeps the outputs of the stem, blocks.0.conv2 and blocks.1.conv1. Peak: without the
    # last, but with the unit's inputs, its targets, and its quantized outputs for three batches.
    ("resnet", "layer", "products", (7 / 2 + 1 / 2 + 6 / 2) * IMAGE_BYTES, (4 + 1 + 1 + 3 / 5) * IMAGE_BYTES),
    # blocks.0 and blocks.1: the same, but each stream keeps one output, and none after the unit.
    ("resnet", "block", "products", (3 / 2 + 1 / 2 + 2 / 2) * IMAGE_BYTES, (1 + 1 + 3 / 5) * IMAGE_BYTES),
    # layers.1.down: each stream keeps three residuals and the output of `up`, which is as large as two of them and is
    # the input. Peak: the same with the inputs of three batches.
    ("transformer", "layer", "layers", (12 / 2 + 2 / 2 + 10 / 2) * TOKEN_BYTES, (10 + 3 / 5 * 2) * TOKEN_BYTES),
    # layers.1.attention's scores: each stream keeps two residuals and queries, keys and values, of which the first two
    # are the inputs; the values are needed later. Estimate: the outputs, too, are held by both halves. Peak: the second
    # shard's queries while they are concatenated, with the inputs and outputs of both shards.
    (
        "transformer",
        "layer",
        "products",
        (12 / 2 + 2 / 2 + 12 / 2) * TOKEN_BYTES + SCORE_BYTES,
        (10 + 2 + 2 / 5) * TOKEN_BYTES + SCORE_BYTES,
    ),
    # layers.0 and layers.1: as in the ResNet, and the mask is an input too.
    (
        "transformer",
        "block",
        "products",
        3 * TOKEN_BYTES + 3 / 2 * MASK_BYTES,
        (1 + 1 + 3 / 5) * TOKEN_BYTES + MASK_BYTES,
    ),
]


@quiet
@pytest.mark.parametrize(("name", "granularity", "operations", "estimate", "peak"), HELD)
def test_one_batch_tells_what_tuning_on_all_will_hold(name, granularity, operations, estimate, peak):
    net, batches = NETS[name]()
    config, qconfig = ReconstructionConfig(steps=2, batch_size=8), QConfig.parse("w3a4", operations=operations)
    found = inspect_module(net, batches[0], qconfig, samples=40, granularity=granularity, config=config)
    result = adaquant(calibrate(net, batches, qconfig), granularity=granularity, config=config)
    assert (found.plan.most, result.peak_activation_bytes) == (round(estimate), round(peak))


def test_a_disk_that_is_too_small_is_a_hazard(monkeypatch):
    monkeypatch.setattr("lightning_ptq.activations.memory_plan.disk_room", lambda: 0)
    found = inspect_module(build(ResNet), IMAGES, memory_limit=100)
    assert found.plan is None
    assert [hazard.category for hazard in found.hazards] == ["memory"]
    assert "memory_limit" in found.hazards[0].message
    assert "does not fit" in str(found.tables()[0].rows)


def in_train_mode_with_gradients(net):
    net.train()
    next(net.children()).eval()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(net.parameters()).requires_grad_(False)
    return net


@pytest.mark.parametrize("make", [Mixed, ResNet])
def test_the_module_is_as_it_was(make):
    net = in_train_mode_with_gradients(build(make))
    before, rng = Snapshot(net), rng_state()
    gradients = [parameter.grad for parameter in net.parameters()]
    inspect_module(net, IMAGES)
    before.assert_unchanged()
    assert rng_state() == rng
    assert all(p.grad is grad and bool((grad == 1).all()) for p, grad in zip(net.parameters(), gradients, strict=True))


class Restless(nn.Module):
    """Its forward changes whatever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))
        self.teacher = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.seen, self.calls, self.plain = [], 0, torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.total = self.total + x.sum()
        self.teacher.add_(1)
        self.plain += 1
        self.seen.append(x)
        self.calls += 1
        self.new = x
        self.net[1].train()
        torch.rand(1), random.random(), np.random.rand()
        return self.net(x)


def test_what_a_forward_changes_is_put_back():
    net = build(Restless)
    objects = {"seen": net.seen, "plain": net.plain, "count": net.count, "total": net.total}
    before, rng = Snapshot(net), rng_state()
    inspect_module(net, seeded(0, 8, 4))
    before.assert_unchanged()
    assert rng_state() == rng
    assert all(getattr(net, name) is value for name, value in objects.items())
    assert (net.seen, net.calls, net.plain.tolist(), net.teacher.tolist()) == ([], 0, [0, 0], [0, 0, 0])
    assert "new" not in vars(net)


@pytest.mark.parametrize("calls", range(6))
def test_an_exception_in_any_forward_leaves_no_trace(calls):
    net, left = in_train_mode_with_gradients(build(Mixed)), [calls]

    def forward(module, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyError("mine")
        return module(batch)

    before, rng = Snapshot(net), rng_state()
    with pytest.raises(KeyError, match="mine"):
        inspect_module(net, IMAGES, forward=forward)
    before.assert_unchanged()
    assert rng_state() == rng


@pytest.mark.parametrize(
    ("make", "batch", "options", "error", "message"),
    [
        (Mixed, IMAGES * torch.nan, {}, CalibrationError, "NaN or an infinity in the input of layer 'conv'"),
        (nn.ReLU, IMAGES, {}, SurgeryError, "nothing to quantize"),
        (Mixed, IMAGES, {"qconfig": QConfig.parse("w4", exclude=["body"])}, QConfigError, "no layer matches 'body'"),
        (Mixed, IMAGES, {"samples": 0}, CalibrationError, "samples must be 1 or more, got 0"),
        (Mixed, IMAGES, {"granularity": "net"}, QConfigError, "granularity must be"),
        (lambda: nn.LazyLinear(3), seeded(0, 8, 4), {}, SurgeryError, "lazy"),
    ],
)
def test_what_cannot_be_looked_at_is_the_librarys_own_error(make, batch, options, error, message):
    net = make()
    kinds = [type(child) for child in net.modules()]
    with pytest.raises(error, match=message):
        inspect_module(net, batch, **options)
    assert [type(child) for child in net.modules()] == kinds


def test_the_tables_show_it_and_the_dictionary_is_json():
    found = mixed()
    tables = {table.key: table for table in found.tables()}
    assert list(tables) == ["overview", "warnings", "widths", "products", "norms", "units", "layers"]
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.rows)
    widths = {row[0]: row[1:] for row in tables["widths"].rows}
    assert widths == {
        "w8a8": (2, 2607, round(100 * 2607 / ALL, 2)),
        "w4a6": (1, 288, round(100 * 288 / ALL, 2)),
        "float": (2, 16, round(100 * 16 / ALL, 2)),
        "float, outside any layer": (None, 20, round(100 * 20 / ALL, 2)),
    }
    overview = dict(tables["overview"].rows)
    assert overview["layers quantized"] == "3 of 5"
    assert overview["batch norms folded"] == "1 of 3"
    facts = json.loads(json.dumps(found.to_dict()))
    assert (facts["macs"], facts["covered"], facts["layers"][0]["shape"]) == (ALL, found.covered, [4, 2, 3, 3])


def test_sizes_are_shown_with_a_unit():
    (size,) = [value for name, value in inspect_module(build(ResNet), IMAGES).tables()[0].rows if name == "size"]
    weights = {"stem": 2 * 6 * 9, "block": 4 * 6 * 6 * 9, "head": 6 * 4}
    biases = 6 + 4
    norms = 5 * (4 * 4 * 6 + 8)  # four vectors, and a counter of 8 bytes
    assert 4 * (sum(weights.values()) + biases) + norms == 6_272
    scales = 6 + 4 * 6 + 4
    packed = weights["stem"] + weights["block"] // 2 + weights["head"] + 4 * scales
    assert packed + 4 * (biases + 4 * 6) == 1_052  # each convolution gets a bias from its norm
    assert size == "6.3 kB in float, 1.1 kB packed"


def test_the_former_name_of_the_tables_still_works():
    found = mixed()
    assert found.sheets() == found.tables()


def test_it_is_printed_with_the_overview_last():
    console = Console(record=True, width=160, file=io.StringIO())
    mixed().print(console)
    text = console.export_text()
    assert text.index("late_norm") < text.index("Preflight: Mixed on cpu")
    assert f"{100 * (2592 + 288 + 15) / ALL:.1f}%" in text
