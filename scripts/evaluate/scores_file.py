"""Files of an evaluation: its rows, predictions.jsonl and scores.json."""

import hashlib
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, field_validator

from ..base.errors import UserError
from ..base.files import Row, digest, json_lines, parse_json, parts_of, read_bytes, read_rows, replacing, sha256
from ..base.run_files import RunFile
from ..base.terminal import say_once
from ..base.yamlfiles import Config
from ..data.studies import Decoding
from ..metrics import registry
from ..metrics.metric import Column, ScoreRecord
from ..training.run_record import FileState, RecordVersion, Run

VERSION = 5
"""Version of scores.json and of the scoring code.

Increase it when a change gives the same texts different scores, or renames or removes a field. Scores of another
version are then computed again.
"""
PREDICTIONS, SCORES, ADAPTER = RunFile.PREDICTIONS, RunFile.SCORES, RunFile.ADAPTER
BASE = "none"  # value of --adapter for the base model without an adapter
COMPARED = 32  # number of rows in which an engine or a file is compared with the trained model
REFERENCE, VLLM, SERVER = "transformers", "vllm", "server"
# Settings that describe the choice of rows, and the engine.
_SELECTION = ("data", "rows", "total_rows", "limit")
ORIGIN = ("batch_tokens", "engine", "model", "agreement", "distance")


class Agreement(BaseModel):
    """Agreement of an engine with the reference engine, transformers.

    Attributes:
        rows: number of compared rows.
        equal: number of rows with equal answers.
    """

    rows: int
    equal: int

    def __str__(self) -> str:
        return f"{self.equal} of {self.rows} answers equal the reference's"


class ServedFile(BaseModel):
    """GGUF file that a llama.cpp server answers with.

    Attributes:
        name: name of the file.
        quantization: llama.cpp's name of the file's type, such as `Q4_K - Medium`; `unknown` from old servers.
        bits: bits per weight, over all tensors.
    """

    name: str
    quantization: str
    bits: FiniteFloat

    @property
    def is_quantized(self) -> bool:
        """True if weights have fewer than 16 bits."""
        return self.bits < 15.5

    def __str__(self) -> str:
        return f"{self.name} ({self.quantization}, {self.bits:.1f} bits)"


class Distance(BaseModel):
    """Distance of a served file from the trained model, on tokens of reference answers.

    The trained model's weights are the base model and adapter, merged by Axolotl. Merging rounds them.

    Attributes:
        rows: number of compared rows.
        tokens: number of compared tokens.
        kl: mean Kullback-Leibler divergence from the merged weights, in nats per token; a lower bound, see `llama.kl`.
        difference: mean absolute difference of the tokens' log-probabilities from the merged weights, in nats.
        loss: mean loss of the file per token.
        merged_loss: mean loss of the merged weights per token.
        trained_loss: mean loss of base model and adapter per token.
    """

    rows: int
    tokens: int
    kl: float
    difference: float
    loss: float
    merged_loss: float
    trained_loss: float

    def __str__(self) -> str:
        return (
            f"loss {self.losses} (adapter → merged → file), mean KL from the merged weights {self.kl:.4f} (a "
            f"quantized file is not refused for it), mean difference of log-probabilities {self.difference:.3f}, on "
            f"{self.tokens:,} tokens of {self.rows} rows"
        )

    @property
    def losses(self) -> str:
        """Losses of the adapter, of the merged weights and of the file."""
        return f"{self.trained_loss:.3f} → {self.merged_loss:.3f} → {self.loss:.3f}"


@dataclass
class Example:
    """Prompt and expected answer of a test row.

    Attributes:
        prompt: tokens of the prompt.
        reference: text of the answer.
        answer: tokens of the answer, with the token that ends it if training puts loss on it.
        messages: messages of the prompt, with `role` and `content`; None if the row is no chat, or calls tools.
    """

    prompt: list[int]
    reference: str
    answer: list[int]
    messages: list[Row] | None = None


@dataclass(frozen=True)
class Completion:
    """Answer of a model, as stripped text without special tokens, and as tokens without padding."""

    text: str
    tokens: list[int]

    @classmethod
    def of(cls, tokenizer: Any, tokens: list[int]) -> "Completion":
        """Answer with these tokens."""
        return cls(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(), tokens)


