"""AdaQuant: one unit in, the tuned unit and its errors out.

``min over Δw, Δx, V, b of ‖ unit(X) - unit_q(X; Q_Δw(W + V), Q_Δx, b) ‖²`` (Hubara et al., ICML 2021, eq. 2), where
the unit is a layer or a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ptq.fake_quant import ActivationDrop, FakeQuantize
from lightning_ptq.gradient import Gradient
from lightning_ptq.qconfig import LayerQConfig
from lightning_ptq.ranks import Ranks
from lightning_ptq.store import trim_heap
from lightning_ptq.tuners import ReconstructionConfig, Tuner, layer_state, layer_tensors, make_tuner, set_layer_state
from lightning_ptq.unit_data import Group, Minibatch, Sample, UnitData, float_leaves, run_unit
from lightning_ptq.units import Unit


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
    data: UnitData,
    config: ReconstructionConfig,
    steps: int,
    generator: torch.Generator,
    on_step: Callable[[int], None] = lambda step: None,
    ranks: Ranks | None = None,
    restart: Callable[[], None] = lambda: None,
) -> UnitResult:
    """Tune the quantized layers of ``unit`` so that its outputs come close to the targets in ``data``.

    The tuned state is kept only if it lowers the error on held-out samples; the weights kept lie on their grid.

    Args:
        unit: A unit of a calibrated module in eval mode.
        data: Its inputs, with targets set.
        config: How.
        steps: Optimisation steps; see :meth:`ReconstructionConfig.steps_for`.
        generator: Source of all randomness; in the same state on all ranks.
        on_step: Called with the number of steps done.
        ranks: The processes that share each step; all of them have the unit and its data.
        restart: Puts in place what tuning starts from, where that is not the state which it has to beat.

    Returns:
        The errors before and after, and whether the tuned state was kept.
    """
    start, ranks = time.perf_counter(), ranks or Ranks()
    tune, held_out = data.split(config.held_out, generator)
    judged = [(group, chunk.rows) for group, rows in data.batches(held_out, 64) for chunk in data.chunks(rows)]

    def judge() -> float:
        trim_heap()  # forwards of other sizes than the steps': neither fits into what the other leaves in the heap
        error = ranks.first(lambda: held_out_error(unit.module, judged))
        trim_heap()
        return error

    before = judge()
    widths = [cast(LayerQConfig, layer.qconfig) for layer in unit.layers.values()]
    bits = "/".join(sorted(set(map(str, widths))))
    if before < config.tolerance_for(widths):
        return UnitResult(unit.name, bits, before, before, False, 0, time.perf_counter() - start)
    saved = [layer_state(layer) for layer in unit.layers.values()]
    restart()
    tuners = [make_tuner(unit, name, layer, config) for name, layer in unit.layers.items()]
    with _tuning(unit, config, generator) as drop:
        batches = _shuffled(data, tune, config.batch_size, steps, generator)
        curve = _optimise(unit.module, tuners, data, batches, steps, config, drop, ranks, on_step)
    for tuner in tuners:
        tuner.write()
    ranks.spread(tensor for layer in unit.layers.values() for tensor in layer_tensors(layer).values())
    after = judge()
    accepted = after < before
    if not accepted:
        for layer, state in zip(unit.layers.values(), saved, strict=True):
            set_layer_state(layer, state)
    return UnitResult(unit.name, bits, before, after, accepted, steps, time.perf_counter() - start, tuple(curve))


def held_out_error(module: nn.Module, batches: list[Minibatch]) -> float:
    """Squared error of the quantized module's outputs over the squared targets, summed over the batches."""
    error = power = 0.0
    for group, rows in batches:
        outputs = float_leaves(run_unit(module, *group.arguments(rows), mode="quantized"))
        for output, target in zip(outputs, group.targets or [], strict=True):
            error += (output - target[rows]).double().square().sum().item()
            power += target[rows].double().square().sum().item()
    return error / max(power, 1e-30)


def _optimise(
    module: nn.Module,
    tuners: list[Tuner],
    data: UnitData,
    batches: Iterator[Minibatch],
    steps: int,
    config: ReconstructionConfig,
    drop: ActivationDrop,
    ranks: Ranks,
    on_step: Callable[[int], None],
) -> list[tuple[int, float]]:
    groups = [group for tuner in tuners for group in tuner.groups()]
    if not groups:
        return []
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gradient = Gradient([variable for group in groups for variable in group["params"]], ranks)
    power = _power(data)
    curve: list[tuple[int, float]] = []
    for step, (group, rows) in enumerate(batches):
        drop.start_step(config.drop * (1 - step / steps))
        for index, chunk in enumerate(data.chunks(rows, config.parts)):
            if ranks.mine(index):
                drop.start_part(chunk.part, chunk.samples)
                error = chunk.share * _relative_error(module, tuners, group, chunk.rows, power)
                penalty = chunk.share * torch.stack([tuner.penalty(step / steps) for tuner in tuners]).sum()
                gradient.add(error + penalty, error)
        total = gradient.reduce()
        if step % max(1, steps // 50) == 0:
            curve.append((step, float(total)))
        optimizer.step()
        schedule.step()
        on_step(step + 1)
    return curve


def _shuffled(
    data: UnitData, samples: list[Sample], size: int, steps: int, generator: torch.Generator
) -> Iterator[Minibatch]:
    """So many mini-batches, epoch after epoch, each epoch in a new order."""
    queue: list[Minibatch] = []
    for _ in range(steps):
        queue = queue or data.batches(samples, size, generator)
        yield queue.pop()


def _relative_error(
    module: nn.Module, tuners: list[Tuner], group: Group, rows: Tensor | slice, power: list[float]
) -> Tensor:
    """Mean squared error of some rows over the targets' mean square, differentiable in the tuners' variables."""
    state = {name: tensor for tuner in tuners for name, tensor in tuner.tensors().items()}
    args, kwargs = group.arguments(rows)
    outputs = float_leaves(functional_call(module, state, args, kwargs))
    triples = zip(outputs, group.targets or [], power, strict=True)
    return torch.stack([(output - target[rows]).square().mean() / p for output, target, p in triples]).sum()


def _power(data: UnitData) -> list[float]:
    """Mean square of each target of the first group; a norm, for it copies nothing."""
    targets = data.groups[0].targets or []
    return [max(torch.linalg.vector_norm(t).item() ** 2 / t.numel(), 1e-20) for t in targets]


@contextmanager
def _tuning(unit: Unit, config: ReconstructionConfig, generator: torch.Generator) -> Iterator[ActivationDrop]:
    """Gradients for the variables only, activations dropped; AdaRound's weights are on the grid already."""
    frozen = [p for p in unit.module.parameters() if p.requires_grad]
    quantizers = [q for layer in unit.layers.values() if (q := layer.input_fake_quant) is not None]
    weights = [cast(FakeQuantize, layer.weight_fake_quant) for layer in unit.layers.values() if not layer.tied]
    soft = config.rounding == "adaround" and "weight" in config.learn
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        drop = ActivationDrop(generator)
        for quantizer in quantizers:
            quantizer.drop = drop
        for quantizer in weights:
            quantizer.enabled = not soft
        with torch.enable_grad():
            yield drop
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for quantizer in quantizers:
            quantizer.drop = None
        for quantizer in weights:
            quantizer.enabled = True
