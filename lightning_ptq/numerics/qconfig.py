"""What is quantized, and how: :class:`LayerQConfig` for a layer, :class:`QConfig` for a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from lightning_ptq.arguments import flag, one_of, text_table, texts, whole
from lightning_ptq.errors import QConfigError
from lightning_ptq.numerics.spec import ObserverName, QuantSpec

Operations = Literal["layers", "products", "all"]
"""Which operations are quantized; see :class:`QConfig`."""


def includes(operations: Operations, kind: Operations) -> bool:
    """Return True if ``operations`` includes what ``kind`` adds to the values before it."""
    levels = get_args(Operations)
    return levels.index(kind) <= levels.index(operations)


# Digits of ASCII, and no zero in front: one text for one candidate.
_CANDIDATE = re.compile(r"w(0|[1-9][0-9]{0,8})(?:g(0|[1-9][0-9]{0,8}))?(?:a(0|[1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class LayerQConfig:
    """The specs of one layer.

    Args:
        weight: Spec of the layer's weights.
        activation: Spec of its inputs; None where only weights are quantized.

    Raises:
        QConfigError: If the activation has a group size, or an argument is no spec.

    Example:
        >>> [str(LayerQConfig.parse(text)) for text in ("w4a8", "w4", "w4g64a8")]
        ['w4a8', 'w4', 'w4g64a8']
    """

    weight: QuantSpec
    activation: QuantSpec | None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, QuantSpec) or not isinstance(self.activation, QuantSpec | None):
            raise QConfigError(
                f"weight and activation must be QuantSpecs (activation may be None), got {self.weight!r} and"
                f" {self.activation!r}. Write for example LayerQConfig.parse('w4a8')."
            )
        if self.activation is not None and self.activation.group_size is not None:
            raise QConfigError(
                f"activations have one scale per tensor, got group_size={self.activation.group_size}. Leave group_size"
                " out of the activation's spec; it is for weights."
            )

    @classmethod
    def parse(cls, text: str) -> LayerQConfig:
        """Parse a candidate such as ``"w4a8"`` or, with a group size, ``"w4g64a8"``.

        Weights are symmetric with a scale per channel, or per group; activations are affine with a scale per tensor.

        Raises:
            QConfigError: If the text is not a candidate, or a bit width lies outside 2 to 8.
        """
        match = _CANDIDATE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise QConfigError(
                f"cannot read {text!r} as bit widths. Write 'w' and the weight bits, then 'a' and the activation bits"
                " (leave the 'a' part out to quantize weights only), for example 'w8a8', 'w4a8' or 'w4'. A group size"
                " for the weights stands after their bits: 'w4g64a8'."
            )
        group_size = int(match[2]) if match[2] else None
        weight = QuantSpec(int(match[1]), symmetric=True, per_channel=True, group_size=group_size)
        return cls(weight, QuantSpec(int(match[3]), symmetric=False) if match[3] else None)

    def at_least(self, bits: int) -> LayerQConfig:
        """Return the same specs with both bit widths raised to ``bits`` where they are lower."""
        weight = replace(self.weight, bits=max(bits, self.weight.bits))
        activation = self.activation and replace(self.activation, bits=max(bits, self.activation.bits))
        return LayerQConfig(weight, activation)

    def with_bits_of(self, other: LayerQConfig) -> LayerQConfig:
        """Return these specs with the bit widths, and the group size, of ``other``."""
        # A candidate names bits and group size; observers and symmetry are those of the config.
        weight = replace(self.weight, bits=other.weight.bits, group_size=other.weight.group_size)
        activation = self.activation or other.activation
        if other.activation is None or activation is None:
            return LayerQConfig(weight, None)
        return LayerQConfig(weight, replace(activation, bits=other.activation.bits))

    def to_dict(self) -> dict[str, Any]:
        """Return the specs as JSON-compatible types."""
        return {"weight": self.weight.to_dict(), "activation": self.activation and self.activation.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerQConfig:
        """Return the specs of :meth:`to_dict`."""
        activation = data["activation"]
        return cls(QuantSpec.from_dict(data["weight"]), activation and QuantSpec.from_dict(activation))

    def __str__(self) -> str:
        group = f"g{self.weight.group_size}" if self.weight.group_size else ""
        return f"w{self.weight.bits}{group}" + (f"a{self.activation.bits}" if self.activation else "")


_SWITCHES = ("shared_scales", "integer_biases", "equalization")


@dataclass(frozen=True)
class QConfig:
    """What is quantized in a model, and how.

    Args:
        default: Specs of every layer that no other argument names.
        overrides: Pairs of a layer-name pattern (as in :mod:`fnmatch`; ``*`` crosses dots) and the specs of the layers
            that it matches. The last match wins.
        exclude: Patterns of layers that stay float.
        first_last_bits: Least bit width, for weights and activations, of the first and last layers; None to treat them
            like all others. An override that names such a layer wins.
        operations: ``"layers"``: layers that multiply by weights. ``"products"``: also embeddings, and products that a
            forward computes by functions, as in attention. ``"all"``: also sums, products of elements, concatenations.
        shared_scales: True if inputs that are the same tensor keep one scale when scales are learned, as kernels need.
        integer_biases: True if biases are multiples of the scale of input times that of weight, as integer kernels add.
        equalization: True to scale channels between layers so that each fills more of the activation's grid.

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
    operations: Operations = "products"
    shared_scales: bool = False
    integer_biases: bool = False
    equalization: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.default, LayerQConfig):
            raise QConfigError(f"default must be a LayerQConfig, got {self.default!r}. Write QConfig.parse('w4a8').")
        try:
            overrides = tuple((pattern, pair) for pattern, pair in self.overrides)
        except (TypeError, ValueError):
            overrides = (("", None),)  # type: ignore[assignment]
        if not all(isinstance(pattern, str) and isinstance(pair, LayerQConfig) for pattern, pair in overrides):
            raise QConfigError(
                f"overrides must be pairs of a pattern and a LayerQConfig, got {self.overrides!r}. Write"
                " QConfig.parse('w4a8', overrides={'head': 'w8a8'})."
            )
        object.__setattr__(self, "overrides", overrides)
        object.__setattr__(self, "exclude", tuple(texts("exclude", self.exclude)))
        if self.first_last_bits is not None:
            object.__setattr__(self, "first_last_bits", whole("first_last_bits", self.first_last_bits, 2, 8))
        one_of("operations", self.operations, ("layers", "products", "all"))
        for name in _SWITCHES:
            object.__setattr__(self, name, flag(name, getattr(self, name)))

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
        operations: Operations = "products",
        shared_scales: bool = False,
        integer_biases: bool = False,
        equalization: bool = True,
    ) -> QConfig:
        """Build a config from plain types; a :class:`QConfig` or its dictionary passes through.

        Raises:
            QConfigError: If an argument cannot be parsed.
        """
        if isinstance(text, QConfig):
            return text
        if isinstance(text, Mapping):
            return cls.from_dict(text)
        symmetric, signed = flag("symmetric_activations", symmetric_activations), flag("signed_scales", signed_scales)

        def layer(candidate: str) -> LayerQConfig:
            pair = LayerQConfig.parse(candidate)
            weight = replace(pair.weight, observer=weight_observer, percentile=percentile, signed_scale=signed)
            activation = pair.activation and replace(
                pair.activation, symmetric=symmetric, observer=activation_observer, percentile=percentile
            )
            return LayerQConfig(weight, activation)

        given = text_table("overrides", {} if overrides is None else overrides, "{'head': 'w8a8'}")
        pairs = tuple((pattern, layer(candidate)) for pattern, candidate in given.items())
        kernels = {"shared_scales": shared_scales, "integer_biases": integer_biases, "equalization": equalization}
        return cls(layer(text), pairs, tuple(texts("exclude", exclude)), first_last_bits, operations, **kernels)

    def for_layer(self, name: str, edge: bool = False) -> LayerQConfig | None:
        """Return the specs of the layer called ``name``, or None where it stays float.

        Args:
            name: Qualified name of the layer.
            edge: True for the first and the last layer in execution order.
        """
        if any(matches(name, pattern) for pattern in self.exclude):
            return None
        for pattern, pair in reversed(self.overrides):  # the last match wins
            if matches(name, pattern):
                return pair
        if edge and self.first_last_bits is not None:
            return self.default.at_least(self.first_last_bits)
        return self.default

    @property
    def patterns(self) -> list[str]:
        """All patterns of layer names."""
        return [*dict(self.overrides), *self.exclude]

    def check_patterns(self, names: Iterable[str]) -> None:
        """Check that every pattern matches at least one of the layer names.

        Raises:
            QConfigError: Naming the patterns that match nothing, and some of the names there are.
        """
        check_patterns(self.patterns, names, "QConfig")

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-compatible types."""
        return {
            "default": self.default.to_dict(),
            "overrides": [(pattern, pair.to_dict()) for pattern, pair in self.overrides],
            "exclude": list(self.exclude),
            "first_last_bits": self.first_last_bits,
            "operations": self.operations,
            **{name: getattr(self, name) for name in _SWITCHES},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """Return the config of :meth:`to_dict`.

        Raises:
            QConfigError: If a key is missing or unknown.
        """
        try:
            unknown = data.keys() - cls.__dataclass_fields__.keys()
            if unknown:
                raise KeyError(f"unknown: {sorted(unknown)}")
            overrides = tuple((pattern, LayerQConfig.from_dict(pair)) for pattern, pair in data.get("overrides", ()))
            default, exclude = LayerQConfig.from_dict(data["default"]), tuple(texts("exclude", data.get("exclude", ())))
            kernels = {name: data.get(name, getattr(cls, name)) for name in _SWITCHES}
            operations = data.get("operations", "layers")
            return cls(default, overrides, exclude, data.get("first_last_bits", 8), operations, **kernels)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise QConfigError(
                f"cannot read {dict(data)!r} as a QConfig ({error}). Write what QConfig.to_dict() returns,"
                " or a text such as 'w4a8'."
            ) from error


def parse_candidates(candidates: Any) -> list[LayerQConfig]:
    """Return the specs of candidates.

    Args:
        candidates: Bit widths, such as ``["w8a8", "w4a4"]``.

    Raises:
        QConfigError: If there are none, they are no list of texts, or one cannot be read.
    """
    if isinstance(candidates, (str, Mapping)) or not isinstance(candidates, Iterable) or not list(candidates):
        raise QConfigError(f"candidates must be a list of bit widths, got {candidates!r}. Write ['w8a8', 'w4a4'].")
    return [LayerQConfig.parse(candidate) for candidate in candidates]


def matches(name: str, pattern: str) -> bool:
    """Return True if a pattern matches a qualified name, with or without what ``torch.compile`` inserts into it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.replace("_orig_mod.", ""), pattern)


def check_patterns(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raise :class:`QConfigError` for the patterns that match none of ``names``."""
    known = list(names)
    unmatched = [pattern for pattern in patterns if not any(matches(name, pattern) for name in known)]
    if unmatched:
        shown = ", ".join(known[:8]) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
        raise QConfigError(
            f"{where}: no layer matches {', '.join(map(repr, unmatched))}. Patterns are matched against whole qualified"
            f" names, '*' stands for any text. The names here: {shown}."
        )
