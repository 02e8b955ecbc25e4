"""Two sets of predictions on the same rows, and the scores of one by groups: `recipe results --compare`, `--by`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..runs.lookup import find_run
from . import bleu, intervals
from .evaluations import Row, read_predictions, read_scores
from .metrics import PER_ROW
from .score import read_rows, with_scores

LENGTHS = (10, 25, 50)  # tokens: the bounds between groups of references by length


@dataclass
class Predictions:
    """Scored rows, and of a run's whether it was a rehearsal and how their BERTScore was made.

    Attributes:
        bertscore: the judge's record; None where the rows are a file's, or have none.
    """

    rows: list[Row]
    rehearsal: bool | None = None
    bertscore: dict[str, Any] | None = None


def predictions(name: str, runs: Path) -> Predictions:
    """The rows of a run, or of a JSONL file with the fields reference and prediction, scored.

    Raises:
        UserError: there is neither, or the run was not evaluated.
    """
    if name.endswith(".jsonl"):
        return Predictions(with_scores(read_rows(Path(name))))
    folder = find_run(name, runs).path
    rows, made = read_predictions(folder), read_scores(folder)
    if not rows or not made:
        raise UserError(f"{folder}: not evaluated; `recipe evaluate {folder}` comes first")
    judged = [row.get("bertscore_f1") for row in rows]
    scored = with_scores(rows)
    by = made.scores.get("bertscore")
    if by:
        scored = [row | {"bertscore_f1": value} for row, value in zip(scored, judged, strict=True)]
    return Predictions(scored, made.rehearsal, by)


def pair(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows that two sets of predictions have in common, in the order of the first.

    Rows are told by `idx`, their position in the test file, where both sets have it, otherwise by their order. A
    position that one set has more often counts so often.

    Raises:
        UserError: they have none in common, or the references of a pair differ.
    """
    if "idx" in a[0] and "idx" in b[0]:
        left, right = _by_idx(a), _by_idx(b)
        pairs = []
        for idx in (idx for idx in left if idx in right):
            ours, theirs = left[idx], right[idx]
            count = max(len(ours), len(theirs))
            pairs += [(ours[min(i, len(ours) - 1)], theirs[min(i, len(theirs) - 1)]) for i in range(count)]
    elif len(a) == len(b):
        pairs = list(zip(a, b, strict=True))
    else:
        raise UserError(f"--compare: {len(a)} rows and {len(b)}, and not both have idx to tell which are the same")
    for one, other in pairs:
        if one["reference"].split() != other["reference"].split():
            where = one.get("idx", one.get("row"))
            raise UserError(f"--compare: row {where} has another reference in each: not predictions for the same rows")
    if not pairs:
        raise UserError("--compare: no row is in both")
    return pairs


def _by_idx(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["idx"], []).append(row)
    return found


def compare(a: Predictions, b: Predictions) -> list[dict[str, Any]]:
    """Per score: both means on the rows in common and what `intervals.paired` says of them.

    BERTScore is compared only where the same judge made both.

    Raises:
        UserError: one is a rehearsal's and the other a real run's, or they cannot be paired, see `pair`.
    """
    if {a.rehearsal, b.rehearsal} == {True, False}:
        raise UserError("--compare: one of the runs is a rehearsal, which compares with rehearsals only")
    pairs = pair(a.rows, b.rows)
    found = []
    for name in PER_ROW:
        if name == "bertscore_f1" and (a.bertscore is None or a.bertscore != b.bertscore):
            continue
        left, right = ([rows[side][name] for rows in pairs] for side in (0, 1))
        means = {"a": sum(left) / len(pairs), "b": sum(right) / len(pairs)}
        found.append({"score": name, "rows": len(pairs), **means, **intervals.paired(left, right)})
    return found


def by_group(rows: Sequence[Row], key: str) -> list[dict[str, Any]]:
    """The means of scores by `lang`, or by `length` of the reference in tokens, with BLEU-4's interval.

    Raises:
        UserError: the rows do not tell their language.
    """
    if key == "lang" and not any(row.get("lang") for row in rows):
        raise UserError(
            "--by lang: these rows do not tell their language; `recipe data prepare` writes it for test rows"
        )
    group = _length if key == "length" else lambda row: (0, str(row.get("lang")))
    found = []
    for (_, name), members in groupby(sorted(rows, key=group), key=group):
        some = list(members)
        scores = [score for score in PER_ROW if score in some[0]]
        means = {score: sum(row[score] for row in some) / len(some) for score in scores}
        within = intervals.interval([row["bleu4"] for row in some])
        found.append({key: name, "rows": len(some), **means, "bleu4_interval": within})
    return found


def _length(row: Row) -> tuple[int, str]:
    tokens = len(bleu.tokens(row["reference"]))
    for low, high in zip((0, *LENGTHS), LENGTHS, strict=False):
        if tokens <= high:
            return high, f"{low + 1 if low else 0} to {high} tokens"
    return LENGTHS[-1] + 1, f"more than {LENGTHS[-1]} tokens"
