"""Forwards that do not influence one another: random states, attributes of modules, tensors changed in place.

A calibration forward runs many times on each batch, in float and quantized. What it computes must depend on the batch
alone, so a run must neither continue a stream of random numbers nor see what an earlier run has left behind.
"""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.eager import not_compiled

_MACHINERY = frozenset(vars(nn.Module())) - {"_buffers"}
"""Attributes that torch itself keeps in a module."""

_OTHERS = ("torch", "pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "numpy", "wandb", "logging")
"""Packages whose objects keep the state of a Trainer, a logger or a library, and not that of a forward."""

_LARGE = 10_000  # entries; larger containers are datasets, whose entries are not searched
_DEPTH = 4
_MISSING = object()


@dataclass(frozen=True)
class RandomState:
    """The state of Python's, NumPy's and torch's global random generators.

    Attributes:
        python: State of the module ``random``.
        numpy: State of ``numpy.random``.
        torch: State of torch's generator on the CPU.
        cuda: State of the generators of some CUDA devices, by index.
    """

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Mapping[int, Tensor]

    @classmethod
    def now(cls, devices: Iterable[int] = ()) -> RandomState:
        """Return the present state, with that of the given CUDA devices."""
        cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set all generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def same_as(self, other: RandomState) -> bool:
        """Return True if nothing was drawn between the two states."""
        numpy = self.numpy[2] == other.numpy[2] and np.array_equal(self.numpy[1], other.numpy[1])
        cuda = all(torch.equal(state, other.cuda[device]) for device, state in self.cuda.items())
        return bool(self.python == other.python and numpy and torch.equal(self.torch, other.torch) and cuda)


class Isolation:
    """Isolates the forwards of one module.

    The first forwards, run with ``learn=True``, show what has to be restored. Nothing is done afterwards for a forward
    that draws no random numbers and leaves no trace, which is the usual case.

    Args:
        ignored: Classes of modules whose attributes are left alone.
        devices: Indices of the CUDA devices on which forwards run.
        notes: Names of attributes in which forwards are to leave something.

    Attributes:
        draws: True if a forward has drawn random numbers.
        leaves_traces: True if a forward has changed an attribute, or a tensor in place.

    Example:
        >>> isolation, dropout = Isolation(), nn.Dropout()
        >>> outputs = []
        >>> for learn in (True, False):
        ...     with isolation.forward(dropout, seed=3, learn=learn):
        ...         outputs.append(dropout(torch.ones(8)))
        >>> isolation.draws, torch.equal(*outputs)
        (True, True)
    """

    def __init__(
        self, ignored: tuple[type[nn.Module], ...] = (), devices: Iterable[int] = (), notes: Iterable[str] = ()
    ) -> None:
        self.draws = self.leaves_traces = False
        self._left_alone = _MACHINERY | set(notes)
        self._ignored = ignored
        self._devices = tuple(devices)
        self._changed: dict[int, Tensor] = {}  # by id: tensors that a forward has changed in place

    def learned(self, draws: bool, leaves_traces: bool) -> None:
        """Take over what other processes have learned."""
        self.draws, self.leaves_traces = self.draws or draws, self.leaves_traces or leaves_traces

    def random_state(self) -> RandomState | None:
        """Return the present random state, or None if forwards draw no random numbers."""
        return RandomState.now(self._devices) if self.draws else None

    @contextmanager
    def forward(self, module: nn.Module, seed: int | RandomState | None = None, learn: bool = False) -> Iterator[None]:
        """Run a forward of ``module`` inside the ``with`` block; it leaves ``module`` and random states unchanged.

        Nothing compiled runs meanwhile.

        Args:
            module: The root, or any module below it.
            seed: Seed of all global random generators for this forward, or their state; None to continue.
            learn: Find out what forwards change. The tensors of the module are held twice meanwhile.

        Raises:
            CalibrationError: If the forward changes a tensor in place that no forward has changed with ``learn``.
        """
        with not_compiled(), self._seeded(seed, learn), self._restored(module, learn):
            yield

    @contextmanager
    def _seeded(self, seed: int | RandomState | None, learn: bool) -> Iterator[None]:
        if not (self.draws or learn):
            yield
            return
        before = RandomState.now(self._devices)
        if isinstance(seed, RandomState):
            seed.restore()
        elif seed is not None:
            self._seed(seed)
        start = RandomState.now(self._devices) if learn else None
        try:
            yield
        finally:
            if start is not None and not start.same_as(RandomState.now(self._devices)):
                self.draws = True
            before.restore()

    def _seed(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for device in self._devices:
            torch.cuda.default_generators[device].manual_seed(seed)

    @contextmanager
    def _restored(self, module: nn.Module, learn: bool) -> Iterator[None]:
        if not (self.leaves_traces or learn):
            yield
            return
        snapshot = _Snapshot(module, self._ignored, self._left_alone)
        tensors = [(name, tensor, _version(tensor)) for name, tensor in snapshot.tensors]
        copies = {id(t): t.detach().clone() for _, t, _ in tensors if learn or id(t) in self._changed}
        try:
            yield
        finally:
            changed = [(name, tensor) for name, tensor, version in tensors if _version(tensor) != version]
            if snapshot.restore() or changed:
                self.leaves_traces = True
            for _, tensor in changed:
                if id(tensor) in copies:
                    self._changed[id(tensor)] = tensor
                    tensor.detach().copy_(copies[id(tensor)])
        lost = [name for name, tensor in changed if id(tensor) not in copies]
        if lost:
            raise CalibrationError(
                f"the calibration forward changed {', '.join(lost)} in place, though not on the first batches, so the"
                " old values are lost. Give CalibrationCapture a step= that does not update the module."
            )


def _version(tensor: Tensor) -> int:
    """Return a number that grows with every change in place; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


class _Snapshot:
    """The attributes of all modules below a root, with the content of containers and the states of generators.

    Attributes:
        tensors: All tensors found, by name; an object occurs once.
    """

    def __init__(self, module: nn.Module, ignored: tuple[type[nn.Module], ...], left_alone: frozenset[str]) -> None:
        self._left_alone = left_alone
        self.tensors: list[tuple[str, Tensor]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._visited: dict[int, Any] = {}
        for name, child in module.named_modules():
            if not isinstance(child, ignored):
                prefix = f"{name}." if name else ""
                self._add_attributes(vars(child), prefix, 0)
                for key, parameter in child._parameters.items():
                    self._visit(parameter, f"{prefix}{key}", 0)

    def _add_attributes(self, attributes: dict[str, Any], prefix: str, depth: int) -> None:
        kept = {key: value for key, value in attributes.items() if key not in self._left_alone}
        self._attributes.append((attributes, kept))
        for key, value in kept.items():
            self._visit(value, prefix if key == "_buffers" else f"{prefix}{key}", depth)

    def _visit(self, value: Any, name: str, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, str, nn.Module)) or id(value) in self._visited:
            return
        self._visited[id(value)] = value  # keeps the object, so that no other one gets the same id
        if isinstance(value, Tensor):
            if not nn.parameter.is_lazy(value):
                self.tensors.append((name, value))
        elif isinstance(value, (dict, list, set, deque, tuple)):
            if not isinstance(value, tuple):
                self._containers.append((value, value.copy()))
            if len(value) <= _LARGE and not isinstance(value, set):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, entry in list(items):
                    self._visit(entry, f"{name}{key}" if name.endswith(".") else f"{name}[{key!r}]", depth)
        elif isinstance(value, (torch.Generator, np.random.RandomState, random.Random, np.random.Generator)):
            self._generators.append((value, _generator_state(value)))
        elif depth < _DEPTH and _has_own_state(value):
            self._add_attributes(vars(value), f"{name}.", depth + 1)

    def restore(self) -> bool:
        """Restore everything but the values of tensors; return True if anything had changed."""
        changed = False
        for attributes, kept in self._attributes:
            for key in [key for key in attributes if key not in kept and key not in self._left_alone]:
                del attributes[key]
                changed = True
            for key, value in kept.items():
                if attributes.get(key, _MISSING) is not value:
                    attributes[key] = value
                    changed = True
        for container, content in self._containers:
            if not _same_content(container, content):
                changed = True
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        for generator, state in self._generators:
            changed |= _set_generator_state(generator, state)
        return changed


def _has_own_state(value: Any) -> bool:
    """Return True for an instance of a user's class with a dictionary of attributes."""
    if isinstance(value, (type, FunctionType, MethodType, ModuleType)):
        return False
    if not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return all(base.__module__.partition(".")[0] not in _OTHERS for base in type(value).__mro__)


def _same_content(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in content.items())
    if isinstance(container, set):
        return bool(container == content)
    return all(entry is other for entry, other in zip(container, content, strict=True))


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_generator_state(generator: Any, state: Any) -> bool:
    """Set the state of a generator that a module holds; return True if it had changed."""
    if _as_bytes(_generator_state(generator)) == _as_bytes(state):
        return False
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
    return True


def _as_bytes(state: Any) -> bytes:
    return bytes(state.numpy().tobytes()) if isinstance(state, Tensor) else pickle.dumps(state)
