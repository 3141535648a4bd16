from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_ptq.report import PTQReport
from lightning_ptq.report.figures import draw
from lightning_ptq.report.plots import widths_plot
from lightning_ptq.report.record import LayerRecord


def test_every_plot_is_a_picture_of_its_size(run, saved):
    figures = run[0].figures()
    assert set(figures) == {
        "units_adaquant",
        "curves_adaquant",
        "allocation",
        "sensitivity",
        "frontier",
        "statistics",
        "ranges",
    }
    assert {path.stem for path in saved.glob("*.png")} == set(figures)
    for key, figure in figures.items():
        with Image.open(saved / f"{key}.png") as image:
            assert image.size == pytest.approx(tuple(90 * figure.get_size_inches()), abs=1)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3


def bars(axes: Any) -> list[list[float]]:
    """The lengths of the bars, by series."""
    return [[bar.get_width() for bar in container] for container in axes.containers]


def test_the_plots_show_the_values_of_the_record(run):
    report, calibration = run
    axes = {key: figure.axes for key, figure in report.figures().items()}
    units = report.tuning["AdaQuant"].units
    assert bars(axes["units_adaquant"][0]) == [[u.error_before for u in units], [u.error_after for u in units]]
    labels = [label.get_text() for label in axes["units_adaquant"][0].get_yticklabels()]
    rolled_back = [unit.steps > 0 and not unit.accepted for unit in units]
    assert labels == [u.name + " (rolled back)" * undone for u, undone in zip(units, rolled_back, strict=True)]
    assert any(rolled_back)
    curves = [list(zip(*line.get_data(), strict=True)) for line in axes["curves_adaquant"][0].lines]
    gaps = [sum(np.isnan(step) for step, _ in curve) for curve in curves]
    assert [[pair for pair in curve if not np.isnan(pair[0])] for curve in curves] == [
        list(unit.curve) for unit in units if unit.curve
    ]
    # The curve of a second attempt, which starts at step 0 again, is not joined to that of the first.
    assert gaps == [sum(step == 0 for step, _ in unit.curve) - 1 for unit in units if unit.curve]
    assert max(gaps) == 1
    qconfigs = [layer.qconfig for layer in calibration.layers.values()]
    assert bars(axes["allocation"][0]) == [[q.weight.bits for q in qconfigs], [q.activation.bits for q in qconfigs]]
    table = report.allocation.sensitivity
    (image,) = axes["sensitivity"][0].images
    positive = [rise for rises in table.rises.values() for rise in rises.values() if rise > 0]
    floor = max(min(positive), 1e-6 * max(positive))
    for shades, rises in zip(image.get_array(), table.rises.values(), strict=True):
        expected = [max(rises[name], floor) if name in rises else None for name in table.candidates]
        assert shades.tolist() == expected
    (step,) = report.statistics
    assert bars(axes["statistics"][0]) == [[step.before], [step.after]]
    chosen, measured, points = axes["frontier"][0].lines
    size = report.allocation.allocation.costs["size"]
    predicted = report.allocation.sensitivity.predict(report.allocation.allocation.choice)
    assert (chosen.get_xdata(), chosen.get_ydata()) == ([size], [predicted])
    assert (measured.get_xdata(), measured.get_ydata()) == ([size], [report.allocation.measured])
    assert list(points.get_xdata()) == [point.allocation.costs["size"] for point in report.frontier.points]
    assert list(points.get_ydata()) == [point.predicted for point in report.frontier.points]
    panels = axes["ranges"]
    for left, right, row in zip(panels[::2], panels[1::2], report.layers, strict=True):
        assert left.patches[0].get_data().values.tolist() == row.weights.counts
        assert right.patches[0].get_data().values.tolist() == pytest.approx(np.log1p(row.inputs.counts).tolist())
        assert [line.get_xdata()[0] for line in right.lines] == [row.low, row.high]


@pytest.mark.parametrize(("widths", "bits"), [("w4", (4, 0)), ("w8a8", (8, 8)), ("w3g16a5", (3, 5))])
def test_the_plot_of_bit_widths_reads_every_notation(widths, bits):
    record = PTQReport("net", layers=[LayerRecord("conv", "Conv2d", widths, 10, 1.0)])
    assert bars(draw(widths_plot(record)).axes[0]) == [[bits[0]], [bits[1]]]
