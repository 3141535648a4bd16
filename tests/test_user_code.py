from __future__ import annotations

import functools
import gc
import math
import traceback
import weakref
from typing import Any

import pytest
import torch
from helpers import Snapshot, classifier, loader, same_state, state, trainer

import lightning_ptq
from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, QConfig, calibrate
from lightning_ptq.errors import CalibrationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]


def stepping(step: Any, **methods: Any) -> Any:
    """A change of the classifier: before its loss is computed, ``step`` is called with the module and that loss."""

    def change(base: Any) -> Any:
        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            return step(self, base.training_step(self, batch, batch_idx))

        return type("Stepping", (base,), {"training_step": training_step, **methods})

    return change


def calibrated(pl: Any, tmp_path: Any, change: Any = lambda base: base, *callbacks: Any, **options: Any) -> Any:
    module = classifier(pl, change)
    capture = CalibrationCapture("w4a4", weight_observer="minmax", activation_observer="minmax")
    trainer(pl, tmp_path, capture, *callbacks, **options).fit(module, loader())
    return module


@functools.cache
def reference(pl: Any) -> Any:
    """The state of the classifier after a run."""
    module = classifier(pl)
    batches = [images for images, _ in loader()]
    calibrate(module, batches, QConfig.parse("w4a4", weight_observer="minmax", activation_observer="minmax"))
    return state(module)


def notes_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def unpacking(module, loss):
    first, second = loss  # as where a detector returns a list of losses in training only
    return first + second


@pytest.mark.parametrize("run", ["fit", "inspect"])
def test_an_error_of_the_step_says_how_it_was_run(pl, tmp_path, run):
    module = classifier(pl, stepping(unpacking))
    before = Snapshot(module)
    runs = {
        "fit": lambda: trainer(pl, tmp_path, CalibrationCapture("w4a4")).fit(module, loader()),
        "inspect": lambda: lightning_ptq.inspect(module, next(iter(loader()))),
    }
    with pytest.raises(TypeError, match="iteration over a 0-d tensor") as raised:
        runs[run]()
    before.assert_unchanged()
    text = notes_of(raised.value)
    assert text.count("Calibration ran training_step in eval mode") == 1
    assert "step='predict', or step=function of module and batch" in text
    assert "in unpacking" in text


def test_an_error_of_a_step_function_names_it(pl, tmp_path):
    def broken(module, batch):
        raise KeyError("image")

    with pytest.raises(KeyError) as raised:
        trainer(pl, tmp_path, CalibrationCapture(step=broken)).fit(classifier(pl), loader())
    assert raised.value.args == ("image",)
    assert "Calibration ran broken in eval mode" in notes_of(raised.value)


def test_an_error_of_the_library_has_no_note(pl, tmp_path):
    with pytest.raises(CalibrationError, match="NaN or an infinity") as raised:
        trainer(pl, tmp_path, CalibrationCapture(step=lambda module, batch: module(batch[0] * math.nan))).fit(
            classifier(pl), loader()
        )
    assert "eval mode" not in notes_of(raised.value)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, what: Any, mask: Any) -> Any:
        return self.layer(what) * mask


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        ((torch.ones(4, 4), torch.ones(4, 1)), "the first entry of the batch"),
        ({"what": torch.ones(4, 4)}, "the entries of the batch by keyword"),
        (torch.ones(4, 4), "the whole batch"),
    ],
)
def test_an_error_of_the_module_says_how_it_was_called(batch, given):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'mask'") as raised:
        calibrate(Two(), [batch], "w8a8")
    assert f"Calibration called Two in eval mode with {given}" in notes_of(raised.value)
    assert "forward=, or step=" in notes_of(raised.value)
    calibrate(Two(), [batch], "w8a8", forward=lambda net, _: net(torch.ones(4, 4), torch.ones(4, 1)))


def one(module):
    return torch.optim.SGD(module.parameters(), lr=0.25)


def two_with_schedulers(module):
    optimizers = [torch.optim.Adam(module.net[0].parameters(), lr=0.5), torch.optim.SGD(module.net[3].parameters(), 2)]
    return optimizers, [{"scheduler": torch.optim.lr_scheduler.StepLR(o, 1), "interval": "step"} for o in optimizers]


def scheduled(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.25)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


READ = {
    "one": (one, lambda m: m.optimizers().param_groups[0]["lr"], 0.25),
    "the unwrapped one": (one, lambda m: m.optimizers().optimizer.param_groups[0]["lr"], 0.25),
    "as torch's own": (one, lambda m: m.optimizers(use_pl_optimizer=False).param_groups[0]["lr"], 0.25),
    "of the trainer": (one, lambda m: m.trainer.optimizers[0].param_groups[0]["lr"], 0.25),
    "two": (two_with_schedulers, lambda m: [o.param_groups[0]["lr"] for o in m.optimizers()], [0.5, 2]),
    "schedulers": (two_with_schedulers, lambda m: [s.get_last_lr() for s in m.lr_schedulers()], [[0.5], [2]]),
    "a scheduler": (scheduled, lambda m: m.lr_schedulers().get_last_lr()[0], 0.25),
    "no scheduler": (one, lambda m: m.lr_schedulers(), None),
    "nothing": (lambda m: None, lambda m: m.optimizers().param_groups[0]["lr"], 0.0),
    "what cannot be made": (lambda m: m.absent, lambda m: m.optimizers().param_groups[0]["lr"], 0.0),
    "zero_grad": (one, lambda m: bool(m.optimizers().zero_grad(set_to_none=True)), True),
}


