"""What each layer of a calibrated module may become: its candidates, their tuned states, and putting one in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.errors import QConfigError
from lightning_ptq.network.layers import layer_state, set_layer_state
from lightning_ptq.numerics.qconfig import LayerQConfig
from lightning_ptq.runtime.journal import LayerStates

Choice = Mapping[str, str]
"""Layer name to candidate."""

TunedStates = Mapping[str, LayerStates]
"""Candidate to the tuned state of each layer at it."""


class Choices:
    """The candidates of every layer, and the change of a layer from one to another.

    A layer whose widths the :class:`~lightning_ptq.numerics.qconfig.QConfig` raises or pins (first and last layer, overrides)
    has fewer candidates than the others.

    Args:
        calibration: A calibrated module; its layers are changed in place.
        candidates: Bit widths, such as ``["w8a8", "w4a4"]``.
        states: Tuned states by candidate and layer, as in :class:`~lightning_ptq.tuning.run.AdaQuantResult`; layers
            and candidates that they lack are rounded to the nearest.

    Attributes:
        of: For each layer its candidates, each with the pair of specs.

    Raises:
        QConfigError: If there are no candidates or one cannot be read.
    """

    def __init__(self, calibration: Calibration, candidates: Sequence[str], states: TunedStates | None = None) -> None:
        if not candidates or isinstance(candidates, str):
            raise QConfigError(f"candidates must be a list of bit widths, got {candidates!r}. Write ['w8a8', 'w4a4'].")
        self.calibration = calibration
        self.of: dict[str, dict[str, LayerQConfig]] = {name: {} for name in calibration.layers}
        self._tuned: dict[tuple[str, str], dict[str, Tensor]] = {}
        for text in candidates:
            candidate = LayerQConfig.parse(text)
            for name, own in self.of.items():
                pair = calibration.qconfig_at(name, candidate)
                own.setdefault(str(pair), pair)
                tuned = (states or {}).get(str(candidate), {})
                if name in tuned:
                    self._tuned.setdefault((name, str(pair)), tuned[name])

    def at(self, candidate: str) -> dict[str, str]:
        """What each layer becomes where ``candidate`` is chosen for all."""
        pair = LayerQConfig.parse(candidate)
        return {name: str(self.calibration.qconfig_at(name, pair)) for name in self.of}

    def widest(self) -> dict[str, str]:
        """Each layer's candidate of the most bits, weights first."""
        return {name: max(own, key=lambda c: _bits(own[c])) for name, own in self.of.items()}

    def put(self, name: str, choice: str) -> None:
        """Make layer ``name`` what it is at ``choice``: the tuned state if there is one, else rounded to nearest."""
        self.calibration.round_to_nearest(name, self.of[name][choice])
        if tuned := self._tuned.get((name, choice)):
            set_layer_state(self.calibration.layers[name], tuned)

    def put_all(self, choice: Choice) -> None:
        """:meth:`put` for every layer in ``choice``."""
        for name, candidate in choice.items():
            self.put(name, candidate)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """All layers are as they were again behind the ``with`` block."""
        layers = self.calibration.layers
        before = {name: (self.calibration.layers[name].qconfig, layer_state(layer)) for name, layer in layers.items()}
        try:
            yield
        finally:
            for name, (qconfig, state) in before.items():
                if qconfig is not None:
                    self.calibration.round_to_nearest(name, qconfig)
                    set_layer_state(layers[name], state)


def _bits(pair: LayerQConfig) -> tuple[int, int]:
    return pair.weight.bits, pair.activation.bits if pair.activation else 32
