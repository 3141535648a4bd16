"""AdaQuant over a whole calibrated module: sequential or parallel, layer by layer or block by block."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, cast

import torch
from torch import Tensor

from lightning_ptq.calibration import Calibration
from lightning_ptq.errors import QConfigError, RolledBackWarning
from lightning_ptq.forward import eval_mode
from lightning_ptq.qconfig import LayerQConfig
from lightning_ptq.reconstruct import UnitResult, reconstruct_unit
from lightning_ptq.replay import Replay
from lightning_ptq.store import ActivationStore, parse_bytes, trim_heap
from lightning_ptq.tuners import ReconstructionConfig, layer_state, set_layer_state
from lightning_ptq.unit_data import UnitData
from lightning_ptq.units import BlockRule, Granularity, Unit, find_units

AdaQuantMode = Literal["sequential", "parallel"]
Progress = Callable[[int, int, str], None]
DEFAULT_MEMORY_LIMIT = "4GiB"

LayerStates = dict[str, dict[str, Tensor]]


@dataclass
class AdaQuantResult:
    """What :func:`adaquant` did.

    Attributes:
        units: A row per unit (and candidate), in the order of the work.
        states: For each candidate, the tuned state of every layer; parallel mode only.
        seconds_tuning: Time spent in optimisation steps and held-out checks.
        seconds_capture: Time spent on inputs and targets.
        peak_activation_bytes: Most bytes of activations held in memory at a time.
    """

    units: list[UnitResult] = field(default_factory=list)
    states: dict[str, LayerStates] = field(default_factory=dict)
    seconds_tuning: float = 0.0
    seconds_capture: float = 0.0
    peak_activation_bytes: int = 0


def adaquant(
    calibration: Calibration,
    *,
    mode: AdaQuantMode = "sequential",
    granularity: Granularity = "block",
    blocks: BlockRule | None = None,
    candidates: Sequence[str] | None = None,
    config: ReconstructionConfig | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = lambda done, total, text: None,
) -> AdaQuantResult:
    """Tune every unit of a calibrated module so that its output comes close to the float one's.

    Args:
        calibration: What :func:`~lightning_ptq.calibration.calibrate` returned. Its module is tuned in place.
        mode: ``"sequential"``: each unit gets the inputs it will get in the quantized model, in which the units before
            it are tuned already. ``"parallel"``: each unit gets the float model's inputs, and is tuned at every
            candidate.
        granularity: ``"block"`` or ``"layer"``; see :func:`~lightning_ptq.units.find_units`.
        blocks: Name patterns of the blocks, or a function of name and module, in place of the automatic search.
        candidates: Bit widths for parallel mode, such as ``["w8a8", "w4a4"]``; by default the calibrated ones alone.
        config: Steps, rates and what is learned.
        memory_limit: For activations: what goes beyond is kept in memory-mapped files.
        seed: Of all random choices; the global random state is neither used nor changed.
        progress: Called with steps done, steps in all, and the unit's name.

    Returns:
        A row per unit, and in parallel mode the tuned states.

    Raises:
        QConfigError: If an argument does not fit.

    Warns:
        RolledBackWarning: Naming the units that tuning did not improve.

    Example:
        >>> from lightning_ptq import QConfig, calibrate
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> samples = torch.randn(256, 4) @ torch.randn(4, 16)
        >>> calibration = calibrate(net, [samples], QConfig.parse("w3a8", first_last_bits=None))
        >>> result = adaquant(calibration, config=ReconstructionConfig(steps=50))
        >>> [unit.name for unit in result.units]
        ['0', '2']
    """
    check_arguments(mode, granularity, candidates, memory_limit)
    with ActivationStore(memory_limit) as store, eval_mode(calibration.module):
        units = find_units(calibration.module, calibration.trace, granularity, blocks)
        widths = [LayerQConfig.parse(candidate) for candidate in candidates or ()]
        run = _Run(calibration, units, store, mode, config or ReconstructionConfig(), seed, progress, widths)
        for index in range(len(units)):
            run.unit(index)
        run.result.peak_activation_bytes = store.peak
    _warn_of_rolled_back(run.result)
    return run.result


def _warn_of_rolled_back(result: AdaQuantResult) -> None:
    back = [f"{row.name} ({row.bits})" for row in result.units if row.steps and not row.accepted]
    if back:
        warnings.warn(
            f"tuning did not improve these units on held-out samples, so they keep their initial quantization:"
            f" {', '.join(back)}.",
            RolledBackWarning,
            stacklevel=3,
        )


def check_arguments(mode: str, granularity: str, candidates: Sequence[str] | None, memory_limit: str | int) -> None:
    """Raise :class:`QConfigError` where :func:`adaquant` would, before any work is done."""
    if mode not in ("sequential", "parallel"):
        raise QConfigError(f"mode must be 'sequential' or 'parallel', got {mode!r}.")
    if granularity not in ("layer", "block"):
        raise QConfigError(f"granularity must be 'layer' or 'block', got {granularity!r}.")
    if candidates and mode == "sequential":
        raise QConfigError(
            "candidates need mode='parallel': sequential tuning is for one fixed width a layer. Leave candidates out,"
            " or write mode='parallel'."
        )
    for candidate in candidates or ():
        LayerQConfig.parse(candidate)
    parse_bytes(memory_limit)


@dataclass
class _Run:
    calibration: Calibration
    units: list[Unit]
    store: ActivationStore
    mode: AdaQuantMode
    config: ReconstructionConfig
    seed: int
    progress: Progress
    candidates: list[LayerQConfig] = field(default_factory=list)
    result: AdaQuantResult = field(default_factory=AdaQuantResult)

    def __post_init__(self) -> None:
        self.float_stream = Replay(self.calibration, self.units, self.store, "float")
        self.quantized_stream = Replay(self.calibration, self.units, self.store, "quantized")
        self.steps_done = 0
        work = [pairs for unit in self.units for pairs, _ in groupby(sorted(self._choices(unit), key=str))]
        self.steps = sum(self._steps(pairs) for pairs in work)

    def unit(self, index: int) -> None:
        """Capture, tune and, in sequential mode, hand the quantized outputs on."""
        start = time.perf_counter()
        unit = self.units[index]
        self.progress(self.steps_done, self.steps, unit.name)
        data = self._capture(index)
        captured = time.perf_counter()
        if self.mode == "sequential":
            self._tune(unit, data)
        else:
            self._tune_candidates(unit, data)
        tuned = time.perf_counter()
        if self.mode == "sequential":
            data.drop_targets()
            self.quantized_stream.finish(index, data.outputs(unit.module, len(self.calibration.batches), "quantized"))
        trim_heap()
        self.result.seconds_tuning += tuned - captured
        self.result.seconds_capture += time.perf_counter() - tuned + captured - start

    def _capture(self, index: int) -> UnitData:
        unit = self.units[index]
        batches = len(self.calibration.batches)
        data = UnitData(self.float_stream.inputs(index), self.store)
        outputs = data.outputs(unit.module, batches, "float")
        if self.mode == "sequential" and self.quantized_stream.needs_others(index):
            del data  # before as much again is captured
            data = UnitData(self.quantized_stream.inputs(index), self.store)
        data.set_targets(outputs, unit.module)
        self.float_stream.finish(index, outputs)
        return data

    def _tune(self, unit: Unit, data: UnitData) -> UnitResult:
        generator = torch.Generator(self.calibration.device).manual_seed(self.seed)
        before = self.steps_done

        def on_step(step: int) -> None:
            self.progress(before + step, self.steps, unit.name)

        steps = self._steps(_qconfigs(unit))
        row = reconstruct_unit(unit, data, self.config, steps, generator, on_step)
        self.steps_done = before + steps
        self.result.units.append(row)
        return row

    def _steps(self, widths: list[LayerQConfig]) -> int:
        return self.config.steps_for(widths, self.calibration.samples)

    def _tune_candidates(self, unit: Unit, data: UnitData) -> None:
        """Tune at each candidate, from the float weights; the calibrated widths stay in place."""
        own, choices = _qconfigs(unit), self._choices(unit)
        names: list[LayerQConfig] = self.candidates or [self.calibration.prepared.qconfig.default]
        tuned: list[dict[str, dict[str, Tensor]]] = []
        for position, (name, pairs) in enumerate(zip(names, choices, strict=True)):
            if pairs in choices[:position]:  # the first and last layer, for example, are alike at several candidates
                tuned.append(tuned[choices.index(pairs)])
            else:
                self._round_to_nearest(unit, pairs)
                self._tune(unit, data)
                tuned.append({layer_name: layer_state(layer) for layer_name, layer in unit.layers.items()})
            self.result.states.setdefault(str(name), {}).update(tuned[-1])
        self._round_to_nearest(unit, own)
        if own in choices:
            for layer_name, state in tuned[choices.index(own)].items():
                set_layer_state(unit.layers[layer_name], state)

    def _round_to_nearest(self, unit: Unit, pairs: list[LayerQConfig]) -> None:
        for name, pair in zip(unit.layers, pairs, strict=True):
            self.calibration.round_to_nearest(name, pair)

    def _choices(self, unit: Unit) -> list[list[LayerQConfig]]:
        """The widths of the unit's layers at each candidate; the calibrated ones if there are no candidates."""
        if not self.candidates:
            return [_qconfigs(unit)]
        return [[self.calibration.qconfig_at(name, candidate) for name in unit.layers] for candidate in self.candidates]


def _qconfigs(unit: Unit) -> list[LayerQConfig]:
    return [cast(LayerQConfig, layer.qconfig) for layer in unit.layers.values()]
