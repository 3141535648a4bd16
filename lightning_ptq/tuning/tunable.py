"""Which units can be tuned: each is tried once before the work, on its first call."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_ptq.activations.calls import Call, same_leaves, unit_errors
from lightning_ptq.activations.groups import rows_of
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.activations.unit_data import UnitData
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import UnitError, UntunableUnitWarning, warn
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.network.slices import Slice, running, with_slices
from lightning_ptq.network.units import BlockRule, Unit, UnitKind, find_units
from lightning_ptq.runtime.patching import hooked
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.losses import LOSSES
from lightning_ptq.tuning.optimize import tuning_state, unit_loss
from lightning_ptq.tuning.tuners import make_tuner


@contextmanager
def units_for(
    calibration: Calibration, granularity: UnitKind, blocks: BlockRule | None
) -> Iterator[tuple[Calibration, list[Unit]]]:
    """Yield the units of a module; inside the ``with`` block, slices of chains run in place of their layers.

    Args:
        calibration: The calibrated module.
        granularity: See :func:`~lightning_ptq.network.units.find_units`.
        blocks: As well.

    Yields:
        The calibration, with traces in which the slices have run, and the units.
    """
    # Where the course varies, a chain may run on some batches only.
    units = find_units(calibration.module, calibration.trace, granularity, blocks, slices=not calibration.varies)
    slices = [unit.module for unit in units if isinstance(unit.module, Slice)]
    traces = {id(trace): with_slices(trace, slices) for trace in calibration.traces}
    with running(slices):
        yield replace(calibration, traces=[traces[id(trace)] for trace in calibration.traces]), units


def tunable_units(
    calibration: Calibration, units: Sequence[Unit], store: ActivationStore, config: ReconstructionConfig
) -> list[Unit]:
    """Return the units that can be tuned; the layers of a block that cannot take its place.

    Single embeddings are left out.

    Args:
        calibration: The calibrated module.
        units: Units in execution order.
        store: Store of the captured tensors.
        config: What is tuned.

    Warns:
        UntunableUnitWarning: Naming the blocks and layers that cannot be tuned, and why.
    """
    units = [unit for unit in units if not unit.is_lookup]
    reasons = _failures(calibration, units, store, config)
    found: list[Unit] = []
    for unit in units:
        if unit.name not in reasons:
            found.append(unit)
        elif unit.name not in unit.layers:
            calls = calibration.trace.calls
            found += [Unit(name, layer, {name: layer}, calls[name]) for name, layer in unit.layers.items()]
    found = [unit for unit in found if not unit.is_lookup]
    fresh = [unit for unit in found if unit not in units]
    blocks = {name: why for name, why in reasons.items() if not any(name in unit.layers for unit in units)}
    reasons |= _failures(calibration, fresh, store, config)
    warn_of_untunable(
        {name: f"{why}; its layers are tuned one by one" if name in blocks else why for name, why in reasons.items()}
    )
    return [unit for unit in found if unit.name not in reasons]


def warn_of_untunable(reasons: Mapping[str, str]) -> None:
    """Warn of units that cannot be tuned, if there are any.

    Args:
        reasons: Why, by name.
    """
    if reasons:
        listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        warn(
            f"these units cannot be tuned, and keep their initial quantization unless stated otherwise: {listed}.",
            UntunableUnitWarning,
            stacklevel=3,
            details=reasons,
        )


def _failures(
    calibration: Calibration, units: Sequence[Unit], store: ActivationStore, config: ReconstructionConfig
) -> dict[str, str]:
    """Return why units cannot be tuned, by name; units that no batch reaches with a sample are not tried."""
    waiting = {unit.name: unit for unit in units}
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    isolation = calibration.isolation
    trying = False

    def before(name: str, module: Any, args: Any, kwargs: Any) -> None:
        if name in waiting and not trying:
            calls[name] = Call.of((args, kwargs), store.put, isolation.random_state())

    def after(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal trying
        call = None if trying else calls.pop(name, None)
        if call is None or not rows_of(call):
            return
        trying, state = True, isolation.random_state()
        try:
            # In a context of its own: a forward may collect, in context variables, what its modules compute.
            data, result = UnitData([[call]], store, isolation), Call.of(output, store.put)
            contextvars.Context().run(_try_unit, waiting[name], data, result, config)
        except UnitError as error:
            reasons[name] = str(error)
        finally:
            trying = False
            if state is not None:
                state.restore()
        del waiting[name]

    modules = {unit.name: unit.module for unit in units}
    with hooked(modules, before, after), ops_in_mode(calibration.module, "float"):
        for batch in calibration.one_batch_per_course():
            if waiting:
                calibration.run(batch)
                calls.clear()  # of units that ended with an exception which the forward has caught
    return reasons


def _try_unit(unit: Unit, data: UnitData, output: Call, config: ReconstructionConfig) -> None:
    """Compute the loss of a unit and its gradient on one or two samples of a call, as tuning does.

    Raises:
        UnitError: If that is not possible; the message says why.
    """
    (group,) = data.groups
    with unit_errors():
        again = data.outputs(unit.module, 1, "float")[0][0]
        if not same_leaves(again, output):
            raise UnitError("its output depends on more than its arguments")
        data.set_targets([[output]], unit.module)
        rows = torch.arange(min(2, group.rows)) if data.separable else next(group.slices())
        loss = LOSSES[config.loss]([LOSSES[config.loss].magnitudes(target.calls for target in group.targets or ())])
        tuners = [make_tuner(unit, name, layer, config) for name, layer in unit.layers.items()]
        variables = [variable for tuner in tuners for variable, _ in tuner.variables.values()]
        with ops_in_mode(unit.module, "quantized"), tuning_state(unit, config):
            error = unit_loss(unit, tuners, loss, data, group.pick(rows))
            if variables and not error.requires_grad:
                raise UnitError("its output carries no gradient")
            found = torch.autograd.grad(error, variables, allow_unused=True) if variables else ()
            reached = {id(variable) for variable, grad in zip(variables, found, strict=True) if grad is not None}
            if variables and not reached:
                raise UnitError("its output does not depend on its weights")
            # In a chain, the output depends on every layer; those before a break are tuned better alone.
            own = [[id(variable) for variable, _ in tuner.variables.values()] for tuner in tuners]
            if isinstance(unit.module, nn.Sequential) and any(ids and reached.isdisjoint(ids) for ids in own):
                raise UnitError("its output carries no gradient to some of its layers")
