"""States in closed form at all candidates: what sensitivities of a network that will be tuned are measured with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import build, same_state, seeded, state
from torch import Tensor, nn

from lightning_ptq import QConfig, calibrate, measure_sensitivity
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.tuning import solved_states as module
from lightning_ptq.tuning.solved_states import solved_states

CANDIDATES = ["w8a8", "w4a8", "w4a4", "w2a4", "w2a8"]


class Net(nn.Module):
    """Convolutions and linear layers on correlated inputs; later code changes what they read in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(6, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.three = nn.Conv2d(8, 8, 1, bias=False)
        self.four = nn.Linear(8, 8)
        self.five = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        y = self.three(F.relu(self.two(x)))
        x.add_(y).relu_()
        return self.five(F.relu(self.four(x.mean((2, 3)))))


def batches(count: int = 8, samples: int = 32) -> list[Tensor]:
    near = seeded(0, count * samples, 6) @ seeded(1, 6, 6 * 64) / 2 + 0.2 * seeded(2, count * samples, 6 * 64)
    return list(near.view(-1, 6, 8, 8).split(samples))


def calibrated(net: Any = Net, data: list[Tensor] | None = None) -> Calibration:
    return calibrate(build(net).eval(), data or batches(), QConfig.parse("w8a8", first_last_bits=None))


@torch.no_grad()
def output_errors(calibration: Calibration, candidate: str, states: Any) -> dict[str, float]:
    """Squared error of each layer's output at a candidate, for its inputs in the float network."""
    choices, errors = Candidates(calibration, CANDIDATES, states), dict.fromkeys(calibration.layers, 0.0)
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in calibration.layers}
    for layer in calibration.layers.values():
        layer.mode = "float"
    hooks = [
        layer.register_forward_hook(lambda _, args, out, name=name: inputs[name].append((args[0].clone(), out.clone())))
        for name, layer in calibration.layers.items()
    ]
    for index in range(len(calibration.batches)):
        calibration.run(index)
    for hook in hooks:
        hook.remove()
    with choices.restored():
        for name, layer in calibration.layers.items():
            layer.mode = "quantized"
            choices.put(name, candidate)
            errors[name] = sum((layer(x) - wanted).square().sum().item() for x, wanted in inputs[name])
    return errors


@pytest.mark.parametrize("candidate", ["w4a8", "w4a4", "w2a4", "w2a8"])
def test_each_layer_gets_closer_to_its_float_output(candidate: str) -> None:
    calibration = calibrated()
    states = solved_states(calibration, CANDIDATES)
    rounded, solved = (output_errors(calibration, candidate, each) for each in ({}, states))
    for name in calibration.layers:
        assert solved[name] < 1.01 * rounded[name], name
    # A damping is chosen that leaves layers of nearly uncorrelated inputs as they are.
    for name in ("two", "four", "five"):
        assert solved[name] < 0.9 * rounded[name], name


def test_the_sensitivities_of_few_bits_fall() -> None:
    calibration = calibrated()
    states = solved_states(calibration, CANDIDATES)
    rounded, solved = (
        measure_sensitivity(calibration, CANDIDATES, measure="mse", states=each).rises for each in ({}, states)
    )
    for name in ("two", "four", "five"):
        assert solved[name]["w2a8"] < 0.8 * rounded[name]["w2a8"], name
        assert solved[name]["w8a8"] == rounded[name]["w8a8"] == 0


def test_the_module_and_its_calibration_stay_as_they_are() -> None:
    calibration = calibrated()
    before = state(calibration.module)
    qconfigs = {name: layer.qconfig for name, layer in calibration.layers.items()}
    solved_states(calibration, CANDIDATES)
    assert same_state(state(calibration.module), before)
    assert {name: layer.qconfig for name, layer in calibration.layers.items()} == qconfigs
    assert {layer.mode for layer in calibration.layers.values()} == {"quantized"}


def test_layers_with_one_candidate_and_candidates_of_8_bits_have_no_state() -> None:
    calibration = calibrate(build(Net).eval(), batches(), "w8a8")  # first and last layer keep 8 bits
    found = solved_states(calibration, CANDIDATES)
    assert {candidate: set(states) for candidate, states in found.items()} == {
        candidate: {"two", "three", "four"} for candidate in CANDIDATES[1:]
    }


class Twice(nn.Module):
    """One layer is called twice, one is not called, one multiplies in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.own = nn.Linear(6, 6), nn.Linear(6, 6), nn.Bilinear(6, 6, 6)
        self.transposed = nn.ConvTranspose1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(self.once(x)))))
        return self.transposed(self.own(x, x)[:, :, None])[:, :, 0]


def test_layers_that_cannot_be_solved_have_no_state() -> None:
    found = solved_states(calibrated(Twice, list(seeded(0, 128, 6).split(32))), ["w8a8", "w2a8"])
    assert set(found["w2a8"]) == {"once"}


def test_portions_of_the_layers_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrated()
    whole = solved_states(calibration, CANDIDATES)
    monkeypatch.setattr(module, "_BYTES", 0)
    forwards = []
    monkeypatch.setattr(Calibration, "run", _counting(Calibration.run, forwards))
    apart = solved_states(calibration, CANDIDATES)
    assert len(forwards) == len(calibration.layers) * 8
    for candidate, states in whole.items():
        for name, tensors in states.items():
            # Other positions may be drawn, where there are more than are used; here all are.
            assert same_state(apart[candidate][name], tensors), (candidate, name)


def _counting(run: Any, calls: list[int]) -> Any:
    def counted(self: Calibration, index: int, *args: Any, **kwargs: Any) -> Any:
        calls.append(index)
        return run(self, index, *args, **kwargs)

    return counted


def test_a_few_hundred_samples_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrated(data=batches(32))
    indices: list[int] = []
    monkeypatch.setattr(Calibration, "run", _counting(Calibration.run, indices))
    solved_states(calibration, CANDIDATES)
    assert indices == list(range(0, 32, 4))


class Mixed(Net):
    """Its forward has a precision and records gradients of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_moments_are_taken_in_full_precision_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()
    found = module.moments_of_products

    def seen(*args: Any) -> Any:
        moments = found(*args)
        dtypes.update({moments.inputs.dtype, moments.outputs.dtype})
        assert not moments.inputs.requires_grad
        assert not torch.is_autocast_enabled("cpu")
        return moments

    monkeypatch.setattr(module, "moments_of_products", seen)
    states = solved_states(calibrated(Mixed), CANDIDATES)
    assert dtypes <= {torch.float32, torch.float64}
    assert states.keys() == set(CANDIDATES[1:])


def test_layers_whose_weights_other_code_reads_are_left_out() -> None:
    calibration = calibrated()
    calibration.layers["two"].exposed = True
    assert "two" not in solved_states(calibration, CANDIDATES)["w2a8"]


def test_singular_moments_leave_a_layer_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise torch.linalg.LinAlgError("the leading minor of order 3 is not positive-definite")

    calibration = calibrated()
    monkeypatch.setattr(torch.linalg, "cholesky", fails)
    assert solved_states(calibration, CANDIDATES) == {}
