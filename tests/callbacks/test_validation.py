"""The user's own validation before and after a run, and bit allocation by its metric."""

from __future__ import annotations

import pytest
import torch
from helpers import IMAGES, LABELS, Snapshot, classifier, loader, same_state, state, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ptq import AdaQuantLayerwise, BitAllocator, CalibrationCapture, ExportONNX, StatsTuning
from lightning_ptq.allocation.trial import Trial
from lightning_ptq.callbacks.trainer.validation import Scores, standard_error
from lightning_ptq.errors import AllocationError, QConfigError, ReportWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SHORT = {"steps": 6, "batch_size": 8}


def scoring(base):
    """A classifier whose validation logs an accuracy, batch by batch, and a loss at the end of the epoch."""

    class Scoring(base):
        validations = 0

        def validation_step(self, batch, batch_idx):
            outputs = self(batch[0])
            self.log("val_acc", (outputs.argmax(1) == batch[1]).float().mean())
            type(self).last = torch.nn.functional.cross_entropy(outputs, batch[1])

        def on_validation_epoch_end(self):
            self.log("val_loss", type(self).last)
            type(self).validations += 1

    return Scoring


def teacher(pl):
    """The classifier, and a loader whose labels are what the float classifier says."""
    module = classifier(pl, scoring)
    with torch.no_grad():
        labels = module.eval()(IMAGES).argmax(1)
    type(module).validations = 0
    return module, DataLoader(TensorDataset(IMAGES, labels), 8)


def test_the_float_and_the_quantized_module_are_validated_once_each(pl, tmp_path):
    module, data = teacher(pl)
    capture = CalibrationCapture("w2a4")
    run = trainer(pl, tmp_path, capture)
    run.fit(module, loader(), data)
    changes = {change.name: change for change in capture.report.metrics}
    assert changes.keys() == {"val_acc", "val_loss"}
    assert type(module).validations == 2
    assert changes["val_acc"].before == 1.0
    assert changes["val_loss"].before < changes["val_loss"].after
    (found,) = run.validate(module, data, verbose=False)
    assert found["val_acc"] == pytest.approx(changes["val_acc"].after)
    assert found["val_loss"] == pytest.approx(changes["val_loss"].after)


def test_validation_data_changes_nothing_of_the_result(pl, tmp_path):
    states = []
    for data in (None, DataLoader(TensorDataset(IMAGES, LABELS), 8, shuffle=True)):
        torch.manual_seed(3)
        module = classifier(pl, scoring)
        callbacks = [CalibrationCapture("w4a4", resume=False), AdaQuantLayerwise(**SHORT)]
        trainer(pl, tmp_path, *callbacks).fit(module, loader(shuffle=True), data)
        states.append(state(module))
    assert same_state(*states)


