from __future__ import annotations

from typing import Any

import pytest
from helpers import classifier, loader, trainer

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.callbacks.trainer import progress

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]


def run(pl, tmp_path, bar, enabled=True):
    tuner = AdaQuantLayerwise(steps=4, batch_size=16)
    made = trainer(pl, tmp_path, *bar, CalibrationCapture("w3a4"), tuner, enable_progress_bar=enabled)
    made.fit(classifier(pl), loader())


def test_the_rich_bar_shows_the_units_and_keeps_a_line_for_the_stage(pl, tmp_path):
    seen: list[Any] = []
    kept: list[Any] = []

    class Bar(pl.callbacks.RichProgressBar):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            kept.extend((t.description, t.completed, t.total, t.visible) for t in self.progress.tasks)
            super().on_train_end(trainer, pl_module)

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            rich = trainer.progress_bar_callback.progress
            own = rich.update

            def update(task: Any, **fields: Any) -> None:
                seen.append(fields.get("description"))
                own(task, **fields)

            rich.update = update

    run(pl, tmp_path, [Watch(), Bar(console_kwargs={"force_terminal": True})])
    assert [text for text in dict.fromkeys(seen) if text] == [
        *(f"[white]AdaQuant sequential net.{n}" for n in ("0-6", "7-9")), "[white]AdaQuant sequential",
    ]  # fmt: skip
    assert ("[white]AdaQuant sequential", 8, 8, True) in kept


def test_the_tqdm_bar_shows_the_steps(pl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    run(pl, tmp_path, [pl.callbacks.TQDMProgressBar()])
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).replace("\n", "\r").split("\r") if "AdaQuant" in line]
    assert any("AdaQuant sequential net.7-9" in line for line in lines)
    assert "8/8" in lines[-1]


@pytest.mark.parametrize("bar", ["RichProgressBar", "TQDMProgressBar"])
def test_a_log_file_gets_lines(pl, tmp_path, monkeypatch, bar):
    lines: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    run(pl, tmp_path, [getattr(pl.callbacks, bar)()])
    assert any("AdaQuant sequential: 50%, at net.0-6" in line and "s left" in line for line in lines)
    assert lines[-1].startswith("AdaQuant sequential: done in")
    assert not [line for line in lines if "\r" in line or "\n" in line]


def test_lines_come_now_and_then_only(pl, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    run(pl, tmp_path, [pl.callbacks.TQDMProgressBar()])
    assert len(lines) == 1


def test_a_disabled_bar_is_quiet(pl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "rank_zero_info", lambda text: pytest.fail(text))
    run(pl, tmp_path, [], enabled=False)
    assert "AdaQuant" not in capsys.readouterr().out
