"""The runs of a report, and the rows of its tables."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from .. import backends
from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, sha256
from ..base.private import is_secret
from ..configs import config, datafiles
from ..data import study
from ..metrics import registry
from ..metrics.metric import Column
from ..results import comparable, curves, listing, run_rows
from ..runs.rundir import Run, RunDir
from ..scores import evaluations
from ..scores.evaluations import Evaluation, read_predictions
from ..scores.judges import record_of
from ..terminal import tables

_OTHERS = {
    "sacrebleu_signature": "its signature",
    "exact": "exact, share of rows",
    "empty": "empty, share of rows",
    "repeated": "the same as another row's, share of rows",
    "length_ratio": "tokens, predicted over reference",
}


@dataclass(frozen=True)
class ReportedRun:
    """A run of a report.

    Attributes:
        label: its name in the report, which no other run has.
    """

    label: str
    folder: RunDir
    run: Run

    @cached_property
    def config(self) -> yamlfiles.Config:
        """The config that Axolotl was given; empty where that can no longer be read."""
        with suppress(UserError):
            return yamlfiles.read_yaml(self.folder.config)
        return {}

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of its adapter."""
        return evaluations.of_run(self.folder.path, self.run)

    @cached_property
    def base_evaluation(self) -> Evaluation | None:
        """The evaluation of its base model alone, where that compares with `evaluation`."""
        return comparable.of_base_model(self.folder, self.evaluation) if self.evaluation else None

    @cached_property
    def decoded(self) -> dict[str, Evaluation]:
        """The evaluations by further decodings of its study, by name."""
        found = comparable.decoded(self.folder, self.run, self.evaluation)
        return {name: other for name, other in found.items() if other}

    @cached_property
    def published_curve(self) -> list[curves.Point]:
        """The published training loss of what it tries for; none where there is none."""
        aim, of_study = comparable.aim(self.run), study.of(self.run.origin)
        return curves.published(of_study, aim) if aim and of_study else []

    @cached_property
    def predictions(self) -> list[Row]:
        """The rows of that evaluation."""
        return read_predictions(self.folder.path) if self.evaluation else []

    @cached_property
    def columns(self) -> dict[str, Column]:
        """What it is scored with, by name."""
        return comparable.columns(self.run, self.evaluation)

    @cached_property
    def row(self) -> Row:
        """It as a row of results."""
        return run_rows.row(self.folder, self.run)

    def from_cwd(self, path: str) -> str:
        """A path relative to the folder that the run was started in, where it is below that."""
        return str(Path(path).relative_to(self.run.cwd)) if Path(path).is_relative_to(self.run.cwd) else path


def reported_runs(folders: Sequence[RunDir], labels: Sequence[str] | None = None) -> list[ReportedRun]:
    """The runs of some folders, each with its own label: its recipe's name, with its folder's where runs share that.

    Raises:
        UserError: a folder holds no run, or rehearsals and real runs are mixed.
    """
    runs = [(folder, backends.read(folder)) for folder in folders]
    for folder, run in runs:
        evaluations.check_again(folder.path)
        run.summary = folder.summary(run)
    if len({run.rehearsal for _, run in runs}) > 1:
        raise UserError("rehearsals and real runs do not compare: a report shows one kind or the other")
    names = labels or [run.recipe.rpartition("/")[2] for _, run in runs]
    times = Counter(names)
    return [
        ReportedRun(name if times[name] == 1 else f"{name}, {folder.path.name}", folder, run)
        for name, (folder, run) in zip(names, runs, strict=True)
    ]


