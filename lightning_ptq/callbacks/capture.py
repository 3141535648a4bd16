"""CalibrationCapture: the calibration pass inside ``trainer.fit``, and the frame of every PTQ run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ptq import arguments
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.calibrator import Calibrator
from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.calibration.padding import Mask, check_mask
from lightning_ptq.callbacks.base import PTQCallback, ptq_callbacks
from lightning_ptq.callbacks.refusals import check_run
from lightning_ptq.callbacks.trainer import dataloading, reporting, resuming
from lightning_ptq.callbacks.trainer.checkpoints import no_optimizer_states, write_checkpoint
from lightning_ptq.callbacks.trainer.lightning import isolate_rng
from lightning_ptq.callbacks.trainer.loggers import log_ranges, log_settings
from lightning_ptq.callbacks.trainer.muting import Step, calibration_forward, check_step, training_disabled
from lightning_ptq.callbacks.trainer.quiet import suited_to_ptq
from lightning_ptq.callbacks.trainer.resuming import Journals
from lightning_ptq.callbacks.trainer.signals import StopRequest
from lightning_ptq.callbacks.trainer.validation import Scores, no_validation_of_fit
from lightning_ptq.errors import CalibrationError, noted_warnings
from lightning_ptq.export.targets import Auto, TargetName, configured
from lightning_ptq.network.prepare import Prepared, prepare
from lightning_ptq.numerics.qconfig import Operations, QConfig
from lightning_ptq.numerics.spec import ObserverName
from lightning_ptq.report import PTQReport
from lightning_ptq.report.ptq_report import plain
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.ranks import DEFAULT_TIMEOUT, Ranks, current_ranks
from lightning_ptq.runtime.scratch import remove_abandoned

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class CalibrationCapture(PTQCallback):
    """Turns ``trainer.fit`` into a PTQ run: one pass over the calibration set, after which the module is quantized.

    Stands first among the library's callbacks; the others continue from the calibrated module. The module's own
    optimizers, schedulers and training hooks do not run. Calibration computes in float32 at any Trainer precision.

    The run is complete when, in ``on_train_end`` of this callback, the quantized module and ``quantized.ckpt`` are. An
    exception or a signal before restores the float module and keeps the progress. Afterwards the module stays
    quantized, also if a later callback or a logger raises, and a report that fails is a warning.

    Args:
        qconfig: What to quantize: a text such as ``"w4a8"``, or a :class:`~lightning_ptq.QConfig` or its dictionary.
        num_samples: Stop after the batch that reaches this many samples; None for the whole loader.
        step: The calibration forward: ``"training"`` (the module's ``training_step``), ``"predict"`` (its
            ``predict_step``, or ``forward`` on the inputs if it has none), or a function of module and batch.
        overrides: Bit widths by layer-name pattern, such as ``{"head.*": "w8a8"}``. None by default.
        exclude: Patterns of layers that stay float; none by default.
        first_last_bits: Least bits of first and last layers or None; ``"auto"``: 8, large ones free under ``max_drop``.
        symmetric_activations: True for signed grids with zero point 0; by default what the target demands, else False.
        weight_observer: ``"mse"``, ``"minmax"`` or ``"percentile"``.
        activation_observer: The same for activations.
        percentile: Share of values that the percentile observers keep, in percent.
        signed_scales: True if weight scales below 8 bits may be negative; by default what the target takes, or True.
        save_checkpoint: True to write ``quantized.ckpt`` where ``ModelCheckpoint`` writes; ``load_quantized`` loads it.
        resume: True to save the progress of the run until it is finished, and to resume an interrupted run.
        resume_dir: Folder of the progress; by default ``ptq_progress`` in the Trainer's ``default_root_dir``.
        report_dir: Folder for the files of the report; by default no files are written.
        timeout: Seconds without a sign of life after which a rank counts as dead, which ends the run on all others.
        operations: What is quantized besides layers, see :class:`~lightning_ptq.numerics.qconfig.QConfig`; by default
            ``"all"`` for a target, else ``"products"``.
        mask: Key of the batch, or function of it, that gives a boolean mask (samples, positions), False for padding,
            which takes part in no range, loss or statistic; by default the ``attention_mask`` beside ``input_ids``.
        target: Inference engine, ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``. Sets what its integer kernels
            need (:data:`~lightning_ptq.export.targets.TARGETS`), so what is tuned is what runs there. None by default.

    Attributes:
        report: The :class:`~lightning_ptq.report.PTQReport` of the last run.
        scores: What the validation of the float module logged; None without validation data.
        calibration: The :class:`~lightning_ptq.calibration.calibration.Calibration`, after the pass and until fit ends.

    Raises:
        QConfigError: If the config cannot be read.
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
        first_last_bits: int | Auto | None = "auto",
        symmetric_activations: bool | None = None,
        weight_observer: ObserverName = "mse",
        activation_observer: ObserverName = "mse",
        percentile: float = 99.99,
        signed_scales: bool | None = None,
        save_checkpoint: bool = True,
        resume: bool = True,
        resume_dir: str | None = None,
        report_dir: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        operations: Operations | None = None,
        mask: Mask | None = None,
        target: TargetName | None = None,
    ) -> None:
        super().__init__()
        self.target = target
        self.qconfig = configured(
            qconfig, target, overrides=overrides, exclude=exclude or (), first_last_bits=first_last_bits,
            operations=operations, symmetric_activations=symmetric_activations, weight_observer=weight_observer,
            percentile=percentile, activation_observer=activation_observer, signed_scales=signed_scales,
        )  # fmt: skip
        self.frees_edges = first_last_bits == "auto" and isinstance(qconfig, str)
        whole = partial(arguments.whole, error=CalibrationError)
        self.num_samples = None if num_samples is None else whole("num_samples", num_samples)
        self.step = check_step(step)
        self.mask = check_mask(mask)
        self.save_checkpoint = arguments.flag("save_checkpoint", save_checkpoint)
        self.resume = arguments.flag("resume", resume)
        self.resume_dir = arguments.folder("resume_dir", resume_dir)
        self.report_dir = arguments.folder("report_dir", report_dir)
        self.timeout = arguments.number("timeout", timeout, "be a positive number of seconds", (1e-3, math.inf), "1800")
        self.report: PTQReport | None = None
        self.scores: Scores | None = None
        self.calibration: Calibration | None = None
        self._prepared: Prepared | None = None
        self._forward: Forward = default_forward
        self._calibrator: Calibrator | None = None
        self._restore, self._pass, self._watch = ExitStack(), ExitStack(), ExitStack()
        self._ranks, self._stop = Ranks(), StopRequest()
        self._error: Exception | None = None
        self._journals: Journals | None = None
        self._progress_folder: Path | None = None
        self._fingerprint = ""
        self._checksums: dict[str, bytes] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the Trainer, swap the layers and disable training; do nothing in other stages than fit."""
        if stage != "fit":
            return
        check_run(trainer, pl_module)
        reporting.check_report_dir(self.report_dir)
        self._progress_folder = resuming.progress_folder(trainer, self.resume_dir) if self.resume else None
        remove_abandoned()
        self._stop, self._error, self._journals, self._checksums = StopRequest(), None, None, {}
        self._ranks = current_ranks(self.timeout, partial(self._stop.check, trainer))
        pl_module.configure_model()
        self.calibration = self._calibrator = self.scores = None
        settings = plain({callback.title: resuming.settings_of(callback) for callback in ptq_callbacks(trainer)})
        self.report = PTQReport(type(pl_module).__name__, settings)
        # An error inside this block undoes everything. Afterwards, teardown and on_exception do.
        with ExitStack() as stack:
            stack.enter_context(noted_warnings(self.report.warnings, first=self._ranks.rank == 0))
            self._fingerprint = resuming.forward_fingerprint(pl_module, self.step)
            self._forward = calibration_forward(pl_module, self.step)
            self._prepared = prepare(pl_module, self.qconfig)
            stack.callback(self._undo_unless_finished)
            contexts = isolate_rng(), dataloading.unshuffled(trainer), no_optimizer_states(pl_module)
            for context in (*contexts, no_validation_of_fit(trainer), suited_to_ptq(trainer, self.num_samples)):
                stack.enter_context(context)
            stack.enter_context(training_disabled(pl_module, self._observe, self._done))
            self._restore = stack.pop_all()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the calibrator, now that the module is on its device."""
        if self._prepared is not None and self.report is not None and not self._restored():
            self.scores = reporting.validate_before(trainer, pl_module, self._ranks, self.report)
            check_run(trainer, pl_module, self.scores)  # again, now that all callbacks are set up
            log_settings(trainer, self.report)
            self._pass.enter_context(self.report.stage(self.title))
            self._restore.callback(self._watch.close)
            self._watch.enter_context(self._stop.watching(self._ranks.world))
            dataloading.check_same_length(trainer, self._ranks)
            self._restore.enter_context(dataloading.no_waiting(trainer))
            size = dataloading.dataset_size(trainer)
            self._calibrator = Calibrator(self._prepared, self._forward, self.num_samples, self._ranks, size, self.mask)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose all scales; the later callbacks continue from the calibrated module."""
        if self.calibration is not None or self._calibrator is None:
            return
        if self._error is not None:
            raise self._error
        self.calibration, self._calibrator = self._calibrator.finish(), None
        if self.report is not None:
            self._pass.close()
            self.report.calibrated(self.calibration)
            log_ranges(trainer, self.report)
        if self._progress_folder is not None:
            stages = [callback for callback in ptq_callbacks(trainer) if callback is not self]
            self._journals = Journals(self._progress_folder, self.calibration, stages, self._fingerprint)
        self.stage_is_over(trainer, pl_module, self)
        for stage in ptq_callbacks(trainer):
            stage.check(trainer, self.calibration)
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint, keep the quantized layers, and report the run.

        Raises:
            CallbackError: If the checkpoint cannot be written; the float module is restored and the progress kept.
        """
        if self.calibration is None:
            return
        reporting.warn_if_changed(pl_module, self._checksums, saved=False)
        self._ranks.check_same(dict(pl_module.state_dict()))
        if self.save_checkpoint:
            write_checkpoint(trainer, self._ranks, self._progress_folder)
        self._prepared = None  # the run is complete: nothing is undone any more
        if self._journals is not None:
            self._journals.remove()
        self._watch.close()  # before Lightning restores the handlers of signals, which is before teardown
        with ExitStack() as stack:
            stack.callback(self.calibration.release)
            if self.report is not None:
                self._checksums = reporting.finish(self.report, self.calibration)
                reporting.validate_after(trainer, pl_module, self._ranks, self.report, self.scores)
                reporting.publish(trainer, self.report, self.report_dir)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that a calibration pass took place.

        Lightning silently skips the epoch if the loader is empty, or if ``ckpt_path`` belongs to a finished training.

        Raises:
            CalibrationError: If there was none, and no quantized checkpoint was loaded.
        """
        if self._prepared is None:
            return
        if self._restored():
            log.info("the checkpoint is that of a finished run: the module is quantized already, nothing is left to do")
            self._prepared = None
            return
        raise dataloading.no_batch_seen()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Enable training again, and drop the process groups of the run."""
        self._restore.close()
        self._ranks.close()
        self._ranks = Ranks()
        if self._prepared is None and stage == "fit":
            reporting.warn_if_changed(pl_module, self._checksums)
            self._checksums = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Enable training again, restore the float layers, and announce the failure to the other ranks."""
        self._restore.close()
        self._pass.close()
        self._ranks.leave(exception)

    def stage_is_over(self, trainer: Trainer, pl_module: LightningModule, stage: PTQCallback) -> None:
        """Remember what the last stage has made of the module, so that a change by another callback is noticed."""
        if stage is ptq_callbacks(trainer)[-1]:
            self._checksums = resuming.checksums(pl_module)

    def journal_for(self, stage: PTQCallback) -> Journal:
        """Return the journal of another callback; with ``resume=False`` it keeps nothing."""
        return self._journals.of(stage) if self._journals else NO_JOURNAL

    def check_stop(self, trainer: Trainer) -> None:
        """Raise if the run is to stop: a signal was received, or another rank has failed."""
        self._stop.check(trainer)
        self._ranks.poll()

    def _restored(self) -> bool:
        """True if a checkpoint has turned the layers into quantized ones."""
        layers = self._prepared.layers.values() if self._prepared is not None else ()
        return self.calibration is None and any(layer.qconfig is not None for layer in layers)

    def _undo_unless_finished(self) -> None:
        if self._prepared is not None:
            self._prepared.undo()
            for holder in (self._calibrator, self.calibration):
                if holder is not None:
                    holder.batches.clear()
            self._prepared = self._calibrator = self.calibration = None

    def _observe(self, batch: Any) -> Any:
        if self._calibrator is None or self._error is not None:
            return None
        try:
            return self._calibrator.observe(batch)
        except Exception as error:
            if self._ranks.world == 1:
                raise
            # Raised when the pass is over, because Lightning's loop waits for all ranks at every batch.
            self._error = error
            return None

    def _done(self) -> bool:
        return self._calibrator is None or self._error is not None or self._calibrator.done
