"""Mean and standard deviation of each channel of a layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.network.layers import QuantLayer, layers_in_mode


class ChannelStatistics:
    """Mean and variance of each channel over all samples and positions, as if all outputs were concatenated."""

    def __init__(self, channel_dim: int) -> None:
        self.channel_dim = channel_dim
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def update(self, output: Tensor) -> None:
        """Add an output; its statistics are merged with those before (Chan et al., 1979)."""
        rows = output.detach().movedim(self.channel_dim, 0).flatten(1).double()
        count, mean = rows.shape[1], rows.mean(1)
        shift, total = mean - self.mean, self.count + count
        self.squares = (
            self.squares + (rows - mean[:, None]).square().sum(1) + shift.square() * self.count * count / total
        )
        self.mean = self.mean + shift * count / total
        self.count = total

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of the population."""
        return (cast(Tensor, self.squares) / self.count).sqrt()


def channel_dim(layer: QuantLayer, output: Tensor) -> int:
    """Which dimension of a layer's output holds its channels: the last one of a linear layer."""
    return output.dim() - (layer.weight.dim() - 2) - 1


def watch_outputs(
    calibration: Calibration, names: Sequence[str], mode: Literal["float", "quantized"]
) -> dict[str, ChannelStatistics]:
    """Channel statistics of layers' outputs over the calibration set, from one pass."""
    found: dict[str, ChannelStatistics] = {}

    def watch(name: str) -> Any:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            found.setdefault(name, ChannelStatistics(channel_dim(layer, output))).update(output)

        return hook

    handles = [calibration.layers[name].register_forward_hook(watch(name)) for name in names]
    try:
        with layers_in_mode(calibration.module, mode):
            for batch in range(len(calibration.batches)):
                calibration.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
