from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from helpers import seeded
from torch import Tensor

from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.ranks import Ranks


class Thread(Ranks):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, world: int, board: dict[int, Tensor], barrier: Barrier) -> None:
        self.rank, self.world, self.board, self.barrier = rank, world, board, barrier

    def broadcast_each(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        if self.rank < len(tensors):
            self.board[self.rank] = tensors[self.rank].clone()
        self.barrier.wait(20)
        for rank, tensor in enumerate(tensors):
            tensor.copy_(self.board[rank])
        self.barrier.wait(20)


SAMPLES = seeded(0, 7, 3, 5)


def loss_of(part: int, step: int, variables: Sequence[Tensor]) -> Tensor:
    weight, bias = variables
    return (SAMPLES[part] @ weight + bias).square().mean() * (step + 1) / 3


def steps_on(rank: Ranks, parts: int) -> list[Tensor]:
    """What two steps leave, on one rank of several."""
    variables = [seeded(1, 5, 4).requires_grad_(), seeded(2, 4).requires_grad_()]
    gradient = Gradient(variables, rank, parts)
    found = []
    for step in range(2):
        for part in filter(rank.owns, range(parts)):
            for chunk in (0.25, 0.75):
                gradient.add(part, chunk * loss_of(part, step, variables))
        gradient.exchange()
        found.append(gradient.reduce().clone())
        found += [variable.grad.clone() for variable in variables if variable.grad is not None]
    return found


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_is_that_of_the_whole_step_and_the_same_bytes_on_any_number_of_ranks(parts: int) -> None:
    alone = steps_on(Ranks(), parts)
    variables = [seeded(1, 5, 4).requires_grad_(), seeded(2, 4).requires_grad_()]
    for step in range(2):
        whole = torch.stack([loss_of(part, step, variables) for part in range(parts)]).sum()
        expected = [whole, *torch.autograd.grad(whole, variables)]
        torch.testing.assert_close(alone[3 * step : 3 * step + 3], expected)
    for world in (2, 3, 5):
        barrier, board = Barrier(world), dict[int, Tensor]()
        ranks = [Thread(rank, world, board, barrier) for rank in range(world)]
        with ThreadPoolExecutor(world) as pool:
            for found in pool.map(lambda rank: steps_on(rank, parts), ranks):
                assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