def test_other_callbacks_and_loggers_see_no_validation_of_a_ptq_run(pl, tmp_path):
    seen = []

    class Watching(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append("validation")

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            seen.extend(metrics)

    module, data = teacher(pl)
    run = trainer(pl, tmp_path, CalibrationCapture("w8a8"), Watching(), logger=Logger(tmp_path), num_sanity_val_steps=2)
    run.fit(module, loader(), data)
    assert "validation" not in seen
    assert "val_acc" not in seen
    assert {"ptq/validation/val_acc_float", "ptq/validation/val_acc_quantized"} <= set(seen)
    assert run.num_sanity_val_steps == 2
    assert len(run.callbacks) > 1


def test_a_validation_that_fails_before_the_run_ends_it_with_advice(pl, tmp_path):
    def failing(base):
        class Failing(base):
            def validation_step(self, batch, batch_idx):
                raise RuntimeError("no such column")

        return Failing

    module = classifier(pl, failing)
    before = Snapshot(module)
    with pytest.raises(RuntimeError, match="no such column") as caught:
        trainer(pl, tmp_path, CalibrationCapture("w8a8")).fit(module, loader(), loader())
    assert "limit_val_batches=0" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    before.assert_unchanged()
    trainer(pl, tmp_path, CalibrationCapture("w8a8"), limit_val_batches=0).fit(module, loader(), loader())


def test_a_validation_that_fails_after_the_run_is_a_warning(pl, tmp_path):
    def failing(base):
        class Failing(base):
            calls = 0

            def on_validation_epoch_start(self):
                type(self).calls += 1
                if type(self).calls == 2:
                    raise RuntimeError("the disk is full")

        return Failing

    module = classifier(pl, failing)
    capture = CalibrationCapture("w8a8")
    with pytest.warns(ReportWarning, match="could not be validated .*the disk is full"):
        trainer(pl, tmp_path, capture).fit(module, loader(), loader())
    assert capture.report.metrics == []
    assert module.net[0].qconfig is not None


def test_the_standard_error_is_that_of_the_paired_batches():
    values = torch.tensor([0.1, 0.3, 0.2, 0.6])
    before = Scores({"a": 1.0}, {"a": [1.0, 0.5, 0.7, 0.9]})
    after = Scores({"a": 0.7}, {"a": (torch.tensor(before.batches["a"]) - values).tolist()})
    assert standard_error(after, before, "a") == pytest.approx(float(values.std()) / 2, rel=1e-5)
    assert standard_error(Scores({}, {"a": [1.0]}), Scores({}, {"a": [1.0]}), "a") is None
    assert standard_error(Scores({}, {"a": [1.0, float("nan")]}), Scores({}, {"a": [1.0, 2.0]}), "a") is None


@pytest.mark.parametrize("later", [(), (AdaQuantLayerwise,), (AdaQuantLayerwise, StatsTuning)])
def test_the_allocator_returns_the_smallest_network_within_the_drop(pl, tmp_path, later):
    module, data = teacher(pl)
    options = {AdaQuantLayerwise: SHORT, StatsTuning: {"steps": 3}}
    allocator = BitAllocator(monitor="val_acc", max_drop=0.1)
    capture = CalibrationCapture("w8a8", first_last_bits=None)
    tuning = [make(**options[make]) for make in later]
    run = trainer(pl, tmp_path, capture, allocator, *tuning)
    run.fit(module, loader(), data)
    trials = capture.report.trials
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert chosen.within
    assert chosen.drop <= 0.1
    assert all(trial.costs["size"] >= chosen.costs["size"] for trial in trials if trial.within)
    assert allocator.result.allocation.choice == chosen.choice
    ops = dict(module.named_modules())
    assert {name: str(ops[name].qconfig) for name in chosen.choice} == chosen.choice
    # What fit leaves is what the trial measured.
    (found,) = run.validate(module, data, verbose=False)
    assert found["val_acc"] == pytest.approx(chosen.value)
    (change,) = [change for change in capture.report.metrics if change.name == "val_acc"]
    assert change.after == pytest.approx(chosen.value)
    assert all(callback.result is not None for callback in tuning)
    assert [stage.name for stage in capture.report.stages].count("Bit allocation") == 1


def test_the_chosen_trial_is_what_a_run_at_its_widths_gives(pl, tmp_path):
    module, data = teacher(pl)
    allocator = BitAllocator(monitor="val_acc", max_drop=0.05)
    callbacks = [CalibrationCapture("w8a8", first_last_bits=None), allocator, AdaQuantLayerwise(**SHORT)]
    trainer(pl, tmp_path, *callbacks).fit(module, loader(), data)
    again = classifier(pl, scoring)
    pins = dict(allocator.result.allocation.choice)
    candidates = sorted({"w8a8", *pins.values()})
    callbacks = [
        CalibrationCapture("w8a8", first_last_bits=None),
        BitAllocator(max_degradation=100.0, candidates=candidates, pins=pins, rounds=1),
        AdaQuantLayerwise(**SHORT),
    ]
    trainer(pl, tmp_path, *callbacks).fit(again, loader())
    assert same_state(state(module), state(again))


def test_an_exporter_runs_once_after_the_search(pl, tmp_path):
    pytest.importorskip("onnxscript")
    module, data = teacher(pl)
    exporter = ExportONNX(str(tmp_path / "model.onnx"))
    callbacks = [CalibrationCapture("w8a8"), BitAllocator(monitor="val_acc", max_drop=0.2), exporter]
    trainer(pl, tmp_path, *callbacks).fit(module, loader(), data)
    assert exporter.result is not None
    assert exporter.result.path.exists()


def test_a_metric_of_which_less_is_better(pl, tmp_path):
    module, data = teacher(pl)
    allocator = BitAllocator(monitor="val_loss", max_drop=0.05, mode="min")
    capture = CalibrationCapture("w8a8")
    trainer(pl, tmp_path, capture, allocator).fit(module, loader(), data)
    (change,) = [change for change in capture.report.metrics if change.name == "val_loss"]
    assert change.after - change.before <= 0.05 + 1e-6
    assert all(trial.error is None for trial in capture.report.trials)  # logged once, at the end


def test_a_drop_that_no_choice_meets_leaves_the_float_module(pl, tmp_path):
    module, data = teacher(pl)
    before = Snapshot(module)
    allocator = BitAllocator(monitor="val_loss", max_drop=0.0, mode="min", candidates=["w2a2"])
    with pytest.raises(AllocationError, match="no choice of bit widths stays within max_drop=0"):
        trainer(pl, tmp_path, CalibrationCapture("w2a2", first_last_bits=None), allocator).fit(module, loader(), data)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "val_acc"}, "go together"),
        ({"max_drop": 0.1}, "go together"),
        ({"monitor": "val_acc", "max_drop": "1%"}, "max_drop must be a number"),
        ({"monitor": "val_acc", "max_drop": -1}, "max_drop must be a number, 0 or more"),
        ({"monitor": 3, "max_drop": 0.1}, "monitor must be the name of a metric, got 3"),
        ({"monitor": "val_loss", "max_drop": 0.1}, "Write mode='min'"),
        ({"monitor": "val_acc", "max_drop": 0.1, "mode": "up"}, "mode must be"),
        ({"monitor": "val_acc", "max_drop": 0.1, "tries": 0}, "tries must be"),
        ({"monitor": "val_acc", "max_drop": 0.1, "max_degradation": 0.1}, "two limits"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, message):
    with pytest.raises((AllocationError, QConfigError), match=message):
        BitAllocator(**options)


