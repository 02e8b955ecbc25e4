"""Files of an evaluation, predictions.jsonl and scores.json, and changes since then."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, field_validator

from ..base.errors import UserError
from ..base.files import (
    JsonObject,
    Row,
    digest,
    json_lines,
    parse_json,
    parts_of,
    read_bytes,
    read_rows,
    replacing,
    sha256,
)
from ..base.run_files import RunFile
from ..base.terminal import warn_once
from ..metrics import registry
from ..metrics.metric import Column, ScoreRecord
from ..training.run_record import FileState, RecordVersion, Run
from .settings import EvaluationSettings

VERSION = 5
"""Version of scores.json and of the scoring code.

Increase it when a change gives the same texts different scores, or renames or removes a field. Scores of another
version are then computed again.
"""
PREDICTIONS, SCORES, ADAPTER = RunFile.PREDICTIONS, RunFile.SCORES, RunFile.ADAPTER


class RowsState(FileState):
    """State of a file with evaluated rows.

    Attributes:
        path: absolute path.
        first: number of rows from the start of the file that belong to the data; None for all.
        rows_sha256: hash of these rows.
    """

    path: str
    first: int | None
    rows_sha256: str

    @classmethod
    def of_rows(cls, file: Path, first: int | None) -> "RowsState":
        """State of a file, of which all or the first rows belong to the data."""
        return cls(path=str(file.resolve()), first=first, rows_sha256=_digest(file, first), **vars(FileState.of(file)))

    @property
    def changed(self) -> bool:
        """True if the file has other rows now."""
        return self.differs(Path(self.path)) and _digest(Path(self.path), self.first) != self.rows_sha256


def _digest(file: Path, first: int | None) -> str:
    """Hash of a JSONL file's rows; empty if they are not JSON."""
    try:
        return digest(read_rows(file)[:first])
    except UserError:
        return ""


TITLES = {
    "sacrebleu_signature": "sacreBLEU signature",
    "empty": "empty predictions, share of rows",
    "repeated": "repeated predictions, share of rows",
}
"""Titles of details and shares."""


class RowShares(BaseModel):
    """Number of scored rows, and shares of their predictions; the shares are None without rows.

    Attributes:
        empty: share of empty predictions.
        repeated: share of predictions that also occur in another row.
    """

    rows: int
    empty: float | None = None
    repeated: float | None = None


