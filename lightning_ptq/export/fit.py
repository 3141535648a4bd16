"""The comparison of a packed file with the module that it is loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.layer_costs import float_keys, state_key
from lightning_ptq.errors import PackedFileError
from lightning_ptq.export.file import Contents
from lightning_ptq.network.batch_norm import FoldableBatchNorm
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.prepare import Prepared
from lightning_ptq.network.swapping import registered_types

_EXTRA_STATE = "_extra_state"
"""End of the keys of what ``get_extra_state`` returned; its size may change."""


def kind(layer: nn.Module) -> str:
    """Return the name of the registered float class of a layer."""
    kinds = registered_types(QuantLayer)
    return next((registered.__name__ for registered in kinds if isinstance(layer, registered)), type(layer).__name__)


@dataclass(frozen=True)
class Fit:
    """Compares the contents of a file with a module."""

    path: str
    contents: Contents

    def other_model(self, what: str) -> PackedFileError:
        """Return the error that the file belongs to another model."""
        return PackedFileError(
            f"{self.path} belongs to another model: {what}. Build the model as it was when it was packed."
        )

    def overwritten(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a module that loading writes to in place."""
        state = module.state_dict(keep_vars=True)
        return {
            key: value for key, value in state.items() if key in self.contents.tensors and isinstance(value, Tensor)
        }

    def check(self, prepared: Prepared) -> None:
        """Raise :class:`PackedFileError` where file and module differ."""
        layers, modules = prepared.layers, dict(prepared.module.named_modules())
        for name, entry in self.contents.layers.items():
            layer = layers.get(name)
            shapes = layer and {which: tuple(weight.shape) for which, weight in layer.weights.items()}
            if layer is None or (kind(layer), shapes) != (entry.kind, entry.shapes):
                here = _describe(modules.get(name)) if layer is None else f"a {kind(layer)} with weights {shapes}"
                raise self.other_model(
                    f"its layer {name!r} is a {entry.kind} with weights {entry.shapes}, here it is {here}"
                )
            for which in entry.shapes:
                self._check_weight(name, layer, which)
            wanted = set(layer.input_names) if entry.qconfig.activation else set()
            if wanted != entry.inputs.keys():
                raise self.other_model(
                    f"its layer {name!r} has the inputs {sorted(entry.inputs)}, not {sorted(wanted)}"
                )
        for name in self.contents.folded:
            if not isinstance(modules.get(name), FoldableBatchNorm):
                raise self.other_model(f"there is no batch norm {name!r} here")
        self._check_rest(prepared.module, layers)

    def _check_weight(self, name: str, layer: QuantizedOp, which: str) -> None:
        entry = self.contents.layers[name]
        scales = self.contents.tensors[entry.weight_keys(name, which)["scale"]].numel()
        wanted = prod(layer.layout(which, entry.qconfig.weight.granularity).shape)
        if scales != wanted:
            raise PackedFileError(
                f"{self.path} is damaged: the weight of layer {name!r} has {scales} scales, not {wanted}."
            )

    def _check_rest(self, module: nn.Module, layers: Mapping[str, QuantizedOp]) -> None:
        state, tensors = module.state_dict(), self.contents.tensors
        expected = {*float_keys(module, self.contents.layers, self.contents.folded)}
        expected |= {key for key, value in state.items() if not isinstance(value, Tensor)}
        given = (set(tensors) - self.contents.packed_keys()) | self.contents.extra.keys()
        # Folded batch norms and statistics tuning give layers biases that the float layers may not have.
        biases = {
            state_key(name, bias): layer.channels(weight).count(layer.weights[weight].shape)
            for name, layer in layers.items()
            for bias, weight in zip(layer.bias_names, layer.weight_names, strict=False)
            if state_key(name, bias) not in state
        }
        if wrong := sorted((expected - given) | (given - expected - biases.keys())):
            raise self.other_model(f"{wrong[:4]} are in one and not in the other")
        fixed = [key for key in given & state.keys() & tensors.keys() if not key.endswith(_EXTRA_STATE)]
        if lazy := sorted(key for key in fixed if nn.parameter.is_lazy(state[key])):
            raise self.other_model(f"{lazy[:4]} have no shape here yet; run one forward first")
        if meta := sorted(key for key, value in state.items() if isinstance(value, Tensor) and value.is_meta):
            raise self.other_model(f"{meta[:4]} are on the meta device here; call module.to_empty(device='cpu') first")
        other = [key for key in fixed if state[key].shape != tensors[key].shape]
        other += [key for key in biases.keys() & given if tensors[key].shape != (biases[key],)]
        if other:
            raise self.other_model(f"{sorted(other)[:4]} have other shapes")
        if wrong := sorted(key for key in fixed if not _castable(tensors[key].dtype, state[key].dtype)):
            raise self.other_model(f"{wrong[:4]} have other types")


def _describe(module: nn.Module | None) -> str:
    """Return what stands in the place of a quantized layer."""
    if module is None:
        return "missing"
    lazy = any(nn.parameter.is_lazy(parameter) for parameter in module.parameters())
    remedy = "run one forward first" if lazy else "register its class by register_layer if it was when it was packed"
    return f"a {type(module).__name__} that stays float; {remedy}"


def _castable(source: torch.dtype, target: torch.dtype) -> bool:
    """Return True if tensors of one dtype may be loaded into another: floating-point ones into each other."""
    return source == target or (source.is_floating_point and target.is_floating_point)
