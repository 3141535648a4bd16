from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import build, seeded
from torch import Tensor, nn

from lightning_ptq import calibrate
from lightning_ptq.network import swapping
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.swapping import Swapped
from lightning_ptq.report import PTQReport
from lightning_ptq.report.inspect_module import inspect_module


class Product(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class QuantProduct(Swapped, QuantizedOp, Product):
    """An operation of two inputs and no weights."""

    prefix = "Quant"
    input_names = ("left", "right")

    def _init_swapped(self) -> None:
        self.init_op()

    def input_tensors(self, args: Any, kwargs: Any) -> dict[str, Any]:
        return dict(zip(self.input_names, args, strict=True))

    def macs(self, args: Any, kwargs: Any, output: Tensor) -> float:
        return float(output.numel() * args[0].shape[-1])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.mode == "quantized" and self.input_quantizers:
            left, right = self.left_fake_quant(left), self.right_fake_quant(right)
        return super().forward(left, right)


class Multiplying(nn.Module):
    """Two projections of 4 to 6 features and the product of 5 x 6 by 6 x 5."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.product, self.head = nn.Linear(4, 6), nn.Linear(4, 6), Product(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.product(self.query(x), self.key(x).transpose(1, 2)))


def test_an_operation_of_two_inputs_and_no_weights_is_reported(monkeypatch):
    monkeypatch.setattr(swapping, "_REGISTRY", {**swapping._REGISTRY, Product: QuantProduct})
    x = seeded(3, 8, 5, 4)
    calibration = calibrate(build(Multiplying), [x], "w4a6")
    report = PTQReport("net")
    report.calibrated(calibration)
    (row,) = [row for row in report.layers if row.name == "product"]
    assert (row.kind, row.widths, row.parameters, row.size, row.macs) == ("Product", "w4a6", 0, 0, 5 * 5 * 6)
    assert row.weights is None
    assert sum(row.inputs.counts) == 8 * 5 * 6
    quantizer = calibration.layers["product"].left_fake_quant
    grid = (torch.tensor([0.0, 63.0]) - quantizer.zero_point) * quantizer.scale
    assert [row.low, row.high] == pytest.approx(grid.tolist())
    assert set(report.figures()) == {"ranges"}
    preflight = inspect_module(build(Multiplying), x, "w4a6")
    (facts,) = [layer for layer in preflight.layers if layer.name == "product"]
    assert (facts.kind, facts.shape, facts.status, facts.macs) == ("Product", (), "quantized", 5 * 5 * 6)
    assert (preflight.products, preflight.covered) == ([], 1.0)
