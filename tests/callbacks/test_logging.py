from __future__ import annotations

import csv
import importlib.util
import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Snapshot, classifier, loader, same_state, state, trainer

from lightning_ptq import AdaQuantLayerwise, CalibrationCapture
from lightning_ptq.callbacks import pipelines
from lightning_ptq.callbacks.trainer.loggers import log_artifact
from lightning_ptq.errors import CallbackError, ReportWarning
from lightning_ptq.network.prepare import is_prepared
from lightning_ptq.report import PTQReport

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning"),
]

TABLES = {
    "summary", "stages", "warnings", "layers", "units_adaquant_parallel", "units_adaquant_sequential", "allocation",
    "rounds", "sensitivity", "frontier", "statistics",
}  # fmt: skip
PICTURES = {
    "units_adaquant_parallel", "curves_adaquant_parallel", "units_adaquant_sequential", "curves_adaquant_sequential",
    "allocation", "sensitivity", "frontier", "statistics", "ranges",
}  # fmt: skip
LAYERS = ("net.0", "net.3", "net.7", "net.9")


def advanced():
    """Rates that spoil some units, so that there are warnings to log."""
    return pipelines.advanced(
        0.2, parallel={"steps": 4, "weight_lr": 1.0}, sequential={"steps": 4, "weight_lr": 1.0}, statistics={"steps": 2}
    )


def fit(pl, tmp_path, logger, callbacks=None):
    module, callbacks = classifier(pl), callbacks or advanced()
    trainer(pl, tmp_path, *callbacks, logger=logger).fit(module, loader())
    return module, callbacks


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which W&B writes behind a header of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):  # the last record may not be whole yet
        if 32768 - place % 32768 < 7:  # the rest of a block that holds no further header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        if place + 7 + length > len(data):
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or the last of its parts
            yield whole
            whole = b""


def nested(items: Any) -> dict[str, Any]:
    """The values of a record's items, those below one key as a dictionary."""
    found: dict[str, Any] = {}
    for item in items:
        key, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        found = found | ({key: found.get(key, {}) | {inner[0]: value}} if inner else {key: value})
    return found


