from __future__ import annotations

import gc
import importlib
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IMAGES, Snapshot, classifier, loader, same_state, state, trainer

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.errors import (
    CalibrationError,
    CallbackError,
    ChangedAfterwardsWarning,
    ProgressWarning,
    ReportWarning,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]

NO_ROOM = OSError(28, "No space left on device")


class Broken(Exception):
    pass


def ptq(**options: Any) -> list[Any]:
    return [CalibrationCapture("w4a4", **options), AdaQuantLayerwise(steps=2, batch_size=16)]


def raising(pl: Any, hook: str, error: type[BaseException] = Broken) -> Any:
    def fail(self: Any, *args: Any, **kwargs: Any) -> None:
        raise error

    return type("Raising", (pl.Callback,), {hook: fail})()


def is_quantized(module: Any) -> bool:
    return type(module.net[0]).__name__ == "QuantConv2d"


def full(*args: Any, **kwargs: Any) -> None:
    raise NO_ROOM


@pytest.mark.parametrize("ending", ["success", "on_train_epoch_end", "on_train_end", "on_fit_end", "interrupt"])
def test_the_handlers_of_signals_are_those_of_before(pl, tmp_path, ending):
    def own(signum: int, frame: Any) -> None: ...

    before = [signal.signal(signal.SIGTERM, own), signal.getsignal(signal.SIGINT)]
    hook = "on_train_epoch_end" if ending == "interrupt" else ending
    error = KeyboardInterrupt if ending == "interrupt" else Broken
    try:
        failing = [] if ending == "success" else [raising(pl, hook, error)]
        run = trainer(pl, tmp_path, *ptq(), *failing)
        if ending == "success":
            run.fit(classifier(pl), loader())
        else:
            with pytest.raises(SystemExit if ending == "interrupt" else Broken):
                run.fit(classifier(pl), loader())
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_runs_leave_no_module_and_no_trainer_alive(pl, tmp_path):
    left = []
    for _ in range(5):
        module, run = classifier(pl), trainer(pl, tmp_path, *ptq())
        run.fit(module, loader())
        left += [weakref.ref(module), weakref.ref(run)]
        del module, run
    gc.collect()
    assert [each for each in left if each() is not None] == []


def test_a_full_disk_at_the_checkpoint_keeps_the_progress(pl, tmp_path, monkeypatch):
    module, capture = classifier(pl), ptq()
    before = Snapshot(module)
    run = trainer(pl, tmp_path, *capture, enable_checkpointing=True)
    monkeypatch.setattr(run, "save_checkpoint", full)
    with pytest.raises(CallbackError, match=r"quantized\.ckpt cannot be written \(OSError.*No space.*progress is kept"):
        run.fit(module, loader())
    before.assert_unchanged()
    assert list((tmp_path / "ptq_progress").iterdir())
    expected = classifier(pl)
    trainer(pl, tmp_path / "other", *ptq()).fit(expected, loader())
    monkeypatch.setattr("lightning_ptq.tuning.run.reconstruct_unit", lambda *args: 1 / 0)  # nothing is tuned again
    again = trainer(pl, tmp_path, *ptq(), enable_checkpointing=True)
    again.fit(module, loader())
    assert same_state(state(module), state(expected))
    assert Path(again.checkpoint_callback.best_model_path).exists()
    assert not (tmp_path / "ptq_progress").exists()


def test_the_progress_is_removed_after_the_checkpoint_is_written(pl, tmp_path, monkeypatch):
    run, seen = trainer(pl, tmp_path, *ptq(), enable_checkpointing=True), []
    own = run.save_checkpoint

    def save(*args: Any, **kwargs: Any) -> None:
        seen.append(len(list((tmp_path / "ptq_progress").iterdir())))
        own(*args, **kwargs)

    monkeypatch.setattr(run, "save_checkpoint", save)
    run.fit(classifier(pl), loader())
    assert seen[0] > 0
    assert not (tmp_path / "ptq_progress").exists()


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "teardown"])
def test_a_later_callback_that_raises_at_the_end_leaves_the_quantized_module(pl, tmp_path, hook):
    module = classifier(pl)
    run = trainer(pl, tmp_path, *ptq(), raising(pl, hook), enable_checkpointing=True)
    with pytest.raises(Broken):
        run.fit(module, loader())
    (path,) = tmp_path.rglob("quantized.ckpt")
    assert is_quantized(module)
    assert same_state(torch.load(path, weights_only=True)["state_dict"], state(module))
    assert module.training_step.__func__ is type(module).training_step
    trainer(pl, tmp_path).fit(module, loader())


def logger(pl: Any, when: str) -> Any:
    """A logger that fails with the summary, or when it is finalized."""
    base = importlib.import_module(f"{pl.__name__}.loggers.logger").Logger

    class Failing(base):  # type: ignore[misc, valid-type]
        name, version = "failing", 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if when == "summary" and any(key.startswith("ptq/run/") for key in metrics):
                raise Broken("the server is gone")

        def finalize(self, status: str) -> None:
            if when == "finalize" and status == "success":
                raise Broken

    return Failing()


def test_a_logger_that_fails_at_the_end_is_a_warning(pl, tmp_path):
    module = classifier(pl)
    run = trainer(pl, tmp_path, *ptq(report_dir=str(tmp_path / "report")), logger=logger(pl, "summary"))
    with pytest.warns(ReportWarning, match=r"could not be logged \(Broken: the server is gone\)"):
        run.fit(module, loader())
    assert is_quantized(module)
    assert (tmp_path / "report" / "report.html").exists()


