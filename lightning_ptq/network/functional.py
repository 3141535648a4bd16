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
from lightning_ptq.network.parameters import channel_dim, shares_storage
from lightning_ptq.network.routes import WEIGHTED, route_call
from lightning_ptq.runtime.frames import Frame, frames
from lightning_ptq.runtime.structure import is_dense

# Calls: from the arguments of a function to those of its site.

Operands = tuple[tuple[Any, ...], dict[str, Any]]


def _of_weight(input: Any, weight: Any, bias: Any = None, *args: Any, **rest: Any) -> Operands:
    names = ("stride", "padding", "dilation", "groups")
    return (input, weight), {"bias": bias, **dict(zip(names, args, strict=False)), **rest}


def _two(left: Any, right: Any) -> Operands:
    return (left, right), {}


def _reversed(left: Any, right: Any) -> Operands:
    return (right, left), {}


def _sum_of_products(input: Any, left: Any, right: Any, **rest: Any) -> Operands:
    return (left, right), {"added": input, **rest}


def _of_equation(equation: str, *operands: Any) -> Operands:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    return tuple(tensors), {"equation": equation}


def _linear_combination(left: Any, right: Any, **rest: Any) -> Operands:
    return (left, right), rest


def _joined(tensors: Any, dim: int = 0) -> Operands:
    return (tensors,), {"dim": dim}


_Call = tuple[str, Callable[..., Operands]]

_PRODUCTS: dict[Any, _Call] = {
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), ("matmul", _two)
    ),
    Tensor.__rmatmul__: ("matmul", _reversed),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ("baddbmm", _sum_of_products)),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("addmm", _sum_of_products)),
    torch.einsum: ("einsum", _of_equation),
    **{
        getattr(place, name): ("grouped_mm", _linear_combination)
        for place, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
        if hasattr(place, name)
    },
}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__, Tensor.mul_, Tensor.__imul__}
_ELEMENTWISE: dict[Any, _Call] = {
    **dict.fromkeys(
        (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__),
        ("add", _linear_combination),
    ),
    **dict.fromkeys(
        (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__),
        ("mul", _two),
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), ("cat", _joined)),
}


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
            call = _PRODUCTS.get(func) or _ELEMENTWISE.get(func)
            if call is not None:
                return _run(frame, call, func, args, kwargs)
        return func(*args, **kwargs)


def _run(frame: Frame, call: _Call, func: Any, args: Any, kwargs: Any) -> Any:
    function, arrange = call
    try:
        operands, rest = arrange(*args, **kwargs)
    except TypeError:  # other arguments, such as out=
        return func(*args, **kwargs)
    side = _weight_side(frame, function, operands) if function not in ("add", "mul", "cat", "einsum") else None
    if side is not None:
        own = frame.owner._modules.get(f"linear_{frame.next('linear')}")
        if not isinstance(own, WeightedSite):
            return func(*args, **kwargs)
        return own(operands[1 - side], operands[side], function=function, weight_first=side == 0, **rest)
    if (function not in OF_TWO and function != "cat") or not _eligible(function, operands):
        return func(*args, **kwargs)
    site = _site(frame, f"{function}_{frame.next(function)}")
    if site is None:
        return func(*args, **kwargs)
    if func not in _IN_PLACE:
        return site(*operands, **rest)
    # The backward pass of quantization reads the operand, which is then written to.
    left = operands[0].clone() if torch.is_grad_enabled() else operands[0]
    return operands[0].copy_(site(left, *operands[1:], **rest))


def _weight_side(frame: Frame, function: str, operands: tuple[Any, ...]) -> int | None:
    """Return which operand is a parameter of the module that calls, or a part of one; None if neither is."""
    if len(operands) != 2 or not _all_floating(operands):
        return None
    own = {} if not frames.discovering else frame.owner._parameters
    candidates = [*frame.read, *(p for p in own.values() if p is not None and p.dim() > 1 and p.is_floating_point())]
    for side in (1, 0) if candidates else ():
        parameter = shares_storage(operands[side], candidates)
        if parameter is None or (side == 0 and function not in ("matmul", "baddbmm", "addmm")):
            continue
        name = next((name for name, p in own.items() if p is parameter), None)
        if name is not None:
            dim = _channel_dim(function, parameter, operands[side], side)
            if dim is None:
                return None
            frame.parameters.setdefault(name, dim)
        return side
    return None


def _channel_dim(function: str, parameter: Tensor, operand: Tensor, side: int) -> int | None:
    """Return the dimension of a parameter that holds the output channels of a product with it."""
    if function.startswith("conv"):
        return 0 if operand.shape == parameter.shape and not function.startswith("conv_transpose") else None
    return channel_dim(parameter, operand, -2 if side == 0 or function == "linear" else -1)


def _run_weighted(frame: Frame, func: Any, args: Any, kwargs: Any) -> Any:
    """Compute a function of a weight, in the layer that has the weight if there is a route to it."""
    if frames.discovering:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if id(weight) in frames.layers:
            frame.layers.append(frames.layers[id(weight)])
    found = route_call(frame, WEIGHTED[func], args, kwargs)
    if found is None:
        return _run(frame, (WEIGHTED[func], _of_weight), func, args, kwargs)
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
