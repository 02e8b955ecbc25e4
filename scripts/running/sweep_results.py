"""Results of a sweep: rows of its members, and how they are printed."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .. import tables
from ..base import paths, yamlfiles
from ..base.errors import UserError, did_you_mean
from ..configs import config
from ..data import study
from ..metrics.metric import Column
from ..results import repeats, run_rows
from ..results.listing import REHEARSALS
from ..results.run_rows import RunResult
from ..runs.records import Run, Summary
from ..runs.rundir import RunDir
from ..scores import evaluation_rows
from .pipeline import existing_runs
from .sweep import Sweep, SweepMember, of_recipe

LOSS = "eval_loss"
_COSTS = {"memory": "peak_memory_gib", "time": "train_seconds"}
Columns = Mapping[str, Column]


def columns(sweep: Sweep, runs: Path) -> dict[str, Column]:
    """What a sweep's runs were scored with; where there are none yet, what its recipe's would be."""
    of_digest = existing_runs(runs, sweep.recipe)
    found: dict[str, Column] = {}
    for folder, run in (of_digest[m.digest] for m in sweep.members if m.digest in of_digest):
        found |= RunResult(folder, run).columns
    return found or of_recipe(sweep.recipe)


def qualities(scored: Columns) -> dict[str, Callable[..., Any]]:
    """The eval loss and scores, and for each whether the least or the most of it is the best."""
    return {LOSS: min} | {name: column.better for name, column in scored.items()}


def criteria(scored: Columns) -> dict[str, Callable[..., Any]]:
    """Ranking criteria, and whether the least or the most of each is the best. Scores are of test rows, which choose no
    member: its score would then be too good."""
    of_loss = {name: column for name, column in scored.items() if column.metric.of_loss}
    return qualities(of_loss) | dict.fromkeys(_COSTS, min)


def check_best(best: str | None, scored: Columns) -> None:
    """Refuse what a member cannot be the best by.

    Raises:
        UserError: it is not one of `criteria`.
    """
    if best and best not in criteria(scored):
        hint = did_you_mean(best, criteria(scored))
        problem = "a score of test rows, which choose no member; name" if best in scored else "not"
        raise UserError(f"--best {best}: {problem} one of {', '.join(criteria(scored))}{hint}")


def rows(sweep: Sweep, runs: Path, best: str | None = None) -> list[dict[str, Any]]:
    """A row for each name among the members: what it sets and what its finished runs measured.

    Scores are means over seeds, with their 95 % interval, see `intervals.of_runs`. The Pareto front is over peak memory
    and eval loss. Where the runs validate on test rows, there is no front, and no best by eval loss.

    Args:
        sweep: the sweep.
        runs: the folder with the runs.
        best: one of `criteria`, to mark the best row by.

    Raises:
        UserError: see `check_best`.
    """
    scored = columns(sweep, runs)
    check_best(best, scored)
    of_digest = existing_runs(runs, sweep.recipe)
    by_name = [list(of_name) for _, of_name in itertools.groupby(sweep.members, key=lambda member: member.name)]
    compared = [
        _row(of_name, [of_digest[m.digest] for m in of_name if m.digest in of_digest], scored) for of_name in by_name
    ]
    done = (of_digest[m.digest] for m in sweep.members if m.digest in of_digest)
    validated = next((_validates(*one) for one in done if one[1].state == "finished"), False)
    for row in compared:
        row |= _published(sweep, row["values"])
        row["pareto"] = validated and on_front(row, compared, "peak_memory_gib")
        row["best"] = False
    key = _COSTS.get(best, best) if best else LOSS
    if best and (validated or best in _COSTS) and (ranked := [row for row in compared if row[key] is not None]):
        criteria(scored)[best](ranked, key=lambda row: row[key])["best"] = True
    return compared


def _published(sweep: Sweep, values: Mapping[str, Any]) -> dict[str, float | None]:
    """The published scores of a member's settings, as NAME_published; empty where the study has none for sweeps."""
    name, file = paths.find_recipe(sweep.recipe)
    origin = config.origin_of(name, file)
    of_study = study.of_any(origin) if origin and not sweep.rehearsal else None
    if not of_study or not origin or not any(published.cells for published in of_study.published.values()):
        return {}
    cell = of_study.cell(origin, {**yamlfiles.read_yaml(file), **values})
    scores = cell.scores if cell else {}
    return {f"{key}_published": fmean(scores[key]) if key in scores else None for key in of_study.columns}


def _validates(folder: RunDir, run: Run) -> bool:
    """True if the run's eval loss is of validation rows, which may choose a member."""
    return evaluation_rows.validation(run, yamlfiles.read_yaml(folder.config)) is not None


def on_front(row: dict[str, Any], compared: Sequence[dict[str, Any]], cost: str) -> bool:
    """Whether a row is on the Pareto front: no other is as good in both a cost and eval loss, and better in one."""

    def losses(some: dict[str, Any]) -> tuple[float, float] | None:
        return None if None in (some.get(cost), some.get(LOSS)) else (some[cost], some[LOSS])

    own = losses(row)
    rivals = [other for other in map(losses, compared) if other not in (None, own)]
    return own is not None and not any(rival[0] <= own[0] and rival[1] <= own[1] for rival in rivals if rival)


