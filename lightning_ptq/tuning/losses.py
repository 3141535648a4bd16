"""The reconstruction loss: how far the output of a quantized unit is from that of the float unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ptq.activations.calls import float_leaves
from lightning_ptq.activations.unit_data import Group
from lightning_ptq.tuning.tuners import Tuner


def _relative_error(
    module: nn.Module, tuners: list[Tuner], group: Group, rows: Tensor | slice, power: list[float]
) -> Tensor:
    """Mean squared error of some rows over the targets' mean square, differentiable in the tuners' variables."""
    state = {name: tensor for tuner in tuners for name, tensor in tuner.tensors().items()}
    args, kwargs = group.arguments(rows)
    outputs = float_leaves(functional_call(module, state, args, kwargs))
    triples = zip(outputs, group.wanted(rows), power, strict=True)
    return torch.stack([(output - target).square().mean() / p for output, target, p in triples]).sum()


def _mean_power(parts: Sequence[list[tuple[float, int]]]) -> list[float]:
    """Mean square of each of the float unit's outputs over all parts."""
    columns = [list(zip(*column, strict=True)) for column in zip(*parts, strict=True)]
    return [max(sum(squares) / sum(counts), 1e-20) for squares, counts in columns]
