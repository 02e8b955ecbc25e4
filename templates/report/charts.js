/** Figures, drawn one after another, with their data as tables and files. */

const DRAWN = { displayModeBar: false, responsive: true, showTips: false };
const LAYOUT = {
  font: { family: 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif', size: 13, color: "#1a1d21" },
  margin: { l: 56, r: 14, t: 10, b: 44 },
  paper_bgcolor: "#ffffff",
  plot_bgcolor: "#ffffff",
  legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 }, maxheight: 9999 },
  bargap: 0.4,
  hovermode: "closest",
  // without a mouse, dragging scrolls
  dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
};
const ONE_LINE = 29; // height of a legend with one line
const AXIS = { gridcolor: "#d5d9df", zerolinecolor: "#d5d9df", title: { standoff: 8, font: { size: 13 } } };

/** Escape names, because Plotly reads text as markup; break long ones into two lines. */
function literal(value) {
  return typeof value === "string" ? value.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replace(", ", ",<br>") : value;
}

function named(trace) {
  const { name, x, y, text } = trace;
  return { ...trace, name: name.length > 36 ? literal(name) : literal(name).replace("<br>", " "), x: x.map(literal), y: y.map(literal), text: text?.map(literal) };
}

/** Width for names at the left; Plotly would draw a figure several times to find it. */
function leftMargin(traces) {
  const lines = traces.flatMap((trace) => trace.y).filter((y) => typeof y === "string").flatMap((y) => y.split("<br>"));
  return lines.length ? 20 + 7 * Math.max(...lines.map((line) => line.length)) : 66;
}

function axis(own) {
  return { ...AXIS, ...own, title: { ...AXIS.title, ...own.title } };
}

/** Values of a figure as rows of cells; the first row has the column names. */
function cells(figure) {
  const { xaxis, yaxis } = figure.layout;
  const named = figure.traces.some((trace) => trace.mode?.endsWith("text"));
  const bounds = (trace) => (trace.orientation === "h" || trace.error_x ? ["x", trace.error_x] : ["y", trace.error_y]);
  const within = figure.traces.some((trace) => bounds(trace)[1]);
  const head = ["series", xaxis.title?.text ?? "x", yaxis.title?.text ?? "name"];
  const rows = [[...head, ...(named ? ["name"] : []), ...(within ? ["from", "to"] : [])]];
  for (const trace of figure.traces) {
    const [key, error] = bounds(trace);
    trace.x.forEach((x, i) => {
      const row = [trace.name, x, trace.y[i]];
      if (named) row.push(trace.text?.[i] ?? "");
      if (within) row.push(...(error ? [trace[key][i] - error.arrayminus[i], trace[key][i] + error.array[i]] : ["", ""]));
      rows.push(row);
    });
  }
  return rows;
}

const shown = (value) => (typeof value === "number" ? String(+value.toPrecision(6)) : String(value ?? ""));

/** A CSV cell; a quote before text such as "=1+1" keeps spreadsheets from running it as a formula. */
function csvCell(value) {
  if (typeof value === "number") return String(value);
  const text = String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&");
  return `"${text.replaceAll('"', '""')}"`;
}

function fillTable(figure, place) {
  const MOST = 500;
  const [head, ...rows] = cells(figure);
  const table = element("table");
  const line = (values, tag) => {
    const row = element("tr");
    for (const value of values) row.append(element(tag, typeof value === "number" ? "number" : "", shown(value)));
    return row;
  };
  const top = element("thead");
  top.append(line(head, "th"));
  for (const cell of top.querySelectorAll("th")) cell.scope = "col";
  const body = element("tbody");
  body.append(...rows.slice(0, MOST).map((row) => line(row, "td")));
  const caption = element("caption");
  caption.append(element("span", "", rows.length > MOST ? `The first ${MOST} of ${rows.length} rows` : `${rows.length} rows`));
  table.append(caption);
  table.append(top, body);
  place.replaceChildren(table);
}

/** Draw a figure in its box, with its buttons and its table. */
async function draw(box, figure) {
  const { xaxis, yaxis, height, ...more } = figure.layout;
  const plot = box.querySelector(".plot");
  plot.style.height = `${height ?? 300}px`;
  const traces = figure.traces.map(named);
  const layout = { ...LAYOUT, ...more, xaxis: axis(xaxis), yaxis: axis(yaxis), showlegend: traces.length > 1 };
  const bars = traces.some((trace) => trace.orientation === "h");
  layout.margin = { ...LAYOUT.margin, l: leftMargin(traces), r: bars ? 48 : LAYOUT.margin.r };
  await Plotly.newPlot(plot, traces, layout, DRAWN);
  const legend = plot.querySelector(".legend .bg")?.getBBox().height ?? 0;
  if (legend > ONE_LINE) {
    // the legend gets its own height, in which no name is cut, above the plot
    plot.style.height = `${(height ?? 300) + legend - ONE_LINE}px`;
    await Plotly.Plots.resize(plot);
  }
  const file = box.dataset.figure;
  for (const form of ["png", "svg"]) {
    box.querySelector(`[data-save="${form}"]`).addEventListener("click", () => {
      Plotly.downloadImage(plot, { format: form, filename: file, width: 900, height: height ?? 500, scale: 2 });
    });
  }
  box.querySelector('[data-save="csv"]').addEventListener("click", () => {
    const text = cells(figure).map((row) => row.map(csvCell).join(",")).join("\r\n");
    save(`${file}.csv`, new Blob([text], { type: "text/csv" }));
  });
  const details = box.querySelector("details");
  details.addEventListener("toggle", () => details.open && fillTable(figure, details.querySelector(".scroll")));
  box.dataset.drawn = "";
}

async function drawFigures() {
  const figures = JSON.parse(await unpack("figures-data"));
  const all = [...document.querySelectorAll("figure[data-figure]")];
  if (!all.length) return;
  const script = document.createElement("script");
  script.textContent = await unpack("plotly-code");
  document.head.append(script);
  for (const box of all) {
    const folded = box.closest("details.folded");
    if (folded && !folded.open) folded.addEventListener("toggle", () => draw(box, figures[box.dataset.figure]), { once: true });
    else await draw(box, figures[box.dataset.figure]);
    await new Promise((resolve) => setTimeout(resolve)); // keeps the page responsive
  }
}

const fit = (width) => {
  if (!window.Plotly) return;
  for (const plot of document.querySelectorAll("figure[data-drawn] .plot")) {
    Plotly.relayout(plot, width ? { width, autosize: false } : { width: null, autosize: true });
  }
};
matchMedia("print").addEventListener("change", (event) => fit(event.matches ? 320 : 0));
drawFigures().then(() => { document.documentElement.dataset.figures = "drawn"; });