@pytest.mark.parametrize(
    ("monitor", "data", "message"),
    [
        ("val_acc", None, "needs validation data"),
        ("val_acc", [], "validation logs no metric"),
        ("top5", ..., r"validation logs \['val_acc', 'val_loss'\]"),
    ],
)
def test_a_metric_that_validation_does_not_give_is_refused_before_the_work(pl, tmp_path, monitor, data, message):
    module, val = teacher(pl)
    before = Snapshot(module)
    run = trainer(pl, tmp_path, CalibrationCapture("w8a8"), BitAllocator(monitor=monitor, max_drop=0.1))
    with pytest.raises(AllocationError, match=message):
        run.fit(module, loader(), val if data is ... else data)
    before.assert_unchanged()


@pytest.mark.parametrize("resumed", [True, False])
def test_an_interrupted_search_resumes_and_ends_with_the_same_bytes(pl, tmp_path, monkeypatch, resumed):
    work = AdaQuantLayerwise.work

    def fit(root, stop_after=None):
        module, data = teacher(pl)
        # All bits matter to this loss, so that the search tunes several networks.
        allocator = BitAllocator(monitor="val_loss", max_drop=1e-4, mode="min", measure="kl")
        done = []

        def interrupted(*args, **kwargs):
            if len(done) == stop_after:
                raise RuntimeError("out of time")
            done.append(work(*args, **kwargs))
            return done[-1]

        capture = CalibrationCapture("w8a8", resume=resumed)
        with monkeypatch.context() as patch:  # of the class: what an object has is part of its settings
            patch.setattr(AdaQuantLayerwise, "work", interrupted)
            trainer(pl, root, capture, allocator, AdaQuantLayerwise(**SHORT)).fit(module, loader(), data)
        return state(module), done

    whole, tuned = fit(tmp_path / "whole")
    assert len(tuned) > 1
    with pytest.raises(RuntimeError, match="out of time"):
        fit(tmp_path / "cut", stop_after=1)
    assert (tmp_path / "cut" / "ptq_progress").exists() == resumed
    again, _ = fit(tmp_path / "cut")
    assert same_state(whole, again)
    assert not (tmp_path / "cut" / "ptq_progress").exists()


