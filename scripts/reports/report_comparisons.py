"""Figures that compare runs: the members of a sweep, and a study's scores beside the published ones."""

from collections.abc import Iterator, Sequence

from ..base.files import Row
from ..running import sweeps
from ..scores.metrics import PER_ROW
from ..terminal import tables
from .report_figures import (
    COLOURS,
    DASHES,
    GREY,
    Figure,
    Trace,
    _axis,
    _categories,
    _interval,
    _log,
    _points,
    _scatter,
    _style,
)


def sweep(rows: Sequence[Row]) -> Iterator[Figure]:
    """The trade-offs of a sweep's members: quality over memory and over the trainable share, and each score with its
    interval. What no member has is left out."""
    kinds = {row["memory_kind"] for row in rows if row["memory_kind"]}
    peak = _axis(f"peak GiB ({', '.join(sorted(kinds))})")
    share = _log("trainable parameters, % of all")
    qualities = {"eval_loss": "Validation loss (lower is better)"} | {
        name: f"{metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)"
        for name, metric in PER_ROW.items()
    }
    with_percent = [row | {"percent": _percent(row)} for row in rows]
    for score in ("eval_loss", "bleu4"):
        for key, cost, title, x in (
            ("memory", "peak_memory_gib", "memory", peak),
            ("share", "percent", "what is trained", share),
        ):
            if against := _against(with_percent, cost, score):
                title = f"{qualities[score].partition(' (')[0]} against {title}"
                yield Figure(f"sweep-{key}-{score}", title, against, x, _axis(qualities[score]), _FRONT)
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


def _against(rows: Sequence[Row], x: str, y: str) -> list[Trace]:
    """Members by a cost and a quality, with those on the Pareto front of the two set apart."""
    known = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    points = {(row[x], row[y], row["member"]): sweeps.on_front(row, known, x, y) for row in known}
    front = sorted(point for point, is_on_front in points.items() if is_on_front)
    others = [point for point, is_on_front in points.items() if not is_on_front]
    line = {"dash": "dot", "color": COLOURS[2], "width": 1.5}
    traces = [_points("on the Pareto front", front, 2, symbol="diamond") | {"mode": "lines+markers+text", "line": line}]
    furthest = max((cost for cost, _, _ in points), default=None)
    beside = ["middle left" if cost == furthest else "middle right" for cost, _, _ in others]
    traces.append(_points("not on it", others, 1, symbol="circle-open") | {"textposition": beside})
    return [trace for trace in traces if trace["x"]]


def study(rows: Sequence[Row], baselines: Sequence[Row]) -> Figure | None:
    """BLEU-4 of `verdict.rows` with its interval beside the published score; baselines as lines."""
    ours = [row for row in rows if row["bleu4"] is not None]
    if not ours:
        return None
    points = [(row["bleu4"], row["recipe"]) for row in ours]
    within = [None if row["bleu4_low"] is None else (row["bleu4_low"], row["bleu4_high"]) for row in ours]
    errors = _interval([bleu4 for bleu4, _ in points], within)
    marker = _style(0)["marker"] | {"size": 11}
    traces = [_scatter("ours, with its 95 % interval", "markers", points, marker=marker, error_x=errors)]
    if published := [(row["bleu4_published"], row["recipe"]) for row in rows if row["bleu4_published"] is not None]:
        marker = {"color": COLOURS[1], "symbol": "diamond-open", "size": 12, "line": {"width": 2}}
        traces.append(_scatter("published", "markers", published, marker=marker))
        for i, baseline in enumerate(baselines):
            line = {"color": GREY, "dash": DASHES[2 + i % 2], "width": 2}
            ends = [(baseline["BLEU-4"], row["recipe"]) for row in (rows[0], rows[-1])]
            traces.append(_scatter(baseline["baseline"], "lines", ends, line=line))
    says = "; ".join(
        f"{row['recipe']} {tables.text_of(row['bleu4'])}, published {tables.text_of(row['bleu4_published'])}"
        for row in rows
    )
    layout = {"height": 220 + 34 * len(rows)}
    values = [x for trace in traces for x in trace["x"]] + [end for interval in within for end in interval or ()]
    room = 0.05 * (max(values) - min(values)) or 1.0
    x = _axis("BLEU-4", range=[min(values) - room, max(values) + room])  # a line alone would lie on the frame
    return Figure("study-bleu4", "BLEU-4 of the study's recipes", traces, x, _categories(), "", layout, says)
