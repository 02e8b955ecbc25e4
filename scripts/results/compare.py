"""Two runs compared, their trainings and their predictions: `recipe results A B`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .. import tables
from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row
from ..base.progress import say
from ..configs import config
from ..metrics.metric import Column
from ..runs.records import Run
from ..runs.rundir import RunDir, find_run
from ..scores import intervals
from ..scores.evaluations import changed, current, read_predictions, read_scores
from ..scores.score import columns_of, declared_models, model_record, read_rows, with_scores


@dataclass
class Predictions:
    """Scored rows.

    Attributes:
        columns: what each row is scored with, by name.
        models: the record of the scorer model of each column that has one.
    """

    rows: list[Row]
    columns: dict[str, Column]
    models: dict[str, dict[str, Any] | None] = field(default_factory=dict)


def several(names: Sequence[str], runs: Path, asked: Sequence[str] = ()) -> list[Predictions]:
    """The rows of runs, or of JSONL files with the fields reference and prediction, scored.

    A run's are scored as its evaluation was, a file's as the runs beside it, and both with the metrics asked for too;
    without either a file's are scored with the usual ones.

    Raises:
        UserError: there is no such run or file, the run was not evaluated, or there is no such metric.
    """
    named = columns_of(None, asked) if asked else {}
    found = {name: _of_run(name, runs, named) for name in names if not Path(name).is_file()}
    beside: dict[str, Column] = {}
    for of_run in found.values():
        beside |= of_run.columns
    for name in names:
        if name not in found:
            columns = beside | named or columns_of()
            plain = {name: column for name, column in columns.items() if name not in declared_models(columns)}
            found[name] = _scored(read_rows(Path(name)), plain)
    return [found[name] for name in names]


def _of_run(name: str, runs: Path, named: dict[str, Column]) -> Predictions:
    folder = find_run(name, runs).path
    rows = read_predictions(folder)
    evaluation = read_scores(folder)
    if not rows or not evaluation or changed(folder, evaluation):
        problem = changed(folder, evaluation) or "not evaluated"
        raise UserError(f"{folder}: {problem}; `recipe evaluate {folder}` comes first")
    scored = _scored(rows, evaluation.columns | named)
    for judged in declared_models(scored.columns):
        scored.models[judged] = model_record(scored.columns[judged], evaluation.scores)
        for new, row in zip(scored.rows, rows, strict=True):
            new[judged] = row.get(judged)
    return scored


def _scored(rows: Sequence[Row], columns: dict[str, Column]) -> Predictions:
    """Rows scored with those of some columns that have a score for each row and need no judge."""
    of_rows = {name: column for name, column in columns.items() if column.metric.of_rows}
    return Predictions(with_scores(rows, of_rows, dict.fromkeys(declared_models(of_rows))), of_rows)


def pair(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows that two sets of predictions have in common, in the order of the first.

    Rows are matched by `idx`, their position in the test file, where all have it, otherwise by their order. A position
    that occurs several times in one set counts as often.

    Raises:
        UserError: they have none in common, or the references of a pair differ.
    """
    if all(isinstance(row.get("idx"), int | str) for row in (*a, *b)):
        pairs: list[tuple[Row, Row]] = []
        by_idx = _by_idx(b)
        for idx, ours in _by_idx(a).items():
            if theirs := by_idx.get(idx):
                pairs += zip_longest(ours, theirs, fillvalue=min(ours, theirs, key=len)[-1])
    elif len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
    else:
        raise UserError(
            f"--compare: {len(a)} rows and {len(b)}, and not all have their position, idx, to match them by"
        )
    for row, other in pairs:
        if row["reference"].split() != other["reference"].split():
            where = row.get("idx", row.get("row"))
            raise UserError(f"--compare: row {where} has another reference in each: not predictions for the same rows")
    if not pairs:
        raise UserError("--compare: no row is in both")
    return pairs


def _by_idx(rows: Sequence[Row]) -> dict[int | str, list[Row]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["idx"]].append(row)
    return grouped


def compare(a: Predictions, b: Predictions) -> list[dict[str, Any]]:
    """Per score that both have: the means on the rows in common, and how they differ, see `intervals.paired`.

    What a judge makes is compared only where the same one made both.

    Raises:
        UserError: they cannot be paired, see `pair`.
    """
    pairs = pair(a.rows, b.rows)
    compared = []
    for name, column in a.columns.items():
        same_model = name not in a.models or (a.models[name] and a.models[name] == b.models.get(name))
        if column.same_scores(b.columns.get(name)) and same_model:
            left, right = ([rows[side][name] for rows in pairs] for side in (0, 1))
            means = {"a": sum(left) / len(pairs), "b": sum(right) / len(pairs)}
            compared.append({"score": name, "rows": len(pairs), **means, **intervals.paired(left, right)})
    return compared


_SPARE = ["equal", "rows", "p_wilcoxon", "better", "worse"]


