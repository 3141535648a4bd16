"""Preparing a module: its float layers become quantized ones, and can be made float again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_ptq.arguments import check_is_module
from lightning_ptq.errors import SurgeryError, TiedWeightWarning, UnsupportedLayerWarning, warn
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.swapping import FloatState, Swapped, registered_counterpart, swapped_class
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.runtime.patching import TensorSnapshot


@dataclass
class Prepared:
    """A module whose layers were turned into their quantized counterparts, and how to undo that.

    Attributes:
        module: The root module.
        qconfig: What is to be quantized, and how.
        float_bytes: Bytes of the float module's state; shared tensors count once.
    """

    module: nn.Module
    qconfig: QConfig
    float_bytes: int = 0
    _originals: list[FloatState] = field(default_factory=list, repr=False)
    _places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)
    _others: TensorSnapshot = field(default_factory=lambda: TensorSnapshot({}), repr=False)

    @property
    def layers(self) -> dict[str, QuantizedOp]:
        """The operations that can be quantized, by qualified name, in registration order."""
        return quantized_ops(self.module)

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
        self._places.clear()


def is_prepared(module: nn.Module) -> bool:
    """Return True if any layer below ``module`` has been swapped already."""
    return any(isinstance(child, Swapped) for child in module.modules())


def prepare(module: nn.Module, qconfig: QConfig | str) -> Prepared:
    """Turn the quantizable layers of ``module`` into quantized counterparts, in place; they still compute in float.

    A prepared module has the state dict of the float one and loads the state dict of a float or of a quantized module.
    Each layer stays the same object and changes its class, so that other references to it and its hooks keep working.

    Args:
        module: Any module. Convolutions (1-3 d), transposed convolutions (1-2 d), linear layers, batch norms, layers
            registered by :func:`~lightning_ptq.network.layers.register_layer`, and derived classes are swapped.
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
        _check(prepared, modules, skipped)
        if skipped:
            warn(_describe(skipped), UnsupportedLayerWarning, stacklevel=2)
        _mark_tied(module)
    except BaseException:  # filters may turn a warning into an error
        prepared.undo()
        raise
    return prepared


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
        elif child is not module and (reason := _swap_one(prepared, child)):
            skipped[name] = reason
    swapped = {id(original.module) for original in prepared._originals}
    prepared._places += [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in swapped
    ]
    return skipped


def _swap_one(prepared: Prepared, child: nn.Module) -> str:
    """Swap a module that has a counterpart; return why it stays float, or an empty text."""
    kind = registered_counterpart(type(child))
    if kind is None:
        return ""
    is_layer = issubclass(kind, QuantizedOp)  # other modules stay as they are without a word
    if reason := kind.reason_against(child):
        return reason if is_layer else ""
    counterpart = swapped_class(type(child))
    original = FloatState(child)
    try:
        if counterpart is None:
            raise TypeError(f"{type(child).__name__} cannot be derived from")
        counterpart.swap(child)
    except Exception as error:  # classes can forbid to be derived from, or have another layout in memory
        original.restore()
        return f"its class cannot be changed ({error})" if is_layer else ""
    prepared._originals.append(original)
    return ""


def _check(prepared: Prepared, modules: int, skipped: Mapping[str, str]) -> None:
    if not prepared.layers:
        hint = f" These could not be quantized: {_describe(skipped)}" if skipped else ""
        raise SurgeryError(
            f"{type(prepared.module).__name__} has nothing to quantize: no layer of a registered class (nn.Conv2d,"
            f" nn.Linear, ...) with weights of its own among its {modules} modules.{hint}"
        )
    prepared.qconfig.check_patterns(prepared.layers)


_SCRIPTED = "it is scripted by torch.jit"
_REMEDIES = {
    "the weight is lazy or re-parametrized": "Run one forward first, or call"
    " torch.nn.utils.parametrize.remove_parametrizations on it.",
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
