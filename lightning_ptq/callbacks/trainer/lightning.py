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

__all__ = [
    "LightningCallback", "callbacks_of", "isolate_rng", "lightning_base", "overrides", "rank_zero_info",
    "trainer_class_of",
]  # fmt: skip

_BASES = ("LightningModule", "LightningDataModule")


def callbacks_of(trainer: Any) -> list[Any]:
    """Return all callbacks of a Trainer, which one of its connectors sets and its class does not declare."""
    return list(trainer.callbacks)


def lightning_base(cls: type) -> Any:
    """Return the class LightningModule or LightningDataModule that ``cls`` derives from, of either package."""
    return next(base for base in cls.__mro__ if base.__name__ in _BASES)


def overrides(instance: Any, name: str) -> bool:
    """Return True if a LightningModule or LightningDataModule has a method of its own in place of Lightning's."""
    cls = type(instance)
    return name in vars(instance) or getattr(cls, name) is not getattr(lightning_base(cls), name)


def trainer_class_of(module: Any) -> Any:
    """Return the Trainer class of the package that a LightningModule belongs to.

    Raises:
        SurgeryError: If the module is no LightningModule.
    """
    if not any(base.__name__ == "LightningModule" for base in type(module).__mro__):
        raise SurgeryError(
            f"{type(module).__name__} is no LightningModule. Wrap it in one, or use the functions that need no Trainer:"
            " calibrate(module, batches, 'w4a4'), then adaquant(calibration)."
        )
    return importlib.import_module(lightning_base(type(module)).__module__.partition(".core")[0]).Trainer
