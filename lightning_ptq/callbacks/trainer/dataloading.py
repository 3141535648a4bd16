"""Data loading of the calibration pass: how samples are distributed over ranks, and passes without synchronization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_ptq.errors import CalibrationError
from lightning_ptq.runtime.patching import attributes
from lightning_ptq.runtime.ranks import Ranks

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


@contextmanager
def unshuffled(trainer: Trainer) -> Iterator[None]:
    """Keep the order of a training loader that does not shuffle; under DDP Lightning would shuffle it."""
    connector = trainer._data_connector
    original = connector._prepare_dataloader

    def prepare_dataloader(dataloader: Any, shuffle: bool, mode: Any = None) -> Any:
        batch_sampler = getattr(dataloader, "batch_sampler", None)
        sampler = getattr(batch_sampler, "sampler", getattr(dataloader, "sampler", None))
        return original(dataloader, shuffle=shuffle and not isinstance(sampler, SequentialSampler), mode=mode)

    with attributes(connector, {"_prepare_dataloader": prepare_dataloader}):
        yield


@contextmanager
def no_waiting(trainer: Trainer) -> Iterator[None]:
    """Prevent ranks from waiting for each other in the calibration pass, so that a rank that fails blocks no other.

    Without it, DDP broadcasts buffers at every batch, and Lightning broadcasts whether SIGTERM was received.
    """
    loop = trainer.fit_loop.epoch_loop
    # Older versions of Lightning have no such method.
    silenced = {"_broadcast_sigterm_tensor": lambda: None} if hasattr(loop, "_broadcast_sigterm_tensor") else {}
    model: Any = trainer.strategy.model  # DistributedDataParallel, or the module itself on one process
    broadcasts = getattr(model, "broadcast_buffers", None)
    with attributes(loop, silenced):
        try:
            if broadcasts is not None:
                model.broadcast_buffers = False
            yield
        finally:
            if broadcasts is not None:
                model.broadcast_buffers = broadcasts


def check_same_length(trainer: Trainer, ranks: Ranks) -> None:
    """Check that all ranks have the same number of batches; otherwise Lightning's loop would wait forever.

    Raises:
        CalibrationError: If the numbers differ.
    """
    lengths = ranks.gather(trainer.num_training_batches)
    if len(set(lengths)) > 1:
        raise CalibrationError(
            f"the ranks have {lengths} calibration batches, so some ranks would wait forever for others. Use a"
            " DistributedSampler (Lightning does by default), or a sampler that gives all ranks the same number."
        )


def dataset_size(trainer: Trainer) -> int | None:
    """Return the size of the dataset where a DistributedSampler repeats samples as padding; otherwise None."""
    loader: Any = trainer.train_dataloader
    samplers = (getattr(getattr(loader, "batch_sampler", None), "sampler", None), getattr(loader, "sampler", None))
    sampler = next((sampler for sampler in samplers if isinstance(sampler, DistributedSampler)), None)
    if sampler is None or sampler.drop_last:
        return None
    return len(sampler.dataset)  # type: ignore[arg-type]  # a Dataset need not be Sized, but this one is


def no_batch_seen() -> CalibrationError:
    """Return the error of a run whose loader gave no batch."""
    return CalibrationError(
        "no calibration batch was seen: the loader is empty, max_epochs or limit_train_batches is 0, or ckpt_path"
        " is a checkpoint of the finished training. Give fit a loader with at least one sample and max_epochs=1,"
        " and load trained weights by MyModule.load_from_checkpoint."
    )
