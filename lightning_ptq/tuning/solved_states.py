"""States of all layers at all candidates in closed form: close to what tuning makes of them, for a few forwards.

Sensitivities of layers that are rounded to the nearest say too much against few bits, of which tuning recovers most. So
each layer alone is solved for its inputs and outputs in the float network (:mod:`~lightning_ptq.tuning.closed_form`).
Candidates that give the inputs the same bits share the second moments, which take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.calibration.padding import where_real
from lightning_ptq.network.op import State, ops_in_mode
from lightning_ptq.numerics.qconfig import LayerQConfig, parse_candidates
from lightning_ptq.numerics.spec import QuantSpec
from lightning_ptq.runtime.eager import no_inference_mode
from lightning_ptq.runtime.journal import LayerStates
from lightning_ptq.runtime.patching import attributes, hooked
from lightning_ptq.runtime.progress import Progress, no_progress
from lightning_ptq.tuning.closed_form import Solution, solvable
from lightning_ptq.tuning.moments import Moments, Products, moments_of_products, positions_of

_SAMPLES = 256
"""Samples that moments are taken over, in whole batches."""

_LEAST_ROWS, _SPREAD = 8, 4
"""Positions are drawn from this many samples of a batch at least, and from this many times as many positions."""

_UNFOLDED = 2**26
"""Greatest number of inputs of all positions of these samples, which are unfolded at a time."""

_BYTES = 2**28
"""Bytes of the moments that are held at a time; more layers take more forwards."""

_Low = dict[str, dict[str, LayerQConfig]]  # by layer and candidate
_Key = tuple[str, QuantSpec | None]  # a layer, and the spec of its inputs


@torch.no_grad()
def solved_states(
    calibration: Calibration, candidates: Sequence[str], progress: Progress = no_progress
) -> dict[str, LayerStates]:
    """Return the states of the layers in closed form, by candidate and layer.

    Each layer is solved alone, by least squares and second-order rounding (Frantar and Alistarh, "Optimal Brain
    Compression", NeurIPS 2022; see :mod:`~lightning_ptq.tuning.closed_form`). Candidates with 8 bits for the weights
    leave nothing to gain; they have no states, nor have layers that cannot be solved.

    Args:
        calibration: A calibrated module; it is left unchanged. Its ranks share the layers.
        candidates: Bit widths, such as ``["w8a8", "w4a8", "w2a8"]``.
        progress: Called with the layers done, the layers in total, and the name of a layer.

    Returns:
        For each candidate, the parameters, scales and zero points of its solved layers, the same on all ranks.

    Raises:
        QConfigError: If there are no candidates or one cannot be parsed.

    Example:
        >>> from torch import nn, randn
        >>> from lightning_ptq import QConfig, calibrate
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> calibration = calibrate(net, [randn(64, 8)], QConfig.parse("w8a8", first_last_bits=None))
        >>> {candidate: list(states) for candidate, states in solved_states(calibration, ["w8a8", "w2a8"]).items()}
        {'w2a8': ['0', '2']}
    """
    choices, low = Candidates(calibration, candidates), _low(calibration, candidates)
    own = {name: low[name] for index, name in enumerate(low) if calibration.ranks.owns(index)}
    states: dict[tuple[str, str], State] = {}
    with no_inference_mode(), eval_mode(calibration.module), choices.restored():
        for portion in _portions(calibration, own):
            moments = _Moments(calibration, choices, portion).all()
            for name, pairs in portion.items():
                progress(list(own).index(name), len(own), f"solving {name}")
                # Singular up to rounding: the layer is rounded to the nearest.
                with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # torch does not list it
                    states |= _states(choices, name, pairs, moments)
    progress(len(own), len(own), "solving")
    merged: dict[str, LayerStates] = {}
    for (candidate, name), state in calibration.ranks.merge(states).items():
        merged.setdefault(candidate, {})[name] = state
    return merged


def _low(calibration: Calibration, candidates: Sequence[str]) -> _Low:
    """Return the candidates with fewer than 8 bits for the weights, of each layer that has several candidates."""
    low: _Low = {}
    for name, layer in calibration.layers.items():
        if layer.exposed:  # its weights have to lie on their grid, as other code reads them
            continue
        pairs = {str(candidate): calibration.qconfig_at(name, candidate) for candidate in parse_candidates(candidates)}
        few = {candidate: pair for candidate, pair in pairs.items() if pair.weight.bits < 8}
        if few and len(set(map(str, pairs.values()))) > 1:
            low[name] = few
    return low


def _portions(calibration: Calibration, low: _Low) -> Iterator[_Low]:
    """Yield layers whose moments fit into memory together."""
    portion: _Low = {}
    used = 0.0
    for name, pairs in low.items():
        layer, specs = calibration.layers[name], len({pair.activation for pair in pairs.values()})
        inputs = max((weight[0].numel() for weight in layer.weights.values()), default=0)
        size = 8.0 * specs * getattr(layer, "groups", 1) * inputs**2  # two folds of four bytes
        if portion and used + size > _BYTES:
            yield portion
            portion, used = {}, 0.0
        portion[name] = pairs
        used += size
    if portion:
        yield portion


def _states(
    choices: Candidates, name: str, pairs: Mapping[str, LayerQConfig], moments: Mapping[_Key, Sequence[Moments]]
) -> dict[tuple[str, str], State]:
    """Return the states of a layer in closed form, by candidate and name."""
    layer: Any = choices.calibration.layers[name]
    layer.restore_reference()
    solutions = {spec: Solution.of(layer, folds) for (other, spec), folds in moments.items() if other == name}
    states: dict[tuple[str, str], State] = {}
    for candidate, pair in pairs.items():
        if solution := solutions.get(pair.activation):
            choices.put(name, str(pair))
            solution.put(layer)
            states[candidate, name] = layer.state()
    return states


def _rows(layer: Any, wanted: Tensor, most: int) -> slice:
    """Return the samples of a call that moments are taken over: all, or fewer where each has many positions."""
    if layer.weights["weight"].dim() < 3:  # the first dimension of a linear layer's input need not be the samples
        return slice(None)
    positions = max(1, wanted[0].numel() // wanted.shape[layer.channel_dim(wanted)])
    unfolded = positions * layer.weights["weight"][0].numel() * getattr(layer, "groups", 1)
    return slice(max(1, min(max(_LEAST_ROWS, -(-_SPREAD * most // positions)), _UNFOLDED // unfolded)))


class _Moments:
    """Takes the moments of some layers, in forwards of the float network."""

    def __init__(self, calibration: Calibration, choices: Candidates, low: _Low) -> None:
        self.calibration, self.choices, self.low = calibration, choices, low
        self.folds: dict[_Key, dict[int, Moments]] = {}
        self.failed: set[str] = set()
        batches = len(calibration.batches)
        count = min(batches, max(2, math.ceil(_SAMPLES * batches / calibration.samples)))
        self.batches = [place * batches // count for place in range(count)]
        self.samples = math.ceil(count * calibration.samples / batches)

    def all(self) -> dict[_Key, list[Moments]]:
        """Return the moments of two folds of the batches, for each layer that can be solved and each of its specs."""
        layers = {name: self.calibration.layers[name] for name in self.low}
        for place, batch in enumerate(self.batches):
            seen: set[str] = set()

            def add(
                name: str, layer: Any, args: Any, kwargs: Any, output: Any, seen: set[str] = seen, batch: int = batch,
                fold: int = place % 2,
            ) -> None:  # fmt: skip
                if name in seen or not self._add(name, layer, args, kwargs, output, batch, fold):
                    self.failed.add(name)  # each call of a layer would want other weights
                seen.add(name)

            with ops_in_mode(self.calibration.module, "float"), hooked(dict(layers), after=add):
                self.calibration.run(batch)
        return {key: list(folds.values()) for key, folds in self.folds.items() if key[0] not in self.failed}

    @torch.no_grad()
    def _add(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any, batch: int, fold: int) -> bool:
        """Add the moments of a call; return False if the layer cannot be solved.

        They are taken inside the forward, as later modules may change the layer's inputs in place.
        """
        wanted = layer.output_tensor(output).detach()
        real = where_real(wanted, self.calibration.padding(batch))
        for spec, pair in {pair.activation: pair for pair in self.low[name].values()}.items():
            self.choices.put(name, str(pair))
            if name in self.failed or not solvable(layer):
                return False
            with Products() as products, attributes(layer, {"mode": "quantized"}):
                layer.forward(*args, **kwargs)
            most = positions_of(layer, len(wanted), self.samples)
            # Seeded by the batch, so that the positions do not depend on which layers are taken together.
            generator = torch.Generator().manual_seed(batch)
            some = _rows(layer, wanted, most)
            parts = [each.of(some) for each in products.found]
            known = None if real is None else real[some]
            with torch.autocast(wanted.device.type, enabled=False):
                found = moments_of_products(layer, parts, wanted[some], known, most, generator)
            if found is None:
                return False
            folds = self.folds.setdefault((name, spec), {})
            folds[fold] = folds[fold] + found if fold in folds else found
        return True
