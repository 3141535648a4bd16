"""Correct the means of a unit's layers before it is tuned: rounding shifts them, most of all behind few weights.

The bias of each layer takes up the difference between the mean outputs of the float and the quantized layer, channel by
channel (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2;
on samples, as in Banner et al., NeurIPS 2019). Layers are corrected in order, so that each sees corrected inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.activations.shards import ShardSamples
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.patching import hooked

_SAMPLES = 128
"""Samples of a shard that the means are taken over."""

Shifts = dict[str, list[Tensor]]
"""For each layer, its shift in each call, (channels,)."""


@torch.no_grad()
def correct_means(
    unit: Unit, samples: Sequence[ShardSamples], over_shards: Callable[[dict[int, Shifts]], list[Shifts]]
) -> None:
    """Add to the bias of each linear layer of a unit what rounding takes from its mean output.

    Args:
        unit: The unit, in eval mode, quantized.
        samples: Its samples in the shards of this rank.
        over_shards: Function that returns the values of all shards, in order, from those of this rank.
    """
    layers = {name: layer for name, layer in unit.layers.items() if _bias_of(layer) is not None}
    found = over_shards({own.shard.index: _shifts(unit, layers, own) for own in samples})
    for name, layer in layers.items():
        shifts = [shift for of_shard in found for shift in of_shard.get(name, ())]
        bias = _bias_of(layer)
        if shifts and bias is not None:
            bias.add_(torch.stack([shift.to(bias) for shift in shifts]).mean(0))


def _bias_of(layer: QuantizedOp) -> Tensor | None:
    """Return the bias that is added to the outputs of a layer; None if it has none, or does more than to multiply."""
    names = layer.bias_names if layer.is_linear and not layer.is_lookup else ()
    return layer._parameters.get(names[0]) if len(names) == 1 else None


def _shifts(unit: Unit, layers: dict[str, QuantizedOp], samples: ShardSamples) -> Shifts:
    """Return the shifts of the layers on some samples of a shard."""
    shifts: Shifts = {}
    for group, rows in samples.some(_SAMPLES):
        means: dict[str, list[Tensor]] = {}

        def record(name: str, layer: Any, args: Any, kwargs: Any, output: Any, means: Any = means) -> None:
            means.setdefault(name, []).append(_mean(layer, output))

        def shift(name: str, layer: Any, args: Any, kwargs: Any, output: Any, means: Any = means) -> Any:
            wanted = means[name].pop(0) if means.get(name) else None
            found = _mean(layer, output)
            if wanted is None or wanted.shape != found.shape or not isinstance(output, Tensor):
                return None
            shifts.setdefault(name, []).append(wanted - found)
            shape = [-1 if dim == layer.channel_dim(output) else 1 for dim in range(output.dim())]
            return output + (wanted - found).view(shape).to(output)

        for mode, hook in (("float", record), ("quantized", shift)):
            with hooked(dict(layers), after=hook):
                samples.data.run(unit.module, group, rows, mode)  # type: ignore[arg-type]  # a mode
    return shifts


def _mean(layer: QuantizedOp, output: Any) -> Tensor:
    """Return the mean output of each channel, (channels,)."""
    tensor = layer.output_tensor(output)
    return tensor.float().movedim(layer.channel_dim(tensor), 0).flatten(1).mean(1)
