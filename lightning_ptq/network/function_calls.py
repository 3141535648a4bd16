"""Functions of torch whose calls can be operations, and their operands, however a call passes them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Operands = tuple[tuple[Any, ...], dict[str, Any]]
"""The operands of a call, and its further arguments by keyword."""


def of_weight(input: Any, weight: Any, bias: Any = None, *args: Any, **rest: Any) -> Operands:
    """Arrange the arguments of a function of a weight."""
    names = ("stride", "padding", "dilation", "groups")
    return (input, weight), {"bias": bias, **dict(zip(names, args, strict=False)), **rest}


_LEFT, _RIGHT = ("input", "mat1", "batch1"), ("other", "tensor2", "mat2", "batch2")


def _named(args: tuple[Any, ...], rest: dict[str, Any], *places: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the operands in the order of ``places``, the names that torch has for each; take them out of ``rest``."""
    found = list(args)
    for names in places[len(args) :]:
        found.append(rest.pop(next((name for name in names if name in rest), "")))
    if len(found) != len(places) or "out" in rest:
        raise TypeError
    return tuple(found)


def _two(*args: Any, **rest: Any) -> Operands:
    return _named(args, rest, _LEFT, _RIGHT), rest


def _reversed(left: Any, right: Any) -> Operands:
    return (right, left), {}


def _sum_of_products(*args: Any, **rest: Any) -> Operands:
    added, left, right = _named(args, rest, ("input",), _LEFT[1:], _RIGHT)
    return (left, right), {"added": added, **rest}


def _of_equation(equation: str, *operands: Any) -> Operands:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    return tuple(tensors), {"equation": equation}


def _joined(tensors: Any, dim: int = 0) -> Operands:
    return (tensors,), {"dim": dim}


Call = tuple[str, Callable[..., Operands]]
"""Name of a function, and what arranges its arguments. It raises a TypeError or KeyError for arguments it cannot."""

PRODUCTS: dict[Any, Call] = {
    **dict.fromkeys(
        (
            torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm,
            Tensor.mm, operator.matmul,
        ),
        ("matmul", _two),
    ),
    Tensor.__rmatmul__: ("matmul", _reversed),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), ("baddbmm", _sum_of_products)),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("addmm", _sum_of_products)),
    torch.einsum: ("einsum", _of_equation),
    **{
        getattr(place, name): ("grouped_mm", _two)
        for place, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
        if hasattr(place, name)
    },
}  # fmt: skip
# Strict torch.export hands Python's operators on as they are.
IN_PLACE = {Tensor.add_, Tensor.__iadd__, operator.iadd, Tensor.mul_, Tensor.__imul__, operator.imul}
ELEMENTWISE: dict[Any, Call] = {
    **dict.fromkeys(
        (
            torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__, operator.add,
            operator.iadd,
        ),
        ("add", _two),
    ),
    **dict.fromkeys(
        (
            torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__,
            operator.mul, operator.imul,
        ),
        ("mul", _two),
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), ("cat", _joined)),
}  # fmt: skip


def _open(function: FunctionType) -> FunctionType:
    """Return a function of torch without the check that hands a call of it to modes as a whole."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


COMPOSED: dict[Any, Any] = {f: _open(f) for f in (cast(FunctionType, F.multi_head_attention_forward),)}
"""Functions of torch that call others, whose calls are then handed on one by one."""
