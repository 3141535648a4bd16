"""The optimization loop: Adam with cosine decay, on gradients that ranks compute in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.ranks import Ranks


def minimize(
    variables: Iterable[tuple[Tensor, float]],
    steps: int,
    shards: int,
    ranks: Ranks,
    differentiate: Callable[[int, Gradient], None],
) -> Iterator[tuple[int, Tensor]]:
    """Minimize a loss by Adam, with rates that decay to 0 along a cosine.

    Args:
        variables: Tensors to optimize, each with its initial rate. Their ``grad`` is overwritten.
        steps: Number of steps.
        shards: Number of shards that the gradient of a step is computed in; shard ``i`` belongs to rank ``i % world``.
        ranks: Processes that share each step.
        differentiate: Called with the step and a :class:`~lightning_ptq.runtime.gradient.Gradient`; adds the gradients
            of this rank's shards to it.

    Yields:
        The step, from 0, and its loss (scalar), after each step.

    Example:
        >>> x = torch.tensor([4.0], requires_grad=True)
        >>> losses = [
        ...     loss.item() for _, loss in minimize([(x, 1.0)], 50, 1, Ranks(), lambda _, g: g.add(0, x.square().sum()))
        ... ]
        >>> losses[0], losses[-1] < 0.1
        (16.0, True)
    """
    by_rate: dict[float, list[Tensor]] = {}
    for variable, rate in variables:
        by_rate.setdefault(rate, []).append(variable)
    if not by_rate:
        return
    # One call steps all tensors of a rate. Stepping them one by one would cost a tenth of a step's time. The bytes are
    # the same.
    groups = [{"params": tensors, "lr": rate} for rate, tensors in by_rate.items()]
    optimizer = torch.optim.Adam(groups, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gradient = Gradient([tensor for tensors in by_rate.values() for tensor in tensors], ranks, shards)
    for step in range(steps):
        differentiate(step, gradient)
        loss = gradient.reduce()
        optimizer.step()
        schedule.step()
        yield step, loss
