"""AdaQuant over a whole calibrated module: sequential or parallel, layer by layer or block by block."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lightning_ptq.calibration import Calibration
from lightning_ptq.errors import QConfigError, RolledBackWarning
from lightning_ptq.forward import eval_mode
from lightning_ptq.journal import Journal, LayerStates, Piece
from lightning_ptq.plan import MemoryPlan, plan_memory
from lightning_ptq.qconfig import LayerQConfig
from lightning_ptq.ranks import Ranks
from lightning_ptq.reconstruct import UnitResult, reconstruct_unit
from lightning_ptq.replay import Replay
from lightning_ptq.store import ActivationStore, parse_bytes, trim_heap
from lightning_ptq.tuners import ReconstructionConfig, layer_state, set_layer_state
from lightning_ptq.unit_data import UnitData
from lightning_ptq.units import BlockRule, Granularity, Unit, find_units

AdaQuantMode = Literal["sequential", "parallel"]
Progress = Callable[[int, int, str], None]
DEFAULT_MEMORY_LIMIT = "4GiB"


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
    journal: Journal | None = None,
    announce: Callable[[MemoryPlan], None] | None = None,
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
        memory_limit: For activations: what goes beyond is kept in memory-mapped files, and where the disk is too small
            for that, computed again.
        seed: Of all random choices; the global random state is neither used nor changed.
        progress: Called with steps done, steps in all, and the unit's name.
        journal: Where finished units are kept, and found again by a run that was cut off.
        announce: Called before the work with the plan of memory and time.

    Several ranks (``calibration.ranks``) share each step in sequential mode, and the units in parallel mode; they all
    end with the same tuned module and result.

    Returns:
        A row per unit, and in parallel mode the tuned states.

    Raises:
        QConfigError: If an argument does not fit.
        CalibrationError: If what a single unit needs fits neither into the limit nor onto the disk.

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
    kind = _Sequential if mode == "sequential" else _Parallel
    with ActivationStore(memory_limit) as store, eval_mode(calibration.module):
        units = find_units(calibration.module, calibration.trace, granularity, blocks)
        widths = [LayerQConfig.parse(candidate) for candidate in candidates or ()]
        run = kind(calibration, units, store, config or ReconstructionConfig(), seed, progress, journal, widths)
        if announce is not None:
            announce(run.plan)
        result = run.all()
        result.peak_activation_bytes = store.peak
    _warn_of_rolled_back(result)
    return result


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
    """What both modes share."""

    calibration: Calibration
    units: list[Unit]
    store: ActivationStore
    config: ReconstructionConfig
    seed: int
    progress: Progress
    journal: Journal | None
    candidates: list[LayerQConfig]
    result: AdaQuantResult = field(default_factory=AdaQuantResult)
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.ranks = self.calibration.ranks
        self.steps_done = 0
        counts = self.steps_by_unit()
        self.steps = sum(counts)
        self.plan = plan_memory(
            self.calibration, self.units, self.store.limit, counts, self.config.batch_size, self.sequential
        )
        self.keep = not any(self.ranks.gather(self.plan.where == "recomputed"))
        self.float_stream = Replay(self.calibration, self.units, self.store, "float", keep=self.keep)

    @abstractmethod
    def steps_by_unit(self) -> list[int]:
        """Optimisation steps of each unit on this rank."""

    def all(self) -> AdaQuantResult:
        """Every unit, one after the other."""
        for index, unit in enumerate(self.units):
            start = time.perf_counter()
            self.progress(self.steps_done, self.steps, unit.name)
            seconds = self.unit(index)
            trim_heap()
            self.result.seconds_tuning += seconds
            self.result.seconds_capture += time.perf_counter() - start - seconds
        return self.result

    @abstractmethod
    def unit(self, index: int) -> float:
        """Capture and tune; returns the seconds of the tuning."""

    def _tune(self, unit: Unit, data: UnitData, ranks: Ranks) -> UnitResult:
        generator = torch.Generator(self.calibration.device).manual_seed(self.seed)
        before, steps = self.steps_done, self._steps(_qconfigs(unit))

        def on_step(step: int) -> None:
            self.progress(before + step, self.steps, unit.name)

        row = reconstruct_unit(unit, data, self.config, steps, generator, on_step, ranks)
        self.steps_done = before + steps
        return row

    def _steps(self, widths: list[LayerQConfig]) -> int:
        return self.config.steps_for(widths, self.calibration.samples)


class _Sequential(_Run):
    """Each unit gets the inputs that it gets in the quantized model; all ranks share its steps."""

    sequential = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantized_stream = Replay(self.calibration, self.units, self.store, "quantized", keep=self.keep)

    def steps_by_unit(self) -> list[int]:
        return [self._steps(_qconfigs(unit)) for unit in self.units]

    def unit(self, index: int) -> float:
        """Capture, tune or take from the journal, and hand the quantized outputs on."""
        unit, batches = self.units[index], len(self.calibration.batches)
        data = UnitData(self.float_stream.inputs(index), self.store)
        outputs = data.outputs(unit.module, batches, "float")
        if self.quantized_stream.needs_others(index):
            del data  # before as much again is captured
            data = UnitData(self.quantized_stream.inputs(index), self.store)
        known = self.ranks.first(lambda: self.journal.read(unit.name) if self.journal else None)
        if known is None:
            data.set_targets(outputs, unit.module)
        self.float_stream.finish(index, outputs)
        start = time.perf_counter()
        self.result.units.append(self._tune_and_keep(unit, data) if known is None else self._take(unit, known))
        seconds = time.perf_counter() - start
        data.drop_targets()
        if self.keep:
            self.quantized_stream.finish(index, data.outputs(unit.module, batches, "quantized"))
        return seconds

    def _tune_and_keep(self, unit: Unit, data: UnitData) -> UnitResult:
        row = self._tune(unit, data, self.ranks)
        if self.journal is not None and self.ranks.rank == 0:
            self.journal.write(unit.name, Piece(_states(unit), asdict(row)))
        return row

    def _take(self, unit: Unit, piece: Piece) -> UnitResult:
        _set_states(unit, piece.states)
        self.steps_done += self._steps(_qconfigs(unit))
        return UnitResult.of(piece.facts)


class _Parallel(_Run):
    """Each unit gets the float model's inputs and is tuned at every candidate; each is one rank's."""

    def __post_init__(self) -> None:
        self.ranks = self.calibration.ranks
        self.names = self.candidates or [self.calibration.prepared.qconfig.default]
        self.kept = self.journal.keys() if self.journal else set()
        costs = self._costs()
        self.owners = deal_out(costs, self.ranks.gather(self.kept & set(costs)))
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.tuned: LayerStates = {}
        super().__post_init__()

    def steps_by_unit(self) -> list[int]:
        return [self._all_steps(unit) if self._mine(unit) else 0 for unit in self.units]

    def _mine(self, unit: Unit) -> bool:
        return self.owners[unit.name] == self.ranks.rank

    def _all_steps(self, unit: Unit) -> int:
        return sum(self._steps(pairs) for pairs, _ in groupby(sorted(self._choices(unit), key=str)))

    def _costs(self) -> dict[str, float]:
        """Estimated time of each unit: multiply-accumulates and activations, by optimisation steps."""
        if self.ranks.world == 1:
            return dict.fromkeys((unit.name for unit in self.units), 1.0)
        work = layer_work(self.calibration)
        return {unit.name: sum(work[name] for name in unit.layers) * self._all_steps(unit) for unit in self.units}

    def all(self) -> AdaQuantResult:
        """Every unit's float outputs, the own units' tuning, and an exchange."""
        super().all()
        everything = self.ranks.gather((self.rows, self.tuned, self.result.seconds_tuning))
        rows = {name: found for of_rank, _, _ in everything for name, found in of_rank.items()}
        tuned = {name: found for _, of_rank, _ in everything for name, found in of_rank.items()}
        self.result.seconds_tuning = max(seconds for _, _, seconds in everything)
        for unit in self.units:
            self.result.units += [UnitResult.of(row) for row in rows[unit.name]]
            self._put(unit, {key: state for key, state in tuned.items() if key in self._keys(unit)})
        return self.result

    def unit(self, index: int) -> float:
        """Capture; tune the unit if it is this rank's."""
        unit, batches = self.units[index], len(self.calibration.batches)
        data = UnitData(self.float_stream.inputs(index), self.store)
        outputs = data.outputs(unit.module, batches, "float")
        if not self._mine(unit):
            self.float_stream.finish(index, outputs)
            return 0.0
        piece = self.journal.read(unit.name) if self.journal and unit.name in self.kept else None
        if piece is None:
            data.set_targets(outputs, unit.module)
        self.float_stream.finish(index, outputs)
        start = time.perf_counter()
        if piece is None:
            piece = self._tune_candidates(unit, data)
            if self.journal is not None:
                self.journal.write(unit.name, piece)
        else:
            self.steps_done += self._all_steps(unit)
        self.rows[unit.name] = piece.facts["rows"]
        self.tuned.update(piece.states)
        return time.perf_counter() - start

    def _tune_candidates(self, unit: Unit, data: UnitData) -> Piece:
        """Tune at each candidate, from the float weights; the calibrated widths stay in place."""
        own, choices = _qconfigs(unit), self._choices(unit)
        rows: list[dict[str, Any]] = []
        states: dict[str, dict[str, Tensor]] = {}
        for pairs in choices:
            key = _key(pairs)
            if all(f"{key}:{name}" in states for name in unit.layers):
                continue  # the first and last layer, for example, are alike at several candidates
            self._round_to_nearest(unit, pairs)
            rows.append(asdict(self._tune(unit, data, Ranks())))
            states |= {f"{key}:{name}": state for name, state in _states(unit).items()}
        self._round_to_nearest(unit, own)
        return Piece(states, {"rows": rows})

    def _keys(self, unit: Unit) -> set[str]:
        return {f"{_key(pairs)}:{name}" for pairs in self._choices(unit) for name in unit.layers}

    def _put(self, unit: Unit, states: LayerStates) -> None:
        """Note the tuned states by candidate; those at the calibrated widths go into the layers."""
        own, choices = _qconfigs(unit), self._choices(unit)
        for candidate, pairs in zip(self.names, choices, strict=True):
            found = {name: states[f"{_key(pairs)}:{name}"] for name in unit.layers}
            self.result.states.setdefault(str(candidate), {}).update(found)
            if pairs == own:
                _set_states(unit, found)

    def _round_to_nearest(self, unit: Unit, pairs: list[LayerQConfig]) -> None:
        for name, pair in zip(unit.layers, pairs, strict=True):
            self.calibration.round_to_nearest(name, pair)

    def _choices(self, unit: Unit) -> list[list[LayerQConfig]]:
        """The widths of the unit's layers at each candidate; the calibrated ones if there are no candidates."""
        if not self.candidates:
            return [_qconfigs(unit)]
        return [[self.calibration.qconfig_at(name, candidate) for name in unit.layers] for candidate in self.candidates]


