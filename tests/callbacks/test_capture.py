from __future__ import annotations

import functools
from typing import Any

import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from helpers import (
    IMAGES,
    LABELS,
    Snapshot,
    classifier,
    loader,
    same_state,
    state,
    trainer,
)
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, MetricCollection

import lightning_ptq
from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, QConfig, calibrate
from lightning_ptq.callbacks.trainer.resuming import fingerprint
from lightning_ptq.errors import CalibrationError, FewSamplesWarning, QConfigError, UnreachedLayerWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]

XS = IMAGES.split(8)


@functools.cache
def reference(pl, batches=XS, qconfig="w4a4", **options):
    """The state of the classifier calibrated by the function."""
    net = classifier(pl)
    calibrate(net, batches, qconfig, **options)
    return state(net)


def tuples(base):
    return base


def bare(base):
    class Bare(base):
        def training_step(self, x: Any, batch_idx: int) -> torch.Tensor:
            return self(x).square().mean()

    return Bare


def dictionaries(base):
    class Dictionaries(base):
        def forward(self, image: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(image)

        def training_step(self, batch: Any) -> torch.Tensor:  # without batch_idx, which Lightning allows
            return F.cross_entropy(self(batch["image"]), batch["label"])

    return Dictionaries


def wrapped(base):
    class Wrapped(base):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().training_step(*args, **kwargs)

    return Wrapped


def with_the_rest(base):
    class WithTheRest(base):
        def training_step(self, batch: Any, *rest: Any) -> torch.Tensor:
            return super().training_step(batch, *rest)

    return WithTheRest


def predicting(base):
    class Predicting(base):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
            return self(batch * 2)

    return Predicting


def of(samples, **options):
    return DataLoader(samples, 8, **options)


DICTIONARIES = [{"image": x, "label": y} for x, y in zip(IMAGES, LABELS, strict=True)]
CASES = {
    "tuples, training_step": (tuples, "training", loader, XS),
    "tuples, training_step of any arguments": (wrapped, "training", loader, XS),
    "tuples, training_step of a batch and the rest": (with_the_rest, "training", loader, XS),
    "tuples, forward": (tuples, "predict", loader, XS),
    "tuples, function": (tuples, lambda module, batch: module.net(batch[0] + 1), loader, [x + 1 for x in XS]),
    "tensors, training_step": (bare, "training", lambda: of(IMAGES), XS),
    "tensors, forward": (tuples, "predict", lambda: of(IMAGES), XS),
    "tensors, predict_step": (predicting, "predict", lambda: of(IMAGES), [x * 2 for x in XS]),
    "tensors, function": (tuples, lambda module, x: module(x), lambda: of(IMAGES), XS),
    "dictionaries, training_step": (dictionaries, "training", lambda: of(DICTIONARIES), XS),
    "dictionaries, forward": (dictionaries, "predict", lambda: of(DICTIONARIES), XS),
}


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *((case, "32-true") for case in CASES),
        *((case, "bf16-mixed") for case in ("tuples, training_step", "tensors, predict_step")),
    ],
)
def test_the_callback_calibrates_as_the_function_does(pl, tmp_path, case, precision):
    change, step, data, batches = CASES[case]
    module = classifier(pl, change)
    trainer(pl, tmp_path, CalibrationCapture("w4a4", step=step), precision=precision).fit(module, data())
    assert same_state(state(module), reference(pl, tuple(batches)))


@pytest.mark.parametrize("num_samples", [1, 16, 17])
def test_the_pass_ends_behind_the_batch_that_completes_num_samples(pl, tmp_path, num_samples):
    seen = []

    def step(module, batch):
        seen.append(len(batch[0]))
        return module(batch[0])

    module = classifier(pl)
    capture = CalibrationCapture("w4a4", num_samples=num_samples, step=step)
    trainer(pl, tmp_path, capture).fit(module, loader())
    assert same_state(state(module), reference(pl, num_samples=num_samples))
    once = (num_samples + 7) // 8
    assert seen[:once] == [8] * once
    assert capture.calibration.samples == 8 * once


def test_a_loader_that_ends_early_warns(pl, tmp_path):
    module = classifier(pl)
    with pytest.warns(FewSamplesWarning, match="40 samples, 41 were asked"):
        trainer(pl, tmp_path, CalibrationCapture("w4a4", num_samples=41)).fit(module, loader())
    assert same_state(state(module), reference(pl))


