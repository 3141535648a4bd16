"""The packed checkpoint: one safetensors file with integers at their bit width, and the config as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.arguments import check_is_module
from lightning_ptq.calibration.layer_costs import float_keys, state_key
from lightning_ptq.errors import PackedFileError, SurgeryError
from lightning_ptq.export.bits import pack_bits, unpack_bits
from lightning_ptq.export.file import FORMAT_VERSION, Contents, Entry, read, write
from lightning_ptq.export.fit import Fit, kind
from lightning_ptq.export.state_dicts import writable
from lightning_ptq.network.batch_norm import FoldableBatchNorm, folded_norms
from lightning_ptq.network.callers import layers_of
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.prepare import Prepared, is_prepared, prepare
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.qconfig import LayerQConfig, QConfig
from lightning_ptq.runtime.patching import TensorSnapshot

__all__ = ["FORMAT_VERSION", "load_packed", "packed_tensors", "save_packed"]


def save_packed(module: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write a quantized module to one file, with weights packed at their bit width.

    Tensors that stay float keep their dtype, and the file holds a checksum over everything in it.

    Args:
        module: A quantized module, in float32, float64, float16 or bfloat16.
        path: The file, by convention ``*.safetensors``.

    Returns:
        The size of the file in bytes.

    Raises:
        SurgeryError: If the module is not quantized.
        PackedFileError: If the module holds what such a file cannot hold, or the file cannot be written.
    """
    check_is_module(module)
    tensors, header = packed_tensors(module)
    return write(path, header, tensors)


def packed_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`save_packed` writes: tensors by key, and the header that describes layers and folded norms."""
    layers = {name: layer for name, layer in quantized_ops(module).items() if layer.is_quantized}
    if not layers:
        raise SurgeryError(f"{type(module).__name__} is not quantized, so there is nothing to pack. Run PTQ first.")
    folded, state = folded_norms(module), module.state_dict()
    if meta := [key for key, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        raise _not_packable(meta[0], state[meta[0]], "it is on the meta device and has no values")
    tensors: dict[str, Tensor] = {}
    header = {"layers": {name: _pack_layer(name, layer, tensors) for name, layer in layers.items()}, "folded": folded}
    for key in float_keys(module, layers, folded):
        try:
            tensors[key] = state[key].detach().cpu().contiguous().clone()
        except (RuntimeError, NotImplementedError) as error:
            raise _not_packable(key, state[key], str(error)) from error
    if extra := {key: _plain(key, value) for key, value in state.items() if not isinstance(value, Tensor)}:
        header["extra"] = extra
    return tensors, header


def load_packed(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Quantize a float module from a packed file, without callbacks and calibration data.

    The module keeps its own dtype and device. In the dtype of the packed module its outputs are those of the packed one
    bit for bit. In another dtype it has the same integers and scales, and computes in that dtype.

    Args:
        module: A float module of the architecture that was packed. Its layers are swapped in place.
        path: The file that :func:`save_packed` wrote.

    Returns:
        The module.

    Raises:
        FileNotFoundError: If there is no such file.
        PackedFileError: If the file is damaged, of another model, or of a newer format version; the module is then
            unchanged.
        SurgeryError: If the module is quantized already.
    """
    contents = read(path)
    check_is_module(module)
    if is_prepared(module):
        raise SurgeryError(f"{type(module).__name__} has quantized layers already. Load into a new float instance.")
    fit = Fit(os.fspath(path), contents)
    try:
        prepared = prepare(module, QConfig(next(iter(contents.layers.values())).qconfig))
    except SurgeryError as error:
        raise fit.other_model(str(error)) from error
    before = TensorSnapshot({})
    try:
        prepared.add_call_sites([*contents.layers, *layers_of(contents.tensors)])
        fit.check(prepared)
        with writable(module):
            before = TensorSnapshot(fit.overwritten(module))
            _unpack(module, prepared, contents)
    except BaseException as error:
        with writable(module):
            before.restore()
        prepared.undo()
        if isinstance(error, PackedFileError) or not isinstance(error, Exception):
            raise
        raise fit.other_model(f"{type(module).__name__} does not take it ({error})") from error
    return module


