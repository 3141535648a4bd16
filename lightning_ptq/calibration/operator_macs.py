"""Multiply-accumulates of single operators, and which operators cannot be counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_ptq.runtime.structure import tensors_in

Operators = Callable[[str, float | None], None]
"""Function of an operator's name, and its multiply-accumulates; these are None if there is no formula."""

# Operators of torch that compute products, by a part of their name. All others of torch work element by element,
# reduce, normalize, pool, sort or move, and count as nothing.
_PRODUCTS = re.compile(
    r"mm(?![aio])|matmul|conv(?!e)|attention|rnn|lstm|gru|linear|linalg_(?!.*(norm|check|cross|diagonal))|_fft|cdist|pdist"
    r"|dot|mv$|cholesky|solve|svd|inverse|matrix_exp|transformer_encoder"
)
_CHEAP = re.compile(r"upsample|(lstm|gru)_cell|copy|_check")
_SMALL = 1024  # values; operators of other packages with smaller inputs, such as counters and boxes, are not named


class OperatorCounter(TorchDispatchMode):
    """Reports the operators that run inside the ``with`` block and compute products.

    Args:
        report: Called with each.

    Example:
        >>> import torch
        >>> found = []
        >>> with OperatorCounter(lambda name, macs: found.append((name, macs))):
        ...     _ = torch.fft.rfft((torch.ones(2, 3) @ torch.ones(3, 4)).relu())
        >>> found
        [('mm', 24.0), ('_fft_r2c', None)]
    """

    supports_higher_order_operators = True

    def __init__(self, report: Operators) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if not _is_known(func, name) and hasattr(func, "decompose"):
            with self:  # in inference mode, operators arrive whole that are made of others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if _is_known(func, name):
            self._report(name.removeprefix("aten::"), _macs(func, name, args, kwargs, output))
        elif _is_product(name, (args, kwargs)):
            self._report(name.removeprefix("aten::"), None)
        return output


def _name(func: Any) -> str:
    return func._schema.name if hasattr(func, "_schema") else str(func)


def _packet(func: Any) -> Any:
    return getattr(func, "_overloadpacket", func)


def _is_known(func: Any, name: str) -> bool:
    return name in _FORMULAS or _packet(func) in flop_registry


def _is_product(name: str, arguments: Any) -> bool:
    """Return True for an operator that computes products, or may compute them since it is not one of torch's own."""
    package, _, own = name.rpartition("::")
    if package in ("aten", "prims", "prim"):
        return bool(_PRODUCTS.search(own)) and not _CHEAP.search(own)
    if package in ("profiler", "c10d", "_c10d_functional", "inductor"):
        return False
    return any(x.is_floating_point() and x.numel() >= _SMALL for x in tensors_in(arguments))


def _macs(func: Any, name: str, args: Any, kwargs: Any, output: Any) -> float | None:
    """Return the multiply-accumulates of a known operator, or None if its formula does not fit these arguments."""
    try:
        if name in _FORMULAS:
            return float(_FORMULAS[name](*args, **kwargs, out=output))
        return float(flop_registry[_packet(func)](*args, **kwargs, out_val=output)) / 2  # two operations each
    except Exception:  # such as an assertion of torch's formula about shapes
        return None


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    # By the heads of the queries, since those of keys and values may be fewer.
    return prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _matrix_by_vector(*args: Any, **_: Any) -> float:
    matrix = next(x for x in args if isinstance(x, Tensor) and x.dim() == 2)
    return matrix.numel()


def _vectors(x: Tensor, *_: Any, **__: Any) -> float:
    return x.numel()


def _sum_of_products(_: Any, batch1: Tensor, batch2: Tensor, **__: Any) -> float:
    return batch1.numel() * batch2.shape[-1]


def _trilinear(
    left: Tensor, middle: Tensor, right: Tensor, expand1: Any, expand2: Any, expand3: Any, *_: Any, **__: Any
) -> float:
    """Return the number of products of three values, after new dimensions at the places ``expand``."""
    shapes = []
    for x, places in ((left, expand1), (middle, expand2), (right, expand3)):
        for place in sorted(places):
            x = x.unsqueeze(place)
        shapes.append(x.shape)
    return float(prod(torch.broadcast_shapes(*shapes)))


def _grouped(x: Tensor, y: Tensor, *_: Any, **__: Any) -> float:
    # Rows by groups of matrices, or matrices of which the groups are columns. Each value of the one is used once for
    # each row or column of the other.
    return y.numel() * x.shape[-2] if x.dim() == 3 and y.dim() == 2 else x.numel() * y.shape[-1]


def _recurrent(x: Tensor, *args: Any, **_: Any) -> float:
    """Return the products by all weight matrices, which are the only arguments of two dimensions, in all steps."""
    return prod(x.shape[:-1]) * sum(weight.numel() for weight in tensors_in(args) if weight.dim() == 2)


def _recurrent_layer(x: Tensor, weight: Tensor, hidden_weight: Tensor, *_: Any, **__: Any) -> float:
    return prod(x.shape[:-1]) * (weight.numel() + hidden_weight.numel())


def _deformable(_: Any, weight: Tensor, *__: Any, out: Tensor, **___: Any) -> float:
    return out.numel() * prod(weight.shape[1:])


_FORMULAS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **dict.fromkeys(("aten::mv", "aten::addmv"), _matrix_by_vector),
    "aten::_trilinear": _trilinear,
    **dict.fromkeys(("aten::dot", "aten::vdot"), _vectors),
    **dict.fromkeys(("aten::addbmm", "aten::_addmm_activation"), _sum_of_products),
    **dict.fromkeys(("aten::_grouped_mm", "aten::_scaled_grouped_mm"), _grouped),
    **dict.fromkeys(
        (
            "aten::_cudnn_rnn", "aten::miopen_rnn", "aten::lstm", "aten::gru",
            "aten::rnn_tanh", "aten::rnn_relu",
        ),
        _recurrent,
    ),
    "aten::mkldnn_rnn_layer": _recurrent_layer,
    "torchvision::deform_conv2d": _deformable,
}  # fmt: skip
"""Formulas that torch lacks, or that fail on arguments it accepts, by name."""