def test_a_logger_that_fails_when_it_is_finalized_leaves_the_quantized_module(pl, tmp_path):
    module = classifier(pl)
    with pytest.raises(Broken):
        trainer(pl, tmp_path, *ptq(), logger=logger(pl, "finalize")).fit(module, loader())
    assert is_quantized(module)


@pytest.mark.parametrize("part", ["finish", "summary", "pictures", "save"])
def test_a_report_that_fails_is_a_warning(pl, tmp_path, monkeypatch, part):
    module = classifier(pl)
    capture, tuner = ptq(report_dir=str(tmp_path / "report"))

    def spoil(*args: Any) -> None:
        monkeypatch.setattr(capture.report, part, full)

    breaking = type("Breaking", (pl.Callback,), {"on_train_epoch_end": spoil})()
    with pytest.warns(ReportWarning, match="No space left on device"):
        trainer(pl, tmp_path, capture, tuner, breaking).fit(module, loader())
    assert is_quantized(module)
    assert len(capture.calibration.batches) == 0


@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("first", [False, True])
def test_a_float_copy_of_the_weights_is_refused_before_the_work(pl, tmp_path, name, first):
    found = getattr(importlib.import_module(f"{pl.__name__}.callbacks"), name, None)
    if found is None:
        pytest.skip(f"this Lightning has no {name}")
    averaging = type("Mine", (found,), {})(**({"swa_lrs": 0.1} if "Stochastic" in name else {}))
    module, seen = classifier(pl), []
    before = Snapshot(module)
    capture = CalibrationCapture("w4a4", step=lambda module, batch: seen.append(1))
    callbacks = [averaging, capture] if first else [capture, averaging]
    with pytest.raises(CallbackError, match=r"Mine keeps a float copy of the weights.*Leave Mine out"):
        trainer(pl, tmp_path, *callbacks).fit(module, loader())
    before.assert_unchanged()
    assert seen == []


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "on_fit_end"])
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_another_callback_changes_at_the_end_are_named(pl, tmp_path, hook, first):
    def change(self: Any, trainer: Any, module: Any) -> None:
        for parameter in module.parameters():
            parameter.data.add_(1)

    module, average = classifier(pl), type("Average", (pl.Callback,), {hook: change})()
    callbacks = [average, *ptq()] if first else [*ptq(), average]
    if first and hook == "on_train_epoch_end":  # before the stages: nothing of theirs is lost
        trainer(pl, tmp_path, *callbacks).fit(module, loader())
        return
    told = r"another callback has changed \d+ of \d+ tensors.*net\.0\.weight"
    with pytest.warns(ChangedAfterwardsWarning, match=told) as caught:
        trainer(pl, tmp_path, *callbacks).fit(module, loader())
    ours = [str(warning.message) for warning in caught if warning.category is ChangedAfterwardsWarning]
    assert len(ours) == 1
    # What is changed before the checkpoint is written is in it.
    before = hook == "on_train_epoch_end" or (first and hook == "on_train_end")
    assert ("also in quantized.ckpt" in ours[0]) is before


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.UnrepeatableForwardWarning")
def test_a_step_that_runs_out_of_an_iterator_is_an_error(pl, tmp_path):
    module = classifier(pl)
    before, draws = Snapshot(module), iter(range(9))

    def step(module: Any, batch: Any) -> Any:
        return module(batch[0]) + next(draws)

    with pytest.raises(CalibrationError, match="ran out of an iterator"):
        trainer(pl, tmp_path, *ptq(step=step)).fit(module, loader())
    before.assert_unchanged()


def test_a_stage_that_runs_out_of_an_iterator_does_not_end_the_run_as_finished(pl, tmp_path, monkeypatch):
    monkeypatch.setattr(AdaQuantLayerwise, "work", lambda *args: next(iter(())))
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(CallbackError, match=r"ran out of an iterator \(StopIteration\)"):
        trainer(pl, tmp_path, *ptq()).fit(module, loader())
    before.assert_unchanged()


def test_a_resume_dir_that_cannot_be_written_is_found_before_the_work(pl, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    module, seen = classifier(pl), []
    before = Snapshot(module)

    def step(module: Any, batch: Any) -> Any:
        seen.append(1)
        return module(batch[0])

    where = str(tmp_path / "file" / "progress")
    with pytest.raises(CallbackError, match=rf"cannot be saved in resume_dir, which is '{where}'.*resume=False"):
        trainer(pl, tmp_path, CalibrationCapture("w4a4", step=step, resume_dir=where)).fit(module, loader())
    with monkeypatch.context() as patch:
        patch.setattr("lightning_ptq.runtime.journal.os.fsync", full)
        with pytest.raises(CallbackError, match=r"resume_dir.*No space left on device"):
            trainer(pl, tmp_path, CalibrationCapture("w4a4", step=step)).fit(module, loader())
        assert seen == []
        before.assert_unchanged()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
        trainer(pl, tmp_path, CalibrationCapture("w4a4", step=step, resume=False)).fit(module, loader())
    assert is_quantized(module)


def test_progress_that_finds_no_room_later_is_a_warning(pl, tmp_path, monkeypatch):
    expected, module = classifier(pl), classifier(pl)
    trainer(pl, tmp_path, *ptq()).fit(expected, loader())
    spoiling = type("Spoiling", (pl.Callback,), {
        "on_train_epoch_start": lambda *_: monkeypatch.setattr("lightning_ptq.runtime.journal.os.fsync", full)
    })()  # fmt: skip
    with pytest.warns(ProgressWarning, match="cannot be saved in .*No space left on device") as caught:
        trainer(pl, tmp_path, *ptq(), spoiling).fit(module, loader())
    assert len([w for w in caught if w.category is ProgressWarning]) == 1
    assert same_state(state(module), state(expected))
    assert torch.isfinite(module.eval()(IMAGES)).all()
