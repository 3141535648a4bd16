"""Trace one forward pass: what ran, in what order, and which outputs feed which inputs.

The trace records operators as they are executed and does not look at the code, so control flow and functional
operators are included. It identifies values by their storage, so it follows views and in-place operators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.runtime.patching import hooked

_ADDS = ("aten::add.Tensor", "aten::add_.Tensor")
_PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::dot",
    "aten::_trilinear", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::convolution", "aten::einsum",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::miopen_rnn", "aten::_native_multi_head_attention",
)  # fmt: skip


RESULT = "<result>"
"""Name of the forward's result among the units."""

_READ_BY_PYTHON = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")


@dataclass(frozen=True)
class Event:
    """An operator that ran, or a module that was entered or left.

    Attributes:
        kind: ``"op"``, ``"enter"`` or ``"exit"``.
        name: Name of the operator, or qualified name of the module.
        scope: Qualified names of the modules being executed, outermost first.
        reads: Storages of the input tensors.
        writes: Storages of the output tensors.
    """

    kind: Literal["op", "enter", "exit"]
    name: str
    scope: tuple[str, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass
class Trace:
    """The record of one forward pass.

    Attributes:
        events: All events in order.
        calls: Number of calls of each module.
        layer_order: Quantizable operations in the order of their first call.
        residual: Modules in whose own forward two tensors of the same shape were added.
        batch_norm_after: The operation before each batch norm, where both ran once and the norm's input is the
            operation's own output tensor.
        float_products: (operator, module) of matrix products and convolutions outside any quantizable operation.
        result: Storages of the tensors that the forward returned.
    """

    events: list[Event] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    layer_order: list[str] = field(default_factory=list)
    residual: set[str] = field(default_factory=set)
    batch_norm_after: dict[str, str] = field(default_factory=dict)
    float_products: set[tuple[str, str]] = field(default_factory=set)
    result: tuple[int, ...] = ()

    def same_course(self, other: Trace) -> bool:
        """Return True if the same modules, and operators outside quantizable operations, ran in the same order."""
        return self._course() == other._course()

    def digest(self) -> str:
        """Return a checksum, equal for traces of the :meth:`same_course`."""
        return hashlib.sha256(repr(self._course()).encode()).hexdigest()

    def _course(self) -> list[tuple[str, str]]:
        layers = set(self.layer_order)
        # Operators inside a quantizable operation depend on its quantizers and on observers, not on the course.
        return [(e.kind, e.name) for e in self.events if e.kind != "op" or layers.isdisjoint(e.scope)]

    def needed_outputs(self, units: Iterable[str]) -> dict[str, set[str]]:
        """Return, for each unit, the other units whose outputs reach its inputs without passing through a third unit.

        :data:`RESULT` stands for what the forward returned.
        """
        names, layers = set(units), set(self.layer_order)
        sources: dict[int, set[str]] = {}  # by storage: the units whose outputs its values were computed from
        decisive: set[str] = set()  # units whose values Python has read, and may have branched on
        needed: dict[str, set[str]] = {name: set() for name in (*names, RESULT)}
        for event in self.events:
            unit = next((name for name in event.scope if name in names), None)
            if event.kind == "op" and unit is None:  # what a unit computes inside is replaced by its stored output
                union = set().union(*(sources.get(key, set()) for key in event.reads))
                if event.name in _READ_BY_PYTHON and layers.isdisjoint(event.scope):  # else an observer read them
                    decisive |= union
                sources.update((key, union) for key in event.writes)
            elif event.kind == "enter" and event.name == unit:
                needed[unit].update(decisive, *(sources.get(key, set()) for key in event.reads))
            elif event.kind == "exit" and event.name in names and unit is None:
                sources.update((key, {event.name}) for key in event.writes)
            elif event.kind == "exit" and not event.scope:  # the output of an outermost module may be compared
                needed[RESULT].update(*(sources.get(key, set()) for key in event.writes))
        needed[RESULT].update(decisive, *(sources.get(key, set()) for key in self.result))
        for name in names:  # a unit that runs several times may feed itself; it is captured as a whole
            needed[name].discard(name)
        return needed


def trace(module: nn.Module, run: Callable[[], Any]) -> Trace:
    """Trace ``run()``, which executes ``module`` once.

    Args:
        module: The root; qualified names are relative to it.
        run: One forward, without gradients.
    """
    recorder = _Recorder(module)
    with hooked(recorder.modules, recorder.enter_module, recorder.exit_module), recorder:
        result = run()
    recorder.finish()
    recorder.trace.result = storages(result)
    return recorder.trace


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.stack: list[str] = []
        self.modules = dict(module.named_modules())
        self.ops = quantized_ops(module)
        self.outputs: dict[str, Tensor] = {}  # of operations; the reference keeps the storage from being reused
        self.followed: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self._record("op", name, storages((args, kwargs)), storages(result))
        full_name = f"{name}.{func._schema.overload_name}"  # add.Scalar, for example, is not a residual connection
        if full_name in _ADDS and self.stack and _same_shape(*args[:2]):
            self.trace.residual.add(self.stack[-1])
        if name in _PRODUCTS and self.ops.keys().isdisjoint(self.stack):
            self.trace.float_products.add((name.removeprefix("aten::"), self.stack[-1] if self.stack else ""))
        return result

    def _record(self, kind: Any, name: str, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
        self.trace.events.append(Event(kind, name, tuple(self.stack), reads, writes))

    def enter_module(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(name)
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        self._record("enter", name, storages((args, kwargs)), ())
        if isinstance(module, QuantizedOp) and name not in self.trace.layer_order:
            self.trace.layer_order.append(name)
        if isinstance(module, _BatchNorm):
            # Identity, not equality: a norm folds into a layer only if nothing else reads or changes the output.
            x = first_argument(args, kwargs)
            self.followed.update((name, layer) for layer, output in self.outputs.items() if output is x)

    def exit_module(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop()
        self._record("exit", name, storages((args, kwargs)), storages(output))
        if isinstance(module, QuantizedOp):
            self.outputs[name] = output

    def finish(self) -> None:
        calls = self.trace.calls
        self.trace.batch_norm_after = {
            norm: layer for norm, layer in self.followed.items() if calls[norm] == 1 and calls[layer] == 1
        }
        self.outputs.clear()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call, by position or by keyword; None if there is none."""
    return next(iter((*args, *kwargs.values())), None)


def storages(tree: Any) -> tuple[int, ...]:
    """Return keys of the storages of all tensors in a nested structure."""
    # Sparse tensors have no storage, so their values are not followed.
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    return tuple(leaf.untyped_storage()._cdata for leaf in tensors)


def _same_shape(left: Any, right: Any) -> bool:
    both = isinstance(left, Tensor) and isinstance(right, Tensor)
    return both and left.shape == right.shape and left.dim() >= 2 and left.is_floating_point()