def _pack_layer(name: str, layer: QuantizedOp, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the packed weights of a layer to ``tensors`` and return its entry of the header."""
    weights = layer.weights
    for which, quantizer in layer.weight_quantizers.items():
        spec = quantizer.spec
        # Tuned and statistics-corrected weights lie on their grid, so rounding again gives the same integers.
        integers = quantizer.integers(_computed(weights[which].detach())) - spec.quant_min  # from 0 upwards
        if not bool(integers.isfinite().all()):
            raise _not_packable(state_key(name, which), weights[which], "it is not a number in places")
        tensors[state_key(name, f"{which}.packed")] = pack_bits(integers, spec.bits)
        tensors[state_key(name, f"{which}.scale")] = quantizer.scale.detach().float().flatten().cpu()
        if not spec.symmetric:
            tensors[state_key(name, f"{which}.zero_point")] = quantizer.zero_point.detach().flatten().cpu()
    return {
        "kind": kind(layer),
        "shapes": {which: list(weight.shape) for which, weight in weights.items()},
        "inputs": {which: [q.scale.item(), int(q.zero_point.item())] for which, q in layer.input_quantizers.items()},
        **cast(LayerQConfig, layer.qconfig).to_dict(),
    }


def _plain(key: str, value: Any) -> Any:
    """Return an extra state of a module, which has to be what JSON keeps."""
    try:
        kept = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        kept = False
    if not kept:
        raise _not_packable(key, value, "it is neither a tensor nor of plain types")
    return value


def _not_packable(key: str, value: Any, why: str) -> PackedFileError:
    return PackedFileError(
        f"{key!r}, a {type(value).__name__}, cannot be packed: {why}. A packed file holds tensors and JSON."
        " Change the module, or save its state dict by torch.save(module.state_dict(), path)."
    )


def _computed(weight: Tensor) -> Tensor:
    """Return a weight in the dtype in which it is rounded: half precision is rounded in float32."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _unpack(module: nn.Module, prepared: Prepared, contents: Contents) -> None:
    """Make a prepared module the one that the contents of a file describe."""
    for name in contents.folded:
        cast(FoldableBatchNorm, module.get_submodule(name)).set_folded(True)
    tensors, layers = contents.tensors, prepared.layers
    for name, layer in layers.items():
        if name in contents.layers:
            _unpack_layer(name, layer, contents.layers[name], tensors)
        layer.add_biases(tensors, state_key(name, ""))
    # The rest is what stays float: buffers, norms, embeddings, biases.
    packed = contents.packed_keys()
    rest = {key: value for key, value in tensors.items() if key not in packed}
    module.load_state_dict({**rest, **contents.extra}, strict=False)


def _unpack_layer(name: str, layer: QuantizedOp, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
    """Make a float layer what its entry and its packed weights describe."""
    weights = layer.weights
    layer.attach(entry.qconfig)
    parameters: dict[str, Tensor | None] = {}
    for which, quantizer in layer.weight_quantizers.items():
        weight, spec, keys = weights[which], quantizer.spec, entry.weight_keys(name, which)
        integers = unpack_bits(tensors[keys["packed"]], spec.bits, weight.numel()).view(weight.shape).float()
        quantizer.scale.copy_(tensors[keys["scale"]].view_as(quantizer.scale))
        if not spec.symmetric:
            quantizer.zero_point.copy_(tensors[keys["zero_point"]].view_as(quantizer.zero_point))
        # A weight that was shared becomes this layer's own: each layer may have another grid.
        parameters[which] = _on_grid(quantizer, (integers + spec.quant_min).to(weight.device), weight.dtype)
    layer.set_parameters(parameters)
    for which, (scale, zero_point) in entry.inputs.items():
        layer.input_quantizers[which].scale.fill_(scale)
        layer.input_quantizers[which].zero_point.fill_(zero_point)


def _on_grid(quantizer: FakeQuantize, integers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values of a dtype that are rounded to these integers.

    A value of bfloat16 has 8 significant bits, so the value next to ``(q - z) · s`` may belong to another integer.
    """
    values = quantizer.values(integers).to(dtype)
    for end in (float("inf"), -float("inf")):
        wrong = quantizer.integers(_computed(values)) != integers
        if not bool(wrong.any()):
            break
        neighbours = torch.nextafter(values, torch.full_like(values, end))
        right = wrong & (quantizer.integers(_computed(neighbours)) == integers)
        values = torch.where(right, neighbours, values)
    return values
