"""What an evaluation leaves in a folder: predictions.jsonl, and scores.json with the settings that they depend on."""

import hashlib
import os
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import orjson
from pydantic import BaseModel, Field, TypeAdapter, field_validator, model_validator

from ..base.files import Row, clear_parts, replacing
from ..base.progress import say_once
from ..data.study import Decoding
from ..metrics import registry
from ..metrics.metric import Column
from ..runs.records import FileState, Run

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"
ADAPTER = "adapter_model.safetensors"
LOCK = ".evaluation.lock"
BASE_MODEL = "base-model"  # the base model's folder below evaluations/
REFERENCE, VLLM, SERVER = "transformers", "vllm", "server"
# Those of an evaluation's settings that say what generated its predictions.
ORIGIN = ("batch_tokens", "engine", "model", "served", "agreement")
DECODED = "decoding-"  # how the folders of the study's further decodings begin there


class Agreement(BaseModel):
    """Agreement of an engine with the reference on some rows.

    Attributes:
        rows: how many.
        equal: how many answers are equal.
        tokens_before: of the others, the tokens before the first that differs.
    """

    rows: int
    equal: int
    tokens_before: list[int]

    @model_validator(mode="before")
    @classmethod
    def _of_differences(cls, given: Any) -> Any:
        """Bring a record up to date that lists the differences."""
        if not isinstance(given, dict) or "differences" not in given:
            return given
        before = [one["token"] - 1 for one in given["differences"]]
        return {"rows": given["rows"], "equal": given["rows"] - len(before), "tokens_before": before}

    def __str__(self) -> str:
        before = self.tokens_before
        tokens = f", the others differ after {min(before)} to {max(before)} tokens" if before else ""
        return f"{self.equal} of {self.rows} answers are the reference's{tokens}"


@dataclass(frozen=True)
class Completion:
    """Text that a model wrote, without special tokens and space around it, and its tokens, without padding."""

    text: str
    tokens: list[int]


class EvaluationSettings(BaseModel):
    """All that predictions depend on besides the packages and this project's code; recorded with them.

    Attributes:
        data: the rows' file; or, where they are not one file, what they are in words.
        data_sha256: of that file, or of the rows.
        limit: how many rows where only the first ones of the data are taken.
        test_set: which of the study's sets of test rows they are, by their content: `test` is all of them; None
            for other rows.
        batch_size: the most rows generated at a time; None where it was left to the engine.
        batch_tokens: the most tokens of the reference's batches, by the memory there was for their keys and values.
        built_with: other keys of the run's config that predictions depend on, see `evaluate.BUILT_WITH`.
        engine: what generated: `REFERENCE`, in a process of this project; `VLLM`, which it started; `SERVER`, which
            somebody started, with whatever model; or, in earlier versions, `elsewhere`: a file of the user's.
        model: the name of the server's model.
        served: in which form an engine beside the reference had the weights and took the prompts.
        agreement: of such an engine with the reference; None where they were not compared.
    """

    base_model: str
    adapter: str
    adapter_sha256: str | None
    data: str
    data_sha256: str
    test_set: str | None = None
    rows: int
    limit: int | None = None
    decoding: Decoding
    batch_size: int | None
    batch_tokens: int | None = None
    quantized: bool
    built_with: dict[str, Any] = Field(default_factory=dict)
    dtype: str
    engine: str = REFERENCE
    model: str | None = None
    served: str | None = None
    agreement: Agreement | None = None

    @property
    def data_name(self) -> str:
        """The rows' file, without its folder, or what they are in words."""
        return Path(self.data).name if Path(self.data).is_absolute() else self.data

    @property
    def label(self) -> str:
        """The name, of a folder below evaluations/, for its rows beside the usual ones."""
        name = Path(self.data).stem if Path(self.data).is_absolute() else self.data
        return f"{re.sub(r'[^\w.-]+', '-', name)[:80].strip('-')}-{self.data_sha256[:7]}"

    @property
    def rows_in_words(self) -> str:
        return f"{'the first ' if self.limit else ''}{self.rows:,} rows"

    @property
    def note(self) -> str | None:
        """What to know of scores of predictions that another engine than the reference made."""
        if self.engine == REFERENCE:
            return None
        compared = self.agreement or "not compared with the reference"
        return f"generated by {self.engine} ({self.served}): {compared}"

    def stands_for(self, other: "EvaluationSettings") -> bool:
        """Return whether its predictions serve as another engine's: the reference's do, and greedy ones of an engine
        that gives at least half of the compared rows the reference's answer."""
        if self.engine == REFERENCE or (self.engine, self.model) == (other.engine, other.model):
            return True
        found = self.agreement
        return found is not None and 2 * found.equal >= found.rows and not self.decoding.do_sample

    def same_work(self) -> dict[str, Any]:
        """What makes two evaluations be of the same model on the same rows, in whatever batches.

        Batches change predictions by rounding alone, and so do engines, see `stands_for`.
        """
        return self.model_dump(exclude={"adapter", "data", "limit", "test_set", "batch_size", *ORIGIN})


