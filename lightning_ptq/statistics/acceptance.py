"""Doing a step on a part of the samples, and keeping it only if the held-out rest says that it helped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batches import Batches, is_divisible, take_rows
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import batch_size, eval_mode
from lightning_ptq.calibration.outputs import ChooseOutput, Meter
from lightning_ptq.errors import QConfigError, StatisticsError
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.runtime.journal import Journal, Piece


@dataclass(frozen=True)
class StatisticsResult:
    """What became of one step of statistics tuning.

    Attributes:
        step: Which one: ``"batch_norm"``, ``"para_normalization"`` or ``"bias"``.
        before: The measure between the outputs of the float and the quantized network on held-out samples.
        after: The same behind the step.
        accepted: False if the step did not lower it by more than twice the standard error over the samples, and
            everything is as it was.
        layers: The layers, or unfolded batch norms, that the step changed (or would have).
        skipped: Why others stayed as they are, by name.
    """

    step: str
    before: float
    after: float
    accepted: bool
    layers: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class Changes:
    """What a step has done, for its result."""

    layers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def judged(
    step: str,
    calibration: Calibration,
    work: Callable[[Calibration], Changes],
    *,
    held_out: float,
    measure: str,
    output: ChooseOutput | None,
    seed: int,
    journal: Journal | None = None,
) -> StatisticsResult:
    """Do ``work`` on a part of the samples; take it back unless the held-out rest says that it helped.

    What came of it is kept in the journal, and taken from there by a run that was cut off behind it.
    """
    ranks, module = calibration.ranks, calibration.module
    known = ranks.first(lambda: journal.read(step) if journal else None)
    if known is not None:
        _put(calibration, known.states.get(step, {}))
        return StatisticsResult(**{**known.facts, "layers": tuple(known.facts["layers"])})
    tune, rest = split_samples(calibration, held_out, seed)
    with eval_mode(module):
        meter = Meter(rest, measure, output)
        first = meter.each()
        saved = {key: value.detach().clone() for key, value in _tensors(module).items()}
        done = Changes()
        try:
            done = work(tune)
            ranks.spread(_tensors(module).values())
            second = meter.each()
        except BaseException:
            _put_back(module, saved)
            raise
        before, after = (meter.mean(values) for values in (first, second))
        accepted = is_better(torch.cat(second), torch.cat(first))
        if not accepted:
            _put_back(module, saved)
    result = StatisticsResult(step, before, after, accepted, tuple(done.layers), done.skipped)
    if journal is not None and ranks.rank == 0:
        now = _tensors(module)
        moved = {key: value for key, value in now.items() if key not in saved or not torch.equal(value, saved[key])}
        journal.write(step, Piece({step: moved}, asdict(result)))
    return result


def is_better(after: Tensor, before: Tensor) -> bool:
    """Whether the mean is lower by more than twice its standard error, sample by sample.

    A few samples on which the network is unsure make up most of a divergence; a step that happens to suit them is not
    worth having.

    Example:
        >>> before = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> is_better(before - 0.1, before), is_better(torch.tensor([0.9, 2.1, 3.1, 2.0]), before)
        (True, False)
    """
    gain = before - after
    noise = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else gain.new_zeros(())
    return bool(gain.mean() > 2 * noise)


def split_samples(calibration: Calibration, held_out: float, seed: int) -> tuple[Calibration, Calibration]:
    """The calibration with samples to work on, and with the others: whole batches, or parts of one if there is one.

    Raises:
        StatisticsError: If there are fewer than two samples, or one batch that cannot be divided.
        QConfigError: If the share is not in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise QConfigError(f"held_out must lie in [0, 1), got {held_out!r}.")
    if calibration.samples < 2:
        raise StatisticsError(
            f"statistics need two samples or more, the calibration set has {calibration.samples}. Give it more samples."
        )
    if not held_out:
        return calibration, calibration
    count = len(calibration.batches)
    if count == 1:
        samples = calibration.samples
        cut = samples - min(max(round(samples * held_out), 1), samples - 1)
        tune, rest = (_rows(calibration.batches[0], rows) for rows in (slice(0, cut), slice(cut, samples)))
        return _with(calibration, [tune], [calibration.trace]), _with(calibration, [rest], [calibration.trace])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(max(round(count * held_out), 1), count - 1)

    def part(indices: list[int]) -> Calibration:
        chosen = sorted(indices)
        return _with(calibration, [calibration.batches[i] for i in chosen], [calibration.traces[i] for i in chosen])

    return part(order[cut:]), part(order[:cut])


def _with(calibration: Calibration, batches: list[Any], traces: list[Any]) -> Calibration:
    return replace(calibration, batches=Batches(batches), traces=traces, samples=sum(map(batch_size, batches)))


def _rows(batch: Any, rows: slice) -> Any:
    if not is_divisible(batch):
        raise StatisticsError(
            "the calibration set is one batch that cannot be divided, so nothing can be held out. Use a smaller batch"
            " size, or held_out=0 to judge on the samples that are tuned on."
        )
    return take_rows(batch, rows)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


@torch.no_grad()
def _put(calibration: Calibration, values: dict[str, Tensor]) -> None:
    """Set tensors of the module; a bias that is not there yet is added to its layer."""
    here = _tensors(calibration.module)
    for key, value in values.items():
        if key in here:
            here[key].copy_(value)
        else:
            layer = cast(QuantLayer, calibration.module.get_submodule(key.rpartition(".")[0]))
            layer.set_weight(layer.weight, value.to(calibration.device), keep_weight=True)


@torch.no_grad()
def _put_back(module: nn.Module, saved: dict[str, Tensor]) -> None:
    for key, value in _tensors(module).items():
        if key in saved:
            value.copy_(saved[key])
        else:  # a bias that a step added
            module.get_submodule(key.rpartition(".")[0])._parameters["bias"] = None
