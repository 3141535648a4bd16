"""The Python code of the documentation runs; the table in a callback's card has exactly the callback's options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from helpers import ResNet, build, seeded
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ptq
from lightning_ptq.network import swapping

ROOT = Path(__file__).parents[1]
CARDS = "lightning_ptq/callbacks/README.md"
TRAINER = pytorch_lightning.Trainer
NAMES = ["CalibrationCapture", "AdaQuantLayerwise", "BitAllocator", "StatsTuning", "ExportONNX"]


class MyModule(pytorch_lightning.LightningModule):
    """The module of a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build(functools.partial(ResNet, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def readers_namespace() -> dict[str, Any]:
    """Return the names that the documentation takes for granted."""
    data = TensorDataset(seeded(0, 1024, 2, 6, 6), torch.arange(1024) % 4)
    return {
        **{name: getattr(lightning_ptq, name) for name in lightning_ptq.__all__},
        "callbacks": [lightning_ptq.CalibrationCapture("w8a8")],
        "pl": pytorch_lightning, "DataLoader": DataLoader, "MyModule": MyModule, "module": MyModule(),
        "train_set": data,
        "calibration_loader": DataLoader(data, 64), "val_loader": DataLoader(data, 256),
    }  # fmt: skip


def one_cpu(**arguments: Any) -> pytorch_lightning.Trainer:
    """Return the reader's Trainer, on a single process."""
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "enable_progress_bar": False}
    return TRAINER(**arguments | here | {"logger": False})


def blocks() -> list[Any]:
    """Return every block of Python code, by file and line."""
    sybil = Sybil([PythonCodeBlockParser()], path=str(ROOT))
    examples = []
    for name in ("README.md", CARDS, "recipes/README.md"):
        for example in sybil.parse(ROOT / name).examples():
            examples.append(pytest.param(example, id=f"{name}:{example.line}"))
    return examples


def test_there_is_code_in_every_document():
    assert {block.id.split(":")[0] for block in blocks()} == {"README.md", CARDS, "recipes/README.md"}


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.parametrize("block", blocks())
def test_the_code_of_the_documentation_runs(block, tmp_path, monkeypatch):
    if "transformers" in block.parsed and not os.environ.get("PTQ_TEST_INTEGRATIONS"):
        pytest.skip("runs in the nox session integrations")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pytorch_lightning, "Trainer", one_cpu)
    monkeypatch.setattr(swapping, "_REGISTRY", dict(swapping._REGISTRY))  # a block registers a layer
    block.document.namespace.clear()
    block.document.namespace.update(readers_namespace())
    block.evaluate()


def card(name: str) -> str:
    """Return the card of a callback."""
    return (ROOT / CARDS).read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def options_in_table(text: str) -> list[str]:
    """Return the names in the first column of a card's table of options."""
    rows = text.partition("| option | default |")[2].partition("\n\n")[0].splitlines()[2:]
    return [option for row in rows for option in re.findall(r"`(\w+)`", row.split("|")[1])]


def options(name: str) -> list[str]:
    """Return the options of a callback: its parameters, and the fields of the dataclass that takes its keywords."""
    parameters = inspect.signature(getattr(lightning_ptq, name)).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    if len(names) < len(parameters):
        names += [field.name for field in dataclasses.fields(lightning_ptq.ReconstructionConfig)]
    return names


@pytest.mark.parametrize("name", NAMES)
def test_a_card_has_all_its_parts(name):
    parts = ("**What.**", "**When.**", "**Cost.**", "| option | default |", "**Departures from the paper, and why.**")
    assert [part for part in parts if part not in card(name)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_card_has_exactly_the_options_of_the_callback(name):
    assert sorted(options_in_table(card(name))) == sorted(options(name))


def test_only_adaquant_takes_the_fields_of_the_dataclass():
    assert [name for name in NAMES if "steps" in options(name) and "drop" in options(name)] == ["AdaQuantLayerwise"]
    assert options_in_table("| option | default | what |\n|---|---|---|\n| `a`, `b` | `c` | `d` |\n\n`e`") == ["a", "b"]
