"""Putting quantized layers in the place of float ones, folding batch norms, and undoing both."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_ptq.errors import (
    SurgeryError,
    TiedWeightWarning,
    UnsupportedLayerWarning,
    warn,
)
from lightning_ptq.network.layers import FoldableBatchNorm, QuantLayer, swapped_class
from lightning_ptq.numerics.qconfig import QConfig


@dataclass
class Prepared:
    """A module whose layers were swapped for their quantized kin, and how to take that back.

    Attributes:
        module: The root.
        qconfig: What is to be quantized, and how.
        float_bytes: Bytes of the float module's state, shared tensors counted once.
    """

    module: nn.Module
    qconfig: QConfig
    float_bytes: int = 0
    _originals: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)
    _values: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    @property
    def layers(self) -> dict[str, QuantLayer]:
        """The quantizable layers by qualified name, in registration order."""
        return quant_layers(self.module)

    def remember(self, tensor: Tensor) -> None:
        """Have :meth:`undo` give a tensor outside the swapped layers the values back that it has now."""
        if all(tensor is not known for known, _ in self._values):
            self._values.append((tensor, tensor.detach().clone()))

    def undo(self) -> None:
        """Put the float layers back, with the parameters they had; does nothing the second time."""
        for tensor, value in self._values:
            tensor.detach().copy_(value)
        self._values.clear()
        for parent, name, original in reversed(self._originals):
            parent._modules[name] = original
        self._originals.clear()


def quant_layers(module: nn.Module) -> dict[str, QuantLayer]:
    """The quantizable layers of a prepared module by qualified name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, QuantLayer)}


def is_prepared(module: nn.Module) -> bool:
    """True if any layer below ``module`` has been swapped already."""
    return any(isinstance(child, (QuantLayer, FoldableBatchNorm)) for child in module.modules())


def prepare(module: nn.Module, qconfig: QConfig | str) -> Prepared:
    """Swap the quantizable layers of ``module``, in place, for their quantized kin; they still compute in float.

    A prepared module has the state dict of the float one, takes the state dict of a float module and that of a
    quantized one, and shares its parameters with the layers that :meth:`Prepared.undo` puts back.

    Args:
        module: Any module; convolutions (1-3 d), transposed convolutions (1-2 d), linear layers, classes derived from
            them, and batch norms are swapped.
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
    kin: dict[int, nn.Module] = {}
    skipped = []
    names = {id(child): name for name, child in module.named_modules()}
    for parent in reversed(list(module.modules())):  # inner ones first: a layer's kin takes over its children
        for name, child in list(parent._modules.items()):
            quantized_class = None if child is None else swapped_class(type(child))
            if child is None or quantized_class is None:
                continue
            if not _is_plain(child):
                skipped.append(names[id(child)])
                continue
            if id(child) not in kin:
                kin[id(child)] = quantized_class.from_float(child)
            prepared._originals.append((parent, name, child))
            parent._modules[name] = kin[id(child)]
    try:
        _check(prepared, len(names))
        if skipped:
            warn(
                f"{', '.join(skipped)}: the weight is lazy or re-parametrized, so the layer stays float. Run one"
                " forward first, or call torch.nn.utils.parametrize.remove_parametrizations on it.",
                UnsupportedLayerWarning,
                stacklevel=2,
            )
        _mark_tied(module)
    except BaseException:  # a warning may be an error, too
        prepared.undo()
        raise
    return prepared


def _check(prepared: Prepared, modules: int) -> None:
    if not prepared.layers:
        raise SurgeryError(
            f"{type(prepared.module).__name__} has nothing to quantize: no convolution and no linear layer"
            f" with a weight of its own among its {modules} modules."
        )
    prepared.qconfig.check_patterns(prepared.layers)


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and not nn.parameter.is_lazy(weight)


def _mark_tied(module: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, child in module.named_modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    tied = []
    for name, layer in quant_layers(module).items():
        layer.tied = len(owners[id(layer.weight)]) > 1
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
