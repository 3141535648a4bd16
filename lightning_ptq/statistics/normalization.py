"""Statistics tuning: restore the per-channel means and standard deviations that layers had before quantization.

The integers stay as they are. A layer's output is changed by a factor and a shift per channel, which go into its scales
and its bias (Hubara et al., ICML 2021, sec. 5: batch-norm tuning and para-normalization).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.activations.calls import Call, run_unit, unit_errors
from lightning_ptq.activations.memory_plan import keep_outputs, limit_of
from lightning_ptq.activations.replay import Replay
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.outputs import ChooseOutput
from lightning_ptq.errors import UnitError
from lightning_ptq.network.batch_norm import folded_ahead, is_folded
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.trace import first_argument
from lightning_ptq.network.units import Unit, find_units
from lightning_ptq.runtime.isolation import RandomState
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.progress import Progress, no_progress
from lightning_ptq.statistics.acceptance import Changes, StatisticsResult, accept_if_better
from lightning_ptq.statistics.channel_statistics import ChannelStatistics, watch_outputs

_Target = Literal["batch_norm", "others", "every"]


def reestimate_batch_norm(
    calibration: Calibration,
    *,
    held_out: float = 0.25,
    measure: str = "kl",
    output: ChooseOutput | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = no_progress,
    journal: Journal = NO_JOURNAL,
) -> StatisticsResult:
    """Give the outputs of layers whose batch norm was folded the norm's statistics again.

    On the calibration set, every channel of the quantized layer's output gets mean ``beta`` and standard deviation
    ``|gamma|``. Batch norms that were not folded get running statistics of the quantized network. The pass is in
    execution order, so that each layer sees corrected predecessors; every sample has the same weight.

    Args:
        calibration: A calibrated (and possibly tuned) module, changed in place.
        held_out: Share of the samples that decide whether the step is kept, and that it does not use.
        measure: Measure between the outputs of the float and the quantized network: ``"kl"``, ``"mse"`` or ``"loss"``.
        output: The tensor of the network's output; None to find it, see
            :class:`~lightning_ptq.calibration.outputs.OutputReader`.
        memory_limit: Limit of the activations in memory.
        seed: Seed of the choice of held-out samples.
        progress: Called with the layers done, the layers in total, and the layer's name.
        journal: Where the finished step is saved, so that an interrupted run resumes; by default nowhere.

    Raises:
        StatisticsError: If there are fewer than two samples.
        SensitivityError: If the network's output cannot be read or compared.
    """
    acceptance = {"held_out": held_out, "measure": measure, "output": output, "seed": seed, "journal": journal}
    return _normalize("batch_norm", calibration, "batch_norm", memory_limit, progress, acceptance)


def para_normalize(
    calibration: Calibration,
    *,
    every_layer: bool = False,
    held_out: float = 0.25,
    measure: str = "kl",
    output: ChooseOutput | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = no_progress,
    journal: Journal = NO_JOURNAL,
) -> StatisticsResult:
    """Give the outputs of layers without a batch norm (transformers) the float layers' statistics again.

    On the calibration set, every channel of the quantized layer's output gets the mean and the standard deviation of
    the float layer's output. The pass is in execution order, so that each layer sees corrected predecessors.

    Args:
        calibration: A calibrated (and possibly tuned) module, changed in place.
        every_layer: Include layers whose batch norm was folded, with the float layer's statistics as their target.
        held_out: Share of the samples that decide whether the step is kept, and that it does not use.
        measure: Measure between the outputs of the float and the quantized network: ``"kl"``, ``"mse"`` or ``"loss"``.
        output: The tensor of the network's output; None to find it, see
            :class:`~lightning_ptq.calibration.outputs.OutputReader`.
        memory_limit: Limit of the activations in memory.
        seed: Seed of the choice of held-out samples.
        progress: Called with the layers done, the layers in total, and the layer's name.
        journal: Where the finished step is saved, so that an interrupted run resumes; by default nowhere.

    Raises:
        StatisticsError: If there are fewer than two samples.
        SensitivityError: If the network's output cannot be read or compared.
    """
    target: _Target = "every" if every_layer else "others"
    acceptance = {"held_out": held_out, "measure": measure, "output": output, "seed": seed, "journal": journal}
    return _normalize("para_normalization", calibration, target, memory_limit, progress, acceptance)


def _normalize(
    step: str,
    calibration: Calibration,
    target: _Target,
    memory_limit: str | int,
    progress: Progress,
    acceptance: dict[str, Any],
) -> StatisticsResult:
    def work(part: Calibration) -> Changes:
        with ActivationStore(limit_of(memory_limit, part)) as store:
            return _Normalizer(part, target, store, progress).run()

    return accept_if_better(step, calibration, work, **acceptance)


class _Normalizer:
    """One pass over the layers in execution order."""

    def __init__(self, calibration: Calibration, target: _Target, store: ActivationStore, progress: Progress) -> None:
        self.calibration, self.store, self.progress = calibration, store, progress
        self.modules = dict(calibration.module.named_modules())
        entered = list(calibration.trace.calls)  # in the order of the first calls
        units = find_units(calibration.module, calibration.trace, "layer")
        units += _unfolded(calibration) if target == "batch_norm" else []
        # Unfolded batch norms take their place among the layers by execution order.
        self.units = sorted(units, key=lambda unit: entered.index(unit.name))
        keep = keep_outputs(calibration, self.units, store.limit)
        self.replay = Replay(calibration, self.units, store, "quantized", keep=keep)
        # A norm that went into the layers after it says nothing about their outputs.
        ahead = folded_ahead(calibration.module, calibration.folded)
        norms = {layer: norm for norm, layer in calibration.folded.items() if norm not in ahead}
        self.norms = norms if target == "batch_norm" else {}
        others = set() if target == "batch_norm" else set(calibration.layers)
        # Layers with a folded norm have the norm's statistics as their target, unless every layer is wanted.
        others = others - set(norms) if target == "others" else others
        linear = {name for name in others if calibration.layers[name].is_linear}
        self.others = linear
        self.changes = Changes()
        self.changes.skipped.update(dict.fromkeys(sorted(others - linear), "its output is not linear in its weights"))

    def run(self) -> Changes:
        """Correct one layer after the other; return what was changed."""
        targets = self._targets()
        for index, unit in enumerate(self.units):
            self.progress(index, len(self.units), unit.name)
            calls = self.replay.inputs(index)
            try:
                with unit_errors():
                    self._correct_unit(unit, calls, targets.get(unit.name))
                    if self.replay.keep:  # outputs of the corrected layer are the inputs of later ones
                        self.replay.finish(index, self._outputs(unit, calls))
            except UnitError as error:
                self.changes.skipped[unit.name] = f"it cannot run outside the network's forward: {error}"
        self.progress(len(self.units), len(self.units), "")
        return self.changes

    def _correct_unit(self, unit: Unit, calls: list[list[Call]], target: tuple[Tensor, Tensor] | None) -> None:
        """Correct a layer that has a target, or a batch norm."""
        if target is not None:
            statistics = self._statistics(unit, calls)
            if statistics is None:
                self.changes.skipped[unit.name] = "no sample reaches it"
            else:
                self._correct(unit.name, unit.layers[unit.name], statistics, target)
        elif unit.name in self.others:
            self.changes.skipped[unit.name] = "no sample reaches it"
        elif isinstance(unit.module, _BatchNorm) and self._reestimate(unit.module, calls):
            self.changes.layers.append(unit.name)

    def _targets(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mean and the standard deviation that each layer's output should have."""
        targets: dict[str, tuple[Tensor, Tensor]] = {}
        for name, norm in self.norms.items():
            weight, bias = (getattr(self.modules[norm], key, None) for key in ("weight", "bias"))
            if weight is not None and bias is not None:
                targets[name] = bias.detach().double(), weight.detach().double().abs()
        watched = watch_outputs(self.calibration, sorted(self.others), "float") if self.others else {}
        targets.update({name: (cast(Tensor, s.mean), s.deviation) for name, s in watched.items() if s.count})
        return targets

    def _statistics(self, unit: Unit, calls: list[list[Call]]) -> ChannelStatistics | None:
        """Return the statistics of the unit's outputs; None if it has none."""
        statistics: ChannelStatistics | None = None
        for batch, call in self._by_batch(calls):
            layer = unit.layers[unit.name]
            output = layer.output_tensor(self._run(unit, call))
            statistics = statistics or ChannelStatistics(layer.channel_dim(output))
            statistics.update(output, self.calibration.padding(batch))
        return statistics if statistics is not None and statistics.count else None

    @staticmethod
    def _by_batch(calls: list[list[Call]]) -> Iterator[tuple[int, Call]]:
        return ((batch, call) for batch, of_batch in enumerate(calls) for call in of_batch)

    def _outputs(self, unit: Unit, calls: list[list[Call]]) -> list[list[Call]]:
        """Return the outputs by batch and call, each with the random state after the call."""
        isolation, after = self.calibration.isolation, list[RandomState | None]()
        watched = {"": unit.module} if isolation.draws else {}

        def output(call: Call) -> Call:
            with hooked(watched, after=lambda *_: after.append(isolation.random_state())):
                value = self._run(unit, call)
            return Call.of(value, self.store.put, after[-1] if after else None)

        return [[output(call) for call in of_batch] for of_batch in calls]

    def _run(self, unit: Unit, call: Call) -> Any:
        args, kwargs = call.tree()
        return run_unit(unit.module, args, kwargs, "quantized", self.calibration.isolation, call.random)

    @torch.no_grad()
    def _correct(
        self, name: str, layer: QuantizedOp, statistics: ChannelStatistics, target: tuple[Tensor, Tensor]
    ) -> None:
        """Give the layer's output the target's statistics: ``y · factor + shift`` through its scales and its bias."""
        if not (layer.is_linear and layer.bias_names):
            why = "it has no bias" if layer.is_linear or layer.is_lookup else "its output is not linear in its weights"
            self.changes.skipped[name] = why
            return
        mean, deviation = target
        factor, note = _factor(layer, statistics.deviation, deviation)
        if note:
            self.changes.skipped[name] = note
        which = layer.bias_names[0]
        present = layer._parameters.get(which)
        bias = mean - cast(Tensor, statistics.mean) * factor
        if present is not None:
            bias += present.double() * factor
        weights = layer.weights
        for weight_name, quantizer in layer.weight_quantizers.items() if not layer.tied else ():
            per_scale, weight = quantizer.layout.of_channels(factor), weights[weight_name]
            if per_scale is not None:  # weight and scale grow together, so the integers stay
                quantizer.scale.mul_(per_scale.to(quantizer.scale.dtype))
                weight.copy_(layer.scale_channels(weight_name, weight, factor.to(weight.dtype)))
        if present is None:
            layer.set_parameters({which: bias.to(next(iter(weights.values())).dtype)})
        else:
            present.copy_(bias)
        self.changes.layers.append(name)

    @torch.no_grad()
    def _reestimate(self, norm: _BatchNorm, calls: list[list[Call]]) -> bool:
        """Set the running statistics of an unfolded batch norm from its inputs in the quantized network, if any."""
        statistics = ChannelStatistics(1)
        for batch, call in self._by_batch(calls):
            args, kwargs = call.tree()
            statistics.update(first_argument(args, kwargs), self.calibration.padding(batch))
        if not statistics.count:
            return False
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        for tensor in (mean, variance):
            self.calibration.prepared.remember(tensor)
        mean.copy_(cast(Tensor, statistics.mean))
        # As in torch, the running variance is the unbiased estimate.
        variance.copy_(statistics.deviation.square() * (statistics.count / max(statistics.count - 1, 1)))
        return True


