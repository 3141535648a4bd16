"""The gradient of a step that is computed in parts, here or on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ptq.ranks import Ranks


class Gradient:
    """Adds the gradients of the parts of a step up, over all ranks.

    Parts are summed in float64, in which the sum of a few float32 values is exact: the result is the same bytes
    whichever rank had which part. Of a step, one flattened vector crosses the network.

    Args:
        variables: What is optimised; their ``grad`` is what :meth:`reduce` leaves.
        ranks: The processes that share the steps.
    """

    def __init__(self, variables: Sequence[Tensor], ranks: Ranks) -> None:
        self.variables, self.ranks = list(variables), ranks
        self.sizes = [variable.numel() for variable in self.variables]
        self.flat = torch.zeros(sum(self.sizes) + 1, dtype=torch.float64, device=self.variables[0].device)

    def add(self, loss: Tensor, shown: Tensor | None = None) -> None:
        """Add a part's gradient.

        Args:
            loss: Of the part, scalar; the losses of all parts add up to that of the step.
            shown: In place of ``loss``, what :meth:`reduce` adds up.
        """
        found = torch.autograd.grad(loss, self.variables, materialize_grads=True)
        self.flat[:-1] += torch.cat([gradient.flatten() for gradient in found])
        self.flat[-1] += (loss if shown is None else shown).detach()

    def reduce(self) -> Tensor:
        """Sum over ranks, set every variable's ``grad``, and start afresh; returns the loss of the step."""
        self.ranks.sum_(self.flat)
        whole = self.flat[:-1].to(self.variables[0].dtype)  # at once: on a GPU each conversion is a launch
        for variable, gradient in zip(self.variables, whole.split(self.sizes), strict=True):
            variable.grad = gradient.view_as(variable).to(variable.dtype)
        loss = self.flat[-1].clone()
        self.flat.zero_()
        return loss
