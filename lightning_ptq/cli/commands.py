"""The subcommands that take model, data and trainer as LightningCLI does."""

from __future__ import annotations

import argparse
import importlib
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_ptq.callbacks import inspect
from lightning_ptq.callbacks.base import PTQCallback, capture_of
from lightning_ptq.callbacks.trainer.lightning import LightningCallback
from lightning_ptq.cli import options
from lightning_ptq.cli.forwards import first_batch, first_call
from lightning_ptq.cli.packages import package_of
from lightning_ptq.cli.weights import load_weights
from lightning_ptq.errors import CallbackError, ExportError, PTQError
from lightning_ptq.export.onnx import export_onnx
from lightning_ptq.export.packed import save_packed
from lightning_ptq.report.table import ReportTable, default_console
from lightning_ptq.runtime.memory import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytorch_lightning.cli import LightningCLI
else:
    LightningCLI = object  # the class of the model's own package of Lightning, a base beside Command

_TRAINER = (
    "All arguments of Lightning's Trainer are options, such as --trainer.accelerator gpu, --trainer.devices 2,"
    " --trainer.strategy ddp or --trainer.callbacks. --print_config lists them in the format of a --config file."
)
_BOTH = (
    "the trainer's callbacks are PTQ callbacks, so these options have no effect: {names}. Write them as init_args of"
    " the callbacks, or leave the PTQ callbacks out of trainer.callbacks."
)


def run(command: str, args: list[str]) -> None:
    """Run a subcommand.

    Args:
        command: Its name.
        args: The arguments after the name.
    """
    kind, package = _COMMANDS[command], package_of(args)
    base = importlib.import_module(f"{package}.cli").LightningCLI
    # Advice on training, which says nothing about a PTQ run.
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning\\.")
    cli = type(kind.__name__, (kind, base), {})(
        save_config_callback=None, auto_configure_optimizers=False, run=False, args=args, seed_everything_default=0,
        trainer_defaults={
            "max_epochs": 1, "devices": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False
        },
        parser_kwargs={
            "prog": f"lightning-ptq {command}", "description": kind.__doc__,
            "usage": "%(prog)s --model CLASS [--data CLASS] [--weights FILE] [--config FILE] [options]",
        },
    )  # fmt: skip
    cli.execute()


class Command(LightningCLI):
    """What the subcommands share: a model, its weights, data and a trainer."""

    def execute(self) -> None:
        """Do the work of the subcommand."""
        raise NotImplementedError

    def add_options(self, parser: Any) -> None:
        """Add the options of the subcommand, which stand before those of the trainer in its help."""

    def add_core_arguments_to_parser(self, parser: Any) -> None:
        """Add the options of the subcommand, and those of LightningCLI."""
        group = parser.add_argument_group("Weights")
        group.add_argument(
            "--weights", type=Path | None, default=None,
            help="Weights of the model: a checkpoint, a state dict or a .safetensors file; those of a quantized model"
            " quantize it. Null if the model loads its own.",
        )  # fmt: skip
        self.add_options(parser)
        super().add_core_arguments_to_parser(parser)
        for key in ("model", "data", "trainer"):
            parser.groups[key].title = key.title()
        parser.groups["trainer"].description = _TRAINER
        for action in parser._actions:  # jsonargparse has no way to leave them out of the help
            if action.dest.startswith("trainer."):
                action.help = argparse.SUPPRESS

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the arguments, and check what can be checked before any class is instantiated."""
        self.config = parser.parse_args(args)
        if self.config.weights is not None and not self.config.weights.is_file():
            self.refuse(f"there are no weights in {self.config.weights}. Name another file by --weights FILE.")

    def instantiate_classes(self) -> None:
        """Instantiate model, data and trainer, and load the weights."""
        with self._short_errors():
            super().instantiate_classes()
        if self.config.weights is not None:
            self.model.configure_model()
            load_weights(self.model, self.config.weights)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Instantiate the trainer with the callbacks of YAML, or those of the options."""
        given = self.config_init["trainer"].get("callbacks") or []
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        return super().instantiate_trainer(**{"callbacks": self.callbacks(given), **kwargs})

    def callbacks(self, given: list[Any]) -> list[Any]:
        """Return the callbacks of the trainer, of which ``given`` are the user's."""
        return given

    def refuse(self, message: str) -> NoReturn:
        """Print the usage and a message, and exit with status 2."""
        self.parser.error(message)
        raise SystemExit(2)

    @contextmanager
    def _short_errors(self) -> Iterator[None]:
        """Report a mistake in the arguments of a constructor as jsonargparse reports those that it finds."""
        try:
            yield
        except Exception as error:  # jsonargparse wraps what a constructor raises
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, PTQError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            self.refuse(str(cause))


