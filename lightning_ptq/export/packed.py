"""The packed checkpoint: one safetensors file with integers at their true width, and the config as JSON.

The file holds tensors and text only; nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.calibration.layer_costs import float_keys, state_key
from lightning_ptq.errors import PackedFileError, SurgeryError
from lightning_ptq.export.bits import pack_bits, unpack_bits
from lightning_ptq.network.layers import FoldableBatchNorm, QuantLayer, quantizable_types
from lightning_ptq.network.prepare import is_prepared, prepare, quant_layers
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.qconfig import LayerQConfig, QConfig, QuantSpec

FORMAT = "lightning_ptq"
FORMAT_VERSION = 1


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
    tensors, header = packed_tensors(module)
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "ptq": json.dumps(header, separators=(",", ":"))}
    temporary = Path(f"{os.fspath(path)}.part")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
    return Path(path).stat().st_size


def packed_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_packed` writes: tensors by key, and the header that tells of layers and folded norms."""
    layers = {name: layer for name, layer in quant_layers(module).items() if layer.qconfig is not None}
    if not layers:
        raise SurgeryError(f"{type(module).__name__} is not quantized, so there is nothing to pack. Run PTQ first.")
    folded = [
        name for name, child in module.named_modules() if isinstance(child, FoldableBatchNorm) and child.is_folded
    ]
    tensors: dict[str, Tensor] = {}
    header = {"layers": {name: _pack_layer(name, layer, tensors) for name, layer in layers.items()}, "folded": folded}
    for key in float_keys(module, layers, folded):
        tensors[key] = module.state_dict()[key].detach().cpu().contiguous().clone()
    return tensors, header


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
    if is_prepared(module):
        raise SurgeryError(f"{type(module).__name__} has quantized layers already. Load into a new float instance.")
    layers = {name: _Entry.of(entry) for name, entry in header["layers"].items()}
    _check_fits(os.fspath(path), layers, header["folded"], tensors, module)
    prepared = prepare(module, QConfig(next(iter(layers.values())).qconfig))
    for name in header["folded"]:
        cast(FoldableBatchNorm, module.get_submodule(name)).set_folded(True)
    for name, entry in layers.items():
        _unpack_layer(name, prepared.layers[name], entry, tensors)
    ours = {state_key(name, part) for name in layers for part in _PARTS}
    module.load_state_dict({key: value for key, value in tensors.items() if key not in ours}, strict=False)
    return module


_PACKED, _SCALE, _ZERO_POINT = "weight.packed", "weight.scale", "weight.zero_point"
_PARTS = (_PACKED, _SCALE, _ZERO_POINT)


@dataclass(frozen=True)
class _Entry:
    """A layer as the header tells of it."""

    kind: str
    shape: tuple[int, ...]
    qconfig: LayerQConfig
    scale: float | None
    zero_point: int | None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> _Entry:
        activation = data.get("activation")
        qconfig = LayerQConfig(QuantSpec(**data["weight"]), activation and QuantSpec(**activation))
        return cls(data["kind"], tuple(data["shape"]), qconfig, data.get("scale"), data.get("zero_point"))


def _kind(layer: nn.Module) -> str:
    return next((kind.__name__ for kind in quantizable_types() if isinstance(layer, kind)), type(layer).__name__)


