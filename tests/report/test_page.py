from __future__ import annotations

import html.parser
import importlib.util
import json
import shutil
import subprocess
from typing import Any

import pytest
from rich.filesize import decimal

WHEN = ("before", "after")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


class Page(html.parser.HTMLParser):
    """What a page refers to, its tags, its text, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.cells: dict[str, list[list[str]]] = {}
        self.charts: dict[str, list[dict[str, Any]]] = {}
        self._table: list[list[str]] = []
        self._script = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        found = dict(attributes)
        if tag == "table":
            self._table = self.cells[found["id"].removeprefix("table-")] = []
        elif tag == "div" and "data-key" in found:  # the script before it holds its chart
            self.charts.setdefault(found["data-key"], []).append(json.loads(self._script))
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")
        self.references += [value for key, value in attributes if key in ("src", "href") and value]

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip():
            self._script = data
        else:
            self.words += data
        if self.lasttag in ("button", "td"):
            self._table[-1][-1] += data.strip()


def test_the_page_is_self_contained_and_escapes_names(run, saved):
    page = Page((saved / "report.html").read_text())
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in page.references)
    assert set(page.charts) == set(run[0].figures())
    assert not {"img", "link"} & set(page.tags)
    assert page.tags.count("script") == sum(map(len, page.charts.values())) + 2  # and plotly.js, and that of the page
    assert "a net <of> ours & yours" in page.words
    assert "of" not in page.tags


def test_the_page_shows_every_table_as_people_read_it(run, saved):
    cells = Page((saved / "report.html").read_text()).cells
    tables = {table.key: table for table in run[0].tables() if table.key != "warnings"}  # which are no table there
    assert list(cells) == list(tables)
    assert {path.stem for path in saved.glob("*.csv")} == {*tables, "warnings"}
    for key, table in tables.items():
        assert cells[key] == [table.headings(), *table.cells()]


def test_sizes_have_a_unit_for_people_and_are_numbers_in_files(run, saved):
    report, _ = run
    assert report.float_bytes == 6_272
    tables = {table.key: table for table in report.tables()}
    assert ["float size", "6.3 kB"] in tables["summary"].cells()
    assert '"float size, bytes",6272\n' in (saved / "summary.csv").read_text()
    assert f"size {decimal(report.allocation.allocation.costs['size'])}" in tables["allocation"].note
    budgets = [row[0] for row in tables["frontier"].cells()]
    assert budgets == [decimal(round(point.budget)) for point in report.frontier.points]
    assert tables["frontier"].headings()[:2] == ["budget", "size"]
    page = Page((saved / "report.html").read_text())
    assert f"smaller: {decimal(report.packed_bytes)} instead of 6.3 kB" in page.words


def test_the_charts_hold_the_values_of_the_record(run, saved):
    report, _ = run
    charts = Page((saved / "report.html").read_text()).charts
    units = report.tuning["AdaQuant"].units
    (chart,) = charts["units_adaquant"]
    assert [trace["x"] for trace in chart["data"]] == [[getattr(u, f"error_{e}") for u in units] for e in WHEN]
    assert all(unit.name in text for unit, text in zip(units, chart["data"][0]["hovertext"], strict=True))
    reasons = [text.partition("left ")[2] for text in chart["data"][0]["hovertext"]]
    assert [bool(reason) for reason in reasons] == [unit.steps > 0 and not unit.accepted for unit in units]
    assert any(reasons)
    (chart,) = charts["frontier"]
    assert chart["data"][-1]["y"] == [point.predicted for point in report.frontier.points]
    (chart,) = charts["sensitivity"]
    table = report.allocation.sensitivity
    for shades, rises in zip(chart["data"][0]["z"], table.rises.values(), strict=True):
        assert [shade is None for shade in shades] == [name not in rises for name in table.candidates]
    largest = max(rise for rises in table.rises.values() for rise in rises.values())
    shades = [shade for row in chart["data"][0]["z"] for shade in row if shade is not None]
    assert 10 ** max(shades) == pytest.approx(largest)
    for chart, row in zip(charts["ranges"], report.layers, strict=True):
        weights, inputs = chart["data"]
        assert weights["y"][:-1] == row.weights.counts
        assert inputs["x"] == row.inputs.edges
        assert [line["x0"] for line in chart["layout"]["shapes"]] == [row.low, row.high]


@pytest.mark.parametrize(
    ("missing", "told"), [(("plotly",), "makes them interactive"), (("plotly", "matplotlib"), "neither")]
)
@pytest.mark.filterwarnings("ignore::lightning_ptq.errors.ReportWarning")
def test_without_plotly_the_page_has_pictures_or_says_what_to_install(run, tmp_path, monkeypatch, missing, told):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in missing else own(name, *a))
    page = Page(run[0].save(tmp_path).read_text())
    assert told in page.words
    assert "pip install 'lightning-ptq[plots]'" in page.words
    assert page.tags.count("img") == (0 if "matplotlib" in missing else 7)
    assert page.charts == {}


def test_the_page_opens_with_the_result_and_its_origin(run, saved):
    report, _ = run
    words = Page((saved / "report.html").read_text()).words
    assert words.index(report.headline()) < words.index(report.verdict()[0].text) < words.index("bits per quantized")
    origin = json.loads((saved / "report.json").read_text())["origin"]
    assert origin["date"].replace("T", " ") in words
    assert origin["command"] in words
    assert all(f"{name} {version}" in words for name, version in origin["versions"].items())
    assert {"lightning_ptq", "torch", "Python"} <= set(origin["versions"])


PROBE = """<script>
addEventListener("load", () => {
  const cells = () => [...document.querySelectorAll("#table-layers tbody tr")].map(row => row.cells[3].dataset.value);
  const heading = document.querySelectorAll("#table-layers th")[3];
  const found = { sorts: [heading.ariaSort], columns: [] };
  for (let click = 0; click < 2; click++) {
    heading.querySelector("button").click();
    found.sorts.push(heading.ariaSort);
    found.columns.push(cells());
  }
  dispatchEvent(new Event("beforeprint"));  // draws the plots that are out of view
  found.plots = [...document.querySelectorAll(".plot")].map(plot => plot.querySelectorAll("path").length);
  found.wide = document.documentElement.scrollWidth > innerWidth;
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>"""


@pytest.mark.parametrize("width", [500, 1400])  # a window of Chromium has 500 pixels at least
def test_a_browser_shows_the_page_without_a_network(run, saved, tmp_path, width):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser found; looked for {', '.join(BROWSERS)}")
    page = tmp_path / "page.html"
    page.write_text((saved / "report.html").read_text() + PROBE)
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(Page(shown).words.split('{"sorts"')[1].join(['{"sorts"', ""]).strip())
    assert len(found["plots"]) == 6 + len(run[0].layers)
    assert min(found["plots"]) > 3
    counts = sorted(float(row.parameters) for row in run[0].layers)
    assert [[float(value) for value in column] for column in found["columns"]] == [counts, counts[::-1]]
    assert found["sorts"] == ["none", "ascending", "descending"]
    assert not found["wide"]
