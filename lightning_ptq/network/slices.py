"""Slices of plain chains: consecutive children of a ``Sequential`` that run as one module while units are tuned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_ptq.network.trace import Event, Trace
from lightning_ptq.runtime.patching import attributes


class Slice(nn.Sequential):
    """Consecutive children of a ``Sequential``, which are children of both.

    Args:
        parent: Qualified name of the ``Sequential``.
        chain: The ``Sequential``.
        keys: Names of the children in it.
    """

    parent: str
    chain: nn.Sequential

    def __init__(self, parent: str, chain: nn.Sequential, keys: Sequence[str]) -> None:
        super().__init__(OrderedDict((key, chain._modules[key]) for key in keys))
        self.training = chain.training
        # Past nn.Module, which would make the chain a child.
        self.__dict__.update(parent=parent, chain=chain)

    @property
    def keys(self) -> list[str]:
        """Names of the children."""
        return list(self._modules)

    @property
    def name(self) -> str:
        """Name in the way of qualified names, for example ``"features.0-3"``."""
        first, last = self.keys[0], self.keys[-1]
        return below(self.parent, first if first == last else f"{first}-{last}")


def below(parent: str, key: str) -> str:
    """Return the qualified name of a child."""
    return f"{parent}.{key}" if parent else key


@contextmanager
def running(slices: Sequence[Slice]) -> Iterator[None]:
    """Inside the ``with`` block, the chains call these slices in place of their children.

    Args:
        slices: Slices that do not overlap, in the order of their chains.
    """
    chains: dict[str, list[Slice]] = {}
    for each in slices:
        chains.setdefault(each.parent, []).append(each)
    with ExitStack() as stack:
        for of_chain in chains.values():
            chain = of_chain[0].chain
            stack.enter_context(attributes(chain, {"forward": _forward(chain, of_chain)}))
        yield


def _forward(chain: nn.Sequential, slices: Sequence[Slice]) -> Any:
    starts = {each.keys[0]: each for each in slices}
    inside = {key for each in slices for key in each.keys}
    parts = [starts.get(key, child) for key, child in chain._modules.items() if key in starts or key not in inside]

    def forward(input: Any) -> Any:
        for part in parts:
            input = part(input)
        return input

    return forward


def with_slices(trace: Trace, slices: Sequence[Slice]) -> Trace:
    """Return a trace as if the slices had run in it, each as often as its chain.

    Args:
        trace: Trace of a forward in which the chains called their children.
        slices: Slices of these chains.
    """
    if not slices:
        return trace
    first = {below(each.parent, each.keys[0]): each for each in slices}
    last = {below(each.parent, each.keys[-1]): each for each in slices}
    events: list[Event] = []
    open_slices: list[tuple[int, str]] = []  # place in the scope, name
    for event in trace.events:
        name = event.name
        if event.kind == "enter" and name in first:
            own, place = first[name].name, len(event.scope) - 1  # a scope ends with the module that is entered
            outer = _scope(event.scope, open_slices)[:-1]
            events.append(Event("enter", own, (*outer, own), event.reads, ()))
            open_slices.append((place, own))
        events.append(replace(event, scope=_scope(event.scope, open_slices)))
        if event.kind == "exit" and name in last and open_slices and open_slices[-1][1] == last[name].name:
            _, own = open_slices.pop()
            events.append(Event("exit", own, _scope(event.scope, open_slices), (), event.writes))
    calls = {each.name: trace.calls.get(each.parent, 0) for each in slices}
    return replace(trace, events=events, calls={**trace.calls, **calls})


def _scope(scope: tuple[str, ...], open_slices: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    found = list(scope)
    for shift, (place, name) in enumerate(open_slices):
        found.insert(place + shift, name)
    return tuple(found)
