from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_ptq import PTQReport, adaquant, calibrate
from lightning_ptq.cli import main, saved
from lightning_ptq.errors import RolledBackWarning
from lightning_ptq.report.record import MetricChange


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def report_of(seed: int, qconfig: str) -> PTQReport:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    report = PTQReport("my net", {"Calibration": {"qconfig": qconfig, "step": "training"}})
    with report.stage("Calibration"):
        calibration = calibrate(net, [torch.randn(16, 4)], qconfig)
    report.calibrated(calibration)
    report.tuning["AdaQuant sequential"] = adaquant(calibration)
    report.metrics = [MetricChange("top1", 0.9, 0.89 - seed / 100)]
    report.warnings = [RolledBackWarning("kept", {"a": "b"})]
    report.finish(calibration)
    return report


def test_a_saved_report_is_read_as_it_was(folder):
    report = report_of(0, "w4a8")
    report.save("saved", {})
    read = saved.load_report("saved/report.json")
    assert [table.cells() for table in read.tables()] == [table.cells() for table in report.tables()]
    assert len(read.tables()) >= 5
    assert read.headline() == report.headline()


def test_report_prints_the_main_tables_or_all(capsys):
    report_of(0, "w4a8").save("saved", {})
    assert main(["report", "saved"]) == 0
    brief = capsys.readouterr().out
    assert "my net: top1 0.9000 -> 0.8900" in brief
    assert "Units" not in brief
    assert main(["report", "saved", "--every"]) == 0
    assert "Units" in capsys.readouterr().out


def test_compare_puts_reports_side_by_side(capsys):
    for seed, qconfig in enumerate(("w4a8", "w8a8")):
        report = report_of(seed, qconfig)
        report.packed_bytes = 1000 + seed
        report.save(f"saved{seed}", {})
    tables = saved.comparison(["a", "b"], [saved.load_report(f"saved{seed}") for seed in (0, 1)])
    rows = {table.key: {row[0]: row[1:] for row in table.rows} for table in tables}
    assert rows["settings"] == {"Calibration: qconfig": ("w4a8", "w8a8")}
    assert rows["metrics"] == {"top1, float": (0.9, 0.9), "top1, quantized": (0.89, 0.88)}
    assert rows["summary"]["packed size"] == ("1.0 kB", "1.0 kB")
    assert rows["summary"]["times smaller"][0] > rows["summary"]["times smaller"][1]
    assert set(rows["stages"]) == {"Calibration"}
    assert main(["compare", "saved0", "saved1"]) == 0
    assert "saved1" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "{}", "text", '{"model": 1}', '{"model": "a", "stages": [{"name": 1}]}'])
def test_a_file_that_is_no_report_is_an_error(content, capsys):
    Path("report.json").write_text(content)
    assert main(["report", "."]) == 1
    assert "is no report of lightning_ptq" in capsys.readouterr().err


def test_a_report_that_does_not_exist_is_an_error(capsys):
    assert main(["compare", "nowhere", "."]) == 1
    assert "there is no report in nowhere" in capsys.readouterr().err
