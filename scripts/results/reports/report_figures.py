"""Figures of a report, for Plotly."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from typing import Any

from ...base.files import Row
from ...data.studies import Study
from ...metrics.metric import Column
from ..sweep_results import LOSS, SweepRow
from ..verdict import StudyRow

Trace = dict[str, Any]  # Plotly's JSON
# Palette of Okabe and Ito, safe for colour-blind readers. Dashes and symbols also tell runs apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
FEW_POINTS = 50  # in a line with fewer, each point has a marker, so that one line does not hide another
MOST_POINTS = 1000  # maximum number of points in a line; more are indistinguishable and slow to draw


@dataclass
class Figure:
    """Figure of a report.

    Attributes:
        key: id in the page.
        title: title of the figure.
        y: Plotly y axis.
        x: Plotly x axis; by default steps.
        traces: Plotly traces; those without points are left out.
        note: note for readers.
        layout: other keys of the Plotly layout.
        folded: True for a figure that is drawn only when a reader unfolds it.
    """

    key: str
    title: str
    y: Trace
    x: Trace = field(default_factory=lambda: _axis("optimizer step", rangemode="tozero"))
    traces: list[Trace] = field(default_factory=list)
    note: str = ""
    layout: Trace = field(default_factory=dict)
    folded: bool = False

    def __post_init__(self) -> None:
        self.traces = [trace for trace in self.traces if trace["x"]]

    def as_json(self) -> Trace:
        """Figure as JSON for the page."""
        return {"title": self.title, "traces": self.traces, "layout": {"xaxis": self.x, "yaxis": self.y} | self.layout}


def _axis(title: str, **more: Any) -> Trace:
    return {"title": {"text": title}, **more}


def _style(i: int) -> Trace:
    """Style of lines and points for run number i."""
    colour = COLOURS[i % len(COLOURS)]
    turn = i + i // len(COLOURS)
    line = {"color": colour, "dash": DASHES[turn % len(DASHES)], "width": 2}
    marker = {"color": colour, "symbol": SYMBOLS[turn % len(SYMBOLS)], "size": 8}
    return {"line": line, "marker": marker}


def _scatter(name: str, mode: str, points: Sequence[tuple[Any, Any]], **more: Any) -> Trace:
    """Trace of points or lines through (x, y)."""
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    return {"type": "scatter", "mode": mode, "name": name, "x": xs, "y": ys, **more}


def _points(
    name: str, rows: Sequence[tuple[float, float, str]], i: int, symbol: str, mode: str = "markers+text", **more: Any
) -> Trace:
    """Trace of named points; names are placed alternately above and below their points."""
    positions = ["top center", "bottom center"] * len(rows)
    more |= {"text": [text for _, _, text in rows], "textposition": positions[: len(rows)], "cliponaxis": False}
    more["marker"] = {"color": COLOURS[i], "symbol": symbol, "size": 11}
    return _scatter(name, mode, [(x, y) for x, y, _ in rows], **more)


def _curve(name: str, metrics: Sequence[Row], key: str, i: int, points: bool = False) -> Trace:
    """Line of a value by step; many steps are averaged in groups, each drawn at its mean step."""
    values = [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
    means = []
    for group in batched(values, max(-(-len(values) // MOST_POINTS), 1)):
        steps, numbers = zip(*group, strict=True)
        means.append((statistics.mean(steps), float(f"{statistics.mean(numbers):.6g}")))
    mode = "lines"
    if points or len(means) < FEW_POINTS:
        mode = "lines+markers"
    style = _style(i)
    style["marker"]["symbol"] += "-open"  # which hides no point below
    return _scatter(name, mode, means, cliponaxis=False, **style)


_RATE = _axis("learning rate", exponentformat="e", rangemode="tozero")  # starts at 0: a constant rate has no range
_GPU, _CPU = _axis("%", range=[0, 105]), _axis("%", rangemode="tozero")
_NORM, _SPEED = _axis("L2 norm", rangemode="tozero"), _axis("tokens per second", rangemode="tozero")
_CPU_NOTE = "Load of the training process; 100 % means one fully used core."
_SPEED_NOTE = "Without padding tokens, evaluation and saving."
_MEANS_NOTE = f"If there are more than {MOST_POINTS:,} steps, each point is the mean of several."
_PANELS = {
    "learning_rate": Figure("rate", "Learning rate", _RATE),
    "gpu_utilization": Figure("gpu", "GPU utilization", _GPU),
    "cpu_percent": Figure("cpu", "CPU load", _CPU, note=_CPU_NOTE, folded=True),
    "grad_norm": Figure("norm", "Gradient norm", _NORM),
    "tokens_per_second": Figure("speed", "Throughput", _SPEED, note=_SPEED_NOTE),
}
"""Figures of values in metrics.jsonl, without their curves."""


_REWARD_NOTE = "Of preference pairs; training: means over micro batches, validation: over all pairs."
_REWARDS = {
    "reward_accuracy": Figure("accuracy", "Reward accuracy", _axis("share", range=[0, 1.05]), note=_REWARD_NOTE),
    "reward_margin": Figure("margin", "Reward margin", _axis("chosen minus rejected"), note=_REWARD_NOTE),
}
"""Figures of values in metrics.jsonl that validation has, too; without their curves."""


def training_figures(runs: dict[str, list[Row]]) -> Iterator[Figure]:
    """Figures of losses, rewards, rate, load, gradient norm and throughput; without points for an unknown value."""
    yield Figure("loss", "Loss", _axis("loss"), traces=[*_loss_curves(runs)], note=_MEANS_NOTE)
    for key, panel in _REWARDS.items():
        yield replace(panel, traces=[*_reward_curves(runs, key)])
    steps = {name: [record for record in metrics if "loss" in record] for name, metrics in runs.items()}
    for key, panel in _PANELS.items():
        yield replace(panel, traces=[_curve(name, metrics, key, i) for i, (name, metrics) in enumerate(steps.items())])


def _loss_curves(runs: dict[str, list[Row]]) -> Iterator[Trace]:
    """Losses of training and validation."""
    for i, (name, metrics) in enumerate(runs.items()):
        yield _curve(f"{name}, training", metrics, "loss", i)
        title, key = "validation, by Axolotl", "eval_loss"
        if any("eval_loss_per_token" in record for record in metrics):
            title, key = "validation", "eval_loss_per_token"
        yield _curve(f"{name}, {title}", metrics, key, i + len(runs), points=True)


def _reward_curves(runs: dict[str, list[Row]], key: str) -> Iterator[Trace]:
    """Values of training and validation."""
    for i, (name, metrics) in enumerate(runs.items()):
        yield _curve(f"{name}, training", metrics, key, i)
        yield _curve(f"{name}, validation", metrics, f"eval_{key}", i + len(runs), points=True)


_FRONT = (
    "Filled diamonds form the Pareto front: no other trial is better in one value and at least as good in the other."
)


def sweep_figure(rows: Sequence[SweepRow]) -> Figure:
    """Figure of a sweep's trials by eval loss and memory, with the Pareto front; without points for one value."""
    front: list[tuple[float, float, str]] = []
    dominated: list[tuple[float, float, str]] = []
    for row in rows:
        if row.costs:
            points = front if row.pareto else dominated
            points.append((*row.costs, row.trial.name))
    line = {"dash": "dot", "color": COLOURS[2], "width": 1.5}
    traces = [
        _points("on the Pareto front", sorted(front), 2, symbol="diamond", mode="lines+markers+text", line=line),
        _points("not on the front", dominated, 1, symbol="circle-open"),
    ]
    kinds = sorted({row.summary.memory_kind for row in rows if row.summary.memory_kind})
    x, y = _axis(f"peak GiB ({', '.join(kinds)})"), _axis("Validation loss (lower is better)")
    note = _FRONT if front else ""
    return Figure(f"sweep-memory-{LOSS}", "Validation loss against memory", y, x, traces, note)


