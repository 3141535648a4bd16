"""A report of all stages, made once for all test files of this folder."""

from __future__ import annotations

import pytest
import torch
from helpers import ResNet, build, seeded

from lightning_ptq import (
    Calibration,
    ReconstructionConfig,
    adaquant,
    apply_allocation,
    calibrate,
    search_allocation,
    size_cost,
    tune_bias,
)  # fmt: skip
from lightning_ptq.allocation.frontier import sweep
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.errors import RolledBackWarning, noted_warnings
from lightning_ptq.report import PTQReport


def whole_run(report: PTQReport) -> Calibration:
    """All stages on a small net, with rates that spoil a unit, so that there is a warning."""
    candidates = ("w8a8", "w4a4", "w2a4")
    with noted_warnings(report.warnings):
        with report.stage("Calibration"):
            calibration = calibrate(build(ResNet), seeded(1, 64, 2, 6, 6).split(16), "w4a4")
        report.calibrated(calibration)
        with report.stage("Bit allocation"):
            cost = size_cost(calibration, Candidates(calibration, candidates))
            report.allocation = search_allocation(calibration, candidates, cost, {"size": 0.2})
            apply_allocation(calibration, report.allocation.allocation)
        report.frontier = sweep(report.allocation.sensitivity, [cost], "size")
        with report.stage("AdaQuant"):
            config = ReconstructionConfig(steps=3, weight_lr=5.0)
            report.tuning["AdaQuant"] = adaquant(calibration, config=config)
        report.statistics = [tune_bias(calibration, steps=2)]
        report.finish(calibration)
    return calibration


@pytest.fixture(scope="session")
def run():
    torch.manual_seed(0)
    report = PTQReport("a net <of> ours & yours")
    with pytest.warns(RolledBackWarning):
        calibration = whole_run(report)
    return report, calibration


@pytest.fixture(scope="session")
def saved(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "deep"
    assert run[0].save(folder) == folder / "report.html"
    return folder
