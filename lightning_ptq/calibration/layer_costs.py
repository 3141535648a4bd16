"""Multiply-accumulates of a forward, by the module in which they happen; counted by torch's own flop counter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import batch_size
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.trace import first_argument
from lightning_ptq.numerics.qconfig import QuantSpec


def count_macs(module: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Multiply-accumulates of one ``run()``, functional matrix products and attention included.

    Torch counts the operators that it knows a formula for (convolutions, matrix products, attention); an operator
    without one, such as a fused recurrent layer, counts nothing.

    Args:
        module: The root; qualified names are relative to it.
        run: A forward of it.

    Returns:
        For each module its own part, that of the modules inside it left out; what happens outside of all of them
        belongs to the root, ``""``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> count_macs(net, lambda: net(torch.zeros(3, 4)))
        {'0': 96.0, '1': 48.0}
    """
    own: dict[str, float] = {}
    stack = [""]
    counted = 0

    def book() -> None:
        """What has been counted since the last boundary belongs to the innermost module."""
        nonlocal counted
        now = counter.get_total_flops()
        if now > counted:
            own[stack[-1]] = own.get(stack[-1], 0.0) + (now - counted) / 2  # a multiply-accumulate is two flops
        counted = now

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            book()
            stack.append(name)

        return hook

    def leave(*_: Any) -> None:
        book()
        stack.pop()

    handles = []
    try:
        for name, child in module.named_modules():
            handles += [child.register_forward_pre_hook(enter(name)), child.register_forward_hook(leave)]
        with _attention_in_parts(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            run()
        book()
    finally:
        for handle in handles:
            handle.remove()
    return own


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return sdpa_flop_count(query, key, value)


# For older torch (2.11, for example), which has no formula for it.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """nn.MultiheadAttention computes with the operators that torch has formulas for, not with one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def macs_below(own: dict[str, float], name: str) -> float:
    """What :func:`count_macs` found in module ``name`` and in those inside it."""
    return sum(macs for at, macs in own.items() if at == name or at.startswith(name + ".") or not name)


@dataclass
class LayerWork:
    """What a layer does for one sample.

    Attributes:
        macs: Multiply-accumulates.
        outputs: Values that it puts out.
    """

    macs: float = 0.0
    outputs: float = 0.0


def layer_work(calibration: Calibration) -> dict[str, LayerWork]:
    """The work of each layer for one sample, from the shapes in one calibration forward."""
    found = {name: LayerWork() for name in calibration.layers}
    samples = batch_size(calibration.batches[0])

    def watch(name: str) -> Any:
        def hook(layer: QuantLayer, args: Any, kwargs: Any, output: Tensor) -> None:
            found[name].macs += _macs(layer, first_argument(args, kwargs), output) / samples
            found[name].outputs += output.numel() / samples

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in calibration.layers.items()]
    try:
        calibration.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _macs(layer: QuantLayer, x: Tensor, output: Tensor) -> float:
    """Every weight is used once per output position (per input position if transposed)."""
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return layer.weight.numel() * (x.numel() / layer.weight.shape[0])
    return layer.weight.numel() * (output.numel() / layer.weight.shape[0])


_BUFFERS = ("scale", "zero_point")


def packed_bytes(layer: QuantLayer, spec: QuantSpec) -> int:
    """Bytes of a layer's weight in the packed file at ``spec``: integers, scales and zero points."""
    shape, _ = layer.channel_layout()
    scales = torch.Size(shape).numel() if spec.per_channel else 1
    return -(-layer.weight.numel() * spec.bits // 8) + scales * (4 if spec.symmetric else 8)


def float_keys(module: nn.Module, layers: Iterable[str], folded: Iterable[str]) -> list[str]:
    """Keys of the state dict, of a float or a quantized module, that are kept as they are: neither quantized weights
    and their grids, nor folded batch norms, nor the second places of a shared layer.
    """
    first = {id(child): name for name, child in module.named_modules()}
    weights, norms = set(layers), set(folded)
    left_out: set[str] = set()
    for alias, child in module.named_modules(remove_duplicate=False):
        name = first[id(child)]
        if name in norms or (name in weights and name != alias):
            left_out.update(state_key(alias, key) for key in child.state_dict())
        elif name in weights:
            own = ("weight", "qconfig_json", *(f"{q}_fake_quant.{b}" for q in ("weight", "input") for b in _BUFFERS))
            left_out.update(state_key(alias, key) for key in own)
    return [key for key, value in module.state_dict().items() if key not in left_out and isinstance(value, Tensor)]


def state_key(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
