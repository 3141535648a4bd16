"""Functions that a forward calls: products, sums, functions of a layer's weight, and parameters of a module's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import Snapshot, build, idle_quantizers, relative_error, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq import (
    Candidates,
    QConfig,
    ReconstructionConfig,
    adaquant,
    bops_cost,
    calibrate,
    load_packed,
    measure_sensitivity,
    para_normalize,
    save_packed,
    tune_bias,
)
from lightning_ptq.errors import FunctionalOpWarning, QConfigError
from lightning_ptq.network.call_sites import CallSite
from lightning_ptq.network.functional import attention
from lightning_ptq.network.units import find_units
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")


class Attention(nn.Module):
    """Attention by functions; ``kind`` says by which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.kind == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "einsum":
            scores = torch.einsum("...td,...sd->...ts", q, k) / 8**0.5
            y = torch.einsum("bhts,bhsd->bhtd", scores.softmax(-1), v)
        elif self.kind == "bmm":
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            scores = torch.baddbmm(torch.zeros(1), q, k.mT, beta=0, alpha=8**-0.5)
            y = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 2))
        else:
            y = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1).matmul(v)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention(kind)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(kind), Block(kind)]), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Shared(nn.Module):
    """Functions that get the weights of layers, which are not called themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 24, bias=False), nn.Parameter(torch.randn(24))
        self.conv, self.out = nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = F.linear(x, self.qkv.weight, self.bias).chunk(3, -1)[0]
        y = F.conv1d(q.transpose(1, 2), weight=self.conv.weight, bias=self.conv.bias, padding=1).transpose(1, 2)
        return self.out(y.relu())


class Own(nn.Module):
    """Parameters of the module's own, in two and three dimensions, also as the left operand."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"right": (8, 16), "rows": (12, 16), "experts": (3, 12, 12), "stack": (2, 12, 10), "left": (4, 6)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.3))
        self.kernel = nn.Parameter(torch.randn(10, 10, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.left @ x).relu()
        y = F.linear((x @ self.right).relu(), self.rows, self.bias).relu()
        y = torch.stack([F.linear(y, self.experts[i]) for i in range(3)]).sum(0)
        y = torch.bmm(y.flatten(0, 1)[None].expand(2, -1, -1), self.stack).mean(0).unflatten(0, y.shape[:2])
        return F.conv1d(y.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)


class Headed(nn.Module):
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.bodies, self.head = nn.ModuleList([body]), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bodies[0](x).mean(1))


KINDS = ("operator", "fused", "einsum", "bmm")
NETS = {
    **{kind: (lambda kind=kind: Transformer(kind), 16) for kind in KINDS},
    "weights of layers": (lambda: Headed(Shared(), 4), 8),
    "own parameters": (lambda: Headed(Own(), 10), 8),
}


def data(width: int) -> list[Tensor]:
    return [seeded(i, 16, 6, width) for i in range(4)]


@pytest.mark.parametrize("name", ["operator", "fused", "weights of layers", "own parameters"])
def test_every_product_is_quantized_tuned_saved_and_undone(name, tmp_path):
    make, width = NETS[name]
    net, batches = build(make).eval(), data(width)
    before, expected = Snapshot(net), net(batches[0])
    calibration = calibrate(net, batches, QConfig.parse("w4a8", first_last_bits=None))
    result = adaquant(calibration, config=ReconstructionConfig(steps=30))
    assert any(row.accepted for row in result.units)
    para_normalize(calibration, measure="mse")
    tune_bias(calibration, steps=3, measure="mse")
    quantized = net(batches[0])
    assert relative_error(quantized, expected) < 0.05
    state = copy.deepcopy(net.state_dict())
    save_packed(net, tmp_path / "packed")
    for again in (
        build(make).eval(),
        load_packed(build(make).eval(), tmp_path / "packed"),
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
    ):
        again.load_state_dict(state)
        assert torch.equal(again(batches[0]), quantized)
        with torch.inference_mode():
            assert torch.equal(again(batches[0]), quantized)
    calibration.prepared.undo()
    assert torch.equal(net(batches[0]), expected)
    before.assert_unchanged()


@pytest.mark.parametrize("name", NETS)
def test_every_product_is_counted_and_rounded_to_nearest(name):
    make, width = NETS[name]
    net, batches = build(make).eval(), data(width)
    expected = net(batches[0])
    preflight = inspect_module(net, batches[0], "w4a8")
    assert preflight.covered == pytest.approx(1)
    assert not [finding for finding in preflight.warnings if finding.category == "FunctionalOpWarning"]
    calibration = calibrate(net, batches[:2], "w8a8")
    assert relative_error(net(batches[0]), expected) < 1e-3
    calibration.prepared.undo()
    assert torch.equal(net(batches[0]), expected)


