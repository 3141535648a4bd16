"""AdaQuant for one unit: takes the unit and its samples, tunes it, and returns its errors.

``min over Δw, Δx, V, b of ‖ unit(X) - unit_q(X; Q_Δw(W + V), Q_Δx, b) ‖²`` (Hubara et al., ICML 2021, eq. 2), where
the unit is a layer or a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_ptq.activations.calls import unit_errors
from lightning_ptq.activations.groups import Group
from lightning_ptq.activations.shards import Shard, ShardSamples
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.errors import UnitError
from lightning_ptq.network.units import Unit, set_unit_states, unit_qconfigs, unit_states
from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.journal import LayerStates
from lightning_ptq.runtime.memory import trim_heap
from lightning_ptq.runtime.optimization import minimize
from lightning_ptq.runtime.patching import frozen
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.runtime.structure import float_tensors_in
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.drop import ActivationDrop
from lightning_ptq.tuning.losses import LOSSES, ReconstructionLoss
from lightning_ptq.tuning.means import correct_means
from lightning_ptq.tuning.tuners import Tuner, make_tuner, share_scales

T = TypeVar("T")

_RATES = (1.0, 0.2)
"""Factors of the rates, in turn until the tuned state is better than the state that tuning starts from."""


@dataclass(frozen=True)
class UnitResult:
    """The outcome of tuning one unit.

    Attributes:
        name: Qualified name.
        bits: Bit widths of the layers, for example ``"w4a4"``; several where they differ.
        error_before: Held-out error of the initial quantization: the squared error of the unit's output over the
            squared float output.
        error_after: The same after tuning.
        accepted: True if the tuned state was kept. False if tuning did not lower the error, or was not needed, so that
            the unit keeps its initial quantization.
        steps: Optimization steps; 0 if the initial error was below the tolerance.
        seconds: Duration of the tuning.
        curve: (step, training loss) at about fifty steps.
    """

    name: str
    bits: str
    error_before: float
    error_after: float
    accepted: bool
    steps: int
    seconds: float
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> UnitResult:
        """Return the result that ``dataclasses.asdict`` made these fields of, also if they went through JSON."""
        curve = tuple((int(step), float(loss)) for step, loss in fields["curve"])
        return cls(**{**fields, "curve": curve})


def reconstruct_unit(
    unit: Unit,
    data: Sequence[tuple[Shard, UnitData]],
    config: ReconstructionConfig,
    steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    ranks: Ranks | None = None,
    restart: Callable[[], None] = lambda: None,
) -> UnitResult:
    """Tune the quantized layers of ``unit`` so that its outputs come close to the targets in ``data``.

    The tuned state is kept only if it lowers the error on held-out samples. Weights end on their grids.

    Args:
        unit: A unit of a calibrated module in eval mode.
        data: The shards of its calibration samples that this rank holds, with targets set.
        config: What is tuned, and how.
        steps: Optimization steps; see :meth:`ReconstructionConfig.steps_for`.
        seed: Seed of all random choices; the same on all ranks.
        on_step: Called with the number of steps done.
        ranks: Processes that share each step. All of them have the unit, and each shard belongs to one of them.
        restart: Sets the state from which tuning starts, if it differs from the state that tuning must improve on.

    Returns:
        The errors before and after, and whether the tuned state was kept.

    Raises:
        UnitError: If no sample reaches the unit, or its forward or backward pass fails; it is left as it was.
    """
    began, ranks = time.perf_counter(), ranks or Ranks()
    seeds = {shard.index: seed * config.parts + shard.index for shard, _ in data}
    samples = [ShardSamples(shard, of_shard, config.held_out, seeds[shard.index]) for shard, of_shard in data]
    if all(_over_shards(ranks, {own.shard.index: own.empty for own in samples})):
        raise UnitError("no calibration sample reaches it")
    before, widths = _held_out_error(unit, samples, config, ranks), unit_qconfigs(unit)
    bits = "/".join(sorted(set(map(str, widths))))
    if before < config.tolerance_for(widths):
        return UnitResult(unit.name, bits, before, before, False, 0, time.perf_counter() - began)
    saved = unit_states(unit)
    best, curve = (before, saved), []
    try:
        restart()
        if config.correct_means and "bias" in config.learn:
            best = min(best, _corrected(unit, samples, config, ranks), key=_error)
        start = unit_states(unit)
        for rate in _RATES:
            set_unit_states(unit, start)
            curve += _tune(unit, samples, _slower(config, rate), steps, ranks, on_step)
            on_step = _silent  # the progress counts one attempt
            after = _held_out_error(unit, samples, config, ranks)
            if after < best[0]:
                best = after, unit_states(unit)
                break
    except BaseException:  # an interrupt too: the unit must not stay half changed
        set_unit_states(unit, saved)
        raise
    set_unit_states(unit, best[1])
    error, accepted, seconds = best[0], best[0] < before, time.perf_counter() - began
    return UnitResult(unit.name, bits, before, error if accepted else after, accepted, steps, seconds, tuple(curve))


def _tune(
    unit: Unit,
    samples: list[ShardSamples],
    config: ReconstructionConfig,
    steps: int,
    ranks: Ranks,
    on_step: Callable[[int], None],
) -> list[tuple[int, float]]:
    """Run the optimization steps, and write what they found into the unit; return the curve of the loss."""
    by_name = {name: make_tuner(unit, name, layer, config) for name, layer in unit.layers.items()}
    share_scales(by_name)
    tuners = list(by_name.values())
    with tuning_state(unit, config):
        curve = _optimize(unit, tuners, samples, steps, config, ranks, on_step)
    for tuner in tuners:
        tuner.write()
    _agree(unit, ranks)
    return curve


def _agree(unit: Unit, ranks: Ranks) -> None:
    """Give all ranks the same bytes; they did the same work, but not always on the same hardware."""
    ranks.broadcast(tensor for layer in unit.layers.values() for tensor in layer.tensors().values())


def _slower(config: ReconstructionConfig, factor: float) -> ReconstructionConfig:
    """Return a config whose rates are multiplied by a factor."""
    rates: dict[str, Any] = {
        name: factor * getattr(config, name) for name in ("weight_lr", "bias_lr", "scale_lr", "zero_point_lr")
    }
    return replace(config, **rates)


def _silent(step: int) -> None:
    pass


def _error(candidate: tuple[float, Any]) -> float:
    return candidate[0]


def _corrected(
    unit: Unit, samples: list[ShardSamples], config: ReconstructionConfig, ranks: Ranks
) -> tuple[float, LayerStates]:
    """Correct the means of the layers, unless that raises the held-out error; return the error and the states."""
    error, states = _held_out_error(unit, samples, config, ranks), unit_states(unit)
    with unit_errors():
        correct_means(unit, samples, lambda own: _over_shards(ranks, own))
    _agree(unit, ranks)
    if (corrected := _held_out_error(unit, samples, config, ranks)) < error:
        shifted = unit_states(unit)
        for name, layer in unit.layers.items():  # a state that may be kept has its weights on their grids
            make_tuner(unit, name, layer, config).write()
        rounded = unit_states(unit)
        set_unit_states(unit, shifted)
        return corrected, rounded
    set_unit_states(unit, states)
    return error, states


def _over_shards(ranks: Ranks, values: dict[int, T]) -> list[T]:
    """Return the values of all shards in the order of the shards, so that sums do not depend on who computed them."""
    merged = ranks.merge(values)
    return [merged[index] for index in sorted(merged)]


def _held_out_error(unit: Unit, samples: list[ShardSamples], config: ReconstructionConfig, ranks: Ranks) -> float:
    """Return the distance of the unit's held-out outputs from the float ones, relative to the magnitude of these."""
    trim_heap()  # these forwards have other sizes than the steps; neither fits into the heap that the other leaves
    with unit_errors():
        own = {own.shard.index: LOSSES[config.loss].held_out(own.held_out(unit.module)) for own in samples}
    sums = _over_shards(ranks, own)
    trim_heap()
    return sum(error for error, _ in sums) / max(sum(magnitude for _, magnitude in sums), 1e-30)


