"""Range observers: :class:`torchmetrics.Metric` objects whose states declare how ranks merge them.

Activations are observed by :class:`MinMaxObserver`, :class:`PercentileObserver` or :class:`MSEObserver`. The last two
count values in a histogram over *fixed* bins (the upper 16 bits of the float32 representation: sign, exponent and
seven bits of mantissa, so a bin is under 0.8 % wide). Fixed bins need no prior range, and integer counts add up to the
same histogram for any order of the batches and any number of ranks. Weights are known as a whole and need no observer:
see :func:`~lightning_ptq.numerics.weight_scales.weight_qparams`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ptq.numerics.quantize import EMPTY_SCALE, choose_qparams, fake_quantize
from lightning_ptq.numerics.spec import QuantSpec

_BINS = 2**16
MSE_RANGES = 100
"""Number of candidate ranges of an MSE search: 1/100, ..., 100/100 of the observed range."""


class MinMaxObserver(Metric):
    """Records the least and the greatest value; ranks merge by minimum and maximum.

    Args:
        spec: Grid whose range is observed.

    Example:
        >>> observer = MinMaxObserver(QuantSpec(8, symmetric=False))
        >>> observer.update(torch.tensor([-1.0, 2.0]))
        >>> [round(v.item(), 4) for v in observer.compute()]
        [-1.0, 2.0]
    """

    full_state_update = False
    minimum: Tensor
    maximum: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.add_state("minimum", torch.tensor(float("inf")), dist_reduce_fx="min")
        self.add_state("maximum", torch.tensor(float("-inf")), dist_reduce_fx="max")

    def update(self, x: Tensor) -> None:
        """Observe a tensor of any shape.

        Raises:
            ValueError: If it contains NaN or an infinity; the state is then unchanged.
        """
        if x.numel() == 0:
            return
        low, high = x.detach().float().aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError("NaN or an infinity")
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the range to quantize at the observer's own spec: scalar tensors (minimum, maximum)."""
        return self.range_for(self.spec)

    def range_for(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Return the range to quantize at ``spec``; unlike :meth:`compute`, the result is not cached."""
        return self.minimum, self.maximum

    def qparams(self, spec: QuantSpec | None = None) -> tuple[Tensor, Tensor]:
        """Return scale and zero point for the range, at the observer's own spec or another."""
        spec = spec or self.spec
        scale, zero_point = choose_qparams(*self.range_for(spec), spec)
        # Any scale fits inputs that are all 0, or that never came; this one is not lost in a module of half precision.
        return scale.masked_fill((self.minimum >= 0) & (self.maximum <= 0), EMPTY_SCALE), zero_point


class HistogramObserver(MinMaxObserver):
    """Records a histogram over fixed bins in addition to the extremes; ranks merge by sum."""

    counts: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.add_state("counts", torch.zeros(_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Observe a tensor of any shape; see :meth:`MinMaxObserver.update`."""
        super().update(x)
        # The upper half of each number is the second one, because numbers are little-endian.
        bits = x.detach().float().reshape(-1).contiguous().view(torch.int16)[1::2]
        self.counts += torch.bincount(bits.int() + _BINS // 2, minlength=_BINS)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return bin centres (ascending, float64) and their counts (int64), for the bins that are not empty."""
        used = self.counts.nonzero().flatten()
        upper = (used - _BINS // 2).to(torch.int32) << 16
        centres = (upper + 2**15).view(torch.float32).double()
        centres[upper == 0] = 0.0  # exact zeros are by far the most frequent value after a ReLU
        order = centres.argsort()
        return centres[order], self.counts[used][order]


class PercentileObserver(HistogramObserver):
    """Chooses the range that leaves out ``100 - percentile`` percent of the values on each side."""

    def range_for(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Return the range to quantize: scalar tensors (minimum, maximum)."""
        centres, counts = self.histogram()
        if centres.numel() == 0:
            return self.minimum, self.maximum
        share = counts.cumsum(0).double() / counts.sum()
        tail = 1 - spec.percentile / 100
        low = centres[int((share > tail).nonzero()[0])]
        high = centres[int((share >= 1 - tail).nonzero()[0])]
        return torch.maximum(low.float(), self.minimum), torch.minimum(high.float(), self.maximum)


class MSEObserver(HistogramObserver):
    """Chooses the range with the least mean squared quantization error over the histogram.

    Both ends shrink together first, then each alone around the best, which matters for skewed activations.
    """

    def range_for(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Return the range to quantize: scalar tensors (minimum, maximum)."""
        centres, counts = self.histogram()
        if centres.numel() == 0:
            return self.minimum, self.maximum
        weight = counts.double() / counts.sum()
        low, high = self.minimum.double().clamp(max=0), self.maximum.double().clamp(min=0)
        shrink = torch.linspace(1 / MSE_RANGES, 1, MSE_RANGES, dtype=torch.float64, device=centres.device)
        low, high = self._best(low * shrink, high * shrink, centres, weight, spec)
        around = torch.linspace(0.6, 1.4, 41, dtype=torch.float64, device=centres.device)
        for _ in range(2):
            low, high = self._best((low * around).clamp(min=self.minimum), high.expand(41), centres, weight, spec)
            low, high = self._best(low.expand(41), (high * around).clamp(max=self.maximum), centres, weight, spec)
        return low.float(), high.float()

    @staticmethod
    def _best(lows: Tensor, highs: Tensor, centres: Tensor, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        scales, zero_points = choose_qparams(lows, highs, spec)
        errors = []
        # One candidate at a time, so that only one array of bins is held.
        for scale, zero_point in zip(scales.double(), zero_points, strict=True):
            grid = fake_quantize(centres, scale, zero_point, spec.quant_min, spec.quant_max)
            errors.append(grid.sub_(centres).square_().mul_(weight).sum())
        best = int(torch.stack(errors).argmin())
        return lows[best], highs[best]


_BY_NAME: dict[str, type[MinMaxObserver]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}


def make_observer(spec: QuantSpec) -> MinMaxObserver:
    """Return the observer that the spec names."""
    return _BY_NAME[spec.observer](spec)
