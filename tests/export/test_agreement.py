from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lightning_ptq.errors import ExportError, ParityError
from lightning_ptq.export.agreement import Parity, TensorParity, compared, tolerance_of


def test_the_ratio_is_that_of_all_batches_in_decibels() -> None:
    first, second = np.array([[3.0, 4.0]]), np.array([[0.0, 5.0]])
    found = compared("x", [(first, first), (second, np.array([[0.3, 4.6]]))])
    assert found.snr == pytest.approx(10 * math.log10((9 + 16 + 25) / 0.25))
    assert compared("x", [(first, first)]).snr == math.inf


def test_predictions_are_the_places_of_the_greatest_scores() -> None:
    scores = np.array([[1.0, 2.0], [5.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    other = scores.copy()
    other[1] = [4.0, 5.0]
    assert compared("x", [(scores, other)], scores=True).agreement == 0.75
    tokens = scores.reshape(1, 4, 2)  # classes are the last axis here, and the second one in an image
    assert compared("x", [(tokens, other.reshape(1, 4, 2))], scores=True).agreement == 0.75
    image = scores.T.reshape(1, 2, 2, 2)
    assert compared("x", [(image, other.T.reshape(1, 2, 2, 2))], scores=True).agreement == 0.75
    labels = np.array([1, 0, 1, 1])
    assert compared("x", [(labels, np.array([1, 0, 1, 0]))], scores=True).snr == pytest.approx(10 * math.log10(4))


def test_masked_scores_are_equal_where_both_are_infinite() -> None:
    scores = np.array([[1.0, -math.inf], [2.0, 0.5]])
    assert compared("x", [(scores, scores.copy())]).snr == math.inf
    assert compared("x", [(scores, np.array([[1.0, -9.0], [2.0, 0.5]]))]).snr == -math.inf
    assert compared("x", [(np.ones((2, 2)), np.array([[1.0, math.nan], [1.0, 1.0]]))]).snr == -math.inf


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (TensorParity("x", 30.0), True),
        (TensorParity("x", 29.9), False),
        (TensorParity("x", 29.9, agreement=0.9995), True),
        (TensorParity("x", 29.9, agreement=0.998), False),
        (TensorParity("x", 14.9, agreement=1.0), False),  # all samples may have the same prediction
        (TensorParity("x", 25.0, rounding=28.0), True),
        (TensorParity("x", 24.9, rounding=28.0), False),
        (TensorParity("x", math.nan), False),
        (TensorParity("x", -math.inf, rounding=-math.inf), False),
    ],
)
def test_what_passes(row: TensorParity, passed: bool) -> None:
    assert Parity(Path("net.onnx"), 8, [TensorParity("y", math.inf), row]).passed is passed


def test_bad_tolerances_and_shapes_are_refused() -> None:
    for tolerance, name in (((math.nan, 0.0), "min_snr"), ((30, 2), "max_disagreement"), ((30, -0.1), "share")):
        with pytest.raises(ExportError, match=name):
            tolerance_of(*tolerance)
    with pytest.raises(ParityError, match=r"\(2, 3\) in the exported file, and \(3, 2\)"):
        compared("x", [(np.ones((3, 2)), np.ones((2, 3)))])