class Engine(Protocol):
    """A run's model, ready to answer.

    Attributes:
        settings: how it decodes, among the rest; read whenever it generates.
        served: in which form it has the weights and takes the prompts; None of the reference.
    """

    settings: EvaluationSettings
    served: str | None

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """The answers that are not there yet, in groups as they get ready.

        Args:
            prompts: the tokens of each, of all rows of the evaluation.
            done: the positions in `prompts` of those that have an answer.

        Yields:
            Answers by the positions of their prompts.

        Raises:
            WorkFailed: it cannot go on; what was yielded is kept.
        """


class Evaluation(BaseModel):
    """The content of scores.json: when, what and how; see `score.score` for the scores.

    Attributes:
        version: of the scores, see `score.VERSION`; it decides whether they are current.
        files: the `adapter`, the `predictions` and the `data` that the scores are of, as far as each is one file.
    """

    made: str
    rehearsal: bool
    scores: dict[str, Any]
    version: int = 1
    settings: EvaluationSettings
    files: dict[str, FileState] = Field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Column]:
        """What it scored with, by name."""
        return registry.recorded(self.scores)

    @field_validator("scores")
    @classmethod
    def _sound(cls, scores: dict[str, Any]) -> dict[str, Any]:
        """Refuse scores that are no numbers, because all that reads them computes with them."""
        metrics, intervals = scores.get("metrics") or {}, scores.get("intervals") or {}
        if not isinstance(metrics, dict) or not isinstance(intervals, dict):
            raise ValueError("metrics and intervals are mappings")
        bounds = [bound for interval in intervals.values() if interval is not None for bound in interval]
        numbers = [scores.get(name) for name in ("rows", *registry.recorded(scores))]
        if not all(isinstance(number, int | float | None) for number in numbers + bounds):
            raise ValueError("scores are numbers")
        return scores


class Prediction(BaseModel, strict=True, extra="allow"):
    """A row of predictions.jsonl; its further fields are scores. It is only checked so, and read as a mapping."""

    __pydantic_extra__: dict[str, Annotated[float, Field(ge=-1e6, le=1e6)] | None] = Field(init=False)
    row: int
    idx: int | str | None = None
    lang: str | None = None
    reference: str
    prediction: str
    exact: bool | None = None


_PREDICTIONS = TypeAdapter(list[Prediction])


def read_scores(folder: Path) -> Evaluation | None:
    """The evaluation in a folder, or None where there is none or its file is damaged, which is said on stderr."""
    try:
        record = Evaluation.model_validate(content := orjson.loads((folder / SCORES).read_bytes()))
        return record if "files" in content else _brought_up_to_date(record, folder)
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError):
        return _damaged(folder / SCORES, None)


