"""State dicts of quantized modules, which float modules load without a call of ``prepare``.

A quantized module's state dict records what its layers are. ``torch.nn.Module.load_state_dict`` is the one function
that every way of loading ends in: a plain call, Lightning's ``load_from_checkpoint``, and the Trainer's ``ckpt_path``,
with and without the library's callbacks. Importing the library therefore has it prepare a float module that is given
the state dict of a quantized one. Other state dicts, and modules that are prepared already, pass through unchanged.

A process that has not imported the library ends in torch's error about unexpected keys. The documented way,
:func:`~lightning_ptq.export.checkpoint.load_quantized`, imports it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ptq.calibration.layer_costs import state_key
from lightning_ptq.errors import CheckpointError, PTQError, SurgeryError
from lightning_ptq.network.callers import add_call_sites, layers_of
from lightning_ptq.network.op import quantized_ops
from lightning_ptq.network.prepare import Prepared, is_prepared, prepare
from lightning_ptq.network.record import RECORD
from lightning_ptq.numerics.fake_quantize import FakeQuantize

_MOST = 4  # names in a list of an error


def load_quantized_state_dicts() -> None:
    """Have ``torch.nn.Module.load_state_dict`` prepare float modules for state dicts of quantized ones; idempotent."""
    original = nn.Module.load_state_dict
    if getattr(original, "_prepares_quantized", False):
        return

    # The names of the parameters are torch's: torch.distributed.checkpoint passes `self` by keyword.
    @functools.wraps(original)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not is_quantized(state_dict):
            return original(self, state_dict, *args, **kwargs)
        prepared = prepared_for(self, state_dict)
        try:
            with writable(self), explained(self, state_dict):
                result = original(self, state_dict, *args, **kwargs)
        except Exception:  # of any kind: it is raised again
            if prepared is not None:
                prepared.undo()
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


@contextmanager
def explained(module: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of loading a state dict into a prepared module into one that names the differences.

    Args:
        module: The prepared module.
        state_dict: The state dict of a quantized module.

    Raises:
        CheckpointError: In place of an error that is not the library's own.
    """
    try:
        yield
    except PTQError:
        raise
    except RuntimeError as error:  # torch's class for keys and shapes that do not fit
        name = type(module).__name__
        found = "; ".join(_differences(module, state_dict)) or str(error)
        raise CheckpointError(
            f"the state dict is that of another architecture than this {name}: {found}. Build the module as it was when"
            " it was quantized, with the same arguments: register layer classes of your own by register_layer, and run"
            f" a lazy module once. Then write: module = lightning_ptq.load_quantized({name}(...), 'quantized.ckpt')."
        ) from error


def is_quantized(state_dict: Any) -> bool:
    """Return True for the state dict of a quantized module."""
    return isinstance(state_dict, Mapping) and any(isinstance(k, str) and k.endswith(RECORD) for k in state_dict)


def prepared_for(module: nn.Module, state_dict: Mapping[str, Any]) -> Prepared | None:
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


def _differences(module: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Return how a prepared module differs from the one whose state dict was saved."""
    # The shapes of scales follow from those of the weights.
    scales = tuple(f"{name}." for name, child in module.named_modules() if isinstance(child, FakeQuantize))
    own, saved = (
        {key: _shape(value) for key, value in state.items() if not key.startswith(scales)}
        for state in (module.state_dict(), state_dict)
    )
    missing = sorted(name for name in layers_of(state_dict) if state_key(name, RECORD) not in own)
    inside = tuple(state_key(name, "") for name in missing)
    weights = {name: saved.get(state_key(name, "weight"), "") for name in missing}
    shapes = sorted(key for key in own.keys() & saved.keys() if own[key] != saved[key])
    return [
        *_listed("layers that are missing or stay float here", [f"{name!r}{weights[name]}" for name in missing]),
        *_listed("other shapes", [f"{key!r}{saved[key]} is{own[key]} here" for key in shapes]),
        *_listed("not in the checkpoint", [repr(key) for key in own if key not in saved]),
        *_listed("not in the module", [repr(k) for k in saved if k not in own and not k.startswith(inside)]),
    ]


def _listed(what: str, items: list[str]) -> list[str]:
    """Return a sentence that lists the first items, or nothing if there are none."""
    more = f" and {len(items) - _MOST} more" if len(items) > _MOST else ""
    return [f"{what}: {', '.join(items[:_MOST])}{more}"] if items else []


def _shape(value: Any) -> str:
    """Return the shape of an entry as text; empty for what is no tensor or has no shape yet."""
    known = isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
    return f" of shape {tuple(value.shape)}" if known else ""
