"""The runs of a report, and what its tables say of them."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from .. import places
from ..base import paths, tables, yamlfiles
from ..base.errors import UserError
from ..base.files import sha256
from ..base.tables import Row
from ..checks import schema
from ..configs import config
from ..results import listing, run_rows
from ..runs.rundir import Run, RunDir
from ..scores import evaluations
from ..scores.evaluations import BASE_MODEL, Evaluation, read_predictions, read_scores
from ..scores.metrics import METRICS, PER_ROW

_OTHERS = {
    "sacrebleu_signature": "its signature",
    "exact": "exact, share of rows",
    "empty": "empty, share of rows",
    "repeated": "as another row's, share of rows",
    "length_ratio": "tokens, predicted over reference",
}


@dataclass(frozen=True)
class ReportedRun:
    """A run of a report.

    Attributes:
        label: how the report calls it, unlike any other of its runs.
    """

    label: str
    folder: RunDir
    run: Run

    @cached_property
    def config(self) -> yamlfiles.Config:
        """What Axolotl was given; empty where that cannot be read any more."""
        with suppress(UserError):
            return yamlfiles.read_yaml(self.folder.config)
        return {}

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of its adapter."""
        return evaluations.of_run(self.folder.path, self.run)

    @cached_property
    def predictions(self) -> list[Row]:
        """The rows of that evaluation."""
        return read_predictions(self.folder.path) if self.evaluation else []

    def from_cwd(self, path: str) -> str:
        """A path as the run's own folder sees it, where it is below."""
        cwd = Path(self.run.cwd)
        return str(Path(path).relative_to(cwd)) if Path(path).is_relative_to(cwd) else path


def members(folders: Sequence[RunDir], labels: Sequence[str] | None = None) -> list[ReportedRun]:
    """The runs of some folders, each with a label of its own: its recipe's name, and its folder's where that is needed.

    Raises:
        UserError: a folder holds no run, or rehearsals and real runs are mixed.
    """
    runs = [(folder, places.read(folder)) for folder in folders]
    if len({run.rehearsal for _, run in runs}) > 1:
        raise UserError("rehearsals and real runs compare with nothing of the other kind: a report has one of them")
    named = list(labels or [run.recipe.rpartition("/")[2] for _, run in runs])
    for label in [label for label in dict.fromkeys(named) if named.count(label) > 1]:
        for i, name in enumerate(named):
            if name == label:
                named[i] = f"{label}, {folders[i].path.name}"
    return [ReportedRun(label, folder, run) for label, (folder, run) in zip(named, runs, strict=True)]


def tiles(one: ReportedRun) -> Iterator[tuple[str, Any, str]]:
    """What one looks for first in a run: a name, a value, and what there is to say of it."""
    row, summary = run_rows.row(one.folder, one.run), one.run.summary
    epochs = f"{summary.epoch:.2f} epochs" if summary.epoch else ""
    early = "early stopping" if summary.ended == "early stopping" else ""
    of_all = f"step {summary.step} of {summary.max_steps or '?'}"
    yield "State", one.run.state, "; ".join(filter(None, (of_all, epochs, early)))
    if row["eval_loss"] is not None:
        yield "Validation loss", row["eval_loss"], f"from {tables.text_of(row['eval_loss_first'])}"
    elif summary.eval_loss is not None:
        yield listing.AXOLOTL_EVAL_LOSS, summary.eval_loss, f"from {tables.text_of(summary.eval_loss_first)}"
    elif summary.loss is not None:
        yield "Training loss", summary.loss, "of the last step"
    if one.evaluation:
        scores = one.evaluation.scores
        for score, metric in PER_ROW.items():
            if scores.get(score) is not None:
                within = (scores.get("intervals") or {}).get(score)
                said = f"95 %: {tables.text_of(within)}" if within else ""
                if score == "bleu4" and row["bleu4_difference"] is not None:
                    said += f"; published {tables.text_of(row['bleu4_published'])}"
                yield metric.label, scores[score], said
    if summary.peak_memory is not None:
        yield "Peak memory", f"{summary.peak_memory:.2f} GiB", f"measured: {summary.memory_kind}"
    if summary.tokens_per_second:
        yield "Throughput", f"{summary.tokens_per_second:,.0f} tokens/s", "without padding"
    if summary.train_seconds:
        yield "Time in steps", _duration(summary.train_seconds), ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def overview(one: ReportedRun) -> Row:
    """A run among others."""
    row = run_rows.row(one.folder, one.run)
    return {
        "run": one.label,
        "recipe": row["recipe"],
        "state": row["state"],
        "steps": f"{row['step']} of {row['steps'] or '?'}",
        "eval loss, first": row["eval_loss_first"],
        "last": row["eval_loss"],
        listing.AXOLOTL_EVAL_LOSS: row["eval_loss_axolotl"] if row["eval_loss"] is None else None,
        "BLEU-4": row["bleu4"],
        "peak GiB": row["peak_memory_gib"],
        "of": row["memory_kind"],
        "tokens/s": None if row["tokens_per_second"] is None else round(row["tokens_per_second"]),
        "time in steps": _duration(row["train_seconds"]),
    }