class Scores(BaseModel):
    """Scores of predictions or a run.

    Attributes:
        scores: scores by column name.
        shares: number of scored rows, and shares of their predictions.
        notes: notes that do not concern a single score.
    """

    scores: dict[str, ScoreRecord]
    shares: RowShares
    notes: list[str] = []

    @field_validator("scores")
    @classmethod
    def _require_metrics(cls, scores: dict[str, ScoreRecord]) -> dict[str, ScoreRecord]:
        registry.recorded(scores)
        return scores

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Scored metrics by name."""
        return registry.recorded(self.scores)

    @property
    def titles(self) -> dict[str, str]:
        """Titles of scores and shares, as in results and reports."""
        return {column.name: heading for heading, column in registry.distinct(self.columns.values()).items()} | TITLES

    @property
    def all_notes(self) -> list[str]:
        """Notes, including those on single scores."""
        notes = [*self.notes]
        for name, record in self.scores.items():
            notes += [f"{name}: {note}" for note in record.notes]
        return notes

    @property
    def details(self) -> JsonObject:
        """Benchmarks, scorer models and signatures behind the scores."""
        details: JsonObject = {}
        for name, record in self.scores.items():
            column = self.columns[name]
            if record.benchmark:
                details[f"{name}_benchmark"] = record.benchmark.model_dump()
            if record.scorer:
                details[column.detail_key("bertscore")] = record.scorer.model_dump()
            if record.signature:
                details[column.detail_key("sacrebleu_signature")] = record.signature
        return details

    def flat(self) -> JsonObject:
        """Scores, intervals, details and shares side by side, as `--json` prints them."""
        values = {name: record.value for name, record in self.scores.items()}
        intervals = {name: record.interval and [*record.interval] for name, record in self.scores.items()}
        flat = {"rows": self.shares.rows, "intervals": intervals, **values, **self.details}
        flat |= self.shares.model_dump(exclude={"rows"}, exclude_none=True)
        flat["metrics"] = {name: record.declaration for name, record in self.scores.items()}
        if notes := self.all_notes:
            flat["notes"] = notes
        return flat


NO_SCORES = Scores(scores={}, shares=RowShares(rows=0))


class Evaluation(Scores):
    """Content of scores.json.

    Attributes:
        version: see `VERSION`.
        files: states of the files `adapter` and `predictions`; an entry is absent if there is no such file.
        data: states of the files with the rows.
        also_trained: positions of evaluated rows that are also training rows; None if unknown.
    """

    created: str
    rehearsal: bool
    version: int
    settings: EvaluationSettings
    files: dict[str, FileState]
    data: list[RowsState]
    also_trained: list[int] | None = None

    @property
    def has_other_rows(self) -> bool:
        """True if the files with the rows have other rows now."""
        return any(state.changed for state in self.data)


class Prediction(BaseModel, strict=True, extra="allow"):
    """Schema of a row in predictions.jsonl; fields that are not listed here are scores."""

    __pydantic_extra__: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)] | None] = Field(init=False)
    row: int
    idx: int | str | None = None
    lang: int | str | None = None
    group: int | str | None = None
    reference: str
    prediction: str
    truncated: bool | None = None


_PREDICTIONS = TypeAdapter(list[Prediction])


def read_scores(folder: Path) -> Evaluation | None:
    """Read a folder's scores.json; None if missing or unreadable. A problem is logged."""
    problem = "damaged"
    try:
        content = parse_json(read_bytes(folder / SCORES))
        if RecordVersion.model_validate(content).version != VERSION:
            problem = "written by another version of qlora-recipes"
        return Evaluation.model_validate(content)
    except FileNotFoundError:
        return None
    except registry.WrongMetric as error:
        warn_once(f"{folder / SCORES}: {error}; install the metric's package, or score it anew with `recipe evaluate`")
        return None
    except (OSError, TypeError, ValueError):
        _report(folder / SCORES, problem)
        return None


def read_predictions(folder: Path) -> list[Row]:
    """Read a folder's predictions; empty if missing or damaged. Damage is logged."""
    try:
        rows = list(map(parse_json, read_bytes(folder / PREDICTIONS).splitlines()))
        _PREDICTIONS.validate_python(rows)
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        _report(folder / PREDICTIONS, "damaged")
        return []
    return rows


def _report(file: Path, problem: str) -> None:
    warn_once(f"{file}: {problem}; recreate it with `recipe evaluate`")


def write(folder: Path, evaluation: Evaluation, rows: Sequence[Row], part: Path | None) -> None:
    """Write predictions and scores together, and remove the file `part` of the predictions until now.

    The state of the predictions is added to the evaluation.
    """
    content = b"".join(json_lines(rows))
    with replacing(folder / SCORES) as scores:
        with replacing(folder / PREDICTIONS) as predictions:
            predictions.write(content)
            predictions.flush()
            evaluation.files["predictions"] = FileState.of(Path(predictions.name), hashlib.sha256(content).hexdigest())
            scores.write(evaluation.model_dump_json(indent=1).encode() + b"\n")
            scores.flush()  # before the predictions move into place, so that `finish_write` finds all of it
        if part:  # before the scores, which make the evaluation complete, so that nobody looks at it again
            part.unlink(missing_ok=True)


def finish_write(folder: Path, part: Path) -> None:
    """Finish a `write` whose process was killed after it moved the predictions; callers hold the folder's lock."""
    for scores in parts_of(folder / SCORES):
        with suppress(OSError, ValueError):
            evaluation = Evaluation.model_validate_json(read_bytes(scores))
            if evaluation.files["predictions"].sha256 == sha256(folder / PREDICTIONS):
                part.unlink(missing_ok=True)
                scores.replace(folder / SCORES)


