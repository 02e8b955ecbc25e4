"""The figures of a report: what Plotly draws, and the same in words for those who cannot see it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched
from statistics import quantiles
from typing import Any

import numpy as np

from ..base.files import Row
from ..metrics.metric import Column
from ..planning import lora
from ..terminal import tables

Trace = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which the colour-blind can distinguish too; a line's dash and a point's symbol say it again."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
PATTERNS = ("", "/", "x", ".", "-", "|")
GREY = "#767676"
MOST_POINTS = 1000  # of a line; more cannot be distinguished, and are slow to draw


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
        self.says = self.says or "; ".join(map(_sentence, self.traces))

    def as_json(self) -> dict[str, Any]:
        """What the page draws it from."""
        return {"title": self.title, "traces": self.traces, "layout": {"xaxis": self.x, "yaxis": self.y} | self.layout}


def _sentence(trace: Trace) -> str:
    """A line by its ends, any other trace point by point."""
    mode = trace.get("mode", "")
    order = ("y", "x") if trace.get("orientation") == "h" else ("x", "y")
    names = trace["text"] if mode.endswith("text") else [None] * len(trace["x"])
    points = [point for point in zip(*(trace[axis] for axis in order), names, strict=True) if point[1] is not None]
    if len(points) > 1 and "lines" in mode:
        first, *_, last = points
        low, high = (tables.text_of(end(y for _, y, _ in points)) for end in (min, max))
        span = f"from {tables.text_of(first[1])} at {first[0]} to {tables.text_of(last[1])} at {last[0]}"
        return f"{trace['name']}: {span}, between {low} and {high}"
    listed = (f"{name or tables.text_of(x)} {tables.text_of(y)}" for x, y, name in points[:20])
    return f"{trace['name']}: {', '.join(listed) or 'nothing'}"


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def _log(title: str) -> dict[str, Any]:
    """An axis of percentages over several powers of ten; Plotly would leave out the zeros."""
    ticks = [float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5)]
    return _axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _categories() -> dict[str, Any]:
    return {"autorange": "reversed", "type": "category"}


def _style(i: int) -> dict[str, Any]:
    """The look of the lines and points of run number i."""
    colour = COLOURS[i % len(COLOURS)]
    turn = i + i // len(COLOURS)
    return {
        "line": {"color": colour, "dash": DASHES[turn % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": SYMBOLS[turn % len(SYMBOLS)], "size": 8},
    }


def _scatter(name: str, mode: str, points: Sequence[tuple[Any, Any]], **more: Any) -> Trace:
    """A trace of points or lines through (x, y)."""
    xs, ys = ([point[i] for point in points] for i in (0, 1))
    return {"type": "scatter", "mode": mode, "name": name, "x": xs, "y": ys, **more}


def _points(name: str, rows: Sequence[tuple[float, float, str]], i: int, **more: Any) -> Trace:
    """Points with their names beside them, alternately above and below, so that those of neighbours can be read."""
    return _scatter(
        name,
        "markers+text",
        [(x, y) for x, y, _ in rows],
        text=[text for _, _, text in rows],
        textposition=[("top center", "bottom center")[place % 2] for place in range(len(rows))],
        cliponaxis=False,
        marker=_style(i)["marker"] | {"size": 11} | more,
    )


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


def _bars(name: str, values: Sequence[tuple[str, float]], i: int, text: Sequence[str]) -> Trace:
    """Horizontal bars of (name, value) with a text beside each."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": [value for _, value in values],
        "y": [label for label, _ in values],
        "marker": {"color": COLOURS[i % len(COLOURS)], "pattern": {"shape": PATTERNS[i % len(PATTERNS)]}},
        "textposition": "outside",
        "cliponaxis": False,
        "text": text,
    }


