"""Parameters that a module multiplies by itself, such as stacked experts: operations that hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.numerics.granularity import ChannelLayout
from lightning_ptq.runtime.frames import Frame, frames, outside
from lightning_ptq.runtime.structure import dense, is_float, tensors_in

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


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters of modules that are no operations, by qualified name, as far as they can be weights."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in modules.items()
        if not isinstance(module, (QuantizedOp, torch.jit.ScriptModule))
        for key, parameter in module._parameters.items()
        if parameter is not None and not nn.parameter.is_lazy(parameter) and parameter.dim() > 1 and is_float(parameter)
    }


def find_weight(frame: Frame, function: str, operands: tuple[Any, ...], equation: str) -> int | None:
    """Return which operand of a product is a parameter, or a part of one; None if neither is.

    While calls are discovered, this is a parameter of the module that calls or of one below it, outside operations,
    which is then noted; otherwise one that the module has read from the operation that holds it.

    Args:
        frame: The forward that calls.
        function: Name of the function.
        operands: Its two operands.
        equation: That of a sum of products of Einstein's notation.
    """
    prefix = f"{frame.name}." if frame.name else ""
    below = {name: parameter for name, parameter in frames.parameters.items() if name.startswith(prefix)}
    candidates = [*frame.read, *below.values()]
    for side in (1, 0) if candidates else ():
        parameter = shares_storage(operands[side], candidates)
        if parameter is None or (side == 0 and function not in ("matmul", "baddbmm", "addmm", "einsum")):
            continue
        dim = _channel_dim(function, parameter, operands[side], side, equation)
        if dim is None:
            return None
        for name in [name for name, known in below.items() if known is parameter]:
            frame.parameters.setdefault(name, dim)
        return side
    return None


def hand_out(frame: Frame, result: Any) -> None:
    """Have the forward around one that has ended know the parameters among its results."""
    outer = frames.stack[-1] if frames.stack else None
    if frame.read and outer is not None:
        tensors = list(dense(tensors_in(result)))
        outer.read += [value for value in frame.read if shares_storage(value, tensors) is not None]


def _channel_dim(function: str, parameter: Tensor, operand: Tensor, side: int, equation: str) -> int | None:
    """Return the dimension of a parameter that holds the output channels of a product with it."""
    if function.startswith("conv"):
        return 0 if operand.shape == parameter.shape and not function.startswith("conv_transpose") else None
    if function == "einsum":
        dim = _einsum_dim(equation, side, parameter.dim())
        return dim if operand.shape == parameter.shape and operand.stride() == parameter.stride() else None
    dim = -2 if side == 0 or function == "linear" else -1
    size, stride = operand.shape[dim], operand.stride(dim)
    # The operand may be made of the parameter by slicing or transposing.
    found = [d for d in range(parameter.dim()) if parameter.shape[d] == size and parameter.stride(d) == stride]
    return found[0] if len(found) == 1 else None


def _einsum_dim(equation: str, side: int, dims: int) -> int | None:
    """Return the dimension of an operand that the output has and the other operand has not, if there is one.

    An operand of three dimensions may also have its first one in the output: its slices have channels of their own.
    """
    terms, _, output = equation.replace(" ", "").partition("->")
    labels, other = (terms.split(",")[at] for at in (side, 1 - side))
    if len(labels) != dims or "." in labels or dims > 3:
        return None
    free = [at for at, label in enumerate(labels) if label in output and label not in other]
    if dims == 3 and labels[0] in output:
        free = [at for at in free if at > 0] or free
        return free[0] if len(free) == 1 else None
    return free[0] if len(free) == 1 and (dims == 2 or free[0] == 0) else None
