"""quantize: the one-call way in."""

from __future__ import annotations

import pytest
import torch
from helpers import IMAGES, Snapshot, classifier, loader, same_state, state, trainer

from callbacks.test_validation import teacher
from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, load_packed, quantize, save_packed
from lightning_ptq.errors import AllocationError, PTQError, QConfigError, SurgeryError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


@pytest.mark.parametrize(("qconfig", "tuned"), [("w8a8", False), ("w4a4", True), ("w4", True)])
def test_it_does_what_the_callbacks_do(pl, tmp_path, monkeypatch, qconfig, tuned):
    monkeypatch.chdir(tmp_path)
    module, other = classifier(pl), classifier(pl)
    report = quantize(module, loader(), qconfig=qconfig, trainer=QUIET)
    callbacks = [CalibrationCapture(qconfig), *([AdaQuantLayerwise()] if tuned else [])]
    trainer(pl, tmp_path / "other", *callbacks).fit(other, loader())
    assert same_state(state(module), state(other))
    assert [stage.name for stage in report.stages] == ["Calibration", *(["AdaQuant sequential"] if tuned else [])]
    assert [path.name for path in tmp_path.iterdir() if path.name != "other"] == []


def test_validation_data_gives_the_metrics_of_both_modules(pl):
    module, data = teacher(pl)
    report = quantize(module, loader(), data, trainer=QUIET)
    assert {change.name for change in report.metrics} == {"val_acc", "val_loss"}


def test_an_accepted_drop_gives_the_smallest_model_within(pl, tmp_path):
    module, data = teacher(pl)
    report = quantize(module, loader(), data, max_drop=0.1, metric="val_acc", report_dir=str(tmp_path), trainer=QUIET)
    (chosen,) = [trial for trial in report.trials if trial.chosen]
    (change,) = [change for change in report.metrics if change.name == "val_acc"]
    assert change.before - change.after <= 0.1
    assert change.after == pytest.approx(chosen.value)
    assert (tmp_path / "report.html").exists()
    with torch.no_grad():
        expected = module.eval()(IMAGES)
    save_packed(module, tmp_path / "packed.safetensors")
    assert torch.equal(load_packed(classifier(pl), tmp_path / "packed.safetensors").eval()(IMAGES), expected)


def test_a_size_gives_a_model_of_that_size(pl):
    module = classifier(pl)
    report = quantize(module, loader(), size=0.3, allocator={"candidates": ["w8a8", "w2a8"]}, trainer=QUIET)
    assert report.allocation is not None
    assert set(report.allocation.allocation.choice.values()) <= {"w8a8", "w2a8"}
    assert report.packed_bytes <= 0.3 * report.float_bytes
    assert "AdaQuant sequential" in report.tuning


def test_arguments_of_callbacks_and_trainer_are_passed_on(pl):
    class Counting(pl.Callback):
        batches = 0

        def on_train_batch_end(self, *args, **kwargs):
            self.batches += 1

    counting = Counting()
    report = quantize(
        classifier(pl), loader(), qconfig="w4a8", tune=False, num_samples=16,
        capture={"step": "predict", "first_last_bits": None}, trainer={**QUIET, "callbacks": [counting]},
    )  # fmt: skip
    assert counting.batches == 2
    assert report.samples == 16
    assert {row.widths for row in report.layers} == {"w4a8"}
    assert not report.tuning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.1}, "metric='val_acc'"),
        ({"metric": "val_acc"}, "metric='val_acc'"),
        ({"max_drop": 0.1, "metric": "val_acc"}, "needs validation data"),
        ({"max_drop": 0.1, "metric": "val_acc", "size": 0.2}, "Give one of them"),
        ({"size": "20%"}, "20%"),
        ({"qconfig": "w4x"}, "cannot read 'w4x'"),
        ({"tune": "yes"}, "tune must be True or False"),
        ({"seed": "0"}, "seed"),
        ({"capture": {"qconfig": "w4a4"}}, "does not take here"),
        ({"allocator": {"rounds": 1}}, "has no goal"),
        ({"trainer": {"gpus": 1}}, "does not take here"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_to_write(pl, options, message):
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(PTQError, match=message) as caught:
        quantize(module, loader(), **{"trainer": QUIET, "qconfig": "w4a4", **options})
    assert isinstance(caught.value, (QConfigError, AllocationError))
    before.assert_unchanged()


def test_another_module_is_told_the_functions():
    with pytest.raises(SurgeryError, match=r"Linear is no LightningModule.*calibrate\(module"):
        quantize(torch.nn.Linear(2, 2), loader())


def test_it_takes_the_trainer_of_the_modules_own_package(pl):
    module = classifier(pl)
    quantize(module, loader(), trainer=QUIET)
    assert type(module.trainer).__module__.split(".trainer")[0] == pl.__name__