def read_predictions(folder: Path) -> list[Row]:
    """The rows of the evaluation in a folder with their scores; none where there is none, or its file is damaged, which
    is said on stderr."""
    try:
        rows = list(map(orjson.loads, (folder / PREDICTIONS).read_bytes().splitlines()))
        _PREDICTIONS.validate_python(rows)
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return _damaged(folder / PREDICTIONS, [])
    return rows


def _damaged[T](file: Path, instead: T) -> T:
    say_once(f"{file}: damaged; `recipe evaluate` makes it anew")
    return instead


def write(folder: Path, evaluation: Evaluation, rows: Sequence[Row]) -> None:
    """Write predictions with their scores; neither without the other."""
    evaluation.files = states(folder, evaluation.settings)
    content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    predictions = folder / PREDICTIONS
    clear_parts(predictions)
    with ExitStack() as stack:
        stream = stack.enter_context(replacing(predictions))
        stream.write(content)
        stream.flush()
        state = FileState(
            sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), mtime=os.fstat(stream.fileno()).st_mtime
        )
        evaluation.files["predictions"] = state
        text = evaluation.model_dump_json(indent=1).encode() + b"\n"
        stack.enter_context(replacing(folder / SCORES)).write(text)


def _brought_up_to_date(record: Evaluation, folder: Path) -> Evaluation:
    """Give a record from before there were `files` those that are there now, whose content is not known."""
    record.files = {
        name: state.model_copy(update={"bytes": -1}) for name, state in states(folder, record.settings).items()
    }
    if (predictions := folder / PREDICTIONS).is_file():
        record.files["predictions"] = FileState.of(predictions)
    return record


def _files(folder: Path, settings: EvaluationSettings) -> dict[str, Path]:
    """Where the files of the evaluation in a folder are; a run's own adapter is moved with its folder."""
    own = folder / "output"
    adapter = (own if own.is_dir() else Path(settings.adapter)) / ADAPTER
    return {"adapter": adapter, "predictions": folder / PREDICTIONS, "data": Path(settings.data)}


def states(folder: Path, settings: EvaluationSettings) -> dict[str, FileState]:
    """The states of what predictions are made from, whose hashes settings have."""
    known = {"adapter": settings.adapter_sha256}
    if Path(settings.data).is_absolute():
        known["data"] = settings.data_sha256
    files = _files(folder, settings)
    there = {name: digest for name, digest in known.items() if files[name].is_file()}
    return {name: FileState.of(files[name], digest) for name, digest in there.items() if digest}


# What has changed since an evaluation: its adapter or test rows, or its predictions.
Changed = Literal["stale", "edited"]


def changed(folder: Path, evaluation: Evaluation | None, run: Run | None = None) -> Changed | None:
    """What has changed since an evaluation; None for nothing, or without one. Files of another size or time, as copies
    have, are hashed.

    Args:
        folder: the evaluation's.
        evaluation: the content of its scores.json.
        run: the run whose own adapter is evaluated.
    """
    if evaluation is None:
        return None
    if run and run.adapter and evaluation.settings.adapter_sha256 != run.adapter.sha256:
        return "stale"
    files = _files(folder, evaluation.settings)
    differing = [name for name, state in evaluation.files.items() if state.differs(files[name])]
    return ("edited" if differing == ["predictions"] else "stale") if differing else None


def current(folder: Path, run: Run | None = None) -> Evaluation | None:
    """The evaluation in a folder; None where something has changed since, see `changed`."""
    evaluation = read_scores(folder)
    return None if changed(folder, evaluation, run) else evaluation


def decoded(folder: Path, name: str, decoding: Decoding, own: Evaluation | None) -> Evaluation | None:
    """The evaluation of a run's own adapter by one of its study's further decodings; None where there is none that is
    of the same adapter and rows as its usual one, or that decoded so."""
    other = current(folder / "evaluations" / f"{DECODED}{name}")
    if other is None or other.settings.decoding != decoding:
        return None
    alike = {"adapter_sha256", "data_sha256", "rows"}
    same = own is None or own.settings.model_dump(include=alike) == other.settings.model_dump(include=alike)
    return other if same else None
