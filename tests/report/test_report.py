from __future__ import annotations

import csv
import html.parser
import json
import shutil
import subprocess

import pytest
import torch
from helpers import IMAGES, ResNet, SmallNet, build, seeded
from rich.console import Console
from torch import nn

from lightning_ptq import (
    Calibration,
    ReconstructionConfig,
    adaquant,
    apply_allocation,
    calibrate,
    search_allocation,
    size_cost,
    tune_bias,
)  # fmt: skip
from lightning_ptq.allocation.frontier import sweep
from lightning_ptq.calibration.candidates import Candidates
from lightning_ptq.errors import (  # fmt: skip
    PTQWarning,
    ReportWarning,
    RolledBackWarning,
    UnfoldedBatchNormWarning,
    noted_warnings,
    warn,
)
from lightning_ptq.report import PTQReport
from lightning_ptq.report.record import of_observer, of_values

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def whole_run(report: PTQReport) -> Calibration:
    """All that there is, on a small net; rates that spoil a unit, so that there is a warning."""
    candidates = ("w8a8", "w4a4", "w2a4")
    with noted_warnings(report.warnings):
        with report.stage("Calibration"):
            calibration = calibrate(build(ResNet), seeded(1, 64, 2, 6, 6).split(16), "w4a4")
        report.calibrated(calibration)
        with report.stage("Bit allocation"):
            cost = size_cost(calibration, Candidates(calibration, candidates))
            report.allocation = search_allocation(calibration, candidates, cost, {"size": 0.2})
            apply_allocation(calibration, report.allocation.allocation)
        report.frontier = sweep(report.allocation.sensitivity, [cost], "size")
        with report.stage("AdaQuant"):
            config = ReconstructionConfig(steps=3, weight_lr=5.0)
            report.tuning["AdaQuant"] = adaquant(calibration, config=config)
        report.statistics = [tune_bias(calibration, steps=2)]
        report.finish(calibration)
    return calibration


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    report = PTQReport("a net <of> ours & yours")
    with pytest.warns(RolledBackWarning):
        calibration = whole_run(report)
    return report, calibration


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "deep"
    assert run[0].save(folder) == folder / "report.html"
    return folder


def test_the_figures_of_the_summary_add_up(run):
    report, calibration = run
    summary = report.summary()
    layers = calibration.layers
    bits = [layer.qconfig.weight.bits for layer in layers.values()]
    weights = [layer.weight.numel() for layer in layers.values()]
    scales = sum(4 * layer.weight.shape[0] for layer in layers.values())
    expected = sum(-(-n * b // 8) for n, b in zip(weights, bits, strict=True)) + scales
    assert summary["bits per quantized weight"] == pytest.approx(8 * expected / sum(weights))
    macs = {"stem": 36 * 9 * 2 * 6, "head": 6 * 4}
    assert {row.name: row.macs for row in report.layers if row.name in macs} == macs
    assert summary["float size, bytes"] == sum(
        t.numel() * t.element_size() for t in build(ResNet).state_dict().values()
    )
    assert summary["times smaller"] == summary["float size, bytes"] / summary["packed size, bytes"]
    share = sum(row.macs * int(row.widths[1]) * int(row.widths[3]) for row in report.layers)
    assert summary["bit operations, share of float"] == pytest.approx(share / 1024 / sum(r.macs for r in report.layers))
    assert summary["seconds"] == sum(stage.seconds for stage in report.stages)
    assert [stage.name for stage in report.stages] == ["Calibration", "Bit allocation", "AdaQuant"]
    assert summary["calibration samples"] == 64


def test_the_histograms_count_every_value(run):
    report, calibration = run
    for row in report.layers:
        assert sum(row.weights.counts) == row.parameters
        assert row.weights.edges[0] == pytest.approx(calibration.layers[row.name].reference[0].min().item())
    first = report.layers[0]
    assert sum(first.inputs.counts) == 64 * 2 * 6 * 6
    values = seeded(1, 64, 2, 6, 6)
    low, high = values.min().item(), values.max().item()
    assert (first.inputs.edges[0], first.inputs.edges[-1]) == (low, high)
    below = sum(count for count, edge in zip(first.inputs.counts, first.inputs.edges[1:], strict=True) if edge <= 0)
    assert below == pytest.approx((values < 0).sum().item(), rel=0.1)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((3,), 2.5), torch.tensor([-1.0])])
