"""Accept a step of statistics tuning only if it helps on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq import arguments
from lightning_ptq.arguments import number, one_of
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.batches import Batches
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.checks import check_calibration
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.calibration.outputs import ChooseOutput, Meter
from lightning_ptq.errors import RolledBackWarning, SkippedStepWarning, StatisticsError, warn
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.runtime.eager import no_inference_mode
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal, JournalEntry
from lightning_ptq.runtime.patching import TensorSnapshot


@dataclass(frozen=True)
class StatisticsResult:
    """The outcome of one step of statistics tuning.

    Attributes:
        step: ``"batch_norm"``, ``"para_normalization"`` or ``"bias"``.
        before: The measure between the outputs of the float and the quantized network on held-out samples. NaN, as
            after, if the step was left out.
        after: The same after the step.
        accepted: False if the step did not lower it by more than twice the standard error over the samples, so that it
            was undone, or if it was left out.
        layers: The layers, or unfolded batch norms, that the step changed (or would have).
        skipped: Why others were not changed, by name.
    """

    step: str
    before: float
    after: float
    accepted: bool
    layers: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Changes:
    """What a step changed, for its result."""

    layers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def accept_if_better(
    step: str,
    calibration: Calibration,
    work: Callable[[Calibration], Changes],
    *,
    held_out: float,
    measure: str,
    output: ChooseOutput | None,
    seed: int,
    journal: Journal = NO_JOURNAL,
) -> StatisticsResult:
    """Do ``work`` on a part of the samples, and undo it unless it helps on the held-out rest.

    The outcome is journaled; a resumed run reads it back. Where the measure is not finite before the step, it is left
    out.

    Raises:
        SensitivityError: If the measure cannot be taken.

    Warns:
        RolledBackWarning: If the measure is not finite after the step.
        SkippedStepWarning: If it is not finite before.
    """
    seed, held_out = check_acceptance(calibration, seed, held_out)
    one_of("measure", measure, ("kl", "mse", "loss"))
    ranks, module = calibration.ranks, calibration.module
    entry = ranks.on_rank_zero(lambda: journal.read(step))
    if entry is not None:
        _restore_entry(calibration, entry.states.get(step, {}))
        return StatisticsResult(**{**entry.facts, "layers": tuple(entry.facts["layers"])})
    tuned, rest = split_samples(calibration, held_out, seed)
    with no_inference_mode(), eval_mode(module):
        meter = Meter(rest, measure, output, finite=False)
        values_before = meter.each()
        if not math.isfinite(before := meter.mean(values_before)):
            return left_out(step, f"the {measure} of the outputs is {before} before it, on held-out samples.")
        saved = TensorSnapshot(_tensors(module))
        try:
            changes = work(tuned)
            calibration.round_biases()
            ranks.broadcast(_tensors(module).values())  # so that all ranks measure, and keep, the same bytes
            values_after = meter.each()
        except BaseException:  # an interrupt too: the module must not stay half changed
            _undo(module, saved)
            raise
        after = meter.mean(values_after)
        accepted = math.isfinite(after) and is_better(torch.cat(values_after), torch.cat(values_before))
        if not accepted:
            _undo(module, saved)
    if not math.isfinite(after):
        warn(
            f"the step {step!r} of statistics tuning was undone: with it, the {measure} of the outputs is {after}.",
            RolledBackWarning,
            stacklevel=3,
        )
    result = StatisticsResult(step, before, after, accepted, tuple(changes.layers), changes.skipped)
    if ranks.rank == 0:
        journal.write(step, JournalEntry({step: saved.changed(_tensors(module))}, asdict(result)))
    return result


def left_out(step: str, why: str) -> StatisticsResult:
    """Return the result of a step that was not done, and warn of it.

    Args:
        step: Name of the step.
        why: The reason, as sentences.
    """
    why = why.rstrip(".")
    warn(f"the step {step!r} of statistics tuning was left out: {why}.", SkippedStepWarning, stacklevel=3)
    return StatisticsResult(step, math.nan, math.nan, False, skipped={"every layer": why})


def check_acceptance(calibration: Calibration, seed: int, held_out: float) -> tuple[int, float]:
    """Return seed and share of held-out samples in Python's own types; raise where an argument is none."""
    check_calibration(calibration, batches=True)
    return arguments.seed(seed), number("held_out", held_out, "lie in [0, 1)", (0, 1), "0.25")


def is_better(after: Tensor, before: Tensor) -> bool:
    """Return True if the mean is lower by more than twice its standard error over the samples.

    A few samples on which the network is unsure make up most of a divergence, and a step that happens to suit them is
    not worth keeping.

    Args:
        after: Values after the step, (samples,).
        before: Values before it, (samples,).

    Example:
        >>> before = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> is_better(before - 0.1, before), is_better(torch.tensor([0.9, 2.1, 3.1, 2.0]), before)
        (True, False)
    """
    gain = before - after
    noise = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else gain.new_zeros(())
    return bool(gain.mean() > 2 * noise)


def split_samples(calibration: Calibration, held_out: float, seed: int) -> tuple[Calibration, Calibration]:
    """Return the calibration with samples to work on, and with those held out.

    Whole batches are held out, or a part of the batch if there is only one.

    Raises:
        StatisticsError: If there are fewer than two samples, or the only batch cannot be divided.
    """
    if calibration.samples < 2:
        raise StatisticsError(
            f"statistics need two samples or more, the calibration set has {calibration.samples}. Give it more samples."
        )
    if not held_out:
        return calibration, calibration
    count = len(calibration.batches)
    if count == 1:
        samples = calibration.samples
        # At least one sample on either side.
        cut = samples - min(max(round(samples * held_out), 1), samples - 1)
        tune, rest = (_rows(calibration.batches[0], rows) for rows in (slice(0, cut), slice(cut, samples)))
        return _with(calibration, tune), _with(calibration, rest)
    # Batches are drawn, since a loader may sort its samples.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(max(round(count * held_out), 1), count - 1)

    # In the order of the set, so that sums are added in the same order for any seed.
    return calibration.part(sorted(order[cut:])), calibration.part(sorted(order[:cut]))


def _with(calibration: Calibration, batch: Any) -> Calibration:
    return replace(calibration, batches=Batches([batch]), samples=Batch(batch).samples)


def _rows(batch: Any, rows: slice) -> Any:
    if not Batch(batch).is_divisible:
        raise StatisticsError(
            "the calibration set is one batch that cannot be divided, so nothing can be held out. Use a smaller batch"
            " size, or held_out=0 to decide on the samples that are tuned on."
        )
    return Batch(batch).rows(rows)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


@torch.no_grad()
def _restore_entry(calibration: Calibration, values: dict[str, Tensor]) -> None:
    """Write tensors into the module; a bias that a layer does not have yet is added."""
    tensors = _tensors(calibration.module)
    for key, value in values.items():
        if key in tensors:
            tensors[key].copy_(value)
        else:
            owner, _, name = key.rpartition(".")
            layer = cast(QuantizedOp, calibration.module.get_submodule(owner))
            layer.set_parameters({name: value.to(calibration.device)})


@torch.no_grad()
def _undo(module: nn.Module, saved: TensorSnapshot) -> None:
    """Restore the saved values, and remove the biases that the step added."""
    saved.restore()
    for key in _tensors(module):
        if key not in saved:
            owner, _, name = key.rpartition(".")
            module.get_submodule(owner)._parameters[name] = None