def scores(found: Sequence[ReportedRun]) -> list[Row]:
    """A row for each score, with a column for each run that was evaluated, for its base model where that was, and for
    what was published where runs aim at that."""
    columns: dict[str, dict[str, str | None]] = {}
    for one in found:
        if not one.evaluation:
            continue
        columns[one.label] = _column(one.evaluation)
        base = read_scores(one.folder.path / "evaluations" / BASE_MODEL)
        if base and alike(one, base):
            columns[f"{one.label}: base model alone"] = _column(base)
        if run_rows.comparable(one.evaluation, one.run) and (aim := run_rows.aim(one.run)):
            published: dict[str, str | None] = {}
            for key in ("bleu4", "bertscore_f1"):
                published[METRICS[key].label] = tables.text_of(getattr(aim, key))
            columns[f"{one.label}: published"] = published
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    return [{"score": name} | {label: column.get(name) for label, column in columns.items()} for name in names]


def _column(made: Evaluation) -> dict[str, str | None]:
    """An evaluation's scores as text, with their intervals."""
    column: dict[str, str | None] = {}
    intervals = made.scores.get("intervals") or {}
    for key, value in made.scores.items():
        title = METRICS[key].label if key in METRICS else _OTHERS.get(key, key)
        if intervals.get(key):
            column[title] = f"{tables.text_of(value)} ({tables.text_of(intervals[key])})"
        elif isinstance(value, int | float | str):
            column[title] = tables.text_of(value)
        elif key == "bertscore" and value:
            column["BERTScore by"] = str(value.get("model"))
    return column


def alike(one: ReportedRun, other: Evaluation) -> bool:
    """Whether another evaluation is of the same rows as the run's own."""
    return bool(one.evaluation and one.evaluation.settings.data_sha256 == other.settings.data_sha256)


def scored_on(one: ReportedRun) -> str:
    """Which rows the evaluation of a run is of."""
    assert one.evaluation
    settings = one.evaluation.settings
    return f"{'the first ' if settings.limit else ''}{settings.rows:,} rows of {one.from_cwd(settings.data)}"


def settings(one: ReportedRun) -> dict[str, Any]:
    """What a run was set to, where each setting is from, and what differs from its recipe."""
    of_recipe: dict[str, str] = {}
    note = ""
    file = paths.RECIPES / f"{one.run.recipe}.yaml"
    file = file if file.is_file() else Path(one.run.cwd, one.run.recipe_file)
    if file.is_file():
        of_recipe = yamlfiles.sources(file)
        if sha256(file) != one.run.recipe_sha256:
            note = "The recipe has changed since the run; the sources are those of today."
    else:
        note = f"The recipe's file, {one.run.recipe_file}, is not there any more, so its sources are not known."
    why = {difference.key: difference.why for difference in one.run.differences}
    of_key = {key.partition(".")[0]: reason for key, reason in why.items()}
    shown = []
    for key, value in config.flatten(one.config):
        top = key.partition(".")[0]
        source = why.get(key) or (of_key.get(top) if top not in of_recipe else None) or of_recipe.get(top)
        if not schema.is_secret(key):
            shown.append({"setting": key, "value": _shown(value), "source": source or "the run's own"})
    differs = [
        {"setting": d.key, "recipe": _shown(d.recipe), "this run": _shown(d.run), "why": d.why}
        for d in one.run.differences
        if not schema.is_secret(d.key)
    ]
    return {"label": one.label, "recipe": one.run.recipe, "differs": differs, "all": shown, "note": note}


def _shown(value: Any) -> Any:
    """A setting's value as YAML has it on one line."""
    return None if value is None else value if isinstance(value, str) else orjson.dumps(value).decode()


def provenance(one: ReportedRun) -> dict[str, Any]:
    """All that is recorded of how a run came to be."""
    kept = {"differences", "data", "launches"}  # have tables of their own
    record = one.run.model_dump(exclude=kept)
    launches = [
        {
            "started": launch.started,
            "ended": launch.ended,
            "exit code": launch.exit_code,
            "resumed from": launch.resumed_from,
            "command": " ".join(launch.command),
        }
        for launch in one.run.launches
    ]
    evaluation = one.evaluation.model_dump() if one.evaluation else {}
    pairs = [
        [(key, _shown(value)) for key, value in config.flatten(part) if not schema.is_secret(key)]
        for part in (record, evaluation)
    ]
    data = [
        {"file": one.from_cwd(file.path), "rows": file.rows, "bytes": f"{file.bytes:,}", "SHA-256": file.sha256}
        for file in one.run.data
    ]
    return {"label": one.label, "data": data, "launches": launches, "record": pairs[0], "evaluation": pairs[1]}


def sweep_row(row: Row, keys: Sequence[str]) -> Row:
    """A member as the table shows it, with its values of the keys that vary."""
    shown: Row = {"member": row["member"]} | {key: _shown(row["values"].get(key)) for key in keys}
    titles = {"eval_loss": "eval loss"} | {name: metric.label for name, metric in PER_ROW.items()}
    for score, title in titles.items():
        shown |= {title: row[score], f"{title} 95 %": row.get(f"{score}_interval")}
    share = row["trainable_share"]
    shown |= {
        "trainable": None if row["trainable"] is None else f"{row['trainable']:,}",
        "share": None if share is None else f"{share:.2%}",
        "measured GiB": row["peak_memory_gib"],
        "of": row["memory_kind"],
        "planned GiB": row["planned_gib"],
        "minutes": None if row["train_seconds"] is None else row["train_seconds"] / 60,
        "tokens/s": None if row["tokens_per_second"] is None else round(row["tokens_per_second"]),
        "Pareto front": "yes" if row["pareto"] else "",
        "best": "yes" if row["best"] else "",
        "runs": ", ".join(row["states"]),
    }
    return shown
