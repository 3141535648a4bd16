from __future__ import annotations

import csv
import inspect
import json
import re

import numpy as np
import pytest
import torch
from helpers import IMAGES, ResNet, SmallNet, build, seeded
from rich.console import Console
from torch import nn

import lightning_ptq
from lightning_ptq import (
    AdaQuantLayerwise,
    BitAllocator,
    CalibrationCapture,
    QConfig,
    ReconstructionConfig,
    StatsTuning,
    calibrate,
    errors,
)  # fmt: skip
from lightning_ptq.errors import (  # fmt: skip
    PTQWarning,
    ReportWarning,
    RolledBackWarning,
    UnfoldedBatchNormWarning,
    noted_warnings,
    warn,
)
from lightning_ptq.report import ReportTable, Sheet
from lightning_ptq.report.record import of_observer, of_values


def test_the_figures_of_the_summary_add_up(run):
    report, calibration = run
    summary = report.summary()
    layers = calibration.layers
    bits = [layer.qconfig.weight.bits for layer in layers.values()]
    weights = [2 * 6 * 9, *[6 * 6 * 9] * 4, 6 * 4]
    scales = 4 * (6 + 4 * 6 + 4)
    expected = sum(-(-n * b // 8) for n, b in zip(weights, bits, strict=True)) + scales
    assert summary["bits per quantized weight"] == pytest.approx(8 * expected / sum(weights))
    macs = {"stem": 36 * 9 * 2 * 6, "head": 6 * 4}
    assert {row.name: row.macs for row in report.layers if row.name in macs} == macs
    assert summary["float size, bytes"] == sum(
        t.numel() * t.element_size() for t in build(ResNet).state_dict().values()
    )
    assert summary["times smaller"] == summary["float size, bytes"] / summary["packed size, bytes"]
    share = sum(row.macs * int(row.widths[1]) * int(row.widths[3]) for row in report.layers)
    assert summary["bit operations, share of float"] == pytest.approx(share / 1024 / sum(r.macs for r in report.layers))
    assert summary["seconds"] == sum(stage.seconds for stage in report.stages)
    assert [stage.name for stage in report.stages] == ["Calibration", "Bit allocation", "AdaQuant"]
    assert summary["calibration samples"] == 64


def test_the_histograms_count_every_value(run):
    report, calibration = run
    for row in report.layers:
        assert sum(row.weights.counts) == row.parameters
        values = calibration.layers[row.name].reference["weight"].double().numpy()
        counts, edges = np.histogram(values, 64)
        assert row.weights.counts == counts.tolist()
        assert row.weights.edges == pytest.approx(edges.tolist())
    first = report.layers[0]
    assert sum(first.inputs.counts) == 64 * 2 * 6 * 6
    # The observer keeps the upper 16 bits of a float32 and stands for a value by the centre of what they leave open.
    values = seeded(1, 64, 2, 6, 6).numpy()
    centres = (values.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32).astype(np.float64)
    low, high = values.min().item(), values.max().item()
    counts, edges = np.histogram(centres.clip(low, high), 64, (low, high))
    assert first.inputs.counts == counts.tolist()
    assert first.inputs.edges == pytest.approx(edges.tolist())


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((3,), 2.5), torch.tensor([-1.0])])
def test_a_histogram_of_equal_values_has_one_full_bin(values):
    found = of_values(values)
    assert sum(found.counts) == len(values)
    assert all(a < b for a, b in zip(found.edges, found.edges[1:], strict=False))


def test_an_observer_without_a_histogram_has_none():
    calibration = calibrate(SmallNet().eval(), [IMAGES], QConfig.parse("w8a8", activation_observer="minmax"))
    assert of_observer(calibration.observers["0", "input"]) is None


def test_json_and_csv_hold_the_same_figures(run, saved):
    report, _ = run
    found = json.loads((saved / "report.json").read_text())
    assert found["summary"]["packed size, bytes"] == report.packed_bytes
    assert [row["name"] for row in found["layers"]] == [row.name for row in report.layers]
    units = found["tuning"]["AdaQuant"]["units"]
    with (saved / "units_adaquant.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["unit"], float(row["error before"])) for row in rows] == [
        (u["name"], u["error_before"]) for u in units
    ]
    assert found["warnings"][0].keys() == {"kind", "message", "remedy"}


def test_print_shows_summary_stages_warnings_and_layers(run, capsys):
    run[0].print(Console(width=160))
    text = capsys.readouterr().out
    assert all(word in text for word in ("times smaller", "Calibration", "RolledBack", "blocks.0.conv1"))
    assert "Sensitivities" not in text
    run[0].print(every=True)
    assert "Sensitivities" in capsys.readouterr().out


def test_the_former_names_still_work(run):
    assert Sheet is ReportTable
    assert run[0].sheets() == run[0].tables()


def test_without_matplotlib_the_rest_is_written(run, tmp_path, monkeypatch):
    import importlib.util

    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else own(name, *a))
    with pytest.warns(ReportWarning, match="matplotlib is not installed, so no PNG"):
        run[0].save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".html"}


def test_warnings_are_noted_with_their_remedy_even_where_filters_hide_them():
    import warnings

    notes: list[PTQWarning] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with noted_warnings(notes):
            warn("one", RolledBackWarning)
            net = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()
            calibrate(net, [torch.randn(8, 4)], "w4a4")
        warn("not heard", RolledBackWarning)
    assert [type(note) for note in notes] == [RolledBackWarning, UnfoldedBatchNormWarning]


NAMES = {
    name
    for owner in (CalibrationCapture, AdaQuantLayerwise, BitAllocator, StatsTuning, QConfig.parse, ReconstructionConfig)
    for name in inspect.signature(owner).parameters
} | set(lightning_ptq.__all__)


@pytest.mark.parametrize("kind", PTQWarning.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_warning_has_a_remedy_whose_options_exist(kind):
    sentences = re.split(r"(?<=\.) ", kind.remedy)
    assert all(re.fullmatch(r"[A-Z].*\w.*\.", sentence) for sentence in sentences)
    mentioned = set(re.findall(r"\b[a-z]+_[a-z_]+\b|\b\w+(?==)", kind.remedy))
    assert mentioned <= NAMES


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("UnreachedLayerWarning", "step"),
        ("FewSamplesWarning", "num_samples"),
        ("ProgressWarning", "resume_dir"),
        ("RolledBackWarning", "weight_lr"),
        ("UnprovenAllocationWarning", "time_limit"),
    ],
)
def test_the_remedy_names_the_option_that_helps(kind, option):
    assert re.search(rf"\b{option}\b", getattr(errors, kind).remedy)
