"""The calibration pass: batches run once, observers watch, and at the end every layer has its scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.batches import Batches, is_divisible, merge_batches, take_rows
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.forward import Forward, batch_size, default_forward, run_forward, to_device
from lightning_ptq.errors import CalibrationError, FewSamplesWarning, FunctionalOpWarning, UnreachedLayerWarning, warn
from lightning_ptq.network.batch_norm import fold_batch_norms
from lightning_ptq.network.layers import QuantLayer
from lightning_ptq.network.prepare import Prepared, prepare
from lightning_ptq.network.trace import Trace, first_argument, trace
from lightning_ptq.numerics.observers import MinMaxObserver, make_observer
from lightning_ptq.numerics.qconfig import LayerQConfig, QConfig
from lightning_ptq.runtime.ranks import Ranks


class Calibrator:
    """Takes calibration batches one by one, then chooses all scales.

    Args:
        prepared: What :func:`~lightning_ptq.network.prepare.prepare` returned.
        forward: How a batch is run; see :func:`default_forward`.
        num_samples: Enough samples; :attr:`done` is then true. None for all there are.
        ranks: The processes of the run; each observes its own batches, dealt as ``DistributedSampler`` deals samples.
        population: Samples in the whole set, where a sampler fills up with repeats: they count once.
    """

    def __init__(
        self,
        prepared: Prepared,
        forward: Forward = default_forward,
        num_samples: int | None = None,
        ranks: Ranks | None = None,
        population: int | None = None,
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise CalibrationError(f"num_samples must be 1 or more, got {num_samples}.")
        self.prepared = prepared
        self.forward = forward
        self.num_samples = num_samples
        self.ranks = ranks or Ranks()
        self.population = population
        self.samples = 0
        self.batches = Batches()
        self.device = next((p.device for p in prepared.module.parameters()), torch.device("cpu"))
        self._first_size = self._seen = 0
        self._observers: dict[str, MinMaxObserver] = {}
        self._traces: list[Trace] = []

    @property
    def done(self) -> bool:
        """True once ``num_samples`` were seen; on all ranks behind the same batch."""
        return self._seen >= self._share(0)

    def _share(self, rank: int) -> float:
        """How many samples are a rank's: all that a single process would have seen, dealt in turn."""
        whole = math.inf if self.num_samples is None else self.num_samples
        if self.ranks.world == 1:
            return whole
        if self._first_size and self.num_samples is not None:  # behind the batch that completes them
            size = self._first_size
            whole = math.ceil(self.num_samples / size) * size
        return own_share(rank, self.ranks.world, min(whole, math.inf if self.population is None else self.population))

    def observe(self, batch: Any) -> Any:
        """Run one batch, watch the inputs of all layers, and keep the batch.

        Returns:
            What the forward returned.

        Raises:
            CalibrationError: If a layer's input holds NaN or an infinity.
        """
        self._first_size = self._first_size or batch_size(batch)
        self._seen += batch_size(batch)
        if self.ranks.world > 1:
            room = self._share(self.ranks.rank) - self.samples
            if room <= 0:
                return None
            if batch_size(batch) > room and is_divisible(batch):
                batch = take_rows(batch, slice(0, int(room)))
        result: list[Any] = []

        def run() -> Any:
            # Registered behind the hooks of the trace, so that what observers compute counts as the layer's own.
            with ExitStack() as hooks:
                for name, layer in self.prepared.layers.items():
                    if self.prepared.qconfig.for_layer(name) is not None:
                        watch = self._watcher(name)
                        hooks.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
                result.append(run_forward(self.prepared.module, self.forward, to_device(batch, self.device)))
            return result[0]

        watched = trace(self.prepared.module, run)
        self._traces.append(next((known for known in self._traces if known.alike(watched)), watched))
        self.batches.append(to_device(batch, torch.device("cpu")))
        self.samples += batch_size(batch)
        return result[0]

    def _observer(self, name: str) -> MinMaxObserver:
        config = cast(LayerQConfig, self.prepared.qconfig.for_layer(name))
        return make_observer(config.activation) if config.activation else MinMaxObserver(config.weight)

    def _watcher(self, name: str) -> Callable[..., None]:
        def watch(layer: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_argument(args, kwargs)
            if name not in self._observers:
                self._observers[name] = self._observer(name).to(x.device)
            try:
                self._observers[name].update(x)
            except ValueError:
                raise CalibrationError(
                    f"NaN or an infinity in the input of layer {name!r}, calibration batch {len(self.batches)}."
                    " Check the samples of that batch, and the model's float output on them."
                ) from None

        return watch

    def finish(self) -> Calibration:
        """Fold batch norms, choose the scale of every weight and activation, and switch the layers to quantized.

        Raises:
            CalibrationError: If no batch was seen or no layer was reached.
        """
        self._exchange()
        if self.num_samples is not None and self.samples < self.num_samples:
            warn(
                f"the calibration loader ended after {self.samples} samples, {self.num_samples} were asked for."
                " Calibrating with what there is.",
                FewSamplesWarning,
                stacklevel=2,
            )
        module = self.prepared.module

        def run() -> Any:
            return run_forward(module, self.forward, to_device(self.batches[0], self.device))

        watched = self._traces[0]
        folded = fold_batch_norms(module, watched, run)
        layers = self._quantized_layers(watched)
        _warn_of_float_parts(self.prepared, watched)
        calibration = Calibration(
            self.prepared,
            self.forward,
            self.batches,
            self.device,
            self._traces,
            layers,
            folded,
            self._observers,
            self.samples,
            self.ranks,
        )
        for name, layer in layers.items():
            layer.reference = (layer.weight.detach(), None if layer.bias is None else layer.bias.detach().clone())
            calibration.round_to_nearest(name, calibration.qconfig_at(name))
        return calibration

    def _exchange(self) -> None:
        """Have the batches, traces and observers of all ranks."""
        if not any(self.ranks.gather(len(self.batches))):
            raise CalibrationError("the calibration loader is empty: no batch was seen. Give it at least one sample.")
        here = self.device
        self._observers = merge_observers(self.ranks, self._observers, lambda name: self._observer(name).to(here))
        self.batches, self._traces = merge_batches(self.ranks, self.batches, self._traces)
        self.samples = sum(map(batch_size, self.batches))

    def _quantized_layers(self, watched: Trace) -> dict[str, QuantLayer]:
        all_layers, qconfig = self.prepared.layers, self.prepared.qconfig
        order = [name for name in watched.layer_order if qconfig.for_layer(name) is not None]
        if not order:
            raise CalibrationError(
                "the calibration forward reached no layer that is to be quantized. Check `exclude`, and that the"
                " forward runs the module itself."
            )
        return {name: all_layers[name] for name in order}


def calibrate(
    module: nn.Module | Prepared,
    batches: Iterable[Any],
    qconfig: QConfig | str | None = None,
    *,
    forward: Forward = default_forward,
    num_samples: int | None = None,
    ranks: Ranks | None = None,
) -> Calibration:
    """Quantize a module to the nearest: prepare it, run the batches, fold batch norms, choose all scales.

    On an exception the module is as it was before.

    Args:
        module: A float module (then with ``qconfig``), or what :func:`~lightning_ptq.network.prepare.prepare` returned.
        batches: Calibration batches, for example a ``DataLoader``; labels are not needed.
        qconfig: What to quantize, for example ``"w4a8"``.
        forward: How a batch is run: a function of module and batch.
        num_samples: Stop after the batch that completes so many samples.
        ranks: Of several processes (:func:`~lightning_ptq.runtime.ranks.current_ranks`), each of which has batches of its own;
            one on its own by default.

    Returns:
        The calibrated module and what reconstruction needs.

    Raises:
        SurgeryError: If the module cannot be prepared.
        QConfigError: If the config does not fit.
        CalibrationError: If there are no batches, or NaN in one.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> calibration = calibrate(net, [torch.randn(16, 4)], "w4a8")
        >>> [str(layer.qconfig) for layer in calibration.layers.values()]
        ['w8a8', 'w8a8']
    """
    if isinstance(module, Prepared):
        prepared = module
    elif qconfig is None:
        raise CalibrationError("qconfig is missing. Write for example calibrate(module, batches, 'w4a8').")
    else:
        prepared = prepare(module, qconfig)
    try:
        calibrator = Calibrator(prepared, forward, num_samples, ranks)
        for batch in batches:
            if calibrator.done:
                break
            calibrator.observe(batch)
        return calibrator.finish()
    except BaseException:
        prepared.undo()
        raise


def _warn_of_float_parts(prepared: Prepared, watched: Trace) -> None:
    unreached = [n for n in prepared.layers if n not in watched.layer_order and prepared.qconfig.for_layer(n)]
    if unreached:
        warn(
            f"never called in the calibration forward, so they stay float: {', '.join(unreached)}.",
            UnreachedLayerWarning,
            stacklevel=3,
        )
    if watched.float_products:
        scopes: dict[str, list[str]] = {}
        for op, scope in sorted(watched.float_products):
            scopes.setdefault(op, []).append(scope or "the module itself")
        listed = "; ".join(f"{op} in {', '.join(names)}" for op, names in scopes.items())
        warn(f"computed outside any layer, so they stay float: {listed}.", FunctionalOpWarning, stacklevel=3)


def own_share(rank: int, world: int, samples: float) -> float:
    """How many of the first so many samples of the whole set are a rank's.

    Example:
        >>> [own_share(rank, 3, 10) for rank in range(3)]
        [4, 3, 3]
    """
    return samples if samples == math.inf else (samples - rank + world - 1) // world


def merge_observers(
    ranks: Ranks, observers: dict[str, MinMaxObserver], make: Callable[[str], MinMaxObserver]
) -> dict[str, MinMaxObserver]:
    """Merge the observers of each layer over the ranks, by the reductions that their states declare.

    Args:
        ranks: The processes.
        observers: This rank's, by layer; changed in place.
        make: A new observer for a layer that this rank never reached.
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
        for state, value in merged.items():  # it keeps them, where a sync for good keeps its own beside them
            setattr(observer, state, value)
    return {name: observers[name] for name in names}
