from __future__ import annotations

import csv
import inspect
import io
import json
import re
import time
from datetime import datetime

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
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.errors import (  # fmt: skip
    PTQWarning,
    ReportWarning,
    RolledBackWarning,
    UnfoldedBatchNormWarning,
    noted_warnings,
    warn,
)
from lightning_ptq.report import PTQReport, ReportTable, Sheet
from lightning_ptq.report.origin import shortened
from lightning_ptq.report.record import LayerRecord, MetricChange, of_observer, of_values
from lightning_ptq.report.table import print_tables


def test_the_figures_of_the_summary_add_up(run):
    report, calibration = run
    summary = report.summary()
    layers = calibration.layers
    bits = [layer.qconfig.weight.bits for layer in layers.values()]
    weights = [2 * 6 * 9, *[6 * 6 * 9] * 4, 6 * 4]
    scales = 4 * (6 + 4 * 6 + 4)
    expected = sum(-(-n * b // 8) for n, b in zip(weights, bits, strict=True)) + scales
    assert summary["bits_per_weight"] == pytest.approx(8 * expected / sum(weights))
    macs = {"stem": 36 * 9 * 2 * 6, "head": 6 * 4}
    assert {row.name: row.macs for row in report.layers if row.name in macs} == macs
    assert summary["float_bytes"] == sum(t.numel() * t.element_size() for t in build(ResNet).state_dict().values())
    assert summary["times_smaller"] == summary["float_bytes"] / summary["packed_bytes"]
    share = sum(row.macs * int(row.widths[1]) * int(row.widths[3]) for row in report.layers)
    assert summary["bit_operations_share"] == pytest.approx(share / 1024 / sum(r.macs for r in report.layers))
    assert summary["seconds"] == sum(stage.seconds for stage in report.stages)
    assert [stage.name for stage in report.stages] == ["Calibration", "Bit allocation", "AdaQuant"]
    assert summary["calibration_samples"] == 64


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
    assert found["summary"]["packed_bytes"] == report.packed_bytes
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


def test_print_opens_with_the_result_and_breaks_no_name_where_there_is_no_terminal(capsys):
    name = "encoder.layers.11.attention.projections.a_very_long_name_of_a_layer.query"
    report = PTQReport("net", metrics=[MetricChange("val_acc", 0.9885, 0.9875)])
    report.layers = [LayerRecord(name, "Linear", "w4a4", 10**8, 1.5e12)]
    message = f"{name} [was] left out. " * 6
    with noted_warnings(report.warnings), pytest.warns(RolledBackWarning):
        warn(message, RolledBackWarning)
    report.print()
    text = capsys.readouterr().out
    assert text.startswith("net: val_acc 0.9885 -> 0.9875, 0.0 times smaller\n- 1 layer below 8 bits had no AdaQuant")
    assert text.count(name) == 7  # six times in the message, which is wrapped between words, and in the layers
    assert "[was]" in text
    assert "100 M" in text
    assert "1.5 T" in text
    assert max(map(len, text.splitlines())) >= 140


def test_on_a_terminal_its_width_counts():
    table = ReportTable("a", "A", ("layer", "text"), [("b" * 60, "many words " * 20)])
    for width in (50, 100):
        console = Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
        print_tables([table], console)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert any("b" * 60 in line for line in lines) == (width == 100)


def test_metrics_and_trials_are_tables_a_plot_and_json(tmp_path):
    trials = [
        Trial({"size": 100.0, "bops": 3.2e9}, 0.01, 0.98, 0.004, 0.001, True, True, {"a": "w4a4"}),
        Trial({"size": 50.0, "bops": 1.6e9}, 0.02, 0.9, 0.084, None, False),
    ]
    report = PTQReport("net", metrics=[MetricChange("val_acc", 0.984, 0.98)], trials=trials, float_bytes=400)
    tables = {table.key: table for table in report.tables()}
    assert next(iter(tables)) == "metrics"
    assert tables["metrics"].cells() == [["val_acc", "0.984", "0.98", "-0.004"]]
    assert tables["trials"].cells() == [
        ["1", "100 bytes", "25.0%", "3.2 G", "0.01", "0.98", "0.004", "0.001", "yes", "yes"],
        ["2", "50 bytes", "12.5%", "1.6 G", "0.02", "0.9", "0.084", "", "no", ""],
    ]
    beyond, chosen = report.plots()["trials"].series
    assert (beyond.name, beyond.x, beyond.y, beyond.error) == ("beyond it", [50.0], [0.084], [None])
    assert (chosen.name, chosen.x, chosen.y, chosen.error) == ("chosen", [100.0], [0.004], [0.001])
    assert "trial 1: chosen\nsize 100 bytes, bops 3.2 G\nmetric 0.98, drop 0.004 ± 0.001" in chosen.hover[0]
    report.save(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["metrics"] == [{"name": "val_acc", "before": 0.984, "after": 0.98}]
    assert found["trials"][0]["costs"] == {"size": 100.0, "bops": 3.2e9}
    assert found["trials"][0]["choice"] == {"a": "w4a4"}
    assert found["headline"] == report.headline()
    assert found["verdict"][0]["text"] == report.verdict()[0].text


def test_the_date_is_that_of_the_record_and_not_of_the_file(run, tmp_path):
    before = datetime.fromisoformat(run[0].origin.date)
    time.sleep(1.1)
    run[0].save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["origin"]["date"] == before.isoformat()
    later = PTQReport("net")
    assert datetime.fromisoformat(later.origin.date) > before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["/a/b/run.py", "--data", "/c/d e.npz", "fit"], "run.py --data 'd e.npz' fit"),
        (["run.py", "--out=/a/b/", "--lr=0.1"], "run.py --out=b --lr=0.1"),
        (["a.py", "--wandb.api_key", "31", "--password=4", "-k", "5"], "a.py --wandb.api_key *** --password=*** -k 5"),
        (["run.py", "--steps", "20", "monkey"], "run.py --steps 20 monkey"),
    ],
)  # fmt: skip
def test_the_command_has_file_names_for_paths_and_no_secrets(arguments, line):
    assert shortened(arguments) == line


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