class Planned(Command):
    """A subcommand whose callbacks are given by options, or by YAML."""

    def add_options(self, parser: Any) -> None:
        """Add the options that the callbacks are made of."""
        self.names = parser.add_function_arguments(options.callbacks_from, None, as_group=True)
        parser.groups["callbacks_from"].title = "Quantization"

    def callbacks(self, given: list[Any]) -> list[Any]:
        """Return the user's callbacks, with those of the options if none of them is a PTQ callback."""
        chosen = {name: self.config[name] for name in self.names}
        if not any(isinstance(callback, PTQCallback) for callback in given):
            return [*options.callbacks_from(**chosen), *given]
        defaults = self.parser.get_defaults()
        if changed := [f"--{name}" for name, value in chosen.items() if value != defaults[name]]:
            self.refuse(_BOTH.format(names=", ".join(changed)))
        return given


class Inspect(Planned):
    """Print what a run would quantize, what stays float, and what will go wrong."""

    def execute(self) -> None:
        """Print the findings about the model, its data and the trainer."""
        batch = first_batch(self.trainer, self.model, self.datamodule)
        inspect(self.model, batch, trainer=self.trainer).print()


class Output(LightningCallback):
    """Writes the quantized checkpoint when the run is done, before its progress is removed.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the file.

        Raises:
            CallbackError: If it cannot be written; the run can be resumed.
        """
        try:
            trainer.save_checkpoint(self.path)
        except Exception as error:
            raise CallbackError(
                f"{self.path} cannot be written ({type(error).__name__}: {error}). Make room, or name another file by"
                " --output, and start the run again; it resumes at its end."
            ) from error


class Quantize(Planned):
    """Quantize a model by one pass over its calibration samples, which are those of the train loader."""

    def add_options(self, parser: Any) -> None:
        """Add the options of the callbacks, and those of the files."""
        super().add_options(parser)
        parser.add_function_arguments(options.outputs, None, as_group=True)

    def callbacks(self, given: list[Any]) -> list[Any]:
        """Return all callbacks, with those that write files."""
        callbacks, config = super().callbacks(given), self.config
        for path in (config.output, config.packed, config.onnx):
            if path is not None:
                _check_file(path)
        if config.onnx is not None:
            callbacks.append(options.exporter(config.onnx))
        # First, since CalibrationCapture completes the run in the same hook.
        return [*([] if config.output is None else [Output(config.output)]), *callbacks]

    def execute(self) -> None:
        """Run PTQ, which validates the model before and after, and write the files."""
        if capture_of(self.trainer) is None:
            self.refuse("trainer.callbacks has no CalibrationCapture. Put one before the other PTQ callbacks.")
        if not self.config.validate:
            self.trainer.limit_val_batches = 0
        self.trainer.fit(self.model, datamodule=self.datamodule)
        self._show_metrics()
        config = self.config
        if config.packed is not None and self.trainer.is_global_zero:
            self._say(f"{config.packed}: {format_bytes(save_packed(self.model, config.packed))}")
        for path in (config.output, config.onnx):
            if path is not None and self.trainer.is_global_zero:
                self._say(f"{path}: {format_bytes(path.stat().st_size)}")
        folder = getattr(capture_of(self.trainer), "report_dir", None)
        if folder is not None:
            self._say(f"{Path(folder) / 'report.html'}: the report; lightning-ptq report {folder} prints it")

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            default_console().print(line, markup=False, highlight=False)

    def _show_metrics(self) -> None:
        """Print the metrics that the run has measured before and after."""
        capture: Any = capture_of(self.trainer)
        rows: list[tuple[Any, ...]] = [
            (row.name, row.before, row.after, row.after - row.before) for row in capture.report.metrics
        ]
        if rows and self.trainer.is_global_zero:
            table = ReportTable("metrics", "Validation", ("metric", "float", "quantized", "change"), rows)
            default_console().print(table.to_rich())


class Validate(Command):
    """Run the model's validation on a quantized file, or on float weights."""

    def execute(self) -> None:
        """Validate; Lightning prints what validation_step logs."""
        self.trainer.validate(self.model, datamodule=self.datamodule)


class Export(Command):
    """Write a quantized file as ONNX with integer weights, verified in onnxruntime."""

    def add_options(self, parser: Any) -> None:
        """Add the options of the export."""
        parser.add_function_arguments(options.onnx_export, None, as_group=True)

    def execute(self) -> None:
        """Export the network that the step calls, with the inputs of a batch as the example."""
        config = self.config
        _check_file(config.onnx)
        batch = first_batch(self.trainer, self.model, self.datamodule)
        network, inputs = first_call(self.model, config.step, batch, config.network)
        result = export_onnx(
            network, config.onnx, inputs, target=config.target, opset=config.opset, verify=config.verify
        )
        verified = f", verified: {result.parity}" if result.parity is not None else ""
        default_console().print(f"{result.path}: {format_bytes(result.bytes)}{verified}", markup=False, highlight=False)


def _check_file(path: Path) -> None:
    """Create the folder of a file; raise if the file cannot be written there."""
    if path.is_dir():
        raise ExportError(f"{path} is a folder. Name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"the folder of {path} cannot be created ({error}). Name another file.") from error


_COMMANDS: dict[str, type[Command]] = {"inspect": Inspect, "quantize": Quantize, "validate": Validate, "export": Export}
