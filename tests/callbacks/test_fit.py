from __future__ import annotations

import copy
import functools
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    IMAGES,
    LABELS,
    SmallNet,
    Snapshot,
    build,
    classifier,
    classifier_class,
    loader,
    rng_state,
    same_state,
    state,
    trainer,
)
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture, adaquant, calibrate, prepare
from lightning_ptq.callbacks.base import check_trainer
from lightning_ptq.errors import CalibrationError, CallbackError, SurgeryError
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.tuning.reconstruct import ReconstructionConfig

pytestmark = [
    pytest.mark.both_packages,
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]


@pytest.fixture
def interruptible():
    """Lightning ignores Ctrl+C from the first KeyboardInterrupt on; the other tests should not."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def ptq(**options):
    return CalibrationCapture("w4a4", **options), AdaQuantLayerwise(steps=3, batch_size=16)


@functools.cache
def reference(pl):
    """The state of the classifier quantized by the functions."""
    net = classifier(pl)
    adaquant(calibrate(net, IMAGES.split(8), "w4a4"), config=ReconstructionConfig(steps=3, batch_size=16))
    return state(net)


def mixed(pl, change=lambda base: base):
    """A classifier with training flags and requires_grad in disorder."""
    module = classifier(pl, change)
    module.net[3].eval()
    module.net[6].eval()
    module.net[0].weight.requires_grad_(False)
    module.net[9].bias.requires_grad_(False)
    return module


def test_a_run_leaves_no_trace_but_the_quantized_layers(pl, tmp_path):
    module = mixed(pl)
    before, random_before = Snapshot(module), rng_state()
    trainer(pl, tmp_path, *ptq()).fit(module, loader(shuffle=True))
    assert rng_state() == random_before
    assert {name: module.get_submodule(name).training for name in before.training} == before.training
    after = before._flags()
    for name in ("", "net", "net.2", "net.5", "net.6", "seen"):  # what is not swapped
        assert after[name] == before.flags[name]
    assert {n: flag for n, flag in after.items() if n.endswith(" grad")} == {
        n: flag for n, flag in before.flags.items() if n.endswith(" grad")
    }
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not _global_optimizer_pre_hooks
    assert torch.is_grad_enabled()
    assert {type(module.get_submodule(name)).__name__ for name in ("net.0", "net.3")} == {"QuantConv2d"}


def test_a_quantized_module_trains_as_modules_do(pl, tmp_path):
    """Quantization-aware, that is: its own hooks, optimizer and scheduler are back."""

    def counting(base):
        class Counting(base):
            ends = 0

            def on_train_epoch_end(self) -> None:
                self.ends += 1

        return Counting

    module = classifier(pl, counting)
    trainer(pl, tmp_path, *ptq()).fit(module, loader())
    quantized = state(module)
    run = trainer(pl, tmp_path, max_epochs=2)
    run.fit(module, loader())
    assert (module.ends, run.global_step) == (2, 10)
    assert not torch.equal(module.net[3].weight, quantized["net.3.weight"])
    assert torch.equal(module.net[3].weight_fake_quant.scale, quantized["net.3.weight_fake_quant.scale"])


@pytest.mark.parametrize("qconfig", ["w8a8", "w4a4"])
def test_fine_tuning_at_the_rate_of_the_docstring_loses_nothing(pl, tmp_path, qconfig):
    def adam(base):
        class Adam(base):
            rate = 1e-2

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), self.rate)

        return Adam

    images = torch.randn(128, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    labels = (images.mean((1, 2, 3)) * 5).clamp(-1, 1).round().long() + 1
    data = DataLoader(TensorDataset(images, labels), 32)

    def loss(module):
        with torch.no_grad():
            return F.cross_entropy(module.eval()(images), labels).item()

    module = classifier(pl, adam)
    trainer(pl, tmp_path, max_epochs=10).fit(module, data)
    trainer(pl, tmp_path, CalibrationCapture(qconfig), AdaQuantLayerwise(steps=20)).fit(module, data)
    before, integers = loss(module), module.net[3].weight.clone()
    type(module).rate = 1e-5
    trainer(pl, tmp_path, max_epochs=5).fit(module.train(), data)
    assert loss(module) <= before * 1.01  # a few weights lie between two integers
    assert not torch.equal(module.net[3].weight, integers)
    type(module).rate = 1.0
    trainer(pl, tmp_path, max_epochs=5).fit(module.train(), data)
    assert loss(module) > before  # a rate can spoil it


def raising(pl, hook, error):
    """A callback that ends the run in one of its hooks."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise error

    return type("Raising", (pl.Callback,), {hook: fail})()