def _unfolded(calibration: Calibration) -> list[Unit]:
    """Return the batch norms that ran and still normalize with running statistics, as units."""
    calls = calibration.trace.calls
    return [
        Unit(name, module, {}, calls[name])
        for name, module in calibration.module.named_modules()
        if isinstance(module, _BatchNorm) and calls.get(name) and module.running_mean is not None
        and not is_folded(module)
    ]  # fmt: skip


def _factor(layer: QuantizedOp, deviation: Tensor, wanted: Tensor) -> tuple[Tensor, str]:
    """Return the factor of each channel, and the reason where it is 1.

    Args:
        layer: The layer.
        deviation: Standard deviation of its output, (channels,).
        wanted: Standard deviation that it should have, (channels,).
    """
    factor = wanted / deviation  # infinite or NaN for a constant channel, which `usable` excludes
    usable = (deviation > 1e-6 * wanted) & (wanted > 0)
    if layer.tied:
        return torch.ones_like(factor), "its weight is shared: mean only"
    if any(quantizer.layout.of_channels(factor) is None for quantizer in layer.weight_quantizers.values()):
        return torch.ones_like(factor), "its channels share one scale: mean only"
    note = "" if bool(usable.all()) else f"{int((~usable).sum())} of its channels are constant: mean only"
    return torch.where(usable, factor, torch.ones_like(factor)), note
