"""Multiply-accumulates of a forward, by the module in which they happen; counted by torch's own flop counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


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
