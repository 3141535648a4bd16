"""State dicts of quantized modules, which float modules load without a call of ``prepare``.

A quantized module's state dict records what its layers are. ``torch.nn.Module.load_state_dict`` is the one function
that every way of loading ends in: a plain call, Lightning's ``load_from_checkpoint``, and the Trainer's ``ckpt_path``,
with and without the library's callbacks. Importing the library therefore has it prepare a float module that is given
the state dict of a quantized one. Other state dicts, and modules that are prepared already, pass through unchanged.

A process that has not imported the library ends in torch's error about unexpected keys. Write ``import lightning_ptq``
before the module is loaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_ptq.calibration.layer_costs import state_key
from lightning_ptq.errors import SurgeryError
from lightning_ptq.network.callers import add_call_sites, layers_of
from lightning_ptq.network.op import quantized_ops
from lightning_ptq.network.prepare import Prepared, is_prepared, prepare
from lightning_ptq.network.record import RECORD


def load_quantized_state_dicts() -> None:
    """Have ``torch.nn.Module.load_state_dict`` prepare float modules for state dicts of quantized ones; idempotent."""
    original = nn.Module.load_state_dict
    if getattr(original, "_prepares_quantized", False):
        return

    # The names of the parameters are torch's: torch.distributed.checkpoint passes `self` by keyword.
    @functools.wraps(original)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not _is_quantized(state_dict):
            return original(self, state_dict, *args, **kwargs)
        prepared = _prepared_for(self, state_dict)
        try:
            with writable(self):
                result = original(self, state_dict, *args, **kwargs)
        except Exception as error:
            if prepared is not None:
                prepared.undo()
            if missing := re.findall(rf'"([^"\s]*?)\.?{RECORD}"', str(error)):
                raise _not_taken(self, sorted(missing)) from error
            raise
        if prepared is not None and not any(op.is_quantized for op in quantized_ops(self).values()):
            prepared.undo()  # with strict=False, nothing of what was loaded is quantized
        return result

    load_state_dict._prepares_quantized = True  # type: ignore[attr-defined]  # a mark, so that it is extended once
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]  # on purpose: see above


@contextmanager
def writable(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, tensors of ``module`` that were made in inference mode can be written to."""
    tensors = (*module.parameters(), *module.buffers())
    with torch.inference_mode(any(not nn.parameter.is_lazy(tensor) and tensor.is_inference() for tensor in tensors)):
        yield


def _is_quantized(state_dict: Any) -> bool:
    return isinstance(state_dict, Mapping) and any(isinstance(k, str) and k.endswith(RECORD) for k in state_dict)


def _prepared_for(module: nn.Module, state_dict: Mapping[str, Any]) -> Prepared | None:
    """Make a module ready for the state dict of a quantized one; return what prepared it if it was a float module."""
    prepared = None
    if not is_prepared(module):
        try:
            prepared = prepare(module, "w8a8")  # the state dict brings the specs
        except SurgeryError:  # there is nothing to quantize; torch names the keys that do not fit
            return None
    sites = add_call_sites(module, layers_of(state_dict))
    if prepared is not None:
        prepared.remember_callers(sites)
    for name, op in quantized_ops(module).items():  # float layers too: a batch norm may have been folded into one
        op.add_biases(state_dict, state_key(name, ""))
    return prepared


def _not_taken(module: nn.Module, layers: list[str]) -> SurgeryError:
    name = type(module).__name__
    return SurgeryError(
        f"{name} has no quantizable layers called {', '.join(map(repr, layers[:4]))}, which are quantized in the state"
        " dict. Build the module as it was when it was quantized: register layer classes of your own by register_layer,"
        f" and run a lazy module once. Then write: module = {name}(...); lightning_ptq.prepare(module, 'w8a8');"
        " module.load_state_dict(state_dict). The state dict of a checkpoint is torch.load(path)['state_dict']."
    )
