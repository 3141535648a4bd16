"""Every kind of network goes through the whole library."""

from __future__ import annotations

import pytest
from sweep import run_everything
from zoo import PLAIN, VISION

CASES = {**PLAIN, **VISION}


@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.PTQWarning")
@pytest.mark.parametrize("name", CASES)
def test_the_whole_library_on(name, tmp_path):
    run_everything(CASES[name], tmp_path)
