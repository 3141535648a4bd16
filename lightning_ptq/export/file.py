"""The file of a packed checkpoint: how it is written and read, its checksum, and the checks of every field.

The file is a safetensors file of tensors and text; nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_ptq.calibration.layer_costs import state_key
from lightning_ptq.errors import PackedFileError
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.numerics.spec import QuantSpec

FORMAT = "lightning_ptq"
FORMAT_VERSION = 2

_GRID = {"bits": (int,), "symmetric": (bool,), "per_channel": (bool,)}
_SPEC = {**_GRID, "group_size": (int,), "observer": (str,), "percentile": (int, float), "signed_scale": (bool,)}
"""The types of a spec's fields. Files of early versions hold the grid alone."""


@dataclass(frozen=True)
class Entry:
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
    def of(cls, data: Any, version: int) -> Entry:
        """Return the entry that ``data`` of a header describes.

        Raises:
            ValueError: If a field is missing, unknown, or has a value that it cannot have.
        """
        if version == 1:  # one weight and one input
            _need(isinstance(data, dict) and "shape" in data, "a layer without a shape")
            values = {"activation": None, "scale": None, "zero_point": None, **data}
            shape, scale, zero_point = (values.pop(key) for key in ("shape", "scale", "zero_point"))
            inputs = {} if values["activation"] is None else {"input": [scale, zero_point]}
            data = {**values, "shapes": {"weight": shape}, "inputs": inputs}
        _fields(data, {"kind": (str,), "shapes": (dict,), "inputs": (dict,), "weight": (dict,)}, {"activation": None})
        activation = data.get("activation")
        qconfig = LayerQConfig(_spec(data["weight"]), None if activation is None else _spec(activation))
        for shape in data["shapes"].values():
            _need(isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape), f"shape {shape}")
        _need(not data["inputs"] or qconfig.activation is not None, "the scale of an input that has no grid")
        grids = {name: _input(pair, qconfig.activation) for name, pair in data["inputs"].items()}
        return cls(data["kind"], {name: tuple(shape) for name, shape in data["shapes"].items()}, qconfig, grids)

    def weight_keys(self, name: str, weight: str) -> dict[str, str]:
        """Return the keys of the packed weight of layer ``name``; an affine grid has zero points too."""
        parts = ("packed", "scale") if self.qconfig.weight.symmetric else ("packed", "scale", "zero_point")
        return {part: state_key(name, f"{weight}.{part}") for part in parts}


