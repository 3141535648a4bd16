"""Doing a step on a part of the samples, and keeping it only if the held-out rest says that it helped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_ptq.calibration import Calibration
from lightning_ptq.errors import QConfigError, StatisticsError
from lightning_ptq.forward import batch_size, eval_mode
from lightning_ptq.outputs import ChooseOutput, Meter


@dataclass(frozen=True)
class StatisticsResult:
    """What became of one step of statistics tuning.

    Attributes:
        step: Which one: ``"batch_norm"``, ``"para_normalization"`` or ``"bias"``.
        before: The measure between the outputs of the float and the quantized network on held-out samples.
        after: The same behind the step.
        accepted: False if the step did not lower it and everything is as it was.
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
) -> StatisticsResult:
    """Do ``work`` on a part of the samples; take it back unless the held-out rest says that it helped."""
    tune, rest = split_samples(calibration, held_out, seed)
    module = calibration.module
    with eval_mode(module):
        meter = Meter(rest, measure, output)
        before = meter.mean()
        saved = {key: value.detach().clone() for key, value in _tensors(module).items()}
        done = Changes()
        try:
            done = work(tune)
            after = meter.mean()
        except BaseException:
            _put_back(module, saved)
            raise
        accepted = after < before
        if not accepted:
            _put_back(module, saved)
    return StatisticsResult(step, before, after, accepted, tuple(done.layers), done.skipped)


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
        return tuple(_with(calibration, [_rows(calibration.batches[0], part)], [calibration.trace])
                     for part in (slice(0, cut), slice(cut, samples)))  # type: ignore[return-value]  # fmt: skip
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(max(round(count * held_out), 1), count - 1)

    def part(indices: list[int]) -> Calibration:
        chosen = sorted(indices)
        return _with(calibration, [calibration.batches[i] for i in chosen], [calibration.traces[i] for i in chosen])

    return part(order[cut:]), part(order[:cut])


def _with(calibration: Calibration, batches: list[Any], traces: list[Any]) -> Calibration:
    return replace(calibration, batches=batches, traces=traces, samples=sum(map(batch_size, batches)))


def _rows(batch: Any, rows: slice) -> Any:
    leaves, spec = tree_flatten(batch)
    size = batch_size(batch)
    if any(not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != size for leaf in leaves):
        raise StatisticsError(
            "the calibration set is one batch that cannot be divided, so nothing can be held out. Use a smaller batch"
            " size, or held_out=0 to judge on the samples that are tuned on."
        )
    return tree_unflatten([leaf[rows] for leaf in leaves], spec)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


@torch.no_grad()
def _put_back(module: nn.Module, saved: dict[str, Tensor]) -> None:
    for key, value in _tensors(module).items():
        if key in saved:
            value.copy_(saved[key])
        else:  # a bias that a step added
            module.get_submodule(key.rpartition(".")[0])._parameters["bias"] = None