def failing(error, call):
    """A module whose training_step ends the run when it is called so many times."""

    def change(base):
        class Failing(base):
            calls = 0

            def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
                type(self).calls += 1
                if type(self).calls == call:
                    raise error
                return super().training_step(batch, batch_idx)

        return Failing

    return change


class Broken(Exception):
    pass


PLACES = {
    "setup": ("behind", "setup", Broken),
    "fit start": ("behind", "on_fit_start", Broken),
    "batch end": ("front", "on_train_batch_end", Broken),
    "between calibration and tuning": ("between", "on_train_epoch_end", Broken),
    "behind tuning": ("behind", "on_train_epoch_end", Broken),
    "interrupt behind tuning": ("behind", "on_train_epoch_end", KeyboardInterrupt),
    "train end": ("front", "on_train_end", Broken),
    "model in batch 2": ("model", 2, Broken),
    "model when batch norms are folded": ("model", 7, Broken),
    "model in the capture of a unit": ("model", 16, Broken),
    "interrupt in batch 2": ("model", 2, KeyboardInterrupt),
}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("place", PLACES)
def test_after_an_exception_the_float_module_is_back_and_trains_as_its_twin_does(pl, tmp_path, place):
    where, when, error = PLACES[place]
    module = mixed(pl, failing(error, when) if where == "model" else lambda base: base)
    twin = copy.deepcopy(module)
    module.seen.update(torch.tensor(3.0))
    twin.seen.update(torch.tensor(3.0))
    before, random_before = Snapshot(module), rng_state()
    capture, tuner = ptq()
    callbacks = {"front": [0], "between": [1], "behind": [2], "model": []}[where]
    listed = [capture, tuner]
    for position in callbacks:
        listed.insert(position, raising(pl, when, error))
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True)
    run = trainer(pl, tmp_path, *listed, saver, enable_checkpointing=True)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        run.fit(module, loader())
    before.assert_unchanged()
    assert module.seen.compute() == 3
    assert rng_state() == random_before
    assert not torch.nn.modules.module._global_forward_hooks
    assert not _global_optimizer_pre_hooks
    assert all(parameter.grad is None for parameter in module.parameters())
    for path in tmp_path.rglob("*.ckpt"):  # what Lightning saves on an exception is the float module
        assert same_state(torch.load(path, weights_only=True)["state_dict"], before.state)
    for copied in (module, twin):
        pl.seed_everything(1, verbose=False)
        trainer(pl, tmp_path).fit(copied, loader(shuffle=True))
    assert same_state(state(module), state(twin))
    assert not same_state(state(module), before.state)


def test_an_interrupted_callback_can_be_used_again(pl, tmp_path):
    module = classifier(pl, failing(Broken, 2))
    callbacks = ptq()
    with pytest.raises(Broken):
        trainer(pl, tmp_path, *callbacks).fit(module, loader())
    trainer(pl, tmp_path, *callbacks).fit(module, loader())
    assert same_state(state(module), reference(pl))
    again = classifier(pl)
    trainer(pl, tmp_path, *callbacks).fit(again, loader())
    assert same_state(state(again), reference(pl))


