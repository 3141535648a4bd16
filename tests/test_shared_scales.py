from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ResNet, build, seeded
from torch import nn

from lightning_ptq import adaquant, calibrate, tune_bias
from lightning_ptq.export.targets import configured
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.tuning.config import ReconstructionConfig

pytestmark = pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
IMAGES = [seeded(i, 32, 2, 6, 6) for i in range(4)]


class Branches(nn.Module):
    """Two convolutions of one tensor, and a skip to a later unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Conv2d(2, 4, 3, padding=1), ResNet(4).blocks[0], nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last(torch.cat([self.block(x), x.flatten(0, 1).unflatten(0, (len(x), -1))], 1)).mean((2, 3))


def grids(op: QuantizedOp) -> dict[str, tuple[float, int]]:
    return {name: (q.scale.item(), int(q.zero_point)) for name, q in op.input_quantizers.items()}


def test_readers_of_one_tensor_keep_one_scale_through_tuning() -> None:
    config = ReconstructionConfig(steps=60, held_out=0.0, learn=("activation_scale", "activation_zero_point"))
    wide: dict[str, Any] = {"activation_observer": "minmax"}  # leaves something to learn
    tuned = {}
    for target in (None, "onnxruntime"):
        calibration = calibrate(build(ResNet), IMAGES, configured("w8a2", target, operations="all", **wide))
        before = {name: grids(op) for name, op in calibration.layers.items()}
        assert all(unit.accepted for unit in adaquant(calibration, config=config).units if "blocks" in unit.name)
        tuned[target] = {name: grids(op) for name, op in calibration.layers.items()}
        assert before["blocks.0.conv1"] != tuned[target]["blocks.0.conv1"]
    for block in ("blocks.0", "blocks.1"):
        # The first convolution and the sum read the block's input.
        free, shared = ((found[f"{block}.conv1"]["input"], found[f"{block}.add_1"]["left"]) for found in tuned.values())
        assert shared[0] == shared[1]
        assert free[0] != free[1]


def test_a_scale_that_other_units_read_too_is_not_learned() -> None:
    calibration = calibrate(build(Branches), IMAGES, configured("w4a4", "onnxruntime"))
    group = calibration.shared_inputs["block.conv1", "input"]
    assert ("block.add_1", "left") in group
    before = grids(calibration.layers["block.conv1"])
    adaquant(calibration, config=ReconstructionConfig(steps=5), granularity="layer")
    assert grids(calibration.layers["block.conv1"]) == before


class TwoCourses(Branches):
    """Leaves the block out for some batches, which is another course of the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last(torch.cat([self.block(x) if len(x) > 8 else x, x], 1)).mean((2, 3))


def test_readers_are_known_for_every_course_of_the_forward() -> None:
    batches = [IMAGES[0][:8], *IMAGES[1:]]
    calibration = calibrate(build(TwoCourses), batches, configured("w8a8", "onnxruntime"))
    assert calibration.varies
    assert calibration.shared_inputs["block.conv1", "input"] >= {("block.conv1", "input"), ("block.add_1", "left")}


def test_biases_stay_on_the_grid_of_the_accumulator() -> None:
    calibration = calibrate(build(ResNet), IMAGES, configured("w4a4", "onnxruntime"))

    def check() -> None:
        for op in calibration.layers.values():
            if op.bias_names and op.bias is not None:
                steps = op.bias / (op.input_fake_quant.scale * op.weight_fake_quant.scale.flatten())
                assert torch.allclose(steps, steps.round(), atol=1e-3)

    check()
    adaquant(calibration, config=ReconstructionConfig(steps=5))
    check()
    tune_bias(calibration, steps=5)
    check()
