"""CalibrationCapture: the calibration pass inside ``trainer.fit``, and what surrounds every PTQ run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.calibrator import Calibrator
from lightning_ptq.callbacks.base import PTQCallback, check_order, check_trainer, ptq_callbacks, told
from lightning_ptq.callbacks.trainer.dataloading import check_same_length, no_waiting, population, unshuffled
from lightning_ptq.callbacks.trainer.lightning import isolate_rng, rank_zero_info
from lightning_ptq.callbacks.trainer.loggers import log_end, log_ranges, log_settings, shows_pictures
from lightning_ptq.callbacks.trainer.muting import Step, calibration_forward, muted
from lightning_ptq.callbacks.trainer.resuming import FOLDER, Journals
from lightning_ptq.callbacks.trainer.signals import StopRequest
from lightning_ptq.errors import CalibrationError, CallbackError, ReportWarning, noted_warnings, warn
from lightning_ptq.network.prepare import Prepared, is_prepared, prepare
from lightning_ptq.numerics.qconfig import ObserverName, QConfig
from lightning_ptq.report import PTQReport
from lightning_ptq.report.ptq_report import plain
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.runtime.ranks import Ranks, current_ranks

log = logging.getLogger(__name__)


class CalibrationCapture(PTQCallback):
    """Turns ``trainer.fit`` into a PTQ run: one pass over the calibration set, then a module quantized to the nearest.

    Comes first among the library's callbacks; those behind it go on from the calibrated module. The module's own
    optimizers, schedulers and training hooks do not run. Calibration computes in float32 whatever the precision of
    the Trainer. If anything fails, the float module is put back as it was.

    Args:
        qconfig: What to quantize: ``"w4a8"`` and the like, a :class:`~lightning_ptq.numerics.qconfig.QConfig`, or its
            dictionary.
        num_samples: Enough samples: the pass stops behind the batch that completes them. None for the whole loader.
        step: The calibration forward: ``"training"`` (the module's ``training_step``), ``"predict"`` (its
            ``predict_step``, or ``forward`` on the inputs if it has none), or a function of module and batch.
        overrides: Bit widths by layer-name pattern, such as ``{"head.*": "w8a8"}``.
        exclude: Patterns of layers that stay float.
        first_last_bits: Least widths of the first and last layer in execution order; None for no exception.
        symmetric_activations: True for a signed activation grid with zero point 0.
        weight_observer: ``"mse"``, ``"minmax"`` or ``"percentile"``.
        activation_observer: The same for activations.
        percentile: For the percentile observers, the share of values to keep, in percent.
        signed_scales: Whether weight scales below 8 bits may be negative, where that suits a channel better; False
            for inference engines that take positive scales only.
        resume: Keep the progress of the run on disk until it is over, and go on from there if it was cut off.
        resume_dir: Where; by default the folder ``ptq_progress`` in the Trainer's ``default_root_dir``.
        report_dir: A folder for the files of the report; by default none are written.
        save_checkpoint: Whether to leave a checkpoint ``quantized.ckpt`` in the directory of the Trainer's
            ``ModelCheckpoint``, which itself writes nothing when no optimizer steps.

    Attributes:
        report: The :class:`~lightning_ptq.report.PTQReport` of the last run.
        calibration: The :class:`~lightning_ptq.calibration.calibration.Calibration`, from the end of the pass to the end of fit.

    Raises:
        QConfigError: If the config cannot be read.

    Example::

        trainer = Trainer(max_epochs=1, callbacks=[CalibrationCapture("w8a8", num_samples=512)])
        trainer.fit(module, calibration_loader)
    """

    role = "CalibrationCapture"
    title = "Calibration"

    def __init__(
        self,
        qconfig: str | QConfig | dict[str, Any] = "w8a8",
        num_samples: int | None = None,
        step: Step = "training",
        overrides: Mapping[str, str] | None = None,
        exclude: list[str] | None = None,
        first_last_bits: int | None = 8,
        symmetric_activations: bool = False,
        weight_observer: ObserverName = "mse",
        activation_observer: ObserverName = "mse",
        percentile: float = 99.99,
        signed_scales: bool = True,
        save_checkpoint: bool = True,
        resume: bool = True,
        resume_dir: str | None = None,
        report_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.qconfig = QConfig.parse(
            qconfig,
            overrides=overrides,
            exclude=exclude or (),
            first_last_bits=first_last_bits,
            symmetric_activations=symmetric_activations,
            weight_observer=weight_observer,
            activation_observer=activation_observer,
            percentile=percentile,
            signed_scales=signed_scales,
        )
        if num_samples is not None and num_samples < 1:
            raise CalibrationError(f"num_samples must be 1 or more, got {num_samples}.")
        self.num_samples = num_samples
        self.step = step
        self.save_checkpoint = save_checkpoint
        self.resume = resume
        self.resume_dir = resume_dir
        self.report_dir = report_dir
        self.report: PTQReport | None = None
        self.calibration: Calibration | None = None
        self._prepared: Prepared | None = None
        self._calibrator: Calibrator | None = None
        self._restore = ExitStack()
        self._pass = ExitStack()
        self._ranks = Ranks()
        self._stop = StopRequest()
        self._error: Exception | None = None
        self._journals: Journals | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the trainer, swap the layers, mute the training; elsewhere, be ready for a quantized checkpoint."""
        if stage != "fit":
            self._restore.enter_context(_quantized_on_load(pl_module, self.qconfig))
            return
        check_order(trainer)
        check_trainer(trainer)
        _check_folder(self.report_dir)
        self._ranks, self._stop, self._error, self._journals = current_ranks(), StopRequest(), None, None
        pl_module.configure_model()
        self.calibration = self._calibrator = None
        self.report = PTQReport(type(pl_module).__name__, plain({c.title: told(c) for c in ptq_callbacks(trainer)}))
        with ExitStack() as stack:
            stack.enter_context(noted_warnings(self.report.warnings, first=self._ranks.rank == 0))
            forward = calibration_forward(pl_module, self.step)
            self._prepared = prepare(pl_module, self.qconfig)
            stack.callback(self._undo_unless_finished)
            stack.enter_context(isolate_rng())
            stack.enter_context(unshuffled(trainer))
            stack.enter_context(muted(pl_module, self._observe, self._done))
            self._forward = forward
            self._restore = stack.pop_all()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The module is on its device now."""
        if self._prepared is not None and self.report is not None and not self._restored():
            log_settings(trainer, self.report)
            self._pass.enter_context(self.report.stage(self.title))
            check_same_length(trainer, self._ranks)
            self._restore.enter_context(self._stop.watching(self._ranks.world))
            self._restore.enter_context(no_waiting(trainer))
            self._calibrator = Calibrator(
                self._prepared, self._forward, self.num_samples, self._ranks, population(trainer)
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Choose all scales; the callbacks behind this one go on from there."""
        if self.calibration is not None or self._calibrator is None:
            return
        if self._error is not None:
            raise self._error
        self.calibration = self._calibrator.finish()
        self._calibrator = None
        if self.report is not None:
            self._pass.close()
            self.report.calibrated(self.calibration)
            log_ranges(trainer, self.report)
        if self.resume:
            folder = Path(self.resume_dir or Path(trainer.default_root_dir) / FOLDER)
            stages = [callback for callback in ptq_callbacks(trainer) if callback is not self]
            self._journals = Journals(folder, self.calibration, stages)
        trainer.should_stop = True
        log.info(
            "calibrated %d layers on %d samples, folded %d batch norms",
            len(self.calibration.layers), self.calibration.samples, len(self.calibration.folded),
        )  # fmt: skip

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The run is over: keep the quantized layers, leave a checkpoint."""
        if self.calibration is None:
            return
        self._ranks.check_same(dict(pl_module.state_dict()))
        if self.report is not None:
            self.report.finish(self.calibration)
        self.calibration.release()
        self._prepared = None
        if self._journals is not None:
            self._journals.remove()
        if self.save_checkpoint:
            for checkpoint in trainer.checkpoint_callbacks:
                if getattr(checkpoint, "dirpath", None):
                    # Set before saving, for the paths are part of what is saved. With save_last, ModelCheckpoint
                    # writes a last.ckpt of its own behind us, and would remove ours if it took it for the former one.
                    checkpoint.best_model_path = path = str(Path(checkpoint.dirpath) / "quantized.ckpt")
                    if not checkpoint.save_last:
                        checkpoint.last_model_path = path
                    trainer.save_checkpoint(path)
        if self.report is not None:  # last, so that a logger that fails costs neither the module nor the checkpoint
            self._tell(trainer, self.report)

    def _tell(self, trainer: Any, report: PTQReport) -> None:
        """Say what came of it, on the console, in the logs, and in files if they are asked for."""
        summary = report.summary()
        rank_zero_info(
            f"PTQ is done in {report.seconds:.0f} s: {report.float_bytes / 1e6:.3g} MB ->"
            f" {report.packed_bytes / 1e6:.3g} MB, {summary['times smaller']:.1f} times smaller, with"
            f" {len(report.warnings)} warnings. The rest is in CalibrationCapture.report: report.print(),"
            " report.save(folder)."
        )
        if trainer.is_global_zero:
            wanted = self.report_dir is not None or shows_pictures(trainer)
            pictures = report.pictures() if wanted else {}
            log_end(trainer, report, pictures)
            if self.report_dir is not None:
                try:
                    report.save(self.report_dir, pictures)
                except OSError as error:
                    warn(f"the report could not be written to {self.report_dir!r} ({error}).", ReportWarning)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning skips the epoch of an empty loader, or of a run that ``ckpt_path`` says is over, without a word."""
        if self._prepared is None:
            return
        if self._restored():
            log.info(
                "the checkpoint is that of a finished run: the module is quantized as it says, nothing is left to do"
            )
            self._prepared = None
            return
        raise CalibrationError(
            "no calibration batch was seen: the loader is empty, max_epochs or limit_train_batches is 0, or ckpt_path"
            " is a checkpoint of the training, which is over. Give fit a loader with at least one sample and"
            " max_epochs=1, and load trained weights by MyModule.load_from_checkpoint."
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Unmute the module, and let go of the other ranks, who are no longer those of a run."""
        self._restore.close()
        self._ranks = Ranks()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Unmute the module and put its float layers back; the other ranks learn of it."""
        self._restore.close()
        self._pass.close()
        self._ranks.leave(exception)

    def journal_for(self, stage: PTQCallback) -> Journal | None:
        """Where a callback behind this one keeps its progress; None with ``resume=False``."""
        return self._journals.of(stage) if self._journals else None

    def check_stop(self, trainer: Any) -> None:
        """Raise if the run is to stop: SIGTERM has come, or another rank has failed."""
        self._stop.check(trainer)
        self._ranks.poll()

    def _restored(self) -> bool:
        """Whether a checkpoint has made the layers quantized ones."""
        layers = self._prepared.layers.values() if self._prepared is not None else ()
        return self.calibration is None and any(layer.qconfig is not None for layer in layers)

    def _undo_unless_finished(self) -> None:
        if self._prepared is not None:
            self._prepared.undo()
            for holder in (self._calibrator, self.calibration):
                if holder is not None:
                    holder.batches.clear()
            self._prepared = self._calibrator = self.calibration = None

    def _observe(self, batch: Any) -> None:
        if self._calibrator is None or self._error is not None:
            return
        try:
            self._calibrator.observe(batch)
        except Exception as error:
            if self._ranks.world == 1:
                raise
            self._error = error  # the pass goes on, for Lightning's loop waits for every rank at each batch

    def _done(self) -> bool:
        return self._calibrator is None or self._calibrator.done


def _check_folder(report_dir: str | None) -> None:
    """Make the folder of the report, so that one that cannot be made is found out before the work."""
    try:
        if report_dir is not None:
            Path(report_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CallbackError(
            f"report_dir={report_dir!r} cannot be made ({error}). Write a folder that can be written to, or leave it"
            " out and call report.save(folder) after fit."
        ) from error


@contextmanager
def _quantized_on_load(module: Any, qconfig: QConfig) -> Iterator[None]:
    """A float module is prepared when the Trainer loads a quantized checkpoint into it."""
    own = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        quantized = any(key.endswith("weight_fake_quant.scale") for key in checkpoint.get("state_dict", {}))
        if quantized and not is_prepared(module):
            prepare(module, QConfig(qconfig.default))

    with attributes(module, {"on_load_checkpoint": on_load_checkpoint}):
        yield
