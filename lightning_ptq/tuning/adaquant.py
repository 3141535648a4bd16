"""AdaQuant over a whole calibrated module: sequential or parallel, layer by layer or block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from lightning_ptq import arguments
from lightning_ptq.activations.memory_plan import MemoryPlan, limit_of
from lightning_ptq.activations.store import ActivationStore
from lightning_ptq.arguments import one_of, texts
from lightning_ptq.calibration.calibration import Calibration
from lightning_ptq.calibration.checks import check_calibration
from lightning_ptq.calibration.forward import eval_mode
from lightning_ptq.errors import QConfigError, RolledBackWarning, warn
from lightning_ptq.network.units import BlockRule, UnitKind
from lightning_ptq.numerics.qconfig import LayerQConfig, parse_candidates
from lightning_ptq.runtime.eager import plainly
from lightning_ptq.runtime.journal import NO_JOURNAL, Journal
from lightning_ptq.runtime.memory import DEFAULT_MEMORY_LIMIT, parse_limit
from lightning_ptq.runtime.progress import Progress, no_progress
from lightning_ptq.tuning.config import ReconstructionConfig
from lightning_ptq.tuning.parallel import ParallelRun
from lightning_ptq.tuning.run import AdaQuantResult, OnUnit
from lightning_ptq.tuning.sequential import SequentialRun
from lightning_ptq.tuning.tunable import tunable_units, units_for, warn_of_untunable

AdaQuantMode = Literal["sequential", "parallel"]


def adaquant(
    calibration: Calibration,
    *,
    mode: AdaQuantMode = "sequential",
    granularity: UnitKind = "block",
    blocks: BlockRule | None = None,
    candidates: Sequence[str] | None = None,
    config: ReconstructionConfig | None = None,
    memory_limit: str | int = DEFAULT_MEMORY_LIMIT,
    seed: int = 0,
    progress: Progress = no_progress,
    journal: Journal = NO_JOURNAL,
    on_unit: OnUnit = lambda row: None,
    announce: Callable[[MemoryPlan], None] = lambda plan: None,
) -> AdaQuantResult:
    """Tune every unit of a calibrated module so that its output comes close to the float one's.

    Args:
        calibration: A calibrated module, tuned in place.
        mode: ``"sequential"``: units get the outputs of tuned units, and ranks share each step. ``"parallel"``: units
            get the float model's inputs and are tuned at every candidate, and ranks share the units.
        granularity: ``"block"`` or ``"layer"``; see :func:`~lightning_ptq.network.units.find_units`.
        blocks: Name patterns of the blocks, or a function of name and module; None to search for blocks.
        candidates: Bit widths for parallel mode; None for the calibrated ones.
        config: Steps, rates and what is learned; by default ``ReconstructionConfig()``.
        memory_limit: Limit of the activations in memory; beyond it they go to files, or are recomputed. ``"auto"``
            allows what a forward and backward pass of the float network takes at ``config.batch_size``.
        seed: Seed of all random choices; global random states are not used.
        progress: Called with the steps done, the steps in total, and the unit's name. Default: nothing is called.
        journal: Where finished units are saved, so that an interrupted run resumes; by default nowhere.
        on_unit: Called with each result as soon as this rank knows it. Default: nothing is called.
        announce: Called before the work with the plan of memory and time. Default: nothing is called.

    Returns:
        The result of each unit, and in parallel mode the tuned states.

    Raises:
        QConfigError: If an argument does not fit.
        CalibrationError: If what a single unit needs fits neither into the limit nor onto the disk.

    Warns:
        RolledBackWarning, UntunableUnitWarning: Naming the units that tuning did not improve, or that cannot be tuned.

    Example:
        >>> from torch import nn, randn
        >>> from lightning_ptq import calibrate
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> [unit.name for unit in adaquant(calibrate(net, [randn(64, 16)], "w8a8")).units]
        ['0-2']
    """
    check_calibration(calibration, batches=True)
    seed = check_arguments(mode, granularity, candidates, memory_limit, seed, blocks, config)
    kind = SequentialRun if mode == "sequential" else ParallelRun
    widths, config = list(map(LayerQConfig.parse, candidates or ())), config or ReconstructionConfig()
    with eval_mode(calibration.module), plainly(), ExitStack() as stack:
        store = stack.enter_context(ActivationStore(limit_of(memory_limit, calibration, config.batch_size)))
        of_units, units = stack.enter_context(units_for(calibration, granularity, blocks))
        units = tunable_units(of_units, units, store, config)
        run = kind(of_units, units, store, config, seed, progress, journal, widths, on_unit)
        announce(run.plan)
        result = replace(run.all(), peak_activation_bytes=store.peak)
    return _finished(calibration, result, run.refused)


def _finished(calibration: Calibration, result: AdaQuantResult, refused: dict[str, str]) -> AdaQuantResult:
    """Round the biases, warn of the units that were not tuned, and return the result."""
    calibration.round_biases()
    warn_of_untunable(calibration.ranks.merge(refused))
    rejected = [f"{row.name} ({row.bits})" for row in result.units if row.steps and not row.accepted]
    if rejected:
        warn(
            f"tuning did not improve these units on held-out samples, so they keep their initial quantization:"
            f" {', '.join(rejected)}.",
            RolledBackWarning,
            stacklevel=3,
        )
    return result


def check_arguments(
    mode: str,
    granularity: str,
    candidates: Sequence[str] | None,
    memory_limit: str | int,
    seed: int = 0,
    blocks: BlockRule | None = None,
    config: ReconstructionConfig | None = None,
) -> int:
    """Raise :class:`QConfigError` where :func:`adaquant` would, before any work is done; return the seed."""
    one_of("mode", mode, ("sequential", "parallel"))
    one_of("granularity", granularity, ("layer", "block"))
    if candidates and mode == "sequential":
        raise QConfigError(
            "candidates need mode='parallel': sequential tuning is for one fixed width a layer. Leave candidates out,"
            " or write mode='parallel'."
        )
    if candidates is not None:
        parse_candidates(candidates)
    if blocks is not None and not callable(blocks):
        texts("blocks", blocks, "layers.*")
    if not isinstance(config, ReconstructionConfig | None):
        raise QConfigError(f"config must be a ReconstructionConfig, got {config!r}. Write ReconstructionConfig().")
    parse_limit(memory_limit)
    return arguments.seed(seed)
