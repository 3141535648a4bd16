"""Routes: calls of functions with a layer's weight, such as ``F.linear(x, self.qkv.weight)``, that go to the layer.

The layer then quantizes input and weight as if it had been called itself, and computes the function with them. A module
whose forward makes such calls holds a :class:`Route` to each layer, so that a state dict tells of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.record import RECORD
from lightning_ptq.runtime.frames import Frame

_OWN_BIAS = "the layer's own bias"

WEIGHTED: dict[Any, str] = {
    F.linear: "linear",
    **{
        function: name
        for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
        for function in (getattr(F, name), getattr(torch, name))
    },
}
"""Functions of an input, a weight, a bias and further arguments, by what they are called here."""

_BYTES = 512

_COMPUTE = {name: function for function, name in WEIGHTED.items()}


@dataclass
class Functional:
    """A function that a layer computes in place of its own forward.

    Attributes:
        function: Its name in :data:`WEIGHTED`.
        bias: The bias of the call; the layer's own one if that was passed.
        args: Arguments after the bias.
        kwargs: Arguments by keyword, without those before.
    """

    function: str
    bias: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the function.

        Args:
            x: The input.
            weight: The layer's weight.
            bias: The layer's bias.
        """
        chosen = bias if isinstance(self.bias, str) else self.bias
        found: Tensor = _COMPUTE[self.function](x, weight, chosen, *self.args, **self.kwargs)
        return found


class Route(nn.Module):
    """The way from a module that calls functions to a layer below it whose weight it passes.

    Args:
        target: Name of the layer, relative to the module; empty until a state dict is loaded.
    """

    def __init__(self, target: str = "") -> None:
        super().__init__()
        # Of one length for all names, so that every state dict fits.
        data = bytearray(json.dumps({"route": target}).encode().ljust(_BYTES))
        self.register_buffer(RECORD, torch.frombuffer(data, dtype=torch.uint8).clone())
        self._known: tuple[Any, str] = (None, "")

    @property
    def target(self) -> str:
        """Name of the layer, relative to the module that calls the function."""
        record: Tensor = getattr(self, RECORD)
        if type(record) is not Tensor:  # torch.export puts a tensor without values in its place
            return self._known[1]
        key = (id(record), record._version)
        if self._known[0] != key:
            self._known = key, json.loads(bytes(record.cpu().tolist()))["route"]
        return self._known[1]


def route_call(frame: Frame, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Functional] | None:
    """Return the layer that a call of a function belongs to, and the call; None if it belongs to none.

    Args:
        frame: The forward that calls.
        name: Name of the function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    kwargs = dict(kwargs)
    rest = list(args[1:])
    weight = rest.pop(0) if rest else kwargs.pop("weight", None)
    for layer in routed(frame.owner):
        if _is_own(layer, "weight", weight):
            bias = rest.pop(0) if rest else kwargs.pop("bias", None)
            own = _is_own(layer, "bias", bias)
            return layer, Functional(name, _OWN_BIAS if own else bias, tuple(rest), kwargs)
    return None


def _is_own(layer: QuantizedOp, name: str, value: Any) -> bool:
    """Return True if a value is what code outside a layer reads as this tensor of it, in any mode."""
    return value is not None and (value is layer._parameters.get(name) or value is (layer.reference or {}).get(name))


def routed(owner: nn.Module) -> list[Any]:
    """Return the layers that a module has routes to."""
    found = []
    for child in owner._modules.values():
        if isinstance(child, Route) and child.target:
            found.append(owner.get_submodule(child.target))
    return found


def routable(ops: Iterable[tuple[str, QuantizedOp]]) -> dict[int, str]:
    """Return the names of the layers whose weight a function may use in their place, by the id of the weight."""
    return {
        id(op._parameters["weight"]): name
        for name, op in ops
        if tuple(op.weight_names) == ("weight",) and not op.is_lookup and op._parameters.get("weight") is not None
    }