def _curve(name: str, metrics: Sequence[Row], key: str, i: int, points: bool = False) -> Trace:
    """A value by step; where there are more than can be drawn, means over stretches of equally many steps."""
    known = [(record["step"], y) for record in metrics if (y := record.get(key)) is not None]
    stretches = batched(known, max(-(-len(known) // MOST_POINTS), 1))
    means = [(stretch[-1][0], float(f"{sum(y for _, y in stretch) / len(stretch):.6g}")) for stretch in stretches]
    return _scatter(name, "lines+markers" if points or len(means) < 2 else "lines", means, **_style(i))


def training(runs: dict[str, list[Row]]) -> Iterator[Figure]:
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
    step = _axis("optimizer step", rangemode="tozero")
    yield Figure("loss", "Loss", [curve for curve in losses if curve["x"]], step, _axis("loss"), note)
    cpu = "Of the training process; 100 % is one processor."
    speed = "Padding, evaluation and saving are not counted."
    panels = [
        ("rate", "Learning rate", "learning_rate", _axis("learning rate", exponentformat="e"), ""),
        ("load", "GPU utilization", "gpu_utilization", _axis("%", range=[0, 105]), ""),
        ("load", "CPU load", "cpu_percent", _axis("%", rangemode="tozero"), cpu),
        ("norm", "Gradient norm", "grad_norm", _axis("L2 norm", rangemode="tozero"), ""),
        ("speed", "Throughput", "tokens_per_second", _axis("tokens a second", rangemode="tozero"), speed),
    ]
    on_gpu = any("gpu_utilization" in record for metrics in runs.values() for record in metrics)
    steps = {name: [record for record in metrics if "loss" in record] for name, metrics in runs.items()}
    for key, title, metric, axis, note in panels:
        curves = [_curve(name, metrics, metric, i) for i, (name, metrics) in enumerate(steps.items())]
        drawn = [curve for curve in curves if curve["x"]]
        if drawn and not (on_gpu and metric == "cpu_percent"):
            yield Figure(key, title, drawn, step, axis, note)


def memory(runs: Sequence[Row]) -> Figure | None:
    """Planned beside measured memory of rows with member, planned_gib, peak_memory_gib and memory_kind."""
    kinds = list(dict.fromkeys(row["memory_kind"] for row in runs if row["peak_memory_gib"] is not None))
    titles = {"resident": "measured: resident memory of the process, on the CPU"}
    series = []
    for kind in kinds:
        measured = [row for row in runs if row["memory_kind"] == kind]
        series.append((titles.get(kind, f"measured: {kind}"), "peak_memory_gib", measured))
    series.append(("planned: for a GPU, reserved and CUDA's own", "planned_gib", list(runs)))
    traces = []
    for i, (name, key, rows) in enumerate(series):
        if known := [(row["member"], row[key]) for row in rows if row[key] is not None]:
            traces.append(_bars(name, known, i, [f"{gib:.2f}" for _, gib in known]))
    note = ""
    if len(traces) > 1 and "resident" in kinds:
        note = "These are different kinds of memory, so one does not check the other: a plan is for a GPU."
    elif len(traces) > 1:
        note = "The plan counts 0.14 GiB for CUDA itself, which the measured figure does not include."
    layout = {"height": 130 + 34 * len(traces) * len(runs), "barmode": "group"}
    x = _axis("GiB", rangemode="tozero")
    return Figure("memory", "Memory at the peak", traces, x, _categories(), note, layout) if traces else None


def distributions(of_columns: Sequence[tuple[str, Column, dict[str, Sequence[Row]]]]) -> Iterator[Figure]:
    """The distribution of each score over the rows of each run.

    Args:
        of_columns: for each the heading, the column, and the rows of the runs that are scored with it, by name.
    """
    for number, (heading, column, runs) in enumerate(of_columns):
        score = column.name
        columns = {
            name: values
            for name, rows in runs.items()
            if (values := [row[score] for row in rows if row.get(score) is not None])
        }
        if not columns:
            continue
        ends = min(map(min, columns.values())), max(map(max, columns.values()))
        bins = min(max(round(2 * min(map(len, columns.values())) ** 0.5), 8), 40 // min(len(columns), 2))
        traces = []
        says = []
        for i, (name, values) in enumerate(columns.items()):
            counts, edges = np.histogram(values, bins, ends)
            form: Trace = {"type": "bar", "marker": {"color": COLOURS[0]}, "width": float(edges[1] - edges[0])}
            if len(columns) > 1:
                form = {"type": "scatter", "mode": "lines", "line": _style(i)["line"] | {"shape": "hvh"}}
            middles = ((edges[:-1] + edges[1:]) / 2).round(4).tolist()
            traces.append({"name": name, "x": middles, "y": (100 * counts / len(values)).round(4).tolist(), **form})
            quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
            says.append(f"{name}: {len(values):,} rows, quartiles {', '.join(map(tables.text_of, quartiles))}")
        said = "; ".join(says)
        x = _axis(heading)
        y = _axis("% of rows", rangemode="tozero")
        key = score if all(score != other.name for _, other, _ in of_columns[:number]) else f"{score}-{number}"
        yield Figure(f"spread-{key}", f"{heading} of single rows", traces, x, y, f"{said}.", says=said)


def lora_share(rows: Sequence[Row], own: dict[str, tuple[int, float]]) -> Figure:
    """The trainable share by rank for each model and set of layers of `lora.rows`, and where runs are.

    Args:
        rows: the rows.
        own: rank and trainable share of runs by name.
    """
    traces = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for model, label in dict.fromkeys((row["model"], row["layers"]) for row in rows):
        points = [(row["rank"], 100 * row["share"]) for row in rows if (row["model"], row["layers"]) == (model, label)]
        j = ("attention", "all linear").index(label) + 1 if label in ("attention", "all linear") else 0
        style = _style(j if len(models) == 1 else models.index(model))
        style["line"]["dash"] = DASHES[j]
        name = label if len(models) == 1 else f"{model}, {label}"
        traces.append(_scatter(name, "lines+markers", points, **style))
    marker = {"color": GREY, "symbol": "star", "size": 15}
    traces += [_scatter(name, "markers", [(rank, 100 * share)], marker=marker) for name, (rank, share) in own.items()]
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
    series: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row["layer"] == "all":
            kind = ", one scale a tensor" if row["block"] == "tensor" else " + double" if row["double"] else ""
            point = (row["bits"], 100 * row["relative_error"], str(row["block"]))
            series.setdefault(f"{row['format']}{kind}", []).append(point)
    int8 = series.pop("int8", [])  # so far off that the others could not be distinguished
    traces = [
        _points(name, points, i) | {"mode": "lines+markers", "line": _style(i)["line"]}
        for i, (name, points) in enumerate(series.items())
    ]
    note = f"Of {weights}. The points of a line are blocks of 64 to 4,096 values that share a scale, the smallest at "
    note += "the right; double: the scales are quantized too."
    if int8:
        bits, errors, _ = zip(*int8, strict=True)
        note += (
            f" int8 takes {min(bits):.3g} to {max(bits):.3g} bits and loses {min(errors):.3f}% to {max(errors):.3f}%."
        )
    x = _axis("bits a parameter")
    y = _log("error, % of the weights' power")
    yield Figure("formats", "What 4 bits lose, and what they take", traces, x, y, note)
    layers = [row for row in rows if (row["format"], row["block"], row["double"]) == ("nf4", 64, True)]
    errors_by_layer = [(row["layer"], 100 * row["relative_error"]) for row in layers]
    bars = _bars("NF4", errors_by_layer, 0, [f"{row['snr_db']:.1f} dB" for row in layers])
    note = "NF4 in doubly quantized blocks of 64, as in the recipes; beside a bar its signal-to-noise ratio."
    x = _axis("error, % of the weights' power", rangemode="tozero")
    layout = {"height": 120 + 30 * len(layers)}
    yield Figure("layers", "What NF4 loses by kind of layer", [bars], x, _categories(), note, layout)
