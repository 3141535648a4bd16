from __future__ import annotations

import html.parser
import json
import shutil
import subprocess

import pytest
from rich.filesize import decimal

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


class Page(html.parser.HTMLParser):
    """What a page refers to, its tags, its text, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.cells: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "table":
            self._table = self.cells[dict(attributes)["id"].removeprefix("table-")] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")
        self.references += [value for key, value in attributes if key in ("src", "href") and value]

    def handle_data(self, data):
        self.words += data
        if self.lasttag in ("th", "td"):
            self._table[-1][-1] += data.strip()


def test_the_page_is_self_contained_and_escapes_names(saved):
    page = Page((saved / "report.html").read_text())
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in page.references)
    assert page.tags.count("img") == 7
    assert "link" not in page.tags
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
