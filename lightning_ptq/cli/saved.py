"""Saved reports: read back from report.json, printed, and put side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_ptq import errors
from lightning_ptq.errors import PTQError, PTQWarning
from lightning_ptq.report.ptq_report import PTQReport
from lightning_ptq.report.record import RunRecord
from lightning_ptq.report.table import ReportTable
from lightning_ptq.report.tables import settings_table, summary_table
from lightning_ptq.runtime.memory import format_bytes


def print_report(path: str, every: bool, console: Console) -> None:
    """Print the headline and the tables of a saved report.

    Args:
        path: Folder of the report, or its report.json.
        every: Whether all tables are printed.
        console: Console to print to.
    """
    load_report(path).print(console, every)


def compare_reports(paths: Sequence[str], console: Console) -> None:
    """Print saved reports side by side.

    Args:
        paths: Folders of the reports, or their report.json.
        console: Console to print to.
    """
    reports = [load_report(path) for path in paths]
    for table in comparison(_labels(paths), reports):
        console.print(table.to_rich())


def load_report(path: str) -> PTQReport:
    """Read a report that ``PTQReport.save`` wrote.

    Args:
        path: Its folder, or its report.json.

    Returns:
        The report; tensors of tuned states are not part of the file.

    Raises:
        PTQError: If there is no such file, or it is no report.
    """
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        report = _read(RunRecord, content)
    except OSError as error:
        raise PTQError(
            f"there is no report in {path} ({error.strerror or error}). Give a folder that --report_dir or"
            " PTQReport.save wrote, or its report.json."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PTQError(
            f"{file} is no report of lightning_ptq ({error}). Give the report.json that --report_dir or PTQReport.save"
            " wrote."
        ) from error
    return PTQReport(**{field.name: getattr(report, field.name) for field in dataclasses.fields(RunRecord)})


def _read(kind: Any, value: Any) -> Any:
    """Return the value of a type that JSON holds; fields that the type does not know are left out."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(each for each in inner if each is not type(None)), value)
    if kind is float:
        return math.nan if value is None else float(value)  # JSON knows no NaN
    if kind is PTQWarning:
        return getattr(errors, value["kind"], PTQWarning)(value["message"])
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{value!r:.40} in place of an object")
        hints = typing.get_type_hints(kind)
        make: Any = kind
        return make(
            **{f.name: _read(hints[f.name], value[f.name]) for f in dataclasses.fields(kind) if f.name in value}
        )
    if origin in (list, Sequence):
        return [_read(inner[0], each) for each in value]
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_read(each, item) for each, item in zip(kinds, value, strict=True))
    if origin in (dict, Mapping):
        keys = int if inner[0] is int else str
        return {keys(key): _read(inner[1], each) for key, each in value.items()}
    if kind is Path:
        return Path(value)
    if kind in (int, str, bool) and not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} in place of a {kind.__name__}")
    return value


def comparison(labels: Sequence[str], reports: Sequence[PTQReport]) -> list[ReportTable]:
    """Return the tables that put reports side by side: metrics, key figures, stages, and settings that differ.

    Args:
        labels: Name of each report.
        reports: The reports.
    """
    metrics: dict[str, list[Any]] = {}
    for index, report in enumerate(reports):
        for row in report.metrics:
            for name, value in ((f"{row.name}, float", row.before), (f"{row.name}, quantized", row.after)):
                metrics.setdefault(name, [None] * len(reports))[index] = value
    figures = _side_by_side([dict(summary_table(report).rows) for report in reports])
    stages = _side_by_side([_seconds(report) for report in reports])
    settings = _side_by_side([
        {f"{stage}: {name}": value for stage, name, value in settings_table(report.settings).rows} for report in reports
    ])  # fmt: skip
    differing = {name: values for name, values in settings.items() if len(set(values)) > 1}
    tables = [
        _table("settings", "Settings that differ", "setting", labels, differing),
        _table("stages", "Seconds of each stage", "stage", labels, stages),
        _table("summary", "Key figures", "quantity", labels, figures),
        _table("metrics", "Metrics", "metric", labels, metrics),
    ]
    return [table for table in tables if table.rows]


def _seconds(report: PTQReport) -> dict[str, float]:
    """Return the seconds of each stage; stages of the same name are added up."""
    seconds: dict[str, float] = {}
    for stage in report.stages:
        seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds
    return seconds


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _table(key: str, title: str, what: str, labels: Sequence[str], values: Mapping[str, Sequence[Any]]) -> ReportTable:
    sized = {
        name.removesuffix(", bytes"): [
            format_bytes(v) if name.endswith(", bytes") and v is not None else v for v in row
        ]
        for name, row in values.items()
    }
    return ReportTable(key, title, (what, *labels), [(name, *row) for name, row in sized.items()])


def _labels(paths: Sequence[str]) -> list[str]:
    """Return a short name for each report: the last part of its folder, or the whole path where that is shared."""
    folders = [Path(path).parent if Path(path).name == "report.json" else Path(path) for path in paths]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(paths)