class WandbFile:
    """What an offline run has written: history by key, config, and the media files."""

    def __init__(self, folder: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        (path,) = folder.rglob("*.wandb")
        self.files, self.config = path.parent / "files", {}
        self.history: dict[str, list[Any]] = {}
        records: list[Any] = []
        deadline = time.monotonic() + 60
        while not (records and records[-1].HasField("exit")):  # W&B's own process may still be writing
            assert time.monotonic() < deadline
            time.sleep(0.05)
            records = [wandb_internal_pb2.Record.FromString(data) for data in log_records(path.read_bytes())]
        for record in records:
            for key, value in nested(record.history.item).items():
                self.history.setdefault(key, []).append(value)
            self.config |= nested(record.config.update)

    def table(self, key: str) -> dict[str, Any]:
        return json.loads((self.files / self.history[f"ptq/{key}"][0]["path"]).read_text())

    def picture(self, key: str) -> bytes:
        (entry,) = self.history[f"ptq/{key}_plot"]
        return (self.files / entry["filenames"][0]).read_bytes()


@pytest.fixture
def wandb_run(pl, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = pl.loggers.WandbLogger(project="ptq", save_dir=tmp_path, offline=True)
    _, callbacks = fit(pl, tmp_path, logger)
    wandb.finish()
    return WandbFile(tmp_path), callbacks


def test_an_offline_wandb_run_holds_every_table_picture_and_figure(wandb_run):
    run, callbacks = wandb_run
    report = callbacks[0].report
    for table in report.tables():
        if table.key in TABLES:
            logged = run.table(table.key)
            assert logged["columns"] == list(table.columns)
            assert len(logged["data"]) == len(table.rows)
    assert {key.split("/")[1] for key, found in run.history.items() if _is_a(found, "table-file")} == TABLES
    pictures = {key.split("/")[1] for key, found in run.history.items() if _is_a(found, "images/separated")}
    assert pictures == {f"{key}_plot" for key in PICTURES}
    for key in PICTURES:
        assert run.picture(key).startswith(b"\x89PNG")
    units = report.tuning["AdaQuant sequential"].units
    rows = run.table("units_adaquant_sequential")["data"]
    assert [(row[0], row[2], row[3]) for row in rows] == [(u.name, u.error_before, u.error_after) for u in units]
    assert run.history["ptq/adaquant_sequential/error_after"] == [unit.error_after for unit in units]
    assert run.history["ptq/adaquant_sequential/loss"] == [loss for unit in units for _, loss in unit.curve]
    for name in LAYERS:
        for kind in ("weights", "inputs"):
            (histogram,) = run.history[f"ptq/range/{name}/{kind}"]
            assert histogram["_type"] == "histogram"
            assert sum(histogram["values"]) > 0
    assert run.history["ptq/run/times_smaller"] == [pytest.approx(report.float_bytes / report.packed_bytes)]
    assert run.config["ptq"]["Bit allocation"]["budgets"] == {"size": 0.2}
    assert run.config["ptq"]["AdaQuant sequential"]["config"]["steps"] == 4


def _is_a(found: list[Any], kind: str) -> bool:
    return isinstance(found[0], dict) and found[0].get("_type") == kind


def test_csv_gets_scalars_and_settings(pl, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    _, callbacks = fit(pl, tmp_path, logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert not {"train_loss", "seen"} & rows[0].keys()
    tuned = callbacks[3].result.units
    units = [row for row in rows if row["ptq/adaquant_sequential/error_before"]]
    assert [int(row["step"]) for row in units] == list(range(len(tuned)))
    for row, unit in zip(units, tuned, strict=True):
        assert float(row["ptq/adaquant_sequential/error_before"]) == pytest.approx(unit.error_before)
        assert float(row["ptq/adaquant_sequential/error_after"]) == pytest.approx(unit.error_after)
        assert float(row["ptq/adaquant_sequential/accepted"]) == unit.accepted
    steps = [row for row in rows if row["ptq/statistics/after"]]
    after = [float(row["ptq/statistics/after"]) for row in steps]
    assert after == pytest.approx([row.after for row in callbacks[4].result])
    (last,) = [row for row in rows if row["ptq/run/times_smaller"]]
    assert float(last["ptq/run/packed_bytes"]) == callbacks[0].report.packed_bytes
    assert "first_last_bits" in Path(logger.log_dir, "hparams.yaml").read_text()


def test_tensorboard_gets_pictures_texts_and_histograms(pl, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    fit(pl, tmp_path, logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"ptq/{key}_plot" for key in PICTURES}
    assert {f"ptq/{key}/text_summary" for key in TABLES} <= set(events.Tags()["tensors"])
    assert {f"ptq/range/{name}/inputs" for name in LAYERS} <= set(events.Tags()["histograms"])
    assert "ptq/adaquant_parallel/loss" in events.Tags()["scalars"]


def mlflow_logger(pl, folder):
    """A logger of the class that Lightning calls MLFlowLogger, and a client that keeps what it is given."""

    class Client:
        def __init__(self) -> None:
            self.calls: list[tuple[str, str, Any, str]] = []

        def __getattr__(self, name: str) -> Any:
            if name not in ("log_table", "log_dict", "log_image", "log_artifact"):
                raise AttributeError(name)
            return lambda run_id, what, file: self.calls.append((name, run_id, what, file))

        def given(self, kind: str) -> dict[str, Any]:
            return {file: what for name, _, what, file in self.calls if name == kind}

    class MLFlowLogger(pl.loggers.logger.Logger):
        name, version, run_id, experiment = "ptq", "0", "run 7", Client()

        def __init__(self) -> None:
            super().__init__()
            self.metrics: dict[str, float] = {}

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
            self.params = params

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.metrics |= metrics

    return MLFlowLogger()


@pytest.mark.parametrize("pandas", [True, False])
def test_mlflow_gets_everything_by_its_client(pl, tmp_path, monkeypatch, pandas):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: (pandas or None) if n == "pandas" else found(n))
    logger = mlflow_logger(pl, tmp_path)
    _, callbacks = fit(pl, tmp_path, logger)
    client = logger.experiment
    assert {run_id for _, run_id, _, _ in client.calls} == {"run 7"}
    tables = client.given("log_table" if pandas else "log_dict")
    ranges = client.given("log_dict")["ptq/ranges.json"]
    assert tables.keys() - {"ptq/ranges.json"} == {f"ptq/{key}.json" for key in TABLES}
    for table in callbacks[0].report.tables():
        if table.key in TABLES:
            logged = tables[f"ptq/{table.key}.json"]
            columns, rows = (list(logged), list(zip(*logged.values(), strict=True))) if pandas else logged.values()
            assert (columns, len(rows)) == (list(table.columns), len(table.rows))
    pictures = client.given("log_image")
    assert pictures.keys() == {f"ptq/{key}_plot.png" for key in PICTURES}
    assert all(picture.size > (1, 1) for picture in pictures.values())
    assert ranges.keys() == {f"ptq/range/{name}/{kind}" for name in LAYERS for kind in ("weights", "inputs")}
    assert len(ranges["ptq/range/net.0/weights"]["edges"]) == len(ranges["ptq/range/net.0/weights"]["counts"]) + 1
    assert logger.metrics["ptq/run/packed_bytes"] == callbacks[0].report.packed_bytes


def test_mlflow_gets_the_exported_file(pl, tmp_path):
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).touch()
    logger = mlflow_logger(pl, tmp_path)
    log_artifact(trainer(pl, tmp_path, logger=logger), tmp_path / "model.onnx", "model")
    assert logger.experiment.calls == [
        ("log_artifact", "run 7", str(tmp_path / name), "ptq/model") for name in ("model.onnx", "model.onnx.data")
    ]


def test_names_are_identifiers(pl, tmp_path):
    logger = recording_logger(pl, tmp_path)
    _, callbacks = fit(pl, tmp_path, logger)
    report = callbacks[0].report
    names = {*logger.keys, *(f"ptq/{table.key}" for table in report.tables()), *report.summary()}
    assert {"ptq/run/allocated_fisher", "ptq/adaquant_parallel/loss", "ptq/allocated/size"} <= names
    assert not [name for name in names if not re.fullmatch(r"([a-z_]+/)*[a-z_]+", name)]


@pytest.mark.both_packages
def test_loggers_change_nothing_and_none_is_fine(pl, tmp_path):
    logged, _ = fit(pl, tmp_path / "a", [pl.loggers.CSVLogger(tmp_path), pl.loggers.TensorBoardLogger(tmp_path)])
    plain, callbacks = fit(pl, tmp_path / "b", False)
    assert same_state(state(logged), state(plain))
    assert {table.key for table in callbacks[0].report.tables()} == TABLES | {"settings"}


def test_units_are_logged_as_they_come(pl, tmp_path):
    seen: list[int] = []
    tuner = AdaQuantLayerwise(steps=2)

    class Watch(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "ptq/adaquant_sequential/error_after" in metrics:
                assert tuner.result is None
                seen.append(step)
            super().log_metrics(metrics, step)

    fit(pl, tmp_path, Watch(tmp_path), [CalibrationCapture("w3a4"), tuner])
    assert seen == [0, 1]


def test_a_folder_that_cannot_be_made_is_found_out_before_the_work(pl, tmp_path):
    (tmp_path / "file").touch()
    module = classifier(pl)
    before = Snapshot(module)
    with pytest.raises(CallbackError, match=r"report_dir='.*file/deep' cannot be created"):
        trainer(pl, tmp_path, CalibrationCapture("w8a8", report_dir=str(tmp_path / "file" / "deep"))).fit(
            module, loader()
        )
    before.assert_unchanged()


def test_a_report_that_cannot_be_written_costs_a_warning_only(pl, tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(PTQReport, "save", full)
    module = classifier(pl)
    capture = CalibrationCapture("w8a8", report_dir=str(tmp_path / "report"))
    with pytest.warns(ReportWarning, match="No space left"):
        trainer(pl, tmp_path, capture).fit(module, loader())
    assert is_prepared(module)
    assert [type(warning) for warning in capture.report.warnings] == [ReportWarning]


def test_a_logger_that_fails_in_the_end_does_not_cost_the_quantized_module(pl, tmp_path):
    class Broken(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "ptq/run/seconds" in metrics:
                raise ConnectionError("no network")

    module = classifier(pl)
    with pytest.warns(ReportWarning, match=r"could not be logged \(ConnectionError: no network\)"):
        trainer(pl, tmp_path, CalibrationCapture("w8a8"), logger=Broken(tmp_path)).fit(module, loader())
    assert is_prepared(module)
    assert module.net[0].qconfig is not None


def recording_logger(pl, folder):
    class Recording(pl.loggers.CSVLogger):
        """Keeps the keys of all that it is given, and what its experiment is used for."""

        def __init__(self) -> None:
            super().__init__(folder)
            self.keys, self.used = [], []

        @property
        def experiment(self) -> Any:
            self.used.append("experiment")
            return super().experiment

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.keys += metrics
            super().log_metrics(metrics, step)

    return Recording()


LOGGED = {
    "metrics": lambda m, pl: m.logger.log_metrics({"mine": 1.0}, step=3),
    "experiment": lambda m, pl: m.logger.experiment.add_scalar("mine", 1.0, global_step=3),
    "all loggers": lambda m, pl: [logger.log_metrics({"mine": 1.0}) for logger in m.loggers],
    "of the trainer": lambda m, pl: m.trainer.logger.log_metrics({"mine": 1.0}),
    "log": lambda m, pl: m.log("mine", 1.0),
    "by kind": lambda m, pl: (
        m.logger.log_metrics({"mine": 1.0}) if isinstance(m.logger, pl.loggers.CSVLogger) else 1 / 0
    ),
    "an image": lambda m, pl: m.logger.experiment["images"].append(m.logger.version, m.logger.log_dir),
    "in a block": lambda m, pl: m.logger.experiment.run.__enter__().log(list(m.logger.experiment.history)),
}


@pytest.mark.parametrize("kind", LOGGED)
def test_a_step_logs_nothing_and_the_run_does(pl, tmp_path, kind):
    asked = []

    def change(base: Any) -> Any:
        class Logging(base):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                LOGGED[kind](self, pl)
                asked.append((len(self.loggers), self.logger.save_dir))
                return super().training_step(batch, batch_idx)

        return Logging

    logger = recording_logger(pl, tmp_path)
    module = classifier(pl, change)
    capture = CalibrationCapture("w8a8", weight_observer="minmax", activation_observer="minmax")
    run = trainer(pl, tmp_path, capture, AdaQuantLayerwise(steps=2), logger=logger)
    run.fit(module, loader())
    assert set(asked) == {(1, str(tmp_path))}
    assert "mine" not in logger.keys
    assert "ptq/run/seconds" in logger.keys
    assert run.loggers == [logger]
    module.logger.log_metrics({"mine": 1.0})
    assert "mine" in logger.keys


def test_a_step_may_log_without_any_logger(pl, tmp_path):
    def change(base: Any) -> Any:
        class Logging(base):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                assert (self.logger, self.loggers) == (None, [])
                return super().training_step(batch, batch_idx)

        return Logging

    trainer(pl, tmp_path, CalibrationCapture("w8a8"), logger=False).fit(classifier(pl, change), loader())
