"""Calibration in one call: rounding to nearest, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.calibrator import Calibrator
from lightning_ptq.calibration.forward import Forward, default_forward
from lightning_ptq.calibration.padding import Mask
from lightning_ptq.errors import CalibrationError
from lightning_ptq.network.prepare import Prepared, prepare
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.runtime.eager import no_inference_mode
from lightning_ptq.runtime.ranks import Ranks


def calibrate(
    module: nn.Module | Prepared,
    batches: Iterable[Any],
    qconfig: QConfig | str | None = None,
    *,
    forward: Forward = default_forward,
    num_samples: int | None = None,
    ranks: Ranks | None = None,
    mask: Mask | None = None,
) -> Calibration:
    """Quantize a module by rounding to nearest: prepare it, run the batches, fold batch norms, choose all scales.

    An exception leaves the module as it was before.

    Args:
        module: A float module (then with ``qconfig``), or what :func:`~lightning_ptq.network.prepare.prepare` returned.
        batches: Calibration batches, for example a ``DataLoader``; labels are not needed.
        qconfig: What to quantize, for example ``"w4a8"``.
        forward: Function of module and batch that runs a calibration forward. By default the module runs
            on the inputs of the batch (:func:`~lightning_ptq.calibration.forward.default_forward`).
        num_samples: Stop after the batch that reaches this many samples; None for all.
        ranks: Processes that each have batches of their own (:func:`~lightning_ptq.runtime.ranks.current_ranks`); a
            single process by default.
        mask: Key of the batch, or function of it, that gives a boolean mask (samples, positions) which is False for
            padding. Padding takes part in no range, loss or statistic. By default the ``attention_mask`` beside
            ``input_ids`` is used, if there is one.

    Returns:
        The calibrated module and what later steps need to run it again.

    Raises:
        SurgeryError: If the module cannot be prepared.
        QConfigError: If the config does not fit.
        CalibrationError: If there are no batches, or NaN in one.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> calibration = calibrate(net, [torch.randn(16, 4)], "w4a8")
        >>> [str(layer.qconfig) for layer in calibration.layers.values()]
        ['w8a8', 'w8a8']
    """
    if isinstance(module, Prepared):
        prepared = module
    elif qconfig is None:
        raise CalibrationError("qconfig is missing. Write for example calibrate(module, batches, 'w4a8').")
    else:
        prepared = prepare(module, qconfig)
    with no_inference_mode():
        try:
            calibrator = Calibrator(prepared, forward, num_samples, ranks, mask=mask)
            for batch in batches:
                if calibrator.done:
                    break
                calibrator.observe(batch)
            return calibrator.finish()
        except BaseException:
            prepared.undo()
            raise
