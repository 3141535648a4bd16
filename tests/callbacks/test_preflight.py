from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import IMAGES, LABELS, SmallNet, Snapshot, build, classifier, loader, rng_state, same_state, state, trainer

import lightning_ptq
from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, QConfig, StatsTuning
from lightning_ptq.errors import CalibrationError, CallbackError, PTQError
from lightning_ptq.network.prepare import is_prepared
from lightning_ptq.report.inspect_module import inspect_module

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]

BATCH = (IMAGES[:8], LABELS[:8])


def usual(pl, root, *callbacks, **options):
    """A Trainer as a user has it, with checkpoints."""
    callbacks = callbacks or (CalibrationCapture("w4a4", num_samples=40), AdaQuantLayerwise(steps=2))
    return trainer(pl, root, *callbacks, **{"enable_checkpointing": True, **options})


def abouts(found):
    return [hazard.category for hazard in found.hazards]


def test_a_usual_trainer_is_no_hazard(pl, tmp_path):
    found = lightning_ptq.inspect(classifier(pl), BATCH, trainer=usual(pl, tmp_path))
    assert found.hazards == found.warnings == []
    assert found.covered == 1


def test_the_settings_are_those_of_the_callbacks(pl, tmp_path):
    tuning = AdaQuantLayerwise(granularity="layer", steps=7, memory_limit="1MiB")
    capture = CalibrationCapture("w3a5", num_samples=48, first_last_bits=None)
    here = usual(pl, tmp_path, capture, AdaQuantLayerwise("parallel", steps=3), tuning)
    found = lightning_ptq.inspect(classifier(pl), BATCH, trainer=here)
    assert (found.samples, {layer.widths for layer in found.layers}) == (48, {"w3a5"})
    assert [unit.steps for unit in found.units] == [7, 7, 7, 7]
    assert found.plan.limit == 2**20
    other = lightning_ptq.inspect(classifier(pl), BATCH, "w4a4", samples=16, granularity="block", trainer=here)
    assert (other.samples, [layer.widths for layer in other.layers]) == (16, ["w8a8", "w4a4", "w4a4", "w8a8"])


def test_without_a_trainer_the_defaults_hold(pl):
    found = lightning_ptq.inspect(classifier(pl), BATCH)
    assert (found.samples, found.hazards, found.plan.limit) == (1024, [], 2**28)
    assert [layer.widths for layer in found.layers] == ["w8a8", "w4a4", "w4a4", "w8a8"]
    assert [layer.name for layer in found.layers] == ["net.0", "net.3", "net.7", "net.9"]


def test_a_lightning_module_and_its_net_have_the_same_work(pl):
    inside = lightning_ptq.inspect(classifier(pl), BATCH)
    alone = lightning_ptq.inspect(build(SmallNet), BATCH)
    assert [layer.macs for layer in inside.layers] == [layer.macs for layer in alone.layers] == [900, 1296, 288, 24]


@pytest.mark.parametrize("step", ["training", "predict", lambda module, batch: module.net(batch[0])])
def test_the_module_is_as_it_was_and_fits_as_ever(pl, tmp_path, step):
    module, untouched = classifier(pl).train(), classifier(pl).train()
    here = usual(pl, tmp_path)
    before, rng, seen = Snapshot(module), rng_state(), dict(vars(module.seen))
    lightning_ptq.inspect(module, BATCH, step=step, trainer=here)
    before.assert_unchanged()
    assert rng_state() == rng
    assert module._trainer is None
    assert vars(module.seen).keys() == seen.keys()
    assert (module.seen.mean_value.item(), module.seen._update_count) == (0, 0)
    here.fit(module, loader())
    usual(pl, tmp_path).fit(untouched, loader())
    assert same_state(state(module), state(untouched))


def test_a_step_may_look_at_its_trainer(pl, tmp_path):
    def looking(base):
        class Looking(base):
            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                return super().training_step(batch, batch_idx) * self.trainer.max_epochs

        return Looking

    module = classifier(pl, looking)
    assert lightning_ptq.inspect(module, BATCH, trainer=usual(pl, tmp_path)).hazards == []
    assert module._trainer is None


def test_a_step_that_trains_is_refused_and_the_module_as_it_was(pl):
    def manual(base):
        class Manual(base):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                self.optimizers().step()

        return Manual

    module = classifier(pl, manual)
    before = Snapshot(module)
    with pytest.raises(CalibrationError, match="runs its own optimization"):
        lightning_ptq.inspect(module, BATCH)
    before.assert_unchanged()


