"""Functions that a forward calls on tensors, and how the calls reach their sites.

While a caller's forward runs, a mode of torch hands the calls to the call sites below it. Nobody's code is traced or
rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_ptq.network.call_sites import OF_TWO, CallSite, WeightedSite
from lightning_ptq.network.function_calls import COMPOSED, ELEMENTWISE, IN_PLACE, PRODUCTS, Call, of_weight
from lightning_ptq.network.parameters import find_weight, shares_storage
from lightning_ptq.network.routes import WEIGHTED, route_call
from lightning_ptq.runtime.frames import Frame, frames
from lightning_ptq.runtime.structure import is_dense


class _Calls(TorchFunctionMode):
    """Hands calls of functions to the sites of the module that runs them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame = frames.stack[-1] if frames.stack else None
        if frame is not None:
            if func is F.scaled_dot_product_attention:
                return _run_attention(frame, *args, **kwargs)
            if func in WEIGHTED:
                return _run_weighted(frame, func, args, kwargs)
            if func in COMPOSED:
                with self:
                    return COMPOSED[func](*args, **kwargs)
            call = PRODUCTS.get(func) or ELEMENTWISE.get(func)
            if call is not None:
                return _run(frame, call, func, args, kwargs)
        return func(*args, **kwargs)


def _run(frame: Frame, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
    function, arrange = call
    try:
        operands, rest = arrange(*args, **kwargs)
    except (TypeError, KeyError):  # other arguments, such as out=
        return func(*args, **kwargs)
    is_product = function not in ("add", "mul", "cat") and len(operands) == 2 and _all_floating(operands)
    side = find_weight(frame, function, operands, rest.get("equation", "")) if is_product else None
    if side is not None:
        own = frame.owner._modules.get(f"linear_{frame.next('linear')}")
        if not isinstance(own, WeightedSite):
            return func(*args, **kwargs)
        return own(operands[1 - side], operands[side], function=function, weight_first=side == 0, **rest)
    if is_product and shares_storage(operands[1], frame.tied) is not None:
        own = frame.owner._modules.get(f"tied_{frame.counts.get('tied', 0) + 1}")
        if frames.discovering or isinstance(own, WeightedSite):
            frame.next("tied")
            further = {"function": function, "weight_first": False, **rest}
            return func(*args, **kwargs) if own is None else own(*operands, **further)
    if (function not in OF_TWO and function != "cat") or not _eligible(function, operands):
        return func(*args, **kwargs)
    site = _site(frame, f"{function}_{frame.next(function)}")
    if site is None:
        return func(*args, **kwargs)
    if func not in IN_PLACE:
        return site(*operands, **rest)
    # The backward pass of quantization reads the operand, which is then written to.
    left = operands[0].clone() if torch.is_grad_enabled() else operands[0]
    return operands[0].copy_(site(left, *operands[1:], **rest))


def _run_weighted(frame: Frame, func: Any, args: Any, kwargs: Any) -> Any:
    """Compute a function of a weight, in the layer that has the weight if there is a route to it."""
    if frames.discovering:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if id(weight) in frames.layers:
            frame.layers.append(frames.layers[id(weight)])
    found = route_call(frame, WEIGHTED[func], args, kwargs)
    if found is None:
        return _run(frame, (WEIGHTED[func], of_weight), func, args, kwargs)
    layer, call = found
    return layer(args[0] if args else call.kwargs.pop("input"), functional=call)


def _site(frame: Frame, name: str) -> CallSite | None:
    site = frame.owner._modules.get(name)
    return site if isinstance(site, CallSite) else None


def _eligible(function: str, operands: tuple[Any, ...]) -> bool:
    """Return True for a call on dense floating-point tensors that computes what a site computes."""
    if function == "cat":
        return isinstance(operands[0], (list, tuple)) and len(operands[0]) > 1 and _all_floating(operands[0])
    if len(operands) != 2 or not _all_floating(operands):
        return False
    if function in ("add", "mul"):  # positions, scales and masks are no activations
        return not any(isinstance(x, nn.Parameter) for x in operands) and min(x.dim() for x in operands) > 1
    return True


def _all_floating(tensors: Iterable[Any]) -> bool:
    return all(isinstance(x, Tensor) and x.is_floating_point() and is_dense(x) for x in tensors)


def _run_attention(
    frame: Frame,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Any:
    """Compute attention by its two products; see :func:`torch.nn.functional.scaled_dot_product_attention`."""
    scores = values = None
    if _all_floating((query, key, value)):
        position = frame.next("attention")
        scores, values = (_site(frame, f"attention_{position}_{part}") for part in ("scores", "values"))
    if scores is None or values is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **rest)
    return attention(scores, values, query, key, value, attn_mask, dropout_p, is_causal, **rest)


def attention(
    scores: Callable[[Tensor, Tensor], Tensor],
    values: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute scaled dot-product attention by two products that are given.

    Args:
        scores: Product of queries (..., length, width) and transposed keys (..., width, source length).
        values: Product of the weights (..., length, source length) and the values (..., source length, width).
        query: Queries (..., heads, length, width).
        key: Keys (..., heads, source length, width).
        value: Values (..., heads, source length, width).
        attn_mask: Summand of the scores, or a boolean tensor that is False where a weight is 0.
        dropout_p: Probability that a weight is set to 0.
        is_causal: Whether a position sees no later ones.
        scale: Factor of the scores; the inverse root of the width by default.
        enable_gqa: Whether keys and values have fewer heads, which groups of queries share.

    Returns:
        Tensor (..., heads, length, width).
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    logits = scores(query, key.transpose(-2, -1)) * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        attn_mask = seen if attn_mask is None else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    weights = logits.softmax(-1)
    if attn_mask is not None:  # a position that sees nothing gets 0, as torch's kernels give
        weights = weights.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    return values(F.dropout(weights, dropout_p) if dropout_p else weights, value)


@contextmanager
def watching() -> Iterator[None]:
    """Inside the ``with`` block, calls of functions go to the sites of the innermost frame."""
    if frames.watched:
        yield
        return
    frames.watched = True
    try:
        with _Calls():
            yield
    finally:
        frames.watched = False
