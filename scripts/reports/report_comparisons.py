"""Figures that compare runs: the members of a sweep, and a study's scores beside the published ones."""

from collections.abc import Iterator, Sequence

from ..base import tables
from ..running import sweeps
from .report_figures import (
    COLOURS,
    DASHES,
    Figure,
    Row,
    Trace,
    _axis,
    _categories,
    _interval,
    _log,
    _points,
    _style,
)
from .report_runs import SCORES


def sweep(rows: Sequence[Row]) -> Iterator[Figure]:
    """The trade-offs of a sweep's members: quality over memory and over the trainable share, and each score with its
    interval. What no member has is left out."""
    kinds = {row["memory_kind"] for row in rows if row["memory_kind"]}
    peak = _axis(f"peak GiB ({', '.join(sorted(kinds))})")
    share = _log("trainable parameters, % of all")
    quality = {"eval_loss": "validation loss (lower is better)"} | {
        name: f"{title} (higher is better)" for name, title in SCORES.items()
    }
    for score in ("eval_loss", "bleu4"):
        y = _axis(quality[score])
        name = quality[score].partition(" (")[0]
        title = name[0].upper() + name[1:]
        against = _against(rows, "peak_memory_gib", score)
        if against:
            yield Figure(f"sweep-memory-{score}", f"{title} against memory", against, peak, y, _FRONT)
        against = _against([row | {"percent": _percent(row)} for row in rows], "percent", score)
        if against:
            yield Figure(f"sweep-share-{score}", f"{title} against what is trained", against, share, y, _FRONT)
    for score, title in quality.items():
        known = [row for row in rows if row.get(score) is not None]
        if not known:
            continue
        values, within = [row[score] for row in known], [row.get(f"{score}_interval") for row in known]
        trace = _points(title, [(row[score], row["member"], "") for row in known], 0)
        trace |= {"mode": "markers", "error_x": _interval(values, within)}
        del trace["text"]
        says = ", ".join(f"{row['member']} {tables.text_of(row[score])}" for row in known)
        note = "" if any(within) else "No intervals: they need seeds, or rows that were evaluated."
        size = {"height": 140 + 32 * len(known)}
        yield Figure(
            f"sweep-{score}", title[0].upper() + title[1:], [trace], _axis(title), _categories(), note, size, says
        )


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
    within = [None if row["bleu4_low"] is None else (row["bleu4_low"], row["bleu4_high"]) for row in ours]
    measured = {
        "type": "scatter",
        "mode": "markers",
        "name": "ours, with its 95 % interval",
        "x": [row["bleu4"] for row in ours],
        "y": [row["recipe"] for row in ours],
        "marker": _style(0)["marker"] | {"size": 11},
        "error_x": _interval([row["bleu4"] for row in ours], within),
    }
    traces = [measured]
    if published := [row for row in rows if row["bleu4_published"] is not None]:
        marker = {"color": COLOURS[1], "symbol": "diamond-open", "size": 12, "line": {"width": 2}}
        points = {"x": [row["bleu4_published"] for row in published], "y": [row["recipe"] for row in published]}
        traces.append({"type": "scatter", "mode": "markers", "name": "published", "marker": marker, **points})
        recipes = [row["recipe"] for row in rows]
        for i, one in enumerate(baselines):
            line = {"color": "#767676", "dash": DASHES[2 + i % 2], "width": 2}
            ends = {"x": [one["BLEU-4"]] * 2, "y": [recipes[0], recipes[-1]]}
            traces.append({"type": "scatter", "mode": "lines", "name": one["baseline"], "line": line, **ends})
    says = "; ".join(
        f"{row['recipe']} {tables.text_of(row['bleu4'])}, published {tables.text_of(row['bleu4_published'])}"
        for row in rows
    )
    size = {"height": 220 + 34 * len(rows)}
    every = [x for trace in traces for x in trace["x"]]
    every += [row[end] for row in ours for end in ("bleu4_low", "bleu4_high") if row[end] is not None]
    room = 0.05 * (max(every) - min(every)) or 1.0
    x = _axis("BLEU-4", range=[min(every) - room, max(every) + room])  # a line alone would lie on the frame
    return Figure("study-bleu4", "BLEU-4 of the study's recipes", traces, x, _categories(), "", size, says)
