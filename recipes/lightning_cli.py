"""PTQ from a YAML file: python recipes/lightning_cli.py fit --config recipes/configs/lightning_cli.yaml

The LightningModule, the LightningDataModule and the callbacks are given by class_path and init_args.
"""

from __future__ import annotations

from pathlib import Path

import torch
from measuring import console, quiet
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_ptq import save_packed


class PTQCLI(LightningCLI):
    """LightningCLI with two more options: the weights to start from, and the packed file to write."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        weights = "Trained weights: a checkpoint of the model, or its state dict. Null if the model loads its own."
        parser.add_argument("--weights", type=Path | None, default=None, help=weights)
        packed = "File for the packed weights, written after fit."
        parser.add_argument("--packed", type=Path | None, default=None, help=packed)

    def before_fit(self) -> None:
        file = self.config.fit.weights
        if file is not None:
            if not file.is_file():
                raise SystemExit(
                    f"there are no weights in {file}. Train them first, or name another file by --weights FILE."
                )
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state.get("state_dict", state))
        self.score("before")

    def after_fit(self) -> None:
        self.score("after")
        file = self.config.fit.packed
        if file is not None and self.trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            console.print(f"{file}: {save_packed(self.model, file)} bytes")

    def score(self, when: str) -> None:
        """Print the values that validation_step logs, if the model has one and the data module has data for it."""
        if is_overridden("validation_step", self.model) and is_overridden("val_dataloader", self.datamodule):
            (logged, *_) = self.trainer.validate(self.model, self.datamodule, verbose=False)
            if self.trainer.is_global_zero:
                console.print(f"{when} fit:", {name: round(value, 4) for name, value in logged.items()})


def main(args: list[str] | None = None) -> PTQCLI:
    """Run a subcommand of the CLI.

    Args:
        args: Command-line arguments; those of the process by default.
    """
    return PTQCLI(save_config_callback=None, auto_configure_optimizers=False, args=args)


if __name__ == "__main__":
    quiet()
    main()