def _pack_layer(name: str, layer: QuantLayer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    quantizer = cast(FakeQuantize, layer.weight_fake_quant)
    spec = quantizer.spec
    integers = quantizer.integers(layer.weight.detach()) - spec.quant_min
    tensors[state_key(name, _PACKED)] = pack_bits(integers, spec.bits)
    tensors[state_key(name, _SCALE)] = quantizer.scale.detach().float().flatten().cpu()
    if not spec.symmetric:
        tensors[state_key(name, _ZERO_POINT)] = quantizer.zero_point.detach().flatten().cpu()
    entry: dict[str, Any] = {"kind": _kind(layer), "shape": list(layer.weight.shape), "weight": _short(spec)}
    if layer.input_fake_quant is not None:
        activation = layer.input_fake_quant
        entry["activation"] = _short(activation.spec)
        entry["scale"], entry["zero_point"] = activation.scale.item(), int(activation.zero_point.item())
    return entry


def _unpack_layer(name: str, layer: QuantLayer, entry: _Entry, tensors: dict[str, Tensor]) -> None:
    spec, weight = entry.qconfig.weight, layer.weight
    bias = tensors.get(state_key(name, "bias"), layer.bias)
    stream = tensors[state_key(name, _PACKED)]
    integers = unpack_bits(stream, spec.bits, weight.numel()).view(weight.shape).float() + spec.quant_min
    layer.attach(entry.qconfig)
    quantizer = cast(FakeQuantize, layer.weight_fake_quant)
    quantizer.scale.copy_(tensors[state_key(name, _SCALE)].view_as(quantizer.scale))
    if not spec.symmetric:
        quantizer.zero_point.copy_(tensors[state_key(name, _ZERO_POINT)].view_as(quantizer.zero_point))
    values = quantizer.values(integers.to(weight.device))
    # A weight that was shared is this layer's own from here on: each may have another grid.
    layer.set_weight(values, None if bias is None else bias.to(weight.device))
    if layer.input_fake_quant is not None:
        layer.input_fake_quant.scale.fill_(cast(float, entry.scale))
        layer.input_fake_quant.zero_point.fill_(cast(int, entry.zero_point))


def _short(spec: QuantSpec) -> dict[str, Any]:
    return {key: value for key, value in asdict(spec).items() if key in ("bits", "symmetric", "per_channel")}


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose header is whole."""
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
            header, tensors = json.loads(metadata["ptq"]), {key: file.get_tensor(key) for key in keys}
        if not header["layers"] or not isinstance(header["folded"], list):
            raise KeyError("layers")
        for entry in header["layers"].values():
            _Entry.of(entry)
    except PackedFileError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise PackedFileError(
            f"{os.fspath(path)} is damaged or no safetensors file ({error}). Copy or write it again."
        ) from error
    return header, tensors


def _check_fits(
    path: str, layers: Mapping[str, _Entry], folded: list[str], tensors: Mapping[str, Tensor], module: nn.Module
) -> None:
    """Raise unless the file tells all that the module holds, no more, and in the right shapes."""

    def other(what: str) -> PackedFileError:
        return PackedFileError(f"{path} is of another model: {what}. Build the model as it was when it was packed.")

    modules = dict(module.named_modules())
    for name, entry in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        found = None if weight is None else (_kind(modules[name]), tuple(weight.shape))
        if found != (entry.kind, entry.shape):
            raise other(f"its layer {name!r} is a {entry.kind} with a weight of {entry.shape}, here it is {found}")
        _check_whole(path, name, entry, tensors, cast(Tensor, weight).numel())
    for name in folded:
        if not isinstance(modules.get(name), _BatchNorm):
            raise other(f"there is no batch norm {name!r} here")
    ours = {state_key(name, part) for name in layers for part in _PARTS}
    state = module.state_dict()
    expected = set(float_keys(module, layers, folded))
    given = set(tensors) - ours
    biases = {state_key(name, "bias") for name in layers} if folded else set()
    if wrong := sorted((expected - given) | (given - expected - biases)):
        raise other(f"{wrong[:4]} are in one and not in the other")
    if wrong := sorted(key for key in given & set(state) if state[key].shape != tensors[key].shape):
        raise other(f"{wrong[:4]} have other shapes")


def _check_whole(path: str, name: str, entry: _Entry, tensors: Mapping[str, Tensor], count: int) -> None:
    spec = entry.qconfig.weight
    parts = (_PACKED, _SCALE) if spec.symmetric else _PARTS
    if missing := [part for part in parts if state_key(name, part) not in tensors]:
        raise PackedFileError(f"{path} is damaged: the weight of layer {name!r} is missing ({missing}).")
    size, channels = tensors[state_key(name, _PACKED)].numel(), tensors[state_key(name, _SCALE)].numel()
    if size != -(-count * spec.bits // 8) or (channels == 1) < (not spec.per_channel) or count % channels:
        raise PackedFileError(f"{path} is damaged: the weight of layer {name!r} has {size} bytes, {channels} scales.")
