"""The example inputs of an export, and which of their axes may have any size."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_ptq.arguments import check_is_module
from lightning_ptq.errors import ExportError
from lightning_ptq.network.swapping import float_class_of

Axes = Mapping[str, Mapping[int, str]]
"""Names of the axes of inputs that may have any size, by the input's name and the axis."""


@dataclass(frozen=True)
class ExampleInputs:
    """The inputs of a forward, bound to the names of its parameters.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments, in the order of the forward's parameters.
        by_name: All arguments by name, in the same order.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, inputs: Any) -> ExampleInputs:
        """Bind inputs to the forward of a module.

        Args:
            module: The module.
            inputs: A tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or bound inputs.

        Raises:
            ExportError: If the forward does not take such arguments.
        """
        if isinstance(inputs, ExampleInputs):
            return inputs
        check_is_module(module)
        if isinstance(inputs, Mapping) or hasattr(inputs, "items"):
            return cls.bound(module, (), dict(inputs.items()))
        return cls.bound(module, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})

    @classmethod
    def bound(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExampleInputs:
        """Bind arguments to the forward of a module; see :meth:`of`."""
        try:
            bound = signature_of(module).bind(*args, **kwargs)
        except TypeError as error:
            raise ExportError(
                f"{type(module).__name__}.forward does not take the example inputs ({error}). Give a tensor, a tuple of"
                " its positional arguments, or a dictionary of its keyword arguments, without labels."
            ) from error
        by_name: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                by_name.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                by_name.update({f"{name}_{index}": each for index, each in enumerate(value)})
            else:
                by_name[name] = value
        found = cls(args, {name: value for name, value in by_name.items() if name in kwargs}, by_name)
        if not found.tensors:
            kinds = ", ".join(type(value).__name__ for value in (*args, *kwargs.values()))
            raise ExportError(f"the example inputs hold no tensor, got {kinds or 'nothing'}. Pass a batch of inputs.")
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the call."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def named(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in a file; those in lists and dictionaries have one each."""
        found: dict[str, Tensor] = {}
        for path, leaf in pytree.tree_flatten_with_path(self.by_name)[0]:
            if isinstance(leaf, Tensor):
                name = "_".join(re.sub(r"\W", "_", _key(step)) for step in path)
                while name in found:
                    name += "_"
                found[name] = leaf
        return found

    @property
    def samples(self) -> int:
        """Size of the first axis of the first tensor that has one."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 1)

    def map(self, function: Callable[[Tensor], Any]) -> ExampleInputs:
        """Return the inputs with a function applied to every tensor."""
        args, kwargs, by_name = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs, self.by_name))
        return ExampleInputs(args, kwargs, by_name)

    def beside(self, module: nn.Module) -> ExampleInputs:
        """Return the inputs on the device of a module.

        Raises:
            ExportError: If they have no values.
        """
        if any(tensor.is_meta for tensor in self.tensors):
            raise ExportError(f"the inputs {self.shapes} are on the meta device. Give inputs with values.")
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        return self.map(lambda tensor: tensor.to(device))

    @property
    def shapes(self) -> str:
        """The shapes of all tensors, for messages."""
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.named.items())


def _key(step: Any) -> str:
    """Return the name of one step of the path to a leaf: a key, a place in a list, or an attribute."""
    return str(next(getattr(step, kind) for kind in ("key", "idx", "name") if hasattr(step, kind)))


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return the signature of the user's forward, which swapped classes hide."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    own = module.__dict__.get("own_forward") or module.__dict__.get("forward")
    if own is not None:
        return inspect.signature(own)
    return inspect.signature(float_class_of(module).forward.__get__(module))


def default_axes(inputs: ExampleInputs) -> dict[str, dict[int, str]]:
    """Return the axes that may have any size unless the caller says otherwise.

    They are the samples of every tensor, and the positions of the inputs of a text model.
    """
    text = "input_ids" in inputs.by_name or "attention_mask" in inputs.by_name
    return {
        name: {0: "batch", **({1: "sequence"} if text and value.dim() > 1 and name in inputs.by_name else {})}
        for name, value in inputs.named.items()
        if value.dim() > 0
    }


def doubled(inputs: ExampleInputs) -> ExampleInputs:
    """Return the inputs with at least two samples: torch.export takes a size of 1 for a constant."""
    if any(len(tensor) != 1 for tensor in inputs.tensors if tensor.dim()):
        return inputs
    return inputs.map(lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() > 0 else tensor)


def path_argument(path: Any) -> Path:
    """Return the path of a file; raise :class:`ExportError` if it is none."""
    known = isinstance(path, (str, os.PathLike)) and str(path) and "\0" not in str(path)
    if known and not str(path).endswith(("/", os.sep)):
        return Path(path)
    raise ExportError(f"path must be the path of a file, got {path!r}. Write for example 'model.onnx'.")


def batches_of(batches: Any) -> list[Any]:
    """Return batches as a list; raise :class:`ExportError` if they are none, or a single one."""
    if isinstance(batches, Iterable) and not isinstance(batches, (Tensor, str, Mapping)):
        return list(batches)
    raise ExportError(
        f"batches must be a list of batches, got a {type(batches).__name__}. Write [batch] for a single batch."
    )


def axes_argument(axes: Any) -> Axes | None:
    """Return the argument ``dynamic_axes``.

    Raises:
        ExportError: If it is no dictionary of names, by input and axis.
    """
    tables = list(axes.values()) if isinstance(axes, Mapping) else []
    pairs = [pair for table in tables if isinstance(table, Mapping) for pair in table.items()]
    known = isinstance(axes, Mapping) and all(isinstance(table, Mapping) for table in tables)
    if axes is None or (known and all(type(axis) is int and isinstance(name, str) and name for axis, name in pairs)):
        found: Axes | None = axes
        return found
    raise ExportError(
        f"dynamic_axes must be names by input and axis, or None, got {axes!r}. Write for example"
        ' {"x": {0: "batch"}}.'
    )


def checked_axes(axes: Axes, inputs: ExampleInputs) -> Axes:
    """Return the names of axes; raise :class:`ExportError` if an input has no such axis, or its size is 1."""
    named = inputs.named
    for name, of_input in (axes_argument(axes) or {}).items():
        value = named.get(name)
        if value is None:
            raise ExportError(f"dynamic_axes names {name!r}; the inputs are {', '.join(named)}.")
        for axis in of_input:
            if not 0 <= axis < value.dim():
                raise ExportError(
                    f"dynamic_axes names axis {axis} of {name!r}, whose shape is {tuple(value.shape)}. Count from 0."
                )
            if value.shape[axis] == 1:
                raise ExportError(
                    f"axis {axis} of {name!r} is to be dynamic, but its size is 1 in the example inputs, which"
                    " torch.export takes for a constant. Give an example of a larger size."
                )
    return axes
