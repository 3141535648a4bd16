from __future__ import annotations

import functools
import operator
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ptq.runtime.fingerprint import fingerprint, module_fingerprint

FACTOR = 2.0


def by_constant(value: Any) -> Any:
    return {1: lambda x: x * 1, 2: lambda x: x * 2}[value]


def by_closure(value: Any) -> Any:
    return lambda x: x * value


def by_default(value: Any) -> Any:
    def scaled(x: Any, factor: Any = value) -> Any:
        return x * factor

    return scaled


def by_keyword_default(value: Any) -> Any:
    def scaled(x: Any, *, factor: Any = value) -> Any:
        return x * factor

    return scaled


def by_attribute(value: Any) -> Any:
    def scaled(x: Any) -> Any:
        return x * scaled.factor

    scaled.factor = value
    return scaled


def by_inner_code(value: Any) -> Any:
    first = lambda xs: [x + 1 for x in xs]  # noqa: E731
    return first if value == 1 else lambda xs: [x + 2 for x in xs]


def by_nested_closure(value: Any) -> Any:
    inner = by_closure(value)
    return lambda x: inner(x)


class Scale:
    def __init__(self, value: Any) -> None:
        self.value = value
        self.own = self  # a circle

    def __call__(self, x: Any) -> Any:
        return x * self.value

    def method(self, x: Any) -> Any:
        return x * self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, x: Any) -> Any:
        return x * self.value


def by_class(value: Any) -> Any:
    class Local:
        factor = value

        def __call__(self, x: Any) -> Any:
            return x * self.factor

    return Local()


def by_method_code(value: Any) -> Any:
    class One:
        def __call__(self, x: Any) -> Any:
            return x * 1

    class Two:
        def __call__(self, x: Any) -> Any:
            return x * 2

    One.__qualname__ = Two.__qualname__ = "Same"
    return One() if value == 1 else Two()


def linear(value: Any) -> nn.Module:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, value)
    nn.init.zeros_(layer.bias)
    return layer


MAKES = {
    "constant": by_constant,
    "closure": by_closure,
    "default": by_default,
    "keyword default": by_keyword_default,
    "attribute": by_attribute,
    "inner code": by_inner_code,
    "nested closure": by_nested_closure,
    "callable": Scale,
    "slots": Slotted,
    "bound method": lambda value: Scale(value).method,
    "class constant": by_class,
    "code of a method": by_method_code,
    "partial": lambda value: functools.partial(operator.mul, value),
    "partial of a closure": lambda value: functools.partial(by_closure(value), x=1),
    "cached": lambda value: functools.lru_cache(by_closure(value)),
    "module": linear,
    "method of a module": lambda value: linear(value).forward,
    "tensor": lambda value: torch.full((3,), float(value)),
    "array": lambda value: np.full(3, value),
    "itemgetter": operator.itemgetter,
    "namespace": lambda value: SimpleNamespace(function=by_closure(value)),
    "set": lambda value: {"a", "b", str(value)},
    "type": lambda value: {1: 1, 2: True}[value],
}
HOLDERS = {
    "itself": lambda each: each,
    "dictionary": lambda each: {"measure": "kl", "output": each},
    "list": lambda each: [each],
    "tuple": lambda each: (1, (each,)),
    "closure": lambda each: lambda: each,
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_values_that_act_alike_have_one_fingerprint_and_others_another(make, hold):
    assert fingerprint(hold(make(1))) == fingerprint(hold(make(1)))
    assert fingerprint(hold(make(1))) != fingerprint(hold(make(2)))


def uses_a_global(x: Any) -> Any:
    return helper(x) + F.relu(x)


def helper(x: Any) -> Any:
    return x * FACTOR


def test_globals_are_followed_to_their_values(monkeypatch):
    before = fingerprint(uses_a_global)
    assert fingerprint(uses_a_global) == before
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert fingerprint(uses_a_global) != before


def test_classes_and_plain_attributes_of_a_module_count_and_tensors_do_not():
    class Weighted(nn.Module):
        def __init__(self, alpha: float) -> None:
            super().__init__()
            self.alpha, self.layer = alpha, nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.alpha * self.layer(x)

    assert module_fingerprint(Weighted(1.0)) == module_fingerprint(Weighted(1.0).train(False))
    assert module_fingerprint(Weighted(1.0)) != module_fingerprint(Weighted(2.0))


def test_objects_that_cannot_be_read_do_no_harm():
    class Hostile:
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError

    nested: list[Any] = []
    nested.append(nested)
    for value in (Hostile(), nested, iter([1]), open(os.devnull), torch.Generator(), os.environ):  # noqa: SIM115
        assert fingerprint(value) == fingerprint(value)
