"""Figures that compare runs: the members of a sweep, and a study's scores beside the published ones."""

from collections.abc import Iterator, Sequence

from ..base.files import Row
from ..data.study import Study
from ..metrics.metric import Column
from ..results import curves
from ..results.ladder import RUNGS
from ..running import sweeps
from ..terminal import tables
from .report_figures import (
    COLOURS,
    DASHES,
    GREY,
    Figure,
    Trace,
    _axis,
    _categories,
    _curve,
    _interval,
    _log,
    _points,
    _scatter,
    _style,
)


def sweep(rows: Sequence[Row], scored: sweeps.Columns) -> Iterator[Figure]:
    """The trade-offs of a sweep's members: the loss over memory and over the trainable share, and each score with its
    interval. What no member has is left out."""
    kinds = {row["memory_kind"] for row in rows if row["memory_kind"]}
    peak = _axis(f"peak GiB ({', '.join(sorted(kinds))})")
    share = _log("trainable parameters, % of all")
    qualities = {name: f"{column.label} ({column.direction})" for name, column in scored.items()}
    qualities = {sweeps.LOSS: "Validation loss (lower is better)"} | qualities
    with_percent = [row | {"percent": _percent(row)} for row in rows]
    for key, cost, title, x in (
        ("memory", "peak_memory_gib", "memory", peak),
        ("share", "percent", "what is trained", share),
    ):
        if against := _against(with_percent, cost):
            title = f"Validation loss against {title}"
            yield Figure(f"sweep-{key}-{sweeps.LOSS}", title, against, x, _axis(qualities[sweeps.LOSS]), _FRONT)
    for score, title in qualities.items():
        if measured := [row for row in rows if row.get(score) is not None]:
            points = [(row[score], row["member"]) for row in measured]
            within = [row.get(f"{score}_interval") for row in measured]
            errors = _interval([value for value, _ in points], within)
            marker = _style(0)["marker"] | {"size": 11}
            trace = _scatter(title, "markers", points, marker=marker, error_x=errors, cliponaxis=False)
            says = ", ".join(f"{member} {tables.text_of(value)}" for value, member in points)
            note = "" if any(within) else "No intervals: they need seeds, or rows that were evaluated."
            layout = {"height": 140 + 32 * len(measured)}
            yield Figure(f"sweep-{score}", title, [trace], _axis(title), _categories(), note, layout, says)


_FRONT = (
    "A filled diamond is on the Pareto front: no other member is better in one of the two and as good in the other."
)


def _percent(row: Row) -> float | None:
    return None if row["trainable_share"] is None else 100 * row["trainable_share"]


def _against(rows: Sequence[Row], x: str) -> list[Trace]:
    """Members by a cost and their eval loss, with those on the Pareto front of the two set apart."""
    y = sweeps.LOSS
    known = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    points = {(row[x], row[y], row["member"]): sweeps.on_front(row, known, x) for row in known}
    front = sorted(point for point, is_on_front in points.items() if is_on_front)
    others = [point for point, is_on_front in points.items() if not is_on_front]
    line = {"dash": "dot", "color": COLOURS[2], "width": 1.5}
    traces = [_points("on the Pareto front", front, 2, symbol="diamond") | {"mode": "lines+markers+text", "line": line}]
    furthest = max((cost for cost, _, _ in points), default=None)
    beside = ["middle left" if cost == furthest else "middle right" for cost, _, _ in others]
    traces.append(_points("not on it", others, 1, symbol="circle-open") | {"textposition": beside})
    return [trace for trace in traces if trace["x"]]