def test_names_are_the_callers_and_the_positions_of_the_calls():
    def sites(kind: str, operations: str) -> list[str]:
        config = QConfig.parse("w8a8", operations=operations)
        layers = calibrate(build(lambda: Transformer(kind)).eval(), data(16), config).layers
        return [name for name in layers if (name.startswith("blocks.0") and name[-1].isdigit()) or "attention_" in name]

    assert "blocks.0.attention.matmul_1" in sites("operator", "products")
    assert "blocks.0.attention.matmul_2" in sites("operator", "products")
    assert "blocks.1.attention.attention_1_scores" in sites("fused", "products")
    assert {"blocks.0.add_1", "blocks.0.add_2"} <= set(sites("operator", "all"))


def test_with_layers_alone_the_products_stay_float_and_are_named():
    config = QConfig.parse("w4a4", operations="layers")
    with pytest.warns(FunctionalOpWarning, match=r"bmm in blocks\.0\.attention"):
        calibration = calibrate(build(lambda: Transformer("operator")).eval(), data(16), config)
    assert all(op.weight_names for op in calibration.layers.values())


def test_sums_products_and_concatenations_are_quantized_if_asked_for():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 3)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            a += x
            return self.head(torch.cat([a * self.gate(x).sigmoid(), b + a], -1))

    net, batches = build(Gated).eval(), [seeded(i, 32, 8) for i in range(2)]
    calibration = calibrate(net, batches, QConfig.parse("w8a4", operations="all", first_last_bits=None))
    assert {"add_1", "mul_1", "add_2", "cat_1"} <= set(calibration.layers)
    joined = calibration.layers["cat_1"]
    assert list(joined.input_quantizers) == ["input"]
    with torch.no_grad():
        assert len(joined(([seeded(9, 64, 2), seeded(8, 64, 2)]), -1).unique()) <= 16
    assert sum(layer.packed_bytes(layer.qconfig.weight) for layer in calibration.layers.values()) > 0


def test_overrides_and_exclusions_name_call_sites():
    config = QConfig.parse("w4a4", overrides={"*.matmul_1": "w8a8"}, exclude=["blocks.1.attention.matmul_2"])
    calibration = calibrate(build(lambda: Transformer("operator")).eval(), data(16), config)
    assert str(calibration.layers["blocks.0.attention.matmul_1"].qconfig) == "w8a8"
    assert str(calibration.layers["blocks.0.attention.matmul_2"].qconfig) == "w4a4"
    assert "blocks.1.attention.matmul_2" not in calibration.layers


@pytest.mark.parametrize("pattern", ["*.matmul_7", "*.einsum_1", "blocks.0.matmul_1", "nonsense"])
def test_a_pattern_that_matches_no_call_is_named_and_the_module_restored(pattern):
    net = build(lambda: Transformer("operator")).eval()
    before = Snapshot(net)
    with pytest.raises(QConfigError, match=r"no layer matches"):
        calibrate(net, data(16), QConfig.parse("w4a4", overrides={pattern: "w8a8"}))
    before.assert_unchanged()


