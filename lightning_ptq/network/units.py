"""Units of reconstruction: single layers, or blocks, found by the structure of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

from torch import nn

from lightning_ptq.arguments import texts
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.slices import Slice, below
from lightning_ptq.network.trace import Trace
from lightning_ptq.numerics.qconfig import LayerQConfig, check_patterns, matches
from lightning_ptq.runtime.journal import LayerStates

UnitKind = Literal["layer", "block"]
BlockRule = Sequence[str] | Callable[[str, nn.Module], bool]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MOST_LAYERS = 8  # in a module that counts as a block only because nothing inside it looks like one
_MOST_CHAINED = 4  # in a ``Sequential`` without residual connections
_SLICE = 3  # layers of a slice of a longer one


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

    def inside(self, name: str) -> str:
        """Return the name of an operation inside the unit's module; empty if it is the module."""
        above = self.module.parent if isinstance(self.module, Slice) else self.name
        return name.removeprefix(above).removeprefix(".")

    @property
    def is_lookup(self) -> bool:
        """True if it is an embedding: each row is alone with its scale, so tuning cannot do better than rounding."""
        return isinstance(self.module, QuantizedOp) and self.module.is_lookup


def find_units(
    module: nn.Module,
    trace: Trace,
    granularity: UnitKind = "block",
    blocks: BlockRule | None = None,
    slices: bool = False,
) -> list[Unit]:
    """Return the units of a calibrated module in execution order; every quantized operation is in exactly one.

    A block is an element of a ``Sequential``, ``ModuleList`` or ``ModuleDict``, or a module whose own forward adds two
    tensors (a residual connection). A module that holds several such elements of one type, as a stage or a backbone
    does, is not a block. In a plain chain, a ``Sequential`` of up to four layers is a block, and longer ones are cut
    into slices of about three layers. Layers outside every block are units of their own.

    Args:
        module: The calibrated module.
        trace: Trace of one of its forwards.
        granularity: ``"layer"``: each layer alone; ``"block"``: blocks where there are any.
        blocks: Name patterns of the blocks, or a function of name and module that is true for a block; None to search.
        slices: Whether long chains are cut; such units run inside :func:`~lightning_ptq.network.slices.running` only.

    Raises:
        QConfigError: If a pattern matches no module.
    """
    modules = dict(module.named_modules())
    order = {n: i for i, n in enumerate(trace.layer_order)}
    layers = {n: m for n in trace.layer_order if isinstance(m := modules[n], QuantizedOp) and m.is_quantized}
    if granularity == "layer":
        chosen: list[str] = []
    elif blocks is None:
        search = _Search(module, trace, layers, slices)
        chosen = search.found
        modules.update((each.name, each) for each in search.slices)
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
        above = modules[name]
        tops = [below(above.parent, key) for key in above.keys] if isinstance(above, Slice) else [name]
        inside = {n: v for n, v in layers.items() if n not in taken and any(n == top or _below(n, top) for top in tops)}
        calls = trace.calls.get(above.parent if isinstance(above, Slice) else name)
        if inside and calls:
            taken.update(inside)
            units.append(Unit(name, above, inside, calls))
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

    def __init__(self, root: nn.Module, trace: Trace, layers: dict[str, QuantizedOp], slices: bool) -> None:
        self.root, self.trace, self.layers = root, trace, layers
        self.found: list[str] = []
        self.slices: list[Slice] = []
        self.elements: dict[str, nn.Module] = {}
        for name, child in root.named_modules():
            if isinstance(child, _CONTAINERS):
                for key, element in child.named_children():
                    full = f"{name}.{key}" if name else key
                    if self._count(full) and not _is_container(element) and not isinstance(element, QuantizedOp):
                        self.elements[full] = element
        self._cuts = slices
        self._walk("", root)
        self.found += [each.name for each in self.slices]

    def _count(self, name: str) -> int:
        return sum(_below(layer, name) for layer in self.layers)

    def _holds_blocks(self, name: str) -> bool:
        inner = (full for full in self.elements if full != name and _below(full, name))
        kinds = Counter(type(self.elements[full]) for full in inner if self._count(full) > 1)
        return any(count > 1 for count in kinds.values())

    def _walk(self, name: str, module: nn.Module) -> None:
        run: list[str] = []  # consecutive children of a chain with a layer or none each
        chained = self._cuts and self._is_chain(name, module)
        for key, child in module.named_children():
            full = below(name, key)
            count = self._count(full) + isinstance(child, QuantizedOp)
            if chained and count <= 1 and full not in self.trace.residual:
                run.append(key)
                continue
            self._cut(name, module, run)
            run = []
            if not count or isinstance(child, QuantizedOp):
                continue
            block = self._is_short_chain(full, child, count) if _is_container(child) else self._is_block(full, count)
            if block and self.trace.calls.get(full):
                self.found.append(full)
            else:
                self._walk(full, child)
        self._cut(name, module, run)

    def _is_chain(self, name: str, module: nn.Module) -> bool:
        """Return True for a ``Sequential`` that calls its children in turn, each as often as it is called."""
        if not isinstance(module, nn.Sequential) or not _is_container(module) or not self.trace.calls.get(name):
            return False
        calls = self.trace.calls
        return all(calls.get(below(name, key)) == calls[name] for key, _ in module.named_children())

    def _is_short_chain(self, name: str, module: nn.Module, count: int) -> bool:
        """Return True for a ``Sequential`` of a few layers without residual connections."""
        marks = [*self.trace.residual, *(other for other in self.elements if self._count(other) > 1)]
        plain = not any(_below(other, name) for other in marks)
        return plain and count <= _MOST_CHAINED and count < len(self.layers) and self._is_chain(name, module)

    def _cut(self, name: str, chain: nn.Module, keys: list[str]) -> None:
        """Cut a run of a chain's children into slices of similar size; each starts with a layer."""
        starts = [place for place, key in enumerate(keys) if self._holds_layer(below(name, key))]
        if not starts:
            return
        if len(starts) == 1 and len(keys) == starts[0] + 1:  # nothing comes after it
            alone = below(name, keys[-1])
            self.found += [alone] * (alone not in self.layers)
            return
        number = -(-len(starts) // _SLICE)
        bounds = [starts[len(starts) * i // number] for i in range(number)] + [len(keys)]
        self.slices += [Slice(name, cast(nn.Sequential, chain), keys[a:b]) for a, b in pairwise(bounds)]

    def _holds_layer(self, name: str) -> bool:
        return name in self.layers or self._count(name) > 0

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
