"""The one abstraction of what is quantized: :class:`QuantizedOp`.

Calibration, units, tuning, sensitivities, costs, statistics, packing and preflight iterate over operations and do not
depend on their kind. An operation says which tensors it takes and holds, where a weight's output channels lie, and what
a call costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_ptq.network.baking import Baked
from lightning_ptq.network.record import RECORD, read_record, record_of
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.granularity import ChannelLayout, Granularity, ScaleLayout
from lightning_ptq.numerics.qconfig import LayerQConfig, Operations
from lightning_ptq.numerics.spec import QuantSpec
from lightning_ptq.numerics.weight_scales import weight_qparams
from lightning_ptq.runtime.structure import float_tensors_in

Mode = Literal["float", "quantized"]

_STATE = ("qconfig", "mode", "reference", "tied", "exposed", "reached", "baked")

FLOAT_BITS = 32
"""Bit width that float values count with."""

State = dict[str, Tensor]
"""Tensors of one operation by name: its parameters, scales and zero points."""


class QuantizedOp(nn.Module):
    """An operation that can be quantized: a layer, or anything else with inputs, weights and multiply-accumulates.

    A kind of operation is a subclass that names its tensors. Each named tensor has a quantizer of its own,
    ``{name}_fake_quant``, once the operation is quantized.

    Attributes:
        input_names: Inputs that are quantized, any number.
        weight_names: Parameters that are quantized, any number, possibly none.
        bias_names: Parameters that are tuned with the weights and stay float.
        is_linear: True if the output is a sum of products, each of one weight and inputs, plus the first bias. Only
            then can statistics tuning scale and shift the output by weights and bias.
        is_lookup: True if the output is rows of the weights, and nothing is multiplied.
        quantized_from: The first of the values of ``QConfig.operations`` with which this kind is quantized.
        qconfig: Specs of weights and inputs; None as long as the operation is float.
        mode: ``"quantized"``, or ``"float"`` to compute what the float operation computes.
        reference: Weights and biases of the float operation during a run, for ``"float"`` mode; None outside a run.
        tied: True if another operation shares a weight, which is then not tuned.
        exposed: True if other code reads a weight; it then lies on its grid, as after loading a packed file.
        reached: True if a forward has called it.
        baked: How to load what the layer was before its computed weight was made a parameter, if that was so.
    """

    input_names: ClassVar[tuple[str, ...]] = ()
    weight_names: ClassVar[tuple[str, ...]] = ()
    bias_names: ClassVar[tuple[str, ...]] = ()
    is_linear: ClassVar[bool] = True
    is_lookup: ClassVar[bool] = False
    quantized_from: ClassVar[Operations] = "layers"

    qconfig: LayerQConfig | None
    mode: Mode
    reference: dict[str, Tensor | None] | None
    tied: bool
    exposed: bool
    reached: bool
    baked: Baked | None

    def init_op(self) -> None:
        """Start as a float operation."""
        self.__dict__.update(dict.fromkeys(_STATE), mode="quantized", tied=False, exposed=False, reached=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STATE:  # the float class may have a __setattr__ that does not know these names
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # To be defined by each kind of operation.

    def channels(self, name: str) -> ChannelLayout:
        """Return where the output channels of weight ``name`` lie."""
        return ChannelLayout()

    def channel_dim(self, output: Tensor) -> int:
        """Return the dimension of an output that holds its channels."""
        return output.dim() - 1

    def output_tensor(self, output: Any) -> Tensor:
        """Return the main tensor of an output: the first floating-point one."""
        return float_tensors_in(output)[0]

    def input_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that are quantized, by name, of a call with these arguments."""
        return {name: kwargs[name] for name in self.input_names if name in kwargs}

    def macs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
        """Return the multiply-accumulates of a call with these arguments and this output."""
        return 0.0

    # Derived from these definitions.

    @property
    def is_quantized(self) -> bool:
        """False as long as the operation is float."""
        return self.qconfig is not None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name."""
        # Replicas of DataParallel, pruning and parametrizations have a plain attribute in place of the parameter.
        parameters = {name: self._parameters.get(name) for name in self.weight_names}
        return {name: cast(Tensor, getattr(self, name) if p is None else p) for name, p in parameters.items()}

    @property
    def weight_count(self) -> int:
        """Number of weights, over all weight tensors."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def input_quantizers(self) -> dict[str, FakeQuantize]:
        """The quantizers of the inputs by name; empty where inputs stay float."""
        return self._quantizers(self.input_names)

    @property
    def weight_quantizers(self) -> dict[str, FakeQuantize]:
        """The quantizers of the weights by name; empty as long as the operation is float."""
        return self._quantizers(self.weight_names)

    def _quantizers(self, names: tuple[str, ...]) -> dict[str, FakeQuantize]:
        modules = {name: self._modules.get(f"{name}_fake_quant") for name in names}
        return {name: module for name, module in modules.items() if isinstance(module, FakeQuantize)}

    def layout(self, name: str, granularity: Granularity) -> ScaleLayout:
        """Return the layout of the scales of weight ``name``."""
        return granularity.layout(self.weights[name].shape, self.channels(name))

    def scale_channels(self, name: str, tensor: Tensor, factors: Tensor) -> Tensor:
        """Return ``tensor``, of weight ``name``'s shape, with output channel ``i`` multiplied by ``factors[i]``."""
        return self.layout(name, Granularity(per_channel=True)).scaled(tensor, factors)

    def packed_bytes(self, spec: QuantSpec) -> int:
        """Return the bytes that the weights take in a packed file at ``spec``: integers, scales and zero points."""
        total = 0
        for name, weight in self.weights.items():
            scales = prod(self.layout(name, spec.granularity).shape)
            total += -(-weight.numel() * spec.bits // 8) + scales * (4 if spec.symmetric else 8)
        return total

    def bit_operations(self, macs: float, qconfig: LayerQConfig | None = None) -> float:
        """Return the bit operations of multiply-accumulates: each multiplies two operands of some bit widths.

        Operands are a weight and an input, or two inputs where there are no weights. Float counts as 32 bits.

        Args:
            macs: Number of multiply-accumulates.
            qconfig: Specs of the operation; None for float.
        """
        inputs = qconfig.activation.bits if qconfig and qconfig.activation else FLOAT_BITS
        weights = (qconfig.weight.bits if qconfig else FLOAT_BITS) if self.weight_names else inputs
        return macs * weights * inputs

    def attach(self, qconfig: LayerQConfig) -> None:
        """Become a quantized operation: add quantizers in place of existing ones, with scales still to be chosen.

        The specs are kept in the buffer :data:`RECORD`, so that a state dict describes the structure it was saved
        from.
        """
        for name, weight in self.weights.items():
            quantizer = FakeQuantize(qconfig.weight, self.layout(name, qconfig.weight.granularity))
            # Replaces one of other specs, past any __setattr__ of the float class.
            nn.Module.__setattr__(self, f"{name}_fake_quant", quantizer.to(weight.device))
        places = (tensor.device for tensor in (*self.weights.values(), *self.buffers()))
        device = next(places, torch.device("cpu"))
        for name in self.input_names:
            activation = qconfig.activation and FakeQuantize(qconfig.activation).to(device)
            nn.Module.__setattr__(self, f"{name}_fake_quant", cast(nn.Module, activation))  # None is no quantizer
        self.qconfig = qconfig
        self.register_buffer(RECORD, record_of(qconfig).to(device))

    def choose_weight_scales(self) -> None:
        """Set scale and zero point of every weight quantizer from the weight."""
        for name, quantizer in self.weight_quantizers.items():
            scale, zero_point = weight_qparams(quantizer.rows(self.weights[name]), quantizer.spec)
            quantizer.scale.copy_(scale.view_as(quantizer.scale))
            quantizer.zero_point.copy_(zero_point.view_as(quantizer.zero_point))

    @torch.no_grad()
    def round_bias(self) -> None:
        """Round the bias to multiples of the scale of the input times that of the weight, if there is one of each.

        Integer kernels add it to the accumulated products, whose scale that is.
        """
        bias = self._parameters.get("bias") if self.bias_names else None
        inputs, weights = list(self.input_quantizers.values()), list(self.weight_quantizers.values())
        if bias is None or not self.is_linear or len(inputs) != 1 or len(weights) != 1:
            return
        scale = (inputs[0].scale * weights[0].scale).flatten().float()
        if scale.numel() not in (1, bias.numel()):
            return
        steps = (bias.double() / scale.double()).round()
        fits = steps.abs() < 2**31
        bias.copy_(torch.where(fits, (steps * scale).to(bias.dtype), bias))

    def set_parameters(self, values: Mapping[str, Tensor | None]) -> None:
        """Give the operation parameters of its own; those it shared with the float operation stay as they are."""
        for name, value in values.items():
            old = self._parameters.get(name)
            new = None if value is None else nn.Parameter(value.detach().clone(), old is None or old.requires_grad)
            self._parameters[name] = new

    def keep_reference(self) -> None:
        """Remember weights and biases as those of the float operation."""
        # Parameters, since a forward may assign what it reads to another layer.
        self.reference = {name: nn.Parameter(weight.detach(), False) for name, weight in self.weights.items()}
        for name in self.bias_names:
            bias = self._parameters.get(name)
            # Weights are replaced before they are changed, but a bias may be written to in place.
            self.reference[name] = None if bias is None else bias.detach().clone()

    def restore_reference(self) -> None:
        """Restore the float weights and biases. Tied weights stay shared."""
        # Tied weights are never changed, so they need not be restored.
        kept = self.weight_names if self.tied else ()
        self.set_parameters({name: value for name, value in (self.reference or {}).items() if name not in kept})

    def tensors(self) -> State:
        """Return what tuning changes, by name: parameters, scales and zero points."""
        # Operations inside this one have tensors of their own.
        found: State = dict(self.named_parameters(recurse=False, remove_duplicate=False))
        for name, quantizer in (*self.weight_quantizers.items(), *self.input_quantizers.items()):
            found.update((f"{name}_fake_quant.{key}", buffer) for key, buffer in quantizer.named_buffers())
        return found

    def state(self) -> State:
        """Return a copy of :meth:`tensors`."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Restore what :meth:`state` returned; the specs must be the same."""
        for name in self.bias_names:
            if (self._parameters.get(name) is None) != (name not in state):  # statistics tuning adds biases
                self.set_parameters({name: state.get(name)})
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])

    def add_biases(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Add the biases that ``tensors`` has and the operation has not, as zeros of the weights' dtype.

        Folded batch norms and statistics tuning give biases to layers that had none.

        Args:
            tensors: Tensors to be loaded, by key.
            prefix: Start of the keys of this operation's tensors.
        """
        for name in self.bias_names:
            bias, weights = tensors.get(prefix + name), list(self.weights.values())
            if bias is not None and self._parameters.get(name) is None and weights:
                self.set_parameters({name: weights[0].new_zeros(bias.shape)})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the structure from the state dict: a layer saved quantized gets quantizers of the saved specs."""
        if baked := self.__dict__.get("baked"):
            baked.load(state_dict, prefix)
        saved = state_dict.get(prefix + RECORD)
        if saved is not None:
            self.attach(read_record(saved, prefix))
            # Records of earlier versions are shorter; load_state_dict passes a copy of the user's dictionary.
            state_dict[prefix + RECORD] = record_of(cast(LayerQConfig, self.qconfig)).to(saved.device)
            self.add_biases(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def quantized_ops(module: nn.Module) -> dict[str, QuantizedOp]:
    """Return the operations below ``module`` that can be quantized, by qualified name, in registration order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, QuantizedOp)}


@contextmanager
def ops_in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """All operations below ``module`` compute in ``mode`` inside the ``with`` block."""
    ops = [op for op in module.modules() if isinstance(op, QuantizedOp)]
    before = [op.mode for op in ops]
    for op in ops:
        op.mode = mode
    try:
        yield
    finally:
        for op, old in zip(ops, before, strict=True):
            op.mode = old
