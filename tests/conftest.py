from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("helpers")
torch.set_num_threads(1)


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> Any:
    """Each of the two packages that bring a Trainer."""
    return importlib.import_module(request.param)
