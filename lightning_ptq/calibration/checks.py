"""Checks of a module and of its batches: what would end in an error of torch, or in a module of NaN."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import CalibrationError, FunctionalOpWarning, PTQError, UnreachedLayerWarning, warn
from lightning_ptq.network.callers import call_sites, unsteady_sites
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.prepare import Prepared
from lightning_ptq.network.trace import Trace

_ABOUT_TYPES = re.compile(r"type|not implemented for", re.IGNORECASE)


def check_calibration(calibration: Any, batches: bool = False) -> None:
    """Check that a function got what ``calibrate`` returned.

    Args:
        calibration: The argument.
        batches: True if the function runs the calibration batches.

    Raises:
        CalibrationError: If it is something else, or its batches were freed at the end of ``trainer.fit``.
    """
    if not isinstance(calibration, Calibration):
        raise CalibrationError(
            f"calibration must be what calibrate() returned, got a {type(calibration).__name__}. Write for example"
            " calibrate(module, batches, 'w4a8')."
        )
    if batches and not len(calibration.batches):
        raise CalibrationError(
            "the calibration holds no batches any more: they are freed when trainer.fit ends. Do the work in a callback"
            " of the run, or calibrate a float module by calibrate(module, batches, 'w4a8')."
        )


def check_module(prepared: Prepared) -> None:
    """Check the tensors of a prepared module before the calibration pass.

    Raises:
        CalibrationError: If a layer or a batch norm holds NaN or an infinity, or tensors were made in inference mode.
    """
    for name, tensor in (*prepared.module.named_parameters(), *prepared.module.named_buffers()):
        if tensor.is_inference():
            raise CalibrationError(
                f"{name} is a tensor of torch.inference_mode, which cannot be changed or tuned. Build the module, and"
                " load its weights, outside inference mode."
            )
    for name, child in prepared.module.named_modules():
        excluded = name in prepared.layers and prepared.qconfig.for_layer(name) is None
        if excluded or not (name in prepared.layers or hasattr(child, "running_var")):
            continue
        for key, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if not _is_finite(tensor):
                raise CalibrationError(
                    f"{key} of layer {name!r} holds NaN or an infinity, which no grid can represent."
                    " Check the checkpoint that it was loaded from, or exclude the layer."
                )


def _is_finite(tensor: Tensor) -> bool:
    known = tensor.is_meta or not tensor.is_floating_point() or nn.parameter.is_lazy(tensor)
    return known or bool(torch.isfinite(tensor).all())


@contextmanager
def explained(module: nn.Module, batch: Any) -> Iterator[None]:
    """Raise a :class:`CalibrationError` in place of an error of torch that the types of the batch's tensors explain."""
    try:
        yield
    except RuntimeError as error:
        wanted = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        found = {leaf.dtype for leaf in Batch(batch).leaves() if isinstance(leaf, Tensor)}
        if isinstance(error, PTQError) or not _ABOUT_TYPES.search(str(error)) or not found - {wanted}:
            raise
        raise CalibrationError(
            f"the calibration forward fails on a batch with tensors of {', '.join(sorted(map(str, found)))}, while the"
            f" module has weights of {wanted}: {error}. Convert the inputs in the loader or in the step, for example by"
            f" x.to({wanted})."
        ) from error


def warn_of_float_parts(prepared: Prepared, watched: Trace) -> None:
    """Warn of layers that were not called, and of products outside any operation.

    Args:
        prepared: The module.
        watched: What its forwards did.
    """
    unreached = [  # an embedding may be read as a tensor, which is no call
        name
        for name, op in prepared.layers.items()
        if name not in watched.layer_order and prepared.qconfig.for_layer(name) and not op.is_lookup
    ]
    if unreached:
        warn(
            f"never called in the calibration forward, so they stay float: {', '.join(unreached)}.",
            UnreachedLayerWarning,
            stacklevel=3,
        )
    if watched.float_products:
        scopes: dict[str, list[str]] = {}
        for op, scope in sorted(watched.float_products):
            scopes.setdefault(op, []).append(scope or "the module itself")
        listed = "; ".join(f"{op} in {', '.join(names)}" for op, names in scopes.items())
        warn(f"computed outside any layer, so they stay float: {listed}.", FunctionalOpWarning, stacklevel=3)


def warn_of_unsteady_sites(module: nn.Module, traces: Sequence[Trace]) -> list[str]:
    """Return the call sites that stay float because their position does not tell which call they are, and warn of them.

    Args:
        module: The root.
        traces: Traces of all forwards.
    """
    inside = {name: module.get_submodule(name.rpartition(".")[0]) for name in call_sites(module)}
    # A layer that brings its call sites with it knows which is which.
    unsteady = unsteady_sites([name for name, owner in inside.items() if not isinstance(owner, QuantizedOp)], traces)
    if unsteady:
        warn(
            f"called a varying number of times in one forward, so they stay float: {', '.join(unsteady)}.",
            FunctionalOpWarning,
            stacklevel=4,
        )
    return unsteady
