"""The optimization loop: Adam with cosine decay, on gradients that ranks compute in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from lightning_ptq.runtime.cuda_graphs import Recorder
from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.ranks import Ranks


def minimize(
    variables: Iterable[tuple[Tensor, float]],
    steps: int,
    shards: int,
    ranks: Ranks,
    differentiate: Callable[[int, Gradient], None],
    recorder: Recorder | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Minimize a loss by Adam, with rates that decay to 0 along a cosine.

    Args:
        variables: Tensors to optimize, each with its initial rate. Their ``grad`` is overwritten.
        steps: Number of steps.
        shards: Number of shards that the gradient of a step is computed in; shard ``i`` belongs to rank ``i % world``.
        ranks: Processes that share each step.
        differentiate: Called with the step and a :class:`~lightning_ptq.runtime.gradient.Gradient`; adds the gradients
            of this rank's shards to it.
        recorder: Records the update, on a device that has graphs.

    Yields:
        The step, from 0, and its loss (scalar), after each step. The next step overwrites the loss.

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
    # One call steps all tensors of a rate; one by one would cost a tenth of a step's time, for the same bytes.
    groups = [{"params": tensors, "lr": rate} for rate, tensors in by_rate.items()]
    optimizer = torch.optim.Adam(groups, foreach=True)
    if recorder is not None:  # a graph reads rates and counts of steps from tensors
        device = next(iter(by_rate.values()))[0].device
        groups = [{"params": tensors, "lr": torch.tensor(rate, device=device)} for rate, tensors in by_rate.items()]
        optimizer = torch.optim.Adam(groups, foreach=True, capturable=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gradient = Gradient([tensor for tensors in by_rate.values() for tensor in tensors], ranks, shards)
    losses: list[Tensor] = []

    def update() -> None:
        losses[:] = [gradient.reduce()]
        optimizer.step()

    repeat = update
    for step in range(steps):
        differentiate(step, gradient)
        gradient.exchange()
        if recorder is not None and step == 1:  # the first step has set up the optimizer's state
            with suppress(RuntimeError):
                repeat = recorder.record(update)
        repeat()
        schedule.step()
        yield step, losses[0]