def _row(members: Sequence[SweepMember], of_runs: Sequence[tuple[RunDir, Run]], scored: Columns) -> dict[str, Any]:
    """The row of the members of a name; of the finished runs of these, the first stands for what is alike in all."""
    done = [RunResult(folder, run) for folder, run in of_runs if run.state == "finished"]
    measured = [run_rows.row(result) for result in done]
    row: dict[str, Any] = {
        "member": members[0].name,
        "values": members[0].values,
        "seeds": [member.seed for member in members if member.seed is not None],
        "runs": [str(folder.path) for folder, _ in of_runs],
        "states": [run.state for _, run in of_runs],
    }
    of_study = study.of(done[0].run.origin) if done and not done[0].run.rehearsal else None
    for score in qualities(scored):
        of_score = [(each, run[score]) for each, run in zip(done, measured, strict=True) if run.get(score) is not None]
        values = [value for _, value in of_score]
        known = of_study.repeats(done[0].run.origin, score) if of_study else []
        within = repeats.interval(score, [each for each, _ in of_score], values, known) if values else None
        row |= {
            score: sum(values) / len(values) if values else None,
            f"{score}_interval": [within.low, within.high] if within else None,
            f"{score}_interval_method": within.method if within else None,
        }
    first = measured[0] if measured else {}
    summary = done[0].run.summary if done else Summary()
    return row | {
        "planned_gib": members[0].planned_gib,
        "peak_memory_gib": max((run["peak_memory_gib"] for run in measured if run["peak_memory_gib"]), default=None),
        "memory_kind": first.get("memory_kind"),
        "trainable": summary.trainable_parameters,
        "trainable_share": summary.trainable_share,
        "train_seconds": sum(run["train_seconds"] for run in measured) / len(measured) if measured else None,
        "tokens_per_second": first.get("tokens_per_second"),
    }


def show(sweep: Sweep, scored: Columns, rows: list[dict[str, Any]], best: str | None, form: tables.Form) -> None:
    """Print `rows` with `columns`, in a form of `tables.Form`."""
    if form in ("json", "csv"):
        tables.write(rows if form == "json" else [_flat(sweep, row) for row in rows], form)
        return
    title = f"{sweep.name}: {sweep.recipe}"
    if sweep.rehearsal:
        title = f"{title}. {REHEARSALS}"
    spare = ("minutes", "trained", "95 %", "planned GiB", "eval loss")
    asked = {best: scored[best]} if best and best in scored else {}
    tables.write([cells(sweep, dict([*scored.items()][:1]) | asked, row) for row in rows], form, title, spare=spare)
    for line in notes(sweep, scored, rows, best):
        tables.print_text(line)


def notes(sweep: Sweep, scored: Columns, rows: list[dict[str, Any]], best: str | None) -> list[str]:
    """The notes below the table."""
    front = [row["member"] for row in rows if row["pareto"]]
    lines = [f"Pareto front over peak memory and {LOSS}: {'; '.join(front)}"] if front else []
    found = next((row["member"] for row in rows if row["best"]), "none: not measured, or on test rows only")
    lines += [f"Best by {best}: {found}"] if best else []
    if any(row["planned_gib"] is not None for row in rows):
        of_what = "Memory planned is the recipe's on a GPU"
        lines.append(f"{of_what}, measured the rehearsal's process on the CPU." if sweep.rehearsal else f"{of_what}.")
    methods = dict.fromkeys(row[f"{name}_interval_method"] for name in scored for row in rows)
    if known := [method for method in methods if method]:
        lines.append(f"Intervals are of {'; '.join(known)}.")
    return lines


def cells(sweep: Sweep, scored: Columns, row: dict[str, Any]) -> dict[str, Any]:
    """A member's row: its values of the keys that vary, its scores, the first with its interval, and its costs."""
    first, *others = scored.values()
    values = {key: _yaml(row["values"].get(key)) for key in sweep.keys if not row["member"].startswith(f"{key}=")}
    wanted = max(len(row["seeds"]), 1)
    states = Counter(row["states"] + ["not begun"] * (wanted - len(row["states"])))
    share = row["trainable_share"]
    seconds = row["train_seconds"]
    return {
        "member": row["member"],
        **values,
        "state": next(iter(states)) if wanted == 1 else ", ".join(f"{n} {state}" for state, n in states.items()),
        "eval loss": row["eval_loss"],
        first.label: row[first.name],
        "95 %": row[f"{first.name}_interval"],
        "published": row.get(f"{first.name}_published"),
        **{column.label: row[column.name] for column in others},
        "trained": None if share is None else f"{share:.2%}",
        "planned GiB": row["planned_gib"],
        "measured GiB": row["peak_memory_gib"],
        "minutes": None if seconds is None else f"{seconds / 60:.1f}",
        "front": "*" if row["pareto"] else None,
        "best": "*" if row["best"] else None,
    }


def _yaml(value: Any) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None if value is None else yamlfiles.write_flow(value)


def _flat(sweep: Sweep, row: dict[str, Any]) -> dict[str, Any]:
    """A row without nested values, as CSV needs it."""
    flat = {key: value for key, value in row.items() if key not in ("values", "runs", "states", "seeds")}
    for score in [key.removesuffix("_interval") for key in row if key.endswith("_interval")]:
        flat[f"{score}_low"], flat[f"{score}_high"] = flat.pop(f"{score}_interval") or (None, None)
    return {"member": flat.pop("member")} | {key: _yaml(row["values"].get(key)) for key in sweep.keys} | flat
