"""Tests of folds with random inputs, for layers and batch norms that have a forward of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.network.fold_plan import Fold
from lightning_ptq.network.foldable import FoldableBatchNorm
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.own_forward import has_own_forward
from lightning_ptq.network.swapping import float_class_of
from lightning_ptq.network.trace import first_argument

_SCALES = (0.0, 1.0, 100.0)  # at 0 only the bias counts; at 100 an activation meets values of both signs
_TOLERANCE = 1e-4


@dataclass
class _Call:
    """A call of a module without the values of its input.

    Attributes:
        args: Positional arguments, with None for the input.
        kwargs: Keyword arguments, with None for the input.
        place: Position or keyword of the input.
        like: An empty tensor of the input's dtype and device.
        size: Shape of the input.
        magnitude: Greatest absolute value of the input.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    like: Tensor
    size: tuple[int, ...]
    magnitude: float

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the main tensor of the module's output for the input ``x``."""
        args = tuple(x if at == self.place else value for at, value in enumerate(self.args))
        kwargs = {key: x if key == self.place else value for key, value in self.kwargs.items()}
        with torch.random.fork_rng(devices=[]):  # a forward that draws random numbers draws the same ones again
            torch.manual_seed(0)
            output = module(*args, **kwargs)
        return module.output_tensor(output) if isinstance(module, QuantizedOp) else cast(Tensor, output)

    def inputs(self) -> list[Tensor]:
        """Return random inputs of several magnitudes."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.size, generator=generator).to(self.like) * self.magnitude
        return [x * scale for scale in _SCALES]


class RecordedCalls:
    """The first calls of those modules that have to be tested: with a forward of their own, or with hooks.

    Args:
        modules: Modules of the network by qualified name.
        folds: The folds that they may take part in.
    """

    def __init__(self, modules: dict[str, nn.Module], folds: Iterable[Fold]) -> None:
        names = dict.fromkeys(name for fold in folds for name in (fold.norm, *fold.layers))
        self.modules = {name: modules[name] for name in names if _is_own(modules[name])}
        self.calls: dict[str, _Call] = {}

    def record(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call; a hook of the module."""
        if isinstance(module, QuantizedOp):
            x = next(iter(module.input_tensors(args, kwargs).values()))
            channel_dim = module.channel_dim(x)
        else:
            x, channel_dim = first_argument(args, kwargs), 1
        if name in self.calls or not x.numel():
            return
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        place = next(at for at, value in places if value is x)
        others = any(isinstance(value, Tensor) for at, value in places if at != place)
        rows = x if others or channel_dim == 0 else x[:2]
        self.calls[name] = _Call(
            tuple(None if at == place else value for at, value in enumerate(args)),
            {key: None if key == place else value for key, value in kwargs.items()},
            place,
            x.new_empty(0),
            tuple(rows.shape),
            float(x.detach().abs().max()) or 1.0,
        )


def _is_own(module: nn.Module) -> bool:
    return (
        bool(module._forward_hooks)
        or has_own_forward(module)
        or not float_class_of(module).__module__.startswith("torch.nn.")
    )


@torch.no_grad()
def why_not(fold: Fold, modules: dict[str, nn.Module], recorded: RecordedCalls) -> str:
    """Return why a fold does not hold for random inputs, or an empty text.

    A norm folded into the layer before it must compute from normalized inputs what it computed from the layer's
    outputs; one folded into layers after it must compute nothing any more. Layers must scale and shift their outputs,
    or compute from the norm's inputs what they computed from its outputs.
    """
    names = [name for name in (fold.norm, *fold.layers) if name in recorded.modules]
    for name in names:
        if name not in recorded.calls:
            return f"{name} did not run on the first batches"
        try:
            if not _holds(fold, name, modules, recorded.calls[name]):
                return f"the forward of {type_name(modules[name])} does more, or something else"
        except Exception as error:  # whatever the user's code raises on inputs that it does not know
            return f"the forward of {type_name(modules[name])} fails for random inputs: {error}"
    return ""


def type_name(module: nn.Module) -> str:
    """Return the name of a module's float class."""
    return cast(str, float_class_of(module).__name__)


def _holds(fold: Fold, name: str, modules: dict[str, nn.Module], call: _Call) -> bool:
    norm, module = cast(FoldableBatchNorm, modules[fold.norm]), modules[name]
    gain, shift = norm.gain_and_shift()
    is_norm = module is norm
    if fold.ahead and not is_norm:
        channels = fold.channels[fold.layers.index(name)].to(gain.device)
        gain, shift = gain[channels], shift[channels]

    def normalized(tensor: Tensor) -> Tensor:
        dim = module.channel_dim(tensor) if isinstance(module, QuantizedOp) else 1
        shape = [-1 if at == dim else 1 for at in range(tensor.dim())]
        return tensor * gain.view(shape).to(tensor) + shift.view(shape).to(tensor)

    inputs = after = call.inputs()
    if fold.ahead and is_norm:
        expected = inputs
        if not all(close(call.run(module, x), normalized(x)) for x in inputs):
            return False
    elif fold.ahead:
        expected = [call.run(module, normalized(x)) for x in inputs]
    elif is_norm:
        expected, after = [call.run(module, x) for x in inputs], list(map(normalized, inputs))
    else:
        expected = [normalized(call.run(module, x)) for x in inputs]
    unfold = fold.apply(modules)
    try:
        return all(map(close, [call.run(module, x) for x in after], expected))
    finally:
        unfold()


def close(found: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Return True if two tensors are equal but for rounding errors, relative to the greatest value."""
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6)
