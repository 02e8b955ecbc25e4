"""Predictions that authors published: read, matched with the study's test rows, and scored as those of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, sha256, write_atomically, write_rows
from ..base.locks import held
from ..base.machine import now
from ..base.progress import Bar, say
from ..checks.rows import fields_of
from ..data import prepare
from ..data.published import Predictions, Texts
from ..data.study import Study
from ..metrics import registry
from ..metrics.metric import Column
from . import evaluation_rows, judges
from .evaluations import PREDICTIONS, SCORES
from .score import VERSION, below, code_sha256, read_rows, score


class Released(BaseModel):
    """The content of the scores.json of published predictions; see `score.score` for the scores.

    Attributes:
        test_set: the study's set of test rows that was scored.
        files: the checksums of the files that they are in, by name.
        verified: whether the study has these checksums.
        matched: whether the references were compared with those of the study's prepared test rows.
    """

    made: str
    scores: dict[str, Any]
    version: int
    code_sha256: str
    test_set: str
    files: dict[str, str]
    verified: bool
    matched: bool

    @property
    def columns(self) -> dict[str, Column]:
        """What it scored with, by name."""
        return registry.recorded(self.scores)


def read_released(folder: Path) -> Released | None:
    """The scores in a folder, or None where there are none or their file is damaged."""
    try:
        return Released.model_validate_json((folder / SCORES).read_bytes())
    except (OSError, ValueError):
        return None


def test_sets(of_study: Study, own: str) -> list[str]:
    """The test sets that predictions are scored on: their own, and if that is all test rows, the subset of the
    published scores too."""
    scored_on = of_study.data.test_set
    return [scored_on, own] if own == "test" and scored_on in of_study.data.subsets else [own]


def evaluate(
    of_study: Study,
    recipe: str,
    predictions: Predictions,
    own: str,
    fetched: Mapping[str, Row],
    folders: Mapping[str, Path],
    judged: judges.Judges,
) -> None:
    """Score published predictions on some test sets; what was scored before in the same way is not scored again.

    Args:
        recipe: the recipe of the study whose prepared rows they are compared with.
        predictions: where they are.
        own: the test set that they are of.
        fetched: the rows of `fetch.fetch` for their files, by name.
        folders: for each of `test_sets` the folder for its predictions.jsonl and scores.json.
        judged: who judges the metrics that take a judge.

    Raises:
        UserError: a file is damaged, or the rows are not those of the test set.
        WorkFailed: a judge cannot be loaded.
    """
    rows, matched = read(of_study, recipe, predictions, own)
    files = {name: str(fetched[name]["sha256"]) for name in predictions.files}
    verified = all(fetched[name]["verified"] for name in predictions.files)
    for test_set, where in folders.items():
        chosen = rows
        if test_set != own:
            placed = {row["idx"]: row for row in rows}
            subset = of_study.data.subsets[test_set]
            drawn = prepare.choose(subset, of_study.folder, [(idx, b"", None) for idx in placed])
            chosen = [placed[idx] for idx, *_ in drawn]
        where.mkdir(parents=True, exist_ok=True)
        with held(where / ".evaluation.lock", "another evaluation is running"):
            former = read_released(where)
            if (
                former
                and (former.files, former.matched, former.verified) == (files, matched, verified)
                and _current(former, of_study, judged)
            ):
                say(f"{where / SCORES}: complete, scored in the same way")
                continue
            judges.require(judged.values())
            with Bar(f"scoring {len(chosen):,} published predictions", 1):
                scores, scored = score(chosen, of_study.columns, judged)
            write_rows(where / PREDICTIONS, scored)
            result = Released(
                made=now(),
                scores=scores,
                version=VERSION,
                code_sha256=code_sha256(),
                test_set=test_set,
                files=files,
                verified=verified,
                matched=matched,
            )
            write_atomically(where / SCORES, result.model_dump_json(indent=1) + "\n")


def _current(former: Released, of_study: Study, judged: judges.Judges) -> bool:
    """Whether scores are what the study's metrics and these judges would give."""
    plain = {name: column for name, column in of_study.columns.items() if name not in judged}
    return (
        former.version == VERSION
        and all(column.same_scores(former.columns.get(name)) for name, column in plain.items())
        and judges.same(judged, of_study.columns, former.scores)
    )


