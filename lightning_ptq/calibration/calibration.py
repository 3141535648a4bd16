"""A calibrated module: how to run it again, and how to give a layer other widths."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batches import Batches, take_rows
from lightning_ptq.calibration.forward import Forward, run_forward, to_device
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.prepare import Prepared
from lightning_ptq.network.trace import Trace
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.observers import MinMaxObserver
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.ranks import Ranks


@dataclass
class Calibration:
    """A calibrated module with what later steps need to run it again.

    Attributes:
        prepared: The module with its quantized layers, and the undo.
        forward: The calibration forward, called with the module and a batch.
        batches: The calibration batches, on the CPU or in files.
        device: Where the module runs.
        traces: What the forward did on each batch; batches on which it did the same share one.
        layers: The quantized layers by name, in execution order.
        folded: The layer that each folded batch norm went into.
        observers: What watched the input of each layer.
        samples: How many samples the batches hold.
        ranks: The processes that share the work; each of them has all batches.
    """

    prepared: Prepared
    forward: Forward
    batches: Batches
    device: torch.device
    traces: list[Trace]
    layers: dict[str, QuantLayer]
    folded: dict[str, str]
    observers: dict[str, MinMaxObserver]
    samples: int
    ranks: Ranks = field(default_factory=Ranks)
    _qparams: dict[tuple[str, LayerQConfig], list[tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False)

    @property
    def trace(self) -> Trace:
        """What the forward did on the first batch."""
        return self.traces[0]

    @property
    def module(self) -> nn.Module:
        """The root module."""
        return self.prepared.module

    def run(self, index: int, gradients: bool = False, rows: slice | None = None) -> Any:
        """The calibration forward on batch ``index`` or some of its samples, in eval mode and without gradients unless
        asked for.
        """
        batch = self.batches[index]
        batch = batch if rows is None else take_rows(batch, rows)
        return run_forward(self.module, self.forward, to_device(batch, self.device), gradients)

    def qconfig_at(self, name: str, candidate: LayerQConfig | None = None) -> LayerQConfig:
        """The pair of specs of layer ``name`` where ``candidate`` takes the default's place.

        What the :class:`QConfig` says of single layers (overrides, first and last) holds at every candidate.
        """
        qconfig, order = self.prepared.qconfig, self.trace.layer_order
        if candidate is not None:
            qconfig = replace(qconfig, default=qconfig.default.with_bits_of(candidate))
        return cast(LayerQConfig, qconfig.for_layer(name, edge=name in (order[0], order[-1])))

    def round_to_nearest(self, name: str, qconfig: LayerQConfig) -> None:
        """Give layer ``name`` its float weights back, and quantizers for ``qconfig`` with freshly chosen scales."""
        layer = self.layers[name]
        if layer.reference is not None:
            layer.set_weight(*layer.reference, keep_weight=layer.tied)
        layer.attach(qconfig)
        quantizers = [q for q in (layer.weight_fake_quant, layer.input_fake_quant) if q is not None]
        known = self._qparams.get((name, qconfig))
        if known is None:  # searching for them takes far longer than anything else here
            layer.choose_weight_scale()
            if layer.input_fake_quant is not None:
                _set_activation_scale(layer.input_fake_quant, self.observers[name])
            self._qparams[name, qconfig] = [(q.scale.clone(), q.zero_point.clone()) for q in quantizers]
        else:
            for quantizer, (scale, zero_point) in zip(quantizers, known, strict=True):
                quantizer.scale.copy_(scale)
                quantizer.zero_point.copy_(zero_point)

    def release(self) -> None:
        """Drop the batches, the histograms and the float reference weights: the run is over."""
        self.batches.clear()
        self.observers.clear()
        for layer in self.prepared.layers.values():
            layer.reference = None


def _set_activation_scale(quantizer: FakeQuantize, observer: MinMaxObserver) -> None:
    scale, zero_point = observer.qparams(quantizer.spec)
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero_point)
