"""Parameters that a module multiplies by itself, such as stacked experts: operations that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.numerics.granularity import ChannelLayout
from lightning_ptq.runtime.frames import outside

_NAME = re.compile(r"(.+)_weight_(\d)")


class ParameterOp(QuantizedOp):
    """A parameter that a module multiplies by in its own forward.

    The parameter moves from the module to this child of it. The module's attribute then is what the child returns: the
    quantized parameter.

    Args:
        weight: The parameter.
        dim: Its dimension of output channels. In three dimensions, after the first, each slice along the first
            dimension has channels of its own.
    """

    weight_names = ("weight",)
    is_linear = False
    is_lookup = True  # its output is its weight
    quantized_from = "products"

    weight: Tensor

    def __init__(self, weight: nn.Parameter, dim: int) -> None:
        super().__init__()
        self.init_op()
        self.register_parameter("weight", weight)
        self.dim = dim

    def channels(self, name: str) -> ChannelLayout:
        """Return where the output channels lie."""
        slices = self.weight.shape[0] if self.dim and self.weight.dim() == 3 else 1
        return ChannelLayout(self.dim, slices)

    def forward(self) -> Tensor:
        """Return the parameter, quantized."""
        with outside:
            if self.mode == "float":
                found = (self.reference or {}).get("weight")
                return self.weight if found is None else found
            quantizer = self.weight_quantizers.get("weight")
            if quantizer is None:
                return self.weight
            return quantizer(self.weight) if self.training else quantizer.constant(self.weight)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"{tuple(self.weight.shape)}, channels in dimension {self.dim}"


def move_parameter(module: nn.Module, name: str) -> bool:
    """Move a parameter of a module into a :class:`ParameterOp` of this name; return False if there is none.

    Args:
        module: A module that reads the attribute from its children; see ``Caller``.
        name: Name of the operation: that of the parameter, ``_weight_``, and the dimension of its output channels.
    """
    match = _NAME.fullmatch(name)
    parameter = module._parameters.get(match[1]) if match else None
    if match is None or parameter is None or int(match[2]) >= parameter.dim():
        return False
    op = ParameterOp(parameter, int(match[2]))
    del module._parameters[match[1]]
    module._modules[name] = op.train(module.training)
    module.__dict__["moved"] = {**module.__dict__.get("moved", {}), match[1]: name}
    return True


def is_parameter_op(name: str) -> bool:
    """Return True if a child's name can be that of a :class:`ParameterOp`."""
    return bool(_NAME.fullmatch(name))


def parameter_op_name(parameter: str, dim: int) -> str:
    """Return the name of the operation that a parameter moves to."""
    return f"{parameter}_weight_{dim}"


def shares_storage(tensor: Any, others: Iterable[Any]) -> Any:
    """Return the first of some tensors whose storage a tensor shares, as a slice of it does; None if there is none."""
    if not isinstance(tensor, Tensor):
        return None
    try:
        key = tensor.untyped_storage()._cdata
        return next((other for other in others if other.untyped_storage()._cdata == key), None)
    except (NotImplementedError, RuntimeError):  # tensors without a storage, such as those of vmap
        return None


def channel_dim(parameter: Tensor, operand: Tensor, dim: int) -> int | None:
    """Return the dimension of a parameter that is dimension ``dim`` of an operand made of it by slicing or transposing.

    None if that cannot be told.
    """
    size, stride = operand.shape[dim], operand.stride(dim)
    found = [d for d in range(parameter.dim()) if parameter.shape[d] == size and parameter.stride(d) == stride]
    return found[0] if len(found) == 1 else None
