"""Check an installed wheel, and use it as the first example of the README does: python tests/wheel.py FILE.whl"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ptq

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("lightning_ptq/py.typed", "lightning_ptq/report/page.html", "lightning_ptq/cli/main.py")


class MyModule(pl.LightningModule):
    """The module of a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def main(wheel: Path) -> None:
    """Check the files of the wheel, where the package was imported from, the console script, and the example."""
    missing = set(FILES) - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise SystemExit(f"{wheel.name} lacks {sorted(missing)}")
    home = Path(lightning_ptq.__file__).resolve().parent
    if home == REPOSITORY / "lightning_ptq":
        raise SystemExit(f"lightning_ptq was imported from the repository, {home}")
    (script,) = entry_points(group="console_scripts", name="lightning-ptq")
    if script.load() is not __import__("lightning_ptq.cli.main", fromlist=["main"]).main:
        raise SystemExit(f"the console script runs {script.value}")
    command = Path(sys.executable).with_name("lightning-ptq")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    if shown.strip() != f"lightning-ptq {lightning_ptq.__version__}":
        raise SystemExit(f"{command} --version printed {shown!r}")
    example()


def example() -> None:
    """Run the first Python block of the README that builds a Trainer."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "Trainer(" in block)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 4)
    names: dict[str, Any] = {
        "MyModule": MyModule, "module": MyModule(), "calibration_loader": DataLoader(data, 16),
        "val_loader": DataLoader(data, 64),
    }  # fmt: skip
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    pl.Trainer = functools.partial(pl.Trainer, **settings)
    exec(compile(code, "README.md", "exec"), names)
    if not Path("model.safetensors").is_file():
        raise SystemExit("the example of the README wrote no model.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
