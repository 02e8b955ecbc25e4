"""How a study's runs are printed beside its published scores: `recipe results --study`."""

from typing import Any

from .. import tables
from ..base.progress import say
from ..data.published import Score
from ..data.study import Study
from ..metrics.metric import Column
from .verdict import notes

COSTS = "Other scores, and what they cost"
MEASURED = "What the runs took, and the mean loss of their last steps, beside what was published"
CURVES = "Our training loss less the published one, over the same steps"
REHEARSALS = "Rehearsals (small stand-in model, few rows; not comparable with any published score)"


def of_metric(rows: list[dict[str, Any]], of_study: Study, column: Column) -> list[dict[str, Any]]:
    """The rows of a study by one of its metrics, beside the published scores; by the first also over baselines."""
    name = column.name
    first = name == of_study.first.name
    over = {b.name: f"over {b.scores[name].value}" for b in of_study.compared if first and name in b.scores}
    judged = {"by": f"{name}_model"} if column.judged else {}
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


def published(score: Score | None) -> float | str | None:
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


def show(of_study: Study, rows: list[dict[str, Any]], rehearsal: bool, form: tables.Form) -> None:
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
            title = column.label if not first else REHEARSALS if rehearsal else about(of_study)
            tables.write(of_one, form, title, empty=True, spare=spare)
        spare = ["tokens/s", "peak GPU GiB", "eval loss"]
        tables.write(of_costs(rows, of_study), form, COSTS, empty=True, spare=spare)
        if measured := of_measured(rows):
            tables.write(measured, form, MEASURED)
        if gaps := of_curves(rows):
            tables.write(gaps, form, CURVES)
        if not rehearsal:
            if of_study.compared:
                tables.write(baselines(of_study), form, "To compare with")
            for line in notes(of_study, rows):
                tables.print_text(line)


def about(of_study: Study) -> str:
    """The paper of a study, and the rows that its published scores are on."""
    return f"{of_study.cited}; published scores are on {of_study.test_title}"


def _flat(full: dict[str, Any]) -> dict[str, Any]:
    """A row without nested values, for CSV."""
    gains = {f"gain_percent over {name}": gain for name, gain in full["gains_percent"].items()}
    texts = {key: "; ".join(full[key]) for key in ("differs", "open")}
    return {key: value for key, value in full.items() if key != "gains_percent"} | gains | texts
