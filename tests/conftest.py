from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("helpers")
torch.set_num_threads(1)


@pytest.fixture
def pl(request: pytest.FixtureRequest) -> Any:
    """Each of the two packages that bring a Trainer."""
    return importlib.import_module(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pl" in metafunc.fixturenames:
        # One of them is enough, except where the library tells classes of the one from those of the other.
        both = any(marker.name == "both_packages" for marker in metafunc.definition.iter_markers())
        packages = ["pytorch_lightning", *(["lightning.pytorch"] if both else [])]
        metafunc.parametrize("pl", packages, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that fork first: a process in which autograd has started threads cannot run it in a fork."""
    items.sort(key=lambda item: "ranks" not in item.path.parts)