class Loop(nn.Module):
    """A product that runs as often as the first value says, and one that runs always."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(1 + int(x[0, 0, 0] > 0)):
            h = (h @ h.mT).softmax(-1) @ h
        return self.head(h.mean(1))


def test_a_varying_number_of_calls_is_named_and_stays_float():
    batches = [seeded(i, 4, 5, 8).abs() * sign for i, sign in enumerate((1, -1, 1))]
    with pytest.warns(FunctionalOpWarning, match=r"varying number of times.*matmul_1.*matmul_4"):
        calibration = calibrate(build(Loop).eval(), batches, "w4a4")
    assert list(calibration.layers) == ["first", "head"]
    adaquant(calibration, config=ReconstructionConfig(steps=3))


def test_a_call_that_first_happens_in_a_later_batch_is_quantized():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.late, self.head = nn.Linear(8, 8), Attention("operator"), nn.Linear(8, 3)
            self.late.qkv, self.late.out = nn.Linear(8, 48), nn.Linear(16, 8)

        def forward(self, x):
            h = self.first(x)
            return self.head((h + self.late(h) if x.mean() > 0 else h).mean(1))

    batches = [seeded(i, 8, 5, 8) + shift for i, shift in enumerate((-1, 1, 1))]
    calibration = calibrate(build(Late).eval(), batches, "w8a8")
    assert {"late.matmul_1", "late.matmul_2"} <= set(calibration.layers)
    assert calibration.layers["late.matmul_1"].input_quantizers["left"].scale < 1


def test_operands_that_are_no_dense_real_numbers_stay_float():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.register_buffer("sparse", torch.eye(8).to_sparse())

        def forward(self, x):
            h = self.first(x)
            waves = torch.fft.fft(h).real + (torch.complex(h, h) @ torch.complex(h.mT, h)).imag
            counts = torch.ones(8, 8, dtype=torch.long) @ torch.ones(8, 8, dtype=torch.long)
            return self.head(waves + torch.sparse.mm(self.sparse, h) + counts)

    net, x = build(Strange).eval(), seeded(0, 8, 8)
    with pytest.warns(FunctionalOpWarning):
        calibration = calibrate(net, [x], "w8a8")
    assert list(calibration.layers) == ["first", "head"]
    assert relative_error(net(x), build(Strange).eval()(x)) < 1e-2


def test_the_measures_and_costs_have_the_call_sites():
    calibration = calibrate(build(lambda: Transformer("fused")).eval(), data(16), "w8a8")
    table = measure_sensitivity(calibration, ["w8a8", "w4a4"], measure="mse")
    site = "blocks.0.attention.attention_1_values"
    assert table.rises[site]["w4a4"] > table.rises[site]["w8a8"] == 0
    costs = bops_cost(calibration, Candidates(calibration, ["w8a8", "w4a4"]))
    assert costs.values[site]["w8a8"] == 4 * costs.values[site]["w4a4"] > 0


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": seeded(5, 6, 7)}, {"attn_mask": seeded(5, 6, 7) > 0},
    {"attn_mask": torch.ones(6, 7).tril(-2).bool()}, {"enable_gqa": True},
], ids=lambda options: next(iter(options), "plain"))  # fmt: skip
def test_attention_in_two_products_is_torchs(options):
    heads = 1 if "enable_gqa" in options else 2
    query, key, value = seeded(0, 3, 2, 6, 8), seeded(1, 3, heads, 7, 8), seeded(2, 3, heads, 7, 5)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    found = attention(CallSite("attention"), CallSite("attention"), query, key, value, **options)
    torch.testing.assert_close(found, expected)


def test_threads_do_not_share_their_calls():
    from concurrent.futures import ThreadPoolExecutor

    net, batches = build(lambda: Transformer("operator")).eval(), data(16)
    calibrate(net, batches, "w4a4").release()
    with torch.no_grad():
        expected = [net(batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda batch: torch.no_grad()(net)(batch), batches * 8))
    assert all(torch.equal(y, expected[i % 4]) for i, y in enumerate(found))


def test_an_exported_and_a_traced_module_compute_the_same():
    net, x = build(lambda: Transformer("fused")).eval(), data(16)[0]
    calibrate(net, data(16), "w8a8").release()
    with torch.no_grad():
        expected = net(x)
        exported = torch.export.export(net, (x,), strict=False).module()
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)


class InPlace(nn.Module):
    """Sums and products in place, followed by another operator in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        h *= self.gate(x).sigmoid()
        h += x
        return self.head(F.relu(h, inplace=True))


def test_operators_in_place_can_be_differentiated():
    net, batches = build(InPlace).eval(), [seeded(i, 32, 8) for i in range(2)]
    calibration = calibrate(net, batches, QConfig.parse("w4a4", operations="all", first_last_bits=None))
    assert {"mul_1", "add_1"} <= set(calibration.layers)
    assert idle_quantizers(calibration, batches[0]) == []
    tune_bias(calibration, steps=2, measure="mse")
    measure_sensitivity(calibration, ["w8a8", "w4a4"], measure="fisher")


