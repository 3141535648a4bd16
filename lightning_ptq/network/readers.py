"""Who reads the outputs of layers and batch norms in a forward, which decides what a batch norm may be folded into.

Values are followed through views and copies: every element of a layer's input keeps the channel that it had in the
output it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.swapping import Swapped
from lightning_ptq.runtime.structure import is_dense

_COPIES = ("aten::clone", "aten::contiguous")
_POOLS = ("aten::max_pool1d", "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::constant_pad_nd")


@dataclass
class Output:
    """Who reads the outputs of a module in one forward.

    Attributes:
        readers: Modules that take an output as their input. For each channel of their input, the channel of the output
            that it holds, (channels,); None where a channel holds several or is not known.
        elsewhere: What else reads an output of the module, or its parameters; empty if nothing does.
        scaled: As ``readers``, with those behind operators that commute with positive factors: activations such as ReLU
            (and ReLU6, up to its bound), max pooling, and padding with zeros.
        scaled_elsewhere: As ``elsewhere``, without these operators.
    """

    readers: dict[str, Tensor | None] = field(default_factory=dict)
    elsewhere: str = ""
    scaled: dict[str, Tensor | None] = field(default_factory=dict)
    scaled_elsewhere: str = ""


@dataclass(frozen=True)
class _View:
    """Where the elements of a tensor lie in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))


@dataclass(frozen=True)
class _Origin:
    """What a storage holds: an output of a module, or a copy of one.

    Attributes:
        producer: Name of the module.
        dim: Dimension of the output's channels.
        view: Place of the output or of the copy in the storage.
        length: Number of elements in the storage.
        source: Storage and place that were copied; None for the output itself.
        scaled: Whether operators that commute with positive factors lie between.
    """

    producer: str
    dim: int
    view: _View
    length: int
    source: tuple[int, _View] | None = None
    scaled: bool = False