def logging(log, **attributes):
    """A class whose validation does what ``log`` does with the module and the batch."""

    def change(base):
        return type("Logging", (base,), {"validation_step": lambda self, batch, i: log(self, batch), **attributes})

    return change


def test_a_loader_that_gives_its_batches_once_is_noticed(pl, tmp_path):
    module = classifier(pl, scoring)
    capture = CalibrationCapture("w8a8")
    with pytest.warns(ReportWarning, match=r"has not logged val_acc, .* iterated several times"):
        trainer(pl, tmp_path, capture).fit(module, loader(), iter(list(loader())))
    assert [change.name for change in capture.report.metrics] == ["val_loss"]  # of the batches before
    callbacks = [CalibrationCapture("w8a8"), BitAllocator(monitor="val_acc", max_drop=0.1)]
    with pytest.raises(AllocationError, match=r"does not log 'val_acc'.*iterated several times"):
        trainer(pl, tmp_path, *callbacks).fit(classifier(pl, scoring), loader(), iter(list(loader())))


def test_validations_of_a_run_draw_the_same_numbers(pl, tmp_path):
    module = classifier(pl, logging(lambda self, batch: self.log("m", torch.randn(()))))
    capture = CalibrationCapture("w8a8")
    trainer(pl, tmp_path, capture).fit(module, loader(shuffle=True), loader(shuffle=True))
    (change,) = capture.report.metrics
    assert change.before == change.after


def test_a_validation_leaves_no_trace_in_the_module(pl, tmp_path):
    def counting(self, batch):
        self.count = self.count + 1 if isinstance(self.count, torch.Tensor) else self.count
        self.log("m", 1.0)

    module = classifier(pl, logging(counting))
    module.register_buffer("count", torch.zeros(()))
    trainer(pl, tmp_path, CalibrationCapture("w8a8")).fit(module, loader(), loader())
    assert module.count == 0


def test_a_metric_that_is_nan_in_float_is_refused_before_the_work(pl, tmp_path):
    module = classifier(pl, logging(lambda self, batch: self.log("m", float("nan"))))
    before = Snapshot(module)
    callbacks = [CalibrationCapture("w8a8"), BitAllocator(monitor="m", max_drop=0.1)]
    with pytest.raises(AllocationError, match="the metric of the float module is nan"):
        trainer(pl, tmp_path, *callbacks).fit(module, loader(), loader())
    before.assert_unchanged()


def test_names_that_lightning_adds_are_no_metrics_of_their_own(pl, tmp_path):
    def log(self, batch):
        self.log("m", batch[0].mean(), on_step=True, on_epoch=True)
        self.log("n_step", batch[0].std())

    capture = CalibrationCapture("w8a8")
    allocator = BitAllocator(monitor="m_epoch", max_drop=0.1)
    trainer(pl, tmp_path, capture, allocator).fit(classifier(pl, logging(log)), loader(), loader())
    assert [change.name for change in capture.report.metrics] == ["m_epoch", "m", "n_step"]
    assert capture.report.trials[0].value == pytest.approx(capture.report.metrics[1].after)