def _optimize(
    unit: Unit,
    tuners: list[Tuner],
    samples: list[ShardSamples],
    steps: int,
    config: ReconstructionConfig,
    ranks: Ranks,
    on_step: Callable[[int], None],
) -> list[tuple[int, float]]:
    """Run the optimization steps; return (step, training loss) at about fifty of them."""
    # Some may share a variable, which counts once.
    variables = list({id(pair[0]): pair for tuner in tuners for pair in tuner.variables.values()}.values())
    if not variables:
        return []
    kind = LOSSES[config.loss]
    facts = {own.shard.index: (own.empty, own.data.separable, kind.magnitudes(own.targets())) for own in samples}
    shards = _over_shards(ranks, facts)
    used = [index for index, (empty, *_) in enumerate(shards) if not empty]
    separable, loss = all(shards[index][1] for index in used), kind([shards[index][2] for index in used])
    quantizers = [q for layer in unit.layers.values() for q in layer.input_quantizers.values()]
    drops = [ActivationDrop(own.generator) for own in samples]

    def differentiate(step: int, gradient: Gradient) -> None:
        for own, drop in zip(samples, drops, strict=True):
            # Where rows are not separable, a step takes one whole call, of one shard after the other.
            weight = own.shard.weight if separable else float(used[step % len(used)] == own.shard.index)
            if not weight or own.empty:
                continue
            drop.probability = config.drop * (1 - step / steps)
            for quantizer in quantizers:
                quantizer.drop = drop
            for group, rows, share in own.draw():
                with unit_errors():
                    error = weight * share * unit_loss(unit, tuners, loss, own.data, group, rows)
                    penalty = weight * share * torch.stack([tuner.penalty(step / steps) for tuner in tuners]).sum()
                    gradient.add(own.shard.index, error + penalty, error)

    curve: list[tuple[int, float]] = []
    for step, total in minimize(variables, steps, len(shards), ranks, differentiate):
        if step % max(1, steps // 50) == 0:
            curve.append((step, float(total)))
        on_step(step + 1)
    return curve


def unit_loss(
    unit: Unit, tuners: list[Tuner], loss: ReconstructionLoss, data: UnitData, group: Group, rows: Tensor | slice
) -> Tensor:
    """Return the loss of some rows, differentiable in the tuners' variables."""
    state = {name: tensor for tuner in tuners for name, tensor in tuner.tensors().items()}
    args, kwargs = group.arguments(rows)
    with data.isolation.forward(unit.module, group.random_of(rows)):
        outputs = float_tensors_in(functional_call(unit.module, state, args, kwargs))
    return loss.training(group.without_padding(outputs, rows), group.wanted(rows))


@contextmanager
def tuning_state(unit: Unit, config: ReconstructionConfig) -> Iterator[None]:
    """Record gradients for the tuners' variables only, inside the ``with`` block; afterwards nothing is dropped."""
    inputs = [q for layer in unit.layers.values() for q in layer.input_quantizers.values()]
    weights = [q for layer in unit.layers.values() if not layer.tied for q in layer.weight_quantizers.values()]
    on_grid = config.rounding == "adaround" and "weight" in config.learn  # such weights need no rounding
    try:
        for quantizer in weights:
            quantizer.enabled = not on_grid
        with frozen(unit.module), torch.enable_grad():
            yield
    finally:
        for quantizer in inputs:
            quantizer.drop = None
        for quantizer in weights:
            quantizer.enabled = True
