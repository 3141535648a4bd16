"""Preparing a module: its float layers become quantized ones, and can be made float again."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from lightning_ptq.arguments import check_is_module
from lightning_ptq.errors import BakedWeightWarning, SurgeryError, TiedWeightWarning, UnsupportedLayerWarning, warn
from lightning_ptq.network.baking import Baked, bake
from lightning_ptq.network.callers import add_call_sites, call_sites, possible_sites
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.parameters import parameters_of
from lightning_ptq.network.routes import routed
from lightning_ptq.network.swapping import FloatState, Swapped, counterpart_of, swapped_class
from lightning_ptq.network.tables import MAX_NORM
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.runtime.patching import TensorSnapshot


@dataclass
class Prepared:
    """A module whose layers were turned into their quantized counterparts, and how to undo that.

    Attributes:
        module: The root module.
        qconfig: What is to be quantized, and how.
        float_bytes: Bytes of the float module's state; shared tensors count once.
        baked: Number of parameters of each layer whose computed weight became a parameter, by qualified name.
    """

    module: nn.Module
    qconfig: QConfig
    float_bytes: int = 0
    baked: dict[str, int] = field(default_factory=dict)
    _originals: list[FloatState | Baked] = field(default_factory=list, repr=False)
    _places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)
    _others: TensorSnapshot = field(default_factory=lambda: TensorSnapshot({}), repr=False)

    @property
    def layers(self) -> dict[str, QuantizedOp]:
        """The operations that can be quantized, by qualified name, in registration order."""
        return quantized_ops(self.module)

    def add_call_sites(self, names: Iterable[str], routes: Mapping[str, Iterable[str]] | None = None) -> list[str]:
        """Make call sites and routes; see :func:`~lightning_ptq.network.callers.add_call_sites`.

        Returns:
            The names of new call sites, and of layers with new routes to them.
        """
        before = self.layers.keys()
        modules = dict(self.module.named_modules())
        known = {id(layer) for owner in routes or () for layer in routed(modules[owner])}
        self.remember_callers(add_call_sites(self.module, names, routes))
        ways = {name for layers in (routes or {}).values() for name in layers if id(modules[name]) not in known}
        return [name for name in self.layers if name not in before or name in ways]

    def remember_callers(self, callers: Iterable[FloatState]) -> None:
        """Have :meth:`undo` restore the modules that call sites were added to."""
        self._originals += callers

    def remember(self, tensor: Tensor) -> None:
        """Have :meth:`undo` restore the present values of a tensor outside the swapped layers."""
        self._others.add(str(id(tensor)), tensor)  # the snapshot holds the tensor, so that its id is not reused

    def undo(self) -> None:
        """Make the layers float again, with the parameters they had; do nothing the second time.

        The layers are the same objects as before :func:`prepare`. Hooks that were added or removed since stay so.
        """
        self._others.restore()
        self._others = TensorSnapshot({})
        for original in reversed(self._originals):
            original.restore()
        for parent, name, layer in self._places:  # such as conversions to SyncBatchNorm have replaced
            parent._modules[name] = layer
        self._originals.clear()
        self.baked.clear()
        self._places.clear()


def is_prepared(module: nn.Module) -> bool:
    """Return True if any layer below ``module`` has been swapped already."""
    return any(isinstance(child, Swapped) for child in module.modules())


def prepare(module: nn.Module, qconfig: QConfig | str) -> Prepared:
    """Turn the quantizable layers of ``module`` into quantized counterparts, in place; they still compute in float.

    A prepared module has the state dict of the float one and loads the state dict of a float or of a quantized module.
    Each layer stays the same object and changes its class, so that other references to it and its hooks keep working.
    A layer that computes its weight, by weight norm for example, gets a plain weight of that value.

    Args:
        module: Any module. Convolutions, transposed convolutions, linear and bilinear layers, embeddings, batch norms,
            layers registered by :func:`~lightning_ptq.network.layers.register_layer`, and derived classes are swapped.
        qconfig: What to quantize; a text such as ``"w4a8"`` is parsed.

    Raises:
        SurgeryError: If there is nothing to quantize, or the module has been prepared already.
        QConfigError: If the config cannot be read or one of its patterns matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> prepared = prepare(net, "w8a8")
        >>> type(net[0]).__name__
        'QuantLinear'
        >>> prepared.undo()
        >>> type(net[0]).__name__
        'Linear'
    """
    check_is_module(module)
    qconfig = QConfig.parse(qconfig)
    if is_prepared(module):
        raise SurgeryError(
            f"{type(module).__name__} has quantized layers already. Quantize the float module again instead: load its"
            " float weights into a new instance (or call undo() on what prepare() returned)."
        )
    prepared = Prepared(module, qconfig, _state_bytes(module))
    modules = len(list(module.modules()))
    try:
        skipped = _swap(prepared)
        _exclude_sites(prepared)
        _check(prepared, modules, skipped)
        if skipped:
            warn(_describe(skipped), UnsupportedLayerWarning, stacklevel=2)
        _warn_of_baked(prepared)
        _mark_tied(module)
    except BaseException:  # filters may turn a warning into an error
        prepared.undo()
        raise
    return prepared


def _exclude_sites(prepared: Prepared) -> None:
    """Have the call sites that layers bring with them stay float, where only layers are to be quantized."""
    if prepared.qconfig.operations == "layers":
        sites = tuple(map(glob.escape, call_sites(prepared.module)))
        prepared.qconfig = replace(prepared.qconfig, exclude=(*prepared.qconfig.exclude, *sites))


def _swap(prepared: Prepared) -> dict[str, str]:
    """Swap all layers and return why others cannot be swapped, by qualified name."""
    module = prepared.module
    skipped: dict[str, str] = {}
    scripted: tuple[str, ...] = ()
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            if not name.startswith(scripted) and next(child.parameters(), None) is not None:
                skipped[name] = _SCRIPTED
            scripted += (f"{name}.",)
        elif reason := _swap_one(prepared, name, child):
            skipped[name] = reason
    swapped = {id(original.module) for original in prepared._originals}
    prepared._places += [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in swapped
    ]
    return skipped


def _swap_one(prepared: Prepared, name: str, child: nn.Module) -> str:
    """Swap a module that has a counterpart; return why it stays float, or an empty text."""
    kind = counterpart_of(child, prepared.qconfig.operations)
    if kind is None or (child is prepared.module and issubclass(kind, QuantizedOp)):  # the root is no layer
        return ""
    if not issubclass(kind, QuantizedOp):  # such modules stay as they are without a word
        _swap_as(prepared, kind, child)
        return ""
    baked, reason = bake(child)
    if reason := reason or _swap_as(prepared, kind, child):
        if baked is not None:
            baked.restore()
        return reason
    if baked is not None:
        cast(QuantizedOp, child).baked = baked
        prepared._originals.insert(-1, baked)  # restored after the class
        prepared.baked[name] = sum(parameter.numel() for parameter in child.parameters(recurse=False))
    return ""


def _swap_as(prepared: Prepared, kind: type[Swapped], child: nn.Module) -> str:
    """Swap a module for the counterpart of its class; return why that is not possible, or an empty text."""
    if reason := kind.reason_against(child):
        return reason
    original = FloatState(child)
    try:
        counterpart = swapped_class(type(child))
        if counterpart is None:
            raise TypeError(f"{type(child).__name__} cannot be derived from")
        counterpart.swap(child)
    except Exception as error:  # classes can forbid to be derived from, or have another layout in memory
        original.restore()
        return f"its class cannot be changed ({error})"
    prepared._originals.append(original)
    return ""


def _check(prepared: Prepared, modules: int, skipped: Mapping[str, str]) -> None:
    own = prepared.qconfig.operations != "layers" and parameters_of(dict(prepared.module.named_modules()))
    if not prepared.layers and (skipped or not own):  # a forward may multiply by parameters of its modules' own
        hint = f" These could not be quantized: {_describe(skipped)}" if skipped else ""
        raise SurgeryError(
            f"{type(prepared.module).__name__} has nothing to quantize: no layer of a registered class (nn.Conv2d,"
            f" nn.Linear, ...) with weights of its own among its {modules} modules.{hint}"
        )
    qconfig, names = prepared.qconfig, list(prepared.layers)
    if qconfig.operations != "layers":
        # Which call sites there are is known after the first forward; the calibration then checks the patterns again.
        names += [name for pattern in qconfig.patterns for name in possible_sites(prepared.module, pattern)]
    qconfig.check_patterns(names)


_SCRIPTED = "it is scripted by torch.jit"
_REMEDIES = {
    "the weight is lazy or no parameter": "Run one forward first, or make the weight an nn.Parameter of the layer.",
    "its weight is not of real floating-point numbers": "Only such weights are quantized.",
    MAX_NORM: "Limit the norms of its weight once, and set max_norm to None.",
    _SCRIPTED: "Script it after quantization instead.",
}


def _describe(skipped: Mapping[str, str]) -> str:
    """Return the layers that stay float, by reason, and what to do about each reason."""
    lines = []
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        remedy = _REMEDIES.get(reason, "Register its class with a counterpart of your own, or change the class.")
        lines.append(f"{', '.join(names)}: {reason}, so the layer stays float. {remedy}")
    return " ".join(lines)


def _warn_of_baked(prepared: Prepared) -> None:
    if prepared.baked:
        warn(
            f"{', '.join(prepared.baked)}: the weight is computed from other tensors in each forward. It was computed"
            " once and is a parameter now, which can be quantized.",
            BakedWeightWarning,
            stacklevel=3,
        )


def _mark_tied(module: nn.Module) -> None:
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    tied = []
    for name, layer in quantized_ops(module).items():
        layer.tied = any(owners[id(weight)] > 1 for weight in layer.weights.values())
        tied += [name] if layer.tied else []
    if tied:
        warn(
            f"{', '.join(tied)}: the weight is shared with another layer. It is quantized but not tuned, and no batch"
            " norm is folded into it, so that the tie holds.",
            TiedWeightWarning,
            stacklevel=3,
        )


def _state_bytes(module: nn.Module) -> int:
    values = module.state_dict(keep_vars=True).values()
    tensors = {id(value): value for value in values if isinstance(value, Tensor) and not nn.parameter.is_lazy(value)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
