from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lightning_ptq


def test_all_is_sorted_without_repetition() -> None:
    assert list(lightning_ptq.__all__) == sorted(set(lightning_ptq.__all__))


@pytest.mark.parametrize("name", lightning_ptq.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    found = getattr(lightning_ptq, name)
    assert found.__name__ == name
    # A dataclass without a docstring gets its signature for one.
    assert len(inspect.cleandoc(vars(found).get("__doc__") or found.__doc__).splitlines()[0].split()) >= 3
    assert not (found.__doc__ or "").startswith(f"{name}(")


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
print("loaded:", *sorted({"lightning", "pytorch_lightning"}.intersection(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["loaded:"]
