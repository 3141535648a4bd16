"""Costs of layers: multiply-accumulates of a forward, and bytes in a packed file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.network.batch_norm import folded_norms
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.runtime.patching import hooked


def count_macs(module: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Count the multiply-accumulates of one ``run()``, functional matrix products and attention included.

    Torch counts the operators that it knows a formula for: convolutions, matrix products, attention. An operator
    without a formula, such as a fused recurrent layer, counts as nothing.

    Args:
        module: The root; qualified names are relative to it.
        run: A forward of the root.

    Returns:
        For each module the multiply-accumulates outside the modules inside it. What is computed outside all modules
        belongs to the root, ``""``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> count_macs(net, lambda: net(torch.zeros(3, 4)))
        {'0': 96.0, '1': 48.0}
    """
    counts: dict[str, float] = {}
    stack = [""]
    counted = 0

    def settle() -> None:
        """Credit the innermost module with what was counted since the last module boundary."""
        nonlocal counted
        now = counter.get_total_flops()
        if now > counted:
            # A multiply-accumulate is two floating-point operations.
            counts[stack[-1]] = counts.get(stack[-1], 0.0) + (now - counted) / 2
        counted = now

    def enter(name: str, *_: Any) -> None:
        settle()
        stack.append(name)

    def leave(*_: Any) -> None:
        settle()
        stack.pop()

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with hooked(dict(module.named_modules()), enter, leave), _attention_in_parts(), counter:
        run()
        settle()
    return counts


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return sdpa_flop_count(query, key, value)


# Older torch (2.11, for example) has no formula for this operator.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Have nn.MultiheadAttention compute with operators that torch has formulas for, not with one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def macs_below(counts: dict[str, float], name: str) -> float:
    """Return the part of :func:`count_macs`'s result that lies in module ``name`` and the modules inside it."""
    return sum(macs for at, macs in counts.items() if at == name or at.startswith(name + ".") or not name)


@dataclass
class LayerWork:
    """The work of a layer for one sample.

    Attributes:
        macs: Multiply-accumulates.
        outputs: Number of output values.
    """

    macs: float = 0.0
    outputs: float = 0.0


def layer_work(calibration: Calibration) -> dict[str, LayerWork]:
    """Return the work of each layer for one sample, from the shapes in one calibration forward."""
    work = {name: LayerWork() for name in calibration.layers}
    samples = Batch(calibration.batches[0]).samples

    def count(name: str, op: Any, args: Any, kwargs: Any, output: Any) -> None:
        work[name].macs += op.macs(args, kwargs, output) / samples
        work[name].outputs += op.output_tensor(output).numel() / samples

    with hooked(calibration.layers, after=count):
        calibration.run(0)
    return work


def float_keys(module: nn.Module, layers: Collection[str], folded: Collection[str]) -> list[str]:
    """Return the keys of a prepared module's state dict that a packed file stores unchanged.

    Quantized weights and their grids, folded batch norms, and duplicate names of shared modules are left out.

    Args:
        module: A prepared module.
        layers: Names of the quantized operations.
        folded: Names of the folded batch norms.
    """
    first = {id(child): name for name, child in module.named_modules()}  # a shared module has one of its names here
    skipped: set[str] = set()
    for alias, child in module.named_modules(remove_duplicate=False):
        name = first[id(child)]
        if name in folded or (name in layers and name != alias):
            skipped.update(state_key(alias, key) for key in child.state_dict())
        elif name in layers and isinstance(child, QuantizedOp):
            quantized = (*child.input_names, *child.weight_names)
            grids = (f"{which}_fake_quant.{buffer}" for which in quantized for buffer in ("scale", "zero_point"))
            skipped.update(state_key(alias, key) for key in (*child.weight_names, "qconfig_json", *grids))
    return [key for key, value in module.state_dict().items() if key not in skipped and isinstance(value, Tensor)]


def state_key(name: str, key: str) -> str:
    """Return the key in a state dict of a tensor ``key`` of the module called ``name``."""
    return f"{name}.{key}" if name else key


def float_bytes(module: nn.Module) -> int:
    """Return the bytes of a quantized module's packed file that do not depend on bit widths."""
    layers = {name for name, op in quantized_ops(module).items() if op.is_quantized}
    state = module.state_dict()
    tensors = (state[key] for key in float_keys(module, layers, folded_norms(module)))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def packed_size(module: nn.Module) -> int:
    """Return the bytes of the tensors in a quantized module's packed file."""
    ops = quantized_ops(module).values()
    return float_bytes(module) + sum(op.packed_bytes(op.qconfig.weight) for op in ops if op.qconfig is not None)
