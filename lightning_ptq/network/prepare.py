"""Preparing a module: quantized layers take the place of float ones, and can be taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_ptq.errors import SurgeryError, TiedWeightWarning, UnsupportedLayerWarning, warn
from lightning_ptq.network.op import QuantizedOp, quantized_ops
from lightning_ptq.network.swapping import Swapped, swapped_class
from lightning_ptq.numerics.qconfig import QConfig
from lightning_ptq.runtime.patching import TensorSnapshot


@dataclass
class Prepared:
    """A module whose layers were swapped for their quantized counterparts, and how to undo that.

    Attributes:
        module: The root module.
        qconfig: What is to be quantized, and how.
        float_bytes: Bytes of the float module's state; shared tensors count once.
    """

    module: nn.Module
    qconfig: QConfig
    float_bytes: int = 0
    _originals: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)
    _others: TensorSnapshot = field(default_factory=lambda: TensorSnapshot({}), repr=False)

    @property
    def layers(self) -> dict[str, QuantizedOp]:
        """The operations that can be quantized, by qualified name, in registration order."""
        return quantized_ops(self.module)

    def remember(self, tensor: Tensor) -> None:
        """Have :meth:`undo` restore the present values of a tensor outside the swapped layers."""
        self._others.add(str(id(tensor)), tensor)  # the snapshot holds the tensor, so that its id is not reused

    def undo(self) -> None:
        """Put the float layers back, with the parameters they had; do nothing the second time."""
        self._others.restore()
        self._others = TensorSnapshot({})
        for parent, name, original in reversed(self._originals):
            parent._modules[name] = original
        self._originals.clear()


def is_prepared(module: nn.Module) -> bool:
    """Return True if any layer below ``module`` has been swapped already."""
    return any(isinstance(child, Swapped) for child in module.modules())


def prepare(module: nn.Module, qconfig: QConfig | str) -> Prepared:
    """Swap the quantizable layers of ``module``, in place, for quantized counterparts; they still compute in float.

    A prepared module has the state dict of the float one and loads the state dict of a float or of a quantized module.
    It shares its parameters with the layers that :meth:`Prepared.undo` puts back.

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
    qconfig = QConfig.parse(qconfig)
    if is_prepared(module):
        raise SurgeryError(
            f"{type(module).__name__} has quantized layers already. Quantize the float module again instead: load its"
            " float weights into a new instance (or call undo() on what prepare() returned)."
        )
    prepared = Prepared(module, qconfig, _state_bytes(module))
    modules = len(list(module.modules()))
    skipped = _swap(prepared)
    try:
        _check(prepared, modules)
        if skipped:
            warn(
                f"{', '.join(skipped)}: the weight is lazy or re-parametrized, so the layer stays float. Run one"
                " forward first, or call torch.nn.utils.parametrize.remove_parametrizations on it.",
                UnsupportedLayerWarning,
                stacklevel=2,
            )
        _mark_tied(module)
    except BaseException:  # filters may turn a warning into an error
        prepared.undo()
        raise
    return prepared


def _swap(prepared: Prepared) -> list[str]:
    """Swap all layers and return the names of those that cannot be swapped."""
    module = prepared.module
    counterparts: dict[int, nn.Module] = {}
    skipped = []
    names = {id(child): name for name, child in module.named_modules()}
    for parent in reversed(list(module.modules())):  # inner modules first: a counterpart takes over the children
        for name, child in list(parent._modules.items()):
            quantized_class = None if child is None else swapped_class(type(child))
            if child is None or quantized_class is None:
                continue
            if not _has_weights(child, quantized_class):
                skipped.append(names[id(child)])
                continue
            if id(child) not in counterparts:  # a layer that is registered twice keeps being one layer
                counterparts[id(child)] = quantized_class.from_float(child)
            prepared._originals.append((parent, name, child))
            parent._modules[name] = counterparts[id(child)]
    return skipped


def _check(prepared: Prepared, modules: int) -> None:
    if not prepared.layers:
        raise SurgeryError(
            f"{type(prepared.module).__name__} has nothing to quantize: no layer of a registered class (nn.Conv2d,"
            f" nn.Linear, ...) with weights of its own among its {modules} modules."
        )
    prepared.qconfig.check_patterns(prepared.layers)


def _has_weights(module: nn.Module, quantized_class: Any) -> bool:
    """Return True if all weights that the quantized class names are parameters with a shape."""
    weights = [module._parameters.get(name) for name in getattr(quantized_class, "weight_names", ())]
    return all(weight is not None and not nn.parameter.is_lazy(weight) for weight in weights)


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
