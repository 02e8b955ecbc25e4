"""Tables of runs, and of a study's runs beside its published scores: `recipe results`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import backends, tables
from ..base.progress import say
from ..data.published import PublishedScore
from ..data.study import Study
from ..metrics.metric import Column
from ..runs.rundir import RunDir, readable
from . import run_rows
from .run_rows import RunResult
from .verdict import notes

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown for runs from before there was one per token
_SPARE = (
    *("minutes", "tokens/s", "rows", "peak GiB", "base model"),
    *("step", AXOLOTL_EVAL_LOSS, "eval loss", "published", "difference"),
)
_BELOW = ("trouble", "changed", "variant of", "jobs", "predictions", "adapter")


def _jobs(result: RunResult) -> Iterator[str]:
    """The jobs that have not ended of a run's next steps, in words."""
    trained = result.run.state == "finished"
    for step, done in {"prepare": trained, "run": trained, "evaluate": result.evaluation}.items():
        if not done and (state := backends.job_state(result.folder, step)):
            yield f"{step}: {state}"


def _short(full: dict[str, Any], columns: Mapping[str, Column], decodings: Iterable[str]) -> dict[str, Any]:
    """The cells of a row that fit a terminal; the first of its columns is set beside what it compares with, further
    decodings among it."""
    early = ", early stopping" if full["ended"] == "early stopping" else ""
    kept = "" if full["kept_step"] in (None, full["step"]) else f", step {full['kept_step']} kept"
    losses = None
    if full["eval_loss"] is not None:
        losses = f"{tables.text_of(full['eval_loss_first'])} → {tables.text_of(full['eval_loss'])}"
    first, *others = columns
    short = {
        "run": Path(full["run"]).name,
        "recipe": full["recipe"],
        "state": full["state"],
        "jobs": full["jobs"],
        "step": f"{full['step']}/{full['steps'] or '?'}{early}{kept}",
        "eval loss": losses,
        AXOLOTL_EVAL_LOSS: None if losses else full["eval_loss_axolotl"],
        columns[first].label: full.get(first),
        **{f"{columns[first].label}, {name}": full.get(f"{first}_{name}") for name in decodings},
        "base model": full.get(f"{first}_base_model"),
    }
    if not full["rehearsal"]:
        short |= {"published": full.get(f"{first}_published"), "difference": full.get(f"{first}_difference")}
    return short | {
        **{columns[name].label: full.get(name) for name in others},
        **_gained(full, columns),
        "rows": full["rows_evaluated"],
        "peak GiB": full["peak_memory_gib"],
        "tokens/s": round(full["tokens_per_second"]) if full["tokens_per_second"] else None,
        "minutes": f"{full['train_seconds'] / 60:.1f}",
        "predictions": full["evaluation"],
        "adapter": full["published_adapter"],
        "trouble": full["trouble"],
        "variant of": full["variant_of"],
        "changed": full["changed_keys"] or None,
    }


def _gained(full: dict[str, Any], columns: Mapping[str, Column]) -> dict[str, float | None]:
    """Differences of benchmarks from the base model's: what a training gained, or forgot."""
    gained = {}
    for name, column in columns.items():
        if column.metric.of_model and full.get(f"{name}_base_model") is not None and full.get(name) is not None:
            gained[f"{column.label}, gained"] = full[name] - full[f"{name}_base_model"]
    return gained


def show(folders: Sequence[RunDir], form: tables.Form) -> None:
    """Print the results of runs, in a form of `tables.Form`."""
    found = [RunResult(folder, run) for folder, run in readable(folders, backends.read)]
    rows = [run_rows.row(result, _jobs(result)) for result in found]
    if changed := [full["run"] for full in rows if full["evaluation"]]:
        say(f"{len(changed)} evaluations are stale or edited; `recipe evaluate {changed[-1]}` checks that of the last")
    if form in ("json", "csv"):
        tables.write(rows, form)
    else:
        for rehearsal in (False, True):
            some = [pair for pair in zip(found, rows, strict=True) if pair[1]["rehearsal"] == rehearsal]
            groups = _groups(some)
            for of_study, columns, group in groups:
                title = REHEARSALS if rehearsal else "Runs"
                if len(groups) > 1:
                    title += f": {of_study.folder.name}" if of_study else ": of no study"
                decodings = [*of_study.decodings] if of_study else []
                spare = [*[column.label for column in columns.values()][:0:-1], *_SPARE]  # but for the first
                tables.write(
                    [_short(full, columns, decodings) for full in group], form, title, spare=spare, below=_BELOW
                )
                compared = not rehearsal and any(not (r["other_base_model"] or r["other_data"]) for r in group)
                if of_study and of_study.compared and compared:
                    tables.write(baselines(of_study), form, "To compare with")


def _groups(
    some: Sequence[tuple[RunResult, dict[str, Any]]],
) -> list[tuple[Study | None, dict[str, Column], list[dict[str, Any]]]]:
    """Runs by their study, and those of no study by their metrics, so that no column has numbers of two metrics: the
    study, the columns of scores, and the rows."""
    groups: dict[str, tuple[Study | None, dict[str, Column], list[dict[str, Any]]]] = {}
    for result, full in some:
        of_study = result.study
        columns = of_study.table if of_study else result.columns
        key = of_study.folder.name if of_study else str({name: c.entry for name, c in columns.items()})
        _, shown, rows = groups.setdefault(key, (of_study, dict(columns), []))
        shown |= {name: column for name, column in result.columns.items() if column.metric.of_model}
        rows.append(full)
    return list(groups.values())


COSTS = "Other scores, and what they cost"
MEASURED = "What the runs took, and the mean loss of their last steps, beside what was published"
CURVES = "Our training loss less the published one, over the same steps"
REHEARSALS = "Rehearsals (small stand-in model, few rows; not comparable with any published score)"


