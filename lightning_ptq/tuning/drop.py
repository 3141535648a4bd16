"""Activations that keep their float value in a step of tuning."""

from __future__ import annotations

import torch
from torch import Tensor


class ActivationDrop:
    """Activations that keep their float value in a step of tuning, drawn at random (QDrop, Wei et al., 2022).

    Args:
        generator: Source of the random numbers.

    Attributes:
        probability: Probability that a value is dropped.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.probability = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` with some of its values replaced by those of ``x``."""
        if not self.probability:
            return y
        # Random bytes cost an eighth of random floats, and every tuning step draws them.
        words = torch.randint(
            -(2**63), 2**63 - 1, (x.numel() // 8 + 1,), generator=self.generator, dtype=torch.int64, device=x.device
        )
        dropped = words.view(torch.uint8)[: x.numel()].view(x.shape) < round(self.probability * 256)
        return torch.lerp(y, x, dropped.to(x.dtype))  # several times faster than torch.where, backwards too
