"""Equalize the channels between a layer and a depthwise convolution, so that each fills the grid of the activation.

A depthwise convolution reads each channel alone. So a channel may be scaled in the layer before it and scaled back in
the convolution, through activations that commute with positive factors (Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", ICCV 2019, section 4.1). Weights have a scale per channel, so their rounding
stays as it is, and the activation gets what a scale per channel would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_ptq.network.batch_norm import fingerprint, same
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.trace import Trace

_MOST = 64.0
"""Greatest factor: a channel with next to no values is not blown up to the size of the others."""


@dataclass(frozen=True)
class Pair:
    """A layer and the depthwise convolution that alone reads its output.

    Attributes:
        before: Name of the layer.
        after: Name of the convolution.
    """

    before: str
    after: str

    def factors(self, peaks: Tensor) -> Tensor:
        """Return a factor of 1 or more for each channel, (channels,).

        Args:
            peaks: Greatest magnitude of each channel of the convolution's input, (channels,).
        """
        # No value gets greater than the greatest one, which the activation let pass.
        factors = (peaks.max() / peaks).clamp(1.0, _MOST)
        return torch.where((peaks > 0) & factors.isfinite(), factors, torch.ones_like(factors))

    @torch.no_grad()
    def apply(self, modules: Mapping[str, nn.Module], peaks: Tensor) -> Callable[[], None]:
        """Scale the channels; return the function that takes it back."""
        layer: Any = modules[self.before]
        conv: Any = modules[self.after]
        before = [(each, dict(each._parameters)) for each in (layer, conv)]
        factors = self.factors(peaks.to(conv.weight.device, torch.float32))
        scaled = {name: layer.scale_channels(name, weight, factors) for name, weight in layer.weights.items()}
        biases = {name: layer._parameters.get(name) for name in layer.bias_names}
        scaled.update({name: bias * factors.to(bias.dtype) for name, bias in biases.items() if bias is not None})
        layer.set_parameters(scaled)
        back = factors.reciprocal().repeat_interleave(len(conv.weight) // len(factors))
        conv.set_parameters({"weight": conv.scale_channels("weight", conv.weight, back)})

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
        peaks: For each convolution, the greatest magnitude of each channel of its input, (channels,).
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
    return []


def is_depthwise(module: nn.Module) -> bool:
    """Return True for a convolution that reads each of its channels alone."""
    known = isinstance(module, QuantizedOp) and tuple(module.weights) == ("weight",)
    if not known or not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return False
    return bool(module.groups == module.in_channels > 1)


def find_pairs(
    modules: Mapping[str, nn.Module], traces: Sequence[Trace], folded: Mapping[str, str], quantized: Any
) -> list[Pair]:
    """Return the pairs whose channels can be scaled without a change of what the network computes.

    Args:
        modules: Modules of the prepared network by qualified name.
        traces: Traces of its forwards on all batches.
        folded: The layer that each folded batch norm went into.
        quantized: Names of the layers whose inputs are quantized.
    """
    producers = {name: name for name in quantized}
    producers.update({norm: layer for norm, layer in folded.items() if layer in producers and _back(modules[norm])})
    found = []
    for source, before in producers.items():
        outputs = [trace.outputs.get(source) for trace in traces if trace.calls.get(source)]
        readers = {reader for output in outputs if output is not None for reader in output.scaled}
        if len(readers) != 1 or any(output is None or output.scaled_elsewhere for output in outputs):
            continue
        (after,) = readers
        if after in quantized and _fits(modules[before], modules[after]) and _once(traces, before, source, after):
            channels = [output.scaled.get(after) for output in outputs if output is not None]
            whole = torch.arange(cast(int, modules[after].in_channels))
            if all(each is not None and torch.equal(each, whole) for each in channels):
                found.append(Pair(before, after))
    return found


def _back(norm: Any) -> bool:
    return not norm.is_folded_ahead


def _once(traces: Sequence[Trace], *names: str) -> bool:
    """Return True if the modules run at most once in each forward, and all or none of them."""
    return all({trace.calls.get(name, 0) for name in names} in ({0}, {1}) for trace in traces)


def _fits(layer: Any, conv: Any) -> bool:
    """Return True if the layer's outputs can be scaled by its weights and biases, and the convolution scaled back."""
    if layer is conv or not is_depthwise(conv) or not isinstance(layer, QuantizedOp):
        return False
    plain = layer.is_linear and not layer.is_lookup and len(layer.weights) == 1 and len(layer.bias_names) <= 1
    return plain and not layer.tied and not conv.tied
