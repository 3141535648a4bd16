"""What the stages after calibration need of a module: an output that can be read, compared and differentiated."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Snapshot, build, same_state, seeded, state, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_ptq
from lightning_ptq import (
    AdaQuantLayerwise,
    BitAllocator,
    CalibrationCapture,
    QConfig,
    ReconstructionConfig,
    StatsTuning,
    adaquant,
    calibrate,
    measure_sensitivity,
    para_normalize,
    reestimate_batch_norm,
    tune_bias,
)
from lightning_ptq.calibration.outputs import Meter, OutputReader
from lightning_ptq.errors import RolledBackWarning, SensitivityError, SkippedStepWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.checkpoint"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]

BATCHES = [seeded(seed, 64, 8) for seed in range(4)]
LOW = QConfig.parse("w2a2", first_last_bits=None)
WIDTHS = ["w8a8", "w2a2"]
STEPS = {
    "batch_norm": reestimate_batch_norm,
    "para_normalization": lambda calibration: para_normalize(calibration, every_layer=True),
    "bias": lambda calibration: tune_bias(calibration, steps=3),
}


class Net(nn.Module):
    """Three layers; a derived class changes what they compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def logits(self, x):
        return self.last(F.relu(self.inner(F.relu(self.first(x)))))

    def forward(self, x):
        return self.logits(x)


def fitted(pl: Any, net: type[nn.Module], root: Any, *callbacks: Any) -> Any:
    """A LightningModule that runs ``net``, after fit with these callbacks behind the calibration."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(net)

        def training_step(self, batch, i):
            self.net(batch)
            return batch.mean()

        def configure_optimizers(self):
            return None

    module = Module()
    fit = trainer(pl, root, CalibrationCapture(LOW), *callbacks)
    fitted.module, fitted.trainer = module, fit
    fit.fit(module, DataLoader(BATCHES, batch_size=None))
    return module


@dataclass
class Answer:
    logits: Any
    cache: list[Any] = field(default_factory=list)


Pair = namedtuple("Pair", ["logits", "hidden"])

OUTPUTS = {
    "mapping": lambda logits: {"hidden": logits[:, :2], "logits": logits},
    "mapping with a loss": lambda logits: {"loss": logits.sum(), "scores": logits},
    "tuple with a loss": lambda logits: (logits.sum(), logits),
    "dataclass": lambda logits: Answer(logits, [logits[:, :2], logits[:, :2]]),
    "named tuple": lambda logits: Pair(logits, logits[:, :2]),
    "lone entry": lambda logits: {"scores": logits, "labels": logits.argmax(-1)},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_logits_are_found_in_what_a_network_returns(kind):
    class Wrapped(Net):
        def forward(self, x):
            return OUTPUTS[kind](self.logits(x))

    calibration = calibrate(build(Wrapped), BATCHES, "w8a8")
    found, _ = OutputReader(calibration).read(lambda: calibration.run(0))
    torch.testing.assert_close(found, calibration.module.logits(BATCHES[0]), rtol=0, atol=0)


class Ambiguous(Net):
    def forward(self, x):
        return {"mean": self.logits(x), "deviation": self.logits(x)}


@pytest.mark.parametrize("stage", [
    lambda: BitAllocator(max_degradation=1.0, candidates=WIDTHS),
    lambda: StatsTuning(steps=2),
    lambda: StatsTuning(bias=False),
], ids=["allocator", "statistics", "no bias"])  # fmt: skip
def test_an_output_that_cannot_be_read_is_found_before_the_first_stage(pl, tmp_path, stage):
    stage = stage()
    tuning = AdaQuantLayerwise("parallel" if isinstance(stage, BitAllocator) else "sequential", steps=2)
    with pytest.raises(SensitivityError, match=r"keys \['mean', 'deviation'\]. Set output="):
        fitted(pl, Ambiguous, tmp_path, tuning, stage)
    assert tuning.result is None
    module = fitted.module
    before = Snapshot(module)
    hazards = lightning_ptq.inspect(module, BATCHES[0], trainer=fitted.trainer).hazards
    assert [hazard for hazard in hazards if "'deviation'" in hazard.message and stage.title in hazard.message]
    before.assert_unchanged()


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_the_check_changes_nothing_of_a_run(pl, tmp_path, monkeypatch):
    def run(root):
        allocator = BitAllocator(size=0.35, candidates=["w8a8", "w4a4"], rounds=1)
        return state(fitted(pl, Net, root, allocator, AdaQuantLayerwise(steps=2), StatsTuning(steps=2)))

    checked = run(tmp_path / "a")
    for stage in (BitAllocator, StatsTuning):
        monkeypatch.setattr(stage, "check", lambda *_: None)
    assert same_state(checked, run(tmp_path / "b"))


class Target(nn.Module):
    """Runs a copy of its layers last, without gradients, as self-supervised methods do."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = Net(), Net()

    def forward(self, x):
        with torch.no_grad():
            return self.online(x) + self.target(x)


