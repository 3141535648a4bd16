"""Fold batch norms into the preceding layers, and verify the result by forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_ptq.errors import UnfoldedBatchNormWarning, warn
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.swapping import Swapped, register_swap
from lightning_ptq.network.trace import Trace
from lightning_ptq.runtime.patching import hooked


class FoldableBatchNorm(Swapped):
    """A batch norm that becomes the identity once it is folded into the layer before it.

    Its affine parameters stay: they are the mean and the standard deviation that each channel of the folded layer's
    output should have. The state dict records ``folded``.
    """

    prefix = "Foldable"

    def _init_swapped(self) -> None:
        self.is_folded = False

    def forward(self, input: Tensor) -> Tensor:
        """Return the batch norm's output, or the input if it is folded."""
        return input if self.is_folded else cast(Tensor, super().forward(input))

    def set_folded(self, folded: bool) -> None:
        """Switch between identity and batch norm."""
        self.is_folded = folded
        self._buffers.pop("folded", None)
        if folded:
            self.register_buffer("folded", torch.tensor(True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "running_mean" in state_dict:  # a partial state dict without this norm says nothing about it
            self.set_folded(prefix + "folded" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


register_swap(_BatchNorm, FoldableBatchNorm)


def is_folded(module: nn.Module) -> bool:
    """Return True if ``module`` is a batch norm that was folded."""
    return isinstance(module, FoldableBatchNorm) and module.is_folded


def folded_norms(module: nn.Module) -> list[str]:
    """Return the qualified names of the folded batch norms below ``module``."""
    return [name for name, child in module.named_modules() if is_folded(child)]


def fold_batch_norms(module: nn.Module, trace: Trace, run: Callable[[], Any]) -> dict[str, str]:
    """Fold batch norms into the layers whose outputs they normalize, where that changes nothing.

    The candidates are the pairs that ``trace`` saw. A forward proves them: the inputs of all layers and the result must
    stay the same. A pair that fails is unfolded again.

    Args:
        module: A prepared module in eval mode, before any quantizer is attached.
        trace: The trace of a forward.
        run: The same forward on the same batch; its result is compared too.

    Returns:
        The layer that each folded batch norm went into, by qualified names.

    Warns:
        UnfoldedBatchNormWarning: Naming the batch norms that stay, and why.
    """
    modules = dict(module.named_modules())
    pairs, refused = _candidates(modules, trace)
    expected = _fingerprint(module, run)
    unfold = {name: _fold(modules[layer], modules[name]) for name, layer in pairs.items()}
    if pairs and not _close(_fingerprint(module, run), expected):
        for name in reversed(pairs):  # last first: two batch norms may have gone into one layer
            unfold[name]()
        kept = {}
        for name, layer in pairs.items():  # one at a time, to keep those that hold
            unfold_again = _fold(modules[layer], modules[name])
            if _close(_fingerprint(module, run), expected):
                kept[name] = layer
            else:
                unfold_again()
                refused[name] = f"folding it into {layer} changes the model's output"
        pairs = kept
    if refused:
        listed = "; ".join(f"{name}: {why}" for name, why in refused.items())
        warn(f"batch norms that stay float layers: {listed}.", UnfoldedBatchNormWarning, 2, details=refused)
    return pairs


def _candidates(modules: dict[str, nn.Module], trace: Trace) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layer that each batch norm may be folded into, and why others may not."""
    pairs: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, norm in modules.items():
        if not isinstance(norm, FoldableBatchNorm) or not trace.calls.get(name):
            continue
        layer = modules.get(trace.batch_norm_after.get(name, ""))
        if not isinstance(layer, QuantizedOp) or not len(layer.weights) == len(layer.bias_names) == 1:
            refused[name] = "it does not directly follow a layer that runs once"
        elif cast(Any, norm).running_mean is None:
            refused[name] = "it has no running statistics"
        elif layer.tied:
            refused[name] = "the layer before it shares its weight"
        else:
            pairs[name] = trace.batch_norm_after[name]
    return pairs, refused


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> Callable[[], None]:
    """Fold ``norm`` into ``layer``; return the function that takes it back."""
    parameters = dict(layer._parameters)
    ((name, weight),) = layer.weights.items()
    (bias_name,) = layer.bias_names
    deviation = (norm.running_var + norm.eps).sqrt()
    gain = (norm.weight if norm.affine else torch.ones_like(deviation)) / deviation
    shift = norm.bias if norm.affine else torch.zeros_like(deviation)
    bias = parameters.get(bias_name)
    bias = torch.zeros_like(shift) if bias is None else bias
    layer.set_parameters({
        name: layer.scale_channels(name, weight, gain), bias_name: (bias - norm.running_mean) * gain + shift
    })  # fmt: skip
    norm.set_folded(True)

    def unfold() -> None:
        layer._parameters.update(parameters)
        norm.set_folded(False)

    return unfold


def _fingerprint(module: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """Return sum and absolute sum of every layer's inputs, and the result itself."""
    sums: list[Tensor] = []

    def record(name: str, op: Any, args: Any, kwargs: Any) -> None:
        for tensor in op.input_tensors(args, kwargs).values():
            x = tensor.detach().double()
            sums.append(torch.stack([x.sum(), x.abs().sum()]) / x.numel())

    with hooked(quantized_ops(module), before=record):
        result = run()
    tensors = [leaf.detach().double() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return sums + [t for t in tensors if t.numel()]


def _close(values: list[Tensor], expected: list[Tensor], tolerance: float = 1e-3) -> bool:
    if len(values) != len(expected):
        return False
    return all(
        bool((f - e).abs().max() <= tolerance * e.abs().max() + 1e-6) for f, e in zip(values, expected, strict=True)
    )
