"""A batch of the user's data, and the network that a calibration forward calls on it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from lightning_ptq.callbacks.trainer.lightning import lightning_base, overrides
from lightning_ptq.callbacks.trainer.muting import Step, calibration_forward
from lightning_ptq.errors import ExportError, PTQError
from lightning_ptq.export.inputs import ExampleInputs
from lightning_ptq.network.op import quantized_ops
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.runtime.structure import map_tensors


def first_batch(trainer: Any, model: Any, data: Any) -> Any:
    """Return the first batch of the train loader, as ``fit`` would get it.

    Args:
        trainer: Trainer that data and model may read.
        model: The LightningModule, which may have the loader itself.
        data: The LightningDataModule; None if there is none.

    Raises:
        PTQError: If there is no train loader, or it is empty.
    """
    source = model if data is None else data
    if not overrides(source, "train_dataloader"):
        kind = type(source).__name__
        raise PTQError(f"{kind} has no train_dataloader, which yields the calibration samples. Give data by --data.")
    source.trainer = trainer
    source.prepare_data()
    source.setup("fit")
    loader = source.train_dataloader()
    if isinstance(loader, (dict, list, tuple)):  # several loaders, which fit draws from in turn
        package = lightning_base(type(model)).__module__.partition(".core")[0]
        loader = importlib.import_module(f"{package}.utilities").CombinedLoader(loader)
        iter(loader)
        return next(loader)[0]
    for batch in loader:
        return batch
    raise PTQError(f"the train loader of {type(source).__name__} yields no batch. Give it calibration samples.")


def first_call(module: Any, step: Step, batch: Any, network: str | None = None) -> tuple[nn.Module, ExampleInputs]:
    """Return the network that a calibration forward calls, and its inputs.

    Args:
        module: A quantized LightningModule.
        step: The calibration forward.
        batch: A batch for it.
        network: Qualified name of the network; by default the outermost module with quantized layers that runs last.

    Raises:
        ExportError: If there is no such module, or the forward does not call it.
    """
    names = [name for name, op in quantized_ops(module).items() if op.is_quantized]
    if not names:
        raise ExportError(f"{type(module).__name__} is not quantized. Give the quantized file by --weights.")
    modules = dict(module.named_modules())
    if network is not None and network not in modules:
        children = [name for name, _ in module.named_children()]
        raise ExportError(f"there is no module {network!r} to export. The children of the model are {children}.")
    holders = {name: m for name, m in modules.items() if any(_is_below(layer, name) for layer in names)}
    watched = holders if network is None else {network: modules[network]}
    calls: list[tuple[str, Any, Any]] = []
    depth = 0

    def enter(name: str, called: Any, args: Any, kwargs: Any) -> None:
        nonlocal depth
        if not depth:
            calls.append((name, *map_tensors((args, kwargs), lambda tensor: tensor.detach().clone())))
        depth += 1

    def leave(*args: Any) -> None:
        nonlocal depth
        depth -= 1

    module.eval()
    with torch.no_grad(), hooked(watched, enter, leave):
        calibration_forward(module, step)(module, batch)
    if not calls:
        raise ExportError(
            f"the step {step!r} does not call {network or 'a module with quantized layers'}. Name another one by"
            " --network, or another --step."
        )
    name, args, kwargs = calls[-1]
    return modules[name], ExampleInputs.bound(modules[name], args, kwargs)


def _is_below(layer: str, name: str) -> bool:
    return name in ("", layer) or layer.startswith(f"{name}.")
