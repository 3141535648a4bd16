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
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.network.op import Mode, QuantizedOp
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.patching import After, hooked

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
        padding = samples.data.padding_of(group, rows)
        wanted: dict[str, list[Tensor]] = {}

        def record(name: str, layer: Any, args: Any, kwargs: Any, output: Any, wanted: Any = wanted) -> None:
            wanted.setdefault(name, []).append(layer.output_tensor(output).detach())

        def shift(
            name: str, layer: Any, args: Any, kwargs: Any, output: Any, wanted: Any = wanted, padding: Any = padding
        ) -> Any:
            expected = wanted[name].pop(0) if wanted.get(name) else None
            if expected is None or not isinstance(output, Tensor) or expected.shape != output.shape:
                return None
            dim = layer.channel_dim(output)
            found = _shift(expected.float() - output.float(), dim, where_real(output, padding))
            shifts.setdefault(name, []).append(found)
            return output + found.view([-1 if each == dim else 1 for each in range(output.dim())]).to(output)

        runs: tuple[tuple[Mode, After], ...] = (("float", record), ("quantized", shift))
        for mode, hook in runs:
            with hooked(dict(layers), after=hook):
                samples.data.run(unit.module, group, rows, mode)
    return shifts


def _shift(difference: Tensor, dim: int, real: Tensor | None) -> Tensor:
    """Return the mean difference of each channel, (channels,), less what the number of values leaves uncertain.

    The positive part of James and Stein's estimate: a mean that is no greater than its standard error is 0.

    Args:
        difference: The float output less the quantized one.
        dim: Dimension of its channels.
        real: Which values belong to positions with data, broadcastable to the difference; None for all of them.
    """
    values = difference.movedim(dim, 0).flatten(1)
    if real is not None:
        values = values[:, real.expand_as(difference).movedim(dim, 0).flatten(1)[0]]
    if not values.shape[1]:
        return values.new_zeros(len(values))
    mean, count = values.mean(1), max(values.shape[1], 1)
    uncertain = values.square().mean(1).sub(mean.square()).clamp(min=0) / count
    return mean * (1 - uncertain / mean.square().clamp(min=1e-30)).clamp(min=0)
