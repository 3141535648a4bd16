"""The gradient of a step that is computed in shards, on one rank or on several, and errors of backward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from lightning_ptq.errors import PTQError, SensitivityError
from lightning_ptq.runtime.ranks import Ranks


class Gradient:
    """Sums the gradients of a step's shards over all ranks.

    Shard ``i`` is computed on rank ``i % world``, and all ranks add the shards in the same order, so the sum has the
    same bytes on any number of ranks. One flattened vector per shard crosses the network in each step.

    Args:
        variables: Tensors to optimize; their ``grad`` becomes what :meth:`reduce` writes to.
        ranks: Processes that share the steps.
        shards: Number of shards of a step.
    """

    def __init__(self, variables: Sequence[Tensor], ranks: Ranks, shards: int) -> None:
        self.variables, self.ranks = list(variables), ranks
        self.sizes = [variable.numel() for variable in self.variables]
        owners = min(ranks.world, shards)
        dtype = reduce(torch.promote_types, (variable.dtype for variable in self.variables))
        size = sum(self.sizes) + 1  # the last entry is the loss
        # Rank r owns shards r, r + owners, ...: its rows lie side by side, so that one broadcast sends them all.
        self._flat = torch.zeros(owners, -(-shards // owners), size, dtype=dtype, device=self.variables[0].device)
        self._rows = [self._flat[shard % owners, shard // owners] for shard in range(shards)]
        self._total = torch.zeros_like(self._rows[0])
        for variable, part in zip(self.variables, self._total[:-1].split(self.sizes), strict=True):
            variable.grad = part.view_as(variable).to(variable.dtype)

    def add(self, shard: int, loss: Tensor, reported: Tensor | None = None) -> None:
        """Add to the gradient of a shard.

        Args:
            shard: Index of the shard.
            loss: Scalar loss of the shard or of some of its samples; all of them add up to the loss of the step.
            reported: Scalar that :meth:`reduce` adds up in place of ``loss``.
        """
        gradients = torch.autograd.grad(loss, self.variables, materialize_grads=True)
        row = self._rows[shard]
        row[:-1] += torch.cat([gradient.flatten() for gradient in gradients])
        row[-1] += (loss if reported is None else reported).detach()

    def of_shard(self, shard: int) -> Tensor:
        """Return the sums of a shard so far, (variables + 1,), whose last entry is the loss; the same tensor always."""
        return self._rows[shard]

    def exchange(self) -> None:
        """Send the sums of the shards to all ranks."""
        self.ranks.broadcast_each(list(self._flat))

    def reduce(self) -> Tensor:
        """Sum over all shards into every variable's ``grad``, reset the sums, and return the loss of the step.

        All tensors keep their places from step to step, also the loss.
        """
        self._total.copy_(self._rows[0])
        for row in self._rows[1:]:
            self._total.add_(row)
        for variable, gradient in zip(self.variables, self._total[:-1].split(self.sizes), strict=True):
            if variable.grad is not None and variable.dtype != self._total.dtype:  # else it is a view of the total
                variable.grad.copy_(gradient.view_as(variable))
        self._flat.zero_()
        return self._total[-1]


@contextmanager
def gradient_errors(remedy: str) -> Iterator[None]:
    """Raise what a user's module raises inside the ``with`` block as a :class:`SensitivityError`.

    A module that runs without gradients may still fail with them, or in the backward pass. The library's own errors,
    and that memory is exhausted, are passed on.

    Args:
        remedy: What the user can write instead.
    """
    try:
        yield
    except (PTQError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SensitivityError(
            f"the network cannot be differentiated, {type(error).__name__}: {error}. {remedy}"
        ) from error
