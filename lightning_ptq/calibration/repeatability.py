"""Whether a calibration forward computes the same when it runs on the same batch again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ptq.errors import UnrepeatableForwardWarning, warn
from lightning_ptq.network.trace import Trace
from lightning_ptq.runtime.structure import float_tensors_in, is_float, mean_and_magnitude


class Recording:
    """Checksums of what one forward computed: the inputs of operations in their order, and the result."""

    def __init__(self) -> None:
        self.inputs: list[tuple[str, Tensor]] = []
        self.result: list[Tensor] = []
        self.course = Trace()

    def __call__(self, name: str, op: Any, args: Any, kwargs: Any) -> None:
        """Record the inputs of an operation; to be called before each."""
        tensors = filter(is_float, op.input_tensors(args, kwargs).values())
        self.inputs += [(name, mean_and_magnitude(x)) for x in tensors]

    def finish(self, result: Any, course: Trace) -> None:
        """Record the result and the course of the forward."""
        self.result, self.course = [mean_and_magnitude(x) for x in float_tensors_in(result)], course


def warn_if_different(first: Recording, again: Recording) -> None:
    """Compare two runs of a forward on the same batch.

    Warns:
        UnrepeatableForwardWarning: Naming the first value that differs.
    """
    pairs = zip(first.inputs, again.inputs, strict=False)
    changed = next((name for (name, x), (other, y) in pairs if name != other or not _same(x, y)), None)
    if not first.course.same_course(again.course):
        what = "it ran other modules or operators"
    elif changed is not None:
        what = f"the input of layer {changed!r} had other values"
    elif not all(map(_same, first.result, again.result)):
        what = "its result had other values"
    else:
        return
    warn(
        f"the calibration forward is not repeatable: in a second run on the same batch {what}. It depends on more than"
        " its batch, its module and the global random generators.",
        UnrepeatableForwardWarning,
        stacklevel=3,
    )


def _same(x: Tensor, y: Tensor) -> bool:
    """Return True if two checksums are equal up to the rounding of kernels that add in any order."""
    return bool(torch.allclose(x, y, rtol=1e-4, atol=1e-7, equal_nan=True))
