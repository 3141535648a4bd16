"""How the Trainer deals the calibration samples out to the ranks, and what must not hold them up in the pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.runtime.ranks import Ranks


@contextmanager
def unshuffled(trainer: Any) -> Iterator[None]:
    """Under DDP Lightning shuffles whatever is trained on; here a loader that does not shuffle keeps its order."""
    connector = trainer._data_connector
    own = connector._prepare_dataloader

    def prepare_dataloader(dataloader: Any, shuffle: bool, mode: Any = None) -> Any:
        batch_sampler = getattr(dataloader, "batch_sampler", None)
        sampler = getattr(batch_sampler, "sampler", getattr(dataloader, "sampler", None))
        return own(dataloader, shuffle=shuffle and not isinstance(sampler, SequentialSampler), mode=mode)

    with attributes(connector, {"_prepare_dataloader": prepare_dataloader}):
        yield


@contextmanager
def no_waiting(trainer: Any) -> Iterator[None]:
    """No rank waits for another in the calibration pass, so that one that fails holds up nobody.

    DDP would send buffers round at each batch, and Lightning whether SIGTERM has come.
    """
    loop = trainer.fit_loop.epoch_loop
    muted = {"_broadcast_sigterm_tensor": lambda: None} if hasattr(loop, "_broadcast_sigterm_tensor") else {}
    model = trainer.strategy.model
    synced = getattr(model, "broadcast_buffers", None)
    with attributes(loop, muted):
        try:
            if synced is not None:
                model.broadcast_buffers = False
            yield
        finally:
            if synced is not None:
                model.broadcast_buffers = synced


def check_same_length(trainer: Any, ranks: Ranks) -> None:
    """Raise unless every rank has as many batches: Lightning's loop would wait for ever."""
    lengths = ranks.gather(trainer.num_training_batches)
    if len(set(lengths)) > 1:
        raise CalibrationError(
            f"the ranks have {lengths} calibration batches, which would leave some waiting for others. Use a"
            " DistributedSampler (Lightning does by default), or a sampler that gives every rank as many."
        )


def population(trainer: Any) -> int | None:
    """Samples in the set, where a distributed sampler fills the ranks' shares up with repeats; None elsewhere."""
    loader = trainer.train_dataloader
    samplers = (getattr(getattr(loader, "batch_sampler", None), "sampler", None), getattr(loader, "sampler", None))
    found = next((sampler for sampler in samplers if isinstance(sampler, DistributedSampler)), None)
    return None if found is None or found.drop_last else len(found.dataset)  # type: ignore[arg-type]  # a Dataset need not be Sized
