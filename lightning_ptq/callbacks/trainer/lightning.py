"""Names of Lightning, from the package that is installed: ``pytorch_lightning``, ``lightning``, or both."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_ptq.errors import SurgeryError

if TYPE_CHECKING:
    from pytorch_lightning import Callback as LightningCallback
    from pytorch_lightning.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # not re-exported
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    # A Trainer accepts only the Callback class of its own package, so the callbacks derive from all that are installed.
    _packages = [p for p in ("pytorch_lightning", "lightning") if importlib.util.find_spec(p)]
    _modules = [importlib.import_module("lightning.pytorch" if p == "lightning" else p) for p in _packages]
    isolate_rng = importlib.import_module(f"{_modules[0].__name__}.utilities.seed").isolate_rng
    rank_zero_info = importlib.import_module(f"{_modules[0].__name__}.utilities.rank_zero").rank_zero_info
    LightningCallback = type("LightningCallback", tuple(m.Callback for m in _modules), {"__module__": __name__})

__all__ = ["LightningCallback", "isolate_rng", "rank_zero_info", "trainer_class_of"]


def trainer_class_of(module: Any) -> Any:
    """Return the Trainer class of the package that a LightningModule belongs to.

    Raises:
        SurgeryError: If the module is no LightningModule.
    """
    base = next((base for base in type(module).__mro__ if base.__name__ == "LightningModule"), None)
    if base is None:
        raise SurgeryError(
            f"{type(module).__name__} is no LightningModule. Wrap it in one, or use the functions that need no Trainer:"
            " calibrate(module, batches, 'w4a4'), then adaquant(calibration)."
        )
    return importlib.import_module(base.__module__.partition(".core")[0]).Trainer