def tiles(reported: ReportedRun) -> Iterator[tuple[str, Any, str]]:
    """What a reader looks for first in a run: a name, a value, and a remark."""
    row = reported.row
    summary = reported.run.summary
    epochs = f"{summary.epoch:.2f} epochs" if summary.epoch else ""
    early = "early stopping" if row["ended"] == "early stopping" else ""
    yield (
        "State",
        row["state"],
        "; ".join(filter(None, [f"step {row['step']} of {row['steps'] or '?'}", epochs, early, row["trouble"]])),
    )
    losses = [
        ("Validation loss", row["eval_loss"], f"from {tables.text_of(row['eval_loss_first'])}"),
        (listing.AXOLOTL_EVAL_LOSS, row["eval_loss_axolotl"], f"from {tables.text_of(summary.eval_loss_first)}"),
        ("Training loss", summary.loss, "of the last step"),
    ]
    yield from [loss for loss in losses if loss[1] is not None][:1]
    if row["evaluation"]:
        yield "Evaluation", row["evaluation"], "its adapter, test rows or predictions have changed since; not shown"
    intervals = (reported.evaluation.scores.get("intervals") if reported.evaluation else None) or {}
    for score, column in reported.columns.items():
        if row[score] is not None and not column.metric.of_all:
            within = f"95 %: {tables.text_of(intervals[score])}" if intervals.get(score) else ""
            compared = row[f"{score}_difference"] is not None
            published = f"published {tables.text_of(row[f'{score}_published'])}" if compared else ""
            yield column.label, row[score], "; ".join(filter(None, [within, published]))
    costs = [
        ("Peak memory", row["peak_memory_gib"], "{:.2f} GiB", f"measured: {row['memory_kind']}"),
        ("Throughput", row["tokens_per_second"], "{:,.0f} tokens/s", "without padding"),
        ("Time in steps", row["train_seconds"] and _duration(row["train_seconds"]), "{}", ""),
    ]
    yield from ((name, form.format(value), remark) for name, value, form, remark in costs if value)
    others = "not the recipe's: no published score compares"
    if row["other_base_model"]:
        yield "Base model", reported.from_cwd(row["other_base_model"]), others
    if row["other_data"]:
        named = [str(dataset.get("path")) for _, dataset in datafiles.datasets(reported.config, "datasets")]
        yield "Data", ", ".join(map(reported.from_cwd, named)), others


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def headings(runs: Sequence[ReportedRun]) -> dict[str, Column]:
    """What some runs are scored with, by headings; two metrics of one name have two."""
    return registry.distinct(column for reported in runs for column in reported.columns.values())


def scored_rows(runs: Sequence[ReportedRun]) -> list[tuple[str, Column, dict[str, Sequence[Row]]]]:
    """For each score that rows have its heading and column, and the rows of the runs that are scored with it."""
    return [
        (heading, column, {r.label: r.predictions for r in runs if column.same_scores(r.columns.get(column.name))})
        for heading, column in headings(runs).items()
        if column.metric.of_rows
    ]


