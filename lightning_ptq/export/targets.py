"""Targets: what an inference engine demands of a quantized network.

A target is applied before calibration, so that what is tuned and measured is what the engine will compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_ptq.arguments import one_of
from lightning_ptq.errors import QConfigError
from lightning_ptq.numerics.qconfig import LayerQConfig, Operations, QConfig

_DECIDED = ("symmetric_activations", "signed_scales", "operations")  # arguments that a target has values for

TargetName = Literal["onnxruntime", "openvino", "tensorrt"]
Auto = Literal["auto"]


@dataclass(frozen=True)
class Rule:
    """A demand of an engine.

    Attributes:
        demand: What it demands, or prefers.
        setting: What the library does about it.
        source: Where the engine's documentation says so.
    """

    demand: str
    setting: str
    source: str


@dataclass(frozen=True)
class Target:
    """An inference engine.

    Attributes:
        name: Name of the target.
        symmetric_activations: Whether activations have signed grids with zero point 0.
        signed_scales: Whether scales of weights may be negative.
        operations: Operations that are quantized unless the user says otherwise.
        activation_bits: Bit widths of activations that it computes with; empty for any.
        group_sizes: Whether it takes a scale per group of weights together with quantized activations.
        integer_bias: Whether biases are 32-bit integers.
        bounds_integers: Whether Relu and Clip before a quantizer become bounds of its integers.
        least_bits: Width of the narrowest type that it loads weights from; 8 where none is narrower.
        rules: The reasons.
    """

    name: str
    symmetric_activations: bool
    signed_scales: bool
    operations: Operations
    activation_bits: tuple[int, ...]
    group_sizes: bool
    integer_bias: bool
    bounds_integers: bool
    least_bits: int
    rules: tuple[Rule, ...]

    def settings(self, **given: Any) -> dict[str, Any]:
        """Return the arguments of :meth:`~lightning_ptq.QConfig.parse` for this target.

        Args:
            given: What the user has set, by argument; None where nothing was set.

        Raises:
            QConfigError: If the engine does not take one of the values.
        """
        wanted: dict[str, Any] = {name: getattr(self, name) for name in _DECIDED}
        if given.get("signed_scales") and not self.signed_scales:
            raise QConfigError(f"{self.name} takes positive scales only, got signed_scales=True. Leave it out.")
        symmetric = given.get("symmetric_activations")
        if symmetric is False and self.symmetric_activations:
            raise QConfigError(f"{self.name} takes no zero points, got symmetric_activations=False. Leave it out.")
        chosen = {name: value for name, value in given.items() if value is not None}
        return {**wanted, **chosen}

    def check(self, qconfig: QConfig, where: str = "", negative: bool = True) -> None:
        """Check how operations are quantized.

        Args:
            qconfig: The config of all operations, or of one.
            where: Name of the operation, for the message.
            negative: Whether scales are negative where the config lets them be.

        Raises:
            QConfigError: Naming what the engine does not take, and what to write instead.
        """
        pairs = (qconfig.default, *dict(qconfig.overrides).values())
        found = dict.fromkeys(text for pair in pairs for text in self._violations(pair, negative))
        if found:
            raise QConfigError(f"{where}: " * bool(where) + "; ".join(found) + ".")

    def _violations(self, pair: LayerQConfig, negative: bool) -> Iterator[str]:
        weight, activation = pair.weight, pair.activation
        if negative and not self.signed_scales and weight.signed_scale and weight.bits < 8:
            yield f"{self.name} takes positive scales only, those of {pair} may be negative: write signed_scales=False"
        if activation is None:
            return
        if self.symmetric_activations and not activation.symmetric:
            yield f"{self.name} takes no zero points of activations: write symmetric_activations=True"
        if self.activation_bits and activation.bits not in self.activation_bits:
            widths = " or ".join(map(str, self.activation_bits))
            yield f"{self.name} computes with activations of {widths} bits, got {pair}: write w{weight.bits}a8"
        if weight.group_size is not None and not self.group_sizes:
            yield f"{self.name} takes a scale per group of weights only where activations stay float, got {pair}"


_ORT = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
_OPENVINO = "https://docs.openvino.ai/2025/documentation/openvino-extensibility/openvino-plugin-library/advanced-guides"
_LPT = f"{_OPENVINO}/low-precision-transformations.html"
_ONNX_READER = "https://github.com/openvinotoolkit/openvino/blob/master/src/frontends/onnx/frontend/src/core/tensor.hpp"
_TENSORRT = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library"

TARGETS: dict[str, Target] = {
    "onnxruntime": Target(
        "onnxruntime", symmetric_activations=False, signed_scales=True, operations="all", activation_bits=(),
        group_sizes=True, integer_bias=True, bounds_integers=True, least_bits=2,
        rules=(
            Rule(
                "On CPUs, unsigned activations and signed weights (U8S8) are the fastest.",
                "Activations have unsigned grids with a zero point; weights are symmetric, with a scale per channel.",
                f"{_ORT}#data-type-selection",
            ),
            Rule(
                "On x86 CPUs without VNNI, the kernels of U8S8 saturate unless session.x64quantprecision is 1.",
                "Weights with a scale per channel have explicit zero points, without which this option fails.",
                f"{_ORT}#when-and-why-do-i-need-to-try-u8u8",
            ),
            Rule(
                "Integer kernels compute between operators whose inputs and outputs are all quantized.",
                "Sums, products and concatenations are quantized too.",
                f"{_ORT}#onnx-quantization-representation-format",
            ),
            Rule(
                "A tensor has one pair of QuantizeLinear and DequantizeLinear.",
                "All readers of a tensor share scale and zero point.",
                f"{_ORT}#onnx-quantization-representation-format",
            ),
            Rule(
                "The bias of a convolution is added to the accumulator: 32-bit integers whose scale is the product of"
                " the scales of input and weight.",
                "The exported bias has this type and scale.",
                "https://onnx.ai/onnx/operators/onnx__QLinearConv.html",
            ),
        ),
    ),
    "openvino": Target(
        "openvino", symmetric_activations=False, signed_scales=True, operations="all", activation_bits=(),
        group_sizes=True, integer_bias=False, bounds_integers=False, least_bits=4,
        rules=(
            Rule(
                "Activations are unsigned or signed 8-bit integers, weights signed ones.",
                "Activations have unsigned grids with a zero point; weights are symmetric, with a scale per channel.",
                _LPT,
            ),
            Rule(
                "Dequantization moves behind sums, concatenations and pooling, if all their inputs are quantized.",
                "Sums, products and concatenations are quantized too; a concatenation has one scale.",
                _LPT,
            ),
            Rule(
                "A bias stays float: it follows the dequantization.",
                "The exported bias is float.",
                _LPT,
            ),
            Rule(
                "Models of ONNX are read with integers of 4 bits, and with none of 2 bits.",
                "Weights of 2 bits are stored in 4 bits.",
                _ONNX_READER,
            ),
        ),
    ),
    "tensorrt": Target(
        "tensorrt", symmetric_activations=True, signed_scales=False, operations="all", activation_bits=(8,),
        group_sizes=False, integer_bias=False, bounds_integers=False, least_bits=8,
        rules=(
            Rule(
                "Quantization is symmetric: signed integers without zero points, positive scales.",
                "Activations have signed grids; scales of weights are positive.",
                f"{_TENSORRT}/work-quantized-types.html",
            ),
            Rule(
                "Activations have 8 bits; 4-bit weights are for layers whose activations stay float.",
                "Activations of another width are an error. Weights below 8 bits are stored in 8 bits.",
                f"{_TENSORRT}/work-quantized-types.html",
            ),
            Rule(
                "The input of a residual addition is to be quantized, so that it is fused into the convolution.",
                "Sums are quantized too.",
                f"{_TENSORRT}/quantized-types-explicit-quantization.html",
            ),
            Rule(
                "Biases are in the type of the accumulated result.",
                "The exported bias is float.",
                f"{_TENSORRT}/quantized-types-explicit-quantization.html",
            ),
        ),
    ),
}  # fmt: skip
"""The targets by name."""


def target_named(name: str | None) -> Target | None:
    """Return a target, or None for no target.

    Raises:
        QConfigError: If there is none of this name.
    """
    if name is None:
        return None
    found: Target = TARGETS[one_of("target", name, list(TARGETS))]
    return found


def configured(qconfig: Any, target: str | None, **given: Any) -> QConfig:
    """Return the config of a run for a target.

    Args:
        qconfig: What :meth:`~lightning_ptq.QConfig.parse` takes.
        target: Name of the target; None for none.
        given: Further arguments of :meth:`~lightning_ptq.QConfig.parse`; those that a target decides on are None where
            the user has set nothing, and ``first_last_bits`` is ``"auto"`` then.

    Raises:
        QConfigError: If an argument cannot be parsed, or the engine does not take it.
    """
    engine = target_named(target)
    if given.get("first_last_bits") == "auto":
        given["first_last_bits"] = 8
    settings = {name: value for name, value in given.items() if value is not None or name not in _DECIDED}
    if engine is not None:
        settings.update(engine.settings(**settings))
    config = QConfig.parse(qconfig, **settings)
    if engine is not None:
        # Also where the config was given whole.
        config = replace(config, shared_scales=True, integer_biases=engine.integer_bias)
        engine.check(config)
    return config
