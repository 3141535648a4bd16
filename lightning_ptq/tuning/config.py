"""The options of AdaQuant, and the defaults that depend on bit widths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lightning_ptq.arguments import flag, number, one_of, texts, whole
from lightning_ptq.errors import QConfigError
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.tuning.losses import LOSSES

Rounding = Literal["continuous", "adaround"]


LEARNABLE = ("weight", "bias", "weight_scale", "activation_scale", "activation_zero_point")


DEFAULT_STEPS = {2: 200, 3: 200, 4: 100, 5: 60, 6: 60, 7: 40, 8: 40}
"""Steps by bit width, for 1024 samples or more. A coarser grid leaves more to gain, and takes longer to tune."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """How a unit is tuned. Each field is an option of :class:`~lightning_ptq.AdaQuantLayerwise`.

    Args:
        steps: Optimization steps per unit; None to choose them by the least bit width in the unit and, below 4 bits,
            the number of samples (:meth:`steps_for`).
        batch_size: Samples per step.
        learn: What is tuned: any of ``"weight"``, ``"bias"``, ``"weight_scale"``, ``"activation_scale"``,
            ``"activation_zero_point"``.
        weight_lr: Adam's rate for weights, in steps of the layer's weight grid; for AdaRound, in its rounding variable.
        bias_lr: Rate for biases, relative to their mean magnitude in the layer.
        scale_lr: Rate for weight and activation scales, relative to the scale.
        zero_point_lr: Rate for activation zero points, in grid steps.
        rounding: ``"continuous"``: a weight may move any number of grid steps (AdaQuant); ``"adaround"``: up or down
            only, with a penalty that drives it to either (Nagel et al., 2020).
        drop: Probability that an activation keeps its float value in the first step (QDrop, Wei et al., 2022). It
            falls to 0 linearly, so that the last steps see the activations that the quantized unit will see.
        held_out: Share of the samples that decide whether the tuned state is kept, and that tuning does not see.
        parts: Number of shards that the calibration batches are split into. Each step takes samples of all shards, and
            each shard is captured, held and computed by one rank. The result is the same on any number of ranks; at
            most this many share a step.
        tolerance: A unit whose initial held-out error is below this is not tuned; None for 2e-3 where all bit widths
            are 8, where there is mostly nothing to gain, and 0 below.
        closed_form: Whether tuning starts from weights and biases of convolutions that are solved for their inputs and
            outputs (:mod:`~lightning_ptq.tuning.closed_form`), and from biases of other layers with corrected means
            (:mod:`~lightning_ptq.tuning.means`).
        cuda_graphs: Whether steps on a GPU are repeated as CUDA graphs, where the unit allows it.
        loss: Name of a :class:`~lightning_ptq.tuning.losses.ReconstructionLoss`.

    Raises:
        QConfigError: If a value is outside its domain.
    """

    steps: int | None = None
    batch_size: int = 32
    learn: tuple[str, ...] = ("weight", "bias", "weight_scale", "activation_scale")
    weight_lr: float = 0.025
    bias_lr: float = 0.01
    scale_lr: float = 0.01
    zero_point_lr: float = 0.05
    rounding: Rounding = "continuous"
    drop: float = 0.5
    held_out: float = 0.0625
    parts: int = 2
    tolerance: float | None = None
    closed_form: bool = True
    cuda_graphs: bool = True
    loss: str = "squared_error"

    def __post_init__(self) -> None:
        # YAML gives a list or null; a tuple keeps the config hashable.
        learn = type(self).learn if self.learn is None else tuple(texts("learn", self.learn, "weight"))
        unknown = [name for name in learn if name not in LEARNABLE]
        if unknown:
            raise QConfigError(f"learn holds {unknown}, which cannot be learned. Choose from {list(LEARNABLE)}.")
        one_of("rounding", self.rounding, ("continuous", "adaround"))
        one_of("loss", self.loss, sorted(LOSSES))
        values: dict[str, Any] = {"learn": learn}
        values |= {name: flag(name, getattr(self, name)) for name in ("closed_form", "cuda_graphs")}
        for name in ("steps", "batch_size", "parts"):
            if (name, getattr(self, name)) != ("steps", None):
                values[name] = whole(name, getattr(self, name))
        for name in ("weight_lr", "bias_lr", "scale_lr", "zero_point_lr"):
            values[name] = number(name, getattr(self, name), "be 0 or more")
        if self.tolerance is not None:
            values["tolerance"] = number("tolerance", self.tolerance, "be 0 or more", example="1e-3")
        for name in ("drop", "held_out"):
            values[name] = number(name, getattr(self, name), "lie in [0, 1)", (0, 1), "0.25")
        for name, value in values.items():  # in Python's own types
            object.__setattr__(self, name, value)

    def steps_for(self, qconfigs: Iterable[LayerQConfig], samples: int) -> int:
        """Return the steps for a unit whose layers have these specs.

        Below 4 bits, tuning overfits few samples sooner, so a quarter of 1024 samples gets half of the table's steps.

        Args:
            qconfigs: Specs of the unit's layers.
            samples: Number of calibration samples.
        """
        if self.steps is not None:
            return self.steps
        bits = least_bits(qconfigs)
        share = math.sqrt(min(1.0, samples / 1024)) if bits < 4 else 1.0
        return max(1, round(DEFAULT_STEPS[bits] * share))

    def tolerance_for(self, qconfigs: Iterable[LayerQConfig]) -> float:
        """Return the tolerance for a unit whose layers have these specs."""
        if self.tolerance is not None:
            return self.tolerance
        return 2e-3 if least_bits(qconfigs) == 8 else 0.0


def least_bits(qconfigs: Iterable[LayerQConfig]) -> int:
    """Return the least bit width of weights and activations; float activations do not count."""
    return min(spec.bits for pair in qconfigs for spec in (pair.weight, pair.activation) if spec is not None)
