"""What Lightning shows during a PTQ run, and that all of it is as before afterwards."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

import pytest
from helpers import classifier, loader, trainer

from lightning_ptq import CalibrationCapture
from lightning_ptq.errors import FewSamplesWarning

FOREIGN = ("returned `None`", "is smaller than the logging interval")


def run(pl: Any, root: Any, *callbacks: Any, change: Any = lambda base: base, **options: Any) -> Any:
    """A run with everything that a Trainer shows."""
    shown = {"enable_progress_bar": True, "enable_model_summary": True, "logger": pl.loggers.CSVLogger(root)}
    found = trainer(pl, root, *callbacks, **{**shown, **options})
    found.fit(classifier(pl, change), loader())
    return found


@pytest.mark.both_packages
def test_lightning_neither_warns_nor_summarizes_what_is_none(pl: Any, tmp_path: Any, caplog: Any, capsys: Any) -> None:
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        run(pl, tmp_path, CalibrationCapture("w8a8", 16), enable_checkpointing=True)
        texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if any(part in text for part in FOREIGN)]
    shown = "".join([*capsys.readouterr(), caplog.text])
    for part in ("FLOPs", "Trainable params", "`weights_only` was not set"):
        assert part not in shown
    assert "PTQ finished" in caplog.text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(pl, tmp_path)  # a training shows it all
        texts = [str(warning.message) for warning in caught]
    assert any(FOREIGN[1] in text for text in texts)
    assert "Trainable params" in "".join([*capsys.readouterr(), caplog.text])


@pytest.mark.parametrize("fails", [False, True])
def test_all_settings_are_as_before_afterwards(pl: Any, tmp_path: Any, fails: bool) -> None:
    def change(base: Any) -> Any:
        class Step(base):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                warnings.warn("the user's own", UserWarning, stacklevel=1)
                if fails:
                    raise KeyError("mine")
                return super().training_step(batch, batch_idx)

        return Step

    summary, stopping = pl.callbacks.ModelSummary(3), pl.callbacks.EarlyStopping("none", strict=False)
    bar = pl.callbacks.TQDMProgressBar()
    callbacks = (CalibrationCapture("w8a8", 16), summary, stopping, bar)
    ran = trainer(pl, tmp_path, *callbacks, enable_progress_bar=True, enable_model_summary=True, log_every_n_steps=7)

    def settings() -> Any:
        """All that a run could leave changed."""
        levels = [(logging.getLogger(name).level, logging.getLogger(name).filters[:]) for name in (pl.__name__, "")]
        own = [set(vars(each)) - {"log", "log_dict"} for each in (summary, bar)]  # which every Trainer adds
        return own, list(warnings.filters), levels

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = settings()
        try:
            ran.fit(classifier(pl, change), loader())
        except KeyError:
            assert fails
        assert settings() == before
        assert "the user's own" in [str(warning.message) for warning in caught]
    assert (summary._max_depth, ran.log_every_n_steps, "on_train_epoch_start" in vars(bar)) == (3, 7, False)


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
@pytest.mark.parametrize(("num_samples", "total"), [(16, 2), (17, 3), (None, 5), (40, 5)])
def test_the_total_of_the_bar_is_that_of_the_batches_seen(
    pl: Any, tmp_path: Any, kind: str, num_samples: int | None, total: int
) -> None:
    seen: list[Any] = []
    bar = getattr(importlib.import_module(f"{pl.__name__}.callbacks"), kind)()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            task = getattr(bar, "train_progress_bar_id", None)
            seen.append(bar.train_progress_bar.total if task is None else bar.progress.tasks[task].total)

    run(pl, tmp_path, CalibrationCapture("w8a8", num_samples), bar, Watch(), enable_model_summary=False)
    assert seen == [total] * total


def test_a_loader_that_ends_early_has_its_own_total(pl: Any, tmp_path: Any) -> None:
    bar = pl.callbacks.TQDMProgressBar()
    with pytest.warns(FewSamplesWarning):
        run(pl, tmp_path, CalibrationCapture("w8a8", 1000), bar, enable_model_summary=False)
    assert bar.train_progress_bar.total == 5