OPTIONS = {
    "overrides": {"overrides": {"net.7": "w3a5"}},
    "exclude": {"exclude": ["net.3"]},
    "edges": {"first_last_bits": None},
    "symmetric": {"symmetric_activations": True},
    "observers": {"weight_observer": "minmax", "activation_observer": "percentile", "percentile": 95.0},
    "scales": {"signed_scales": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_reach_the_qconfig(pl, tmp_path, options):
    module = classifier(pl)
    trainer(pl, tmp_path, CalibrationCapture("w4a4", **options)).fit(module, loader())
    found = reference(pl, qconfig=QConfig.parse("w4a4", **options))
    assert same_state(state(module), found)
    assert not same_state(found, reference(pl))


def test_a_qconfig_and_its_dictionary_are_taken_too():
    config = QConfig.parse("w4a4", exclude=["net.3"])
    assert CalibrationCapture(config).qconfig == CalibrationCapture(config.to_dict()).qconfig == config


BAD = [
    ({"qconfig": "w9a4"}, QConfigError, "bits must be a whole number from 2 to 8, got 9"),
    ({"qconfig": "int8"}, QConfigError, "cannot read 'int8' as bit widths"),
    ({"overrides": {"head": "w1a1"}}, QConfigError, "got 1"),
    ({"exclude": "head"}, QConfigError, r"Write \['head'\]"),
    ({"first_last_bits": 16}, QConfigError, "got 16"),
    ({"activation_observer": "max"}, QConfigError, "observer must be one of"),
    ({"percentile": 5}, QConfigError, r"percentile must lie in \(50, 100\], got 5"),
    ({"num_samples": 0}, CalibrationError, "num_samples must be 1 or more, got 0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        CalibrationCapture(**options)


def manual(step):
    """A module that optimises by itself, in the way that ``step`` does."""

    def change(base):
        class Manual(base):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.own = torch.optim.SGD(self.net.parameters(), lr=0.1)

            def training_step(self, batch: Any, batch_idx: int) -> None:
                step(self, self.loss(batch))

        return Manual

    return change


def backward_with_gradients(module, loss):
    with torch.enable_grad():
        module.net[9].weight.square().sum().backward()
    module.own.step()


MANUAL = {
    "optimizers": (lambda module, loss: module.optimizers().step(), r"self\.optimizers\(\)"),
    "lr_schedulers": (lambda module, loss: module.lr_schedulers().step(), r"self\.lr_schedulers\(\)"),
    "manual_backward": (lambda module, loss: module.manual_backward(loss), r"self\.manual_backward\(\)"),
    "backward": (lambda module, loss: loss.backward(), r"backward\(\)"),
    "step": (lambda module, loss: module.own.step(), "the step of an optimizer"),
    "step with gradients": (backward_with_gradients, "the step of an optimizer"),
}


@pytest.mark.parametrize(("step", "found"), MANUAL.values(), ids=MANUAL)
def test_a_training_step_that_optimises_is_refused_with_the_remedy(pl, tmp_path, step, found):
    module = classifier(pl, manual(step))
    before = Snapshot(module)
    with pytest.raises(CalibrationError, match=f"it called {found}.*step='predict', or step=function"):
        trainer(pl, tmp_path, CalibrationCapture("w4a4")).fit(module, loader())
    before.assert_unchanged()
    assert module.automatic_optimization is False
    assert [parameter.grad for parameter in module.parameters()] == [None] * len(list(module.parameters()))


def test_a_module_that_optimises_by_itself_is_calibrated_by_its_forward(pl, tmp_path):
    module = classifier(pl, manual(MANUAL["optimizers"][0]))
    trainer(pl, tmp_path, CalibrationCapture("w4a4", step="predict")).fit(module, loader())
    assert same_state(state(module), reference(pl))
    assert module.automatic_optimization is False


def iterating(base):
    class Iterating(base):
        def training_step(self, dataloader_iter: Any) -> None:
            next(dataloader_iter)

    return Iterating


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        ("train", tuples, "step must be 'training', 'predict' or a function of module and batch, got 'train'"),
        ("training", iterating, "takes a dataloader_iter.*Pass step=function"),
    ],
)
def test_a_step_that_cannot_be_run_is_refused(pl, tmp_path, step, change, message):
    module = classifier(pl, change)
    before = Snapshot(module)
    with pytest.raises(CalibrationError, match=message):
        trainer(pl, tmp_path, CalibrationCapture("w4a4", step=step)).fit(module, loader())
    before.assert_unchanged()


def untrainable(base):
    """Every part of the training that calibration has to leave alone raises."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a part of the training ran")

    names = [
        "configure_optimizers", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "backward",
        "configure_gradient_clipping", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
        "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
        "on_before_optimizer_step",
    ]  # fmt: skip
    return type("Untrainable", (base,), dict.fromkeys(names, refuse))


def test_no_part_of_the_training_runs(pl, tmp_path):
    module = classifier(pl, untrainable)
    options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2}
    trainer(pl, tmp_path, CalibrationCapture("w4a4"), **options).fit(module, loader())
    assert same_state(state(module), reference(pl))


def measuring(base):
    class Measuring(base):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.metrics(batch[1].float())
            return super().training_step(batch, batch_idx)

    return Measuring


def test_metrics_that_the_step_updates_keep_their_states(pl, tmp_path):
    module = classifier(pl, measuring)
    module.seen.update(torch.tensor([5.0, 7.0]))
    module.metrics.update(torch.tensor([2.0, 4.0]))
    trainer(pl, tmp_path, CalibrationCapture("w4a4")).fit(module, loader())
    assert module.seen.compute() == 6
    assert module.seen.update_count == 1
    assert module.metrics.compute()["mean"] == 3
    assert module.metrics.compute()["all"].tolist() == [2, 4]
    module.metrics.update(torch.tensor([9.0]))
    assert module.metrics.compute()["mean"] == 5


def test_an_unreached_layer_is_named(pl, tmp_path):
    capture = CalibrationCapture("w4a4", step=lambda module, batch: module.net[3](module.net[0](batch[0])))
    with pytest.warns(UnreachedLayerWarning, match=r"net\.7, net\.9"):
        trainer(pl, tmp_path, capture).fit(classifier(pl), loader())


def test_the_calibration_is_at_hand_for_other_callbacks_and_let_go_in_the_end(pl, tmp_path):
    class Other(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            held.append((len(capture.calibration.batches), capture.calibration.layers["net.3"].reference is not None))

    held: list[Any] = []
    capture = CalibrationCapture("w4a4")
    trainer(pl, tmp_path, capture, Other()).fit(classifier(pl), loader())
    assert held == [(5, True)]
    assert len(capture.calibration.batches) == 0
    assert capture.calibration.layers["net.3"].reference is None


HOOKS = [
    "setup fit",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown fit",
]


def test_fit_calls_the_hooks_in_this_order(pl, tmp_path, monkeypatch):
    def recording(name: str) -> Any:
        own = getattr(CalibrationCapture, name)

        def hook(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(" ".join([name, *[a for a in (*args, *kwargs.values()) if isinstance(a, str)]]))
            return own(self, trainer, pl_module, *args, **kwargs)

        return hook

    called: list[str] = []
    capture = CalibrationCapture("w4a4")
    for name in dir(pl.Callback):
        if name.startswith("on_") or name in ("setup", "teardown"):
            monkeypatch.setattr(CalibrationCapture, name, recording(name), raising=False)
    run = trainer(pl, tmp_path, capture, num_sanity_val_steps=1, limit_val_batches=1, limit_train_batches=2)
    run.fit(classifier(pl), loader(), loader())
    assert called == HOOKS


def test_a_run_creates_no_attribute(pl, tmp_path):
    capture = CalibrationCapture("w4a4")
    before = set(vars(capture))
    trainer(pl, tmp_path, capture).fit(classifier(pl), loader())
    assert set(vars(capture)) - {"log", "log_dict"} == before  # the Trainer adds these two


def test_progress_is_that_of_this_version_of_the_library(monkeypatch):
    calibration = calibrate(classifier(pytorch_lightning), XS, "w4a4")
    before = fingerprint(calibration)
    assert fingerprint(calibration) == before
    monkeypatch.setattr(lightning_ptq, "__version__", "0.0.0")
    assert fingerprint(calibration) != before


def test_a_derived_callback_is_one_too(pl, tmp_path):
    class Mine(CalibrationCapture):
        pass

    module = classifier(pl)
    trainer(pl, tmp_path, Mine("w4a4")).fit(module, loader())
    assert same_state(state(module), reference(pl))


WITH_INDEX = {
    "required": lambda base, seen: {"training_step": lambda m, batch, batch_idx: see(m, batch, seen, batch_idx)},
    "with a default": lambda base, seen: {
        "training_step": lambda m, batch, batch_idx=7: see(m, batch, seen, batch_idx)
    },
    "a wrapper": lambda base, seen: {"training_step": lambda m, batch, *args: see(m, batch, seen, *args)},
    "another default": lambda base, seen: {"training_step": lambda m, batch, scale=7: see(m, batch, seen, scale - 7)},
}


def see(module, batch, seen, index):
    seen.append((index, batch[0][0, 0, 0, 0].item()))
    return module.loss(batch)


@pytest.mark.parametrize("kind", WITH_INDEX)
def test_a_step_gets_the_index_of_its_batch_in_every_run(pl, tmp_path, kind):
    seen = []
    module = classifier(pl, lambda base: type("Indexed", (base,), WITH_INDEX[kind](base, seen)))
    tuner = AdaQuantLayerwise(steps=2, memory_limit=1)  # activations are computed again
    trainer(pl, tmp_path, CalibrationCapture("w4a4", 24), tuner).fit(module, loader())
    first = enumerate(IMAGES[::8, 0, 0, 0].tolist()[:3])
    if kind == "another default":
        assert {index for index, _ in seen} == {0}
        return
    assert set(seen) == set(first)
    assert [index for index, _ in seen] != sorted(index for index, _ in seen)  # there were replays


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
def test_a_run_that_fails_before_anything_is_finished_leaves_no_progress(pl, tmp_path):
    def failing(module, batch, calls=[0]):  # noqa: B006  (the count of all calls)
        calls[0] += 1
        if calls[0] == 16:
            raise KeyError("mine")
        return module(batch[0])

    with pytest.raises(KeyError):
        trainer(pl, tmp_path, CalibrationCapture("w4a4", step=failing), AdaQuantLayerwise(steps=2)).fit(
            classifier(pl), loader()
        )
    assert not (tmp_path / "ptq_progress").exists()
    trainer(pl, tmp_path, CalibrationCapture("w4a4"), AdaQuantLayerwise(steps=2)).fit(classifier(pl), loader())
