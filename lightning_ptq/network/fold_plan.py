"""Which batch norms may be folded into which layers, by algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_ptq.network.foldable import FoldableBatchNorm
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.trace import Trace

_MOST_COARSENING = 2.0
"""How much coarser the grid of a layer's input may get by folding a batch norm into it: one bit."""

_RANGE = 4.0  # standard deviations on either side of the mean that a channel's values are taken to reach


class NotFoldable(Exception):
    """Why a batch norm cannot be folded."""


@dataclass(frozen=True)
class Fold:
    """A batch norm and the layers it may be folded into.

    Attributes:
        norm: Name of the norm.
        layers: Names of the layers: the one before the norm, or those after it.
        channels: For each channel of the layers' input, the norm's channel; empty for the layer before.
    """

    norm: str
    layers: tuple[str, ...]
    channels: tuple[Tensor, ...] = ()

    @property
    def ahead(self) -> bool:
        """True if the layers come after the norm."""
        return bool(self.channels)

    @torch.no_grad()
    def apply(self, modules: dict[str, nn.Module]) -> Callable[[], None]:
        """Fold the norm; return the function that takes it back."""
        norm: Any = modules[self.norm]
        layers: list[Any] = [modules[name] for name in self.layers]
        before = [dict(layer._parameters) for layer in layers]
        if self.ahead:
            for layer, channels in zip(layers, self.channels, strict=True):
                _fold_ahead(norm, layer, channels)
        else:
            _fold_back(norm, layers[0])
        norm.set_folded(True, self.ahead)

        def unfold() -> None:
            for layer, parameters in zip(layers, before, strict=True):
                layer._parameters.update(parameters)
            norm.set_folded(False)

        return unfold


def _fold_back(norm: Any, layer: Any) -> None:
    """Scale and shift the output channels of the layer before the norm."""
    ((name, weight),) = layer.weights.items()
    (bias_name,) = layer.bias_names
    gain, _ = norm.gain_and_shift()
    shift = torch.zeros_like(gain) if getattr(norm, "bias", None) is None else norm.bias
    bias = layer._parameters.get(bias_name)
    bias = torch.zeros_like(shift) if bias is None else bias
    layer.set_parameters({
        name: layer.scale_channels(name, weight, gain), bias_name: (bias - norm.running_mean) * gain + shift
    })  # fmt: skip


def _fold_ahead(norm: Any, layer: Any, channels: Tensor) -> None:
    """Scale the input channels of a layer after the norm, and add the shift to its bias."""
    weight = layer.weight.double()
    gain, shift = (values.double()[channels.to(values.device)] for values in norm.gain_and_shift())
    parameters = {"weight": (weight * along_inputs(layer, gain)).to(layer.weight.dtype)}
    if bool((shift != 0).any()):
        added = (weight * along_inputs(layer, shift)).flatten(1).sum(1)
        bias = layer._parameters.get("bias")
        parameters["bias"] = (added if bias is None else bias.double() + added).to(layer.weight.dtype)
    layer.set_parameters(parameters)