@dataclass(frozen=True)
class Divergence:
    """How far the losses of two trainings, a and b, are equal.

    Attributes:
        first, last: the first and the last step whose loss both have recorded.
        step: the first of these whose losses differ; None where all are equal, to the last bit.
        losses: the two losses of that step.
        differences: the settings in which the runs differ, with the values of a and b.
    """

    first: int
    last: int
    step: int | None
    losses: tuple[float | None, float | None] | None
    differences: dict[str, tuple[Any, Any]]

    def lines(self) -> list[str]:
        """In words."""
        said = f"The losses of steps {self.first} to {self.last}, which both have recorded, are equal."
        if self.step and self.losses:
            said = f"The losses differ from step {self.step} on: {self.losses[0]} in a, {self.losses[1]} in b."
        differing = [f"{name}: {old} -> {new}" for name, (old, new) in self.differences.items()]
        by_record = "What differs between the runs, by their records:" if differing else ""
        if self.step and not differing:
            by_record = "By their records, config, data, packages and machine are the same."
        return [said, *filter(None, [by_record]), *differing]


def show(pair: tuple[str, str], runs: Path, metrics: Sequence[str], form: tables.Form) -> None:
    """Two runs, or a run and a file of predictions, on stdout: where losses diverge, then how the scores differ.

    Runs need not be evaluated for the first, and files have none.

    Args:
        pair: runs, or files of predictions.
        runs: the folder of the runs.
        metrics: what to score with beside what the runs were.
        form: the form; in Markdown and CSV only the scores go to stdout.

    Raises:
        UserError: there is no such run or file, they cannot be compared, or nothing of them can.
    """
    folders = {name: find_run(name, runs) for name in pair if not Path(name).is_file()}
    names = [str(folders[name].path) if name in folders else name for name in pair]
    diverged = _divergence([folders[name] for name in pair]) if len(folders) == len(set(pair)) else None
    evaluated = [bool(current(folder.path) and read_predictions(folder.path)) for folder in folders.values()]
    unscored = [name for name, scored in zip(names, evaluated, strict=False) if not scored] if diverged else []
    rows = None if unscored else compare(*several(names, runs, metrics))
    if form == "json":
        tables.print_json({"training": asdict(diverged) if diverged else None, "scores": rows})
        return
    title = f"a: {pair[0]}, b: {pair[1]}"
    if diverged:
        print_line = say if form in ("csv", "md") else tables.print_text
        for line in (f"Trainings, {title}", *diverged.lines(), *([""] if form == "table" else [])):
            print_line(line)
    if rows is not None:
        tables.write(rows, form, title, spare=_SPARE)
        if len(rows) > 1:
            say(f"{len(rows)} metrics: their intervals and p are not corrected for multiple comparisons")
    else:
        which = f"{unscored[0]} is" if len(unscored) == 1 else "they are"
        say(f"their predictions are not compared: {which} not evaluated; `recipe evaluate {unscored[0]}` comes first")


def _divergence(folders: Sequence[RunDir]) -> Divergence | None:
    """Where the losses of two runs diverge; None, with a message, if they have no step in common.

    Raises:
        UserError: one is a rehearsal, and the other a real run.
    """
    a, b = (folder.read() for folder in folders)
    if a.rehearsal != b.rehearsal:
        raise UserError("--compare: one of the runs is a rehearsal, which compares with rehearsals only")
    of_a, of_b = (
        {record["step"]: record["loss"] for record in folder.read_metrics() if "loss" in record} for folder in folders
    )
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        say("their trainings are not compared: they have recorded the loss of no step in common")
        return None
    step = next((step for step in common if of_a[step] != of_b[step]), None)
    settings = [_settings(yamlfiles.read_yaml(folder.config), run) for folder, run in zip(folders, (a, b), strict=True)]
    keys = [key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)]
    return Divergence(
        first=common[0],
        last=common[-1],
        step=step,
        losses=(of_a[step], of_b[step]) if step is not None else None,
        differences={key: (settings[0].get(key), settings[1].get(key)) for key in keys},
    )


def _settings(cfg: yamlfiles.Config, run: Run) -> dict[str, Any]:
    """What the steps of a run may depend on, by name, as far as it is recorded."""
    machine = run.provenance
    gpus = [f"{gpu.get('name')}, driver {gpu.get('driver')}" for gpu in machine.get("gpus") or []]
    kept = {key: value for key, value in cfg.items() if not config.TRACKING.match(key)}
    return {
        **{key: value for key, value in config.flatten(kept) if key not in config.OF_THE_RUN},
        **{f"rows of {file.path}": f"sha256 {file.sha256[:12]}" for file in run.data},
        **{f"version of {name}": version for name, version in (machine.get("packages") or {}).items()},
        "version of python": machine.get("python"),
        "CUDA of torch": machine.get("cuda"),
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "GPUs": "; ".join(gpus) or None,
        "ranks": run.ranks,
        "Axolotl's arguments": " ".join(run.axolotl_arguments) or None,
        "resumed from": ", ".join(launch.resumed_from for launch in run.launches if launch.resumed_from) or None,
    }
