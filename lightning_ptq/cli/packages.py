"""The package of Lightning that a model is built on; a Trainer accepts only models of its own package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULT = "pytorch_lightning"
OTHER = "lightning.pytorch"


def package_of(args: list[str]) -> str:
    """Return ``"lightning.pytorch"`` if the model in the arguments derives from its LightningModule, else the default.

    Args:
        args: Arguments of a subcommand; the model is an import path there, or in a YAML file that ``--config`` names.
    """
    paths = [path for path in _class_paths(args) if "." in path]
    bases = _bases(paths[-1]) if paths else []  # as in parsing, the last one counts
    return OTHER if any(base.split(".")[:2] == OTHER.split(".") for base in bases) else DEFAULT


def _class_paths(args: list[str]) -> Iterator[str]:
    for name, value in _options(args):
        if name in ("--model", "--model.class_path"):
            yield value
        elif name in ("-c", "--config"):
            yield from _in_file(Path(value))


def _options(args: list[str]) -> Iterator[tuple[str, str]]:
    for index, text in enumerate(args):
        name, equals, value = text.partition("=")
        yield name, value if equals or index + 1 == len(args) else args[index + 1]


def _in_file(file: Path) -> Iterator[str]:
    import yaml  # comes with jsonargparse

    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return  # the parser of the subcommand says what is wrong with it
    model = content.get("model") if isinstance(content, dict) else None
    path = model.get("class_path") if isinstance(model, dict) else model
    if isinstance(path, str):
        yield path


def _bases(path: str) -> list[str]:
    """Return the modules of all LightningModule classes that a class derives from."""
    module, _, name = path.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return []  # as above
    return [base.__module__ for base in getattr(cls, "__mro__", ()) if base.__name__ == "LightningModule"]
