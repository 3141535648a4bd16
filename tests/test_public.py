from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ptq


def test_all_is_sorted_without_repetition() -> None:
    assert list(lightning_ptq.__all__) == sorted(set(lightning_ptq.__all__))


@pytest.mark.parametrize("name", lightning_ptq.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    public = getattr(lightning_ptq, name)
    assert public.__name__ == {"Choices": "Candidates"}.get(name, name)  # a former name
    text = inspect.cleandoc(vars(public).get("__doc__") or public.__doc__)
    # A sentence; a dataclass without a docstring would have its signature in place of one.
    assert re.match(r"[A-Z`].* .*[.:]$", text.splitlines()[0].removesuffix(")")), text.splitlines()[0]
    if inspect.isclass(public):  # what the class itself adds
        own = (
            vars(public).get("__dataclass_fields__")
            or inspect.signature(vars(public).get("__init__", object)).parameters
        )
    else:
        own = inspect.signature(public).parameters
    parameters = [parameter for parameter in own if not parameter.startswith("_") and parameter != "self"]
    undocumented = [parameter for parameter in parameters if not re.search(rf"^\s+{parameter}: \S", text, re.M)]
    assert undocumented in ([], ["args", "kwargs"], ["options"]), undocumented


def test_every_class_and_function_in_the_namespace_is_public() -> None:
    own = {
        name
        for name, value in vars(lightning_ptq).items()
        if getattr(value, "__module__", "").startswith("lightning_ptq.") and not name.startswith("_")
    }
    assert own <= set(lightning_ptq.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'AdaRound'"):
        lightning_ptq.AdaRound  # noqa: B018


def test_the_functions_do_without_lightning() -> None:
    code = """
import sys
from lightning_ptq import adaquant, calibrate, load_packed, prepare, save_packed
print("loaded:", *sorted({"lightning", "lightning_ptq.cli", "pytorch_lightning"}.intersection(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["loaded:"]


def test_no_optional_package_is_imported() -> None:
    # Lightning imports some by itself where they are installed, so it goes first.
    code = """
import sys
import lightning.pytorch, pytorch_lightning, torchmetrics
before = set(sys.modules)
import lightning_ptq, lightning_ptq.callbacks
print("loaded:", *{module.partition(".")[0] for module in set(sys.modules) - before})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split("loaded:")[1].split())
    assert "lightning_ptq" in loaded
    assert not loaded & {"IPython", "jsonargparse", "matplotlib", "onnx", "pandas", "wandb"}


def test_cross_references_of_the_docstrings_lead_somewhere() -> None:
    package = Path(lightning_ptq.__file__).parent
    found = [
        target
        for file in package.rglob("*.py")
        for target in re.findall(r":(?:class|func|meth|mod|data|attr):`~?(lightning_ptq[\w.]*)`", file.read_text())
    ]
    assert len(found) > 20
    assert [target for target in found if not resolves(target)] == []


def resolves(target: str) -> bool:
    """Whether a dotted name is one that pydoc finds."""
    return pydoc.locate(target) is not None
