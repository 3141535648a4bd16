"""What is quantized, and how: :class:`QuantSpec` for one tensor, :class:`QConfig` for a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning_ptq.errors import QConfigError

ObserverName = Literal["minmax", "percentile", "mse"]
_OBSERVERS = ("minmax", "percentile", "mse")
_CANDIDATE = re.compile(r"w(\d+)(?:a(\d+))?")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Args:
        bits: Width of the integer grid, 2 to 8.
        symmetric: True for a signed grid with zero point 0, False for an unsigned grid with an integer zero point.
        per_channel: True for one scale per output channel, False for one per tensor.
        observer: How the initial range is chosen: ``"minmax"``, ``"percentile"`` or ``"mse"`` (the range with the
            least squared quantization error).
        percentile: The share of values, in percent, that ``"percentile"`` keeps inside the range.
        signed_scale: Whether the scale of a weight may be negative: a symmetric grid has one level more below 0 than
            above, and a negative scale puts it above (:func:`~lightning_ptq.numerics.weight_scales.weight_qparams`).

    Raises:
        QConfigError: If a value is out of its domain.

    Example:
        >>> QuantSpec(bits=4).quant_min, QuantSpec(bits=4).quant_max
        (-8, 7)
        >>> QuantSpec(bits=4, symmetric=False).quant_max
        15
    """

    bits: int
    symmetric: bool = True
    per_channel: bool = False
    observer: ObserverName = "mse"
    percentile: float = 99.99
    signed_scale: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise QConfigError(f"bits must be a whole number from 2 to 8, got {self.bits!r}. Write for example 'w4a8'.")
        if self.observer not in _OBSERVERS:
            raise QConfigError(f"observer must be one of {_OBSERVERS}, got {self.observer!r}.")
        if not 50 < self.percentile <= 100:
            raise QConfigError(f"percentile must lie in (50, 100], got {self.percentile!r}. Write for example 99.99.")

    @property
    def quant_min(self) -> int:
        """The least integer of the grid."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """The greatest integer of the grid."""
        return self.quant_min + (1 << self.bits) - 1


@dataclass(frozen=True)
class LayerQConfig:
    """The pair of specs of one layer; ``activation`` is None where only the weight is quantized.

    Example:
        >>> str(LayerQConfig.parse("w4a8")), str(LayerQConfig.parse("w4"))
        ('w4a8', 'w4')
    """

    weight: QuantSpec
    activation: QuantSpec | None

    @classmethod
    def parse(cls, text: str) -> LayerQConfig:
        """Read a candidate such as ``"w4a8"``: per-channel symmetric weights, per-tensor affine activations.

        Raises:
            QConfigError: If the text is no candidate or a width lies outside 2-8.
        """
        match = _CANDIDATE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise QConfigError(
                f"cannot read {text!r} as bit widths. Write 'w' and the weight bits, then 'a' and the activation bits"
                " (leave the 'a' part out to quantize weights only), for example 'w8a8', 'w4a8' or 'w4'."
            )
        weight = QuantSpec(int(match[1]), symmetric=True, per_channel=True)
        return cls(weight, QuantSpec(int(match[2]), symmetric=False) if match[2] else None)

    def at_least(self, bits: int) -> LayerQConfig:
        """The same pair with both widths raised to ``bits`` where they are lower."""
        weight = replace(self.weight, bits=max(bits, self.weight.bits))
        activation = self.activation and replace(self.activation, bits=max(bits, self.activation.bits))
        return LayerQConfig(weight, activation)

    def with_bits_of(self, other: LayerQConfig) -> LayerQConfig:
        """This pair's observers and symmetry, at the widths of ``other``."""
        activation = self.activation or other.activation
        if other.activation is None or activation is None:
            return LayerQConfig(replace(self.weight, bits=other.weight.bits), None)
        return LayerQConfig(
            replace(self.weight, bits=other.weight.bits), replace(activation, bits=other.activation.bits)
        )

    def __str__(self) -> str:
        return f"w{self.weight.bits}" + (f"a{self.activation.bits}" if self.activation else "")