def overview(reported: ReportedRun, scored: Mapping[str, Column]) -> Row:
    """A run's row in the table of several, with a column for the first score of each of these.

    Args:
        reported: the run.
        scored: the scores by their headings.
    """
    row = reported.row
    return {
        "run": reported.label,
        "recipe": row["recipe"],
        "state": row["state"],
        "steps": f"{row['step']} of {row['steps'] or '?'}",
        "eval loss, first": row["eval_loss_first"],
        "last": row["eval_loss"],
        listing.AXOLOTL_EVAL_LOSS: row["eval_loss_axolotl"] if row["eval_loss"] is None else None,
        **{
            heading: row[column.name] if column.same_scores(reported.columns.get(column.name)) else None
            for heading, column in scored.items()
        },
        "peak GiB": row["peak_memory_gib"],
        "of": row["memory_kind"],
        "tokens/s": _whole(row["tokens_per_second"]),
        "time in steps": _duration(row["train_seconds"]),
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def scores(runs: Sequence[ReportedRun]) -> list[Row]:
    """A row for each score, with columns for each run that was evaluated, for its base model if that was, and for the
    published scores that the run tries for."""
    columns: dict[str, dict[str, str | None]] = {}
    by_heading = headings(runs)
    for reported in runs:
        if not reported.evaluation:
            continue
        columns[reported.label] = _column(reported.evaluation, by_heading)
        for name, other in reported.decoded.items():
            columns[f"{reported.label}: {name}"] = _column(other, by_heading)
        if reported.base_evaluation:
            columns[f"{reported.label}: base model alone"] = _column(reported.base_evaluation, by_heading)
        aim = comparable.aim(reported.run)
        published: dict[str, str | None] = {
            str(registry.heading(column, by_heading)): tables.plus_minus(score.value, score.spread)
            for name, column in reported.columns.items()
            if aim and (score := aim.scores.get(name)) and reported.row[f"{name}_difference"] is not None
        }
        if published:
            columns[f"{reported.label}: published"] = published
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [{"score": name} | {label: column.get(name) for label, column in columns.items()} for name in names]


def _column(evaluation: Evaluation, by_heading: Mapping[str, Column]) -> dict[str, str | None]:
    """An evaluation's scores as text, with their intervals."""
    column: dict[str, str | None] = {}
    intervals = evaluation.scores.get("intervals") or {}
    titles = {name: registry.heading(scored, by_heading) for name, scored in evaluation.columns.items()}
    judged = {c.recorded("bertscore"): c for c in evaluation.columns.values() if record_of(c, evaluation.scores)}
    for key, value in evaluation.scores.items():
        title = titles.get(key) or _OTHERS.get(key, key)
        if key in judged:
            column[f"{judged[key].label} by"] = str(value.get("model"))
        elif isinstance(value, int | float | str):
            within = f" ({tables.text_of(intervals[key])})" if intervals.get(key) else ""
            column[title] = f"{tables.text_of(value)}{within}"
    return column


def scored_on(reported: ReportedRun) -> str:
    """The rows that the evaluation of a run is of."""
    assert reported.evaluation
    settings = reported.evaluation.settings
    elsewhere = "" if settings.engine == evaluations.REFERENCE else f", predictions by {settings.engine}"
    elsewhere = ", predictions made elsewhere" if settings.made_elsewhere else elsewhere
    return f"{settings.rows_in_words} of {reported.from_cwd(settings.data)}{elsewhere}"


def settings(reported: ReportedRun) -> dict[str, Any]:
    """A run's settings with the source of each, and its differences from its recipe."""
    run = reported.run
    of_recipe: dict[str, str] = {}
    note = ""
    file = paths.recipe_file(run.recipe)
    file = file if file.is_file() else Path(run.cwd, run.recipe_file)
    if not file.is_file():
        note = f"The recipe's file, {run.recipe_file}, is no longer there, so its sources are not known."
    else:
        of_recipe = yamlfiles.sources(file)
        if sha256(file) != run.recipe_sha256:
            note = "The recipe has changed since the run; the sources are today's."
    why = {difference.key: difference.why for difference in run.differences}
    of_parts = {key.partition(".")[0]: reason for key, reason in why.items()}
    sources = of_parts | of_recipe | why  # a difference below a key that the recipe has is not the source of all of it
    shown = [
        {
            "setting": key,
            "value": _on_one_line(value),
            "source": sources.get(key) or sources.get(key.partition(".")[0]) or "the run's own",
        }
        for key, value in config.flatten(reported.config)
        if not is_secret(key, value)
    ]
    differs = [
        {"setting": d.key, "recipe": _on_one_line(d.recipe), "this run": _on_one_line(d.run), "why": d.why}
        for d in run.differences
        if not is_secret(d.key, [d.recipe, d.run])
    ]
    return {"label": reported.label, "recipe": run.recipe, "differs": differs, "all": shown, "note": note}


def _on_one_line(value: Any) -> str | None:
    """A setting's value as YAML has it on one line."""
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def _facts(record: Any) -> list[tuple[str, str | None]]:
    """The keys and values of a record, without secrets."""
    return [(key, _on_one_line(value)) for key, value in config.flatten(record) if not is_secret(key, value)]


def provenance(reported: ReportedRun) -> dict[str, Any]:
    """All that is recorded of how a run was made."""
    run = reported.run
    launches = [
        {
            "started": launch.started,
            "ended": launch.ended,
            "exit code": launch.exit_code,
            "resumed from": launch.resumed_from,
            "command": " ".join(launch.command),
        }
        for launch in run.launches
    ]
    data = [
        {"file": reported.from_cwd(file.path), "rows": file.rows, "bytes": f"{file.bytes:,}", "SHA-256": file.sha256}
        for file in run.data
    ]
    return {
        "label": reported.label,
        "data": data,
        "launches": launches,
        "record": _facts(
            run.model_dump(exclude={"differences", "of_variant", "data", "launches"})
        ),  # these have their own tables
        "evaluation": _facts(reported.evaluation.model_dump()) if reported.evaluation else [],
    }


def sweep_row(row: Row, keys: Sequence[str], scored: Mapping[str, Column]) -> Row:
    """A member's row, with its values of the keys that vary, and its scores."""
    scores: Row = {}
    for score, title in ({"eval_loss": "eval loss"} | {name: column.label for name, column in scored.items()}).items():
        scores |= {title: row[score], f"{title} 95 %": row.get(f"{score}_interval")}
    return {
        "member": row["member"],
        **{key: _on_one_line(row["values"].get(key)) for key in keys},
        **scores,
        "trainable": None if row["trainable"] is None else f"{row['trainable']:,}",
        "share": None if row["trainable_share"] is None else f"{row['trainable_share']:.2%}",
        "measured GiB": row["peak_memory_gib"],
        "of": row["memory_kind"],
        "planned GiB": row["planned_gib"],
        "minutes": None if row["train_seconds"] is None else row["train_seconds"] / 60,
        "tokens/s": _whole(row["tokens_per_second"]),
        "Pareto front": "yes" if row["pareto"] else "",
        "best": "yes" if row["best"] else "",
        "runs": ", ".join(row["states"]),
    }
