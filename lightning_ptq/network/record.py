"""The specs of a quantized operation as a buffer, so that a state dict describes the structure it was saved from."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from lightning_ptq.errors import SurgeryError
from lightning_ptq.numerics.qconfig import LayerQConfig

RECORD = "qconfig_json"
"""Name of the buffer that holds the specs of a quantized operation."""


def record_of(qconfig: LayerQConfig) -> Tensor:
    """Return specs as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps(qconfig.to_dict()).encode()), dtype=torch.uint8).clone()


def read_record(record: Tensor, prefix: str) -> LayerQConfig:
    """Return the specs of :func:`record_of`."""
    try:
        return LayerQConfig.from_dict(json.loads(bytes(record.cpu().tolist())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SurgeryError(
            f"the state dict's entry {prefix + RECORD!r} is damaged ({error}). Save the quantized module again."
        ) from error