def along_inputs(layer: Any, values: Tensor) -> Tensor:
    """Return values of the input channels in a shape that broadcasts against the weight."""
    ones = [1] * (layer.weight.dim() - 2)
    if isinstance(layer, _ConvTransposeNd):
        return values.view(-1, 1, *ones)
    groups = getattr(layer, "groups", 1)
    rows = values.view(groups, 1, -1).expand(groups, layer.weight.shape[0] // groups, -1)
    return rows.reshape(layer.weight.shape[0], -1, *ones)


def plan_folds(modules: dict[str, nn.Module], traces: Sequence[Trace]) -> tuple[dict[str, Fold], dict[str, str]]:
    """Return how each batch norm may be folded, and why others may not.

    Args:
        modules: Modules of the prepared network by qualified name.
        traces: Traces of its forwards on all batches.
    """
    folds: dict[str, Fold] = {}
    refused: dict[str, str] = {}
    for name, norm in modules.items():
        if not isinstance(norm, FoldableBatchNorm) or not _ran(traces, name):
            continue
        try:
            _check_norm(norm)
            folds[name] = _back(name, modules, traces)
        except NotFoldable as reason:
            try:
                folds[name] = _ahead(name, modules, traces)
            except NotFoldable as other:
                refused[name] = f"{reason}{other}"
    return folds, refused


def _ran(traces: Iterable[Trace], *names: str) -> list[Trace]:
    """Return the traces in which any of the modules ran."""
    return [trace for trace in traces if any(trace.calls.get(name) for name in names)]


def _check_norm(norm: Any) -> None:
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        raise NotFoldable("it has no running statistics")
    if not all(bool(values.isfinite().all()) for values in norm.gain_and_shift()):
        raise NotFoldable("its variance is zero, or a statistic is not finite")


def _back(name: str, modules: dict[str, nn.Module], traces: Sequence[Trace]) -> Fold:
    """Return the fold into the layer whose output the norm normalizes."""
    before = {p for trace in traces for p, output in trace.outputs.items() if name in output.readers}
    layer_name = before.pop() if len(before) == 1 else ""
    layer = modules.get(layer_name)
    ran = _ran(traces, name, layer_name)
    once = all(trace.calls.get(which, 0) <= 1 for trace in ran for which in (name, layer_name))
    if not once or not isinstance(layer, QuantizedOp) or not len(layer.weights) == len(layer.bias_names) == 1:
        raise NotFoldable("it does not directly follow a layer that runs once")
    if layer.tied:
        raise NotFoldable("the layer before it shares its weight")
    for trace in ran:
        output = trace.outputs.get(layer_name)
        why = "one of them runs without the other" if output is None or not trace.calls.get(name) else output.elsewhere
        if output is not None and not why:
            channels = output.readers.get(name)
            others = [reader for reader in output.readers if reader != name]
            if others:
                why = f"{', '.join(others)} reads its output too"
            elif channels is None or not torch.equal(channels, torch.arange(len(channels))):
                why = "its channels are not those of the norm"
        if why:
            raise NotFoldable(f"folding it into {layer_name} changes the model's output ({why})")
    return Fold(name, (layer_name,))


def _ahead(name: str, modules: dict[str, nn.Module], traces: Sequence[Trace]) -> Fold:
    """Return the fold into the layers that take the norm's output as their input."""
    outputs = [trace.outputs[name] for trace in traces if name in trace.outputs]
    after = dict.fromkeys(reader for output in outputs for reader in output.readers)
    if not after or any(output.elsewhere for output in outputs):
        raise NotFoldable("")
    channels = []
    try:
        for layer_name in after:
            ran = _ran(traces, name, layer_name)
            if any(trace.calls.get(which, 0) > 1 for trace in ran for which in (name, layer_name)):
                raise NotFoldable("it runs several times")
            found = [trace.outputs[name].readers.get(layer_name) if name in trace.outputs else None
                     for trace in _ran(traces, layer_name)]  # fmt: skip
            channels.append(_check_layer(modules[name], modules[layer_name], found))
    except NotFoldable as reason:
        raise NotFoldable(f", and folding it into {layer_name} changes the model's output ({reason})") from None
    return Fold(name, tuple(after), tuple(channels))


def _check_layer(norm: Any, layer: Any, found: list[Tensor | None]) -> Tensor:
    """Return the norm's channel of each of the layer's input channels; raise where the layer cannot take the norm."""
    kinds = (nn.Linear, _ConvNd)
    if not isinstance(layer, QuantizedOp) or not isinstance(layer, kinds) or tuple(layer.weights) != ("weight",):
        raise NotFoldable("the places of its inputs in the weight are not known")
    if layer.tied:
        raise NotFoldable("it shares its weight")
    channels = found[0]
    if channels is None or any(other is None or not torch.equal(other, channels) for other in found):
        raise NotFoldable("its input is not the norm's output alone, or mixes its channels")
    gain, shift = norm.gain_and_shift()
    used = channels.unique().to(shift.device)
    if bool((shift[used] != 0).any()):
        if not layer.bias_names:
            raise NotFoldable("it has no bias")
        if isinstance(layer, _ConvTransposeNd) or (isinstance(layer, _ConvNd) and _pads_zeros(layer)):
            raise NotFoldable("it pads with zeros")
    coarser = _coarsening(norm, gain[used], used)
    if coarser > _MOST_COARSENING:
        raise NotFoldable(f"the grid of its quantized input would be {coarser:.1f} times as coarse")
    return channels


def _pads_zeros(layer: _ConvNd) -> bool:
    return layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def _coarsening(norm: Any, gain: Tensor, used: Tensor) -> float:
    """Return how much greater the rounding error behind the norm gets if its input is quantized, not its output.

    An input has one scale for all channels. Without the norm, a channel of small variance has few steps of that scale.
    """
    means, deviations = norm.running_mean[used], norm.running_var[used].clamp_min(0).sqrt()
    weight, bias = (getattr(norm, key, None) for key in ("weight", "bias"))
    spread = torch.ones_like(deviations) if weight is None else weight[used].abs()
    centre = torch.zeros_like(means) if bias is None else bias[used]
    before, after = _span(means, deviations), _span(centre, spread)
    return float(gain.square().mean().sqrt() * before / after) if after > 0 else 1.0


def _span(centre: Tensor, deviation: Tensor) -> Tensor:
    return (centre + _RANGE * deviation).max() - (centre - _RANGE * deviation).min()
