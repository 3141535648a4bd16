"""The inputs of each unit, unit by unit, without ever holding the activations of all layers.

The calibration forward runs again up to the wanted unit. Units that are finished do not run: they hand out their
stored output where the wanted unit, or a later one, still needs it (as :meth:`Trace.needed_outputs` tells), and
zeros of the right shape where nobody does. So the capture of all units together costs about one forward a stream,
and what is stored at a time is what crosses the boundary between finished and unfinished units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ptq.activations.calls import Call
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import CalibrationError
from lightning_ptq.network.layers import layers_in_mode
from lightning_ptq.network.trace import RESULT
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.patching import attributes

Stream = Literal["float", "quantized"]
Proof = dict[int, bool]
"""By trace: whether handing out stored outputs gives what a full run gives."""


class _Reached(BaseException):
    """The wanted unit has been called as often as it is; not an Exception, so that no forward swallows it."""


class Replay:
    """Inputs of units in execution order, for one stream.

    Args:
        calibration: The calibrated module.
        units: All units, in execution order.
        store: Where tensors are kept.
        stream: ``"float"``: every unit gets what it gets in the float model. ``"quantized"``: what it gets when all
            units before it are quantized as they are now.
        keep: Keep the outputs of finished units. If not, each unit's inputs come from a forward from the start.
        whole: Keep what :meth:`run` needs too: outputs that reach the forward's result past all later units.
        batches: Which calibration batches, all by default; "by batch" below means by place in this list.
    """

    def __init__(
        self,
        calibration: Calibration,
        units: list[Unit],
        store: ActivationStore,
        stream: Stream,
        whole: bool = False,
        keep: bool = True,
        batches: Sequence[int] | None = None,
    ) -> None:
        self.calibration = calibration
        self.batches = range(len(calibration.batches)) if batches is None else batches
        self.units = units
        self.store = store
        self.stream = stream
        self.whole = whole
        self.keep = keep
        names = [unit.name for unit in units]
        self.traces = [calibration.traces[batch] for batch in self.batches]
        by_trace = {id(trace): trace.needed_outputs(names) for trace in self.traces}
        self.needed = [by_trace[id(trace)] for trace in self.traces]
        self.done: dict[str, list[list[Call]]] = {}  # unit -> batch -> call -> outputs
        self.proof: Proof = {}  # of the last captured unit

    def inputs(self, index: int, known: Proof | None = None) -> list[list[Call]]:
        """(args, kwargs) of every call of unit ``index``, by batch; the units before it must be finished.

        Args:
            index: Of the unit.
            known: The :attr:`proof` of another stream for this unit; without it, the first batch of each trace runs in
                full too.

        Raises:
            CalibrationError: If the forward does not reach the unit as often as when it was watched.
        """
        unit = self.units[index]
        calls: list[list[Call]] = []
        self.proof = dict(known or {})
        for batch, trace in enumerate(self.traces):
            found = self._capture(unit, batch, replace=self.proof.get(id(trace), True))
            if id(trace) not in self.proof:
                full = self._capture(unit, batch, replace=False) if self.done else found
                self.proof[id(trace)] = self._equal(found, full)
                found = full
            calls.append(found)
        self._drop_unneeded(index)
        return calls

    def needs_others(self, index: int) -> bool:
        """True if the outputs of other units reach unit ``index`` on any batch."""
        return any(needed[self.units[index].name] for needed in self.needed)

    def finish(self, index: int, outputs: list[list[Call]]) -> None:
        """Take the outputs of unit ``index``; those that no later unit needs are dropped."""
        if not self.keep:
            return
        self.done[self.units[index].name] = outputs
        self._drop_unneeded(index)

    def _drop_unneeded(self, index: int) -> None:
        for batch, needed in enumerate(self.needed):
            later = set().union(*(needed[unit.name] for unit in self.units[index + 1 :]))
            later |= needed[RESULT] if self.whole else set()
            for name, outputs in self.done.items():
                if name not in later:
                    for call in outputs[batch]:
                        call.drop()

    def run(self, batch: int, replace: bool = True) -> Any:
        """The calibration forward on a batch; with ``replace``, finished units hand out their stored outputs."""
        with self._handed_out(batch, replace), layers_in_mode(self.calibration.module, self.stream):
            return self.calibration.run(self.batches[batch])

    def _capture(self, unit: Unit, batch: int, replace: bool) -> list[Call]:
        calls: list[Call] = []
        own = unit.module.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call.of((args, kwargs), self.store.put))
            if len(calls) == unit.calls:
                raise _Reached
            return own(*args, **kwargs)

        with attributes(unit.module, {"forward": record}), suppress(_Reached):
            self.run(batch, replace)
        if len(calls) == unit.calls:
            return calls
        raise CalibrationError(
            f"unit {unit.name!r} ran {unit.calls} times in the first forward and {len(calls)} times on calibration"
            f" batch {self.batches[batch]}. Choose granularity='layer' or other blocks, so that each unit runs on every"
            " batch."
        )

    @contextmanager
    def _handed_out(self, batch: int, replace: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for unit in self.units:
                if replace and unit.name in self.done:
                    forward = self._hand_out(self.done[unit.name][batch])
                    stack.enter_context(attributes(unit.module, {"forward": forward}))
            yield

    @staticmethod
    def _hand_out(calls: list[Call]) -> Any:
        remaining = iter(calls)

        return lambda *args, **kwargs: next(remaining).tree()

    @staticmethod
    def _equal(left: list[Call], right: list[Call]) -> bool:
        pairs = [p for a, b in zip(left, right, strict=True) for p in zip(a.leaves, b.leaves, strict=True)]
        return all(near(a, b) for a, b in pairs if isinstance(a, Tensor))


def near(left: Tensor, right: Tensor) -> bool:
    """True if two tensors are the same but for the rounding of the kernels."""
    if left.shape != right.shape:
        return False
    left = left.to(right.device)  # either may be in a file
    if not left.is_floating_point():
        return bool(torch.equal(left, right))
    # Batched kernels may round differently; a value out of place differs by far more.
    difference = (left - right).float().square().mean()
    return bool(difference <= 1e-4 * right.float().square().mean() + 1e-12)
