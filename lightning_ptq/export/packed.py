"""The packed checkpoint: one safetensors file with integers at their bit width, and the config as JSON.

The file holds tensors and text only; nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_ptq.calibration.layer_costs import float_keys, state_key
from lightning_ptq.errors import PackedFileError, SurgeryError
from lightning_ptq.export.bits import pack_bits, unpack_bits
from lightning_ptq.network.batch_norm import FoldableBatchNorm, folded_norms
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.prepare import Prepared, is_prepared, prepare
from lightning_ptq.network.swapping import registered_types
from lightning_ptq.numerics.qconfig import LayerQConfig, QConfig
from lightning_ptq.numerics.spec import QuantSpec

FORMAT = "lightning_ptq"
FORMAT_VERSION = 2
_ERRORS = (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError)


def save_packed(module: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a quantized module to one file, with weights packed at their bit width.

    Args:
        module: A quantized module.
        path: The file, by convention ``*.safetensors``.

    Returns:
        The size of the file in bytes.

    Raises:
        SurgeryError: If the module is not quantized.
    """
    tensors, header = packed_tensors(module)
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "ptq": json.dumps(header, separators=(",", ":"))}
    temporary = Path(f"{os.fspath(path)}.part")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)  # a reader never sees half a file
    return Path(path).stat().st_size


def packed_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`save_packed` writes: tensors by key, and the header that describes layers and folded norms."""
    layers = {name: layer for name, layer in quantized_ops(module).items() if layer.is_quantized}
    if not layers:
        raise SurgeryError(f"{type(module).__name__} is not quantized, so there is nothing to pack. Run PTQ first.")
    folded = folded_norms(module)
    tensors: dict[str, Tensor] = {}
    header = {"layers": {name: _pack_layer(name, layer, tensors) for name, layer in layers.items()}, "folded": folded}
    state = module.state_dict()
    for key in float_keys(module, layers, folded):
        tensors[key] = state[key].detach().cpu().contiguous().clone()
    return tensors, header


def load_packed(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Quantize a float module from a packed file, without callbacks and calibration data.

    Args:
        module: A float module of the architecture that was packed. Its layers are swapped in place.
        path: The file that :func:`save_packed` wrote.

    Returns:
        The module, whose outputs are those of the packed one bit for bit.

    Raises:
        FileNotFoundError: If there is no such file.
        PackedFileError: If the file is damaged, of another model, or of a newer format version; the module is then
            unchanged.
        SurgeryError: If the module is quantized already.
    """
    header, tensors = _read(path)
    if is_prepared(module):
        raise SurgeryError(f"{type(module).__name__} has quantized layers already. Load into a new float instance.")
    entries = {name: _Entry.of(entry) for name, entry in header["layers"].items()}
    fit = _Fit(os.fspath(path), entries, header["folded"], tensors)
    try:
        prepared = prepare(module, QConfig(next(iter(entries.values())).qconfig))
    except SurgeryError as error:
        raise fit.other_model(str(error)) from error
    try:
        fit.check(prepared)
    except PackedFileError:
        prepared.undo()
        raise
    for name in header["folded"]:
        cast(FoldableBatchNorm, module.get_submodule(name)).set_folded(True)
    for name, entry in entries.items():
        _unpack_layer(name, prepared.layers[name], entry, tensors)
    # The rest is what stays float: buffers, norms, embeddings, biases.
    packed = fit.packed_keys()
    module.load_state_dict({key: value for key, value in tensors.items() if key not in packed}, strict=False)
    return module


@dataclass(frozen=True)
class _Entry:
    """A layer as the header describes it.

    Attributes:
        kind: Name of the float class.
        shapes: Shape of each weight.
        qconfig: Specs of weights and inputs.
        inputs: Scale and zero point of each quantized input.
    """

    kind: str
    shapes: dict[str, tuple[int, ...]]
    qconfig: LayerQConfig
    inputs: dict[str, tuple[float, int]]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> _Entry:
        qconfig = LayerQConfig.from_dict({"activation": None, **data})
        if "shape" in data:  # format version 1: one weight, one input, and no key for a float input
            inputs = {} if qconfig.activation is None else {"input": (data["scale"], data["zero_point"])}
            return cls(data["kind"], {"weight": tuple(data["shape"])}, qconfig, inputs)
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        return cls(data["kind"], shapes, qconfig, {name: (s, z) for name, (s, z) in data["inputs"].items()})

    def weight_keys(self, name: str, weight: str) -> dict[str, str]:
        """Return the keys of the packed weight of layer ``name``; an affine grid has zero points too."""
        parts = ("packed", "scale") if self.qconfig.weight.symmetric else ("packed", "scale", "zero_point")
        return {part: state_key(name, f"{weight}.{part}") for part in parts}


def _kind(layer: nn.Module) -> str:
    kinds = registered_types(QuantLayer)
    return next((kind.__name__ for kind in kinds if isinstance(layer, kind)), type(layer).__name__)