@dataclass(frozen=True)
class QConfig:
    """What is quantized in a model, and how.

    Args:
        default: The pair of specs for every layer that nothing else speaks of.
        overrides: Pairs of a layer-name pattern (as in :mod:`fnmatch`, ``*`` crosses dots) and what holds for the
            layers it matches; the last match wins.
        exclude: Patterns of layers that stay float.
        first_last_bits: Least width, for weights and activations, of the first and the last layer in execution order;
            None to treat them as all others. An override that names such a layer wins.

    Example:
        >>> config = QConfig.parse("w4a4", overrides={"head.*": "w8a8"}, exclude=["*.gate"])
        >>> str(config.for_layer("head.0")), str(config.for_layer("stem", edge=True)), config.for_layer("a.gate")
        ('w8a8', 'w8a8', None)
        >>> QConfig.from_dict(config.to_dict()) == config
        True
    """

    default: LayerQConfig
    overrides: tuple[tuple[str, LayerQConfig], ...] = ()
    exclude: tuple[str, ...] = ()
    first_last_bits: int | None = 8

    def __post_init__(self) -> None:
        if self.first_last_bits is not None:
            QuantSpec(self.first_last_bits)

    @classmethod
    def parse(
        cls,
        text: str | QConfig | Mapping[str, Any],
        *,
        overrides: Mapping[str, str] | None = None,
        exclude: Iterable[str] = (),
        first_last_bits: int | None = 8,
        symmetric_activations: bool = False,
        weight_observer: ObserverName = "mse",
        activation_observer: ObserverName = "mse",
        percentile: float = 99.99,
        signed_scales: bool = True,
    ) -> QConfig:
        """Build a config from plain types; a :class:`QConfig` or its dictionary passes through.

        Raises:
            QConfigError: If something does not parse.
        """
        if isinstance(text, QConfig):
            return text
        if isinstance(text, Mapping):
            return cls.from_dict(text)
        if isinstance(exclude, str):
            raise QConfigError(f"exclude must be a list of patterns, got the text {exclude!r}. Write [{exclude!r}].")

        def layer(candidate: str) -> LayerQConfig:
            pair = LayerQConfig.parse(candidate)
            weight = replace(pair.weight, observer=weight_observer, percentile=percentile, signed_scale=signed_scales)
            activation = pair.activation and replace(
                pair.activation, symmetric=symmetric_activations, observer=activation_observer, percentile=percentile
            )
            return LayerQConfig(weight, activation)

        pairs = tuple((pattern, layer(candidate)) for pattern, candidate in (overrides or {}).items())
        return cls(layer(text), pairs, tuple(exclude), first_last_bits)

    def for_layer(self, name: str, edge: bool = False) -> LayerQConfig | None:
        """The pair of specs of the layer called ``name``, or None where it stays float.

        Args:
            name: Qualified name of the layer.
            edge: True for the first and the last layer in execution order.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return None
        for pattern, pair in reversed(self.overrides):
            if fnmatchcase(name, pattern):
                return pair
        if edge and self.first_last_bits is not None:
            return self.default.at_least(self.first_last_bits)
        return self.default

    def check_patterns(self, names: Iterable[str]) -> None:
        """Check that every pattern matches at least one of the layer names.

        Raises:
            QConfigError: Naming the patterns that match nothing, and some of the names there are.
        """
        check_patterns([*dict(self.overrides), *self.exclude], names, "QConfig")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain, JSON-able types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            QConfigError: If a key is missing or unknown.
        """
        try:
            unknown = data.keys() - cls.__dataclass_fields__.keys()
            if unknown:
                raise KeyError(f"unknown: {sorted(unknown)}")
            default, overrides = _layer_from_dict(data["default"]), data.get("overrides", ())
            return cls(
                default,
                tuple((pattern, _layer_from_dict(pair)) for pattern, pair in overrides),
                tuple(data.get("exclude", ())),
                data.get("first_last_bits", 8),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise QConfigError(
                f"cannot read {dict(data)!r} as a QConfig ({error}). Write what QConfig.to_dict() returns,"
                " or a text such as 'w4a8'."
            ) from error


def _layer_from_dict(data: Mapping[str, Any]) -> LayerQConfig:
    activation = data["activation"]
    return LayerQConfig(QuantSpec(**data["weight"]), None if activation is None else QuantSpec(**activation))


def check_patterns(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raise :class:`QConfigError` for the patterns that match none of ``names``."""
    known = list(names)
    lost = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]
    if lost:
        shown = ", ".join(known[:8]) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
        raise QConfigError(
            f"{where}: no layer matches {', '.join(map(repr, lost))}. Patterns are matched against whole qualified"
            f" names, '*' stands for any text. The names here: {shown}."
        )
