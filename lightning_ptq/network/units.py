"""Units of reconstruction: single layers, or blocks, found by the structure of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from lightning_ptq.arguments import texts
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.trace import Trace
from lightning_ptq.numerics.qconfig import LayerQConfig, check_patterns, matches
from lightning_ptq.runtime.journal import LayerStates

UnitKind = Literal["layer", "block"]
BlockRule = Sequence[str] | Callable[[str, nn.Module], bool]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MOST_LAYERS = 8  # in a module that counts as a block only because nothing inside it looks like one


@dataclass(frozen=True)
class Unit:
    """A layer or block whose quantized layers are reconstructed together.

    Attributes:
        name: Qualified name of the layer or block.
        module: The layer or block.
        layers: Its quantized operations that no earlier unit holds, by qualified name, in execution order.
        calls: Number of its calls in one forward.
    """

    name: str
    module: nn.Module
    layers: dict[str, QuantizedOp]
    calls: int

    @property
    def is_lookup(self) -> bool:
        """True if it is an embedding: each row is alone with its scale, so tuning cannot do better than rounding."""
        return isinstance(self.module, QuantizedOp) and self.module.is_lookup


def find_units(
    module: nn.Module, trace: Trace, granularity: UnitKind = "block", blocks: BlockRule | None = None
) -> list[Unit]:
    """Return the units of a calibrated module in execution order; every quantized operation is in exactly one.

    A block is an element of a ``Sequential``, ``ModuleList`` or ``ModuleDict``, or a module whose own forward adds two
    tensors (a residual connection). A module that holds several such elements of one type, as a stage or a backbone
    does, is not a block. Layers outside every block are units of their own.

    Args:
        module: The calibrated module.
        trace: Trace of one of its forwards.
        granularity: ``"layer"``: each layer alone; ``"block"``: blocks where there are any.
        blocks: Name patterns of the blocks, or a function of name and module that is true for a block; None to search.

    Raises:
        QConfigError: If a pattern matches no module.
    """
    modules = dict(module.named_modules())
    order = {n: i for i, n in enumerate(trace.layer_order)}
    layers = {n: m for n in trace.layer_order if isinstance(m := modules[n], QuantizedOp) and m.is_quantized}
    if granularity == "layer":
        chosen: list[str] = []
    elif blocks is None:
        chosen = _Search(module, trace, layers).found
    elif callable(blocks):
        chosen = [name for name, child in modules.items() if blocks(name, child)]
    else:
        blocks = texts("blocks", blocks, "layers.*")
        check_patterns(blocks, modules, "blocks")
        chosen = [name for name in modules if any(matches(name, pattern) for pattern in blocks)]
    units = []
    taken: set[str] = set()
    # A shorter name is that of an outer block, so outer blocks take their layers before inner ones and single layers.
    for name in [*sorted(chosen, key=len), *layers]:
        inside = {n: layer for n, layer in layers.items() if n not in taken and (n == name or _below(n, name))}
        if inside and trace.calls.get(name):
            taken.update(inside)
            units.append(Unit(name, modules[name], inside, trace.calls[name]))
    return sorted(units, key=lambda unit: min(order[name] for name in unit.layers))


def _below(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(parent + ".")


def _is_container(module: nn.Module) -> bool:
    """Return True for a container that only runs its children in turn, or has no forward of its own."""
    kind = type(module)
    if isinstance(module, nn.Sequential):
        return kind.forward is nn.Sequential.forward
    return isinstance(module, _CONTAINERS) and "forward" not in vars(kind)


class _Search:
    """Searches for blocks from the root downwards and stops at each block."""

    def __init__(self, root: nn.Module, trace: Trace, layers: dict[str, QuantizedOp]) -> None:
        self.root, self.trace, self.layers = root, trace, layers
        self.found: list[str] = []
        self.elements: dict[str, nn.Module] = {}
        for name, child in root.named_modules():
            if isinstance(child, _CONTAINERS):
                for key, element in child.named_children():
                    full = f"{name}.{key}" if name else key
                    if self._count(full) and not _is_container(element) and not isinstance(element, QuantizedOp):
                        self.elements[full] = element
        self._walk("", root)

    def _count(self, name: str) -> int:
        return sum(_below(layer, name) for layer in self.layers)

    def _holds_blocks(self, name: str) -> bool:
        kinds = Counter(type(element) for full, element in self.elements.items() if full != name and _below(full, name))
        return any(count > 1 for count in kinds.values())

    def _walk(self, name: str, module: nn.Module) -> None:
        for key, child in module.named_children():
            full = f"{name}.{key}" if name else key
            count = self._count(full)
            if not count or isinstance(child, QuantizedOp):
                continue
            if not _is_container(child) and self.trace.calls.get(full) and self._is_block(full, count):
                self.found.append(full)
            else:
                self._walk(full, child)

    def _is_block(self, name: str, count: int) -> bool:
        if self._holds_blocks(name):
            return False
        if count == len(self.layers) > 1 and name not in self.elements:
            return False  # a wrapper around the whole network
        if name in self.elements or name in self.trace.residual:
            return True
        # Nothing marks a block here: take a small module without residual connections inside as one.
        return count <= _MOST_LAYERS and not any(_below(other, name) for other in self.trace.residual)


def unit_states(unit: Unit) -> LayerStates:
    """Return a copy of the state of each layer of a unit."""
    return {name: layer.state() for name, layer in unit.layers.items()}


def set_unit_states(unit: Unit, states: LayerStates) -> None:
    """Restore what :func:`unit_states` returned."""
    for name, state in states.items():
        unit.layers[name].load_state(state)


def unit_qconfigs(unit: Unit) -> list[LayerQConfig]:
    """Return the specs of a unit's layers."""
    return [cast(LayerQConfig, layer.qconfig) for layer in unit.layers.values()]
