"""Folding batch norms into the layers before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_ptq.errors import (
    UnfoldedBatchNormWarning,
    warn,
)
from lightning_ptq.network.layers import FoldableBatchNorm, QuantLayer
from lightning_ptq.network.trace import Trace, first_argument


def fold_batch_norms(module: nn.Module, trace: Trace, run: Callable[[], Any]) -> dict[str, str]:
    """Fold batch norms into the layers whose outputs they normalise, where that changes nothing.

    The pairs are those that ``trace`` saw. Each is proved by a forward: the inputs of all later layers and the result
    must stay the same. A pair that fails is taken back.

    Args:
        module: A prepared module in eval mode, before any quantizer is attached.
        trace: A watched forward of it.
        run: The forward again, on the same batch; its result is compared too.

    Returns:
        The layer that each folded batch norm went into, by qualified names.

    Warns:
        UnfoldedBatchNormWarning: Naming the batch norms that stay, and why.
    """
    modules = dict(module.named_modules())
    norms = {n: m for n, m in modules.items() if isinstance(m, FoldableBatchNorm) and trace.calls.get(n)}
    refused: dict[str, str] = {}
    pairs: dict[str, str] = {}
    for name, norm in norms.items():
        layer = modules.get(trace.batch_norm_after.get(name, ""))
        if not isinstance(layer, QuantLayer):
            refused[name] = "it does not directly follow a layer that runs once"
        elif cast(Any, norm).running_mean is None:
            refused[name] = "it has no running statistics"
        elif layer.tied:
            refused[name] = "the layer before it shares its weight"
        else:
            pairs[name] = trace.batch_norm_after[name]
    expected = _fingerprint(module, run)
    undo = {name: _fold(modules[layer], modules[name]) for name, layer in pairs.items()}
    if pairs and not _close(_fingerprint(module, run), expected):
        for name in reversed(pairs):  # two batch norms may have gone into one layer
            undo[name]()
        kept = {}
        for name, layer in pairs.items():  # one at a time, keeping those that hold
            take_back = _fold(modules[layer], modules[name])
            if _close(_fingerprint(module, run), expected):
                kept[name] = layer
            else:
                take_back()
                refused[name] = f"folding it into {layer} changes the model's output"
        pairs = kept
    if refused:
        listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
        warn(f"batch norms that stay float layers: {listed}.", UnfoldedBatchNormWarning, 2, details=refused)
    return pairs


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> Callable[[], None]:
    """Fold ``norm`` into ``layer``; returns what takes it back."""
    parameters = dict(layer._parameters)
    deviation = (norm.running_var + norm.eps).sqrt()
    gain = (norm.weight if norm.affine else torch.ones_like(deviation)) / deviation
    shift = norm.bias if norm.affine else torch.zeros_like(deviation)
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.set_weight(layer.scale_channels(layer.weight, gain), (bias - norm.running_mean) * gain + shift)
    norm.set_folded(True)

    def undo() -> None:
        layer._parameters.update(parameters)
        norm.set_folded(False)

    return undo


def _fingerprint(module: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """Sum and absolute sum of every layer's input, and the result itself."""
    sums: list[Tensor] = []

    def record(layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_argument(args, kwargs).detach().double()
        sums.append(torch.stack([x.sum(), x.abs().sum()]) / x.numel())

    layers = [layer for layer in module.modules() if isinstance(layer, QuantLayer)]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    tensors = [leaf.detach().double() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return sums + [t for t in tensors if t.numel()]


def _close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> bool:
    if len(found) != len(expected):
        return False
    return all(
        bool((f - e).abs().max() <= tolerance * e.abs().max() + 1e-6) for f, e in zip(found, expected, strict=True)
    )
