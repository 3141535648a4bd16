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
        # What could differ between the packages has tests with both; in the other files one of them is enough.
        packages = getattr(metafunc.module, "PACKAGES", ["pytorch_lightning", "lightning.pytorch"])
        metafunc.parametrize("pl", packages, indirect=True)
