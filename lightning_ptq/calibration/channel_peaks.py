"""Peaks of the channels of layers' inputs, and what is equalized by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.network.equalize import equalize, find_pairs, has_input_channels, is_depthwise
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.ranks import Ranks


class ChannelPeaks:
    """The greatest magnitude of each input channel of the layers that can be scaled along these."""

    def __init__(self) -> None:
        self.peaks: dict[str, Tensor] = {}

    def update(self, name: str, layer: Any, x: Tensor) -> None:
        """Observe an input of a layer, of any shape with a dimension of channels."""
        if not has_input_channels(layer) or not x.numel():
            return
        dims = [dim for dim in range(x.dim()) if dim != layer.channel_dim(x) % x.dim()]
        # Without other dimensions, amax would reduce the channels.
        peaks = (torch.maximum(x.amax(dims), -x.amin(dims)) if dims else x.abs()).detach().float()
        self.peaks[name] = torch.maximum(self.peaks.get(name, peaks), peaks)

    def merge(self, ranks: Ranks, device: torch.device) -> None:
        """Take the greatest peaks of all ranks."""
        for peaks in ranks.gather({name: found.cpu() for name, found in self.peaks.items()}):
            for name, found in peaks.items():
                self.peaks[name] = torch.maximum(self.peaks.get(name, found.to(device)), found.to(device))

    def equalize(self, calibration: Calibration) -> list[str]:
        """Equalize channels between layers of a module without quantizers.

        Args:
            calibration: Its calibration so far, with the folded batch norms.

        Returns:
            The layers whose inputs that changes.
        """
        module = calibration.module
        modules = dict(module.named_modules())
        powers = {name: _power(modules[name], calibration.qconfig_at(name)) for name in self.peaks}
        pairs = find_pairs(modules, calibration.traces, calibration.folded, powers)
        batches = list(calibration.one_batch_per_course())
        done = equalize(module, pairs, self.peaks, lambda: [calibration.run(index) for index in batches])
        return [pair.after for pair in done]


def _power(layer: Any, pair: LayerQConfig) -> float:
    """Return how far channels are equalized: where it costs the weights nothing, or as they are the finer grid."""
    if pair.activation is None:
        return 0.0
    if is_depthwise(layer):
        return 1.0
    return 0.5 if pair.weight.bits >= pair.activation.bits < 8 else 0.0