CHECKPOINTS = {
    "none given": lambda pl, path: [],
    "default": lambda pl, path: [pl.callbacks.ModelCheckpoint(path)],
    "last": lambda pl, path: [pl.callbacks.ModelCheckpoint(path, save_last=True, save_top_k=-1)],
    "every step": lambda pl, path: [pl.callbacks.ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1)],
    "best": lambda pl, path: [pl.callbacks.ModelCheckpoint(path, monitor="val_loss", save_on_train_epoch_end=False)],
    "two": lambda pl, path: [
        pl.callbacks.ModelCheckpoint(path / "a"),
        pl.callbacks.ModelCheckpoint(path / "b", monitor="val_loss"),
    ],
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_left_and_holds_the_quantized_module(pl, tmp_path, name):
    module = classifier(pl)
    callbacks = [*ptq(), *CHECKPOINTS[name](pl, tmp_path / "checkpoints")]
    run = trainer(pl, tmp_path, *callbacks, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    paths = list(tmp_path.rglob("*.ckpt"))
    assert sorted(path.name for path in paths if path.name != "last.ckpt") == ["quantized.ckpt"] * len(
        run.checkpoint_callbacks
    )
    for path in paths:
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert same_state(saved, state(module))
    for callback in run.checkpoint_callbacks:
        assert Path(callback.best_model_path) in paths
        assert Path(callback.last_model_path) in paths


def test_the_checkpoint_loads_into_a_prepared_module_and_into_the_trainer(pl, tmp_path):
    module = classifier(pl)
    run = trainer(pl, tmp_path, *ptq(), enable_checkpointing=True)
    run.fit(module, loader(), loader())
    path = run.checkpoint_callback.best_model_path
    expected = module.eval()(IMAGES)
    fresh = classifier(pl).eval()
    prepare(fresh, "w8a8")
    fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(fresh(IMAGES), expected)
    assert not torch.equal(expected, classifier(pl).eval()(IMAGES))
    scores = run.validate(module, loader(), verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    assert run.validate(module, loader(), verbose=False) != scores
    for ckpt_path in (path, "best"):
        assert run.validate(module, loader(), ckpt_path=ckpt_path, verbose=False) == scores
    other = trainer(pl, tmp_path)
    assert other.validate(fresh, loader(), ckpt_path=path, verbose=False) == scores


@pytest.mark.parametrize(("task", "with_callbacks"), [
    ("validate", True), ("validate", False), ("test", True), ("test", False), ("fit", True),
])  # fmt: skip
def test_a_checkpoint_of_a_finished_run_is_taken_by_a_new_trainer(pl, tmp_path, task, with_callbacks):
    first = classifier(pl)
    run = trainer(
        pl, tmp_path, *ptq(), pl.callbacks.ModelCheckpoint(tmp_path, save_last=True), enable_checkpointing=True
    )
    run.fit(first, loader())
    for path in (run.checkpoint_callback.best_model_path, tmp_path / "last.ckpt"):
        fresh = build(classifier_class(pl), seed=5)
        fresh.test_step = fresh.validation_step
        if not with_callbacks:
            prepare(fresh, "w8a8")
        other = trainer(pl, tmp_path, *(ptq() if with_callbacks else ()))
        getattr(other, task)(fresh, loader(), ckpt_path=path)
        assert same_state(state(fresh), state(first))
        assert torch.equal(fresh.eval()(IMAGES), first.eval()(IMAGES))
        assert "on_load_checkpoint" not in vars(fresh)


def test_a_checkpoint_of_the_training_is_no_start_of_a_run(pl, tmp_path):
    trained = classifier(pl)
    run = trainer(pl, tmp_path)
    run.fit(trained, loader())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    module = classifier(pl)
    with pytest.raises(CalibrationError, match=r"load trained weights by MyModule\.load_from_checkpoint"):
        trainer(pl, tmp_path, *ptq()).fit(module, loader(), ckpt_path=tmp_path / "trained.ckpt")


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"fast_dev_run": 2}])
def test_no_checkpoint_is_left_where_none_is_wanted(pl, tmp_path, options):
    trainer(pl, tmp_path, *ptq(), **options).fit(classifier(pl), loader())
    trainer(pl, tmp_path, *ptq(save_checkpoint=False), enable_checkpointing=True).fit(classifier(pl), loader())
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_the_pass_is_made_once_whatever_max_epochs(pl, tmp_path):
    module, seen = classifier(pl), []

    def step(module, batch):
        seen.append(1)
        return module(batch[0])

    run = trainer(pl, tmp_path, CalibrationCapture("w4a4", step=step), max_epochs=3)
    run.fit(module, loader())
    observed = len(seen)
    assert run.current_epoch == 1
    again = CalibrationCapture("w4a4", step=step)
    seen.clear()
    trainer(pl, tmp_path, again, max_epochs=1).fit(classifier(pl), loader())
    assert observed == len(seen)
    net = classifier(pl)
    calibrate(net, IMAGES.split(8), "w4a4")
    assert same_state(state(module), state(net))


def test_validation_in_fit_and_after_it_works(pl, tmp_path):
    module = classifier(pl)
    run = trainer(pl, tmp_path, *ptq(), num_sanity_val_steps=2)
    run.fit(module, loader(), loader())
    assert same_state(state(module), reference(pl))
    (scores,) = run.validate(module, loader(len(LABELS)), verbose=False)
    with torch.no_grad():
        assert scores["val_loss"] == pytest.approx(F.cross_entropy(module.eval()(IMAGES), LABELS).item(), rel=1e-5)
    assert module.training is False
    (predicted,) = run.predict(module, DataLoader(IMAGES, len(IMAGES)))
    assert torch.equal(predicted, module(IMAGES))