@pytest.mark.parametrize("kind", READ)
def test_a_step_may_read_its_optimizers(pl, tmp_path, kind):
    configure, read, expected = READ[kind]
    found = []

    def step(module, loss):
        found.append(read(module))
        module.log("lr", 0.1)
        return loss

    module = calibrated(pl, tmp_path, stepping(step, configure_optimizers=configure))
    assert found[0] == expected
    assert all(value == found[0] for value in found)
    assert same_state(state(module), reference(pl))


def test_a_step_may_read_its_optimizers_in_inspect_too(pl):
    change = stepping(lambda m, loss: loss * m.optimizers().param_groups[0]["lr"], configure_optimizers=one)
    assert lightning_ptq.inspect(classifier(pl, change), next(iter(loader()))).covered == 1


@pytest.mark.parametrize(
    ("use", "call"),
    [
        (lambda m, loss: m.optimizers().step(), r"self\.optimizers\(\)\.step\(\)"),
        (lambda m, loss: m.trainer.optimizers[0].step(), r"self\.optimizers\(\)\.step\(\)"),
        (lambda m, loss: m.lr_schedulers().step(), r"self\.lr_schedulers\(\)\.step\(\)"),
        (lambda m, loss: m.manual_backward(loss), r"self\.manual_backward\(\)"),
        (lambda m, loss: loss.backward(), r"backward\(\)"),
    ],
)
def test_a_step_that_uses_them_is_refused(pl, tmp_path, use, call):
    with pytest.raises(CalibrationError, match=f"it called {call}"):
        calibrated(pl, tmp_path, stepping(use, configure_optimizers=scheduled))


OUTPUTS = {
    "a tensor": (lambda m, loss: loss, ["loss"], True),
    "a dictionary": (lambda m, loss: {"loss": loss, "extra": "text"}, ["loss", "extra"], True),
    "no loss": (lambda m, loss: {"extra": loss}, ["extra", "loss"], False),
    "nothing": (lambda m, loss: None, ["loss"], False),
    "a number": (lambda m, loss: {"loss": 1.0}, ["loss"], False),
    "a list": (lambda m, loss: [loss], ["loss"], False),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_callbacks_get_what_the_step_returned(pl, tmp_path, kind):
    step, keys, known = OUTPUTS[kind]
    losses = []

    class Reading(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            assert list(outputs) == keys
            assert not outputs["loss"].requires_grad
            losses.append(outputs["loss"].item())

    def remembering(module, loss):
        expected.append(loss.item())
        return step(module, loss)

    expected: list[float] = []
    module = calibrated(pl, tmp_path, stepping(remembering), Reading())
    assert len(losses) == 5
    once = list(dict.fromkeys(expected))[:5]  # the first batch runs twice
    assert losses == pytest.approx(once) if known else all(map(math.isnan, losses))
    assert same_state(state(module), reference(pl))


def test_a_forward_without_a_loss_gives_callbacks_no_number(pl, tmp_path):
    losses = []

    class Reading(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            losses.append(outputs["loss"].item())

    run = trainer(pl, tmp_path, CalibrationCapture("w4a4", step=lambda m, batch: m(batch[0])), Reading())
    run.fit(classifier(pl), loader())
    assert all(map(math.isnan, losses))


def test_outputs_kept_on_the_module_are_let_go(pl, tmp_path):
    def keeping(module, loss):
        made.append(weakref.ref(loss))
        module.kept.append(loss)
        module.by_name["all"].append({"loss": loss})
        module.latest = loss
        module.count += 1
        return loss

    def init(self):
        super(type(self), self).__init__()
        self.kept, self.by_name, self.count = [], {"all": []}, 0

    made: list[Any] = []
    module = classifier(pl, stepping(keeping, __init__=init))
    kept, by_name = module.kept, module.by_name
    seen = []

    class Watching(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            gc.collect()
            seen.append([reference() is not None for reference in made])

    capture = CalibrationCapture("w4a4", num_samples=16, weight_observer="minmax", activation_observer="minmax")
    callbacks = (capture, BitAllocator(size=0.2, measure="loss"), AdaQuantLayerwise(steps=2), Watching())
    trainer(pl, tmp_path, *callbacks).fit(module, loader())
    assert len(seen[0]) > 5
    assert sum(seen[0]) <= 1  # Lightning keeps the last output
    assert (module.kept, module.by_name, module.count, module.kept is kept, module.by_name is by_name) == (
        [], {"all": []}, 0, True, True,
    )  # fmt: skip
    assert not hasattr(module, "latest")