def about_rows(evaluation: Evaluation | None) -> str | None:
    """Scored part of the rows, and scored rows that are also training rows; None if there is nothing to note."""
    if evaluation is None:
        return None
    settings = evaluation.settings
    notes = [settings.rows_in_words] if 0 < settings.rows < settings.total_rows else []
    for name, record in evaluation.scores.items():
        benchmark = record.benchmark
        if benchmark and benchmark.rows < benchmark.total_rows:
            notes.append(f"{name}: {benchmark.rows:,} of {benchmark.total_rows:,} rows")
    if evaluation.also_trained:
        notes.append(f"{len(evaluation.also_trained):,} also in the training data")
    return "; ".join(notes) or None


def about_file(file: Path) -> str | None:
    """Notes of `about_rows` on a run's file of predictions; None for other files."""
    return about_rows(read_scores(file.parent)) if file.name == PREDICTIONS else None


def notes(evaluation: Evaluation, predictions: Sequence[Row]) -> list[str]:
    """Notes on the engine, on the scored rows, and on truncated answers."""
    notes = [note for note in (evaluation.settings.note, about_rows(evaluation)) if note]
    truncated = sum(bool(row.get("truncated")) for row in predictions)
    if truncated:
        most = evaluation.settings.decoding.max_new_tokens
        notes.append(
            f"{truncated} of {len(predictions)} answers were truncated at {most} new tokens; raise --max-new-tokens"
        )
    return notes


# Kind of change since an evaluation: `edited` if only the predictions differ, else `stale`.
Changed = Literal["stale", "edited"]


def changed(folder: Path, evaluation: Evaluation | None, run: Run | None = None) -> Changed | None:
    """Kind of change since an evaluation; None if nothing has changed or there is no evaluation.

    A file is hashed only if its size or modification time differs. A new time alone is no change.

    Args:
        folder: folder of the evaluation.
        evaluation: content of scores.json.
        run: the run, if the run's adapter was evaluated.
    """
    if evaluation is None:
        return None
    if run and run.adapter and evaluation.settings.adapter_sha256 != run.adapter.sha256:
        return "stale"
    output = folder / RunFile.OUTPUT  # even in a moved run folder
    adapter = output if output.is_dir() else Path(evaluation.settings.adapter)
    files = {"adapter": adapter / ADAPTER, "predictions": folder / PREDICTIONS}
    differing = [name for name, state in evaluation.files.items() if state.differs(files[name])]
    if "adapter" in differing or evaluation.has_other_rows:
        return "stale"
    return "edited" if differing else None


def current(folder: Path, run: Run | None = None) -> Evaluation | None:
    """Evaluation in a folder; None if files changed, see `changed`."""
    evaluation = read_scores(folder)
    return None if changed(folder, evaluation, run) else evaluation


def find_evaluation(run: Path, default: Evaluation | None, **changes: Any) -> Evaluation | None:
    """Evaluation of the same rows with other settings.

    Returns None if there is no such evaluation, if its files changed, or without a default evaluation.

    Args:
        run: run folder.
        default: the run's default evaluation.
        changes: settings that differ.
    """
    if default is None:
        return None
    folder = default.settings.model_copy(update=changes).folder(run)
    other = current(folder)
    if other is None or other.settings.rows != default.settings.rows:
        return None
    if other.settings.limit != default.settings.limit:
        return None
    return other


def served_evaluations(folder: Path, run: Run) -> list[Evaluation]:
    """Current evaluations of GGUF files of a run's adapter, the files with the most bits first."""
    evaluations = []
    for file in sorted((folder / RunFile.EVALUATIONS).glob(f"*/{SCORES}")):
        evaluation = current(file.parent, run)
        if evaluation and evaluation.settings.file:
            evaluations.append((-evaluation.settings.file.bits, evaluation))
    return [evaluation for _, evaluation in sorted(evaluations, key=itemgetter(0))]
