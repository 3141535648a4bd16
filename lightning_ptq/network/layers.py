"""Quantized layers: the float layer's own class with quantizers for its input and its weight.

:meth:`QuantLayer.swap` turns a float layer into a quantized one, in place; it keeps its parameters and their names. It
starts as a float operation and then computes exactly what the float layer does. Classes that derive from a torch layer
and bring their own ``forward`` (static "same" padding, for example) keep it: they only see another weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from lightning_ptq.errors import QConfigError
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.own_forward import SwappedForward
from lightning_ptq.network.swapping import (
    ReplaceableTensor,
    Swapped,
    float_class_of,
    register_swap,
    tensors_replaced,
)
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.granularity import ChannelLayout
from lightning_ptq.runtime.frames import frames, outside

Kind = TypeVar("Kind", bound="type[QuantLayer]")


class ExposedTensor(ReplaceableTensor):
    """A parameter of an operation. A module that reads it, and whose calls are handed to sites, may multiply by it."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        value = super().__get__(module, owner)
        frame = frames.stack[-1] if frames.stack else None
        own = {} if frame is None or module is None else module.__dict__
        if frame is not None and (own.get("reached") or own.get("qconfig") is not None):
            frame.tied.append(value)
        return value


def _first_keyword(layer: nn.Module, kwargs: dict[str, Any]) -> str:
    """Return the keyword that comes first among the parameters of the float class's forward."""
    parameters = list(inspect.signature(float_class_of(layer).forward).parameters)[1:]
    return next((name for name in parameters if name in kwargs), next(iter(kwargs)))


def _keep_slow_path(module: nn.Module, args: Any) -> None:
    """Do nothing. A hook keeps nn.TransformerEncoderLayer off its fused path, which would use the float weights."""


class QuantLayer(SwappedForward, QuantizedOp):
    """Adds quantizers to a float class. It stands first among the bases.

    A layer has one input, one weight, and possibly a bias. Layers with other tensors override the names; inputs are the
    first arguments of ``forward``, in the order of their names.

    Attributes:
        output_channel_dim: Dimension of the weight that holds the output channels.
    """

    prefix = "Quant"
    added_names: ClassVar[tuple[str, ...]] = (
        "qconfig", "mode", "reference", "tied", "exposed", "reached", "baked", "weight_fake_quant",
        "input_fake_quant", "qconfig_json", "own_forward",
    )  # fmt: skip
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    bias_names: ClassVar[tuple[str, ...]] = ("bias",)
    output_channel_dim: ClassVar[int] = 0

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantize | None
    input_fake_quant: FakeQuantize | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in (*cls.weight_names, *cls.bias_names):
            setattr(cls, name, ExposedTensor(name))  # hides no parameter: it reads the registered one

    def _init_swapped(self) -> None:
        self.init_op()
        self._keep_own_forward()
        for name in (*self.weight_names, *self.input_names):
            self.__dict__[f"{name}_fake_quant"] = None
        # A class that has no bias at all would ignore one; nn.Linear(bias=False) has an empty one, and can get it.
        self.__dict__["bias_names"] = tuple(name for name in self.bias_names if name in self._parameters)
        nn.Module.register_forward_pre_hook(self, _keep_slow_path)

    def _leave_swapped(self) -> None:
        hooks = self._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _keep_slow_path]:
            del hooks[key]

    @classmethod
    def reason_against(cls, module: nn.Module) -> str:
        """Return why ``module`` cannot be quantized, or an empty text."""
        weights = [module._parameters.get(name) for name in cls.weight_names_of(module)]
        if any(weight is None or nn.parameter.is_lazy(weight) for weight in weights):
            return "the weight is lazy or no parameter"
        if not all(cast(Tensor, weight).is_floating_point() for weight in weights):
            return "its weight is not of real floating-point numbers"
        return super().reason_against(module)

    @classmethod
    def weight_names_of(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights of a float layer."""
        return cls.weight_names

    def channels(self, name: str) -> ChannelLayout:
        """Return where the output channels of weight ``name`` lie."""
        return ChannelLayout(self.output_channel_dim)

    def channel_dim(self, output: Tensor) -> int:
        """Return the dimension of an output that holds its channels: the last one of a linear layer."""
        dims = max((weight.dim() for weight in self.weights.values()), default=2)
        return output.dim() - (dims - 2) - 1

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that are quantized, by name, of a call with these arguments."""
        places = self._input_places(args, kwargs)
        return {name: args[at] if isinstance(at, int) else kwargs[at] for name, at in places.items()}

    def _input_places(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int | str]:
        """Return where a call has each input: its position, or its keyword."""
        places: dict[str, int | str] = {}
        for position, name in enumerate(self.input_names):
            if position < len(args):
                places[name] = position
            elif name in kwargs:
                places[name] = name
            elif len(self.input_names) == 1 and kwargs:  # the float class may name its input differently
                places[name] = _first_keyword(self, kwargs)
        return places

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of a call: every weight is used once per output position."""
        values = self.output_tensor(output).numel()
        positions = {name: values / self.channels(name).count(w.shape) for name, w in self.weights.items()}
        return float(sum(weight.numel() * positions[name] for name, weight in self.weights.items()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the float layer's forward on the quantized input and weight; safe in several threads."""
        if self.runs_own_forward:
            return super().forward(*args, **kwargs)
        if frames.stack:  # what the layer calls is no call site of the module that runs it
            with outside:
                return self._run(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        functional = kwargs.pop("functional", None)  # what the network computes with this layer's weight
        if self.mode == "float":
            replaced = self.reference or {}  # without a reference, float mode uses the parameters
        else:
            args, kwargs = self._quantize_inputs(args, kwargs)
            weights = self.weights
            replaced = {
                name: quantizer(weights[name]) if self.training else quantizer.constant(weights[name])
                for name, quantizer in self.weight_quantizers.items()
            }
        if functional is not None:
            with tensors_replaced(self, replaced):
                return functional.compute(args[0], self.weight, getattr(self, "bias", None))
        return self._call(args, kwargs, replaced)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any]) -> Any:
        """Run the float module's forward with ``tensors`` in place of its parameters."""
        with tensors_replaced(self, tensors):
            return self._run_float_forward(super().forward, args, kwargs)

    def _quantize_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        quantizers, values = self.input_quantizers, list(args)
        for name, at in self._input_places(args, kwargs).items() if quantizers else ():
            if isinstance(at, int):
                values[at] = quantizers[name](values[at])
            else:
                kwargs = {**kwargs, at: quantizers[name](kwargs[at])}
        return tuple(values), kwargs


