"""The packed checkpoint: one safetensors file with integers at their true width, and the config as JSON.

The file holds tensors and text only; nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_ptq.errors import PackedFileError, SurgeryError
from lightning_ptq.modules import FakeQuantize, FoldableBatchNorm, QuantLayer
from lightning_ptq.qconfig import LayerQConfig, QConfig, QuantSpec
from lightning_ptq.surgery import prepare, quant_layers

FORMAT = "lightning_ptq"
FORMAT_VERSION = 1


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """Integers from 0 to ``2**bits - 1``, any shape, as a bit stream of bytes (uint8, 1-d), lowest bit first.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0]), 2).tolist()
        [57]
    """
    flat = integers.flatten().to(torch.uint8).cpu().numpy()
    stream = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_bits(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``count`` integers (uint8, 1-d)."""
    flags = np.unpackbits(stream.numpy(), count=bits * count, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(flags, axis=1, bitorder="little")[:, 0])


def save_packed(module: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a quantized module to one file, weights packed at their bit width.

    Args:
        module: A quantized module.
        path: The file, by custom ``*.safetensors``.

    Returns:
        The file's size in bytes.

    Raises:
        SurgeryError: If the module is not quantized.
    """
    layers = {name: layer for name, layer in quant_layers(module).items() if layer.qconfig is not None}
    if not layers:
        raise SurgeryError(f"{type(module).__name__} is not quantized, so there is nothing to pack. Run PTQ first.")
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"layers": {}, "folded": []}
    folded = [
        name for name, child in module.named_modules() if isinstance(child, FoldableBatchNorm) and child.is_folded
    ]
    header["folded"] = folded
    packed_keys: set[str] = set()
    for name, layer in layers.items():
        header["layers"][name] = _pack_layer(name, layer, tensors)
        packed_keys.update(_key(name, key) for key in cast(nn.Module, layer).state_dict() if key != "bias")
    packed_keys.update(_key(name, key) for name in folded for key in module.get_submodule(name).state_dict())
    for key, value in module.state_dict().items():
        if key not in packed_keys and isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous().clone()
    header["shapes"] = {name: list(layer.weight.shape) for name, layer in layers.items()}
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "ptq": json.dumps(header, separators=(",", ":"))}
    temporary = Path(f"{os.fspath(path)}.part")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
    return Path(path).stat().st_size


def load_packed(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Quantize a float module from a packed file; neither callbacks nor calibration data are needed.

    Args:
        module: A float module of the architecture that was packed. Its layers are swapped in place.
        path: The file that :func:`save_packed` wrote.

    Returns:
        The module, whose outputs are those of the packed one bit for bit.

    Raises:
        FileNotFoundError: If there is no such file.
        PackedFileError: If the file is damaged, of another model, or of a newer format version. The module is then
            as it was.
        SurgeryError: If the module is quantized already.
    """
    header, tensors = _read(path)
    layers = header["layers"]
    modules = dict(module.named_modules())
    _check_fits(path, header, tensors, modules)
    first = next(iter(layers.values()))
    prepared = prepare(module, QConfig(_layer_qconfig(first)))
    try:
        for name in header["folded"]:
            cast(Any, module.get_submodule(name)).set_folded(True)
        for name, layer in prepared.layers.items():
            if name in layers:
                _unpack_layer(name, layer, layers[name], tensors)
        plain = {key: value for key, value in tensors.items() if not key.endswith((_PACKED, _SCALE))}
        state = module.state_dict()
        missing = [key for key in plain if key not in state or state[key].shape != plain[key].shape]
        if missing:
            raise PackedFileError(f"{os.fspath(path)} is of another model: {missing[:4]} do not fit this one.")
        module.load_state_dict(plain, strict=False)
    except BaseException:
        prepared.undo()
        raise
    return module


_PACKED = ".packed"
_SCALE = ".scale"


def _key(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _pack_layer(name: str, layer: QuantLayer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    quantizer = cast(FakeQuantize, layer.weight_fake_quant)
    integers = quantizer.integers(layer.weight.detach()) - quantizer.spec.quant_min
    tensors[_key(name, "weight") + _PACKED] = pack_bits(integers, quantizer.spec.bits)
    tensors[_key(name, "weight") + _SCALE] = quantizer.scale.detach().float().flatten().cpu()
    entry: dict[str, Any] = {"weight": _short(quantizer.spec)}
    if layer.input_fake_quant is not None:
        activation = layer.input_fake_quant
        entry["activation"] = _short(activation.spec)
        entry["scale"], entry["zero_point"] = activation.scale.item(), int(activation.zero_point.item())
    return entry


def _unpack_layer(name: str, layer: QuantLayer, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    qconfig = _layer_qconfig(entry)
    bias = tensors.get(_key(name, "bias"), layer.bias)
    stream, count = tensors[_key(name, "weight") + _PACKED], layer.weight.numel()
    spec = qconfig.weight
    integers = unpack_bits(stream, spec.bits, count).view(layer.weight.shape).float() + spec.quant_min
    device = layer.weight.device
    layer.attach(qconfig)
    quantizer = cast(FakeQuantize, layer.weight_fake_quant)
    quantizer.scale.copy_(tensors[_key(name, "weight") + _SCALE].view_as(quantizer.scale))
    layer.set_weight(quantizer.values(integers.to(device)), None if bias is None else bias.to(device))
    if layer.input_fake_quant is not None:
        layer.input_fake_quant.scale.fill_(entry["scale"])
        layer.input_fake_quant.zero_point.fill_(entry["zero_point"])


def _short(spec: QuantSpec) -> dict[str, Any]:
    return {key: value for key, value in asdict(spec).items() if key in ("bits", "symmetric", "per_channel")}


def _layer_qconfig(entry: Mapping[str, Any]) -> LayerQConfig:
    activation = entry.get("activation")
    return LayerQConfig(QuantSpec(**entry["weight"]), activation and QuantSpec(**activation))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}. Write one with save_packed(module, path).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PackedFileError(f"{os.fspath(path)} is no packed file of lightning_ptq.")
            if int(metadata["version"]) > FORMAT_VERSION:
                raise PackedFileError(
                    f"{os.fspath(path)} has format version {metadata['version']}, this lightning_ptq reads up to"
                    f" {FORMAT_VERSION}. Upgrade with: pip install -U lightning-ptq"
                )
            keys = list(file.keys())
            return json.loads(metadata["ptq"]), {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise PackedFileError(
            f"{os.fspath(path)} is damaged or no safetensors file ({error}). Copy or write it again."
        ) from error


def _check_fits(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> None:
    for name, shape in header["shapes"].items():
        weight = getattr(modules.get(name), "weight", None)
        found = None if weight is None else list(weight.shape)
        if found != shape:
            raise PackedFileError(
                f"{os.fspath(path)} is of another model: its layer {name!r} has a weight of shape {shape}, here it is"
                f" {found}. Build the model as it was when it was packed."
            )
        if _key(name, "weight") + _PACKED not in tensors:
            raise PackedFileError(f"{os.fspath(path)} is damaged: the weight of layer {name!r} is missing.")
    for name in header["folded"]:
        if name not in modules:
            raise PackedFileError(f"{os.fspath(path)} is of another model: there is no batch norm {name!r} here.")
