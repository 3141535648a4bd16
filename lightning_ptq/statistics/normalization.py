"""Statistics tuning: per-channel means and standard deviations brought back to what they were before quantization.

The integers stay as they are: a layer's output is changed by a factor and a shift per channel, which go into its scales
and its bias (Hubara et al., ICML 2021, sec. 5: batch-norm tuning and para-normalization).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.activations.calls import Call, run_unit
from lightning_ptq.activations.memory_plan import keep_outputs
from lightning_ptq.activations.replay import Replay
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.outputs import ChooseOutput
from lightning_ptq.network.layers import FoldableBatchNorm, QuantLayer
from lightning_ptq.network.trace import first_argument
from lightning_ptq.network.units import Unit, find_units
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.runtime.journal import Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT
from lightning_ptq.runtime.progress import Progress
from lightning_ptq.statistics.acceptance import Changes, StatisticsResult, judged
from lightning_ptq.statistics.channel_statistics import ChannelStatistics, channel_dim, watch_outputs

_Target = Literal["batch_norm", "others", "every"]


def reestimate_batch_norm(
    calibration: Calibration,
    *,
    held_out: float = 0.25,
    measure: str = "kl",
    output: ChooseOutput | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = lambda done, total, text: None,
    journal: Journal | None = None,
) -> StatisticsResult:
    """Bring the outputs of layers whose batch norm was folded back to the norm's statistics.

    On the calibration set, the quantized layer's output gets mean ``beta`` and standard deviation ``|gamma|`` in every
    channel again. Batch norms that were not folded get running statistics of the quantized network. In execution
    order, each layer seeing corrected predecessors; every sample counts the same.

    Args:
        calibration: A calibrated (and possibly tuned) module, changed in place.
        held_out: Share of the samples that judge the step and are not used for it.
        measure: Between the outputs of the float and the quantized network: ``"kl"``, ``"mse"`` or ``"loss"``.
        output: Which tensor of the network's output; see :class:`~lightning_ptq.calibration.outputs.OutputReader`.
        memory_limit: For activations.
        seed: Of the choice of held-out samples.
        progress: Called with layers done, layers in all, and the layer's name.
        journal: Where the finished step is kept, and found again.

    Raises:
        StatisticsError: If there are fewer than two samples.
    """
    judging = {"held_out": held_out, "measure": measure, "output": output, "seed": seed, "journal": journal}
    return _normalize("batch_norm", calibration, "batch_norm", memory_limit, progress, judging)


def para_normalize(
    calibration: Calibration,
    *,
    every_layer: bool = False,
    held_out: float = 0.25,
    measure: str = "kl",
    output: ChooseOutput | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = lambda done, total, text: None,
    journal: Journal | None = None,
) -> StatisticsResult:
    """Bring the outputs of layers without a batch norm (transformers) back to the float layers' statistics.

    On the calibration set, the quantized layer's output gets the mean and the standard deviation of the float layer's
    output in every channel. In execution order, each layer seeing corrected predecessors.

    Args:
        calibration: As in :func:`reestimate_batch_norm`, as are the rest.
        every_layer: Also the layers whose batch norm was folded, in place of the norm's statistics.
        held_out: Share of the samples that judge the step.
        measure: Between the networks' outputs.
        output: Which tensor of the output.
        memory_limit: For activations.
        seed: Of the held-out samples.
        progress: As above.
        journal: As above.

    Raises:
        StatisticsError: If there are fewer than two samples.
    """
    target: _Target = "every" if every_layer else "others"
    judging = {"held_out": held_out, "measure": measure, "output": output, "seed": seed, "journal": journal}
    return _normalize("para_normalization", calibration, target, memory_limit, progress, judging)


def _normalize(
    step: str,
    calibration: Calibration,
    target: _Target,
    memory_limit: str | int,
    progress: Progress,
    judging: dict[str, Any],
) -> StatisticsResult:
    def work(part: Calibration) -> Changes:
        with ActivationStore(memory_limit) as store:
            return _Normalizer(part, target, store, progress).run()

    return judged(step, calibration, work, **judging)


class _Normalizer:
    """One pass over the layers in execution order."""

    def __init__(self, calibration: Calibration, target: _Target, store: ActivationStore, progress: Progress) -> None:
        self.calibration, self.store, self.progress = calibration, store, progress
        self.modules = dict(calibration.module.named_modules())
        entered = [event.name for event in calibration.trace.events if event.kind == "enter"]
        units = find_units(calibration.module, calibration.trace, "layer")
        units += _unfolded(calibration) if target == "batch_norm" else []
        self.units = sorted(units, key=lambda unit: entered.index(unit.name))
        keep = keep_outputs(calibration, self.units, store.limit)
        self.replay = Replay(calibration, self.units, store, "quantized", keep=keep)
        norms = {layer: norm for norm, layer in calibration.folded.items()}
        self.norms = norms if target == "batch_norm" else {}
        others = set() if target == "batch_norm" else set(calibration.layers)
        self.others = others - set(norms) if target == "others" else others
        self.changes = Changes()

    def run(self) -> Changes:
        targets = self._targets()
        for index, unit in enumerate(self.units):
            self.progress(index, len(self.units), unit.name)
            calls = self.replay.inputs(index)
            if unit.name in targets:
                self._correct(unit.name, unit.layers[unit.name], self._statistics(unit, calls), targets[unit.name])
            elif isinstance(unit.module, _BatchNorm):
                self._reestimate(unit.module, calls)
                self.changes.layers.append(unit.name)
            if self.replay.keep:
                self.replay.finish(index, self._outputs(unit, calls))
        self.progress(len(self.units), len(self.units), "")
        return self.changes

    def _targets(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation that each wanted layer's output should have."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, norm in self.norms.items():
            batch_norm = cast(_BatchNorm, self.modules[norm])
            if batch_norm.affine:
                found[name] = batch_norm.bias.detach().double(), batch_norm.weight.detach().double().abs()
        watched = watch_outputs(self.calibration, sorted(self.others), "float") if self.others else {}
        found.update({n: (cast(Tensor, s.mean), s.deviation) for n, s in watched.items()})
        return found

    def _statistics(self, unit: Unit, calls: list[list[Call]]) -> ChannelStatistics:
        found: ChannelStatistics | None = None
        for call in (call for of_batch in calls for call in of_batch):
            output = self._run(unit, call)
            found = found or ChannelStatistics(channel_dim(unit.layers[unit.name], output))
            found.update(output)
        return cast(ChannelStatistics, found)

    def _outputs(self, unit: Unit, calls: list[list[Call]]) -> list[list[Call]]:
        return [[Call.of(self._run(unit, call), self.store.put) for call in of_batch] for of_batch in calls]

    def _run(self, unit: Unit, call: Call) -> Any:
        args, kwargs = call.tree()
        return run_unit(unit.module, args, kwargs, "quantized")

    @torch.no_grad()
    def _correct(self, name: str, layer: QuantLayer, found: ChannelStatistics, target: tuple[Tensor, Tensor]) -> None:
        """Give the layer's output the target's statistics: ``y · f + shift`` through its scales and its bias."""
        mean, deviation = target
        factor, note = _factor(layer, found.deviation, deviation)
        if note:
            self.changes.skipped[name] = note
        bias = mean - cast(Tensor, found.mean) * factor
        if layer.bias is not None:
            bias += layer.bias.double() * factor
        scale = cast(FakeQuantize, layer.weight_fake_quant).scale
        if not layer.tied and scale.numel() == factor.numel():
            scale.mul_(factor.view_as(scale).to(scale.dtype))
            layer.weight.copy_(layer.scale_channels(layer.weight, factor.to(layer.weight.dtype)))
        if layer.bias is None:
            layer.set_weight(layer.weight, bias.to(layer.weight.dtype), keep_weight=True)
        else:
            layer.bias.copy_(bias)
        self.changes.layers.append(name)

    @torch.no_grad()
    def _reestimate(self, norm: _BatchNorm, calls: list[list[Call]]) -> None:
        """Running statistics of an unfolded batch norm from its inputs in the quantized network."""
        found = ChannelStatistics(1)
        for call in (call for of_batch in calls for call in of_batch):
            args, kwargs = call.tree()
            found.update(first_argument(args, kwargs))
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        for tensor in (mean, variance):
            self.calibration.prepared.remember(tensor)
        mean.copy_(cast(Tensor, found.mean))
        variance.copy_(found.deviation.square() * (found.count / max(found.count - 1, 1)))


def _unfolded(calibration: Calibration) -> list[Unit]:
    """Batch norms that ran and still normalize with running statistics."""
    calls = calibration.trace.calls
    return [
        Unit(name, module, {}, calls[name])
        for name, module in calibration.module.named_modules()
        if isinstance(module, _BatchNorm) and calls.get(name) and module.running_mean is not None
        and not (isinstance(module, FoldableBatchNorm) and module.is_folded)
    ]  # fmt: skip


def _factor(layer: QuantLayer, found: Tensor, wanted: Tensor) -> tuple[Tensor, str]:
    """By what each channel is to be multiplied, and why where it is not; 1 where a channel is constant."""
    factor = wanted / found
    usable = (found > 1e-6 * wanted) & (wanted > 0)
    if layer.tied:
        return torch.ones_like(factor), "its weight is shared: mean only"
    if cast(FakeQuantize, layer.weight_fake_quant).scale.numel() != factor.numel():
        return torch.ones_like(factor), "its channels share one scale: mean only"
    note = "" if bool(usable.all()) else f"{int((~usable).sum())} of its channels are constant: mean only"
    return torch.where(usable, factor, torch.ones_like(factor)), note