def test_a_histogram_of_equal_values_has_one_full_bin(values):
    found = of_values(values)
    assert sum(found.counts) == len(values)
    assert all(a < b for a, b in zip(found.edges, found.edges[1:], strict=False))


def test_an_observer_without_a_histogram_has_none():
    from lightning_ptq import QConfig

    calibration = calibrate(SmallNet().eval(), [IMAGES], QConfig.parse("w8a8", activation_observer="minmax"))
    assert of_observer(calibration.observers["0"]) is None


def test_json_and_csv_hold_the_same_figures(run, saved):
    report, _ = run
    found = json.loads((saved / "report.json").read_text())
    assert found["summary"]["packed size, bytes"] == report.packed_bytes
    assert [row["name"] for row in found["layers"]] == [row.name for row in report.layers]
    units = found["tuning"]["AdaQuant"]["units"]
    with (saved / "units_adaquant.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["unit"], float(row["before"])) for row in rows] == [(u["name"], u["error_before"]) for u in units]
    assert found["warnings"][0].keys() == {"kind", "message", "remedy"}


def test_every_drawing_is_a_picture(run, saved):
    from PIL import Image

    names = {path.stem for path in saved.glob("*.png")}
    assert names == {
        "units_adaquant",
        "curves_adaquant",
        "allocation",
        "sensitivity",
        "frontier",
        "statistics",
        "ranges",
    }
    for path in saved.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3


def test_print_shows_summary_stages_warnings_and_layers(run, capsys):
    run[0].print(Console(width=160))
    text = capsys.readouterr().out
    assert all(word in text for word in ("times smaller", "Calibration", "RolledBack", "blocks.0.conv1"))
    assert "Sensitivities" not in text
    run[0].print(every=True)
    assert "Sensitivities" in capsys.readouterr().out


class Page(html.parser.HTMLParser):
    """Whatever a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for key, value in attributes if key in ("src", "href") and value]

    def handle_data(self, data):
        self.words += data


def test_the_page_is_self_contained_and_escapes_names(saved):
    page = Page((saved / "report.html").read_text())
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in page.references)
    assert page.tags.count("img") == 7
    assert "link" not in page.tags
    assert "a net <of> ours & yours" in page.words
    assert "of" not in page.tags
    for path in saved.glob("*.csv"):
        assert path.stem == "warnings" or f'id="table-{path.stem}"' in (saved / "report.html").read_text()


PROBE = """<script>
addEventListener("load", () => {
  const column = () => [...document.querySelectorAll("#table-layers tbody tr")].map(row => row.cells[3].dataset.value);
  document.querySelectorAll("#table-layers th")[3].click();
  const up = column();
  document.querySelectorAll("#table-layers th")[3].click();
  const found = {
    pictures: [...document.images].map(image => image.naturalWidth), up: up, down: column(),
    wide: document.documentElement.scrollWidth > innerWidth, title: document.title,
  };
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>"""


def test_a_browser_shows_the_page_without_a_network(run, saved, tmp_path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser found; looked for {', '.join(BROWSERS)}")
    page = tmp_path / "page.html"
    page.write_text((saved / "report.html").read_text() + PROBE)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(Page(shown).words.split('{"pictures"')[1].join(['{"pictures"', ""]).strip())
    assert len(found["pictures"]) == 7
    assert min(found["pictures"]) > 100
    counts = sorted(float(row.parameters) for row in run[0].layers)
    assert [float(value) for value in found["up"]] == counts
    assert [float(value) for value in found["down"]] == counts[::-1]
    assert not found["wide"]


def test_without_matplotlib_the_rest_is_written(run, tmp_path, monkeypatch):
    import importlib.util

    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else own(name, *a))
    with pytest.warns(ReportWarning, match="matplotlib is not installed"):
        run[0].save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".html"}


def test_warnings_are_noted_with_their_remedy_even_where_filters_hide_them():
    import warnings

    notes: list[PTQWarning] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with noted_warnings(notes):
            warn("one", RolledBackWarning)
            net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
            calibrate(net, [torch.randn(8, 4)], "w4a4")
        warn("not heard", RolledBackWarning)
    assert [type(note) for note in notes] == [RolledBackWarning, UnfoldedBatchNormWarning]


@pytest.mark.parametrize("kind", PTQWarning.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_warning_has_a_remedy(kind):
    assert len(kind.remedy.split()) >= 3
