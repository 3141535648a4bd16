"""Trace one forward pass: what ran, in what order, and which outputs feed which inputs.

The trace records operators as they are executed and does not look at the code, so control flow and functional
operators are included. It identifies values by their storage, so it follows views and in-place operators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ptq.network.call_sites import CallSite
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.parameters import ParameterOp
from lightning_ptq.network.readers import Output, OutputTracker
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.structure import storages

_ADDS = ("aten::add.Tensor", "aten::add_.Tensor")
_PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::mv", "aten::addmv", "aten::dot",
    "aten::_trilinear", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::convolution", "aten::einsum",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_sparse_addmm", "aten::sspaddmm", "aten::addbmm", "aten::_grouped_mm",
    "aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::miopen_rnn", "aten::_native_multi_head_attention",
)  # fmt: skip


RESULT = "<result>"
"""Name of the forward's result among the units."""

_READ_BY_PYTHON = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")

# Operators that pick rows of their first argument by the values of the others, and those that put rows back.
_PICK = (
    "aten::index", "aten::index_select", "aten::gather", "aten::masked_select", "aten::take", "aten::take_along_dim",
)  # fmt: skip
_PUT_BACK = (
    "aten::index_add", "aten::index_add_", "aten::index_put", "aten::index_put_", "aten::index_copy_", "aten::scatter",
    "aten::scatter_", "aten::scatter_add", "aten::scatter_add_", "aten::masked_scatter", "aten::masked_scatter_",
)  # fmt: skip


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
class Flow:
    """How values flow between units in a forward.

    Attributes:
        needed: For each unit, and for :data:`RESULT`, the other units whose outputs reach its inputs without passing
            through a third unit.
        picked: Units whose inputs are rows that were picked by values which other units computed, as the experts of a
            mixture are. Other rows may be picked when those units are quantized.
    """

    needed: dict[str, set[str]]
    picked: set[str] = field(default_factory=set)


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
        outputs: Who reads the outputs of each layer and batch norm; not merged over forwards.
        same_tensor: Groups of inputs of operations, (operation, input), that are the same tensor.
        exposed: Operations with weights that were read outside of them.
    """

    events: list[Event] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    layer_order: list[str] = field(default_factory=list)
    residual: set[str] = field(default_factory=set)
    batch_norm_after: dict[str, str] = field(default_factory=dict)
    float_products: set[tuple[str, str]] = field(default_factory=set)
    result: tuple[int, ...] = ()
    outputs: dict[str, Output] = field(default_factory=dict)
    same_tensor: list[frozenset[tuple[str, str]]] = field(default_factory=list)
    exposed: set[str] = field(default_factory=set)

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
        """Return :attr:`Flow.needed` of :meth:`flow`."""
        return self.flow(units).needed

    def flow(self, units: Iterable[str]) -> Flow:
        """Follow the values between units; :data:`RESULT` stands for what the forward returned."""
        names, layers = set(units), set(self.layer_order)
        sources: dict[int, set[str]] = {}  # by storage: the units whose outputs its values were computed from
        picked: set[int] = set()  # storages of rows that were picked by values which units computed
        decisive: set[str] = set()  # units whose values Python has read, and may have branched on
        flow = Flow({name: set() for name in (*names, RESULT)})
        needed = flow.needed
        for event in self.events:
            unit = next((name for name in event.scope if name in names), None)
            if event.kind == "op" and unit is None:  # what a unit computes inside is replaced by its stored output
                union = set().union(*(sources.get(key, set()) for key in event.reads))
                if event.name in _READ_BY_PYTHON and layers.isdisjoint(event.scope):  # else an observer read them
                    decisive |= union
                sources.update((key, union) for key in event.writes)
                _mark(picked, event.writes, _picks(event, sources, picked))
            elif event.kind == "enter" and event.name == unit:
                needed[unit].update(decisive, *(sources.get(key, set()) for key in event.reads))
                if not picked.isdisjoint(event.reads):
                    flow.picked.add(unit)
            elif event.kind == "exit" and event.name in names and unit is None:
                sources.update((key, {event.name}) for key in event.writes)
                _mark(picked, event.writes, event.name in flow.picked)
            elif event.kind == "exit" and not event.scope:  # the output of an outermost module may be compared
                needed[RESULT].update(*(sources.get(key, set()) for key in event.writes))
        needed[RESULT].update(decisive, *(sources.get(key, set()) for key in self.result))
        for name in names:  # a unit that runs several times may feed itself; it is captured as a whole
            needed[name].discard(name)
        return flow


def _picks(event: Event, sources: dict[int, set[str]], picked: set[int]) -> bool:
    """Return True if an operator writes rows that were picked by values which units computed."""
    if event.name in _PICK and any(sources.get(key) for key in event.reads[1:]):
        return True
    reads = event.reads[:1] if event.name in _PUT_BACK else event.reads
    return not picked.isdisjoint(reads)


def _mark(keys: set[int], writes: tuple[int, ...], marked: bool) -> None:
    (keys.update if marked else keys.difference_update)(writes)


def merge_traces(traces: Sequence[Trace]) -> Trace:
    """Return what several forwards did together; a module counts with its most calls in one of them.

    The result has no events, since these have an order within one forward only. A module that runs in few forwards
    takes its place after the module that ran before it there.
    """
    distinct = list({id(one): one for one in traces}.values())
    if len(distinct) == 1:
        return distinct[0]
    order = _merge_orders([list(one.calls) for one in distinct])
    return Trace(
        calls={name: max(one.calls.get(name, 0) for one in distinct) for name in order},
        layer_order=_merge_orders([one.layer_order for one in distinct]),
        residual=set().union(*(one.residual for one in distinct)),
        batch_norm_after=_agreed_pairs(distinct),
        float_products=set().union(*(one.float_products for one in distinct)),
        same_tensor=[group for one in distinct for group in one.same_tensor],
        exposed=set().union(*(one.exposed for one in distinct)),
    )


def _merge_orders(orders: list[list[str]]) -> list[str]:
    merged = list(orders[0])
    for order in orders[1:]:
        place = 0
        for name in order:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged


def _agreed_pairs(traces: list[Trace]) -> dict[str, str]:
    """Return the pairs of norm and layer that hold in every forward that runs either of them."""
    pairs = {norm: layer for one in traces for norm, layer in one.batch_norm_after.items()}
    return {
        norm: layer
        for norm, layer in pairs.items()
        if all(one.batch_norm_after.get(norm) == layer for one in traces if one.calls.get(norm) or one.calls.get(layer))
    }


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
    recorder.trace.outputs = recorder.tracker.finish(recorder.trace.result)
    recorder.trace.same_tensor = recorder.tracker.same_tensor()
    return recorder.trace


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.stack: list[str] = []
        self.modules = dict(module.named_modules())
        self.ops = quantized_ops(module)
        self.tracker = OutputTracker(self.modules)
        self.outputs: dict[str, Tensor] = {}  # of operations; the reference keeps the storage from being reused
        self.followed: dict[str, str] = {}
        # Parameters that are operations of their own are handed out by them.
        keepers = {name: op for name, op in self.ops.items() if not isinstance(op, ParameterOp)}
        self.weights = {key: name for name, op in keepers.items() for key in storages(op.weights)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        reads, writes = storages((args, kwargs)), storages(result)
        self._record("op", name, reads, writes)
        self.trace.exposed.update({self.weights[key] for key in reads if key in self.weights}.difference(self.stack))
        self.tracker.operator(func, self.stack, reads, writes, args, result)
        full_name = f"{name}.{func._schema.overload_name}"  # add.Scalar, for example, is not a residual connection
        if full_name in _ADDS and self.stack and _same_shape(*args[:2]):
            in_site = len(self.stack) > 1 and isinstance(self.ops.get(self.stack[-1]), CallSite)
            self.trace.residual.add(self.stack[-2 if in_site else -1])
        if name in _PRODUCTS and self.ops.keys().isdisjoint(self.stack):
            self.trace.float_products.add((name.removeprefix("aten::"), self.stack[-1] if self.stack else ""))
        return result

    def _record(self, kind: Any, name: str, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
        self.trace.events.append(Event(kind, name, tuple(self.stack), reads, writes))

    def enter_module(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stack.append(name)
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        self._record("enter", name, storages((args, kwargs)), ())
        self.tracker.enter(name, module, args, kwargs)
        if isinstance(module, QuantizedOp) and name not in self.trace.layer_order:
            self.trace.layer_order.append(name)
        if isinstance(module, _BatchNorm):
            # Identity, not equality: a norm folds into a layer only if nothing else reads or changes the output.
            x = first_argument(args, kwargs)
            self.followed.update((name, layer) for layer, output in self.outputs.items() if output is x)

    def exit_module(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.stack.pop()
        self._record("exit", name, storages((args, kwargs)), storages(output))
        self.tracker.exit(name, module, output)
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


def _same_shape(left: Any, right: Any) -> bool:
    both = isinstance(left, Tensor) and isinstance(right, Tensor)
    return both and left.shape == right.shape and left.dim() >= 2 and left.is_floating_point()