class Leaving(Net):
    """Computes outside torch, which fails on tensors that carry gradients."""

    def forward(self, x):
        return self.last(torch.from_numpy(self.first(x).numpy())) + self.last(self.inner(self.first(x)))


class InPlace(Net):
    """Changes in place what its backward pass needs."""

    def forward(self, x):
        hidden = self.inner(self.first(x)).exp()
        y = self.last(hidden)
        hidden.mul_(2)
        return y


UNDIFFERENTIABLE = [(Target, "carr(y|ies) no gradient"), (Leaving, "differentiated.*numpy"), (InPlace, "inplace")]


@pytest.mark.parametrize(("net", "why"), UNDIFFERENTIABLE)
def test_an_output_that_cannot_be_differentiated_is_named_before_the_work(net, why):
    calibration = calibrate(build(net), BATCHES, "w2a2")
    before = state(calibration.module)
    with pytest.raises(SensitivityError, match=f"(?s){why}.*bias=False"):
        tune_bias(calibration)
    if net is not InPlace:  # whose calls are given copies of their outputs
        with pytest.raises(SensitivityError, match=f"(?s){why}.*'kl' or 'mse'"):
            measure_sensitivity(calibration, WIDTHS, measure="fisher")
    assert same_state(state(calibration.module), before)


@pytest.mark.parametrize(("net", "why"), UNDIFFERENTIABLE)
def test_bias_tuning_is_left_out_where_the_output_carries_no_gradient(pl, tmp_path, net, why):
    statistics = StatsTuning(steps=2)
    with pytest.warns(SkippedStepWarning, match=f"(?s)the step 'bias'.*{why}"):
        module = fitted(pl, net, tmp_path, statistics)
    assert [row.step for row in statistics.result] == list(STEPS)
    assert [math.isnan(row.before) for row in statistics.result] == [False, False, True]
    report = fitted.trainer.callbacks[0].report
    report.save(tmp_path / "report")
    assert "carr" in str(report.to_dict()) or net is not Target
    with torch.no_grad():
        assert torch.isfinite(module.net(BATCHES[0])).all()


class Ragged(Net):
    """Returns as many rows as pass a threshold."""

    def forward(self, x):
        hidden = self.first(x)
        hidden = self.inner(hidden[hidden.sum(-1) > 0])
        return self.last(hidden[hidden.sum(-1) > 0])


def test_outputs_of_different_shapes_are_not_compared():
    calibration = calibrate(build(Ragged), BATCHES, LOW)
    before = state(calibration.module)
    with pytest.raises(SensitivityError, match=r"shape \(\d+, 4\) when quantized, but \(\d+, 4\) in float.*output="):
        Meter(calibration, "mse", None).each()
    for step in STEPS.values():
        with pytest.raises(SensitivityError, match="when quantized"):
            step(calibration)
    for measure in ("kl", "mse", "fisher"):
        with pytest.raises(SensitivityError, match="when quantized"):
            measure_sensitivity(calibration, ["w2a2"], measure=measure)
    assert same_state(state(calibration.module), before)
    assert (
        tune_bias(calibration, steps=2, measure="mse", output=lambda found: found.sum(0, keepdim=True)).step == "bias"
    )