def register_layer(float_class: type[nn.Module], *, channel_dim: int = 0) -> Callable[[Kind], Kind]:
    """Make layers of a class of your own quantizable: ``prepare`` swaps them from then on.

    The float class needs a parameter ``weight``, may have a parameter ``bias``, and takes its input as the first
    argument of ``forward``. Every weight must be multiplied once per output position, as in a matrix product or a
    convolution. For anything else, use the result as a decorator of a :class:`QuantLayer` that overrides what differs.

    Args:
        float_class: A module class.
        channel_dim: Dimension of the weight that holds the output channels.

    Returns:
        A class decorator, which may be left unused.

    Raises:
        QConfigError: If ``float_class`` is not a module class, or ``channel_dim`` is negative.

    Example:
        >>> import torch
        >>> class Transposed(nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(inputs, outputs))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> _ = register_layer(Transposed, channel_dim=1)
        >>> from lightning_ptq import calibrate
        >>> calibration = calibrate(nn.Sequential(Transposed(4, 8)), [torch.randn(16, 4)], "w4a8")
        >>> calibration.module[0].weight_fake_quant.scale.shape
        torch.Size([1, 8])
    """
    if not (isinstance(float_class, type) and issubclass(float_class, nn.Module)):
        raise QConfigError(f"register_layer takes a module class, got {float_class!r}. Write register_layer(MyLayer).")
    if not (isinstance(channel_dim, int) and channel_dim >= 0):
        raise QConfigError(f"channel_dim must be 0 or more, got {channel_dim!r}. Count the dimensions from the first.")
    name = f"{QuantLayer.prefix}{float_class.__name__}"
    register_swap(float_class, type(name, (QuantLayer, float_class), {"output_channel_dim": channel_dim}))

    def decorate(quantized: Kind) -> Kind:
        if "output_channel_dim" not in vars(quantized):
            quantized.output_channel_dim = channel_dim
        register_swap(float_class, quantized)
        return quantized

    return decorate


@register_layer(nn.Conv1d)
class QuantConv1d(QuantLayer, nn.Conv1d):
    """Fake-quantized :class:`torch.nn.Conv1d`."""


@register_layer(nn.Conv2d)
class QuantConv2d(QuantLayer, nn.Conv2d):
    """Fake-quantized :class:`torch.nn.Conv2d`, grouped and depthwise too."""


@register_layer(nn.Conv3d)
class QuantConv3d(QuantLayer, nn.Conv3d):
    """Fake-quantized :class:`torch.nn.Conv3d`."""


class _Transposed(QuantLayer):
    """Transposed convolutions: weights are (inputs, outputs of a group, kernel)."""

    groups: int

    def channels(self, name: str) -> ChannelLayout:
        """Return the second dimension, within each group."""
        return ChannelLayout(1, self.groups)

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of a call: every weight is used once per input position."""
        weight = self.weights["weight"]
        return weight.numel() * (cast(Tensor, self.input_tensors(args, kwargs)["input"]).numel() / weight.shape[0])


@register_layer(nn.ConvTranspose1d)
class QuantConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """Fake-quantized :class:`torch.nn.ConvTranspose1d`."""


@register_layer(nn.ConvTranspose2d)
class QuantConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """Fake-quantized :class:`torch.nn.ConvTranspose2d`."""


@register_layer(nn.ConvTranspose3d)
class QuantConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """Fake-quantized :class:`torch.nn.ConvTranspose3d`."""


@register_layer(nn.Linear)
class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]  # torch's stub has no None for its bias
    """Fake-quantized :class:`torch.nn.Linear`."""


class PaddedTransformerEncoder(Swapped, nn.TransformerEncoder):
    """A :class:`torch.nn.TransformerEncoder` that makes no nested tensors, which only torch's fused path takes."""

    prefix = "Padded"
    use_nested_tensor = property(lambda self: False)  # hides the attribute of the instance

    @classmethod
    def reason_against(cls, module: nn.Module) -> str:
        """Return an empty text: the attribute is hidden on purpose."""
        return ""


register_swap(nn.TransformerEncoder, PaddedTransformerEncoder)