def until_end(tokens: list[int], ends: Container[int]) -> list[int]:
    """Tokens of an answer up to the first that ends it, without padding."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def sample_positions(total: int, limit: int | None) -> list[int]:
    """Positions of the rows that a limit takes, ascending.

    Their order is pseudo-random and fixed: a larger limit takes the rows of a smaller one, and further rows.
    """
    if limit is None:
        return [*range(total)]
    return sorted(nsmallest(limit, range(total), key=_rank))


def sampled[T](items: Sequence[T]) -> list[T]:
    """At most `COMPARED` items; they are evenly spaced, to cover all kinds of rows."""
    return [items[i] for i in sorted({i * len(items) // COMPARED for i in range(COMPARED)})]


def _rank(position: int) -> bytes:
    return hashlib.sha256(f"qlora-recipes {position}".encode()).digest()


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


class EvaluationSettings(BaseModel):
    """Settings of predictions, without package versions.

    Attributes:
        data: file of the rows, or a description of several sources.
        data_sha256: hash of the file, or of the rows.
        rows: number of evaluated rows; 0 without predictions.
        total_rows: number of rows in the data.
        limit: maximum number of rows, if it left out rows of the data or of a benchmark.
        test_set: name of the study's test set with this content (`test` is the complete test set); None for other rows.
        batch_size: maximum number of rows in a batch; None lets the engine choose.
        batch_tokens: maximum number of tokens in a batch of the reference engine, set by free memory; None for other
            engines, and where `transformers_engine.FIXED` applies.
        built_with: further config keys that change predictions, with their values; see `evaluate.BUILT_WITH`.
        engine: `REFERENCE` (in this process), `VLLM` (a server started for the evaluation) or `SERVER` (a vLLM
            or llama.cpp server started by a user).
        model: name of the model on the server.
        agreement: agreement with the reference engine; None without a comparison.
        file: GGUF file that answers in place of base model and adapter; None for other engines.
        distance: distance of this file from the trained model; None without a comparison.
    """

    base_model: str
    adapter: str
    adapter_sha256: str | None
    data: str
    data_sha256: str
    test_set: str | None = None
    rows: int
    total_rows: int
    limit: int | None = None
    decoding: Decoding
    batch_size: int | None
    batch_tokens: int | None = None
    quantized: bool
    built_with: Config
    dtype: str
    engine: str = REFERENCE
    model: str | None = None
    agreement: Agreement | None = None
    file: ServedFile | None = None
    distance: Distance | None = None

    @property
    def data_name(self) -> str:
        """File name, or description, of the rows."""
        return Path(self.data).name if Path(self.data).is_absolute() else self.data

    @property
    def rows_in_words(self) -> str:
        if self.rows < self.total_rows:
            return f"{self.rows:,} of {self.total_rows:,} rows"
        return f"{self.rows:,} rows"

    @property
    def note(self) -> str | None:
        """Note on the engine; None for the reference engine."""
        if self.engine == REFERENCE:
            return None
        if self.file:
            return f"generated by {self.file}: {self.distance or 'not compared with the adapter'}"
        name = f" ({self.model})" if self.model else ""
        return f"generated by {self.engine}{name}: {self.agreement or 'not compared with the reference'}"

    def engine_stands_for(self, other: "EvaluationSettings") -> bool:
        """True if the engine of these predictions can stand in for that of `other`, which has the same `identity`.

        Predictions of the reference or of the requested engine always qualify. Those of another engine qualify if they
        were decoded greedily, and at least half of the compared answers equalled the reference engine's.
        """
        if self.engine == REFERENCE or (self.engine, self.model) == (other.engine, other.model):
            return True
        if self.agreement is None or self.decoding.do_sample:
            return False
        return 2 * self.agreement.equal >= self.agreement.rows

    def identity(self) -> Row:
        """Settings that determine a prediction, except the engine.

        Batches and engines change predictions only by rounding, see `engine_stands_for`.
        """
        return self.model_dump(exclude={"adapter", "test_set", "batch_size", *_SELECTION, *ORIGIN})

    def differing_keys(self, other: "EvaluationSettings") -> list[str]:
        """Keys of `identity` that have another value in other settings."""
        identity = other.identity()
        return [key for key, value in self.identity().items() if value != identity[key]]

    def folder(self, run: Path) -> Path:
        """Folder for an evaluation with these settings, if they are not the default, in a run folder."""
        return run / RunFile.EVALUATIONS / digest(self.identity())[:12]


class Engine(Protocol):
    """Loaded model of a run, ready to answer.

    Attributes:
        ends: tokens that end an answer.
        settings: decoding and other settings, read at each call of `generate`.
    """

    ends: list[int]
    settings: EvaluationSettings

    def check(self, examples: Sequence[Example], reference_runs_here: bool) -> Distance | None:
        """Check tokens and log-probabilities of the engine's own file before it answers, if it has one.

        Returns:
            Distance of the file from the trained model; None without a file, or if the reference does not run here.

        Raises:
            UserError: the file does not answer like the trained model.
            WorkFailed: the check cannot continue.
        """
        return None

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """Generate missing answers, in groups.

        Args:
            prompts: tokens of the prompts of all rows.
            done: positions in `prompts` that have an answer.

        Yields:
            Answers by position in `prompts`.

        Raises:
            WorkFailed: generation cannot continue; yielded answers are kept.
        """


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
    def details(self) -> Row:
        """Benchmarks, scorer models and signatures behind the scores."""
        details: Row = {}
        for name, record in self.scores.items():
            column = self.columns[name]
            if record.benchmark:
                details[f"{name}_benchmark"] = record.benchmark.model_dump()
            if record.scorer:
                details[column.detail_key("bertscore")] = record.scorer.model_dump()
            if record.signature:
                details[column.detail_key("sacrebleu_signature")] = record.signature
        return details

    def flat(self) -> Row:
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
    say_once(f"{file}: {problem}; recreate it with `recipe evaluate`")


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
    if "adapter" in differing or any(state.changed for state in evaluation.data):
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
