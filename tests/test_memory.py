"""Memory: the automatic limit, and a device that runs out of memory in the middle of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ResNet, build, relative_error, same_state, seeded, state
from torch import nn

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate, inspect
from lightning_ptq.activations import memory_plan
from lightning_ptq.errors import CalibrationError, MemoryWarning
from lightning_ptq.tuning import optimize
from lightning_ptq.tuning.run import Run

CONFIG = ReconstructionConfig(steps=5, batch_size=16)


def calibration_of() -> Any:
    return calibrate(build(ResNet), seeded(1, 64, 2, 6, 6).split(16), QConfig.parse("w3a4", first_last_bits=None))


def test_the_automatic_limit_is_what_a_float_pass_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    calibration = calibrate(net, seeded(0, 64, 10).split(32), "w8a8")
    assert memory_plan.limit_of("auto", calibration) == 2**28  # less is not worth the files
    monkeypatch.setattr(memory_plan, "_LEAST", 0)
    per_sample = 4 * (10 + 20 + 20 + 5)
    assert memory_plan.limit_of("auto", calibration) == 32 * per_sample
    assert memory_plan.limit_of("auto", calibration, batch=8) == 8 * per_sample
    assert memory_plan.limit_of("1KB", calibration) == 1000


def test_the_plan_says_what_the_automatic_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_LEAST", 0)
    plans: list[Any] = []
    in_files = calibration_of()
    result = adaquant(in_files, config=CONFIG, announce=plans.append)
    assert plans[0].where == "disk"
    assert "as memory_limit allows" in str(plans[0])
    assert result.peak_activation_bytes <= plans[0].limit
    in_memory = calibration_of()
    adaquant(in_memory, config=CONFIG, memory_limit="1GiB")
    assert same_state(state(in_files.module), state(in_memory.module))
    assert inspect(build(ResNet), seeded(1, 16, 2, 6, 6), samples=64).plan is not None


def test_a_unit_is_repeated_with_fewer_samples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = calibration_of()
    adaquant(expected, config=CONFIG)
    own, rows = optimize.unit_loss, []

    def limited(unit: Any, tuners: Any, loss: Any, data: Any, picked: Any, random: Any = None) -> Any:
        rows.append(len(picked.targets[0]))
        if unit.name == "blocks.1" and rows[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(unit, tuners, loss, data, picked, random)

    monkeypatch.setattr(optimize, "unit_loss", limited)
    calibration = calibration_of()
    with pytest.warns(MemoryWarning, match=r"'blocks\.1' was tuned.*4 samples at a time instead of 8"):
        result = adaquant(calibration, config=CONFIG)
    assert [unit.steps for unit in result.units] == [5] * len(result.units)
    assert max(rows[-8:]) == 4
    x = seeded(3, 32, 2, 6, 6)
    assert relative_error(calibration.module(x), expected.module(x)) < 0.02  # sums in another order


def test_without_room_for_one_sample_the_module_is_unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(optimize, "unit_loss", full)
    calibration = calibration_of()
    before = state(calibration.module)
    with pytest.warns(MemoryWarning), pytest.raises(CalibrationError, match="Write a smaller batch_size"):
        adaquant(calibration, config=CONFIG)
    assert same_state(state(calibration.module), before)


def test_a_forward_without_room_is_repeated_with_activations_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = calibration_of()
    adaquant(expected, config=CONFIG)
    own, limits = Run._capture_shard, []

    def capture(run: Any, *args: Any) -> Any:
        limits.append(run.store.limit)
        if len(limits) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(run, *args)

    monkeypatch.setattr(Run, "_capture_shard", capture)
    failing, calibration = {3}, calibration_of()
    with pytest.warns(MemoryWarning, match=r"up to unit 'blocks\.0'.*go to files"):
        adaquant(calibration, config=CONFIG)
    assert limits[2] > 0 == limits[3]
    assert same_state(state(calibration.module), state(expected.module))
    failing, calibration = {len(limits) + 1, len(limits) + 3}, calibration_of()
    with pytest.warns(MemoryWarning), pytest.raises(CalibrationError, match="Calibrate with smaller batches"):
        adaquant(calibration, config=CONFIG)