class NormLast(torch.nn.Sequential):
    """A batch norm that cannot be folded, as it follows an activation; images of 5 x 5 pixels, three classes."""

    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 6, 3),
            torch.nn.ReLU(), torch.nn.BatchNorm2d(6), torch.nn.Flatten(), torch.nn.Linear(6, 3),
        )  # fmt: skip


class Shifting(StatsTuning):
    """Shifts the means of batch norms, which are outside the quantized layers, and the biases inside them."""

    @torch.no_grad()
    def work(self, trainer, calibration, journal=None):
        for layer in calibration.layers.values():
            layer.bias.add_(1.0)
        for norm in calibration.module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.add_(1.0)
        return []


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnfoldedBatchNormWarning")
def test_a_trial_is_the_same_whatever_was_tried_before_and_after(pl, tmp_path, monkeypatch):
    def fit(*order):
        """Try the narrowest (0) and the widest choice (-1) in this order, and choose the widest."""

        def search(points, max_drop, minimise, tuned, rounded, tries):
            trials = []
            for index in order:
                found, point = tuned(points[index]), points[index]
                choice = dict(point.choice)
                trials.append(Trial(point.costs, point.rise, found.value, 0.0, None, True, index == -1, choice))
            return trials

        monkeypatch.setattr("lightning_ptq.callbacks.accuracy.search_drop", search)
        module = classifier(pl, scoring)
        torch.manual_seed(0)
        module.net = NormLast()
        callbacks = [
            CalibrationCapture("w8a8", first_last_bits=None, resume=False),
            BitAllocator(monitor="val_loss", max_drop=100.0, mode="min", candidates=["w4a4", "w2a2"]),
            Shifting(),
        ]  # fmt: skip
        trainer(pl, tmp_path, *callbacks).fit(module, loader(), loader())
        return module

    alone = fit(-1)
    assert alone.net[2].running_mean.tolist() == [1.0] * 6
    assert {str(layer.qconfig) for layer in alone.net if hasattr(layer, "qconfig")} == {"w4a4"}
    assert same_state(state(alone), state(fit(0, -1)))
    assert same_state(state(alone), state(fit(-1, 0)))


@pytest.mark.parametrize(("target", "bits"), [(None, [8, 6, 5, 4, 3, 2]), ("onnxruntime", [8, 4, 2])])
def test_the_search_chooses_from_all_widths_or_from_those_that_onnx_stores(pl, tmp_path, target, bits):
    module, val = teacher(pl)
    allocator = BitAllocator(monitor="val_acc", max_drop=1.0)
    trainer(pl, tmp_path, CalibrationCapture("w8a8", target=target), allocator).fit(module, loader(), val)
    assert allocator.result.sensitivity.candidates == [f"w{b}a8" for b in bits]
    within = BitAllocator(size=0.25)
    trainer(pl, tmp_path, CalibrationCapture("w8a8", target=target), within).fit(teacher(pl)[0], loader())
    assert within.result.sensitivity.candidates == ["w8a8", "w4a8", "w4a4", "w2a4"]


@pytest.mark.parametrize(("edges", "kept"), [("auto", ["net.9"]), (None, []), (8, ["net.0", "net.9"])])
def test_the_search_chooses_for_large_first_and_last_layers_unless_their_bits_are_given(pl, tmp_path, edges, kept):
    module, val = teacher(pl)
    allocator = BitAllocator(monitor="val_acc", max_drop=1.0)
    capture = CalibrationCapture("w8a8", first_last_bits=edges)
    trainer(pl, tmp_path, capture, allocator).fit(module, loader(), val)
    choice = allocator.result.allocation.choice
    assert [name for name, width in choice.items() if width == "w8a8"] == kept
