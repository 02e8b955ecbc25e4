"""Two sets of predictions on the same rows, and the scores of one by groups: `recipe results --compare`, `--by`."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row
from ..metrics.metric import Column
from ..metrics.text import words
from ..runs.lookup import find_run
from . import intervals, judges
from .columns import columns_of
from .evaluations import changed, read_predictions, read_scores
from .score import read_rows, with_scores

LENGTHS = (10, 25, 50)  # tokens, as `words` divides a text: the bounds between groups of references by length


@dataclass
class Predictions:
    """Scored rows; of a run also whether it was a rehearsal.

    Attributes:
        columns: what each row is scored with, by name.
        judges: the record of the judge of each column that has one.
    """

    rows: list[Row]
    columns: dict[str, Column]
    rehearsal: bool | None = None
    judges: dict[str, dict[str, Any] | None] = field(default_factory=dict)


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
            plain = {name: column for name, column in columns.items() if name not in judges.declared_in(columns)}
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
    for judged in judges.declared_in(scored.columns):
        scored.judges[judged] = judges.record_of(scored.columns[judged], evaluation.scores)
        for new, row in zip(scored.rows, rows, strict=True):
            new[judged] = row.get(judged)
    return scored


def _scored(rows: Sequence[Row], columns: dict[str, Column]) -> Predictions:
    """Rows scored with those of some columns that have a score for each row and need no judge."""
    of_rows = {name: column for name, column in columns.items() if column.metric.of_rows}
    return Predictions(with_scores(rows, of_rows, dict.fromkeys(judges.declared_in(of_rows))), of_rows)


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
        same_judge = name not in a.judges or (a.judges[name] and a.judges[name] == b.judges.get(name))
        if column.same_scores(b.columns.get(name)) and same_judge:
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
