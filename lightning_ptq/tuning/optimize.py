"""The steps that tune a unit: Adam on the reconstruction loss of mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_ptq.activations.calls import unit_errors
from lightning_ptq.activations.groups import Picked, count_of
from lightning_ptq.activations.shards import ShardSamples, over_shards
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.errors import UnitError
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.cuda_graphs import recorder_for
from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.isolation import RandomState
from lightning_ptq.runtime.optimization import minimize
from lightning_ptq.runtime.patching import frozen
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.runtime.structure import float_tensors_in
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.drop import ActivationDrop
from lightning_ptq.tuning.losses import LOSSES, ReconstructionLoss
from lightning_ptq.tuning.steps import Steps
from lightning_ptq.tuning.tuners import Tuner, make_tuner, share_scales


@dataclass(frozen=True)
class ShardFacts:
    """What all ranks know of the shards of a unit's samples.

    Attributes:
        shards: Number of shards.
        used: Indices of those with samples.
        separable: Whether the unit treats rows independently in all of them.
        loss: The loss, which knows the spread of the targets.
    """

    shards: int
    used: list[int]
    separable: bool
    loss: ReconstructionLoss

    @classmethod
    def of(cls, samples: list[ShardSamples], config: ReconstructionConfig, ranks: Ranks) -> ShardFacts:
        """Return the facts.

        Raises:
            UnitError: If no shard has a sample.
        """
        kind = LOSSES[config.loss]
        own = {each.shard.index: (each.empty, each.data.separable, kind.magnitudes(each.targets())) for each in samples}
        shards = over_shards(ranks, own)
        used = [index for index, (empty, *_) in enumerate(shards) if not empty]
        if not used:
            raise UnitError("no calibration sample reaches it")
        loss = kind([shards[index][2] for index in used])
        return cls(len(shards), used, all(shards[index][1] for index in used), loss)


@dataclass(frozen=True)
class Optimized:
    """What the steps found.

    Attributes:
        curve: (step, training loss) at about fifty steps.
        eager: Why steps on a GPU were not repeated as CUDA graphs; empty if they were, and on a CPU.
    """

    curve: list[tuple[int, float]]
    eager: str = ""


def optimize(
    unit: Unit,
    samples: list[ShardSamples],
    facts: ShardFacts,
    config: ReconstructionConfig,
    steps: int,
    ranks: Ranks,
    on_step: Callable[[int], None],
) -> Optimized:
    """Run the optimization steps, and write what they found into the unit, with the weights on their grids.

    Args:
        unit: The unit, quantized.
        samples: Its samples in the shards of this rank.
        facts: Facts of the shards of all ranks.
        config: What is tuned, and at which rates.
        steps: Number of steps.
        ranks: Processes that share each step.
        on_step: Called with the number of steps done.

    Raises:
        UnitError: If the unit's forward or backward pass fails.
    """
    by_name = {name: make_tuner(unit, name, layer, config) for name, layer in unit.layers.items()}
    share_scales(by_name)
    tuners = list(by_name.values())
    with tuning_state(unit, config):
        found = _run(unit, tuners, samples, facts, steps, config, ranks, on_step)
    for tuner in tuners:
        tuner.write()
    return found


def _run(
    unit: Unit,
    tuners: list[Tuner],
    samples: list[ShardSamples],
    facts: ShardFacts,
    steps: int,
    config: ReconstructionConfig,
    ranks: Ranks,
    on_step: Callable[[int], None],
) -> Optimized:
    # Some may share a variable, which counts once.
    variables = list({id(pair[0]): pair for tuner in tuners for pair in tuner.variables.values()}.values())
    if not variables:
        return Optimized([])
    used, loss = facts.used, facts.loss
    drops = {own.shard.index: ActivationDrop(own.generator) for own in samples}
    recorder = recorder_for(variables[0][0].device) if config.cuda_graphs else None
    runner = Steps(recorder, _reason_against(samples, config))
    update = recorder if variables[0][0].is_cuda else None

    def differentiate(step: int, gradient: Gradient) -> None:
        for own in samples:
            # Where rows are not separable, a step takes one whole call, of one shard after the other.
            index = own.shard.index
            weight = own.shard.weight if facts.separable else float(used[step % len(used)] == index)
            if not weight or own.empty:
                continue
            drops[index].probability = config.drop * (1 - step / steps)
            for group, rows, share in own.draw():
                random = group.random_of(rows)

                def work(picked: Picked, own: ShardSamples = own, scale: float = weight * share) -> None:
                    set_drop(unit, drops[own.shard.index] if config.drop else None)
                    with unit_errors():
                        error = scale * unit_loss(unit, tuners, loss, own.data, picked, random)  # noqa: B023  it runs before the next draw
                        penalty = scale * torch.stack([tuner.penalty(step / steps) for tuner in tuners]).sum()
                        gradient.add(own.shard.index, error + penalty, error)

                key = (index, id(group), count_of(rows))
                runner.run(key, group.pick(rows), work, gradient.of_shard(index), own.generator)

    curve: list[tuple[int, float]] = []
    for step, total in minimize(variables, steps, facts.shards, ranks, differentiate, update):
        if step % max(1, steps // 50) == 0:
            curve.append((step, float(total)))
        on_step(step + 1)
    return Optimized(curve, runner.reason if recorder else "")


def _reason_against(samples: list[ShardSamples], config: ReconstructionConfig) -> str:
    """Return why the steps of a unit do other work from step to step; empty if they do the same."""
    if config.rounding == "adaround":
        return "the penalty of AdaRound changes from step to step"
    if any(own.data.isolation.draws for own in samples):
        return "the network draws random numbers"
    if any(own.data.isolation.leaves_traces for own in samples):
        return "the network changes its own state"
    return ""


def unit_loss(
    unit: Unit,
    tuners: list[Tuner],
    loss: ReconstructionLoss,
    data: UnitData,
    picked: Picked,
    random: RandomState | None = None,
) -> Tensor:
    """Return the loss of some rows, differentiable in the tuners' variables."""
    state = {name: tensor for tuner in tuners for name, tensor in tuner.tensors().items()}
    args, kwargs = picked.arguments()
    with data.isolation.forward(unit.module, random):
        outputs = float_tensors_in(functional_call(unit.module, state, args, kwargs))
    return loss.training(picked.without_padding(outputs), picked.targets)


def set_drop(unit: Unit, drop: ActivationDrop | None) -> None:
    """Let the inputs of a unit's layers keep some of their float values."""
    for layer in unit.layers.values():
        for quantizer in layer.input_quantizers.values():
            quantizer.drop = drop


@contextmanager
def tuning_state(unit: Unit, config: ReconstructionConfig) -> Iterator[None]:
    """Record gradients for the tuners' variables only, inside the ``with`` block; afterwards nothing is dropped."""
    weights = [q for layer in unit.layers.values() if not layer.tied for q in layer.weight_quantizers.values()]
    on_grid = config.rounding == "adaround" and "weight" in config.learn  # such weights need no rounding
    try:
        for quantizer in weights:
            quantizer.enabled = not on_grid
        with frozen(unit.module), torch.enable_grad():
            yield
    finally:
        set_drop(unit, None)
        for quantizer in weights:
            quantizer.enabled = True
