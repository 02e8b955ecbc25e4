"""The figures of a report: what Plotly draws, and the same in words for those who cannot see it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched, product
from statistics import quantiles
from typing import Any

from ..base import tables
from ..planning import lora
from ..scores.metrics import PER_ROW

Trace = dict[str, Any]
Row = dict[str, Any]
Metrics = list[Row]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito, told apart by the colour-blind too; a line's dash and a point's form say the same again."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
PATTERNS = ("", "/", "x", ".", "-", "|")
MOST_POINTS = 1000  # of a line; more are not told apart, and slow to draw
_BINS = 8, 40  # at least and at most


@dataclass
class Figure:
    """A figure.

    Attributes:
        key: its id in the page.
        title: what it shows.
        traces: Plotly's traces.
        x: Plotly's axis.
        y: Plotly's axis.
        note: what to know about it.
        layout: more of Plotly's layout.
        says: what it shows, in a sentence.
    """

    key: str
    title: str
    traces: list[Trace]
    x: dict[str, Any]
    y: dict[str, Any]
    note: str = ""
    layout: dict[str, Any] = field(default_factory=dict)
    says: str = ""

    def __post_init__(self) -> None:
        self.says = self.says or "; ".join(map(_says, self.traces))

    def as_json(self) -> dict[str, Any]:
        """What the page draws it from."""
        return {"title": self.title, "traces": self.traces, "layout": {"xaxis": self.x, "yaxis": self.y} | self.layout}


def _says(trace: Trace) -> str:
    """A trace in words: a line by its ends, anything else point by point."""
    across = trace.get("orientation") == "h"
    xs, ys = (trace["y"], trace["x"]) if across else (trace["x"], trace["y"])
    names = trace.get("text") if trace.get("mode", "").endswith("text") else None
    known = [(x, y, names[i] if names else None) for i, (x, y) in enumerate(zip(xs, ys, strict=True)) if y is not None]
    if not known:
        return f"{trace['name']}: nothing"
    if len(known) > 1 and "lines" in trace.get("mode", ""):
        (start, first, _), (end, last, _) = known[0], known[-1]
        low, high = min(y for _, y, _ in known), max(y for _, y, _ in known)
        span = f"from {tables.text_of(first)} at {start} to {tables.text_of(last)} at {end}"
        return f"{trace['name']}: {span}, between {tables.text_of(low)} and {tables.text_of(high)}"
    points = (f"{name or tables.text_of(x)} {tables.text_of(y)}" for x, y, name in known[:20])
    return f"{trace['name']}: {', '.join(points)}"


def _style(i: int) -> dict[str, Any]:
    """How the lines and points of run number i look."""
    colour, turn = COLOURS[i % len(COLOURS)], i // len(COLOURS)
    return {
        "line": {"color": colour, "dash": DASHES[(i + turn) % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": SYMBOLS[(i + turn) % len(SYMBOLS)], "size": 8},
    }


def _curve(name: str, metrics: Metrics, key: str, i: int, points: bool = False) -> Trace:
    """A value by step; where there are more than can be drawn, means over stretches of steps of the same length."""
    known = [(record["step"], y) for record in metrics if (y := record.get(key)) is not None]
    stretches = batched(known, max(-(-len(known) // MOST_POINTS), 1))
    means = [(stretch[-1][0], sum(y for _, y in stretch) / len(stretch)) for stretch in stretches]
    mode = "lines+markers" if points or len(means) < 2 else "lines"
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [step for step, _ in means],
        "y": [float(f"{y:.6g}") for _, y in means],
        **_style(i),
    }


def training(runs: dict[str, Metrics]) -> Iterator[Figure]:
    """Losses, learning rate, load, gradient norm and throughput of runs by name, from their metrics; what no run has
    recorded is left out."""
    alone = len(runs) == 1
    losses = []
    for i, (name, metrics) in enumerate(runs.items()):
        prefix = "" if alone else f"{name}, "
        losses.append(_curve(f"{prefix}training", metrics, "loss", i))
        per_token = any("eval_loss_per_token" in record for record in metrics)
        title, key = ("validation", "eval_loss_per_token") if per_token else ("validation, by Axolotl", "eval_loss")
        losses.append(_curve(f"{prefix}{title}", metrics, key, i + alone, points=True))
    thinned = any(len(metrics) > 2 * MOST_POINTS for metrics in runs.values())
    note = f"Long curves are drawn as at most {MOST_POINTS:,} means over steps." if thinned else ""
    step = {"title": {"text": "optimizer step"}, "rangemode": "tozero"}
    yield Figure("loss", "Loss", [one for one in losses if one["x"]], step, _axis("loss"), note)

    def panel(key: str, title: str, of: str, axis: dict[str, Any], note: str = "") -> Iterator[Figure]:
        steps = {name: [one for one in metrics if "loss" in one] for name, metrics in runs.items()}
        curves = [_curve(name, metrics, of, i) for i, (name, metrics) in enumerate(steps.items())]
        if drawn := [one for one in curves if one["x"]]:
            yield Figure(key, title, drawn, step, axis, note)

    yield from panel("rate", "Learning rate", "learning_rate", _axis("learning rate", exponentformat="e"))
    gpu = any("gpu_utilization" in record for metrics in runs.values() for record in metrics)
    if gpu:
        yield from panel("load", "GPU utilization", "gpu_utilization", _axis("%", range=[0, 105]))
    else:
        about = "Of the training process; 100 % is one processor."
        yield from panel("load", "CPU load", "cpu_percent", _axis("%", rangemode="tozero"), about)
    yield from panel("norm", "Gradient norm", "grad_norm", _axis("L2 norm", rangemode="tozero"))
    speed = _axis("tokens a second", rangemode="tozero")
    yield from panel(
        "speed", "Throughput", "tokens_per_second", speed, "Padding, evaluation and saving are not counted."
    )


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def memory(runs: Sequence[Row]) -> Figure | None:
    """Planned beside measured memory of rows with member, planned_gib, peak_memory_gib and memory_kind."""
    kinds = list(dict.fromkeys(row["memory_kind"] for row in runs if row["peak_memory_gib"] is not None))
    named = {"resident": "measured: resident memory of the process, on the CPU"}
    bars = {}
    for kind in kinds:
        measured = [(row["member"], row["peak_memory_gib"]) for row in runs if row["memory_kind"] == kind]
        bars[named.get(kind, f"measured: {kind}")] = measured
    bars["planned: for a GPU, reserved and CUDA's own"] = [(row["member"], row["planned_gib"]) for row in runs]
    traces = []
    for i, (name, values) in enumerate(bars.items()):
        if known := [(member, gib) for member, gib in values if gib is not None]:
            traces.append(_bars(name, known, i) | {"text": [f"{gib:.2f}" for _, gib in known]})
    note = ""
    if len(traces) > 1 and "resident" in kinds:
        note = "These are different kinds of memory, so one does not check the other: a plan is for a GPU."
    elif len(traces) > 1:
        note = "The plan counts 0.14 GiB for CUDA itself, which the measured figure does not hold."
    height = {"height": 130 + 34 * len(traces) * len(runs), "barmode": "group"}
    x = _axis("GiB", rangemode="tozero")
    return Figure("memory", "Memory at the peak", traces, x, _categories(), note, height) if traces else None


def _bars(name: str, values: Sequence[tuple[str, float]], i: int) -> Trace:
    marker = {"color": COLOURS[i % len(COLOURS)], "pattern": {"shape": PATTERNS[i % len(PATTERNS)]}}
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": [value for _, value in values],
        "y": [label for label, _ in values],
        "marker": marker,
        "textposition": "outside",
        "cliponaxis": False,
    }


def _log(title: str) -> dict[str, Any]:
    """An axis of percentages over several powers of ten; Plotly would leave out the zeros."""
    ticks = [float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5)]
    return _axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _categories() -> dict[str, Any]:
    return {"autorange": "reversed", "type": "category"}


def distributions(runs: dict[str, Sequence[Row]]) -> Iterator[Figure]:
    """How the rows of each run spread over each score."""
    for score, metric in PER_ROW.items():
        values = {name: [row[score] for row in rows if row.get(score) is not None] for name, rows in runs.items()}
        values = {name: found for name, found in values.items() if found}
        if not values:
            continue
        low, high = min(map(min, values.values())), max(map(max, values.values()))
        bins = min(max(round(2 * min(map(len, values.values())) ** 0.5), _BINS[0]), _BINS[1] // min(len(values), 2))
        width = (high - low) / bins or 1.0
        traces, says = [], []
        for i, (name, found) in enumerate(values.items()):
            counts = [0] * bins
            for value in found:
                counts[min(int((value - low) / width), bins - 1)] += 1
            middles = [round(low + (bin_ + 0.5) * width, 4) for bin_ in range(bins)]
            shares = [round(100 * count / len(found), 4) for count in counts]
            form: Trace = {"type": "bar", "marker": {"color": COLOURS[0]}, "width": width}
            if len(values) > 1:
                form = {"type": "scatter", "mode": "lines", "line": _style(i)["line"] | {"shape": "hvh"}}
            traces.append({"name": name, "x": middles, "y": shares, **form})
            says.append(f"{name}: {len(found):,} rows, quartiles {', '.join(map(tables.text_of, _quartiles(found)))}")
        title = f"{metric.label} of single rows"
        y = _axis("% of rows", rangemode="tozero")
        said = "; ".join(says)
        yield Figure(f"spread-{score}", title, traces, _axis(metric.label), y, f"{said}.", says=said)


def _quartiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def _points(name: str, rows: Sequence[tuple[float, float, str]], i: int, **more: Any) -> Trace:
    """Points with their names beside them, in turn above and below, so that those of neighbours can be read."""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": [x for x, _, _ in rows],
        "y": [y for _, y, _ in rows],
        "text": [text for _, _, text in rows],
        "textposition": [("top center", "bottom center")[place % 2] for place in range(len(rows))],
        "cliponaxis": False,
        "marker": _style(i)["marker"] | {"size": 11} | more,
    }


def _interval(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> dict[str, Any]:
    """Plotly's error bars from intervals; none where one is not known."""
    pairs = list(zip(values, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [within[1] - value if within else 0 for value, within in pairs],
        "arrayminus": [value - within[0] if within else 0 for value, within in pairs],
        "thickness": 1.5,
    }


def lora_share(rows: Sequence[Row], own: dict[str, tuple[int, float]]) -> Figure:
    """The trainable share by rank for each model and set of layers of `lora.rows`, and where runs are.

    Args:
        rows: the rows.
        own: by a run's name its rank and trainable share.
    """
    traces = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for (i, model), (j, label) in product(enumerate(models), enumerate(lora.TARGETS)):
        of_line = [row for row in rows if (row["model"], row["layers"]) == (model, label)]
        xs, ys = [row["rank"] for row in of_line], [100 * row["share"] for row in of_line]
        name = label if len(models) == 1 else f"{model}, {label}"
        style = _style(j if len(models) == 1 else i)
        style["line"]["dash"] = DASHES[j]
        traces.append({"type": "scatter", "mode": "lines+markers", "name": name, "x": xs, "y": ys, **style})
    for name, (rank, share) in own.items():
        marker = {"color": "#767676", "symbol": "star", "size": 15}
        point = {"x": [rank], "y": [100 * share], "marker": marker}
        traces.append({"type": "scatter", "mode": "markers", "name": name, **point})
    x = _axis("rank", type="log", tickvals=list(lora.RANKS), ticktext=list(map(str, lora.RANKS)))
    y = _log("trainable, % of all parameters")
    title = f"What LoRA trains of {models[0] if len(models) == 1 else 'these models'}"
    return Figure("lora", title, traces, x, y, "Counted from the model's sizes; q, v and so on are the layers.")


def quantization(rows: Sequence[Row], weights: str) -> Iterator[Figure]:
    """What the formats of `quantization.measure` lose, by the bits that they take, and NF4 by kind of layer.

    Args:
        rows: the rows.
        weights: whose they are.
    """
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row["layer"] == "all":
            name = f"{row['format']}{' + double' if row['double'] else ''}"
            name = f"{row['format']}, one scale a tensor" if row["block"] == "tensor" else name
            series.setdefault(name, []).append(row)
    eight = series.pop("int8", [])  # so far off that the others could not be told apart
    traces = []
    for i, (name, found) in enumerate(series.items()):
        points = [(row["bits"], 100 * row["relative_error"], str(row["block"])) for row in found]
        traces.append(_points(name, points, i) | {"mode": "lines+markers", "line": _style(i)["line"]})
    x, y = _axis("bits a parameter"), _log("error, % of the weights' power")
    note = (
        f"Of {weights}. The points of a line are blocks of 64 to 4,096 values that share a scale, the smallest at the "
    )
    note += "right; double: the scales are quantized too."
    if eight:
        bits, errors = ([row[key] for row in eight] for key in ("bits", "relative_error"))
        note += f" int8 takes {min(bits):.3g} to {max(bits):.3g} bits and loses {min(errors):.3%} to {max(errors):.3%}."
    yield Figure("formats", "What 4 bits lose, and what they take", traces, x, y, note)
    layers = [row for row in rows if (row["format"], row["block"], row["double"]) == ("nf4", 64, True)]
    bars = _bars("NF4", [(row["layer"], 100 * row["relative_error"]) for row in layers], 0)
    bars |= {"text": [f"{row['snr_db']:.1f} dB" for row in layers]}
    note = "NF4 in doubly quantized blocks of 64, as the recipes have it; beside a bar its signal to noise."
    size = {"height": 120 + 30 * len(layers)}
    x = _axis("error, % of the weights' power", rangemode="tozero")
    yield Figure("layers", "What NF4 loses by kind of layer", [bars], x, _categories(), note, size)
