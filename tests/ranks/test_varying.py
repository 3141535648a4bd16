"""Forwards that vary or draw random numbers, on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import build, same_state, seeded, state
from ranks.processes import run
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq import QConfig, ReconstructionConfig, adaquant, calibrate, tune_bias
from lightning_ptq.runtime.ranks import current_ranks


class Mixture(nn.Module):
    """Experts that some batches do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.router, self.head = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).relu()
        chosen = self.router(h).argmax(-1)
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            if mask.any():
                out[mask] = expert(h[mask])
        return self.head(h + out)


class Noisy(nn.Sequential):
    """A network that drops inputs in eval mode too."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2, training=True))


class Late(nn.Module):
    """Products of activations, with a parameter, and with the weight of a layer, which the last batch alone reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.parameters_of = nn.ParameterList([nn.Parameter(torch.randn(8, 8) * 0.3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).relu()
        if x.mean() > 1:
            h = (h @ self.parameters_of[0]).relu() + (h @ h.mT).softmax(-1) @ h
            h = F.linear(F.linear(h, self.enter.weight.t()), self.hidden.weight, self.hidden.bias)
        return self.head(h)


def quantized(kind: type[nn.Module], world: int) -> dict[str, Tensor]:
    """The state after calibration, tuning and bias tuning; ranks take batches in turn."""
    if world > 1:
        dist.init_process_group("gloo")
    ranks = current_ranks()
    batches = [seeded(i, 12, 8) + i - 1.5 for i in range(4)][ranks.rank :: ranks.world]
    qconfig = QConfig.parse("w3a8", first_last_bits=None)
    calibration = calibrate(build(kind), batches, qconfig, ranks=ranks)
    adaquant(calibration, granularity="layer", config=ReconstructionConfig(steps=8))
    tune_bias(calibration, measure="mse", steps=4)
    return state(calibration.module)


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("kind", [Mixture, Noisy, Late])
def test_two_ranks_end_with_the_same_bytes(kind: type[nn.Module]) -> Any:
    (alone,) = run(1, quantized, kind, 1)
    left, right = run(2, quantized, kind, 2)
    assert same_state(left, right)
    if kind is not Noisy:  # batches of one course are cut anew, and then get other random numbers than on one rank
        assert same_state(left, alone)
