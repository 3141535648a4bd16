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

from lightning_ptq.activations.calls import Call, run_unit, same_leaves, unit_errors
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import CalibrationError, UnitError
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
        self.traces = [calibration.traces[batch] for batch in self.batches]
        names = [unit.name for unit in units]
        flows = {id(trace): trace.flow(names) for trace in self.traces}
        self.needed = [flows[id(trace)].needed for trace in self.traces]
        self.picked = set().union(*(flow.picked for flow in flows.values()))
        self.done: dict[str, list[list[Call]]] = {}  # unit -> batch -> call
        self.proof: Proof = {}  # for the last captured unit

    def inputs(self, index: int, known: Proof | None = None) -> list[list[Call]]:
        """Return (args, kwargs) of every call of unit ``index``, by batch; the units before it must be finished.

        A unit may run any number of times on a batch, also not at all.

        Args:
            index: Index of the unit.
            known: The :attr:`proof` of another stream for this unit; without it, the first batch of each trace also
                runs in full.
        """
        unit = self.units[index]
        calls: list[list[Call]] = []
        self.proof = dict(known or {})
        courses = [id(trace) for trace in self.traces]
        for batch, course in enumerate(courses):
            proven, replaced = course in self.proof, None
            # One full run per trace proves that stored outputs can replace units on all batches of that trace.
            if self.done and self.proof.get(course, courses.count(course) > 1):
                replaced = self._replaced_capture(unit, batch)
            captured = replaced if replaced is not None and proven else self._capture(unit, batch, replace=False)
            if not proven:
                equal = replaced is not None and self._equal(unit, replaced, captured)
                self.proof[course] = equal or not self.done
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

    def _replaced_capture(self, unit: Unit, batch: int) -> list[Call] | None:
        """Return the calls in a run where finished units return stored outputs; None if such a run is impossible."""
        try:
            with unit_errors():
                captured = self._capture(unit, batch, replace=True)
        except (UnitError, CalibrationError):  # a unit was needed for more than its output, or was called more often
            return None
        expected = self.traces[batch].calls.get(unit.name, 0)
        return captured if len(captured) == expected or self.calibration.varies else None

    def _capture(self, unit: Unit, batch: int, replace: bool) -> list[Call]:
        calls: list[Call] = []
        own = unit.module.forward
        isolation = self.calibration.isolation
        # Where the course depends on the data, it may be another one when earlier units are quantized.
        last = None if self.calibration.varies else self.traces[batch].calls.get(unit.name, 0)

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call.of((args, kwargs), self.store.put, isolation.random_state()))
            if len(calls) == last:
                raise _Reached  # nothing after the last call is needed
            return own(*args, **kwargs)

        if last != 0:
            with attributes(unit.module, {"forward": record}), suppress(_Reached):
                self.run(batch, replace)
        return calls

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

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(remaining, None)
            if call is None:
                raise UnitError("it is called more often than in the traced forward")
            if call.random is not None:  # as if the unit had drawn its random numbers
                call.random.restore()
            return call.tree()

        return forward

    def _equal(self, unit: Unit, left: list[Call], right: list[Call]) -> bool:
        """Return True if two captures of a unit's calls are equal, or at least give the same outputs."""
        if len(left) != len(right):
            return False
        return all(same_leaves(a, b) or self._same_outputs(unit, a, b) for a, b in zip(left, right, strict=True))

    def _same_outputs(self, unit: Unit, *calls: Call) -> bool:
        """Return True if a unit computes the same from both; a cache, for example, may hold what it does not read."""
        outputs = []
        for call in calls:
            args, kwargs = call.tree()
            try:
                with unit_errors():
                    output = run_unit(unit.module, args, kwargs, self.stream, self.calibration.isolation, call.random)
            except UnitError:
                return False
            outputs.append(Call.of(output))
        return same_leaves(*outputs)
