"""One network through the whole library: inspect, calibrate, tune, allocate, save, load, undo."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import Snapshot, build
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import Case, detect

from lightning_ptq import (
    QConfig,
    ReconstructionConfig,
    adaquant,
    apply_allocation,
    calibrate,
    inspect,
    load_packed,
    para_normalize,
    prepare,
    reestimate_batch_norm,
    save_packed,
    search_allocation,
    size_cost,
    tune_bias,
)
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.calibration.forward import eval_mode, run_forward
from lightning_ptq.runtime.structure import tensors_in

QCONFIG = QConfig.parse("w4a4", first_last_bits=None)


def outputs(module, case):
    """All tensors of the forward on every batch, with the same random numbers each time."""
    results = []
    for batch in case.batches:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results += tensors_in(run_forward(module, case.forward, Batch(batch).copy()))
    return results


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def independent_macs(module, case):
    """Multiply-accumulates of one sample, counted by torch in the float module."""
    counter = FlopCounterMode(display=False)
    with (
        eval_mode(module),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):  # with gradients, since the counter's hooks need them
        case.forward(module, Batch(case.batches[0]).copy())
    return counter.get_total_flops() / 2 / Batch(case.batches[0]).samples


def float_module(case: Case):
    return build(case.make).to(case.dtype).eval()


def run_everything(case: Case, folder: Path) -> None:
    """Check that outputs are equal bit for bit wherever they should be."""
    module = float_module(case)
    expected, before = outputs(module, case), Snapshot(module)
    preflight = inspect(module, case.batches[0], QCONFIG, step=case.forward)
    assert preflight.layers
    assert preflight.covered >= case.covered
    if case.counted and not preflight.uncounted and case.forward is not detect:
        assert preflight.macs == pytest.approx(independent_macs(module, case), rel=0.01)
    before.assert_unchanged()

    calibration = calibrate(module, case.batches, QCONFIG, forward=case.forward)
    adaquant(calibration, config=ReconstructionConfig(steps=5))
    measure = {"measure": "mse", "output": case.output}
    if case.statistics:
        reestimate_batch_norm(calibration, **measure)
        para_normalize(calibration, **measure)
        tune_bias(calibration, steps=2, **measure)
    candidates = ["w8a8", "w4a4"]
    choices = Candidates(calibration, candidates)
    cost = size_cost(calibration, choices)
    budget = sum(cost.total(choices.uniform(candidate)) for candidate in candidates) / 2
    found = search_allocation(calibration, candidates, cost, {"size": budget}, rounds=1, measuring=measure)
    apply_allocation(calibration, found.allocation)
    quantized = outputs(module, case)

    save_packed(module, folder / "packed.safetensors")
    loaded = load_packed(float_module(case), folder / "packed.safetensors")
    assert same(outputs(loaded, case), quantized)
    state = copy.deepcopy(module.state_dict())
    again = float_module(case)
    prepare(again, QCONFIG)
    again.load_state_dict(state)
    assert same(outputs(again, case), quantized)
    calibration.prepared.undo()
    assert same(outputs(module, case), expected)
    before.assert_unchanged()
