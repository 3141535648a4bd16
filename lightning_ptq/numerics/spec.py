"""How one tensor is quantized: the grid, and how the grid's range is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_ptq.arguments import flag, is_number, one_of, whole
from lightning_ptq.errors import QConfigError
from lightning_ptq.numerics.granularity import Granularity

ObserverName = Literal["minmax", "percentile", "mse"]
_OBSERVERS = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class Grid:
    """The grid of integers that a tensor is rounded to.

    Args:
        bits: Bit width, 2 to 8.
        symmetric: True for a signed grid with zero point 0, False for an unsigned grid with an integer zero point.
        per_channel: True for one scale per output channel, False for one per tensor.
        group_size: For weights, the input values of an output channel that share a scale (32, 64 and 128 are usual);
            None for all of them. A group size implies scales per channel.

    Raises:
        QConfigError: If a value is outside its domain.
    """

    bits: int = 8
    symmetric: bool = True
    per_channel: bool = False
    # By keyword only: it came later, and QuantSpec has positional arguments after this class's.
    group_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # In Python's own types, which JSON can write.
        object.__setattr__(self, "bits", whole("bits", self.bits, 2, 8))
        object.__setattr__(self, "symmetric", flag("symmetric", self.symmetric))
        object.__setattr__(self, "per_channel", flag("per_channel", self.per_channel))
        if self.group_size is not None:
            object.__setattr__(self, "group_size", whole("group_size", self.group_size, 2))

    @property
    def quant_min(self) -> int:
        """Least integer of the grid."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """Greatest integer of the grid."""
        return self.quant_min + (1 << self.bits) - 1

    @property
    def granularity(self) -> Granularity:
        """Which values of a weight share a scale."""
        return Granularity(self.per_channel, self.group_size)


@dataclass(frozen=True)
class RangeSearch:
    """How the range of a grid is chosen.

    Args:
        observer: ``"minmax"``, ``"percentile"`` or ``"mse"`` (the range of least squared quantization error).
        percentile: Share of values, in percent, that ``"percentile"`` keeps inside the range.
        signed_scale: Whether the scale of a weight may be negative. A symmetric grid has one more level below 0 than
            above, and a negative scale moves it above (:func:`~lightning_ptq.numerics.weight_scales.weight_qparams`).

    Raises:
        QConfigError: If a value is outside its domain.
    """

    observer: ObserverName = "mse"
    percentile: float = 99.99
    signed_scale: bool = True

    def __post_init__(self) -> None:
        one_of("observer", self.observer, _OBSERVERS)
        if not (is_number(self.percentile) and 50 < self.percentile <= 100):
            raise QConfigError(f"percentile must lie in (50, 100], got {self.percentile!r}. Write for example 99.99.")
        if type(self.percentile) not in (int, float):
            object.__setattr__(self, "percentile", float(self.percentile))
        object.__setattr__(self, "signed_scale", flag("signed_scale", self.signed_scale))


@dataclass(frozen=True)
class QuantSpec(RangeSearch, Grid):
    """How one tensor is quantized: its :class:`Grid`, and the :class:`RangeSearch` that chooses the grid's range.

    Args:
        bits: Bit width, 2 to 8.
        symmetric: True for a signed grid with zero point 0, False for an unsigned grid with an integer zero point.
        per_channel: True for one scale per output channel, False for one per tensor.
        group_size: Input values of an output channel that share a scale; None for all of them.
        observer: How the initial range is chosen: ``"minmax"``, ``"percentile"`` or ``"mse"``.
        percentile: Share of values, in percent, that ``"percentile"`` keeps inside the range.
        signed_scale: Whether the scale of a weight may be negative.

    Raises:
        QConfigError: If a value is outside its domain.

    Example:
        >>> QuantSpec(bits=4).quant_min, QuantSpec(bits=4).quant_max
        (-8, 7)
        >>> QuantSpec(bits=4, symmetric=False).quant_max
        15
        >>> QuantSpec.from_dict(QuantSpec(4, group_size=64).to_dict()).granularity
        Granularity(per_channel=False, group_size=64)
    """

    def __post_init__(self) -> None:
        # Called one by one: dataclasses do not chain this method.
        Grid.__post_init__(self)
        RangeSearch.__post_init__(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON-compatible types; an absent group size is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """Return the spec of :meth:`to_dict`; keys that are absent take their defaults."""
        return cls(**data)
