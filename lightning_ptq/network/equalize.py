"""Equalize channels between two layers, so that each fills more of the activation's grid.

A channel may be scaled in the layer before and scaled back in the layer after, through activations that commute with
positive factors (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
section 4.1). Weights have a scale per output channel, so the rounding of the layer before stays as it is. So does that
of a depthwise convolution after it, which reads each channel alone: there the activation gets what a scale per channel
would give it. In other layers the inputs share the scales of the weights, and a factor moves error from the activation
to the weights (Xiao et al., "SmoothQuant", ICML 2023, eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_ptq.network.batch_norm import fingerprint, same
from lightning_ptq.network.fold_plan import along_inputs
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.own_forward import has_own_forward
from lightning_ptq.network.trace import Trace

_MOST = 64.0
"""Greatest factor: a channel with next to no values is not blown up to the size of the others."""


@dataclass(frozen=True)
class Pair:
    """A layer, and the layer that alone reads its output.

    Attributes:
        before: Name of the layer.
        after: Name of the layer that reads its output.
        channels: For each input channel of the layer after, the output channel of the layer before.
        power: Exponent of the factors: 1 to give all channels the same peak, 0 to leave them as they are.
    """

    before: str
    after: str
    channels: Tensor
    power: float = 1.0

    def factors(self, peaks: Tensor) -> Tensor:
        """Return a factor of 1 or more for each output channel of the layer before, (channels,).

        Args:
            peaks: Greatest magnitude of each input channel of the layer after, (inputs,).
        """
        channels = self.channels.to(peaks.device)
        own = peaks.new_zeros(int(channels.max()) + 1).scatter_reduce(0, channels, peaks, "amax")
        # No value gets greater than the greatest one, which the activation let pass.
        factors = (own.max() / own).pow(self.power).clamp(1.0, _MOST)
        return torch.where((own > 0) & factors.isfinite(), factors, torch.ones_like(factors))

    @torch.no_grad()
    def apply(self, modules: Mapping[str, nn.Module], peaks: Tensor) -> Callable[[], None]:
        """Scale the channels; return the function that takes it back."""
        layer: Any = modules[self.before]
        reader: Any = modules[self.after]
        before = [(each, dict(each._parameters)) for each in (layer, reader)]
        factors = self.factors(peaks.to(reader.weight.device, torch.float32))
        scaled = {name: layer.scale_channels(name, weight, factors) for name, weight in layer.weights.items()}
        biases = {name: layer._parameters.get(name) for name in layer.bias_names}
        scaled.update({name: bias * factors for name, bias in biases.items() if bias is not None})
        layer.set_parameters({name: tensor.to(layer._parameters[name].dtype) for name, tensor in scaled.items()})
        back = factors.reciprocal()[self.channels.to(factors.device)]
        weight = reader.weight * along_inputs(reader, back)
        reader.set_parameters({"weight": weight.to(reader.weight.dtype)})

        def undo() -> None:
            for each, parameters in before:
                each._parameters.update(parameters)

        return undo


def equalize(
    module: nn.Module, pairs: Sequence[Pair], peaks: Mapping[str, Tensor], run: Callable[[], Any]
) -> list[Pair]:
    """Scale the channels of some pairs, unless that changes the result or the inputs of other layers.

    Args:
        module: A prepared module in eval mode, before any quantizer is attached.
        pairs: What :func:`find_pairs` returned.
        peaks: For each layer, the greatest magnitude of each channel of its input, (channels,).
        run: The forward on some batches; its result is compared.

    Returns:
        The pairs that were scaled.
    """
    modules = dict(module.named_modules())
    chosen = [pair for pair in pairs if pair.after in peaks]
    if not chosen:
        return []
    expected = fingerprint(module, run)
    undo = [pair.apply(modules, peaks[pair.after]) for pair in chosen]
    if same(fingerprint(module, run), expected, {pair.after for pair in chosen}):
        return chosen
    for take_back in reversed(undo):
        take_back()
    kept: list[Pair] = []
    for pair in chosen:  # one at a time, to keep those that hold
        take_back = pair.apply(modules, peaks[pair.after])
        if same(fingerprint(module, run), expected, {each.after for each in (*kept, pair)}):
            kept.append(pair)
        else:
            take_back()
    return kept


def is_depthwise(module: Any) -> bool:
    """Return True for a convolution that reads each of its channels alone."""
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and _alone(module)


def _alone(module: Any) -> bool:
    return bool(module.groups == module.in_channels > 1)


def has_input_channels(module: nn.Module) -> bool:
    """Return True for a layer whose weight can be scaled along its input channels."""
    known = isinstance(module, QuantizedOp) and tuple(module.weights) == ("weight",)
    return known and isinstance(module, nn.Linear | _ConvNd) and not has_own_forward(module)


def find_pairs(
    modules: Mapping[str, nn.Module],
    traces: Sequence[Trace],
    folded: Mapping[str, str],
    powers: Mapping[str, float],
) -> list[Pair]:
    """Return the pairs whose channels can be scaled without a change of what the network computes.

    Args:
        modules: Modules of the prepared network by qualified name.
        traces: Traces of its forwards on all batches.
        folded: The layer that each folded batch norm went into.
        powers: For each layer whose input is quantized, the exponent of its factors.
    """
    producers = {name: name for name in modules if isinstance(modules[name], QuantizedOp)}
    producers.update({norm: layer for norm, layer in folded.items() if layer in producers and _back(modules[norm])})
    found = []
    for source, before in producers.items():
        outputs = [trace.outputs.get(source) for trace in traces if trace.calls.get(source)]
        readers = {reader for output in outputs if output is not None for reader in output.scaled}
        if len(readers) != 1 or any(output is None or output.scaled_elsewhere for output in outputs):
            continue
        (after,) = readers
        if powers.get(after) and _fits(modules[before], modules[after]) and _together(traces, before, source, after):
            channels = [output.scaled.get(after) for output in outputs if output is not None]
            first = channels[0]
            if first is not None and all(each is not None and torch.equal(each, first) for each in channels):
                found.append(Pair(before, after, first, powers[after]))
    return found


def _back(norm: Any) -> bool:
    return not norm.is_folded_ahead


def _together(traces: Sequence[Trace], *names: str) -> bool:
    """Return True if the modules run equally often in each forward."""
    return all(len({trace.calls.get(name, 0) for name in names}) == 1 for trace in traces)


def _fits(layer: Any, reader: Any) -> bool:
    """Return True if the layer's outputs can be scaled by its weights and biases, and the reader scaled back."""
    if layer is reader or not has_input_channels(reader) or not isinstance(layer, QuantizedOp):
        return False
    plain = layer.is_linear and not layer.is_lookup and len(layer.weights) == 1 and len(layer.bias_names) <= 1
    return plain and not layer.tied and not reader.tied and not has_own_forward(layer)
