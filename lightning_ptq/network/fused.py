"""Layers whose products torch computes in one function, such as attention and recurrent layers.

The float class's forward runs as it is, also one of a derived class: it arranges the arguments. While it runs, a mode
of torch hands the calls of that function to the layer, which computes its products on quantized tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.own_forward import has_own_forward
from lightning_ptq.network.swapping import float_class_of
from lightning_ptq.runtime.patching import attributes

See = Callable[[str, Tensor], Tensor]
"""Function of the name of an input and the input, which returns what is to be computed with."""


class _Instead(TorchFunctionMode):
    """Calls other functions in place of some functions of torch.

    Args:
        functions: What to call, by the function of torch.
    """

    def __init__(self, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


class _AllSeen(Exception):
    """Ends a forward that runs only to learn the inputs."""


class FusedLayer(QuantLayer):
    """A layer that computes a function of torch itself. The inputs to be quantized are found inside this function.

    Attributes:
        functions: The functions.
        own_children: Names of the child modules that the float class has. Derived classes may have others, but then
            their forward has to be the float class's: they would run whenever the inputs are looked at.
    """

    functions: ClassVar[tuple[Any, ...]] = ()
    own_children: ClassVar[tuple[str, ...]] = ()
    is_linear = False

    def _init_swapped(self) -> None:
        self.__dict__["weight_names"] = self.weight_names_of(self)
        super()._init_swapped()
        self.__dict__["bias_names"] = tuple(name for name in self.bias_names if self._parameters[name] is not None)

    @classmethod
    def reason_against(cls, module: nn.Module) -> str:
        """Return why ``module`` cannot be quantized, or an empty text."""
        if module._modules.keys() - set(cls.own_children) and not _is_plain(module, cls):
            return "its class adds layers and a forward of its own"
        return super().reason_against(module)

    def compute(self, func: Any, tensors: Mapping[str, Any], see: See | None, *args: Any, **kwargs: Any) -> Any:
        """Compute one of the functions.

        Args:
            func: The function.
            tensors: Weights and biases that take the place of the parameters.
            see: Called with each input before it is multiplied; None to compute in float.
            args: Positional arguments of the function.
            kwargs: Keyword arguments of the function.
        """
        raise NotImplementedError

    def inputs_seen(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Return the inputs that float calls of the functions see in a forward up to the first call's end, by name."""
        seen: dict[str, list[Tensor]] = {}

        def keep(name: str, x: Tensor) -> Tensor:
            seen.setdefault(name, []).append(x)
            self.after_seeing(name)
            return x

        def stop(func: Any, *values: Any, **options: Any) -> Any:
            self.compute(func, self.reference or {}, keep, *values, **options)
            raise _AllSeen

        def end(*_: Any, **__: Any) -> Any:
            raise _AllSeen

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(suppress(_AllSeen))
            for child in filter(None, map(self._modules.get, self.own_children)):  # their hooks are for real calls
                stack.enter_context(attributes(child, {"_call_impl": end}))
            self._with_functions(args, kwargs, self.reference or {}, stop)
        return seen

    def after_seeing(self, name: str) -> None:
        """Be told that :meth:`inputs_seen` has an input; a subclass ends the forward by :meth:`seen_all`."""

    @staticmethod
    def seen_all() -> None:
        """End the forward of :meth:`inputs_seen`."""
        raise _AllSeen

    def _quantize_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs  # they are quantized inside the function

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any]) -> Any:
        see: See | None = None
        if self.mode == "quantized":
            quantizers = self.input_quantizers

            def see(name: str, x: Tensor) -> Tensor:
                return quantizers[name](x) if name in quantizers else x

        def compute(func: Any, *values: Any, **options: Any) -> Any:
            return self.compute(func, tensors, see, *values, **options)

        return self._with_functions(args, kwargs, tensors, compute)

    def _with_functions(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Mapping[str, Any], compute: Callable[..., Any]
    ) -> Any:
        with _Instead({func: partial(compute, func) for func in self.functions}):
            return super()._call(args, kwargs, tensors)


def _is_plain(module: nn.Module, counterpart: type[FusedLayer]) -> bool:
    """Return True if a module has the forward of the class that its counterpart is registered for."""
    of_class = float_class_of(module).forward
    return of_class is super(QuantLayer, counterpart).forward and not has_own_forward(module)
