"use strict";
// A click on a heading sorts by its column; a second click reverses the order. Empty cells stay last.
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const th = button.parentNode, body = th.closest("table").tBodies[0], column = th.cellIndex;
  const up = th.getAttribute("aria-sort") !== "ascending";
  [...th.parentNode.cells].forEach(cell => cell.setAttribute("aria-sort", "none"));
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.value;
  const compare = (a, b) => a === "" || isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  [...body.rows]
    .sort((a, b) => (key(a) === "") - (key(b) === "") || compare(key(a), key(b)) * (up ? 1 : -1))
    .forEach(row => body.append(row));
}));

// Each plot is drawn when it comes into view, in the colours of the theme and with names that fit its width.
const plots = window.Plotly ? [...document.querySelectorAll(".plot")] : [];
const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(pointer: coarse)").matches;

function shortened(name, most) {
  if (name.length <= most) return name;
  const head = Math.floor(most / 3);
  return `${name.slice(0, head)}…${name.slice(name.length - (most - head - 1))}`;
}

function themed(layout, width, series) {
  const style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name).trim();
  const result = {
    ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    margin: { l: 8, r: 12, t: 8, b: 8, ...layout.margin },
    font: { family: "system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif", size: 11, color: colour("--ink") },
    hoverlabel: { bgcolor: colour("--soft"), bordercolor: colour("--line"), font: { color: colour("--ink"), size: 12 }, align: "left" },
    dragmode: touch ? false : "zoom",
  };
  for (const name of Object.keys(layout).filter(name => /^[xy]axis/.test(name))) {
    const axis = { automargin: true, gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), ...layout[name] };
    if (name === "yaxis" && axis.ticktext) axis.ticktext = axis.ticktext.map(text => shortened(text, Math.max(16, Math.floor(width / 16))));
    if (width < 600 && axis.title) axis.title = { ...axis.title, font: { size: 10 } };
    result[name] = axis;
  }
  if (width < 600 && series > 6) result.showlegend = false;
  return result;
}

function draw(box) {
  const { data, layout } = JSON.parse(box.parentNode.querySelector("script").textContent);
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  if (box.clientWidth < 600) data.forEach(trace => { trace.showscale = false; });
  Plotly.react(box, data, themed(layout, box.clientWidth, data.length), touch ? { ...options, displayModeBar: false } : options);
  box.dataset.drawn = "yes";
}

const watcher = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(entry => {
  watcher.unobserve(entry.target);
  draw(entry.target);
}), { rootMargin: "400px" });
plots.forEach(box => watcher.observe(box));
const again = () => plots.filter(box => box.dataset.drawn).forEach(draw);
dark.addEventListener("change", again);
matchMedia("(max-width: 600px)").addEventListener("change", again);
addEventListener("beforeprint", () => plots.forEach(draw));
