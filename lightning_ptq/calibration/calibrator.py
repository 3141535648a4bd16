"""The calibration pass: each batch runs once while observers watch; then every layer gets its scales."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ptq.arguments import whole
from lightning_ptq.calibration.batch import Batch
from lightning_ptq.calibration.batches import Batches, merge_batches, own_share
from lightning_ptq.calibration.calibration import Calibration, Observers, merge_observers
from lightning_ptq.calibration.channel_peaks import ChannelPeaks
from lightning_ptq.calibration.checks import (
    check_module,
    explained,
    warn_of_float_parts,
    warn_of_unsteady_sites,
)
from lightning_ptq.calibration.forward import Forward, default_forward, fresh_batch, run_forward
from lightning_ptq.calibration.padding import Mask, check_mask, check_mask_fits, real_positions, real_values
from lightning_ptq.calibration.repeatability import Recording, warn_if_different
from lightning_ptq.calibration.repeats import Repeats
from lightning_ptq.errors import CalibrationError, FewSamplesWarning, FunctionalOpWarning, warn
from lightning_ptq.network.batch_norm import fold_batch_norms, folded_ahead
from lightning_ptq.network.callers import discover, known_sites
from lightning_ptq.network.op import QuantizedOp
from lightning_ptq.network.prepare import Prepared
from lightning_ptq.network.trace import Trace, trace
from lightning_ptq.numerics.fake_quantize import FakeQuantize
from lightning_ptq.numerics.observers import MinMaxObserver, make_observer
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.isolation import Isolation
from lightning_ptq.runtime.patching import Before, hooked
from lightning_ptq.runtime.ranks import Ranks
from lightning_ptq.runtime.structure import is_dense


class Calibrator:
    """Observes calibration batches one by one, then chooses all scales.

    Args:
        prepared: What :func:`~lightning_ptq.network.prepare.prepare` returned.
        forward: Function of module and batch; see :func:`~lightning_ptq.calibration.forward.default_forward`.
        num_samples: Number of samples at which :attr:`done` becomes true; None to use all.
        ranks: Processes of the run. Each observes its own batches, distributed as by ``DistributedSampler``.
            A single process by default.
        dataset_size: Size of the dataset, so that samples a sampler repeats as padding are not counted.
            None if no sampler does.
        mask: Key of the batch, or function of it, that gives a boolean mask (samples, positions) which is False for
            padding. By default the ``attention_mask`` beside ``input_ids`` is used, if there is one.
    """

    def __init__(
        self,
        prepared: Prepared,
        forward: Forward = default_forward,
        num_samples: int | None = None,
        ranks: Ranks | None = None,
        dataset_size: int | None = None,
        mask: Mask | None = None,
    ) -> None:
        check_module(prepared)
        self.prepared = prepared
        self.forward = forward
        self.num_samples = None if num_samples is None else whole("num_samples", num_samples, error=CalibrationError)
        self.ranks = ranks or Ranks()
        self.dataset_size = dataset_size
        self.mask = check_mask(mask)
        self._real: Tensor | None = None  # positions of the present batch that hold data
        self._shapes: set[tuple[int, ...]] = set()  # of the inputs of the first batch
        self._repeats = Repeats(self.ranks, sharded=dataset_size is not None)
        self.samples = 0
        self.batches = Batches()
        self.device = next((p.device for p in prepared.module.parameters()), torch.device("cpu"))
        self._first_size = self._seen = 0
        self._observers: Observers = {}
        self._peaks = ChannelPeaks()
        self._traces: list[Trace] = []
        gpus = {p.device.index for p in prepared.module.parameters() if p.device.type == "cuda"}
        self.isolation = Isolation((FakeQuantize,), sorted(gpus), ("reached",))

    @property
    def done(self) -> bool:
        """True once ``num_samples`` were seen; on all ranks after the same batch."""
        return self._seen >= self._share(0)

    def _share(self, rank: int) -> float:
        """Return a rank's number of samples: those a single process would have seen, distributed round-robin."""
        whole = math.inf if self.num_samples is None else self.num_samples
        if self.ranks.world == 1 or self._repeats.alike:
            return whole
        if self._first_size and self.num_samples is not None:  # a single process would have stopped after a whole batch
            size = self._first_size
            whole = math.ceil(self.num_samples / size) * size
        most = math.inf if self.dataset_size is None else self.dataset_size
        return own_share(rank, self.ranks.world, min(whole, most))

    def observe(self, batch: Any) -> Any:
        """Run one batch, observe the inputs of all layers, and keep the batch.

        Returns:
            What the forward returned.

        Raises:
            CalibrationError: If a layer's input holds NaN or an infinity.
        """
        # Every rank counts all samples that it is given, so that all are done after the same batch. Beyond its share it
        # counts without observing, since a single process would not have seen these samples.
        if Batch(batch).samples == 0:
            return None
        self._repeats.compare(batch)
        self._first_size = self._first_size or Batch(batch).samples
        self._seen += Batch(batch).samples
        if self.ranks.world > 1 and not self._repeats.alike:
            room = self._share(self.ranks.rank) - self.samples
            if room <= 0:
                return None
            if Batch(batch).samples > room and Batch(batch).is_divisible:
                batch = Batch(batch).rows(slice(0, int(room)))
        kept = fresh_batch(batch, torch.device("cpu"))
        self._real = real_positions(kept, self.mask)
        recordings = [] if self._traces else [Recording(), Recording()]
        if recordings:
            self._add_call_sites(kept)
            self.prepared.qconfig.check_patterns(self.prepared.layers)
        result, watched = self._trace(kept, self._watch, *recordings[:1])
        is_new = not any(known.same_course(watched) for known in self._traces or [watched])
        if is_new and (new := self._add_call_sites(kept)):  # which the batches before did not reach
            result, watched = self._trace(kept, self._watch, only=new)
        if recordings:
            check_mask_fits(self.mask, self._real, self._shapes)
            for recording, run in zip(recordings, ((result, watched), self._trace(kept, *recordings[1:])), strict=True):
                recording.finish(*run)
            warn_if_different(*recordings)
        self._traces.append(next((known for known in self._traces if known.same_course(watched)), watched))
        self.batches.append(kept)
        self.samples += Batch(kept).samples
        return result

    def _add_call_sites(self, batch: Any) -> list[str]:
        """Run the forward on the next batch, make the call sites in it operations, and return the names of new ones."""
        module, operations = self.prepared.module, self.prepared.qconfig.operations
        if operations == "layers":
            return []

        def run() -> None:
            with explained(module, batch):
                run_forward(module, self.forward, fresh_batch(batch, self.device), index=len(self.batches))

        with self.isolation.forward(module, self._repeats.turn(len(self.batches)), learn=True):
            found = discover(module, run, elementwise=operations == "all")
        return self.prepared.add_call_sites(found.sites, found.routes)

    def _trace(self, batch: Any, *watches: Before, only: Collection[str] | None = None) -> tuple[Any, Trace]:
        """Run the forward on the next batch; return its result and its trace.

        Args:
            batch: The batch.
            watches: Functions that are called before each operation that is to be quantized.
            only: Names of the operations that are watched; all by default.
        """
        module, qconfig = self.prepared.module, self.prepared.qconfig
        observed = {
            name: op
            for name, op in self.prepared.layers.items()
            if qconfig.for_layer(name) is not None and (only is None or name in only)
        }
        seed = self._repeats.turn(len(self.batches))
        result: list[Any] = []

        def run() -> Any:
            with ExitStack() as stack:
                # Registered after the hooks of the trace, so that what observers compute counts as the layer's own.
                for watch in watches:
                    stack.enter_context(hooked(observed, before=watch))
                stack.enter_context(explained(module, batch))
                result.append(
                    run_forward(module, self.forward, fresh_batch(batch, self.device), index=len(self.batches))
                )
            return result[0]

        with self.isolation.forward(module, seed, learn=True):  # around the trace, which records operators
            watched = trace(module, run)
        return result[0], watched

    def _observer(self, name: str) -> MinMaxObserver:
        config = cast(LayerQConfig, self.prepared.qconfig.for_layer(name))
        return make_observer(config.activation) if config.activation else MinMaxObserver(config.weight)

    def _watch(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        for which, x in layer.input_tensors(args, kwargs).items():
            if not is_dense(x):  # then the layer stays float
                continue
            if not self._traces:
                self._shapes.add(tuple(x.shape))
            if self.prepared.qconfig.equalization:
                self._peaks.update(name, layer, x)
            if (name, which) not in self._observers:
                self._observers[name, which] = self._observer(name).to(x.device)
            try:
                self._observers[name, which].update(real_values(x, self._real))
            except ValueError:
                raise CalibrationError(
                    f"NaN or an infinity in the input of layer {name!r}, calibration batch {len(self.batches)}."
                    " Check the samples of that batch, and the model's float output on them."
                ) from None

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
        calibration = Calibration(
            self.prepared, self.forward, self.batches, self.device, self._traces, {}, {}, self._observers, self.samples,
            self.ranks, self.isolation, self.mask,
        )  # fmt: skip
        watched, courses = calibration.trace, calibration.one_batch_per_course()
        calibration.folded = fold_batch_norms(module, self._traces, lambda: [calibration.run(i) for i in courses])
        changed = [*self._folded_ahead(calibration), *self._peaks.equalize(calibration)]
        self._observe_again(changed, calibration)
        calibration.layers = layers = self._quantized_layers(watched)
        warn_of_float_parts(self.prepared, watched)
        for name, layer in layers.items():
            layer.keep_reference()
            layer.exposed = name in watched.exposed
            calibration.round_to_nearest(name, calibration.qconfig_at(name))
        calibration.round_biases()
        return calibration

    def _folded_ahead(self, calibration: Calibration) -> list[str]:
        """Return the layers that the batch norm before them went into: their inputs are the norm's inputs now."""
        ahead = folded_ahead(self.prepared.module, calibration.folded).values()
        return [name for layers in ahead for name in layers if self.prepared.qconfig.for_layer(name) is not None]

    def _observe_again(self, names: list[str], calibration: Calibration) -> None:
        """Observe the inputs of layers that other weights before them have changed."""
        for key in [key for key in self._observers if key[0] in names]:
            del self._observers[key]
        with hooked({name: self.prepared.layers[name] for name in names}, before=self._watch):
            for index in range(len(self.batches) if names else 0):
                self._real = calibration.padding(index)
                calibration.run(index)

    def _exchange(self) -> None:
        """Merge the batches, traces and observers of all ranks; those of rank 0 count alone if all are the same."""
        repeated = self._repeats.end(self.samples)
        if not any(self.ranks.gather(len(self.batches))):
            raise CalibrationError("the calibration loader is empty: no batch was seen. Give it at least one sample.")
        here = self.device
        for sites, routes in self.ranks.gather(known_sites(self.prepared.module)):
            self.prepared.add_call_sites(sites, routes)
        self._peaks.merge(self.ranks, here)
        own = {} if repeated and self.ranks.rank else self._observers
        self._observers = merge_observers(self.ranks, own, lambda key: self._observer(key[0]).to(here))
        self.batches, self._traces = merge_batches(self.ranks, self.batches, self._traces, repeated)
        self.samples = sum(Batch(batch).samples for batch in self.batches)
        learned = self.ranks.gather((self.isolation.draws, self.isolation.leaves_traces))
        self.isolation.learned(*map(any, zip(*learned, strict=True)))

    def _quantized_layers(self, watched: Trace) -> dict[str, QuantizedOp]:
        all_layers, qconfig = self.prepared.layers, self.prepared.qconfig
        unsteady = warn_of_unsteady_sites(self.prepared.module, self._traces)
        order = [  # execution order
            name for name in watched.layer_order if qconfig.for_layer(name) is not None and name not in unsteady
        ]
        unseen = [name for name in order if self._has_unseen_inputs(name)]
        if unseen:
            warn(
                f"their inputs are not known, so they stay float: {', '.join(unseen)}. They multiply by other means"
                " than torch's, or get tensors that are sparse or inside torch.vmap.",
                FunctionalOpWarning,
                stacklevel=3,
            )
        order = [name for name in order if name not in unseen]
        if not order:
            raise CalibrationError(
                "the calibration forward reached no layer that is to be quantized. Check `exclude`, and that the"
                " forward runs the module itself."
            )
        return {name: all_layers[name] for name in order}

    def _has_unseen_inputs(self, name: str) -> bool:
        config = cast(LayerQConfig, self.prepared.qconfig.for_layer(name))
        inputs = self.prepared.layers[name].input_names if config.activation else ()
        return any((name, which) not in self._observers for which in inputs)