@dataclass(frozen=True)
class Contents:
    """What a packed file holds.

    Attributes:
        layers: The quantized layers by qualified name.
        folded: Names of the folded batch norms.
        extra: Extra states of modules that are no tensors, by their keys in the state dict.
        tensors: Packed weights, their scales and zero points, and what stays float, by key.
    """

    layers: dict[str, Entry]
    folded: list[str]
    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, header: Any, tensors: dict[str, Tensor], version: int = FORMAT_VERSION) -> Contents:
        """Return the contents that a header describes, every field of which is checked.

        Raises:
            ValueError: If a field or a tensor is missing, or has a value that it cannot have.
        """
        _fields(header, {"layers": (dict,), "folded": (list,)}, {"extra": (dict,)})
        layers = {name: Entry.of(data, version) for name, data in header["layers"].items()}
        _need(bool(layers), "no layers")
        folded = header["folded"]
        _need(all(isinstance(name, str) for name in folded) and len(set(folded)) == len(folded), "names of batch norms")
        contents = cls(layers, folded, tensors, header.get("extra", {}))
        for name, entry in layers.items():
            for weight in entry.shapes:
                contents._check_weight(name, weight)
        return contents

    def packed_keys(self) -> set[str]:
        """Return the keys of all packed weights."""
        keys = (entry.weight_keys(name, w) for name, entry in self.layers.items() for w in entry.shapes)
        return {key for of_weight in keys for key in of_weight.values()}

    def _check_weight(self, name: str, weight: str) -> None:
        """Check integers, scales and zero points of one weight; their number follows from the module."""
        entry = self.layers[name]
        spec, keys = entry.qconfig.weight, entry.weight_keys(name, weight)
        missing = [part for part, key in keys.items() if key not in self.tensors]
        _need(not missing, f"the weight of layer {name!r} is missing ({missing})")
        where = f"of layer {name!r}"
        stream, scale = self.tensors[keys["packed"]], self.tensors[keys["scale"]]
        size = -(-prod(entry.shapes[weight]) * spec.bits // 8)
        _need(stream.dtype == torch.uint8 and stream.shape == (size,), f"the integers {where}")
        signed = spec.symmetric and spec.signed_scale and spec.bits < 8
        usable = scale.isfinite() & scale.reciprocal().isfinite() if scale.is_floating_point() else torch.tensor(False)
        _need(scale.dim() == 1 and bool(usable.all()), f"the scales {where}")
        _need(signed or bool((scale > 0).all()), f"a negative scale {where}")
        if not spec.symmetric:
            zero_point = self.tensors[keys["zero_point"]]
            _need(zero_point.dtype == torch.int32 and zero_point.shape == scale.shape, f"the zero points {where}")
            inside = (zero_point >= spec.quant_min) & (zero_point <= spec.quant_max)
            _need(bool(inside.all()), f"a zero point {where} outside its grid")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _fields(data: Any, required: Mapping[str, Collection[type]], optional: Mapping[str, Any]) -> None:
    """Check the keys of a JSON object, and the types of their values; None as an optional type allows any."""
    _need(isinstance(data, dict), f"{data!r:.80} in place of an object")
    _need(required.keys() <= data.keys() <= required.keys() | optional.keys(), f"the keys {sorted(data)}")
    for key, value in data.items():
        types = required.get(key, optional.get(key))
        _need(types is None or type(value) in types, f"{key}={value!r:.80}")  # not isinstance: True is no width


def _spec(data: Any) -> QuantSpec:
    _fields(data, _GRID, _SPEC)
    return QuantSpec.from_dict(data)


def _input(pair: Any, spec: QuantSpec | None) -> tuple[float, int]:
    """Return scale and zero point of an input."""
    _need(isinstance(pair, list) and len(pair) == 2 and spec is not None, f"{pair!r:.80} as the grid of an input")
    scale, zero_point = pair
    grid = cast(QuantSpec, spec)
    _need(type(scale) in (int, float), f"the input scale {scale!r:.80}")
    value = torch.tensor(float(scale), dtype=torch.float32)
    _need(bool((value > 0) & value.isfinite() & value.reciprocal().isfinite()), f"the input scale {scale!r:.80}")
    least, greatest = (0, 0) if grid.symmetric else (grid.quant_min, grid.quant_max)
    _need(type(zero_point) is int and least <= zero_point <= greatest, f"the input zero point {zero_point!r:.80}")
    return float(scale), zero_point


def checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest over the version, the header, and name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}\0{header}".encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: dict[str, Tensor]) -> int:
    """Write a file; a reader never sees half of one.

    Returns:
        The size of the file in bytes.

    Raises:
        PackedFileError: If a value is none that can be read back, or the file cannot be written.
    """
    temporary = Path(f"{os.fspath(path)}.part")
    try:
        text = json.dumps(header, separators=(",", ":"))
        Contents.of(json.loads(text), tensors)  # what cannot be loaded is not saved
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "ptq": text, "checksum": checksum(text, tensors)}
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
        return Path(path).stat().st_size
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise PackedFileError(
            f"{os.fspath(path)} cannot be written ({error}). Check the folder and its free space; if a value is named,"
            " quantize the module again."
        ) from error


def read(path: str | os.PathLike[str]) -> Contents:
    """Read and check a file.

    Raises:
        FileNotFoundError: If there is no such file.
        PackedFileError: If it is damaged, of another kind, or of a newer format version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}. Write one with save_packed(module, path).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise PackedFileError(f"{os.fspath(path)} is not a packed file of lightning_ptq.")
            version = _version(path, metadata)
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        contents = Contents.of(json.loads(metadata["ptq"]), tensors, version)
        _need(metadata.keys() - {"checksum"} == {"format", "version", "ptq"}, f"the metadata {sorted(metadata)}")
        # Version 1 has none, and neither have the first files of version 2.
        digest = metadata.get("checksum") if version > 1 else None
        _need(digest in (None, checksum(metadata["ptq"], tensors)), "its checksum is that of another content")
        return contents
    except PackedFileError:
        raise
    except Exception as error:  # of the parsers of safetensors, JSON and the specs
        what = "is damaged" if isinstance(error, ValueError) else "is damaged or not a safetensors file"
        reason = "its header is nested too deeply" if isinstance(error, RecursionError) else error
        raise PackedFileError(f"{os.fspath(path)} {what}: {reason}. Copy or write it again.") from error


def _version(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> int:
    version = metadata.get("version", "")
    _need(re.fullmatch("[1-9][0-9]{0,3}", version) is not None, f"format version {version!r:.80}")
    if int(version) > FORMAT_VERSION:
        raise PackedFileError(
            f"{os.fspath(path)} has format version {version}, this lightning_ptq reads up to {FORMAT_VERSION}."
            " Upgrade with: pip install -U lightning-ptq"
        )
    return int(version)
