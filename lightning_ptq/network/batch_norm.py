"""Fold batch norms into the layers before or after them, where that is proven to change nothing.

The algebra follows from who reads which values. Classes with a forward of their own are tested with random inputs,
alone: an activation that does nothing on one batch of data does something there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from lightning_ptq.errors import UnfoldedBatchNormWarning, warn
from lightning_ptq.network.fold_check import RecordedCalls, close, why_not
from lightning_ptq.network.fold_plan import Fold, plan_folds
from lightning_ptq.network.foldable import NORM_TENSORS, FoldableBatchNorm, folded_norms, is_folded
from lightning_ptq.network.op import quantized_ops
from lightning_ptq.network.trace import Trace
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.structure import mean_and_magnitude, tensors_in

__all__ = ["NORM_TENSORS", "FoldableBatchNorm", "fold_batch_norms", "folded_ahead", "folded_norms", "is_folded"]

_CHANGES = "changes the model's output"


def fold_batch_norms(module: nn.Module, traces: Trace | Sequence[Trace], run: Callable[[], Any]) -> dict[str, str]:
    """Fold batch norms into the layers before or after them, where that changes nothing.

    The traces show which values feed which modules, so that folding is a matter of algebra; layers and norms with a
    forward of their own are tested with random inputs. At last a forward compares the inputs of all layers and the
    result. A norm that fails is unfolded again.

    Args:
        module: A prepared module in eval mode, before any quantizer is attached.
        traces: The traces of the forward on all batches.
        run: The forward on some batches; its result is compared too.

    Returns:
        The layer that each folded batch norm went into, by qualified names; several layers after it are separated by
        ``", "``.

    Warns:
        UnfoldedBatchNormWarning: Naming the batch norms that stay, and why.
    """
    modules = dict(module.named_modules())
    distinct = {id(trace): trace for trace in ([traces] if isinstance(traces, Trace) else traces)}
    folds, refused = plan_folds(modules, list(distinct.values()))
    calls = RecordedCalls(modules, folds.values())
    expected = fingerprint(module, run, calls)
    for name in list(folds):
        if why := why_not(folds[name], modules, calls):
            refused[name] = f"folding it into {', '.join(folds[name].layers)} {_CHANGES} ({why})"
            del folds[name]
    unfold = {name: fold.apply(modules) for name, fold in folds.items()}
    if folds and not same(fingerprint(module, run), expected, _changed(folds.values())):
        for name in reversed(folds):  # last first: two batch norms may have gone into one layer
            unfold[name]()
        kept: dict[str, Fold] = {}
        for name, fold in folds.items():  # one at a time, to keep those that hold
            unfold_again = fold.apply(modules)
            if same(fingerprint(module, run), expected, _changed([*kept.values(), fold])):
                kept[name] = fold
            else:
                unfold_again()
                refused[name] = f"folding it into {', '.join(fold.layers)} {_CHANGES}"
        folds = kept
    if refused:
        listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
        warn(f"batch norms that stay float layers: {listed}.", UnfoldedBatchNormWarning, 2, details=refused)
    return {name: ", ".join(fold.layers) for name, fold in folds.items()}


def folded_ahead(module: nn.Module, folded: dict[str, str]) -> dict[str, list[str]]:
    """Return the layers after each batch norm that was folded into these; their inputs are those of the norm now.

    Args:
        module: The module.
        folded: What :func:`fold_batch_norms` returned.
    """
    ahead = {name: cast(FoldableBatchNorm, module.get_submodule(name)).is_folded_ahead for name in folded}
    return {name: layers.split(", ") for name, layers in folded.items() if ahead[name]}


def _changed(folds: Iterable[Fold]) -> set[str]:
    """Return the layers after folded norms; their inputs are those of the norms."""
    return {layer for fold in folds if fold.ahead for layer in fold.layers}


def fingerprint(
    module: nn.Module, run: Callable[[], Any], calls: RecordedCalls | None = None
) -> dict[str, list[Tensor]]:
    """Return sum and absolute sum of every layer's inputs, and the result itself."""
    sums: dict[str, list[Tensor]] = {}

    def record(name: str, op: Any, args: Any, kwargs: Any) -> None:
        for tensor in op.input_tensors(args, kwargs).values():
            if tensor.numel():
                sums.setdefault(name, []).append(mean_and_magnitude(tensor))

    with ExitStack() as stack:
        stack.enter_context(hooked(quantized_ops(module), before=record))
        if calls is not None:
            stack.enter_context(hooked(calls.modules, before=calls.record))
        result = run()
    tensors = [tensor.detach().double() for tensor in tensors_in(result)]
    return {**sums, "": [t for t in tensors if t.numel()]}


def same(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], changed: Collection[str]) -> bool:
    """Return True if two fingerprints agree, but for the inputs of layers that are expected to differ."""
    return found.keys() == expected.keys() and all(
        len(found[name]) == len(expected[name])
        and all(close(f, e, 1e-3) for f, e in zip(found[name], expected[name], strict=True))
        for name in expected
        if name not in changed
    )
