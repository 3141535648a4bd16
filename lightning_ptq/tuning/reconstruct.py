"""AdaQuant for one unit: takes the unit and its samples, tunes it, and returns its errors.

``min over Δw, Δx, V, b of ‖ unit(X) - unit_q(X; Q_Δw(W + V), Q_Δx, b) ‖²`` (Hubara et al., ICML 2021, eq. 2), where
the unit is a layer or a block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_ptq.activations.calls import unit_errors
from lightning_ptq.activations.shards import Shard, ShardSamples, over_shards
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.network.units import Unit, set_unit_states, unit_qconfigs, unit_states
from lightning_ptq.runtime.journal import LayerStates
from lightning_ptq.runtime.memory import trim_heap
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.tuning.closed_form import solve_layers
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.means import correct_means
from lightning_ptq.tuning.optimize import ShardFacts, optimize
from lightning_ptq.tuning.tuners import make_tuner

Improve = Callable[[Unit, Sequence[ShardSamples], Callable[[dict[int, Any]], list[Any]]], None]
"""Improves the layers of a unit in place; the last argument returns the values of all shards from those of a rank."""

_RATES = (1.0, 0.2)
"""Factors of the rates, in turn until the tuned state is better than the state that tuning starts from."""


@dataclass(frozen=True)
class UnitResult:
    """The outcome of tuning one unit.

    Attributes:
        name: Qualified name.
        bits: Bit widths of the layers, for example ``"w4a4"``; several where they differ.
        error_before: Held-out error of the initial quantization: the squared error of the unit's output over the
            variance of the float output, or over its square if all samples give the same output.
        error_after: The same after tuning.
        accepted: True if the tuned state was kept. False if tuning did not lower the error, or was not needed, so that
            the unit keeps its initial quantization.
        steps: Optimization steps; 0 if the initial error was below the tolerance.
        seconds: Duration of the tuning.
        curve: (step, training loss) at about fifty steps.
        eager: Why steps on a GPU were not repeated as CUDA graphs; empty if they were, and on a CPU.
    """

    name: str
    bits: str
    error_before: float
    error_after: float
    accepted: bool
    steps: int
    seconds: float
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    eager: str = field(default="", repr=False)

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
    restart: Callable[[], None] | None = None,
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
    first = seed * config.parts
    samples = [ShardSamples(shard, of_shard, config.held_out, first + shard.index) for shard, of_shard in data]
    facts = ShardFacts.of(samples, config, ranks)
    before, widths = _held_out_error(unit, samples, facts, ranks), unit_qconfigs(unit)
    bits = "/".join(sorted(set(map(str, widths))))
    if before < config.tolerance_for(widths):
        return UnitResult(unit.name, bits, before, before, False, 0, time.perf_counter() - began)
    saved = unit_states(unit)
    best, curve, eager = (before, saved), list[tuple[int, float]](), ""
    try:
        if restart is not None:
            restart()
        best = min(best, _solved(unit, samples, facts, config, ranks), key=_error)
        start = unit_states(unit)
        for rate in _RATES:
            set_unit_states(unit, start)
            found = optimize(unit, samples, facts, _slower(config, rate), steps, ranks, on_step)
            _agree(unit, ranks)
            curve, eager = curve + found.curve, eager or found.eager
            on_step = _silent  # the progress counts one attempt
            after = _held_out_error(unit, samples, facts, ranks)
            if after < best[0]:
                best = after, unit_states(unit)
                break
    except BaseException:  # an interrupt too: the unit must not stay half changed
        set_unit_states(unit, saved)
        raise
    set_unit_states(unit, best[1])
    accepted, seconds = best[0] < before, time.perf_counter() - began
    error = best[0] if accepted else after
    return UnitResult(unit.name, bits, before, error, accepted, steps, seconds, tuple(curve), eager)


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


def _solved(
    unit: Unit, samples: list[ShardSamples], facts: ShardFacts, config: ReconstructionConfig, ranks: Ranks
) -> tuple[float, LayerStates]:
    """Put a unit into the best state that is known in closed form; return its error and the state on its grids.

    Without a better state than that of the unit, the error is infinite.
    """
    error, found = _held_out_error(unit, samples, facts, ranks), (math.inf, unit_states(unit))
    for improve in _starts(config):
        better = _improved(improve, error, unit, samples, facts, config, ranks)
        if better is not None:
            error, found = better[0], better
    return found


def _starts(config: ReconstructionConfig) -> Iterator[Improve]:
    """Yield what improves the state that tuning starts from."""
    if config.closed_form and {"weight", "bias"} <= set(config.learn):
        yield solve_layers
    if config.closed_form and "bias" in config.learn:
        yield correct_means


def _improved(
    improve: Improve,
    error: float,
    unit: Unit,
    samples: list[ShardSamples],
    facts: ShardFacts,
    config: ReconstructionConfig,
    ranks: Ranks,
) -> tuple[float, LayerStates] | None:
    """Improve the layers; return the held-out error and the states on the grids, or None if the error did not fall."""
    states = unit_states(unit)
    with unit_errors():
        improve(unit, samples, lambda own: over_shards(ranks, own))
    _agree(unit, ranks)
    corrected = _held_out_error(unit, samples, facts, ranks)
    if corrected < error:
        shifted = unit_states(unit)
        for name, layer in unit.layers.items():  # a state that may be kept has its weights on their grids
            make_tuner(unit, name, layer, config).write()
        rounded = unit_states(unit)
        set_unit_states(unit, shifted)
        return corrected, rounded
    set_unit_states(unit, states)
    return None


def _held_out_error(unit: Unit, samples: list[ShardSamples], facts: ShardFacts, ranks: Ranks) -> float:
    """Return the distance of the unit's held-out outputs from the float ones, relative to the spread of these."""
    trim_heap()  # these forwards have other sizes than the steps; neither fits into the heap that the other leaves
    with unit_errors():
        own = {own.shard.index: facts.loss.held_out(own.held_out(unit.module)) for own in samples}
    sums = over_shards(ranks, own)
    trim_heap()
    return sum(error for error, _ in sums) / max(sum(magnitude for _, magnitude in sums), 1e-30)
