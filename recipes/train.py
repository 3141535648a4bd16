"""An ordinary LightningCLI, without lightning_ptq: python recipes/train.py fit --config recipes/configs/digits.yaml"""

from __future__ import annotations

from pytorch_lightning.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(auto_configure_optimizers=False, save_config_callback=None)
