"""Modules that call functions: how their calls are found, and how call sites are added below them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import nn

from lightning_ptq.network.call_sites import OF_TWO, CallSite, JoinSite, WeightedSite
from lightning_ptq.network.functional import watching
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.own_children import ADDED, container_methods
from lightning_ptq.network.own_forward import SwappedForward
from lightning_ptq.network.parameters import (
    hand_out,
    is_parameter_op,
    move_parameter,
    parameter_op_name,
    parameters_of,
)
from lightning_ptq.network.record import RECORD
from lightning_ptq.network.routes import Route, routable, routed
from lightning_ptq.network.swapping import FloatState, Swapped, float_class_of, set_class
from lightning_ptq.network.trace import Trace
from lightning_ptq.numerics.qconfig import matches
from lightning_ptq.runtime.frames import Frame, frames
from lightning_ptq.runtime.patching import hooked

_FUNCTIONS = (*OF_TWO, "cat", "linear", "tied")
_NAME = re.compile(rf"({'|'.join((*_FUNCTIONS, 'route'))})_(\d+)(_scores|_values)?")


class Caller(SwappedForward):
    """Stands before the class of a module whose forward calls functions that are operations."""

    added_names = ()

    def __getattr__(self, name: str) -> Any:
        """Return a parameter from the operation that it has moved to, or what the float class returns."""
        holder = self.__dict__.get("moved", {}).get(name)
        if holder is None:
            return super().__getattr__(name)
        value = cast(nn.Module, self._modules[holder])()
        frame = frames.stack[-1] if frames.stack else None
        if frame is not None:
            frame.read.append(value)
        return value

    @classmethod
    def of(cls, float_class: type[nn.Module]) -> Any:
        """Return the class that makes a caller of ``float_class``; it has the same name."""
        for known in type.__subclasses__(float_class):
            if known.__bases__ == (cls, float_class):
                return known
        names = {"__module__": float_class.__module__, "__qualname__": float_class.__qualname__}
        methods = container_methods(float_class)
        return type(float_class.__name__, (cls, float_class), {**names, "__doc__": float_class.__doc__, **methods})

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the children; in the module's own forward, those that it has without its call sites."""
        frame = frames.stack[-1] if frames.stack else None
        inside = frame is not None and frame.owner is self
        return (item for item in super().named_children() if not (inside and isinstance(item[1], ADDED)))

    @classmethod
    def _class_maker(cls) -> tuple[Callable[[type[nn.Module]], Any], ...]:
        return (Caller.of,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the float module, with calls handed to their sites."""
        if self.runs_own_forward:
            return super().forward(*args, **kwargs)
        if frames.discovering:
            return self._run_float_forward(super().forward, args, kwargs)
        frame = Frame(self)
        frames.stack.append(frame)
        try:
            with watching():
                result = self._run_float_forward(super().forward, args, kwargs)
        finally:
            frames.stack.pop()
        hand_out(frame, result)
        return result


@dataclass
class Discovery:
    """What a forward calls.

    Attributes:
        sites: Names of call sites, by caller in the order of first calls.
        routes: Names of layers whose weights a module passes to functions, by the name of the module.
    """

    sites: list[str]
    routes: dict[str, list[str]]


def discover(module: nn.Module, run: Callable[[], Any], elementwise: bool = False) -> Discovery:
    """Return the calls in a forward that can be operations.

    Args:
        module: The root; names are relative to it.
        run: One forward of it.
        elementwise: Whether additions, products of elements and concatenations are sites too.
    """
    names = {id(child): name for name, child in module.named_modules()}
    counts: dict[tuple[str, str], int] = {}
    routes: dict[str, list[str]] = {}
    parameters: dict[str, None] = {}

    def enter(name: str, child: Any, *_: Any) -> None:
        if isinstance(child, QuantizedOp):
            child.reached = True
        hidden = isinstance(child, QuantizedOp) or (frames.stack and frames.stack[-1] is None)
        frames.stack.append(None if hidden else Frame(child, name))

    def leave(name: str, child: Any, args: Any, kwargs: Any, output: Any) -> None:
        frame = frames.stack.pop()
        if frame is not None:
            hand_out(frame, output)
            for function, count in frame.counts.items():
                key = names[id(frame.owner)], function
                counts[key] = max(count, counts.get(key, 0))
            owner = names[id(frame.owner)]
            parameters.update(dict.fromkeys(parameter_op_name(*item) for item in frame.parameters.items()))
            for layer in dict.fromkeys(frame.layers):
                if layer.startswith(f"{owner}." if owner else "") and layer not in routes.setdefault(owner, []):
                    routes[owner].append(layer)

    depth = len(frames.stack)
    frames.discovering, frames.layers = True, routable(quantized_ops(module).items())
    frames.parameters = parameters_of(dict(module.named_modules()))
    try:
        with hooked(dict(module.named_modules()), enter, leave), watching():
            run()
    finally:
        frames.discovering, frames.layers, frames.parameters = False, {}, {}
        del frames.stack[depth:]
    wanted = [key for key in counts if elementwise or key[1] not in ("add", "mul", "cat")]
    sites = [name for owner, function in wanted for name in _site_names(owner, function, counts[owner, function])]
    return Discovery([*parameters, *sites], routes)


def _site_names(owner: str, function: str, count: int) -> list[str]:
    prefix = f"{owner}." if owner else ""
    return [f"{prefix}{function}_{at}{part}" for at in range(1, count + 1) for part in _parts(function)]


def _parts(function: str) -> tuple[str, ...]:
    """Return the ends of the names of the sites of one call."""
    return ("_scores", "_values") if function == "attention" else ("",)


def site_owner(name: str) -> tuple[str, str] | None:
    """Return the caller and the function of a call site's name; None for other names."""
    owner, _, own = name.rpartition(".")
    match = _NAME.fullmatch(own)
    if match is None and is_parameter_op(own):
        return owner, "parameter"
    return (owner, match[1]) if match else None


def add_call_sites(
    module: nn.Module, names: Iterable[str], routes: Mapping[str, Iterable[str]] | None = None
) -> list[FloatState]:
    """Make call sites below ``module``, except those that exist.

    Args:
        module: The root.
        names: Names of call sites, or of routes without a layer yet. Other names are passed over, as are those of
            callers that cannot be changed.
        routes: Names of the layers that a module gets routes to, by the name of the module.

    Returns:
        What restores the callers, in the order in which they were changed.
    """
    modules, tensors = dict(module.named_modules()), list(module.parameters())[:1]
    changed: list[FloatState] = []
    named = dict.fromkeys(names, "")
    for owner, layers in (routes or {}).items():
        known = {name for name, child in modules.items() if child in routed(modules[owner])}
        prefix = f"{owner}." if owner else ""
        fresh = [layer for layer in layers if layer not in known]
        start = 1 + sum(isinstance(child, Route) for child in modules[owner]._modules.values())
        named.update({f"{prefix}route_{start + at}": layer.removeprefix(prefix) for at, layer in enumerate(fresh)})
    for name, target in named.items():
        found = site_owner(name)
        caller = found and modules.get(found[0])
        if not found or caller is None or not _can_call(caller) or hasattr(caller, name.rpartition(".")[2]):
            continue
        if not isinstance(caller, Caller):
            original = FloatState(caller)
            try:
                set_class(caller, Caller.of(float_class_of(caller)))
            except Exception:  # classes can forbid to be derived from, or have another layout in memory
                continue
            changed.append(original)
            caller._keep_own_forward()
        device = next((tensor.device for tensor in (*caller.parameters(), *caller.buffers(), *tensors)), None)
        own = name.rpartition(".")[2]
        if found[1] == "parameter":
            move_parameter(caller, own)
            continue
        if found[1] == "route":
            child: nn.Module = Route(target)
        elif found[1] in ("linear", "tied"):
            child = WeightedSite()
        else:
            child = (JoinSite if found[1] == "cat" else CallSite)(found[1])
        caller._modules[own] = child.to(device).train(caller.training)
    return changed


def possible_sites(module: nn.Module, pattern: str) -> list[str]:
    """Return a name that a call site could have and that ``pattern`` matches, if there is one."""
    functions = [(function, part) for function in _FUNCTIONS for part in _parts(function)]
    positions = [*range(1, 10), *re.findall(r"[1-9]\d+", pattern)]
    for owner, child in module.named_modules():
        prefix = f"{owner}." if owner else ""
        for parameter, dim in product(child._parameters, range(3)):
            if matches(name := prefix + parameter_op_name(parameter, dim), pattern):
                return [name]
        for function, part in functions:
            for position in positions:
                if matches(name := f"{prefix}{function}_{position}{part}", pattern):
                    return [name]
    return []


def _can_call(module: nn.Module) -> bool:
    return isinstance(module, Caller) or not isinstance(module, (Swapped, QuantizedOp, torch.jit.ScriptModule))


def call_sites(module: nn.Module) -> Mapping[str, CallSite]:
    """Return the call sites below ``module`` by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, CallSite)}


def known_sites(module: nn.Module) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of all that was added below ``module`` for calls, and of the layers of routes by module."""
    sites, routes = [], dict[str, list[str]]()
    for name, child in module.named_modules():
        if isinstance(child, Route) and child.target:
            owner = name.rpartition(".")[0]
            routes.setdefault(owner, []).append(f"{owner}.{child.target}" if owner else child.target)
        elif isinstance(child, ADDED) and not isinstance(child, Route):
            sites.append(name)
    return sites, routes


def unsteady_sites(sites: Iterable[str], traces: Iterable[Trace]) -> list[str]:
    """Return the call sites whose caller calls the function more often in some of its forwards than in others.

    The position of a call then does not tell which call it is.

    Args:
        sites: Names of call sites.
        traces: Traces of all forwards.
    """
    kinds = {name: found for name in sites if (found := site_owner(name))}
    unsteady = {
        found
        for trace in traces
        for name, found in kinds.items()
        if trace.calls.get(found[0]) and trace.calls.get(name, 0) != trace.calls[found[0]]
    }
    return [name for name, found in kinds.items() if found in unsteady]


def layers_of(state_dict: Mapping[str, Any]) -> list[str]:
    """Return the names of the operations and routes in the state dict of a quantized module."""
    keys = (key for key in state_dict if isinstance(key, str) and key.endswith(RECORD))
    return [key.removesuffix(RECORD).removesuffix(".") for key in keys]
