"""Fake-quantized layers: the float layer's own class with an input and a weight quantizer added.

A quantized layer is made by :meth:`QuantLayer.from_float`, shares the float layer's parameters and keeps their names.
It starts without quantizers and then computes exactly what the float layer does. Classes that derive from a torch
layer and bring their own ``forward`` (static "same" padding, for example) keep it: they only see another weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.qconfig import LayerQConfig, QuantSpec
from lightning_ptq.numerics.weight_scales import weight_qparams

Mode = Literal["float", "quantized"]


class _Swapped(nn.Module):
    """A class put in the place of a float layer's, on a copy that shares its parameters and attributes."""

    @classmethod
    def from_float(cls, module: nn.Module) -> Any:
        """The kin of ``module``, sharing its parameters, buffers and attributes; ``module`` stays as it is."""
        swapped = cls.__new__(cls)
        for key, value in module.__dict__.items():
            swapped.__dict__[key] = value.copy() if isinstance(value, dict) else value
        swapped._init_swapped()
        return swapped

    def _init_swapped(self) -> None:
        """Set up what the kin adds."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of a user-derived layer is made at run time, so a pickle names the float class instead.
        float_class = type(self).__mro__[type(self).__mro__.index(_Swapped) + 1]
        return _rebuild, (float_class,), self.__dict__


def _rebuild(float_class: type[nn.Module]) -> nn.Module:
    kin = swapped_class(float_class)
    if kin is None:
        raise TypeError(f"{float_class.__name__} has no quantized kin")
    return cast(nn.Module, kin.__new__(kin))


def _keep_slow_path(module: nn.Module, args: Any) -> None:
    """Does nothing, by being there: nn.TransformerEncoderLayer's fused path, which would compute with the float
    weights behind the layer's back, is not taken for modules that have a hook.
    """


class QuantLayer(_Swapped):
    """What every quantized layer adds to its float class (mixed in before it).

    Attributes:
        weight_fake_quant: Quantizer of the weight, None as long as the layer is float.
        input_fake_quant: Quantizer of the input, None where activations stay float.
        mode: ``"quantized"`` or ``"float"``; without quantizers both compute the float layer.
        reference: (weight, bias) of the float layer during a run: what ``"float"`` mode computes with.
        tied: True if another layer shares the weight parameter; such a weight is not tuned.
    """

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None
    mode: Mode
    reference: tuple[Tensor, Tensor | None] | None
    tied: bool

    def _init_swapped(self) -> None:
        self.weight_fake_quant = None
        self.input_fake_quant = None
        self.mode = "quantized"
        self.reference = None
        self.tied = False
        self.register_forward_pre_hook(_keep_slow_path)

    @property
    def qconfig(self) -> LayerQConfig | None:
        """The pair of specs, None as long as the layer is float."""
        if self.weight_fake_quant is None:
            return None
        activation = None if self.input_fake_quant is None else self.input_fake_quant.spec
        return LayerQConfig(self.weight_fake_quant.spec, activation)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer's forward on the quantized input and weight."""
        replaced: dict[str, Any] = {}
        if self.mode == "float":
            if self.reference is not None:
                replaced = {"weight": self.reference[0], "bias": self.reference[1]}
        else:
            if self.input_fake_quant is not None:
                input = self.input_fake_quant(input)
            if self.weight_fake_quant is not None:
                replaced = {"weight": self.weight_fake_quant(self.weight)}
        # An entry of the instance's own dictionary hides the registered parameter of that name for this call.
        self.__dict__.update(replaced)
        try:
            return cast(Tensor, super().forward(input, *args, **kwargs))
        finally:
            for name in replaced:
                del self.__dict__[name]

    def channel_layout(self) -> tuple[tuple[int, ...], int]:
        """Shape of a per-output-channel vector against the weight, and the groups to split its first dimension in."""
        dims = self.weight.dim()
        if not isinstance(self, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            return (self.weight.shape[0], *[1] * (dims - 1)), 1
        per_group = self.weight.shape[1]
        if self.groups == 1:
            return (1, per_group, *[1] * (dims - 2)), 1
        return (self.groups, 1, per_group, *[1] * (dims - 2)), self.groups

    def attach(self, qconfig: LayerQConfig) -> None:
        """Add quantizers for ``qconfig`` in place of any there are; their scales are not chosen yet."""
        shape, groups = self.channel_layout() if qconfig.weight.per_channel else ((), 1)
        device = self.weight.device
        self.weight_fake_quant = FakeQuantize(qconfig.weight, shape, groups).to(device)
        self.input_fake_quant = FakeQuantize(qconfig.activation).to(device) if qconfig.activation else None
        record = {key: spec and _grid(spec) for key, spec in asdict(qconfig).items()}
        data = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        self.register_buffer("qconfig_json", data.clone().to(device))

    def choose_weight_scale(self) -> None:
        """Set the weight quantizer's scale and zero point from the weight."""
        quantizer = cast(FakeQuantize, self.weight_fake_quant)
        scale, zero_point = weight_qparams(quantizer.rows(self.weight), quantizer.spec)
        quantizer.scale.copy_(scale.view_as(quantizer.scale))
        quantizer.zero_point.copy_(zero_point.view_as(quantizer.zero_point))

    def scale_channels(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """``tensor``, of the weight's shape, with output channel ``i`` multiplied by ``factor[i]``."""
        shape, groups = self.channel_layout()
        split = tensor.unflatten(0, (groups, -1)) if groups > 1 else tensor
        return (split * factor.view(shape)).view_as(tensor)

    def set_weight(self, weight: Tensor, bias: Tensor | None, keep_weight: bool = False) -> None:
        """Give the layer parameters of its own; the float layer's, shared until now, stay as they are.

        With ``keep_weight`` only the bias is replaced: a tied weight stays the parameter that others share.
        """
        for name, value in (("bias", bias),) if keep_weight else (("weight", weight), ("bias", bias)):
            old = self._parameters.get(name)
            new = None if value is None else nn.Parameter(value.detach().clone(), old is None or old.requires_grad)
            self._parameters[name] = new

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the structure from the state dict: a layer saved quantized gets quantizers of the saved widths."""
        saved = state_dict.get(prefix + "qconfig_json")
        if saved is not None:
            record = json.loads(bytes(saved.cpu().tolist()))
            weight, activation = record["weight"], record["activation"]
            self.attach(LayerQConfig(QuantSpec(**weight), activation and QuantSpec(**activation)))
            if prefix + "bias" in state_dict and self.bias is None:  # from a folded batch norm
                self.set_weight(self.weight, torch.zeros_like(state_dict[prefix + "bias"], device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _grid(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in ("bits", "symmetric", "per_channel")}


class FoldableBatchNorm(_Swapped):
    """A batch norm that turns into the identity once it is folded into the layer before it.

    Its affine parameters stay where they are: they are the per-channel mean and standard deviation that the folded
    layer's output should have. ``folded`` is kept in the state dict.
    """

    def _init_swapped(self) -> None:
        self.is_folded = False

    def forward(self, input: Tensor) -> Tensor:
        """The batch norm's forward, or the identity."""
        return input if self.is_folded else cast(Tensor, super().forward(input))

    def set_folded(self, folded: bool) -> None:
        """Switch between identity and batch norm."""
        self.is_folded = folded
        self._buffers.pop("folded", None)
        if folded:
            self.register_buffer("folded", torch.tensor(True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "running_mean" in state_dict:  # a partial state dict without this layer says nothing of it
            self.set_folded(prefix + "folded" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """Fake-quantized :class:`torch.nn.Conv1d`."""


class QuantConv2d(QuantLayer, nn.Conv2d):
    """Fake-quantized :class:`torch.nn.Conv2d`, grouped and depthwise too."""


class QuantConv3d(QuantLayer, nn.Conv3d):
    """Fake-quantized :class:`torch.nn.Conv3d`."""


class QuantConvTranspose1d(QuantLayer, nn.ConvTranspose1d):
    """Fake-quantized :class:`torch.nn.ConvTranspose1d`."""


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """Fake-quantized :class:`torch.nn.ConvTranspose2d`."""


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]  # torch's stub has no None for its bias
    """Fake-quantized :class:`torch.nn.Linear`."""


_NAMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}


def quantizable_types() -> tuple[type[nn.Module], ...]:
    """The float layer types that have quantized kin."""
    return tuple(_NAMED)


def swapped_class(float_class: type[nn.Module]) -> Any:
    """The kin of a float layer class: a named one, one made for a derived class, or None if there is none."""
    if issubclass(float_class, _Swapped):
        return None
    if float_class in _NAMED:
        return _NAMED[float_class]
    if issubclass(float_class, tuple(_NAMED)):
        return type(f"Quant{float_class.__name__}", (QuantLayer, float_class), {})
    if issubclass(float_class, _BatchNorm):
        return type(f"Foldable{float_class.__name__}", (FoldableBatchNorm, float_class), {})
    return None


@contextmanager
def layers_in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """All quantized layers below ``module`` compute in ``mode`` inside the ``with`` block."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantLayer)]
    before = [layer.mode for layer in layers]
    for layer in layers:
        layer.mode = mode
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.mode = old


def layer_tensors(layer: QuantLayer) -> dict[str, Tensor]:
    """What tuning changes of a layer, by name: its parameters, scales and zero points."""
    parameters = dict(layer.named_parameters(remove_duplicate=False))
    buffers = {name: buffer for name, buffer in layer.named_buffers() if "fake_quant" in name}
    return {**parameters, **buffers}


def layer_state(layer: QuantLayer) -> dict[str, Tensor]:
    """A copy of what tuning changes: weight, bias, scales and zero points."""
    return {name: tensor.detach().clone() for name, tensor in layer_tensors(layer).items()}


@torch.no_grad()
def set_layer_state(layer: QuantLayer, state: dict[str, Tensor]) -> None:
    """Put back what :func:`layer_state` copied; the layer must have the same widths."""
    if (layer.bias is None) != ("bias" not in state):  # statistics tuning adds biases
        layer.set_weight(layer.weight, state.get("bias"), keep_weight=True)
    for name, tensor in layer_tensors(layer).items():
        tensor.copy_(state[name])
