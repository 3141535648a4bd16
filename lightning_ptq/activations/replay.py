"""Capture the inputs of each unit, unit by unit, without holding the activations of all layers.

The calibration forward runs again up to the wanted unit. Finished units do not run. They return their stored output
where the wanted unit or a later one still needs it (see
:meth:`~lightning_ptq.network.trace.Trace.needed_outputs`), and zeros of the right shape
elsewhere. So the capture of all units together costs about one forward per stream, and only the activations that cross
the boundary between finished and unfinished units are stored at a time.
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
from lightning_ptq.network.op import ops_in_mode
from lightning_ptq.network.trace import RESULT
from lightning_ptq.network.units import Unit
from lightning_ptq.runtime.patching import attributes

Stream = Literal["float", "quantized"]
Proof = dict[int, bool]
"""By id of a trace: whether replaying stored outputs gives the same inputs as a full run."""


class _Reached(BaseException):
    """Ends a forward once the wanted unit has made all its calls; not an Exception, so that no forward catches it."""


class Replay:
    """Captures the inputs of units in execution order, for one stream.

    Args:
        calibration: The calibrated module.
        units: All units, in execution order.
        store: Store of the captured tensors.
        stream: ``"float"``: the inputs of the float model. ``"quantized"``: the inputs when all units before are
            quantized as they are now.
        whole: Also keep what :meth:`run` needs: outputs that reach the forward's result past all later units.
        keep: Keep the outputs of finished units; if False, each capture runs the forward from the start.
        batches: Indices of the calibration batches, all by default; "by batch" means by position in this list.
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
        self.done: dict[str, list[list[Call]]] = {}  # unit -> batch -> call
        self.proof: Proof = {}  # for the last captured unit

    def inputs(self, index: int, known: Proof | None = None) -> list[list[Call]]:
        """Return (args, kwargs) of every call of unit ``index``, by batch; the units before it must be finished.

        Args:
            index: Index of the unit.
            known: The :attr:`proof` of another stream for this unit; without it, the first batch of each trace also
                runs in full.

        Raises:
            CalibrationError: If the unit is not called as often as in the traced forward.
        """
        unit = self.units[index]
        calls: list[list[Call]] = []
        self.proof = dict(known or {})
        for batch, trace in enumerate(self.traces):
            captured = self._capture(unit, batch, replace=self.proof.get(id(trace), True))
            if id(trace) not in self.proof:
                # One full run per trace proves that stored outputs can replace units on all batches of that trace.
                full = self._capture(unit, batch, replace=False) if self.done else captured
                self.proof[id(trace)] = self._equal(captured, full)
                captured = full
            calls.append(captured)
        self._free_unneeded(index)
        return calls

    def needs_others(self, index: int) -> bool:
        """Return True if the outputs of other units reach unit ``index`` on any batch."""
        return any(needed[self.units[index].name] for needed in self.needed)

    def finish(self, index: int, outputs: list[list[Call]]) -> None:
        """Store the outputs of unit ``index``; outputs that no later unit needs are freed."""
        if not self.keep:
            return
        self.done[self.units[index].name] = outputs
        self._free_unneeded(index)

    def _free_unneeded(self, index: int) -> None:
        for batch, needed in enumerate(self.needed):
            later = set().union(*(needed[unit.name] for unit in self.units[index + 1 :]))
            later |= needed[RESULT] if self.whole else set()
            for name, outputs in self.done.items():
                if name not in later:
                    for call in outputs[batch]:
                        call.release()

    def run(self, batch: int, replace: bool = True) -> Any:
        """Run the calibration forward on a batch; with ``replace``, finished units return their stored outputs."""
        with self._replaced(batch, replace), ops_in_mode(self.calibration.module, self.stream):
            return self.calibration.run(self.batches[batch])

    def _capture(self, unit: Unit, batch: int, replace: bool) -> list[Call]:
        calls: list[Call] = []
        own = unit.module.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call.of((args, kwargs), self.store.put))
            if len(calls) == unit.calls:
                raise _Reached  # nothing after the last call is needed
            return own(*args, **kwargs)

        with attributes(unit.module, {"forward": record}), suppress(_Reached):
            self.run(batch, replace)
        if len(calls) == unit.calls:
            return calls
        raise CalibrationError(
            f"unit {unit.name!r} was called {unit.calls} times in the first forward and {len(calls)} times on"
            f" calibration batch {self.batches[batch]}. Choose granularity='layer' or other blocks, so that each unit"
            " runs on every batch."
        )

    @contextmanager
    def _replaced(self, batch: int, replace: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for unit in self.units:
                if replace and unit.name in self.done:
                    forward = self._stored_forward(self.done[unit.name][batch])
                    stack.enter_context(attributes(unit.module, {"forward": forward}))
            yield

    @staticmethod
    def _stored_forward(calls: list[Call]) -> Any:
        remaining = iter(calls)  # consumed call by call, in the order in which the unit was traced

        return lambda *args, **kwargs: next(remaining).tree()

    @staticmethod
    def _equal(left: list[Call], right: list[Call]) -> bool:
        pairs = [p for a, b in zip(left, right, strict=True) for p in zip(a.leaves, b.leaves, strict=True)]
        return all(same_up_to_rounding(a, b) for a, b in pairs if isinstance(a, Tensor))


def same_up_to_rounding(left: Tensor, right: Tensor) -> bool:
    """Return True if two tensors are equal up to the rounding of the kernels."""
    if left.shape != right.shape:
        return False
    left = left.to(right.device)  # either may be in a file on the CPU
    if not left.is_floating_point():
        return bool(torch.equal(left, right))
    # Kernels round differently for other batch sizes; a misplaced value differs by far more.
    difference = (left - right).float().square().mean()
    return bool(difference <= 1e-4 * right.float().square().mean() + 1e-12)