def of_metric(rows: list[dict[str, Any]], of_study: Study, column: Column) -> list[dict[str, Any]]:
    """The rows of a study by one of its metrics, beside the published scores; by the first also over baselines."""
    name = column.name
    first = name == of_study.first.name
    over = {b.name: f"over {b.scores[name].value}" for b in of_study.compared if first and name in b.scores}
    judged = {"by": f"{name}_model"} if column.metric.judged else {}
    return [
        {
            "recipe": full["recipe"],
            "rows": full["rows"],
            column.label: full[name],
            "95 %": None if full[f"{name}_low"] is None else [full[f"{name}_low"], full[f"{name}_high"]],
            "published": full[f"{name}_published"]
            if full[f"{name}_spread"] is None
            else tables.plus_minus(full[f"{name}_published"], full[f"{name}_spread"]),
            "difference": full[f"{name}_difference"],
            "verdict": full[f"{name}_verdict"],
            "95 % is of": full[f"{name}_interval_method"],
            **{decoding: full[f"{name}_{decoding}"] for decoding in of_study.decodings},
            **{
                heading: None if (gain := full["gains_percent"][label]) is None else f"{gain:+.1f} %"
                for label, heading in over.items()
            },
            **{heading: full[key] for heading, key in judged.items()},
        }
        for full in rows
    ]


def of_costs(rows: list[dict[str, Any]], of_study: Study) -> list[dict[str, Any]]:
    """The rows of a study by the metrics that have no table of their own, and what the runs cost."""
    others = {name: column for name, column in of_study.columns.items() if name not in of_study.table}
    return [
        {
            "recipe": full["recipe"],
            **{column.label: full[name] for name, column in others.items()},
            "eval loss": full["eval_loss"],
            "peak GPU GiB": full["peak_gpu_memory_gib"],
            "tokens/s": round(full["tokens_per_second"]) if full["tokens_per_second"] else None,
            "GPU hours": full["gpu_hours"],
        }
        for full in rows
    ]


_MEASURED = {
    "train_loss": "train loss",
    "trainable": "trainable",
    "peak_gpu_memory_gib": "peak GPU GiB",
    "tokens_per_second": "tokens/s",
    "train_seconds": "seconds",
}


def of_measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a study by what else was published of its runs, ours and theirs beside each other; none where
    nothing was."""
    known = [key for key in _MEASURED if any(full[f"{key}_published"] is not None for full in rows)]
    return [
        {"recipe": full["recipe"]}
        | {
            f"{_MEASURED[key]}{theirs.replace('_', ', ')}": _whole(full[f"{key}{theirs}"])
            for key in known
            for theirs in ("", "_published")
        }
        for full in rows
        if known
    ]


def of_curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the training losses of a study's runs lie from the published curves; of those with a step in common."""
    return [
        {
            "recipe": full["recipe"],
            "mean gap": full["train_loss_gap_mean"],
            "largest gap": full["train_loss_gap_largest"],
            "at step": full["train_loss_gap_step"],
            "verdict": full["train_loss_verdict"],
        }
        for full in rows
        if full["train_loss_gap_step"] is not None
    ]


def _whole(value: float | None) -> str | float | None:
    """A large number without decimals, in groups of three digits."""
    return f"{value:,.0f}" if value is not None and value >= 100 else value


def published(score: PublishedScore | None) -> float | str | None:
    """A published score in a table: with its ± as text, otherwise as a number, which is aligned."""
    if score is None or score.spread is None:
        return score.value if score else None
    return tables.plus_minus(score.value, score.spread)


def baselines(of_study: Study) -> list[dict[str, Any]]:
    """A study's baselines, each named."""
    return [
        {
            "baseline": baseline.name,
            **{column.label: published(baseline.scores.get(name)) for name, column in of_study.table.items()},
            "on": baseline.test_set,
        }
        for baseline in of_study.compared
    ]


def show_study(of_study: Study, rows: list[dict[str, Any]], rehearsal: bool, form: tables.Form) -> None:
    """Print the rows of `verdict.rows`, in a form of `tables.Form`."""
    if form == "json":
        tables.write(rows, form)
    elif not rows:
        say("no run of its recipes is rehearsed yet; `recipe reproduce` with --rehearse does that")
    elif form == "csv":
        tables.write([_flat(full) for full in rows], form)
    else:
        for column in of_study.table.values():
            of_one = of_metric(rows, of_study, column)
            over = [heading for heading in of_one[0] if heading.startswith("over ")]
            spare = ["95 % is of", *over, "by", "rows", "difference"]
            first = column == of_study.first
            about = f"{of_study.cited}; published scores are on {of_study.test_title}"
            title = column.label if not first else REHEARSALS if rehearsal else about
            tables.write(of_one, form, title, empty=True, spare=spare)
        costs = of_costs(rows, of_study)
        tables.write(costs, form, COSTS, empty=True, spare=["tokens/s", "peak GPU GiB", "eval loss"])
        for title, table in ((MEASURED, of_measured(rows)), (CURVES, of_curves(rows))):
            if table:
                tables.write(table, form, title)
        if not rehearsal:
            if of_study.compared:
                tables.write(baselines(of_study), form, "To compare with")
            for line in notes(of_study, rows):
                tables.print_text(line)


def _flat(full: dict[str, Any]) -> dict[str, Any]:
    """A row without nested values, for CSV."""
    gains = {f"gain_percent over {name}": gain for name, gain in full["gains_percent"].items()}
    texts = {key: "; ".join(full[key]) for key in ("differs", "open")}
    return {key: value for key, value in full.items() if key != "gains_percent"} | gains | texts