class OutputTracker:
    """Records one forward while a trace reports operators and modules to it.

    Args:
        modules: Modules of the network by qualified name.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.outputs: dict[str, Output] = {}
        self._origins: dict[int, _Origin] = {}  # by storage
        self._fed: dict[str, set[int]] = {}  # storages that running modules have as their input
        self._reads: list[tuple[_Origin, str, _View, int]] = []
        self._kept: list[StorageWeakRef] = []  # so that no storage gets the key of one that was freed
        self._inputs: dict[tuple[int, ...], set[tuple[str, str]]] = {}  # by tensor: (operation, input)
        ops = {name: child for name, child in modules.items() if isinstance(child, QuantizedOp)}
        self._owners = {
            parameter.untyped_storage()._cdata: name
            for name, op in ops.items()
            for key, parameter in op._parameters.items()
            if parameter is not None and key in (*op.weight_names, *op.bias_names)
        }

    def operator(
        self, func: Any, scope: list[str], reads: tuple[int, ...], writes: tuple[int, ...], args: Any, result: Any
    ) -> None:
        """Record an operator inside the modules ``scope``, with the storages that it reads and writes."""
        for key in reads:
            owner = self._owners.get(key)
            if owner is not None and owner not in scope:
                self._note(owner, f"{func._schema.name} reads its parameters")
            if key not in self._origins or any(key in self._fed.get(name, ()) for name in scope):
                continue
            if func._schema.is_mutable or set(writes) != {key}:  # else a view
                self._read(func, key, args, result)

    def _read(self, func: Any, key: int, args: Any, result: Any) -> None:
        origin, operator = self._origins[key], func._schema.name
        what = f"{operator} reads its output too"
        if operator in _COPIES:
            self._add(result, origin.producer, origin.dim, (key, _View.of(args[0])), origin.scaled)
        else:
            commutes = _commutes(operator, args) and self._scale(func, key, args[0], result)
            self._note(origin.producer, what, scaled=not commutes)

    def _scale(self, func: Any, key: int, x: Tensor, result: Any) -> bool:
        """Follow an operator that commutes with positive factors; return False if that is not possible."""
        origin, view = self._origins[key], _View.of(x)
        whole = origin.source is None and view == origin.view
        if x.untyped_storage()._cdata != key or (func._schema.name in _POOLS and not whole):
            return False
        if func._schema.is_mutable:
            self._origins[key] = replace(origin, scaled=True)
        else:
            found = result[0] if isinstance(result, tuple) else result
            self._add(found, origin.producer, origin.dim, None if whole else (key, view), scaled=True)
        return True

    def _note(self, producer: str, what: str, scaled: bool = True) -> None:
        output = self.outputs.setdefault(producer, Output())
        output.elsewhere = output.elsewhere or what
        if scaled:
            output.scaled_elsewhere = output.scaled_elsewhere or what

    def _add(
        self, tensor: Tensor, producer: str, dim: int, source: tuple[int, _View] | None = None, scaled: bool = False
    ) -> None:
        storage = tensor.untyped_storage()
        length = storage.nbytes() // tensor.element_size()
        self._origins[storage._cdata] = _Origin(producer, dim, _View.of(tensor), length, source, scaled)
        self._kept.append(StorageWeakRef(storage))

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the start of a module's forward."""
        inputs = _inputs(module, args, kwargs)
        for which, tensor in inputs.items() if isinstance(module, QuantizedOp) else ():
            if is_dense(tensor):
                self._kept.append(StorageWeakRef(tensor.untyped_storage()))
                self._inputs.setdefault(_identity(tensor), set()).add((name, which))
        x: Any = next(iter(inputs.values())) if len(inputs) == 1 else None
        if not is_dense(x) or (key := x.untyped_storage()._cdata) not in self._origins:
            return
        self._fed.setdefault(name, set()).add(key)
        self._reads.append((self._origins[key], name, _View.of(x), _channel_dim(module, x)))

    def exit(self, name: str, module: nn.Module, output: Any) -> None:
        """Record the end of a module's forward."""
        self._fed.pop(name, None)
        if isinstance(module, Swapped) and is_dense(output):
            self.outputs.setdefault(name, Output())
            self._add(output, name, _channel_dim(module, output))

    def same_tensor(self) -> list[frozenset[tuple[str, str]]]:
        """Return groups of two or more inputs of operations, (operation, input), that are the same tensor."""
        return [frozenset(group) for group in self._inputs.values() if len(group) > 1]

    def finish(self, result: tuple[int, ...]) -> dict[str, Output]:
        """Return who reads the outputs, by producer.

        Args:
            result: Storages of what the forward returned.
        """
        for key in result:
            if key in self._origins:
                self._note(self._origins[key].producer, "it is returned too")
        for origin, reader, view, dim in self._reads:
            output, channels = self.outputs[origin.producer], self._channels(origin, view, dim)
            for readers in (output.scaled,) if origin.scaled else (output.readers, output.scaled):
                known = readers.setdefault(reader, channels)
                if known is not None and (channels is None or not torch.equal(known, channels)):
                    readers[reader] = None
        return self.outputs

    def _channels(self, origin: _Origin, view: _View, dim: int) -> Tensor | None:
        """Return which channel of the producer's output each channel of an input holds."""
        if not 0 <= dim < len(view.size) or not 0 <= origin.dim < len(origin.view.size):
            return None
        if origin.source is None and view == origin.view and dim == origin.dim:
            return torch.arange(view.size[dim])
        rows = self._channel_of_elements(origin, view).movedim(dim, -1).reshape(-1, view.size[dim])
        known = len(rows) > 0 and bool((rows == rows[0]).all()) and bool((rows[0] >= 0).all())
        return rows[0].long() if known else None

    def _channel_of_elements(self, origin: _Origin, view: _View) -> Tensor:
        """Return the producer's channel for each element of a place in a storage; -1 for what is not its output."""
        if origin.source is None:
            shape = [-1 if dim == origin.dim else 1 for dim in range(len(origin.view.size))]
            channels = torch.arange(origin.view.size[origin.dim], dtype=torch.int32).view(shape)
        else:
            key, place = origin.source
            channels = self._channel_of_elements(self._origins[key], place)
        elements = torch.full((origin.length,), -1, dtype=torch.int32)
        elements.as_strided(origin.view.size, origin.view.stride, origin.view.offset).copy_(channels)
        return elements.as_strided(view.size, view.stride, view.offset)


def _commutes(operator: str, args: tuple[Any, ...]) -> bool:
    """Return True if an operator commutes with positive factors, up to a bound above 0."""
    name, values = operator.removeprefix("aten::").removesuffix("_"), args[1:]
    if name == "constant_pad_nd":
        return not values[1:] or values[1] == 0
    if name in ("hardtanh", "clamp", "clamp_min"):
        defaults: tuple[Any, Any] = (-1.0, 1.0) if name == "hardtanh" else (None, None)
        least, greatest = (*values, *defaults[len(values) :])
        plain = not isinstance(least, Tensor) and not isinstance(greatest, Tensor)
        return plain and least in (0, None) and (greatest is None or greatest > 0)
    return name in ("relu", "leaky_relu") or operator in _POOLS


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a layer or a batch norm by name; none of other modules."""
    if isinstance(module, QuantizedOp):
        return module.input_tensors(args, kwargs)
    given = [*args, *kwargs.values()] if isinstance(module, Swapped) else []
    return {"input": given[0]} if given else {}


def _identity(tensor: Tensor) -> tuple[int, ...]:
    """Return what views of the same elements have in common, as long as these are not changed in place."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor._version


def _channel_dim(module: nn.Module, tensor: Tensor) -> int:
    """Return the dimension of a layer's or a batch norm's input or output that holds its channels."""
    return module.channel_dim(tensor) if isinstance(module, QuantizedOp) else 1