def _pack_layer(name: str, layer: QuantizedOp, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the packed weights of a layer to ``tensors`` and return its entry of the header."""
    weights = layer.weights
    for which, quantizer in layer.weight_quantizers.items():
        spec = quantizer.spec
        # Tuned and statistics-corrected weights lie on their grid, so rounding again gives the same integers.
        integers = quantizer.integers(weights[which].detach()) - spec.quant_min  # from 0 upwards
        tensors[state_key(name, f"{which}.packed")] = pack_bits(integers, spec.bits)
        tensors[state_key(name, f"{which}.scale")] = quantizer.scale.detach().float().flatten().cpu()
        if not spec.symmetric:
            tensors[state_key(name, f"{which}.zero_point")] = quantizer.zero_point.detach().flatten().cpu()
    return {
        "kind": _kind(layer),
        "shapes": {which: list(weight.shape) for which, weight in weights.items()},
        "inputs": {which: [q.scale.item(), int(q.zero_point.item())] for which, q in layer.input_quantizers.items()},
        **cast(LayerQConfig, layer.qconfig).to_dict(),
    }


def _unpack_layer(name: str, layer: QuantizedOp, entry: _Entry, tensors: Mapping[str, Tensor]) -> None:
    """Make a float layer what its entry and its packed weights describe."""
    layer.attach(entry.qconfig)
    parameters: dict[str, Tensor | None] = {}
    for which, quantizer in layer.weight_quantizers.items():
        weight, spec, keys = layer.weights[which], quantizer.spec, entry.weight_keys(name, which)
        integers = unpack_bits(tensors[keys["packed"]], spec.bits, weight.numel()).view(weight.shape).float()
        quantizer.scale.copy_(tensors[keys["scale"]].view_as(quantizer.scale))
        if not spec.symmetric:
            quantizer.zero_point.copy_(tensors[keys["zero_point"]].view_as(quantizer.zero_point))
        # A weight that was shared becomes this layer's own: each layer may have another grid.
        parameters[which] = quantizer.values((integers + spec.quant_min).to(weight.device))
    for which in layer.bias_names:
        bias = tensors.get(state_key(name, which), layer._parameters.get(which))
        device = next((weight.device for weight in parameters.values() if weight is not None), None)
        parameters[which] = None if bias is None else bias.to(device)
    layer.set_parameters(parameters)
    for which, (scale, zero_point) in entry.inputs.items():
        layer.input_quantizers[which].scale.fill_(scale)
        layer.input_quantizers[which].zero_point.fill_(zero_point)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file whose header is complete."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}. Write one with save_packed(module, path).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PackedFileError(f"{os.fspath(path)} is not a packed file of lightning_ptq.")
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
    except _ERRORS as error:
        raise PackedFileError(
            f"{os.fspath(path)} is damaged or not a safetensors file ({error}). Copy or write it again."
        ) from error
    return header, tensors


@dataclass(frozen=True)
class _Fit:
    """Compares the tensors of a file with those of a module."""

    path: str
    entries: Mapping[str, _Entry]
    folded: list[str]
    tensors: Mapping[str, Tensor]

    def other_model(self, what: str) -> PackedFileError:
        """Return the error that the file belongs to another model."""
        return PackedFileError(
            f"{self.path} belongs to another model: {what}. Build the model as it was when it was packed."
        )

    def packed_keys(self) -> set[str]:
        """Return the keys of all packed weights."""
        keys = (entry.weight_keys(name, w) for name, entry in self.entries.items() for w in entry.shapes)
        return {key for of_weight in keys for key in of_weight.values()}

    def check(self, prepared: Prepared) -> None:
        """Raise :class:`PackedFileError` where file and module differ."""
        layers, modules = prepared.layers, dict(prepared.module.named_modules())
        for name, entry in self.entries.items():
            layer = layers.get(name)
            shapes = layer and {which: tuple(weight.shape) for which, weight in layer.weights.items()}
            present = None if layer is None else (_kind(layer), shapes)
            if layer is None or present != (entry.kind, entry.shapes):
                raise self.other_model(
                    f"its layer {name!r} is a {entry.kind} with weights {entry.shapes}, here it is {present}"
                )
            for which in entry.shapes:
                self._check_weight(name, layer, which)
        for name in self.folded:
            if not isinstance(modules.get(name), FoldableBatchNorm):
                raise self.other_model(f"there is no batch norm {name!r} here")
        self._check_float_tensors(prepared.module, layers)

    def _check_weight(self, name: str, layer: QuantizedOp, which: str) -> None:
        entry = self.entries[name]
        spec: QuantSpec = entry.qconfig.weight
        keys = entry.weight_keys(name, which)
        if missing := [part for part, key in keys.items() if key not in self.tensors]:
            raise PackedFileError(f"{self.path} is damaged: the weight of layer {name!r} is missing ({missing}).")
        size, scales = self.tensors[keys["packed"]].numel(), self.tensors[keys["scale"]].numel()
        wanted = prod(layer.layout(which, spec.granularity).shape)
        if size != -(-layer.weights[which].numel() * spec.bits // 8) or scales != wanted:
            raise PackedFileError(
                f"{self.path} is damaged: the weight of layer {name!r} has {size} bytes, {scales} scales."
            )

    def _check_float_tensors(self, module: nn.Module, layers: Mapping[str, QuantizedOp]) -> None:
        state = module.state_dict()
        expected = set(float_keys(module, self.entries, self.folded))
        given = set(self.tensors) - self.packed_keys()
        # Folded batch norms and statistics tuning give layers biases that the float layers may not have.
        biases = {state_key(name, bias) for name in self.entries for bias in layers[name].bias_names}
        if wrong := sorted((expected - given) | (given - expected - biases)):
            raise self.other_model(f"{wrong[:4]} are in one and not in the other")
        if wrong := sorted(key for key in given & set(state) if state[key].shape != self.tensors[key].shape):
            raise self.other_model(f"{wrong[:4]} have other shapes")
