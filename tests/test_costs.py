from __future__ import annotations

import math

import pytest
import torch
from helpers import ResNet, build, seeded
from models import Zoo, randomize_norms
from safetensors.torch import load_file
from torch import nn

from lightning_ptq import (
    Candidates,
    LayerQConfig,
    QConfig,
    QuantSpec,
    SensitivityTable,
    allocate_bits,
    apply_allocation,
    bops_cost,
    calibrate,
    save_packed,
    size_cost,
    table_cost,
)
from lightning_ptq.allocation.costs import multiply_accumulates
from lightning_ptq.allocation.frontier import sweep
from lightning_ptq.errors import AllocationError
from lightning_ptq.export import packed
from lightning_ptq.numerics.fake_quantize import FakeQuantize

IMAGES = [seeded(1, 10, 2, 6, 6), seeded(2, 6, 2, 6, 6)]
CANDIDATES = ["w8a8", "w4a8", "w3a4", "w4"]


def calibration_of(net=ResNet, images=IMAGES):
    return calibrate(build(net).eval(), images, QConfig.parse("w8a8", first_last_bits=None))


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_size_is_that_of_the_packed_tensors(tmp_path, candidate):
    float_bytes = sum(t.numel() * t.element_size() for t in build(ResNet).state_dict().values())
    calibration = calibration_of()
    choices = Candidates(calibration, CANDIDATES)
    cost = size_cost(calibration, choices)
    choice = {**choices.uniform(candidate), "head": "w8a8"}
    apply_allocation(calibration, choice)
    save_packed(calibration.module, tmp_path / "packed.safetensors")
    tensors = load_file(tmp_path / "packed.safetensors")
    assert cost.total(choice) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert cost.of_float == float_bytes
    assert cost.limit(0.5) == float_bytes / 2


