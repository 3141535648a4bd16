"""The two pipelines of the paper as lists of callbacks for a Trainer (Hubara et al., ICML 2021, sec. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ptq.arguments import keywords
from lightning_ptq.callbacks.adaquant import AdaQuantLayerwise
from lightning_ptq.callbacks.allocator import DEFAULT_CANDIDATES, BitAllocator
from lightning_ptq.callbacks.base import PTQCallback
from lightning_ptq.callbacks.capture import CalibrationCapture
from lightning_ptq.callbacks.statistics import StatsTuning
from lightning_ptq.numerics.qconfig import parse_candidates


def light(
    size: float | None = None,
    *,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    num_samples: int | None = None,
    allocator: dict[str, Any] | None = None,
    statistics: dict[str, Any] | None = None,
    capture: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[PTQCallback]:
    """Return the callbacks of the light pipeline: calibration, bit allocation and statistics tuning.

    No weight is tuned.

    Args:
        size: Budget for the packed weights; see :class:`BitAllocator`. None if ``allocator`` names another budget.
        candidates: Bit widths to choose from.
        num_samples: Number of calibration samples; by default all samples of the loader.
        allocator: Further arguments of :class:`BitAllocator`.
        statistics: Further arguments of :class:`StatsTuning`.
        capture: Further arguments of :class:`CalibrationCapture`.
        seed: Seed of all random choices.

    Example:
        >>> [callback.role for callback in light(0.15)]
        ['CalibrationCapture', 'BitAllocator', 'StatsTuning']
    """
    candidates = _texts(candidates)
    return [
        CalibrationCapture(candidates[0], num_samples, **_capture(capture)),
        BitAllocator(
            size, candidates=candidates, **keywords("allocator", allocator, BitAllocator, ("size", "candidates"))
        ),
        StatsTuning(**{"seed": seed, **keywords("statistics", statistics, StatsTuning)}),
    ]


def advanced(
    size: float | None = None,
    *,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    num_samples: int | None = None,
    parallel: dict[str, Any] | None = None,
    allocator: dict[str, Any] | None = None,
    sequential: dict[str, Any] | None = None,
    statistics: dict[str, Any] | None = None,
    capture: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[PTQCallback]:
    """Return the callbacks of the advanced pipeline.

    These are calibration, parallel tuning at every candidate, bit allocation, sequential tuning and statistics tuning.

    Args:
        size: Budget for the packed weights; see :class:`BitAllocator`. None if ``allocator`` names another budget.
        candidates: Bit widths to choose from.
        num_samples: Number of calibration samples; by default all samples of the loader.
        parallel: Further arguments of the parallel :class:`AdaQuantLayerwise`.
        allocator: Further arguments of :class:`BitAllocator`.
        sequential: Further arguments of the sequential :class:`AdaQuantLayerwise`.
        statistics: Further arguments of :class:`StatsTuning`.
        capture: Further arguments of :class:`CalibrationCapture`.
        seed: Seed of all random choices.

    Example:
        >>> [callback.role for callback in advanced(0.15)][1:4]
        ['AdaQuantLayerwise', 'BitAllocator', 'AdaQuantLayerwise']
    """
    candidates = _texts(candidates)
    return [
        CalibrationCapture(candidates[0], num_samples, **_capture(capture)),
        AdaQuantLayerwise(
            "parallel", candidates=candidates, **{"seed": seed, "steps": 60, **_tuning("parallel", parallel)}
        ),
        BitAllocator(size, **keywords("allocator", allocator, BitAllocator, ("size", "candidates"))),
        AdaQuantLayerwise("sequential", **{"seed": seed, **_tuning("sequential", sequential)}),
        StatsTuning(**{"seed": seed, **keywords("statistics", statistics, StatsTuning)}),
    ]


def _capture(options: Any) -> dict[str, Any]:
    return keywords("capture", options, CalibrationCapture, ("qconfig", "num_samples"))


def _tuning(name: str, options: Any) -> dict[str, Any]:
    return keywords(name, options, AdaQuantLayerwise, ("mode", "candidates"))


def _texts(candidates: Sequence[str]) -> list[str]:
    """Return candidates as a list, the first of which is what the module is calibrated at."""
    return [str(candidate) for candidate in parse_candidates(candidates)]
