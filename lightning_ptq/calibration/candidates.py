"""The candidates of each layer of a calibrated module, their tuned states, and how to apply one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.checks import check_calibration
from lightning_ptq.calibration.saved_state import SavedState
from lightning_ptq.numerics.qconfig import LayerQConfig, parse_candidates
from lightning_ptq.runtime.journal import LayerStates

Choice = Mapping[str, str]
"""Layer name to candidate."""

TunedStates = Mapping[str, LayerStates]
"""Candidate to the tuned state of each layer at that candidate."""


class Candidates:
    """The candidates of every layer, and how to change a layer from one to another.

    A layer whose bit widths the :class:`~lightning_ptq.numerics.qconfig.QConfig` raises or fixes (first and last layer,
    overrides) has fewer candidates than the others.

    Args:
        calibration: A calibrated module; its layers are changed in place.
        candidates: Bit widths, such as ``["w8a8", "w4a4"]``.
        states: Tuned states by candidate and layer, as in :class:`~lightning_ptq.tuning.run.AdaQuantResult`. Layers and
            candidates without a state are rounded to nearest. None by default.

    Attributes:
        by_layer: For each layer its candidates, each with its specs.

    Raises:
        QConfigError: If there are no candidates or one cannot be parsed.
    """

    def __init__(self, calibration: Calibration, candidates: Sequence[str], states: TunedStates | None = None) -> None:
        check_calibration(calibration)
        self.calibration = calibration
        self.by_layer: dict[str, dict[str, LayerQConfig]] = {name: {} for name in calibration.layers}
        self._tuned: dict[tuple[str, str], dict[str, Tensor]] = {}
        for candidate in parse_candidates(candidates):
            for name, choices in self.by_layer.items():
                pair = calibration.qconfig_at(name, candidate)
                choices.setdefault(str(pair), pair)  # first and last layer become equal at several candidates
                tuned = (states or {}).get(str(candidate), {})
                if name in tuned:
                    self._tuned.setdefault((name, str(pair)), tuned[name])

    def uniform(self, candidate: str) -> dict[str, str]:
        """Return the choice of every layer where ``candidate`` is chosen for all of them."""
        pair = LayerQConfig.parse(candidate)
        return {name: str(self.calibration.qconfig_at(name, pair)) for name in self.by_layer}

    def widest(self) -> dict[str, str]:
        """Return each layer's candidate of most bits, weights first."""
        return {name: max(own, key=lambda c: _bits(own[c])) for name, own in self.by_layer.items()}

    def put(self, name: str, choice: str) -> None:
        """Change layer ``name`` to ``choice``: to its tuned state if there is one, else rounded to nearest."""
        self.calibration.round_to_nearest(name, self.by_layer[name][choice])
        if tuned := self._tuned.get((name, choice)):
            self.calibration.layers[name].load_state(tuned)

    def put_all(self, choice: Choice) -> None:
        """Change every layer in ``choice``, as :meth:`put` does."""
        for name, candidate in choice.items():
            self.put(name, candidate)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After the ``with`` block, all layers have the specs and states that they had before."""
        before = SavedState(self.calibration)
        try:
            yield
        finally:
            before.restore_layers()

    @property
    def of(self) -> dict[str, dict[str, LayerQConfig]]:
        """Former name of :attr:`by_layer`."""
        return self.by_layer

    def at(self, candidate: str) -> dict[str, str]:
        """Former name of :meth:`uniform`."""
        return self.uniform(candidate)


Choices = Candidates
"""Former name of :class:`Candidates`."""


def _bits(pair: LayerQConfig) -> tuple[int, int, int]:
    """Return a sort key: weight bits, activation bits (32 for float), and, as a tie-break, the finer scales."""
    group = pair.weight.group_size
    return pair.weight.bits, pair.activation.bits if pair.activation else 32, -group if group else -(2**31)