def deal_out(costs: Mapping[str, float], kept: Sequence[set[str]]) -> dict[str, int]:
    """The rank that each piece of work goes to: the costliest first, each to the rank with the least so far.

    Args:
        costs: By name.
        kept: For each rank, pieces that it has done already.

    Example:
        >>> deal_out({"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}, [set(), {"d"}])
        {'a': 0, 'b': 1, 'c': 1, 'd': 1}
    """
    owners = {name: rank for rank in reversed(range(len(kept))) for name in kept[rank]}
    load = [0.0] * len(kept)
    for name in sorted(costs, key=lambda name: -costs[name]):
        if name not in owners:
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
    return {name: owners[name] for name in costs}


def layer_work(calibration: Calibration) -> dict[str, float]:
    """The effort of each layer for one sample: multiply-accumulates, plus what activations cost, in the same unit."""
    found = dict.fromkeys(calibration.layers, 0.0)

    def watch(name: str) -> Any:
        def hook(layer: Any, args: Any, output: Tensor) -> None:
            found[name] += output.numel() * (layer.weight.numel() / layer.weight.shape[0] + _WORK_OF_ACTIVATION)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in calibration.layers.items()]
    try:
        calibration.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return found


_WORK_OF_ACTIVATION = 256  # multiply-accumulates that quantizing a value and going back through it are worth


def _key(pairs: list[LayerQConfig]) -> str:
    return "/".join(map(str, pairs))


def _states(unit: Unit) -> LayerStates:
    return {name: layer_state(layer) for name, layer in unit.layers.items()}


def _set_states(unit: Unit, states: LayerStates) -> None:
    for name, state in states.items():
        set_layer_state(unit.layers[name], state)


def _qconfigs(unit: Unit) -> list[LayerQConfig]:
    return [cast(LayerQConfig, layer.qconfig) for layer in unit.layers.values()]
