"""Mean and standard deviation of each channel of a layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.runtime.patching import hooked


class ChannelStatistics:
    """Mean and standard deviation of each channel over all samples and positions, as if outputs were concatenated.

    Args:
        channel_dim: Dimension of the outputs that holds their channels.
    """

    def __init__(self, channel_dim: int) -> None:
        self.channel_dim = channel_dim
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def update(self, output: Tensor, mask: Tensor | None = None) -> None:
        """Merge the statistics of an output with those of earlier ones (Chan et al., 1979).

        Args:
            output: The output.
            mask: Positions of the batch that hold data, as ``Calibration.padding`` gives them.
        """
        rows = output.detach().movedim(self.channel_dim, 0).flatten(1).double()
        real = where_real(output, mask)
        if real is not None:
            rows = rows[:, real.expand_as(output).movedim(self.channel_dim, 0).flatten(1)[0]]
        if not rows.shape[1]:  # an expert may be called without any row
            return
        count, mean = rows.shape[1], rows.mean(1)
        shift, total = mean - self.mean, self.count + count
        self.squares = (
            self.squares + (rows - mean[:, None]).square().sum(1) + shift.square() * self.count * count / total
        )
        self.mean = self.mean + shift * count / total
        self.count = total

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel, (channels,)."""
        return (cast(Tensor, self.squares) / self.count).sqrt()


def watch_outputs(
    calibration: Calibration, names: Sequence[str], mode: Literal["float", "quantized"]
) -> dict[str, ChannelStatistics]:
    """Return the channel statistics of layers' outputs over the calibration set, from one pass."""
    statistics: dict[str, ChannelStatistics] = {}

    mask: Tensor | None = None

    def update(name: str, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        tensor = layer.output_tensor(output)
        statistics.setdefault(name, ChannelStatistics(layer.channel_dim(tensor))).update(tensor, mask)

    watched = {name: calibration.layers[name] for name in names}
    with hooked(watched, after=update), ops_in_mode(calibration.module, mode):
        for batch in range(len(calibration.batches)):
            mask = calibration.padding(batch)
            calibration.run(batch)
    return statistics