def study(of_study: Study, rows: Sequence[Row], column: Column, with_baselines: bool) -> Figure | None:
    """A score of `verdict.rows` with its interval beside the published one and its ±; baselines as lines."""
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
        spread = [_around(row[f"{name}_published"], row[f"{name}_spread"]) for row in known]
        marker = {"color": COLOURS[1], "symbol": "diamond-open", "size": 12, "line": {"width": 2}}
        more = {"error_x": _interval([value for value, _ in published], spread)} if any(spread) else {}
        title = "published, with its ±" if any(spread) else "published"
        traces.append(_scatter(title, "markers", published, marker=marker, **more))
        within = [*within, *spread]
        for i, baseline in enumerate(of_study.compared if with_baselines else ()):
            if name in baseline.scores:
                line = {"color": GREY, "dash": DASHES[2 + i % 2], "width": 2}
                ends = [(baseline.scores[name].value, short[row["recipe"]]) for row in (rows[0], rows[-1])]
                traces.append(_scatter(baseline.name, "lines", ends, line=line))
    says = "; ".join(
        f"{short[row['recipe']]} {tables.text_of(row[name])}, published {tables.text_of(row[f'{name}_published'])}"
        for row in rows
    )
    layout = {"height": 220 + 34 * len(rows)}
    values = [x for trace in traces for x in trace["x"]] + [end for interval in within for end in interval or ()]
    room = 0.05 * (max(values) - min(values)) or 1.0
    x = _axis(column.label, range=[min(values) - room, max(values) + room])  # a line alone would lie on the frame
    return Figure(f"study-{name}", f"{column.label} of the study's recipes", traces, x, _categories(), "", layout, says)


def ladder(of_study: Study, rows: Sequence[Row], column: Column) -> Figure | None:
    """A score of `ladder.rows` from the published one at the top down to our training, a line for each recipe and
    baseline: where a line bends is where a difference begins."""
    name = column.name
    drawn = [row for row in rows if row[name] is not None]
    traces = []
    for i, owner in enumerate(dict.fromkeys(row["of"] for row in drawn)):
        of_owner = [row for row in drawn if row["of"] == owner]
        own = [row for row in of_owner if row["test_set"] in (None, of_owner[0]["test_set"])]
        within = [None if row[f"{name}_low"] is None else (row[f"{name}_low"], row[f"{name}_high"]) for row in own]
        points = [(row[name], row["rung"]) for row in own]
        errors = _interval([value for value, _ in points], within)
        label = owner.removeprefix(f"{of_study.folder.name}/")
        traces.append(_scatter(label, "lines+markers", points, error_x=errors, **_style(i)))
    says = "; ".join(f"{row['of']}, {row['rung']}: {tables.text_of(row[name])}" for row in drawn)
    order = [rung for rung in RUNGS if any(rung == row["rung"] for row in drawn)]
    y = _categories() | {"categoryorder": "array", "categoryarray": order, "autorange": "reversed"}
    title = f"{column.label}, from the published score down to our training"
    note = "Where a line bends sideways, a difference begins: in scoring, in generation, or in training."
    layout = {"height": 200 + 60 * len(order)}
    return Figure(f"ladder-{name}", title, traces, _axis(column.label), y, note, layout, says) if traces else None


def curve(number: int, name: str, metrics: Sequence[Row], published: Sequence[curves.Point]) -> Figure:
    """A run's training loss over the published curve of what it tries for."""
    theirs = {"color": COLOURS[1], "dash": DASHES[1], "width": 3}
    ours = curves.over_the_same_steps(metrics, published)
    traces = [
        _curve(f"{name}, step by step", metrics, "loss", 0) | {"line": {"color": GREY, "width": 1}},
        _scatter(
            "published", "lines+markers", published, line=theirs, marker={"color": COLOURS[1], "symbol": "square"}
        ),
        _scatter(f"{name}, mean over the same steps", "lines+markers", ours, **_style(0)),
    ]
    note = "A point is the mean loss of the steps since the point before."
    step, loss = _axis("optimizer step", rangemode="tozero"), _axis("training loss")
    title = f"Training loss of {name}, and the published one"
    return Figure(f"curve-{number}", title, [trace for trace in traces if trace["x"]], step, loss, note)


def _around(value: float, spread: float | None) -> tuple[float, float] | None:
    return None if spread is None else (value - spread, value + spread)
