"""Loading of ``quantized.ckpt``, the checkpoint that a run writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.arguments import check_is_module, flag
from lightning_ptq.errors import CheckpointError, SurgeryError
from lightning_ptq.export.state_dicts import is_quantized, prepared_for, writable
from lightning_ptq.network.prepare import is_prepared
from lightning_ptq.runtime.patching import TensorSnapshot


def load_quantized(module: nn.Module, path: str | os.PathLike[str], weights_only: bool = True) -> nn.Module:
    """Quantize a float module from the checkpoint of a PTQ run, without callbacks and calibration data.

    The outputs are those of the module that the run quantized, bit for bit. As for any checkpoint, the module's
    ``configure_model`` and ``on_load_checkpoint`` are called. The module keeps its own dtype and device.

    ``MyModule.load_from_checkpoint`` and ``ckpt_path`` of a Trainer load such a file too, but only in a process that
    has imported ``lightning_ptq``; without it, they end in an error of torch about unexpected keys.

    The module can be fine-tuned afterwards; gradients pass the rounding unchanged, and scales stay as they are. Adam
    with a rate of 1e-5 is safe: a step moves each weight by about its rate at most, and a tuned weight, which lies on
    its grid, keeps its integer until it has moved by half a scale. Let rate times steps stay below half the least
    weight scale at first; greater rates change many integers at once, by the gradients of a few batches.

    Args:
        module: A float module of the architecture that was quantized. Its layers are swapped in place.
        path: The checkpoint, ``quantized.ckpt`` in the folder of ``ModelCheckpoint``, or a file to which ``torch.save``
            wrote the state dict of a quantized module.
        weights_only: False to read a checkpoint whose hyperparameters are objects of any class. Reading such a file can
            run code in it, so it has to come from a source that you trust.

    Returns:
        The module.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, of a float module, or of another architecture; the message names layers
            and shapes, and the module is unchanged.
        SurgeryError: If the module is quantized already.

    Example::

        module = load_quantized(MyModule(), "checkpoints/quantized.ckpt").eval()
    """
    check_is_module(module)
    checkpoint = _read(path, flag("weights_only", weights_only))
    lightning: Any = module if any(base.__name__ == "LightningModule" for base in type(module).__mro__) else None
    if lightning is not None:
        lightning.configure_model()
    if is_prepared(module):
        raise SurgeryError(f"{type(module).__name__} has quantized layers already. Load into a new float instance.")
    if lightning is not None and "state_dict" in checkpoint:
        lightning.on_load_checkpoint(checkpoint)  # may change the state dict
    state = checkpoint.get("state_dict", checkpoint)
    _load(module, state, os.fspath(path), strict=getattr(module, "strict_loading", True))
    return module


def _load(module: nn.Module, state: Mapping[str, Any], source: str, strict: bool) -> None:
    """Load the state dict of a quantized module into a float one, which stays unchanged on failure."""
    prepared = prepared_for(module, state)
    own = module.state_dict(keep_vars=True)
    before = TensorSnapshot({key: own[key] for key in own.keys() & state.keys() if _is_written(own[key])})
    try:
        module.load_state_dict(state, strict=strict)
    except BaseException as error:
        with writable(module):
            before.restore()
        if prepared is not None:
            prepared.undo()
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{source}: {error}") from error
        raise


def _read(path: str | os.PathLike[str], weights_only: bool) -> dict[str, Any]:
    """Read a checkpoint; raise :class:`CheckpointError` unless it holds a quantized module."""
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"path must be the path of a file, got {path!r}. Write for example 'quantized.ckpt'.")
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {name}. A PTQ run writes quantized.ckpt into the folder of ModelCheckpoint; its path is"
            " trainer.checkpoint_callback.best_model_path."
        )
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the length of a header, and JSON
            raise CheckpointError(
                f"{name} is a safetensors file. If save_packed wrote it, use load_packed(module, path)."
            )
        found = torch.load(path, map_location="cpu", weights_only=weights_only)
    except CheckpointError:
        raise
    except Exception as error:  # of the parsers of zip files and pickles
        raise _unreadable(name, error) from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not is_quantized(state):
        raise CheckpointError(f"{name} is no checkpoint of a quantized module: it is {_described(found)}")
    return dict(found)


def _unreadable(name: str, error: Exception) -> CheckpointError:
    """Return the error for a file that ``torch.load`` does not read."""
    if isinstance(error, UnpicklingError) and (unknown := re.search(r"Unsupported global: GLOBAL (\S+)", str(error))):
        return CheckpointError(
            f"{name} holds an object of {unknown[1]}, which may run code when it is read. If you trust the source of"
            " the file, write load_quantized(module, path, weights_only=False)."
        )
    why = (str(error).splitlines() or [""])[0]
    return CheckpointError(
        f"{name} is damaged or no checkpoint ({type(error).__name__}: {why}). Copy it again, or write it anew by a PTQ"
        " run with ModelCheckpoint."
    )


def _described(found: Any) -> str:
    """Return what a file holds, and how it is loaded."""
    if isinstance(found, nn.Module):
        return f"a pickled {type(found).__name__}. Write module = torch.load(path, weights_only=False)."
    if isinstance(found, Mapping) and "state_dict" in found:
        return (
            "that of a float module. Load it by MyModule.load_from_checkpoint(path), and quantize the module by a PTQ"
            " run, which writes quantized.ckpt."
        )
    if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
        return "the state dict of a float module. Write module.load_state_dict(torch.load(path)), and quantize it."
    return f"a {type(found).__name__}. Name the quantized.ckpt of a PTQ run."


def _is_written(value: Any) -> bool:
    """Return True for a tensor with values, which loading would overwrite."""
    return isinstance(value, Tensor) and not nn.parameter.is_lazy(value) and not value.is_meta
