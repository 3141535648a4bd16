"""Padding takes part in no range, loss or statistic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import build, classifier, seeded, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ptq import (
    CalibrationCapture,
    ReconstructionConfig,
    adaquant,
    calibrate,
    para_normalize,
    tune_bias,
)
from lightning_ptq.calibration.outputs import divergence
from lightning_ptq.calibration.padding import real_positions, where_real
from lightning_ptq.errors import CalibrationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnsupportedLayerWarning"),
]

LENGTHS = torch.tensor([10, 3, 7, 5, 10, 4, 8, 6])


class Encoder(nn.Module):
    """One transformer block on token ids; padding has large embeddings, so that it shows wherever it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 5)
        with torch.no_grad():
            self.embedding.weight[0] *= 20

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = (f(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / 8**0.5
        weights = scores.masked_fill(attention_mask[:, None, None] == 0, -torch.inf).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(x.shape)
        return self.head(x + self.mlp(x))


def batches(padding: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        mask = (torch.arange(10 + padding) < LENGTHS[:, None]).long()
        ids = torch.randint(1, 30, (8, 10), generator=generator)
        found.append({"input_ids": nn.functional.pad(ids, (0, padding)) * mask, "attention_mask": mask})
    return found


def scales(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if "fake_quant" in key}


def close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[key].float(), right[key].float(), rtol=tolerance, atol=0) for key in left
    )


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_more_padding_changes_no_scale(granularity):
    found = []
    for padding in (0, 10):
        calibration = calibrate(build(Encoder).eval(), batches(padding), "w4a4")
        start = scales(calibration.module)
        config = ReconstructionConfig(steps=10, drop=0.0)  # numbers are drawn for padding too
        result = adaquant(calibration, granularity=granularity, config=config)
        para_normalize(calibration, measure="mse")
        tune_bias(calibration, steps=3, measure="mse")
        found.append((start, scales(calibration.module), [row.error_after for row in result.units]))
    for start, end, errors in found[1:]:
        assert close(start, found[0][0], 1e-6)
        assert close(end, found[0][1], 1e-2)
        assert errors == pytest.approx(found[0][2], rel=1e-2)


def test_without_the_mask_padding_counts():
    with_mask = calibrate(build(Encoder).eval(), batches(10), "w4a4")
    everything = calibrate(
        build(Encoder).eval(), batches(10), "w4a4", mask=lambda batch: torch.ones_like(batch["input_ids"])
    )
    ratio = everything.layers["query"].input_fake_quant.scale / with_mask.layers["query"].input_fake_quant.scale
    assert ratio > 3


def test_a_key_and_a_function_are_what_is_found():
    found = calibrate(build(Encoder).eval(), batches(5), "w4a4")
    for mask in ("attention_mask", lambda batch: batch["attention_mask"].bool(), lambda b: b["input_ids"] != 0):
        again = calibrate(build(Encoder).eval(), batches(5), "w4a4", mask=mask)
        assert close(scales(again.module), scales(found.module), 0)


def test_the_callback_takes_a_mask(tmp_path):
    import pytorch_lightning as pl

    module = classifier(pl)
    module.net = build(Encoder).eval()
    expected = calibrate(copy.deepcopy(module.net), batches(5), "w4a4")

    def step(module: Any, batch: Any) -> Tensor:
        return module.net(batch["input_ids"], batch["real"])

    renamed = [{"input_ids": b["input_ids"], "real": b["attention_mask"]} for b in batches(5)]
    loader = DataLoader(renamed, batch_size=None)
    capture = CalibrationCapture("w4a4", step=step, mask="real", resume=False, save_checkpoint=False)
    trainer(pl, tmp_path, capture).fit(module, loader)
    assert close(scales(module.net), scales(expected.module), 0)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ("absent", r"mask='absent' is no key .*'attention_mask', 'input_ids'"),
        (lambda batch: 3, "gives a int"),
        (lambda batch: torch.ones(8), r"of shape \(8,\)"),
        (3, "must be a key of the batch or a function"),
        (lambda batch: torch.ones(7, 10), r"shape \(7, 10\).*8 samples"),
        (lambda batch: torch.ones(8, 4), r"shape \(8, 4\), which fits no activation.*inputs of the layers: \(8, "),
        (lambda batch: torch.ones(8, 3, 3), r"shape \(8, 3, 3\), which fits no activation"),
        (lambda batch: torch.zeros(8, 10), "marks all positions of a batch of 8 samples as padding"),
        (lambda batch: batch["absent"], "fails on a batch of type dict with KeyError: 'absent'"),
    ],
)
def test_wrong_masks_are_named(mask, told):
    with pytest.raises(CalibrationError, match=told):
        calibrate(build(Encoder).eval(), batches(0), "w4a4", mask=mask)


def test_positions_are_found_in_every_layout():
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    rows = seeded(0, 3, 5, 4)
    for tensor, back in [
        (rows, lambda x: x),
        (rows.transpose(0, 1), lambda x: x.transpose(0, 1)),
        (rows.flatten(0, 1), lambda x: x.view(3, 5, 4)),
        (rows.view(3, 5, 2, 2).transpose(1, 2), lambda x: x.transpose(1, 2).reshape(3, 5, 4)),
        (rows.view(3, 5, 2, 2).transpose(1, 2).flatten(0, 1), lambda x: x.view(3, 2, 5, 2).transpose(1, 2).flatten(2)),
        (rows.transpose(1, 2), lambda x: x.transpose(1, 2)),
    ]:
        real = where_real(tensor, mask)
        assert torch.equal(back(real.expand_as(tensor)), mask[:, :, None].expand(3, 5, 4))
    assert where_real(torch.zeros(3, 7), mask) is None
    assert where_real(torch.zeros(3, 5), mask) is None  # as many features as positions
    assert real_positions((rows, rows), None) is None


def test_outputs_are_compared_where_there_is_data():
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    output, target = seeded(0, 2, 5, 3), seeded(1, 2, 5, 3)
    for measure in ("kl", "mse"):
        whole = divergence(output, target, measure, mask)
        assert whole[0] == divergence(output[:1], target[:1], measure)[0]
        assert whole[1] == pytest.approx(float(divergence(output[1:, :2], target[1:, :2], measure)[0]))
