"""The gradient of a step that is computed in parts, here or on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_ptq.runtime.ranks import Ranks


class Gradient:
    """Adds the gradients of the parts of a step up, over all ranks.

    Part ``i`` is computed on rank ``i % world``, and all ranks add the parts up in their order: the result is the same
    bytes on any number of ranks. Of a step, one flattened vector a part crosses the network, once.

    Args:
        variables: What is optimised; their ``grad`` is what :meth:`reduce` leaves.
        ranks: The processes that share the steps.
        parts: How many a step has.
    """

    def __init__(self, variables: Sequence[Tensor], ranks: Ranks, parts: int) -> None:
        self.variables, self.ranks = list(variables), ranks
        self.sizes = [variable.numel() for variable in self.variables]
        owners = min(ranks.world, parts)
        dtype = reduce(torch.promote_types, (variable.dtype for variable in self.variables))
        size = sum(self.sizes) + 1  # the loss comes last
        self._flat = torch.zeros(owners, -(-parts // owners), size, dtype=dtype, device=self.variables[0].device)
        self._rows = [self._flat[part % owners, part // owners] for part in range(parts)]

    def add(self, part: int, loss: Tensor, shown: Tensor | None = None) -> None:
        """Add to a part's gradient.

        Args:
            part: Which.
            loss: Of the part, or of some of its samples, scalar; all of them add up to the loss of the step.
            shown: In place of ``loss``, what :meth:`reduce` adds up.
        """
        found = torch.autograd.grad(loss, self.variables, materialize_grads=True)
        row = self._rows[part]
        row[:-1] += torch.cat([gradient.flatten() for gradient in found])
        row[-1] += (loss if shown is None else shown).detach()

    def reduce(self) -> Tensor:
        """Sum over all parts, set every variable's ``grad``, and start afresh; returns the loss of the step."""
        self.ranks.share(list(self._flat))
        whole = reduce(torch.add, self._rows[1:], self._rows[0].clone())
        for variable, gradient in zip(self.variables, whole[:-1].split(self.sizes), strict=True):
            variable.grad = gradient.view_as(variable).to(variable.dtype)
        self._flat.zero_()
        return whole[-1]
