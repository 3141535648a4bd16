"""Lightning itself, whichever of its two packages is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback as LightningCallback
    from pytorch_lightning.utilities.rank_zero import rank_zero_info as rank_zero_info  # type: ignore[attr-defined]  # of lightning_utilities
    from pytorch_lightning.utilities.seed import isolate_rng as isolate_rng
else:
    # A Trainer of either package accepts its own Callback class only, so the callbacks derive from every one installed.
    _packages = [p for p in ("pytorch_lightning", "lightning") if importlib.util.find_spec(p)]
    _modules = [importlib.import_module("lightning.pytorch" if p == "lightning" else p) for p in _packages]
    isolate_rng = importlib.import_module(f"{_modules[0].__name__}.utilities.seed").isolate_rng
    rank_zero_info = importlib.import_module(f"{_modules[0].__name__}.utilities.rank_zero").rank_zero_info
    LightningCallback = type("LightningCallback", tuple(m.Callback for m in _modules), {"__module__": __name__})
