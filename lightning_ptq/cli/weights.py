"""Weights of a module from a file: a float or quantized checkpoint, a state dict, or a packed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from lightning_ptq.errors import PackedFileError, PTQError
from lightning_ptq.export.file import FORMAT
from lightning_ptq.export.packed import load_packed


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of a file into a module; those of a quantized module quantize it.

    Args:
        module: A float module of the class that the file was written for.
        path: A checkpoint of Lightning, a state dict of ``torch.save``, a packed file, or float weights in safetensors.

    Raises:
        PTQError: If the file cannot be read, or does not fit the module.
    """
    if path.suffix == ".safetensors" and _is_packed(path):
        load_packed(module, path)
        return
    state = load_file(path) if path.suffix == ".safetensors" else _state_dict(path)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise PTQError(f"the weights in {path} do not fit {type(module).__name__}: {error}") from error


def _is_packed(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except SafetensorError as error:
        raise PackedFileError(
            f"{path} is damaged or not a safetensors file: {error}. Copy or write it again."
        ) from error


def _state_dict(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of unpickling, which may be any
        raise PTQError(
            f"{path} cannot be read as weights: torch did not write it, or it holds other objects than tensors"
            f" ({type(error).__name__}). Give a checkpoint of Lightning, a state dict that torch.save wrote, or a"
            " packed .safetensors file."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise PTQError(f"{path} holds a {type(loaded).__name__}, but no state dict. Save module.state_dict() instead.")
    return state