def test_a_data_module_gives_the_batches(pl, tmp_path):
    class Images(pl.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.data = TensorDataset(IMAGES, LABELS)

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, 8)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [2 * batch[0], batch[1]]

    module = classifier(pl)
    trainer(pl, tmp_path, CalibrationCapture("w4a4")).fit(module, datamodule=Images())
    net = classifier(pl)
    calibrate(net, [2 * x for x in IMAGES.split(8)], "w4a4")
    assert same_state(state(module), state(net))


def test_a_model_built_in_configure_model_is_quantized(pl, tmp_path):
    class Late(classifier_class(pl)):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = build(SmallNet)

    module = Late()
    trainer(pl, tmp_path, *ptq()).fit(module, loader())
    assert same_state(state(module), reference(pl))


def test_the_sampler_that_shuffles_does_not_matter_for_the_ranges(pl, tmp_path):
    states = []
    for shuffle in (False, True):
        module = classifier(pl)
        capture = CalibrationCapture("w4a4", activation_observer="minmax")
        trainer(pl, tmp_path, capture).fit(module, loader(shuffle=shuffle))
        states.append(state(module))
    assert same_state(*states)


def spoiled_loader():
    images = IMAGES.clone()
    images[20, 0, 2, 2] = float("nan")
    return DataLoader(TensorDataset(images, LABELS), 8)


REFUSED = {
    "empty loader": (
        {},
        lambda: DataLoader([], 8),
        CalibrationError,
        "no calibration batch was seen: the loader is empty",
    ),
    "no train batches": ({"limit_train_batches": 0}, loader, CallbackError, "limit_train_batches=0: no calibration b"),
    "no epoch": ({"max_epochs": 0}, loader, CallbackError, "max_epochs=0: no calibration batch would be seen"),
    "NaN": ({}, spoiled_loader, CalibrationError, r"input of layer 'net\.0', calibration batch 2"),
    "half": ({"precision": "16-true"}, loader, CallbackError, "precision='16-true'.*Use precision='32-true'"),
    "bfloat16": ({"precision": "bf16-true"}, loader, CallbackError, "precision='bf16-true'.*such as 'bf16-mixed'"),
    "double": ({"precision": "64-true"}, loader, CallbackError, "precision='64-true'"),
}


@pytest.mark.parametrize(("options", "data", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_and_leaves_the_module_as_it_was(pl, tmp_path, options, data, error, message):
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(error, match=message):
        trainer(pl, tmp_path, *ptq(), **options).fit(module, data())
    if options.get("precision") not in ("16-true", "bf16-true", "64-true"):  # Lightning converts the weights itself
        before.assert_unchanged()
    assert not [child for child in module.modules() if isinstance(child, QuantLayer)]


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy"])
def test_strategies_that_shard_the_module_are_refused(strategy):
    run = SimpleNamespace(strategy=type(strategy, (), {})(), world_size=1, precision="32-true")
    with pytest.raises(CallbackError, match=f"PTQ does not work under {strategy}.*Use strategy='ddp', or"):
        check_trainer(run)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_start_the_run_in_another_process_are_refused(pl, tmp_path, strategy):
    run = trainer(pl, tmp_path, *ptq(), strategy=strategy)
    with pytest.raises(CallbackError, match=strategy.removeprefix("ddp_")):
        check_trainer(run)


def test_a_quantized_module_is_not_quantized_again(pl, tmp_path):
    module = classifier(pl)
    trainer(pl, tmp_path, *ptq()).fit(module, loader())
    before = state(module)
    objects = [id(child) for child in module.modules()]
    with pytest.raises(SurgeryError, match="has quantized layers already"):
        trainer(pl, tmp_path, *ptq()).fit(module, loader())
    assert same_state(state(module), before)
    assert [id(child) for child in module.modules()] == objects
    trainer(pl, tmp_path).fit(module, loader())


def test_a_module_without_layers_is_refused(pl, tmp_path):
    def empty(base):
        class Empty(base):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Flatten()

        return Empty

    module = classifier(pl, empty)
    before = Snapshot(module)
    with pytest.raises(SurgeryError, match="Empty has nothing to quantize"):
        trainer(pl, tmp_path, *ptq()).fit(module, loader())
    before.assert_unchanged()


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_without_fit_the_callbacks_do_nothing(pl, tmp_path, entry):
    def with_test(base):
        class WithTest(base):
            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.loss(batch)

            def predict_step(self, batch: Any) -> torch.Tensor:
                return self(batch[0])

        return WithTest

    module = classifier(pl, with_test)
    before = Snapshot(module)
    getattr(trainer(pl, tmp_path, *ptq()), entry)(module, loader())
    before.assert_unchanged()
