"""The figures of a report: what Plotly draws, and the same in words for those who cannot see it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import Any

from .. import tables
from ..base.files import Row
from ..data.study import Study
from ..metrics.metric import Column
from ..running.sweep_results import LOSS, on_front

Trace = dict[str, Any]
# Okabe and Ito's, which the colour-blind can distinguish too; a line's dash and a point's symbol say it again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
PATTERNS = ("", "/", "x", ".", "-", "|")
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
    note = f"Curves of more steps are drawn as at most {MOST_POINTS:,} means."
    step = _axis("optimizer step", rangemode="tozero")
    yield Figure("loss", "Loss", [curve for curve in losses if curve["x"]], step, _axis("loss"), note)
    cpu = "Of the training process; 100 % is one processor."
    speed = "Padding, evaluation and saving are not counted."
    rate = _axis("learning rate", exponentformat="e", rangemode="tozero")
    panels = [
        ("rate", "Learning rate", "learning_rate", rate, ""),  # from 0 on, as a constant one has no range of its own
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
    kinds = dict.fromkeys(row["memory_kind"] for row in runs if row["peak_memory_gib"] is not None)
    on_cpu = "resident memory of the process, on the CPU"
    measured = f"measured: {', '.join(on_cpu if kind == 'resident' else kind for kind in kinds)}"
    traces = []
    for i, (name, key) in enumerate(
        {measured: "peak_memory_gib", "planned: for a GPU, reserved and CUDA's own": "planned_gib"}.items()
    ):
        if known := [(row["member"], row[key]) for row in runs if row[key] is not None]:
            traces.append(_bars(name, known, i, [f"{gib:.2f}" for _, gib in known]))
    note = ""
    if len(traces) > 1:
        on_gpu = "The plan counts 0.14 GiB for CUDA itself, which the measured figure does not include."
        other = "These are different kinds of memory, so one does not check the other: a plan is for a GPU."
        note = other if "resident" in kinds else on_gpu
    layout = {"height": 130 + 34 * len(traces) * len(runs), "barmode": "group"}
    x = _axis("GiB", rangemode="tozero")
    return Figure("memory", "Memory at the peak", traces, x, _categories(), note, layout) if traces else None


def sweep(rows: Sequence[Row]) -> Figure | None:
    """The members of a sweep by their eval loss and memory, those on the Pareto front set apart."""
    kinds = {row["memory_kind"] for row in rows if row["memory_kind"]}
    x, y = _axis(f"peak GiB ({', '.join(sorted(kinds))})"), _axis("Validation loss (lower is better)")
    traces = _against(rows, "peak_memory_gib")
    title = "Validation loss against memory"
    return Figure(f"sweep-memory-{LOSS}", title, traces, x, y, _FRONT) if traces else None


_FRONT = (
    "A filled diamond is on the Pareto front: no other member is better in one of the two and as good in the other."
)


def _against(rows: Sequence[Row], x: str) -> list[Trace]:
    """Members by a cost and their eval loss, with those on the Pareto front of the two set apart."""
    y = LOSS
    known = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    points = {(row[x], row[y], row["member"]): on_front(row, known, x) for row in known}
    front = sorted(point for point, is_on_front in points.items() if is_on_front)
    others = [point for point, is_on_front in points.items() if not is_on_front]
    line = {"dash": "dot", "color": COLOURS[2], "width": 1.5}
    traces = [_points("on the Pareto front", front, 2, symbol="diamond") | {"mode": "lines+markers+text", "line": line}]
    furthest = max((cost for cost, _, _ in points), default=None)
    beside = ["middle left" if cost == furthest else "middle right" for cost, _, _ in others]
    traces.append(_points("not on it", others, 1, symbol="circle-open") | {"textposition": beside})
    return [trace for trace in traces if trace["x"]]


def study(of_study: Study, rows: Sequence[Row], column: Column) -> Figure | None:
    """A score of `verdict.rows` with its interval beside the published one and its ±."""
    name = column.name
    ours = [row for row in rows if row[name] is not None]
    if not ours:
        return None
    short = {row["recipe"]: row["recipe"].removeprefix(f"{of_study.folder.name}/") for row in rows}
    within = [None if row[f"{name}_low"] is None else (row[f"{name}_low"], row[f"{name}_high"]) for row in ours]
    points = [(row[name], short[row["recipe"]]) for row in ours]
    errors = _interval([value for value, _ in points], within)
    marker = _style(0)["marker"] | {"size": 11}
    traces = [_scatter("ours, with its 95 % interval", "markers", points, marker=marker, error_x=errors)]
    if known := [row for row in rows if row[f"{name}_published"] is not None]:
        published = [(row[f"{name}_published"], short[row["recipe"]]) for row in known]
        spreads = [(row[f"{name}_published"], row[f"{name}_spread"]) for row in known]
        spread = [None if margin is None else (value - margin, value + margin) for value, margin in spreads]
        marker = {"color": COLOURS[1], "symbol": "diamond-open", "size": 12, "line": {"width": 2}}
        more = {"error_x": _interval([value for value, _ in published], spread)} if any(spread) else {}
        title = "published, with its ±" if any(spread) else "published"
        traces.append(_scatter(title, "markers", published, marker=marker, **more))
    says = "; ".join(
        f"{short[row['recipe']]} {tables.text_of(row[name])}, published {tables.text_of(row[f'{name}_published'])}"
        for row in rows
    )
    layout = {"height": 220 + 34 * len(rows)}
    return Figure(
        f"study-{name}",
        f"{column.label} of the study's recipes",
        traces,
        _axis(column.label),
        _categories(),
        "",
        layout,
        says,
    )
