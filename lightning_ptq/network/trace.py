"""One real forward, watched: who ran, in which order, and whose values flow to whom.

Works on whatever runs eagerly, control flow and functional ops included, for it looks at the operators as they are
executed and not at the code. Values are told apart by their storage, so views and in-place operators are followed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ptq.network.layers import QuantLayer

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
_READ_BY_PYTHON = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")


@dataclass(frozen=True)
class Event:
    """An operator that ran, or a module that was entered or left.

    Attributes:
        kind: Which of the three.
        name: The operator's name, or the module's qualified name.
        scope: Qualified names of the modules being executed, outermost first.
        reads: Storages of the tensors that went in.
        writes: Storages of the tensors that came out.
    """

    kind: Literal["op", "enter", "exit"]
    name: str
    scope: tuple[str, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass
class Trace:
    """What one forward did.

    Attributes:
        events: All events in the order they happened.
        calls: How often each module ran.
        layer_order: Quantizable layers in the order of their first call.
        residual: Modules in whose own forward two tensors of the same shape were added.
        batch_norm_after: For each batch norm that ran exactly once on the very tensor that a layer, running exactly
            once, had put out: that layer.
        float_products: (operator, module) of matrix products and convolutions outside any quantizable layer.
        result: Storages of the tensors that the forward returned.
    """

    events: list[Event] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    layer_order: list[str] = field(default_factory=list)
    residual: set[str] = field(default_factory=set)
    batch_norm_after: dict[str, str] = field(default_factory=dict)
    float_products: set[tuple[str, str]] = field(default_factory=set)
    result: tuple[int, ...] = ()

    def alike(self, other: Trace) -> bool:
        """True if the same operators, outside the quantizable layers, and modules ran in the same order."""
        return self._course() == other._course()

    def digest(self) -> str:
        """A checksum, equal for traces that are :meth:`alike`."""
        return hashlib.sha256(repr(self._course()).encode()).hexdigest()

    def _course(self) -> list[tuple[str, str]]:
        layers = set(self.layer_order)
        return [(e.kind, e.name) for e in self.events if e.kind != "op" or layers.isdisjoint(e.scope)]

    def needed_outputs(self, units: Iterable[str]) -> dict[str, set[str]]:
        """For each unit, the other units whose outputs reach its inputs without passing through a third unit.

        :data:`RESULT` stands for what the forward returned.
        """
        names, layers = set(units), set(self.layer_order)
        sources: dict[int, set[str]] = {}
        decisive: set[str] = set()  # units whose values Python has looked at, and may have branched on
        needed: dict[str, set[str]] = {name: set() for name in (*names, RESULT)}
        for event in self.events:
            unit = next((name for name in event.scope if name in names), None)
            if event.kind == "op" and unit is None:
                union = set().union(*(sources.get(key, set()) for key in event.reads))
                if event.name in _READ_BY_PYTHON and layers.isdisjoint(event.scope):  # else an observer did
                    decisive |= union
                sources.update((key, union) for key in event.writes)
            elif event.kind == "enter" and event.name == unit:
                needed[unit].update(decisive, *(sources.get(key, set()) for key in event.reads))
            elif event.kind == "exit" and event.name in names and unit is None:
                sources.update((key, {event.name}) for key in event.writes)
            elif event.kind == "exit" and not event.scope:  # an outermost module; its output may be asked for
                needed[RESULT].update(*(sources.get(key, set()) for key in event.writes))
        needed[RESULT].update(decisive, *(sources.get(key, set()) for key in self.result))
        for name in names:
            needed[name].discard(name)
        return needed


def trace(module: nn.Module, run: Callable[[], Any]) -> Trace:
    """Watch ``run()``, which executes ``module`` once.

    Args:
        module: The root; qualified names are relative to it.
        run: One forward, without gradients; returns what it returned.

    Returns:
        What happened.
    """
    recorder = _Recorder(module)
    with recorder:
        result = run()
    recorder.finish()
    recorder.trace.result = storages(result)
    return recorder.trace


class _Recorder(TorchDispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.stack: list[str] = []
        self.modules = list(module.modules())
        self.names = {id(child): name for name, child in module.named_modules()}
        self.layer_names = {name for name, child in module.named_modules() if isinstance(child, QuantLayer)}
        self.outputs: dict[str, Tensor] = {}  # of quantizable layers; the reference keeps the storage from reuse
        self.followed: dict[str, str] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for child in self.modules:  # hooks of their own, for global ones are not shown keyword arguments
            self.handles.append(child.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(child.register_forward_hook(self._exit))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self._record("op", name, storages((args, kwargs)), storages(result))
        full_name = f"{name}.{func._schema.overload_name}"
        if full_name in _ADDS and self.stack and _same_shape(*args[:2]):
            self.trace.residual.add(self.stack[-1])
        if name in _PRODUCTS and not self.layer_names.intersection(self.stack):
            self.trace.float_products.add((name.removeprefix("aten::"), self.stack[-1] if self.stack else ""))
        return result

    def _record(self, kind: Any, name: str, reads: tuple[int, ...], writes: tuple[int, ...]) -> None:
        self.trace.events.append(Event(kind, name, tuple(self.stack), reads, writes))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[id(module)]
        self.stack.append(name)
        self.trace.calls[name] = self.trace.calls.get(name, 0) + 1
        self._record("enter", name, storages((args, kwargs)), ())
        if isinstance(module, QuantLayer) and name not in self.trace.layer_order:
            self.trace.layer_order.append(name)
        if isinstance(module, _BatchNorm):
            x = first_argument(args, kwargs)
            self.followed.update((name, layer) for layer, output in self.outputs.items() if output is x)

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.stack.pop()
        self._record("exit", name, storages(args), storages(output))
        if isinstance(module, QuantLayer):
            self.outputs[name] = output

    def finish(self) -> None:
        calls = self.trace.calls
        self.trace.batch_norm_after = {
            norm: layer for norm, layer in self.followed.items() if calls[norm] == 1 and calls[layer] == 1
        }
        self.outputs.clear()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, given by position or by keyword; None if there is none."""
    return next(iter((*args, *kwargs.values())), None)


def storages(tree: Any) -> tuple[int, ...]:
    """Keys of the storages of all tensors in a nested structure."""
    return tuple(leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _same_shape(left: Any, right: Any) -> bool:
    both = isinstance(left, Tensor) and isinstance(right, Tensor)
    return both and left.shape == right.shape and left.dim() >= 2 and left.is_floating_point()
