"""The Python code of the documentation runs; every option of a callback stands in its card."""

from __future__ import annotations

import functools
import inspect
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

ROOT = Path(__file__).parents[1]
CARDS = "lightning_ptq/callbacks/README.md"
TRAINER = pytorch_lightning.Trainer


class MyModule(pytorch_lightning.LightningModule):
    """What a reader has."""

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
    """The names that the documentation takes for given."""
    data = TensorDataset(seeded(0, 1024, 2, 6, 6), torch.arange(1024) % 4)
    return {
        **{name: getattr(lightning_ptq, name) for name in lightning_ptq.__all__},
        "callbacks": [lightning_ptq.CalibrationCapture("w8a8")],
        "pl": pytorch_lightning, "DataLoader": DataLoader, "MyModule": MyModule, "module": MyModule(),
        "train_set": data,
        "calibration_loader": DataLoader(data, 64), "val_loader": DataLoader(data, 256),
    }  # fmt: skip


def one_cpu(**arguments: Any) -> pytorch_lightning.Trainer:
    """The reader's Trainer, on the one process there is."""
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "enable_progress_bar": False}
    return TRAINER(**arguments | here | {"logger": False})


def blocks() -> list[Any]:
    """Every block of Python code, by file and line."""
    sybil = Sybil([PythonCodeBlockParser()], path=str(ROOT))
    found = []
    for name in ("README.md", CARDS, "recipes/README.md"):
        for example in sybil.parse(ROOT / name).examples():
            found.append(pytest.param(example, id=f"{name}:{example.line}"))
    return found


def test_there_is_code_in_every_document():
    assert {block.id.split(":")[0] for block in blocks()} == {"README.md", CARDS, "recipes/README.md"}


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.parametrize("block", blocks())
def test_the_code_of_the_documentation_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pytorch_lightning, "Trainer", one_cpu)
    block.document.namespace.clear()
    block.document.namespace.update(readers_namespace())
    block.evaluate()


@pytest.mark.parametrize("name", ["CalibrationCapture", "AdaQuantLayerwise", "BitAllocator", "StatsTuning"])
def test_a_card_has_all_its_parts_and_names_every_option(name):
    card = (ROOT / CARDS).read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    parts = ("**What.**", "**When.**", "**Cost.**", "| option | default |", "**Departures from the paper, and why.**")
    assert [part for part in parts if part not in card] == []
    options = inspect.signature(getattr(lightning_ptq, name)).parameters
    assert [option for option in options if f"`{option}`" not in card] == []
