"""Units that cannot be tuned as they are, arguments that are no dense tensors, and modules of other types."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from helpers import build, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_ptq import QConfig, adaquant, calibrate
from lightning_ptq.activations.calls import Call, unit_errors
from lightning_ptq.errors import UnitError, UntunableUnitWarning
from lightning_ptq.runtime.structure import flatten, map_tensors, tensors_in

W3 = QConfig.parse("w3a8", first_last_bits=None)
MIX = seeded(3, 2, 8)


def samples(seed, *rows):
    """Samples whose 8 features depend on two factors, so that tuning can gain over rounding to nearest."""
    return seeded(seed, *rows, 2) @ MIX


@dataclass
class Features:
    """What a block takes and returns, with something that is no tensor."""

    maps: list[torch.Tensor]
    sizes: set[int]


class Slots:
    """An object without a dictionary."""

    __slots__ = ("kind", "x")

    def __init__(self, x):
        self.x, self.kind = x, "kept"


class Block(nn.Module):
    """Two layers and a residual connection around what ``wrap`` makes of their output."""

    def __init__(self, wrap=lambda y: y):
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(8, 16), nn.Linear(16, 8), wrap

    def forward(self, x):
        if isinstance(x, Features):
            x = x.maps[0]
        x = getattr(x, "x", x)
        return self.wrap(x + self.b(self.a(x).relu()))


def detached(y):
    return y.detach()


def selected(y):
    """Rows whose first value is above the mean, as in non-maximum suppression: their number depends on the values."""
    return y[y[:, 0] > y[:, 0].mean()]


def as_dataclass(y):
    return Features([y, y * 2], {len(y)})


def as_object(y):
    return Slots(y)


class Net(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.blocks = nn.Sequential(Block(wrap), Block(wrap))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.blocks(x)
        return self.head(getattr(y, "x", None) if isinstance(y, Slots) else y.maps[0] if isinstance(y, Features) else y)


def calibrated(net, batches=4, qconfig=W3, dtype=torch.float32):
    return calibrate(net.eval(), [samples(i, 64).to(dtype) for i in range(batches)], qconfig)


def error(calibration, reference, dtype=torch.float32):
    x = samples(99, 256).to(dtype)
    with torch.no_grad():
        expected = reference(x).double()
        return float(F.mse_loss(calibration.module(x).double(), expected) / expected.square().mean())


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("wrap", [as_dataclass, as_object])
def test_blocks_that_return_objects_are_tuned_as_blocks(wrap):
    net = build(lambda: Net(wrap))
    calibration = calibrated(net)
    result = adaquant(calibration)
    assert [unit.name for unit in result.units] == ["blocks.0", "blocks.1", "head"]
    assert all(unit.accepted and unit.error_after < 0.7 * unit.error_before for unit in result.units[:2])


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_a_block_without_a_gradient_is_tuned_layer_by_layer():
    net = build(lambda: Net(detached))
    reference = copy.deepcopy(net).eval()
    calibration = calibrated(net)
    with pytest.warns(UntunableUnitWarning, match=r"blocks\.0: .*carries no gradient; its layers are tuned one by one"):
        result = adaquant(calibration)
    assert [unit.name for unit in result.units] == ["blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "head"]
    assert all(unit.accepted for unit in result.units[:4])
    assert error(calibration, reference) < 0.7 * error(calibrated(copy.deepcopy(reference)), reference)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_a_block_whose_output_changes_its_shape_ends_no_run():
    calibration = calibrated(build(lambda: Net(selected)))
    with pytest.warns(UntunableUnitWarning, match=r"blocks\.0: its forward or backward pass fails"):
        result = adaquant(calibration)
    assert result.units[-1].name == "head"


class Refusing(nn.Linear):
    """A layer without gradients."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_a_layer_that_cannot_be_tuned_keeps_its_initial_quantization():
    net = build(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Refusing(8, 8), nn.Linear(8, 4)))
    calibration = calibrated(net)
    before = calibration.layers["2"].state()
    with pytest.warns(UntunableUnitWarning, match=r"0-3: .*one by one; 2: its output carries no gradient"):
        result = adaquant(calibration)
    assert [unit.name for unit in result.units] == ["0", "3"]
    after = calibration.layers["2"].state()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Fragile(nn.Module):
    """A block that fails on its second batch when it runs alone, because it reads what another module has set."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if len(x) < 64:
            raise ValueError("too few rows")
        return x + self.b(self.a(x).relu())


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_a_block_that_fails_in_tuning_is_named_and_left_as_it_was():
    net = build(lambda: nn.Sequential(nn.Linear(8, 8), Fragile(), nn.Linear(8, 4)))
    calibration = calibrated(net)
    result = adaquant(calibration)
    assert "1" in [unit.name for unit in result.units]  # tuned on whole calls of 64 rows


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_other_types_are_tuned(dtype):
    net = build(lambda: Net(lambda y: y)).to(dtype)
    reference = copy.deepcopy(net).eval()
    nearest = calibrated(copy.deepcopy(net), dtype=dtype)
    calibration = calibrated(net, dtype=dtype)
    result = adaquant(calibration)
    assert sum(unit.accepted for unit in result.units) >= 2
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}
    assert error(calibration, reference, dtype) < error(nearest, reference, dtype)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnreachedLayerWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_a_transformer_encoder_with_a_padding_mask_is_tuned(nested):
    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = make(), nn.Linear(8, 4)

        def forward(self, batch):
            x, padding = batch["x"], batch["padding"]
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])

    net = build(Classifier).eval()
    padding = torch.arange(6)[None] >= 2 + torch.arange(16)[:, None] % 5
    batches = [{"x": samples(i, 16, 6), "padding": padding} for i in range(4)]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        expected = net(batches[0])
    calibration = calibrate(net, [[batch] for batch in batches], W3)
    before = float(F.mse_loss(calibration.run(0), expected))
    result = adaquant(calibration)
    assert any(unit.accepted for unit in result.units)
    assert float(F.mse_loss(calibration.run(0), expected)) < before
    assert torch.backends.mha.get_fastpath_enabled() is fastpath
    with torch.no_grad():  # as it is used afterwards
        torch.testing.assert_close(net(batches[0]), calibration.run(0), rtol=1e-4, atol=1e-5)


class Packed(nn.Module):
    """A network whose layers take a packed sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(8, 8), PackedBlock(), nn.Linear(8, 4)

    def forward(self, x):
        packed = pack_padded_sequence(self.embed(x), [5] * len(x), batch_first=True)
        return self.head(self.block(packed).data)


class PackedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, packed):
        return packed._replace(data=packed.data + self.b(self.a(packed.data).relu()))


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_packed_sequences_are_arguments_like_others():
    net = build(Packed).eval()
    calibration = calibrate(net, [samples(i, 16, 5) for i in range(4)], W3)
    result = adaquant(calibration)
    assert next(unit for unit in result.units if unit.name == "block").accepted


class Sparse(nn.Module):
    """A graph convolution: a sparse adjacency matrix is an argument of the block."""

    def __init__(self):
        super().__init__()
        self.block, self.head = SparseBlock(), nn.Linear(8, 4)

    def forward(self, batch):
        return self.head(self.block(*batch))


class SparseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, adjacency):
        return x + self.b(torch.sparse.mm(adjacency, self.a(x)).relu())


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FunctionalOpWarning")
def test_sparse_tensors_are_arguments_like_others():
    net = build(Sparse).eval()
    batches = [[(samples(i, 32), (seeded(i, 32, 32) > 1).float().to_sparse())] for i in range(6)]
    result = adaquant(calibrate(net, batches, W3))
    assert next(unit for unit in result.units if unit.name == "block").accepted


def test_structures_are_rebuilt_with_new_objects_and_shared_tensors():
    x = torch.zeros(3)
    value = {"a": Features([x, x], {1, 2}), "b": Slots(x), "c": [Slots(torch.ones(2))], "module": nn.ReLU(), "f": len}
    leaves, structure = flatten(value)
    again = structure.build(leaves)
    assert again["a"] is not value["a"]
    assert again["a"].sizes == {1, 2}
    assert again["a"].sizes is not value["a"].sizes
    assert again["a"].maps[0] is again["a"].maps[1] is again["b"].x
    assert (again["b"].kind, again["module"], again["f"]) == ("kept", value["module"], len)
    assert len(tensors_in(value)) == 2
    assert torch.equal(map_tensors(value, lambda t: t + 1)["c"][0].x, torch.full((2,), 2.0))


def test_structures_of_equal_calls_are_equal():
    calls = [Call.of(((Features([seeded(i, 4, 2)], {3}), 2), {"cache": Slots(seeded(i, 4))})) for i in range(2)]
    assert calls[0].spec.key() == calls[1].spec.key()
    other = Call.of(((Features([seeded(0, 4, 2)], {4}), 2), {"cache": Slots(seeded(0, 4))}))
    assert other.spec.key() != calls[0].spec.key()


def test_what_cannot_be_pickled_stays_whole():
    generator = (i for i in range(3))
    leaves, structure = flatten([generator, Slots(torch.ones(1))])
    again = structure.build(leaves)
    assert again[0] is generator
    assert again[1].x.item() == 1


@pytest.mark.parametrize("error", [ValueError("odd"), StopIteration(), KeyError("x")])
def test_what_a_module_raises_becomes_an_error_of_the_unit(error):
    with pytest.raises(UnitError, match=type(error).__name__), unit_errors():
        raise error