def test_a_stage_leaves_out_or_refuses_what_it_cannot_compare(pl, tmp_path):
    statistics, tuning = StatsTuning(steps=2), AdaQuantLayerwise("parallel", candidates=["w2a2"], steps=2)
    with pytest.warns(SkippedStepWarning, match="when quantized"):
        fitted(pl, Ragged, tmp_path / "a", statistics)
    assert all("when quantized" in row.skipped["every layer"] for row in statistics.result)
    allocator = BitAllocator(max_degradation=1.0, candidates=["w2a2"])
    with pytest.raises(SensitivityError, match="when quantized"):
        fitted(pl, Ragged, tmp_path / "b", tuning, allocator)
    assert tuning.result is None


def checkpointed(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            inner = lambda h: F.relu(self.inner(F.relu(h)))  # noqa: E731
            return self.last(checkpoint(inner, self.first(x), use_reentrant=reentrant))

    return Checkpointed


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_activations_change_nothing(reentrant):
    found = []
    for net in (Net, checkpointed(reentrant)):
        calibration = calibrate(build(net), BATCHES, "w2a2")
        rises = measure_sensitivity(calibration, WIDTHS, measure="fisher").rises
        tune_bias(calibration, steps=3, held_out=0)
        found.append((rises, state(calibration.module)))
    assert found[0][0] == found[1][0]
    assert same_state(found[0][1], found[1][1])


def test_a_step_that_makes_the_output_infinite_is_taken_back(monkeypatch):
    calibration = calibrate(build(Net), BATCHES, "w4a4")
    before = state(calibration.module)

    def spoil(normalizer, name, layer, *_):
        layer.bias.data.fill_(math.inf)
        normalizer.changes.layers.append(name)

    monkeypatch.setattr("lightning_ptq.statistics.normalization._Normalizer._correct", spoil)
    with pytest.warns(RolledBackWarning, match="'para_normalization' of statistics tuning was undone.* nan"):
        assert not para_normalize(calibration).accepted
    assert same_state(state(calibration.module), before)


def test_bias_tuning_in_half_precision_leaves_a_finite_module():
    calibration = calibrate(build(Net).half(), [x.half() for x in BATCHES], "w4a4")
    with pytest.warns(RolledBackWarning, match="'bias' of statistics tuning was undone"):
        tune_bias(calibration, steps=3)
    assert torch.isfinite(calibration.run(0)).all()


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_left_out_where_the_output_is_not_finite_before_it(step):
    calibration = calibrate(build(Net), BATCHES, "w4a4")
    calibration.module.last.bias.data.fill_(math.nan)
    with pytest.warns(SkippedStepWarning, match=f"the step '{step}'.*the kl of the outputs is nan before it"):
        result = STEPS[step](calibration)
    assert (result.step, result.accepted, result.layers) == (step, False, ())


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.parametrize("entered", ["all", "tuning"])
def test_inference_mode_does_not_keep_from_tuning(entered):
    def run(net):
        adaquant(net, config=ReconstructionConfig(steps=5))
        measure_sensitivity(net, WIDTHS, measure="fisher")
        assert tune_bias(net, steps=3, held_out=0).layers
        return state(net.module)

    expected = run(calibrate(build(Net), BATCHES, "w2a2"))
    net, batches = build(Net), copy.deepcopy(BATCHES)
    calibration = calibrate(net, batches, "w2a2") if entered == "tuning" else None
    with torch.inference_mode():
        calibration = calibration or calibrate(net, [x.clone() for x in batches], "w2a2")
        found = run(calibration)
        assert torch.is_inference_mode_enabled()
    assert same_state(found, expected)
    assert not any(tensor.is_inference() for tensor in net.state_dict().values())