def read(of_study: Study, recipe: str, predictions: Predictions, own: str) -> tuple[list[Row], bool]:
    """Rows with `row`, `idx`, the position in the study's test file where that is known, `reference` and `prediction`;
    and whether the references were compared with those of prepared rows.

    Raises:
        UserError: see `evaluate`.
    """
    assert predictions.prediction and predictions.reference
    raw = of_study.data.raw
    written, references = (_texts(texts, raw) for texts in (predictions.prediction, predictions.reference))
    file = raw / predictions.prediction.file
    if len(written) != len(references):
        raise UserError(f"{file}: {len(written):,} predictions for {len(references):,} references; each needs one")
    prepared, field = _prepared(of_study, recipe, own)
    known = of_study.data.files[of_study.data.raw_file("test")].rows if own == "test" else None
    expected = len(prepared) or (of_study.data.subsets[own].rows if own != "test" else known)
    if expected not in (None, len(written)):
        title = of_study.data.title_of(own)
        raise UserError(f"{file}: {len(written):,} predictions, but {title} of the study has {expected:,} rows")
    ours = [reference for row in prepared if (reference := _reference(row, field)) is not None]
    matched = bool(prepared) and len(ours) == len(prepared)
    if matched and (others := list(_unlike(of_study.first, ours, references))):
        theirs, mine = (" ".join(side[others[0]].split())[:60] for side in (references, ours))
        raise UserError(
            f"{raw / predictions.reference.file}: {len(others):,} of {len(ours):,} references are not those of the "
            f"study's {own}.jsonl, the first in row {others[0] + 1}: {theirs!r} instead of {mine!r}; name the "
            "test_set whose rows, in their order, these are"
        )
    places: list[int] | range = [row["idx"] for row in prepared if "idx" in row]
    places = places or range(len(written) if own == "test" else 0)  # of a subset they are not known without its rows
    positions = [{"idx": idx} for idx in places] or [{}] * len(written)
    return [
        {"row": i, **position, "reference": reference, "prediction": text}
        for i, (position, reference, text) in enumerate(zip(positions, references, written, strict=True))
    ], matched


def _texts(texts: Texts, folder: Path) -> list[str]:
    """The texts of a file: its lines, the last of which need not end, or a field of its rows."""
    file = folder / texts.file
    if texts.field is None:
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{file}: not text in UTF-8") from None
        return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    found = [below(row, texts.field) for row in read_rows(file, ())]
    if wrong := next((number for number, text in enumerate(found, start=1) if not isinstance(text, str)), None):
        raise UserError(f"{file}: row {wrong} has no text field {texts.field}; study.yaml names that field")
    return found


def _prepared(of_study: Study, recipe: str, test_set: str) -> tuple[list[Row], str]:
    """The rows of a test set, where they are prepared here as a recipe reads them, and the field of their answers."""
    entry = yamlfiles.read_yaml(paths.recipe_file(recipe))["datasets"][0]
    kind = fields_of(entry)
    field = (kind.reference if kind else None) or entry.get("field_messages") or "messages"
    file = Path(str(entry["path"])).with_name(f"{test_set}.jsonl")
    if not file.is_file() or evaluation_rows.test_set(file, sha256(file)) != test_set:
        say(f"{file}: not prepared here, so that the published references are compared with no rows of the study")
        return [], field
    return read_rows(file, ()), field


def _reference(row: Row, field: str) -> str | None:
    """The answer of a prepared row: a text field, or the last message of a chat."""
    value = row.get(field)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None


def _unlike(column: Column, ours: list[str], theirs: list[str]) -> Iterator[int]:
    """The rows whose two references differ by more than white space, and which a metric tells apart.

    The second is for references in another form, such as another word in front of the same number.
    """
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        one, other = (" ".join(text.split()) for text in pair)
        if one == other:
            continue
        of_rows = None if column.judged else column.metric.of_rows
        if of_rows is None or of_rows([pair], column.parameters) != [column.metric.high]:
            yield i
