"""Two runs or sets of predictions compared, and scores by groups of rows: `recipe results --compare`, `--by`."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from .. import tables
from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row, sha256
from ..base.progress import say
from ..configs import config
from ..metrics.metric import Column
from ..metrics.text import words
from ..runs.records import Run
from ..runs.rundir import RunDir, find_run
from ..scores import intervals
from ..scores.columns import columns_of, declared_models, model_record
from ..scores.evaluations import ADAPTER, changed, current, read_predictions, read_scores
from ..scores.score import read_rows, with_scores

LENGTHS = (10, 25, 50)  # tokens, as `words` divides a text: the bounds between groups of references by length


@dataclass
class Predictions:
    """Scored rows; of a run also whether it was a rehearsal.

    Attributes:
        columns: what each row is scored with, by name.
        models: the record of the scorer model of each column that has one.
    """

    rows: list[Row]
    columns: dict[str, Column]
    rehearsal: bool | None = None
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
    scored.rehearsal = evaluation.rehearsal
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
        UserError: one is a rehearsal's and the other a real run's, or they cannot be paired, see `pair`.
    """
    if {a.rehearsal, b.rehearsal} == {True, False}:
        raise UserError("--compare: one of the runs is a rehearsal, which compares with rehearsals only")
    pairs = pair(a.rows, b.rows)
    compared = []
    for name, column in a.columns.items():
        same_model = name not in a.models or (a.models[name] and a.models[name] == b.models.get(name))
        if column.same_scores(b.columns.get(name)) and same_model:
            left, right = ([rows[side][name] for rows in pairs] for side in (0, 1))
            means = {"a": sum(left) / len(pairs), "b": sum(right) / len(pairs)}
            compared.append({"score": name, "rows": len(pairs), **means, **intervals.paired(left, right)})
    return compared


def by_group(of_one: Predictions, key: str) -> list[dict[str, Any]]:
    """The means of scores by `lang`, or by `length` of the reference in tokens, with the first one's interval.

    Raises:
        UserError: no row has its language.
    """
    rows = of_one.rows
    if key == "lang" and not any(row.get("lang") for row in rows):
        raise UserError("--by lang: these rows have no field lang; `recipe data prepare` writes it for test rows")
    group = _length if key == "length" else lambda row: (0, str(row.get("lang")))
    groups = []
    for (_, name), members in groupby(sorted(rows, key=group), key=group):
        of_group = list(members)
        scores = [score for score in of_one.columns if of_group[0].get(score) is not None]
        means = {score: sum(row[score] for row in of_group) / len(of_group) for score in scores}
        within = {f"{score}_interval": intervals.interval([row[score] for row in of_group]) for score in scores[:1]}
        groups.append({key: name, "rows": len(of_group), **means, **within})
    return groups


def _length(row: Row) -> tuple[int, str]:
    i = bisect_left(LENGTHS, len(words(row["reference"])))
    if i == len(LENGTHS):
        return i, f"more than {LENGTHS[-1]} tokens"
    return i, f"{LENGTHS[i - 1] + 1 if i else 0} to {LENGTHS[i]} tokens"


_SPARE = ["equal", "rows", "p_wilcoxon", "better", "worse"]


@dataclass(frozen=True)
class Divergence:
    """How far the losses of two trainings, a and b, are equal.

    Attributes:
        first, last: the first and the last step whose loss both have recorded.
        step: the first of these whose losses differ; None where all are equal, to the last bit.
        losses: the two losses of that step.
        same_adapter: whether the adapters are equal; None unless both runs are finished.
        differences: the settings in which the runs differ, with the values of a and b.
    """

    first: int
    last: int
    step: int | None
    losses: tuple[float | None, float | None] | None
    same_adapter: bool | None
    differences: dict[str, tuple[Any, Any]]

    def sentences(self) -> list[str]:
        """In words."""
        if self.step and self.losses:
            said = [f"The losses differ from step {self.step} on: {self.losses[0]} in a, {self.losses[1]} in b."]
        else:
            adapters = {None: "", True: ", and so are the adapters", False: ", but the adapters differ"}
            steps = f"steps {self.first} to {self.last}, which both have recorded"
            said = [f"The losses of {steps}, are equal{adapters[self.same_adapter]}."]
        if self.differences:
            return [*said, "What differs between the runs, by their records:"]
        if self.step:
            return [*said, "By their records, config, data, packages and machine are the same."]
        return said


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
    unscored = [str(folder.path) for folder in folders.values() if not _is_evaluated(folder)] if diverged else []
    rows = None if unscored else compare(*several(names, runs, metrics))
    if form == "json":
        tables.print_json({"training": asdict(diverged) if diverged else None, "scores": rows})
        return
    title = f"a: {pair[0]}, b: {pair[1]}"
    if diverged:
        _show_divergence(diverged, f"Trainings, {title}", form)
    if rows is not None:
        tables.write(rows, form, title, spare=_SPARE)
        if len(rows) > 1:
            say(f"{len(rows)} metrics: their intervals and p are not corrected for multiple comparisons")
    else:
        which = f"{unscored[0]} is" if len(unscored) == 1 else "they are"
        say(f"their predictions are not compared: {which} not evaluated; `recipe evaluate {unscored[0]}` comes first")


def _is_evaluated(folder: RunDir) -> bool:
    return bool(current(folder.path) and read_predictions(folder.path))


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
    adapters = [_adapter(folder, run) for folder, run in zip(folders, (a, b), strict=True)]
    settings = [_settings(yamlfiles.read_yaml(folder.config), run) for folder, run in zip(folders, (a, b), strict=True)]
    keys = [key for key in settings[0] | settings[1] if settings[0].get(key) != settings[1].get(key)]
    return Divergence(
        first=common[0],
        last=common[-1],
        step=step,
        losses=(of_a[step], of_b[step]) if step is not None else None,
        same_adapter=adapters[0] == adapters[1] if all(adapters) else None,
        differences={key: (settings[0].get(key), settings[1].get(key)) for key in keys},
    )


def _adapter(folder: RunDir, run: Run) -> str | None:
    """Hash of a finished run's adapter."""
    adapter = folder.output / ADAPTER
    return sha256(adapter) if run.state == "finished" and adapter.is_file() else None


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


def _show_divergence(diverged: Divergence, title: str, form: tables.Form) -> None:
    differences = (f"{name}: {old} -> {new}" for name, (old, new) in diverged.differences.items())
    for line in (title, *diverged.sentences(), *differences):
        if form in ("csv", "md"):
            say(line)
        else:
            tables.print_text(line)
    if form not in ("csv", "md"):
        print()