def study_figures(study: Study, rows: Sequence[StudyRow]) -> Iterator[Figure]:
    """Figures of a study's scores, one for each metric with a score."""
    for column in study.table.values():
        if any(row.scores[column.name].value is not None for row in rows):
            yield _metric_figure(study, rows, column)


@dataclass
class _Bar:
    """Score of a recipe, with the lengths of its error bar to both sides."""

    recipe: str
    value: float
    below: float = 0
    above: float = 0


def _metric_figure(study: Study, rows: Sequence[StudyRow], column: Column) -> Figure:
    """Figure of a study's scores by one metric, with intervals, beside published scores."""
    ours, published = [], []
    for row in rows:
        recipe, score = row.recipe.removeprefix(f"{study.folder.name}/"), row.scores[column.name]
        if score.value is not None:
            bar = _Bar(recipe, score.value)
            if score.interval:
                bar.below, bar.above = score.value - score.interval.low, score.interval.high - score.value
            ours.append(bar)
        if score.published:
            spread = float(score.published.spread or 0)
            published.append(_Bar(recipe, float(score.published.value), spread, spread))
    marker = {"color": COLOURS[1], "symbol": "diamond-open", "size": 12, "line": {"width": 2}}
    traces = [
        _bars("ours, with its 95 % interval", ours, _style(0)["marker"] | {"size": 11}),
        _bars("published, with its ± if known", published, marker),
    ]
    recipes = {"autorange": "reversed", "type": "category"}
    layout = {"height": 220 + 34 * len(rows)}
    title = f"{column.label} of the study's recipes"
    return Figure(f"study-{column.name}", title, recipes, _axis(column.label), traces, layout=layout)


def _bars(name: str, bars: Sequence[_Bar], marker: Trace) -> Trace:
    """Trace of scores with error bars; charts.js reads the lengths to both sides."""
    errors = {"type": "data", "symmetric": False, "thickness": 1.5}
    errors |= {"array": [bar.above for bar in bars], "arrayminus": [bar.below for bar in bars]}
    return _scatter(name, "markers", [(bar.value, bar.recipe) for bar in bars], marker=marker, error_x=errors)