class Mapped(nn.Module):
    """Layers and products inside torch.vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.vmap(lambda row: (row @ row.mT).softmax(-1) @ self.inner(row))(self.first(x)))


def test_what_vmap_computes_stays_float():
    net, batches = build(Mapped).eval(), [seeded(i, 16, 5, 8) for i in range(2)]
    expected = net(batches[0])
    with pytest.warns(FunctionalOpWarning) as caught:
        calibration = calibrate(net, batches, "w8a8")
    told = " ".join(str(warning.message) for warning in caught)
    assert "inputs are not known, so they stay float: inner" in told
    assert "bmm in the module itself" in told
    assert list(calibration.layers) == ["first", "head"]
    assert relative_error(net(batches[0]), expected) < 1e-3


def test_layers_of_complex_weights_and_of_sparse_inputs_stay_float_and_are_named():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.waves, self.sparse = nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 8, bias=False)
            self.head = nn.Linear(8, 3)
            self.register_buffer("mix", torch.eye(16).to_sparse())

        def forward(self, x):
            h = self.waves(x.to(torch.cfloat)).abs() + self.sparse(x.relu().to_sparse())
            return self.head(torch.sparse.mm(self.mix, h))

    net, x = build(Strange).eval(), seeded(0, 16, 8)
    expected = net(x)
    with pytest.warns() as caught:
        calibration = calibrate(net, [x], "w8a8")
    told = " ".join(str(warning.message) for warning in caught)
    assert "waves: its weight is not of real floating-point numbers, so the layer stays float" in told
    assert "inputs are not known, so they stay float: sparse" in told
    assert "_sparse_addmm in the module itself" in told
    assert list(calibration.layers) == ["head"]
    assert relative_error(net(x), expected) < 1e-3


class Gate(nn.Module):
    """A residual connection in a module that no list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Gate(), Gate(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


@pytest.mark.parametrize("operations", ["layers", "products", "all"])
def test_blocks_are_the_same_whatever_is_quantized(operations):
    net, config = build(Gates).eval(), QConfig.parse("w4a4", operations=operations)
    calibration = calibrate(net, [seeded(i, 32, 8) for i in range(2)], config)
    assert ("first.add_1" in calibration.layers) == (operations == "all")
    units = find_units(calibration.module, calibration.trace)
    assert [unit.name for unit in units] == ["first", "second", "head"]


class Chain(nn.Sequential):
    """Adds what its elements compute."""

    def forward(self, x):
        return (x + super().forward(x)) @ self[0].weight.detach() * len(self)


class Dense(nn.ModuleDict):
    """Joins what its elements compute, as DenseNet does."""

    def forward(self, x):
        for name, layer in self.items():
            assert name in self
            x = torch.cat([x, layer(x[..., :8])], -1)
        return x


class Elements(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = x + layer(x) @ self[-1].weight.detach()
        return x


class Children(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.children():
            x = layer(x) + x
        return (x @ x.mT) @ x


def two_layers():
    return [nn.Linear(8, 8), nn.Linear(8, 8)]


CONTAINERS = {
    "sequence": lambda: nn.Sequential(Chain(*two_layers()), nn.Linear(8, 4)),
    "dictionary": lambda: nn.Sequential(Dense(dict(zip("ab", two_layers(), strict=True))), nn.Linear(24, 4)),
    "list": lambda: nn.Sequential(Elements(two_layers()), nn.Linear(8, 4)),
    "children": lambda: nn.Sequential(Children(), nn.Linear(8, 4)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_call_sites_are_no_elements_of_containers(name, tmp_path):
    net, batches = build(CONTAINERS[name]).eval(), [seeded(i, 16, 5, 8) for i in range(2)]
    before, expected, elements = Snapshot(net), net(batches[0]), len(list(net[0].children()))
    calibration = calibrate(net, batches, QConfig.parse("w8a8", operations="all", first_last_bits=None))
    assert len(calibration.layers) > elements + 1
    assert relative_error(net(batches[0]), expected) < 1e-3
    assert idle_quantizers(calibration, batches[0]) == []
    tune_bias(calibration, steps=2, measure="mse")
    quantized = net(batches[0])
    save_packed(net, tmp_path / "packed")
    assert torch.equal(load_packed(build(CONTAINERS[name]).eval(), tmp_path / "packed")(batches[0]), quantized)
    assert torch.equal(pickle.loads(pickle.dumps(net))(batches[0]), quantized)
    calibration.prepared.undo()
    before.assert_unchanged()


class Operators(nn.Module):
    """Products and sums by Python's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = (self.a(x) @ x.mT).softmax(-1) @ self.b(x)
        h += x
        return self.head(h * x + x)


@pytest.mark.parametrize("strict", [False, True])
def test_operators_are_exported_as_they_compute(strict):
    net, batches = nn.Sequential(build(Operators)).eval(), [seeded(i, 16, 5, 8) for i in range(2)]
    calibrate(net, batches, QConfig.parse("w4a3", operations="all", first_last_bits=None)).release()
    with torch.no_grad():
        exported = torch.export.export(net, (batches[0],), strict=strict).module()
        torch.testing.assert_close(exported(batches[0]), net(batches[0]))
