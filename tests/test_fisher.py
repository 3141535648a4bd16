from __future__ import annotations

import pytest
import torch
from helpers import seeded, sharp
from torch import Tensor, nn

from lightning_ptq import QConfig, apply_allocation, calibrate, measure_sensitivity
from lightning_ptq.errors import SensitivityError


def second_order_rise(calibration, name, candidate):
    """``½ mean Σ_c p_c (δ · ∇ log p_c)²`` with one backward pass per class, for layers of an ``nn.Sequential``."""
    net, layer, at = calibration.module, calibration.layers[name], int(name)
    values = []
    for batch in calibration.batches:
        with torch.no_grad():
            inputs = net[:at](batch) if at else batch
            apply_allocation(calibration, {name: candidate})
            moved = layer(inputs)
            apply_allocation(calibration, {name: "w8"})
            output = layer(inputs)
        logs = net[at + 1 :](output.requires_grad_()).log_softmax(1)
        for log in logs.T:
            (gradient,) = torch.autograd.grad(log.sum(), output, retain_graph=True)
            change = (gradient * (moved - output)).sum(1).detach()
            values.append(0.5 * log.detach().exp() * change**2)
    return torch.stack(values).sum().item() / calibration.samples


def test_fisher_is_the_second_order_term_of_the_divergence():
    net = sharp(lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)))
    calibration = calibrate(net, [seeded(seed, 128, 8) for seed in range(2)], QConfig.parse("w8", first_last_bits=None))
    candidates = ["w8", "w5", "w3"]
    exact = measure_sensitivity(calibration, candidates).rises
    draws = [measure_sensitivity(calibration, candidates, measure="fisher", seed=100 * s).rises for s in range(32)]
    for layer in calibration.layers:
        assert {draw[layer]["w8"] for draw in draws} == {0.0}
        for candidate in candidates[1:]:
            expected = second_order_rise(calibration, layer, candidate)
            estimates = torch.tensor([draw[layer][candidate] for draw in draws])
            # The standard deviation of a draw is about a tenth of its mean, so that of the mean of 32 about 0.02 of it.
            assert estimates.mean().item() == pytest.approx(expected, rel=0.05), (layer, candidate)
            assert estimates.std().item() < 0.2 * expected, (layer, candidate)
            assert exact[layer][candidate] == pytest.approx(expected, rel=0.06), (layer, candidate)


@pytest.mark.parametrize(("tail", "forward", "message"), [
    ([], lambda module, batch: torch.no_grad()(module)(batch), "outputs carry no gradients"),
    ([nn.Linear(4, 1), nn.Flatten(0)], lambda module, batch: module(batch), r"shape \(16,\), so there are no logits"),
])  # fmt: skip
def test_fisher_needs_logits_with_gradients(tail, forward, message):
    calibration = calibrate(nn.Sequential(nn.Linear(6, 4), *tail), [seeded(1, 16, 6)], "w8a8", forward=forward)
    with pytest.raises(SensitivityError, match=message):
        measure_sensitivity(calibration, ["w8a8", "w4a8", "w2a4"], measure="fisher")


class Tagger(nn.Module):
    """A class for each token or pixel; layers see (n, t, c), (n * t, c), (t, n, c) or (n, c, height, width)."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.view = view
        wide = [nn.Conv2d(6, 24, 1), nn.Conv2d(24, 4, 1)] if view == "images" else [nn.Linear(6, 24), nn.Linear(24, 4)]
        self.first, self.last = wide

    def forward(self, x: Tensor) -> Tensor:
        if self.view == "images":  # 3 x 2 pixels
            return self.last(self.first(x.mT.unflatten(2, (3, 2))).relu())
        given = {"tokens": x, "rows": x.flatten(0, 1), "first": x.transpose(0, 1)}[self.view]
        logits = self.last(self.first(given).relu())
        return {"rows": lambda: logits.unflatten(0, (len(x), -1)), "first": lambda: logits.transpose(0, 1)}.get(
            self.view, lambda: logits
        )()


@pytest.mark.parametrize("view", ["tokens", "rows", "first", "images"])
def test_fisher_averages_over_positions_as_the_divergence_does(view):
    net = sharp(lambda: Tagger(view))
    with torch.no_grad():
        net.last.weight.mul_(0.25)
    batches = [seeded(seed, 64, 6, 6) for seed in range(2)]
    calibration = calibrate(net, batches, QConfig.parse("w8", first_last_bits=None))
    exact = measure_sensitivity(calibration, ["w8", "w4"]).rises
    draws = [measure_sensitivity(calibration, ["w8", "w4"], measure="fisher", seed=100 * s).rises for s in range(8)]
    for layer in calibration.layers:
        mean = sum(draw[layer]["w4"] for draw in draws) / len(draws)
        assert mean == pytest.approx(exact[layer]["w4"], rel=0.25), layer  # a sum over positions is 6 times as much
