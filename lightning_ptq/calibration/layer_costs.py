"""Costs of layers: multiply-accumulates of a forward, and bytes in a packed file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.operator_macs import OperatorCounter
from lightning_ptq.network.batch_norm import NORM_TENSORS, folded_norms
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.runtime.patching import hooked


@dataclass(frozen=True)
class Work:
    """The products that one run computes, by the module that computes them outside the modules inside it.

    What is computed outside all modules belongs to the root, ``""``.

    Attributes:
        macs: Multiply-accumulates.
        counted: Names of the operators that these are of.
        uncounted: Names of the operators without a formula, whose multiply-accumulates are missing.
    """

    macs: dict[str, float] = field(default_factory=dict)
    counted: dict[str, set[str]] = field(default_factory=dict)
    uncounted: dict[str, set[str]] = field(default_factory=dict)


def count_work(module: nn.Module, run: Callable[[], Any]) -> Work:
    """Count the products of one ``run()``, functional ones included.

    These are convolutions, matrix products, attention and recurrent layers. What works element by element, reduces,
    normalizes, pools or looks up rows of a table counts as nothing.

    Args:
        module: The root; qualified names are relative to it.
        run: A forward of the root.
    """
    work = Work()
    stack = [""]

    def enter(name: str, *_: Any) -> None:
        stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    def count(operator: str, macs: float | None) -> None:
        place = stack[-1]
        if macs is None:
            work.uncounted.setdefault(place, set()).add(operator)
        elif macs:
            work.counted.setdefault(place, set()).add(operator)
            work.macs[place] = work.macs.get(place, 0.0) + macs

    with hooked(dict(module.named_modules()), enter, leave), _attention_in_parts(), OperatorCounter(count):
        run()
    return work


def count_macs(module: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Return :attr:`Work.macs` of :func:`count_work`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> count_macs(net, lambda: net(torch.zeros(3, 4)))
        {'0': 96.0, '1': 48.0}
    """
    return count_work(module, run).macs


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
    """Return the work of each layer for one sample, from the shapes in one forward of each course."""
    work = {name: LayerWork() for name in calibration.layers}
    samples, share = 1, 1.0

    def count(name: str, op: Any, args: Any, kwargs: Any, output: Any) -> None:
        work[name].macs += op.macs(args, kwargs, output) / samples * share
        work[name].outputs += op.output_tensor(output).numel() / samples * share

    with hooked(calibration.layers, after=count):
        for batch, share in calibration.one_batch_per_course().items():  # noqa: B007 (read by `count`)
            samples = Batch(calibration.batches[batch]).samples
            calibration.run(batch)
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
        if (name in folded or name in layers) and name != alias:
            skipped.update(state_key(alias, key) for key in child.state_dict())
        elif name in folded:  # an activation inside the norm may have parameters, which are kept
            skipped.update(state_key(alias, key) for key in NORM_TENSORS)
        elif name in layers and isinstance(child, QuantizedOp):
            quantized = (*child.input_names, *child.weight_names)
            grids = (f"{which}_fake_quant.{buffer}" for which in quantized for buffer in ("scale", "zero_point"))
            skipped.update(state_key(alias, key) for key in (*child.weight_names, "qconfig_json", *grids))
    state = module.state_dict(keep_vars=True)
    own = {
        state_key(alias, key): tensor
        for alias, child in module.named_modules(remove_duplicate=False)
        for key, tensor in (*child._parameters.items(), *child._buffers.items())
    }
    # State dict hooks may rename keys; activation checkpointing does.
    renamed = {id(own[key]) for key in skipped - state.keys() if own.get(key) is not None}
    skipped.update(key for key, value in state.items() if key not in own and id(value) in renamed)
    return [key for key, value in state.items() if key not in skipped and isinstance(value, Tensor)]


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
