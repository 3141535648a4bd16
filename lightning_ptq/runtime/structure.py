"""Nested values of any kind: split into tensors and a structure, and built again from them.

Torch's ``pytree`` knows tuples, lists and dictionaries. Modules also pass dataclasses, key-value caches, packed
sequences, lists of images and objects of their own. Such objects are taken apart as ``pickle`` does, where tensors are
left out of the pickle and modules, classes and functions are kept by reference.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

_REFERENCES = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, torch.Generator)
_VALUES = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, Enum)
_PLAIN = (type(None), *_VALUES, *_REFERENCES)


@dataclass(frozen=True)
class Structure:
    """All of a nested value but its leaves.

    Attributes:
        tree: Containers that ``pytree`` knows.
        objects: Positions of other objects among the leaves of ``tree``.
        pickled: These objects without their tensors; None if there are none.
        references: What the pickle refers to: modules, classes, functions.
    """

    tree: TreeSpec
    objects: tuple[int, ...] = ()
    pickled: bytes | None = None
    references: tuple[Any, ...] = ()

    def build(self, leaves: Sequence[Any]) -> Any:
        """Return a value of this structure: new containers and objects around ``leaves``."""
        if self.pickled is None:
            return tree_unflatten(list(leaves), self.tree)
        count = self.tree.num_leaves
        whole = list(leaves[:count])
        objects = _Builder(self.pickled, leaves[count:], self.references).load()
        for position, value in zip(self.objects, objects, strict=True):
            whole[position] = value
        return tree_unflatten(whole, self.tree)

    def key(self) -> Any:
        """Return a value that is equal for equal structures, with references compared by identity."""
        return str(self.tree), self.objects, self.pickled, tuple(map(id, self.references))


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """Split a nested value into leaves and a structure.

    Leaves are tensors, numbers, text and other immutable values, modules and functions. The tensors of objects that
    ``pytree`` does not know come last. Objects that cannot be pickled are leaves too, and are not copied.

    Example:
        >>> leaves, structure = flatten({"x": torch.zeros(2), "sizes": {3}})
        >>> structure.build(leaves)
        {'x': tensor([0., 0.]), 'sizes': {3}}
    """
    leaves, tree = tree_flatten(value)
    positions = tuple(i for i, leaf in enumerate(leaves) if not isinstance(leaf, _PLAIN))
    if not positions:
        return leaves, Structure(tree)
    splitter = _Splitter.of([leaves[i] for i in positions])
    if splitter is None:  # keep what can be pickled alone, and leave the others whole
        positions = tuple(i for i in positions if _Splitter.of([leaves[i]]) is not None)
        splitter = _Splitter.of([leaves[i] for i in positions])
    if splitter is None or not positions:
        return leaves, Structure(tree)
    for position in positions:
        leaves[position] = None
    structure = Structure(tree, positions, splitter.file.getvalue(), tuple(splitter.references))
    return [*leaves, *splitter.tensors], structure


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors of a nested value, also those that objects hold."""
    leaves = tree_leaves(value)
    if not all(isinstance(leaf, _PLAIN) for leaf in leaves):
        leaves = flatten(value)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def float_tensors_in(value: Any) -> list[Tensor]:
    """Return the dense floating-point tensors of a nested value."""
    return list(filter(is_float, tensors_in(value)))


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Return a copy of a nested value, in new containers and objects, with ``fn`` applied to every tensor."""
    leaves, structure = flatten(value)
    return structure.build([fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def is_dense(value: Any) -> bool:
    """Return True for a tensor that is neither sparse nor nested, nor one of torch.vmap and its like."""
    if not isinstance(value, Tensor) or is_transformed(value):
        return False
    return value.layout is torch.strided and not value.is_nested


def is_transformed(value: Any) -> bool:
    """Return True for a tensor inside a transform of functions, such as torch.vmap: it stands for others."""
    if torch.compiler.is_compiling():  # which does not know the function
        return False
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def is_float(value: Any) -> bool:
    """Return True for a dense floating-point tensor."""
    return is_dense(value) and value.is_floating_point()


def dense(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield those tensors that are neither sparse nor nested."""
    return filter(is_dense, tensors)


def storages(tree: Any) -> tuple[int, ...]:
    """Return keys of the storages of all dense tensors in a nested structure; others have none."""
    return tuple(leaf.untyped_storage()._cdata for leaf in dense(tensors_in(tree)))


def mean_and_magnitude(x: Tensor) -> Tensor:
    """Return the means of a tensor's values and of their magnitudes, (2,), float64: a checksum up to rounding."""
    values = x.detach().double()
    return torch.stack([values.sum(), values.abs().sum()]) / max(values.numel(), 1)


class _Splitter(pickle.Pickler):
    """Pickles objects without their tensors and without what is kept by reference."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.file = file
        self.tensors: list[Tensor] = []
        self.references: list[Any] = []
        self._places: dict[int, tuple[bool, int]] = {}  # an object that occurs twice stays one object

    @classmethod
    def of(cls, values: list[Any]) -> _Splitter | None:
        """Return a splitter that has pickled ``values``, or None if they cannot be pickled."""
        splitter = cls(io.BytesIO())
        try:
            splitter.dump(values)
        except Exception:  # whatever the __reduce__ of an object raises
            return None
        return splitter

    def persistent_id(self, obj: Any) -> tuple[bool, int] | None:
        """Return the place of a tensor or a reference; None for what is pickled."""
        is_tensor = isinstance(obj, Tensor)
        if not is_tensor and not isinstance(obj, _REFERENCES):
            return None
        kept: list[Any] = self.tensors if is_tensor else self.references
        if id(obj) not in self._places:
            self._places[id(obj)] = (is_tensor, len(kept))
            kept.append(obj)
        return self._places[id(obj)]


class _Builder(pickle.Unpickler):
    """Reads what :class:`_Splitter` has pickled in this process, with other tensors."""

    def __init__(self, pickled: bytes, tensors: Sequence[Any], references: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(pickled))
        self.tensors, self.references = tensors, references

    def persistent_load(self, pid: tuple[bool, int]) -> Any:
        """Return the tensor or reference at a place."""
        is_tensor, index = pid
        return self.tensors[index] if is_tensor else self.references[index]