def test_a_plain_module(pl):
    net = build(SmallNet)
    qconfig = QConfig.parse("w4a8", exclude=["3"])
    found, expected = lightning_ptq.inspect(net, BATCH, qconfig), inspect_module(net, BATCH, qconfig)
    assert found.layers == expected.layers
    doubled = lightning_ptq.inspect(net, BATCH, step=lambda net, batch: (net(batch[0]), net(batch[0])))
    assert doubled.macs == 2 * found.macs
    with pytest.raises(CalibrationError, match="step must be 'training', 'predict' or a function"):
        lightning_ptq.inspect(net, BATCH, step="validation")


def without(name):
    """The classifier without one of its methods."""

    def change(base):
        lightning_module = next(cls for cls in base.__mro__ if cls.__name__ == "LightningModule")
        return type("Without", (base,), {name: getattr(lightning_module, name)})

    return change


def callback(name, *args):
    return lambda pl: getattr(importlib.import_module(f"{pl.__name__}.callbacks"), name)(*args)


def capture(pl):
    return CalibrationCapture("w4a4", num_samples=40)


def holder(pl):
    """A callback that keeps an averaged model of torch."""

    class Holder(pl.Callback):
        def __init__(self):
            self.copy = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1))

    return Holder()


# What is odd about the Trainer or the module, what the hazard is about, and a word of its text. Of each the test makes
# sure that fit really ends with an error.
ENDS = {
    "no capture": ([lambda pl: AdaQuantLayerwise()], {}, None, "refused", "CalibrationCapture"),
    "order": (
        [capture, lambda pl: AdaQuantLayerwise(), lambda pl: BitAllocator(size=0.2)], {}, None, "refused", "order",
    ),
    "precision": ([capture], {"precision": "bf16-true"}, None, "refused", "float32"),
    "max_epochs": ([capture], {"max_epochs": 0}, None, "refused", "max_epochs=0"),
    "max_steps": ([capture], {"max_steps": 0}, None, "refused", "max_steps=0"),
    "limit 0": ([capture], {"limit_train_batches": 0}, None, "refused", "limit_train_batches=0"),
    "training_step": ([lambda pl: CalibrationCapture(step="predict")], {}, "training_step", "refused", "training_step"),
    "configure_optimizers": ([capture], {}, "configure_optimizers", "refused", "configure_optimizers"),
    "early stopping": (
        [capture, callback("EarlyStopping", "train_loss")], {"limit_val_batches": 0}, None, "refused", "'train_loss'",
    ),
    "accumulation": (
        [capture, callback("GradientAccumulationScheduler", {0: 2})], {}, None, "refused", "Accumulation",
    ),
    "float copy": ([capture, callback("EMAWeightAveraging")], {}, None, "refused", "keeps a float copy"),
    "weight averaging": ([capture, callback("WeightAveraging")], {}, None, "refused", "WeightAveraging"),
    "learning rate": ([capture, callback("LearningRateFinder")], {}, None, "refused", "LearningRateFinder"),
    "batch size": ([capture, callback("BatchSizeFinder")], {}, None, "refused", "BatchSizeFinder needs"),
    "finetuning": ([capture, callback("BackboneFinetuning")], {}, None, "refused", "gives layers to an optimizer"),
    "pruning": (
        [capture, lambda pl: callback("ModelPruning", "l1_unstructured")(pl)], {}, None, "refused", "does not train",
    ),
    "averaged model": ([capture, lambda pl: holder(pl)], {}, None, "refused", "Holder keeps a float copy"),
    "a name": ([capture, lambda pl: type("EMACallback", (pl.Callback,), {})()], {}, None, "refused", "EMACallback"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_hazard_that_ends_fit(pl, tmp_path, name):
    makes, options, lacks, about, text = ENDS[name]
    module = classifier(pl, without(lacks)) if lacks else classifier(pl)
    module.lr = 0.1  # which the learning rate finder asks for
    if name in ("float copy", "weight averaging") and not hasattr(
        importlib.import_module(f"{pl.__name__}.callbacks"), "EMAWeightAveraging"
    ):
        pytest.skip("this Lightning has no WeightAveraging")
    here = usual(pl, tmp_path, *(make(pl) for make in makes), **options)
    found = lightning_ptq.inspect(module, BATCH, samples=40, trainer=here)
    assert abouts(found) == [about]
    assert text in found.hazards[0].message
    before = Snapshot(module)
    with pytest.raises(Exception) as raised:  # noqa: PT011  (Lightning's own errors are of many classes)
        here.fit(module, loader())
    if lacks is None and name != "batch size":  # Lightning's own checks of these come before any callback
        assert (type(raised.value).__mro__[1], str(raised.value)) == (PTQError, found.hazards[0].message)
    if "precision" not in options:
        before.assert_unchanged()


@pytest.mark.parametrize("option", ["max_epochs", "limit_train_batches"])
def test_everything_that_stops_fit_is_listed(pl, tmp_path, option):
    here = usual(pl, tmp_path, capture(pl), callback("LearningRateFinder")(pl), **{option: 0})
    found = lightning_ptq.inspect(classifier(pl), BATCH, trainer=here)
    assert abouts(found) == ["refused", "refused"]


def with_metric(name):
    """The classifier with a metric of another name in validation."""

    def change(base):
        class WithMetric(base):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                super().validation_step(batch, batch_idx)
                self.log("accuracy", 1.0)
                self.log(name, 1.0)

        return WithMetric

    return change


STOPPING = {
    "logged": ("accuracy", True, {}, False),
    "logged by a name that is made up": ("made_up", True, {}, False),
    "no validation loader": ("accuracy", False, {}, True),
    "no validation": ("accuracy", True, {"limit_val_batches": 0}, True),
    "logged in training only": ("train_loss", True, {}, True),
}


@pytest.mark.parametrize("name", STOPPING)
@pytest.mark.parametrize("num_samples", [None, 16])
def test_early_stopping_needs_a_metric_of_validation(pl, tmp_path, name, num_samples):
    monitor, has_loader, options, refused = STOPPING[name]
    module = classifier(pl, with_metric("made_up"))
    callbacks = (CalibrationCapture("w8a8", num_samples), callback("EarlyStopping", monitor)(pl))
    here = usual(pl, tmp_path, *callbacks, **options)
    found = lightning_ptq.inspect(module, BATCH, samples=16, trainer=here)
    # What validation logs is known only after the float module has been validated, at the start of fit.
    assert abouts(found) == (["refused"] if options else [])
    before = Snapshot(module)
    if refused:
        with pytest.raises(
            CallbackError, match=rf"monitors '{monitor}', which no validation .* Leave EarlyStopping out"
        ):
            here.fit(module, loader(), loader() if has_loader else None)
        before.assert_unchanged()
    else:
        here.fit(module, loader(), loader())
        assert is_prepared(module)


def test_callbacks_that_a_run_can_do_with_are_not_refused(pl, tmp_path):
    callbacks = [callback("EarlyStopping", "nothing")(pl), callback("ModelCheckpoint")(pl)]
    callbacks[0].strict = False
    callbacks[1].monitor = "nothing"  # it is not evaluated: quantized.ckpt is written without a training step
    exceptions = callback("OnExceptionCheckpoint", tmp_path / "exceptions")(pl)
    module, here = classifier(pl), usual(pl, tmp_path, capture(pl), *callbacks, exceptions)
    assert lightning_ptq.inspect(module, BATCH, trainer=here).hazards == []
    here.fit(module, loader())
    assert len(list(tmp_path.rglob("quantized.ckpt"))) == 1


def test_an_average_that_is_made_at_the_start_of_fit_is_refused_before_the_calibration(pl, tmp_path):
    class Late(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1))

    module, seen = classifier(pl), []
    before = Snapshot(module)
    step = CalibrationCapture("w4a4", step=lambda module, batch: seen.append(1))
    with pytest.raises(CallbackError, match="Late keeps a float copy"):
        usual(pl, tmp_path, step, Late()).fit(module, loader())
    before.assert_unchanged()
    assert seen == []


@pytest.mark.parametrize(
    ("options", "text", "samples"),
    [
        ({"limit_train_batches": 2}, "limit_train_batches=2: with batches of 8 only 16 samples", 16),
        ({"limit_train_batches": 0.4}, "limit_train_batches=0.4: only that share", 16),
        ({"fast_dev_run": True}, "fast_dev_run=1: with batches of 8 only 8 samples", 8),
        ({"overfit_batches": 3}, "overfit_batches=3: with batches of 8 only 24 samples", 24),
    ],
)
def test_a_trainer_that_sees_too_little(pl, tmp_path, options, text, samples):
    seen = []

    class Watching(CalibrationCapture):
        def on_train_end(self, trainer, pl_module):
            seen.append(self.calibration.samples)
            super().on_train_end(trainer, pl_module)

    module, here = classifier(pl), usual(pl, tmp_path, Watching("w4a4", num_samples=40), **options)
    found = lightning_ptq.inspect(module, BATCH, trainer=here)
    assert abouts(found) == ["samples"]
    assert text in found.hazards[0].message
    here.fit(module, loader())
    assert seen == [samples]


def test_a_trainer_that_leaves_no_checkpoint(pl, tmp_path):
    module, here = classifier(pl), usual(pl, tmp_path, enable_checkpointing=False)
    assert abouts(lightning_ptq.inspect(module, BATCH, trainer=here)) == ["checkpoint"]
    here.fit(module, loader())
    assert not list(tmp_path.rglob("quantized.ckpt"))
    knowing = usual(pl, tmp_path, CalibrationCapture(save_checkpoint=False), enable_checkpointing=False)
    assert lightning_ptq.inspect(classifier(pl), BATCH, trainer=knowing).hazards == []


def test_more_processes_than_parts(pl, tmp_path):
    two = {"devices": 2, "strategy": "ddp"}
    assert lightning_ptq.inspect(classifier(pl), BATCH, trainer=usual(pl, tmp_path, **two)).hazards == []
    one_part = usual(pl, tmp_path, CalibrationCapture(), AdaQuantLayerwise(parts=1), **two)
    (hazard,) = lightning_ptq.inspect(classifier(pl), BATCH, trainer=one_part).hazards
    assert hazard.category == "devices"
    assert hazard.remedy == "Write AdaQuantLayerwise(parts=2)."


@pytest.mark.parametrize(
    ("stages", "remedies"),
    [
        (lambda: [StatsTuning()], ["StatsTuning"]),
        (lambda: [StatsTuning(bias=False)], []),
        (lambda: [StatsTuning(parts=4)], []),
        (lambda: [AdaQuantLayerwise(), StatsTuning()], ["AdaQuantLayerwise"]),
        (lambda: [AdaQuantLayerwise(), StatsTuning(parts=2)], ["AdaQuantLayerwise", "StatsTuning"]),
        (lambda: [AdaQuantLayerwise(parts=4), StatsTuning()], []),
    ],
)
def test_more_processes_than_parts_of_bias_tuning(pl, tmp_path, stages, remedies):
    here = usual(pl, tmp_path, CalibrationCapture(), *stages(), devices=4, strategy="ddp")
    hazards = lightning_ptq.inspect(classifier(pl), BATCH, trainer=here).hazards
    assert [hazard.category for hazard in hazards] == ["devices"] * len(remedies)
    assert [hazard.remedy for hazard in hazards] == [f"Write {name}(parts=4)." for name in remedies]


def test_mixed_precision_and_synchronised_norms(pl, tmp_path):
    here = usual(pl, tmp_path, precision="bf16-mixed", devices=2, strategy="ddp", sync_batchnorm=True)
    found = lightning_ptq.inspect(classifier(pl), BATCH, trainer=here)
    assert abouts(found) == ["precision", "batch norms"]


@pytest.mark.parametrize(
    ("device", "about", "text"), [("mps", "refused", "float64"), ("cuda", "accelerator", "estimated on cpu")]
)
def test_another_accelerator(pl, tmp_path, monkeypatch, device, about, text):
    here = usual(pl, tmp_path)
    monkeypatch.setattr(type(here.strategy), "root_device", SimpleNamespace(type=device))
    (hazard,) = lightning_ptq.inspect(classifier(pl), BATCH, trainer=here).hazards
    assert (hazard.category, text in hazard.message) == (about, True)


def test_no_room_for_the_progress(pl, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_ptq.callbacks.hazards.shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    found = lightning_ptq.inspect(classifier(pl), BATCH, trainer=usual(pl, tmp_path))
    assert abouts(found) == ["progress"]
    assert str(tmp_path / "ptq_progress") in found.hazards[0].message
    unrecorded = usual(pl, tmp_path, CalibrationCapture(resume=False), AdaQuantLayerwise())
    assert lightning_ptq.inspect(classifier(pl), BATCH, trainer=unrecorded).hazards == []


def test_a_folder_for_the_progress_that_cannot_be_written(pl, tmp_path):
    (tmp_path / "file").touch()
    here = usual(pl, tmp_path, CalibrationCapture(resume_dir=str(tmp_path / "file" / "deep")))
    (hazard,) = lightning_ptq.inspect(classifier(pl), BATCH, trainer=here).hazards
    with pytest.raises(CallbackError, match="resume_dir") as raised:
        here.fit(classifier(pl), loader())
    # The rest names the file that was tried.
    assert (hazard.category, hazard.message.split("(")[0]) == ("refused", str(raised.value).split("(")[0])


def test_a_trainer_that_would_train(pl, tmp_path):
    module, here = classifier(pl), trainer(pl, tmp_path, limit_train_batches=2)
    found = lightning_ptq.inspect(module, BATCH, trainer=here)
    assert [(hazard.category, hazard.message) for hazard in found.hazards if hazard.category == "callbacks"] == [
        ("callbacks", "the Trainer has no PTQ callback, so fit trains the module.")
    ]
    before = state(module)
    here.fit(module, loader())
    assert not same_state(state(module), before)