NETS = {
    "resnet": (ResNet, IMAGES, ["blocks.0.*"]),
    "zoo": (Zoo, [seeded(3, 12, 3, 8, 8)], ["hidden", "up", "block.*"]),
}
WEIGHTS = {
    "per channel": (QuantSpec(per_channel=True), ["w8a8", "w4a8", "w3a4", "w4"]),
    "per channel, affine": (QuantSpec(symmetric=False, per_channel=True), ["w8a8", "w4a8", "w3a4"]),
    "per tensor": (QuantSpec(), ["w8a8", "w3a4"]),
    "per tensor, affine": (QuantSpec(symmetric=False), ["w8a8", "w3a4"]),
    "per group": (QuantSpec(per_channel=True), ["w4g32a8", "w3g8a8", "w4a8"]),
    "per group, affine": (QuantSpec(symmetric=False, group_size=8), ["w4g32a8", "w3g8"]),
}


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnfoldedBatchNormWarning")
@pytest.mark.parametrize("excluding", [False, True], ids=["all layers", "some excluded"])
@pytest.mark.parametrize(("spec", "candidates"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("name", NETS)
def test_size_is_counted_without_packing(name, spec, candidates, excluding, monkeypatch):
    make, batches, exclude = NETS[name]
    default = LayerQConfig(spec, QuantSpec(8, symmetric=False))
    qconfig = QConfig(default, exclude=tuple(exclude) if excluding else (), first_last_bits=None)
    calibration = calibrate(randomize_norms(build(make)), batches, qconfig)
    assert calibration.folded
    choices = Candidates(calibration, candidates)
    with monkeypatch.context() as patch:
        patch.setattr(FakeQuantize, "integers", lambda *args: pytest.fail("a weight was quantized"))
        patch.setattr(packed, "pack_bits", lambda *args: pytest.fail("a weight was packed"))
        cost = size_cost(calibration, choices)
    mixed = {layer: list(row)[i % len(row)] for i, (layer, row) in enumerate(choices.by_layer.items())}
    for choice in (mixed, *map(choices.uniform, candidates)):
        apply_allocation(calibration, choice)
        tensors, _ = packed.packed_tensors(calibration.module)
        assert cost.total(choice) == sum(t.numel() * t.element_size() for t in tensors.values())


class Several(nn.Module):
    """A layer that runs twice, a grouped and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.line = nn.Linear(6, 6)

    def forward(self, x):
        return self.line(self.line(self.up(self.grouped(x)).mean((2, 3))))


def test_multiply_accumulates_are_counted_by_hand():
    calibration = calibration_of(Several, [seeded(3, 5, 4, 7, 7)])
    found = multiply_accumulates(calibration)
    expected = {"grouped": 49 * 4 * (2 * 9), "up": 49 * 4 * 6 * 4, "line": 2 * 36}
    assert found == expected
    cost = bops_cost(calibration, Candidates(calibration, CANDIDATES))
    assert cost.values["up"] == {"w8a8": 64 * expected["up"], "w4a8": 32 * expected["up"],
                                 "w3a4": 12 * expected["up"], "w4": 4 * 32 * expected["up"]}  # fmt: skip
    assert cost.of_float == 1024 * sum(expected.values())


def test_a_table_is_read_from_a_mapping_or_a_csv_file(tmp_path):
    choices = Candidates(calibration_of(), ["w8a8", "w4a4"])
    rows = {name: {"w8a8": 2.0, "w4a4": 0.5, "w2a2": 0.1} for name in choices.by_layer}
    path = tmp_path / "latency.csv"
    path.write_text("layer,w8a8,w4a4,w2a2\n" + "".join(f"{name},2.0,0.5,\n" for name in rows))
    expected = {name: {"w8a8": 2.0, "w4a4": 0.5} for name in rows}
    for source in (rows, path, str(path)):
        cost = table_cost("latency", source, choices)
        assert (cost.values, cost.fixed, cost.of_float, cost.limit(0.7)) == (expected, 0.0, None, 0.7)


def test_tables_that_do_not_fit_are_refused(tmp_path):
    choices = Candidates(calibration_of(), ["w8a8", "w4a4"])
    rows = {name: {"w8a8": 2.0, "w4a4": 0.5} for name in choices.by_layer}
    cases = [
        ({n: r for n, r in rows.items() if n != "stem"}, "latency table has no layer 'stem'. Its layers: blocks"),
        ({**rows, "stem": {"w8a8": 1.0}}, r"no \['w4a4'\] for layer 'stem', only \['w8a8'\]"),
        ({**rows, "stem": {"w8a8": math.nan, "w4a4": 1.0}}, "has nan for layer 'stem' at w8a8"),
        ({**rows, "stem": {"w8a8": -1.0, "w4a4": 1.0}}, "has -1.0 for layer 'stem' at w8a8"),
        ({**rows, "stem": {"w8a8": "fast", "w4a4": 1.0}}, "has 'fast' for layer 'stem' at w8a8"),
        ({**rows, "stem": {"w8a8": None, "w4a4": 1.0}}, "has None for layer 'stem' at w8a8"),
        ({"stem": 5}, "must be a CSV file or a dictionary"),
        (5, "must be a CSV file or a dictionary"),
    ]
    for table, message in cases:
        with pytest.raises(AllocationError, match=message):
            table_cost("latency", table, choices)
    (tmp_path / "a.csv").write_text("name,w8a8\nstem,1\n")
    with pytest.raises(AllocationError, match="One must be 'layer'"):
        table_cost("latency", tmp_path / "a.csv", choices)
    (tmp_path / "b.csv").write_text("layer,w8a8\nstem,fast\n")
    with pytest.raises(AllocationError, match=r"not a number.*fast"):
        table_cost("latency", tmp_path / "b.csv", choices)
    (tmp_path / "c.csv").write_bytes(b"layer,w8a8\nstem,\xff\n")
    with pytest.raises(AllocationError, match=r"not a number"):
        table_cost("latency", tmp_path / "c.csv", choices)
    (tmp_path / "d.csv").write_text("layer,w8a8\nstem,1,2,3\n")
    with pytest.raises(AllocationError, match=r"not a number"):
        table_cost("latency", tmp_path / "d.csv", choices)
    with pytest.raises(FileNotFoundError):
        table_cost("latency", tmp_path / "none.csv", choices)


def test_an_infinite_cost_in_a_table_forbids_a_candidate(tmp_path):
    choices = Candidates(calibration_of(), ["w8a8", "w4a4"])
    path = tmp_path / "latency.csv"
    first = next(iter(choices.by_layer))
    rows = {name: {"w8a8": 2.0, "w4a4": 0.5} for name in choices.by_layer} | {first: {"w8a8": 2.0, "w4a4": math.inf}}
    path.write_text("layer,w8a8,w4a4\n" + "".join(f"{name},2.0,{row['w4a4']}\n" for name, row in rows.items()))
    rises = {name: {"w8a8": 0.0, "w4a4": 1.0} for name in rows}
    for source in (rows, path):
        cost = table_cost("latency", source, choices)
        assert allocate_bits(rises, cost, max_degradation=100.0).choice == {
            name: "w8a8" if name == first else "w4a4" for name in rows
        }
        points = sweep(SensitivityTable("kl", dict.fromkeys(rows, "w8a8"), 0.0, rises), [cost], "latency").points
        assert {point.allocation.choice[first] for point in points} == {"w8a8"}


def test_tied_and_shared_tensors_count_once():
    def net():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = model[0].weight
        return model

    with pytest.warns(match="share"):
        calibration = calibrate(net(), [torch.randn(8, 4)], "w8a8")
    assert calibration.prepared.float_bytes == 4 * 4 * 4
