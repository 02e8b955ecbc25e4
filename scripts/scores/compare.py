"""Two sets of predictions on the same rows, and the scores of one by groups: `recipe results --compare`, `--by`."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import Row
from ..runs.lookup import find_run
from . import bleu, intervals
from .evaluations import read_predictions, read_scores
from .metrics import PER_ROW
from .score import read_rows, with_scores

LENGTHS = (10, 25, 50)  # tokens: the bounds between groups of references by length


@dataclass
class Predictions:
    """Scored rows; of a run also whether it was a rehearsal, and its judge.

    Attributes:
        bertscore: the judge's record; None where the rows come from a file, or have no BERTScore.
    """

    rows: list[Row]
    rehearsal: bool | None = None
    bertscore: dict[str, Any] | None = None


def predictions(name: str, runs: Path) -> Predictions:
    """The rows of a run, or of a JSONL file with the fields reference and prediction, scored.

    Raises:
        UserError: there is neither, or the run was not evaluated.
    """
    if Path(name).is_file():
        return Predictions(with_scores(read_rows(Path(name))))
    folder = find_run(name, runs).path
    rows = read_predictions(folder)
    evaluation = read_scores(folder)
    if not rows or not evaluation:
        raise UserError(f"{folder}: not evaluated; `recipe evaluate {folder}` comes first")
    judged_by = evaluation.scores.get("bertscore")
    scored = with_scores(rows)
    if judged_by:
        scored = [new | {"bertscore_f1": row.get("bertscore_f1")} for new, row in zip(scored, rows, strict=True)]
    return Predictions(scored, evaluation.rehearsal, judged_by)


def pair(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows that two sets of predictions have in common, in the order of the first.

    Rows are matched by `idx`, their position in the test file, where both sets have it, otherwise by their order. A
    position that occurs several times in one set counts as often.

    Raises:
        UserError: they have none in common, or the references of a pair differ.
    """
    if "idx" in a[0] and "idx" in b[0]:
        pairs: list[tuple[Row, Row]] = []
        by_idx = _by_idx(b)
        for idx, ours in _by_idx(a).items():
            if theirs := by_idx.get(idx):
                pairs += zip_longest(ours, theirs, fillvalue=min(ours, theirs, key=len)[-1])
    elif len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
    else:
        raise UserError(f"--compare: {len(a)} rows and {len(b)}, and not both have the field idx to match them by")
    for row, other in pairs:
        if row["reference"].split() != other["reference"].split():
            where = row.get("idx", row.get("row"))
            raise UserError(f"--compare: row {where} has another reference in each: not predictions for the same rows")
    if not pairs:
        raise UserError("--compare: no row is in both")
    return pairs


def _by_idx(rows: Sequence[Row]) -> dict[int, list[Row]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["idx"]].append(row)
    return grouped


def compare(a: Predictions, b: Predictions) -> list[dict[str, Any]]:
    """Per score: both means on the rows in common, and how they differ, see `intervals.paired`.

    BERTScore is compared only where the same judge made both.

    Raises:
        UserError: one is a rehearsal's and the other a real run's, or they cannot be paired, see `pair`.
    """
    if {a.rehearsal, b.rehearsal} == {True, False}:
        raise UserError("--compare: one of the runs is a rehearsal, which compares with rehearsals only")
    pairs = pair(a.rows, b.rows)
    same_judge = a.bertscore is not None and a.bertscore == b.bertscore
    compared = []
    for name in PER_ROW:
        if same_judge or name != "bertscore_f1":
            left, right = ([rows[side][name] for rows in pairs] for side in (0, 1))
            means = {"a": sum(left) / len(pairs), "b": sum(right) / len(pairs)}
            compared.append({"score": name, "rows": len(pairs), **means, **intervals.paired(left, right)})
    return compared


def by_group(rows: Sequence[Row], key: str) -> list[dict[str, Any]]:
    """The means of scores by `lang`, or by `length` of the reference in tokens, with BLEU-4's interval.

    Raises:
        UserError: no row has its language.
    """
    if key == "lang" and not any(row.get("lang") for row in rows):
        raise UserError("--by lang: these rows have no field lang; `recipe data prepare` writes it for test rows")
    group = _length if key == "length" else lambda row: (0, str(row.get("lang")))
    groups = []
    for (_, name), members in groupby(sorted(rows, key=group), key=group):
        of_group = list(members)
        scores = [score for score in PER_ROW if score in of_group[0]]
        means = {score: sum(row[score] for row in of_group) / len(of_group) for score in scores}
        within = intervals.interval([row["bleu4"] for row in of_group])
        groups.append({key: name, "rows": len(of_group), **means, "bleu4_interval": within})
    return groups


def _length(row: Row) -> tuple[int, str]:
    i = bisect_left(LENGTHS, len(bleu.tokens(row["reference"])))
    if i == len(LENGTHS):
        return i, f"more than {LENGTHS[-1]} tokens"
    return i, f"{LENGTHS[i - 1] + 1 if i else 0} to {LENGTHS[i]} tokens"
