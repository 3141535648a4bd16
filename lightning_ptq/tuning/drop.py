"""Activations that keep their float value in a step of tuning."""

from __future__ import annotations

import torch
from torch import Tensor


class ActivationDrop:
    """Activations that keep their float value in a step of tuning, drawn at random (QDrop, Wei et al., 2022).

    Args:
        generator: Source of the random numbers.

    The probability lies in a tensor, so that the work of a step can be repeated as it is with another one.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._threshold = torch.zeros((), dtype=torch.uint8, device=generator.device)  # in 256ths

    @property
    def probability(self) -> float:
        """Probability that a value is dropped, a multiple of 1/256 below 1."""
        return self._threshold.item() / 256

    @probability.setter
    def probability(self, value: float) -> None:
        self._threshold.fill_(min(255, round(value * 256)))

    def __call__(self, x: Tensor) -> Tensor:
        """Return 1 where ``x`` is quantized, and 0 where it keeps its float value, as floats of its shape."""
        # Random bytes cost an eighth of random floats, and every tuning step draws them.
        words = torch.randint(
            -(2**63), 2**63 - 1, (x.numel() // 8 + 1,), generator=self.generator, dtype=torch.int64, device=x.device
        )
        return (words.view(torch.uint8)[: x.numel()].view(x.shape) >= self._threshold).to(torch.float32)
