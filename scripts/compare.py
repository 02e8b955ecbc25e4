"""Two sets of predictions on the same rows, and the scores of one by groups: `recipe results --compare`, `--by`."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from . import bleu, intervals
from .errors import UserError
from .evaluate import read_predictions
from .rundir import find_run
from .score import PER_ROW, Row, read_rows, with_scores

LENGTHS = (10, 25, 50)  # tokens: the bounds between groups of references by length


def predictions(name: str, runs: Path) -> list[Row]:
    """The scored rows of a run, or of a JSONL file with the fields reference and prediction.

    Raises:
        UserError: there is neither, or the run was not evaluated.
    """
    if name.endswith(".jsonl"):
        rows = read_rows(Path(name))
    else:
        folder = find_run(name, runs).path
        rows = read_predictions(folder)
        if not rows:
            raise UserError(f"{folder}: not evaluated; `recipe evaluate {folder}` comes first")
    return rows if "bleu4" in rows[0] else with_scores(rows)


def pair(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The rows that two sets of predictions have in common, in the order of the first.

    Rows are told by `idx`, their position in the test file, where both sets have it, otherwise by their order.

    Raises:
        UserError: they have none in common, or the references of a pair differ.
    """
    if "idx" in a[0] and "idx" in b[0]:
        by_idx = {row["idx"]: row for row in b}
        pairs = [(row, by_idx[row["idx"]]) for row in a if row["idx"] in by_idx]
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


def compare(a: Sequence[Row], b: Sequence[Row]) -> list[dict[str, Any]]:
    """Per score: both means on the rows in common and what `intervals.paired` says of them."""
    pairs = pair(a, b)
    found = []
    for name in PER_ROW:
        if all(name in row for rows in pairs for row in rows):
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
