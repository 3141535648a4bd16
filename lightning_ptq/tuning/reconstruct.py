"""AdaQuant: one unit in, the tuned unit and its errors out.

``min over Δw, Δx, V, b of ‖ unit(X) - unit_q(X; Q_Δw(W + V), Q_Δx, b) ‖²`` (Hubara et al., ICML 2021, eq. 2), where
the unit is a layer or a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lightning_ptq.activations.shards import Part, PartSamples
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.network.layers import layer_state, layer_tensors, set_layer_state
from lightning_ptq.network.units import Unit
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.gradient import Gradient
from lightning_ptq.runtime.memory import trim_heap
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.losses import _mean_power, _relative_error
from lightning_ptq.tuning.tuners import Tuner, make_tuner

T = TypeVar("T")


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit.

    Attributes:
        name: Qualified name.
        bits: The layers' widths, for example ``"w4a4"``; several where they differ.
        error_before: Held-out error of the initial quantization: the squared error of the unit's output over the
            squared float output.
        error_after: The same after tuning.
        accepted: True if the tuned state was kept; False if tuning did not lower the error, or was not needed, and
            the unit keeps its initial quantization.
        steps: Optimisation steps; 0 if the error was below the tolerance to begin with.
        seconds: Time of the tuning.
        curve: (step, training loss) at some fifty steps.
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
        """From what ``dataclasses.asdict`` made of one, also if it has gone through JSON."""
        curve = tuple((int(step), float(loss)) for step, loss in fields["curve"])
        return cls(**{**fields, "curve": curve})


def reconstruct_unit(
    unit: Unit,
    data: Sequence[tuple[Part, UnitData]],
    config: ReconstructionConfig,
    steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    ranks: Ranks | None = None,
    restart: Callable[[], None] = lambda: None,
) -> UnitResult:
    """Tune the quantized layers of ``unit`` so that its outputs come close to the targets in ``data``.

    The tuned state is kept only if it lowers the error on held-out samples; the weights kept lie on their grid.

    Args:
        unit: A unit of a calibrated module in eval mode.
        data: The parts of its calibration samples that this rank has, with targets set.
        config: How.
        steps: Optimisation steps; see :meth:`ReconstructionConfig.steps_for`.
        seed: Of all random choices; the same on all ranks.
        on_step: Called with the number of steps done.
        ranks: The processes that share each step; all of them have the unit, and each part is one's.
        restart: Puts in place what tuning starts from, where that is not the state which it has to beat.

    Returns:
        The errors before and after, and whether the tuned state was kept.
    """
    start, ranks = time.perf_counter(), ranks or Ranks()
    samples = [PartSamples(part, of_part, config.held_out, seed * config.parts + part.index) for part, of_part in data]

    def judge() -> float:
        trim_heap()  # forwards of other sizes than the steps': neither fits into what the other leaves in the heap
        found = _of_all_parts(ranks, {own.part.index: own.held_out_error(unit.module) for own in samples})
        trim_heap()
        return sum(error for error, _ in found) / max(sum(power for _, power in found), 1e-30)

    before = judge()
    widths = [cast(LayerQConfig, layer.qconfig) for layer in unit.layers.values()]
    bits = "/".join(sorted(set(map(str, widths))))
    if before < config.tolerance_for(widths):
        return UnitResult(unit.name, bits, before, before, False, 0, time.perf_counter() - start)
    saved = [layer_state(layer) for layer in unit.layers.values()]
    restart()
    tuners = [make_tuner(unit, name, layer, config) for name, layer in unit.layers.items()]
    with _tuning(unit, config):
        curve = _optimise(unit, tuners, samples, steps, config, ranks, on_step)
    for tuner in tuners:
        tuner.write()
    ranks.spread(tensor for layer in unit.layers.values() for tensor in layer_tensors(layer).values())
    after = judge()
    accepted = after < before
    if not accepted:
        for layer, state in zip(unit.layers.values(), saved, strict=True):
            set_layer_state(layer, state)
    return UnitResult(unit.name, bits, before, after, accepted, steps, time.perf_counter() - start, tuple(curve))


def _of_all_parts(ranks: Ranks, found: dict[int, T]) -> list[T]:
    """What was found for each part, in the order of the parts, whichever rank has them."""
    merged = {index: value for of_rank in ranks.gather(found) for index, value in of_rank.items()}
    return [merged[index] for index in sorted(merged)]


def _optimise(
    unit: Unit,
    tuners: list[Tuner],
    samples: list[PartSamples],
    steps: int,
    config: ReconstructionConfig,
    ranks: Ranks,
    on_step: Callable[[int], None],
) -> list[tuple[int, float]]:
    by_rate: dict[float, list[Tensor]] = {}
    for variable, rate in (found for tuner in tuners for found in tuner.variables.values()):
        by_rate.setdefault(rate, []).append(variable)
    if not by_rate:
        return []
    # A group for each rate, stepped as a whole: one by one, its tensors would take a tenth of a step. The same bytes.
    groups = [{"params": variables, "lr": rate} for rate, variables in by_rate.items()]
    optimizer = torch.optim.Adam(groups, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    facts = _of_all_parts(ranks, {own.part.index: (own.data.separable, own.power()) for own in samples})
    mixed, power = all(separable for separable, _ in facts), _mean_power([power for _, power in facts])
    gradient = Gradient([variable for variables in by_rate.values() for variable in variables], ranks, len(facts))
    quantizers = [q for layer in unit.layers.values() if (q := layer.input_fake_quant) is not None]
    drops = [ActivationDrop(own.generator) for own in samples]
    curve: list[tuple[int, float]] = []
    for step in range(steps):
        for own, drop in zip(samples, drops, strict=True):
            # Where rows cannot be told apart, a step takes a whole call, of one part after the other.
            weight = own.part.weight if mixed else float(step % len(facts) == own.part.index)
            if not weight:
                continue
            drop.probability = config.drop * (1 - step / steps)
            for quantizer in quantizers:
                quantizer.drop = drop
            for group, rows, share in own.draw():
                error = weight * share * _relative_error(unit.module, tuners, group, rows, power)
                penalty = weight * share * torch.stack([tuner.penalty(step / steps) for tuner in tuners]).sum()
                gradient.add(own.part.index, error + penalty, error)
        total = gradient.reduce()
        if step % max(1, steps // 50) == 0:
            curve.append((step, float(total)))
        optimizer.step()
        schedule.step()
        on_step(step + 1)
    return curve


@contextmanager
def _tuning(unit: Unit, config: ReconstructionConfig) -> Iterator[None]:
    """Gradients for the variables only; AdaRound's weights are on the grid already. Ends the dropping."""
    frozen = [p for p in unit.module.parameters() if p.requires_grad]
    quantizers = [q for layer in unit.layers.values() if (q := layer.input_fake_quant) is not None]
    weights = [cast(FakeQuantize, layer.weight_fake_quant) for layer in unit.layers.values() if not layer.tied]
    soft = config.rounding == "adaround" and "weight" in config.learn
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for quantizer in weights:
            quantizer.enabled = not soft
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for quantizer in quantizers:
            quantizer.drop = None
        for quantizer in weights:
            quantizer.enabled = True


class ActivationDrop:
    """Activations that keep their float value in a step of tuning, drawn at random (QDrop, Wei et al., 2022).

    Args:
        generator: Source of the random numbers.

    Attributes:
        probability: That a value is dropped.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.probability = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with some of its values replaced by those of ``x``."""
        if not self.probability:
            return y
        # Random bytes cost an eighth of random floats, and dropping is on the path of every tuning step.
        words = torch.randint(
            -(2**63), 2**63 - 1, (x.numel() // 8 + 1,), generator=self.generator, dtype=torch.int64, device=x.device
        )
        dropped = words.view(torch.uint8)[: x.numel()].view(x.shape) < round(self.probability * 256)
        return torch.lerp(y, x, dropped.to(x.dtype))  # several times faster than torch.where, backwards too
