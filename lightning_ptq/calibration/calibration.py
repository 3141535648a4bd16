"""A calibrated module: how to run it again, and how to give a layer other bit widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.batches import Batches
from lightning_ptq.calibration.forward import Forward, fresh_batch, run_forward
from lightning_ptq.calibration.padding import Mask, real_positions
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.prepare import Prepared
from lightning_ptq.network.trace import RESULT, Trace, merge_traces
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.observers import MinMaxObserver
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.eager import no_inference_mode
from lightning_ptq.runtime.isolation import Isolation
from lightning_ptq.runtime.ranks import Ranks

Observers = dict[tuple[str, str], MinMaxObserver]
"""Observers by the names of a layer and of one of its inputs."""

LARGE = 1 / 16
"""A first or last layer with more than this part of the weights is too large for 8 bits in the smallest network."""


@dataclass
class Calibration:
    """A calibrated module, and what later steps need to run it again.

    Attributes:
        prepared: The module with its quantized layers, and how to undo the swaps.
        forward: The calibration forward, called with the module and a batch.
        batches: The calibration batches, on the CPU or in files.
        device: Device of the module.
        traces: Trace of the forward on each batch; batches of the same course share one.
        layers: The quantized operations by name, in execution order.
        folded: The layer that each folded batch norm went into.
        observers: The observer of each input of each layer.
        samples: Number of samples in the batches.
        ranks: Processes that share the work; each has all batches.
        isolation: What makes a forward depend on its batch alone.
        mask: How to find which positions of a batch are no padding.
        freed: First and last layers that are treated as all others.
    """

    prepared: Prepared
    forward: Forward
    batches: Batches
    device: torch.device
    traces: list[Trace]
    layers: dict[str, QuantizedOp]
    folded: dict[str, str]
    observers: Observers
    samples: int
    ranks: Ranks = field(default_factory=Ranks)
    isolation: Isolation = field(default_factory=Isolation)
    mask: Mask | None = None
    freed: frozenset[str] = frozenset()
    _padding: dict[int, Tensor | None] = field(default_factory=dict, init=False, repr=False)
    _qparams: dict[tuple[str, LayerQConfig], list[tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """Return a short description; the batches and the histograms alone would be hundreds of kilobytes."""
        return (
            f"Calibration({type(self.module).__name__}, {self.prepared.qconfig.default}, {len(self.layers)} layers,"
            f" {self.samples} samples in {len(self.batches)} batches, on {self.device})"
        )

    @cached_property
    def trace(self) -> Trace:
        """What the forwards on all batches did together; see :func:`~lightning_ptq.network.trace.merge_traces`."""
        return merge_traces(self.traces)

    @property
    def varies(self) -> bool:
        """True if the forward took different courses on different batches."""
        return len({id(trace) for trace in self.traces}) > 1

    def one_batch_per_course(self) -> dict[int, float]:
        """Return the index of the first batch of each course of the forward, with the share of batches that took it."""
        courses = [id(trace) for trace in self.traces]
        return {courses.index(course): courses.count(course) / len(courses) for course in dict.fromkeys(courses)}

    def part(self, indices: Iterable[int]) -> Calibration:
        """Return the calibration with these batches only, counted anew from 0."""
        chosen = list(indices)
        batches = [self.batches[index] for index in chosen]
        samples = sum(Batch(batch).samples for batch in batches)
        return replace(self, batches=Batches(batches), traces=[self.traces[i] for i in chosen], samples=samples)

    @property
    def module(self) -> nn.Module:
        """The root module."""
        return self.prepared.module

    def padding(self, index: int) -> Tensor | None:
        """Return which positions of batch ``index`` hold data, (samples, positions); None for all of them."""
        if index not in self._padding:  # the batches of other ranks are in files
            self._padding[index] = real_positions(self.batches[index], self.mask)
        return self._padding[index]

    def run(self, index: int, gradients: bool = False, rows: slice | None = None) -> Any:
        """Run the calibration forward on batch ``index``, or on some of its rows, in eval mode.

        Each run gets a copy of the batch and the random state that belongs to it, and leaves the module unchanged.

        Args:
            index: Index of the batch.
            gradients: Whether autograd records the forward.
            rows: Samples of the batch to run; all by default.
        """
        batch = self.batches[index]
        batch = batch if rows is None else Batch(batch).rows(rows)
        with self.isolation.forward(self.module, seed=index):
            return run_forward(self.module, self.forward, fresh_batch(batch, self.device), gradients, index)

    @property
    def edges(self) -> tuple[str, ...]:
        """The first and the last layers, in execution order, except those that are treated as all others."""
        chosen = (self.first_layers | self.last_layers) - self.freed
        return tuple(name for name in self._multiplying if name in chosen)

    @cached_property
    def first_layers(self) -> frozenset[str]:
        """The layer with weights that runs first, and those that read the same tensor as it does."""
        order = self._multiplying
        groups = ({name for name, _ in group} for group in self.trace.same_tensor)
        return frozenset(order[:1]).union(*(group.intersection(order) for group in groups if group & set(order[:1])))

    @cached_property
    def last_layers(self) -> frozenset[str]:
        """The layers with weights whose outputs reach the result, and no other such layer."""
        last: set[str] = set()
        for trace in {id(one): one for one in self.traces}.values():
            needed = trace.flow(self._multiplying).needed
            used, waiting = {RESULT}, [RESULT]  # what the result depends on
            while waiting:
                waiting += (new := needed[waiting.pop()] - used)
                used |= new
            last |= needed[RESULT].difference(*(needed[name] for name in used - {RESULT}))
        return frozenset(last or self._multiplying[-1:])

    @cached_property
    def _multiplying(self) -> list[str]:
        """The operations with weights that they multiply by, in execution order."""
        ops = self.prepared.layers
        return [name for name in self.trace.layer_order if ops[name].weight_names and not ops[name].is_lookup]

    @cached_property
    def shared_inputs(self) -> dict[tuple[str, str], frozenset[tuple[str, str]]]:
        """For each input, (operation, input), all inputs that share its scale, if the config says that they do."""
        groups: dict[tuple[str, str], frozenset[tuple[str, str]]] = {}
        for found in self.trace.same_tensor if self.prepared.qconfig.shared_scales else ():
            group = frozenset(member for member in found if member[0] in self.layers)
            joined = group.union(*(groups.get(member, frozenset()) for member in group))
            groups.update(dict.fromkeys(joined, joined))
        return groups

    def qconfig_at(self, name: str, candidate: LayerQConfig | None = None) -> LayerQConfig:
        """Return the specs of layer ``name`` where ``candidate`` takes the place of the default.

        What the :class:`~lightning_ptq.numerics.qconfig.QConfig` says about single layers (overrides, first and last)
        holds at every candidate.
        """
        qconfig = self.prepared.qconfig
        if candidate is not None:
            qconfig = replace(qconfig, default=qconfig.default.with_bits_of(candidate))
        return cast(LayerQConfig, qconfig.for_layer(name, edge=name in self.edges))

    def free_large_edges(self) -> None:
        """From now on, treat first and last layers with more than :data:`LARGE` of the weights as all others."""
        total = sum(layer.weight_count for layer in self.layers.values())
        self.freed |= frozenset(
            name for name in self.edges if name in self.layers and self.layers[name].weight_count > LARGE * total
        )

    def round_to_nearest(self, name: str, qconfig: LayerQConfig) -> None:
        """Give layer ``name`` its float weights back, and quantizers for ``qconfig`` with newly chosen scales."""
        layer = self.layers[name]
        layer.restore_reference()
        with no_inference_mode():
            layer.attach(qconfig)
        quantizers = [*layer.weight_quantizers.values(), *layer.input_quantizers.values()]
        for which, quantizer in layer.input_quantizers.items():
            quantizer.shared_by = self.shared_inputs.get((name, which), frozenset())
        known = self._qparams.get((name, qconfig))
        if known is None:  # the search takes far longer than everything else here, so its outcome is kept
            layer.choose_weight_scales()
            for which, quantizer in layer.input_quantizers.items():
                _set_activation_scale(quantizer, self.observers[name, which])
            self._qparams[name, qconfig] = [(q.scale.clone(), q.zero_point.clone()) for q in quantizers]
        else:
            for quantizer, (scale, zero_point) in zip(quantizers, known, strict=True):
                quantizer.scale.copy_(scale)
                quantizer.zero_point.copy_(zero_point)
        for which, quantizer in layer.input_quantizers.items():
            quantizer.greatest_scale = _greatest_scale(quantizer, self.observers[name, which])
        if layer.exposed and not layer.tied:
            _put_on_grid(layer)

    def round_biases(self) -> None:
        """Round all biases as integer kernels do, if the config says so; called when a stage has changed them."""
        if self.prepared.qconfig.integer_biases:
            for layer in self.layers.values():
                layer.round_bias()

    def release(self) -> None:
        """Free the batches, the histograms and the float reference weights at the end of a run."""
        self.batches.clear()
        self.observers.clear()
        for layer in self.prepared.layers.values():  # float mode then computes with the parameters
            layer.reference = None


@torch.no_grad()
def _put_on_grid(layer: QuantizedOp) -> None:
    """Round the weights themselves, so that code outside the layer reads what it will read from a packed file."""
    weights = layer.weights
    layer.set_parameters({name: quantizer(weights[name]) for name, quantizer in layer.weight_quantizers.items()})


def _set_activation_scale(quantizer: FakeQuantize, observer: MinMaxObserver) -> None:
    scale, zero_point = observer.qparams(quantizer.spec)
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero_point)


def _greatest_scale(quantizer: FakeQuantize, observer: MinMaxObserver) -> float:
    """Return the scale with which a grid ends where the observed values end, or its own if that is greater.

    Coarse grids may be wider: there, one level more or less is worth a search.
    """
    spec, zero_point = quantizer.spec, int(quantizer.zero_point)
    if spec.bits < 8:
        return math.inf
    ends = ((observer.maximum, spec.quant_max - zero_point), (-observer.minimum, zero_point - spec.quant_min))
    return max(float(quantizer.scale), *(float(end) / steps for end, steps in ends if steps > 0))


def merge_observers(ranks: Ranks, observers: Observers, make: Callable[[tuple[str, str]], MinMaxObserver]) -> Observers:
    """Merge the observers over the ranks, by the reductions that their states declare.

    Args:
        ranks: Processes of the run.
        observers: Observers of this rank; changed in place.
        make: Returns a new observer for an input that this rank never saw.
    """
    if ranks.world == 1:
        return observers

    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        return [found.to(state.device) for found in ranks.gather(state.cpu())]

    names = list(dict.fromkeys(name for found in ranks.gather(list(observers)) for name in found))
    for name in names:
        observer = observers.setdefault(name, make(name))
        with observer.sync_context(dist_sync_fn=gather, distributed_available=lambda: True):
            merged = observer.metric_state
        for state, value in merged.items():  # unlike a permanent sync, this keeps no unmerged states
            setattr(observer, state, value)
    return {name: observers[name] for name in names}
