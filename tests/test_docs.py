"""The code of the documentation runs, its tables have exactly the callbacks' options, its API all public names."""

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
from lightning_ptq.tuning import config

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
CARDS, METHOD = ROOT / "docs/callbacks.md", ROOT / "docs/method.md"
STEPS = dict.fromkeys(range(2, 9), 5)  # fewer than a reader's run takes
WIDTH = 84  # characters that a code block of the site shows without scrolling
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
        output = self(batch[0])
        self.log("loss", F.cross_entropy(output, batch[1]))
        self.log("val_acc", (output.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def readers_namespace() -> dict[str, Any]:
    """Return the names that the documentation takes for granted."""
    data = TensorDataset(seeded(0, 256, 2, 4, 4), torch.arange(256) % 4)  # fewer than a reader has
    return {
        **{name: getattr(lightning_ptq, name) for name in lightning_ptq.__all__},
        "callbacks": [lightning_ptq.CalibrationCapture("w8a8")],
        "pl": pytorch_lightning, "torch": torch, "DataLoader": DataLoader, "MyModule": MyModule, "module": MyModule(),
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
    for name in PAGES:
        for example in sybil.parse(ROOT / name).examples():
            examples.append(pytest.param(example, id=f"{name}:{example.line}"))
    return examples


def test_there_is_code_on_the_pages_that_show_how_to():
    found = {block.id.split(":")[0] for block in blocks()}
    wanted = {"README.md", *(f"docs/{name}.md" for name in ("index", "choosing", "callbacks", "report", "serving"))}
    wanted |= {page for page in PAGES if page.startswith("docs/how-to/") and "command-line" not in page}
    assert found == wanted


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.RolledBackWarning")
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.FewSamplesWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")
@pytest.mark.parametrize("block", blocks())
def test_the_code_of_the_documentation_runs(block, tmp_path, monkeypatch):
    if "transformers" in block.parsed and not os.environ.get("PTQ_TEST_INTEGRATIONS"):
        pytest.skip("runs in the nox session integrations")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pytorch_lightning, "Trainer", one_cpu)
    monkeypatch.setattr(config, "DEFAULT_STEPS", STEPS)
    monkeypatch.setattr(swapping, "_REGISTRY", dict(swapping._REGISTRY))  # a block registers a layer
    block.document.namespace.clear()
    block.document.namespace.update(readers_namespace())
    block.evaluate()


def card(name: str, page: Path = CARDS) -> str:
    """Return the section about a callback."""
    return page.read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]


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
    parts = ("**What.**", "**When.**", "**Cost.**", "| option | default |")
    assert [part for part in parts if part not in card(name)] == []
    assert "**Departures from the paper, and why.**" in card(name, METHOD)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_card_has_exactly_the_options_of_the_callback(name):
    assert sorted(options_in_table(card(name))) == sorted(options(name))


def test_only_adaquant_takes_the_fields_of_the_dataclass():
    assert [name for name in NAMES if "steps" in options(name) and "drop" in options(name)] == ["AdaQuantLayerwise"]
    assert options_in_table("| option | default | what |\n|---|---|---|\n| `a`, `b` | `c` | `d` |\n\n`e`") == ["a", "b"]


def test_the_api_has_every_public_name_once():
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/api").glob("*.md"))]
    names = re.findall(r"^::: lightning_ptq\.(\w+)$", "\n".join(pages), re.M)
    former = {"Choices"}
    assert sorted(names) == sorted(set(lightning_ptq.__all__) - former)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(f"docs/{page}" for page in listed) == sorted(page for page in PAGES if page != "README.md")


def test_code_fits_its_column():
    def too_wide(page: str) -> list[str]:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^( *)```\w+\n(.*?)^\1```$", text, re.M | re.S)
        return [line for _, block in blocks for line in block.splitlines() if len(line) > WIDTH]

    assert {page: lines for page in PAGES if page != "README.md" and (lines := too_wide(page))} == {}
