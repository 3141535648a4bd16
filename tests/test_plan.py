from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ResNet, Transformer, build, same_state, seeded, state, token_batches

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate
from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.memory import format_bytes

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")

CONFIG = ReconstructionConfig(steps=5, batch_size=8)
NETS = {
    "resnet": lambda: (build(ResNet), seeded(1, 40, 2, 6, 6).split(8)),
    "transformer": lambda: (build(lambda: Transformer(16)), token_batches(5)),
}


def calibration_of(name):
    net, batches = NETS[name]()
    return calibrate(net, batches, QConfig.parse("w3a4", first_last_bits=None))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_plan_is_what_is_held_at_most(name, mode, granularity):
    plans = []
    result = adaquant(calibration_of(name), mode=mode, granularity=granularity, config=CONFIG, announce=plans.append)
    assert plans[0].where == "memory"
    # An upper bound, and no more than a quarter above what is held.
    assert 0.8 * plans[0].most <= result.peak_activation_bytes <= plans[0].most
    assert "all in memory" in str(plans[0])
    assert plans[0].unit in str(plans[0])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_small_disk_means_computing_again_with_the_same_result(name, mode, monkeypatch):
    plans, nets = [], []
    for limit, room in (("1GiB", 10**9), (0, 10**9), (0, None)):
        calibration = calibration_of(name)
        if room is None:  # so much that the plan for the disk is too big, yet any unit fits
            room = round(0.99 * plans[0].most)
        monkeypatch.setattr("lightning_ptq.activations.memory_plan.disk_room", lambda room=room: room)
        adaquant(calibration, mode=mode, granularity="layer", config=CONFIG, memory_limit=limit, announce=plans.append)
        nets.append(state(calibration.module))
    assert [plan.where for plan in plans] == ["memory", "disk", "recomputed"]
    assert "memory-mapped" in str(plans[1])
    assert "computed from the start" in str(plans[2])
    assert all(same_state(net, nets[0]) for net in nets)


def test_what_fits_nowhere_is_told_before_the_work(monkeypatch):
    calibration = calibration_of("resnet")
    before = state(calibration.module)
    monkeypatch.setattr("lightning_ptq.activations.memory_plan.disk_room", lambda: 100)
    with pytest.raises(CalibrationError, match=r"unit 'blocks\.0' take .* fewer samples, raise memory_limit"):
        adaquant(calibration, config=CONFIG, memory_limit=0)
    assert same_state(state(calibration.module), before)
    assert not torch.is_inference_mode_enabled()


# Run in a process of its own, whose heap holds nothing that the run could use again. Large blocks go back to the system
# at once there: what glibc keeps of them for later differs from run to run.
MEASURED = """
import ctypes, torch
from helpers import ResNet, build, seeded
from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def run(width, pixels, announce=lambda plan: None):
    qconfig = QConfig.parse("w4a4", weight_observer="minmax", activation_observer="minmax")
    calibration = calibrate(build(lambda: ResNet(width)), seeded(1, 64, 2, pixels, pixels).split(32), qconfig)
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    adaquant(calibration, config=ReconstructionConfig(steps=3), announce=announce)

torch.set_num_threads(1)
run(6, 6)
for width, pixels in ((160, 4), (32, 24)):
    ctypes.CDLL(None).malloc_trim(0)
    before, plans = status("VmRSS"), []
    run(width, pixels, plans.append)
    print(status("VmHWM") - before, plans[0].peak, plans[0].most, plans[0].rest)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_the_plan_states_the_whole_peak():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-W", "ignore", "-c", MEASURED]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    runs = [tuple(map(int, line.split())) for line in output.splitlines()]
    for measured, peak, most, rest in runs:
        assert peak == most + rest
        assert peak / 1.5 < measured < 1.5 * peak
    (*_, most, rest), _ = runs
    assert rest > 10 * most  # a lower memory_limit would buy nothing


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_plan_names_what_no_memory_limit_changes(mode):
    plans = []
    for limit in ("1GiB", 0):
        adaquant(calibration_of("resnet"), mode=mode, config=CONFIG, memory_limit=limit, announce=plans.append)
    high, low = plans
    assert (high.weights, high.tuning) == (low.weights, low.tuning)
    assert (high.peak, low.peak) == (high.most + high.rest, low.rest)
    for plan in plans:
        assert f"{format_bytes(plan.weights)} are weights" in str(plan)
        assert f"{format_bytes(plan.peak)} in all" in str(plan)
