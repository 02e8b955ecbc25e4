"""What an evaluation leaves in a folder: predictions.jsonl, and scores.json with the settings that they depend on."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, field_validator, model_validator

from ..base.errors import UserError
from ..base.files import Row, loads, read_json, write_atomically
from ..base.processes import held
from ..base.progress import say_once
from ..data.study import Decoding
from ..metrics import registry
from ..metrics.metric import Column
from ..runs.records import FileState
from ..runs.rundir import Run

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"
ADAPTER = "adapter_model.safetensors"
LOCK = ".evaluation.lock"
BASE_MODEL = "base-model"  # the base model's folder below evaluations/
REFERENCE, VLLM, SERVER = "transformers", "vllm", "server"
ORIGIN = ("batch_tokens", "engine", "model", "served", "agreement")
"""Those of an evaluation's settings that say what generated its predictions."""
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
        built_with: other keys of the run's config that predictions depend on, see `task.BUILT_WITH`.
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
    def rows_in_words(self) -> str:
        return f"{'the first ' if self.limit else ''}{self.rows:,} rows"

    def stands_for(self, other: "EvaluationSettings") -> bool:
        """Return whether its predictions serve as another engine's: the reference's do, and greedy ones of an engine
        that gives at least half of the compared rows the reference's answer."""
        if self.engine == REFERENCE or (self.engine, self.model) == (other.engine, other.model):
            return True
        found = self.agreement
        return found is not None and 2 * found.equal >= found.rows and not self.decoding.do_sample

    def same_predictions(self) -> dict[str, Any]:
        """What makes two evaluations have the same predictions, to the last token."""
        return self.model_dump(exclude={"adapter", "data", "limit", "test_set", *ORIGIN})

    def same_work(self) -> dict[str, Any]:
        """What makes two evaluations be of the same model on the same rows, in whatever batches.

        Batches change predictions by rounding alone, and so do engines, see `stands_for`.
        """
        return self.model_dump(exclude={"adapter", "data", "limit", "test_set", "batch_size", *ORIGIN})


class Evaluation(BaseModel):
    """The content of scores.json: when, what and how; see `score.score` for the scores.

    Attributes:
        version: of the scores, see `score.VERSION`; it decides whether they are current.
        code_sha256: of the code that scored, for the record.
        files: the `adapter`, the `predictions` and the `data` that the scores are of, as far as each is one file.
    """

    made: str
    rehearsal: bool
    scores: dict[str, Any]
    version: int = 1
    code_sha256: str
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
        record = Evaluation.model_validate(content := loads((folder / SCORES).read_bytes()))
        return record if "files" in content else _brought_up_to_date(record, folder)
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError):
        return _damaged(folder / SCORES, None)


def read_predictions(folder: Path) -> list[Row]:
    """The rows of the evaluation in a folder with their scores; none where there is none, or its file is damaged, which
    is said on stderr."""
    try:
        rows = list(map(loads, (folder / PREDICTIONS).read_bytes().splitlines()))
        _PREDICTIONS.validate_python(rows)
    except FileNotFoundError:
        return []
    except (OSError, ValueError):
        return _damaged(folder / PREDICTIONS, [])
    return rows


def _damaged[T](file: Path, instead: T) -> T:
    say_once(f"{file}: damaged; `recipe evaluate` makes it anew")
    return instead


def beside_references(folder: Path, evaluation: Evaluation, count: int) -> list[Row]:
    """The first predictions of an evaluation beside their references.

    Args:
        folder: the run's.
        evaluation: one of the run.
        count: how many.

    Returns:
        Rows with `row`, from 0, `reference` and `prediction`, and with `base_model`, what the model alone wrote, where
        the run's base model was evaluated on the same rows too.
    """
    where = next(place for place in (folder, *folder.glob("evaluations/*")) if read_scores(place) == evaluation)
    alone = folder / "evaluations" / BASE_MODEL
    of_base = read_scores(alone)
    same_rows = of_base and of_base.settings.data_sha256 == evaluation.settings.data_sha256
    written = {row["row"]: row for row in read_predictions(alone)} if same_rows and where != alone else {}
    return [
        {"row": row["row"], "reference": row["reference"]}
        | ({"base_model": written[row["row"]]["prediction"]} if row["row"] in written else {})
        | {"prediction": row["prediction"]}
        for row in read_predictions(where)[:count]
    ]


def _brought_up_to_date(record: Evaluation, folder: Path) -> Evaluation:
    """Give a record from before there were `files` those that are there now; an adapter that was trained on since, by
    the times that such records were told apart by, is another."""
    record.files = states(folder, record.settings)
    if (predictions := folder / PREDICTIONS).is_file():
        record.files["predictions"] = FileState.of(predictions)
    last: dict[str, Any] = (read_json(folder / "run.json").get("launches") or [{}])[-1]
    if record.made < (last.get("ended") or last.get("started") or ""):
        record.files["adapter"] = FileState(sha256=record.settings.adapter_sha256 or "", bytes=-1, mtime=0)
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


Changed = Literal["stale", "edited"]
"""What has changed since an evaluation: its adapter or test rows, or its predictions."""


def changed(folder: Path, evaluation: Evaluation | None, run: Run | None = None) -> Changed | None:
    """What has changed since an evaluation, by the sizes and times of files; None for nothing, or without one.

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
    differing = [name for name, state in evaluation.files.items() if state.may_differ(files[name])]
    return ("edited" if differing == ["predictions"] else "stale") if differing else None


def check_again(folder: Path) -> None:
    """Hash again what may have changed since the evaluations in a folder and below it, and note what has not: files get
    other times by being copied."""
    for place in (folder, *folder.glob("evaluations/*")):
        if changed(place, read_scores(place)):
            with suppress(OSError, UserError), held(place / LOCK, "another evaluation is running"):
                if evaluation := read_scores(place):
                    files = _files(place, evaluation.settings)
                    now = {name: FileState.of(files[name]) for name in evaluation.files if files[name].is_file()}
                    evaluation.files |= {n: s for n, s in now.items() if s.sha256 == evaluation.files[n].sha256}
                    write_atomically(place / SCORES, evaluation.model_dump_json(indent=1) + "\n")


def current(folder: Path, run: Run | None = None) -> Evaluation | None:
    """The evaluation in a folder; None where something has changed since, see `changed`."""
    evaluation = read_scores(folder)
    return None if changed(folder, evaluation, run) else evaluation


def of_run(folder: Path, run: Run) -> Evaluation | None:
    """The evaluation of a run's own adapter; None where something has changed since, see `changed`."""
    return current(folder, run)


def decoded(folder: Path, name: str, decoding: Decoding, own: Evaluation | None) -> Evaluation | None:
    """The evaluation of a run's own adapter by one of its study's further decodings; None where there is none that is
    of the same adapter and rows as its usual one, or that decoded so."""
    other = current(folder / "evaluations" / f"{DECODED}{name}")
    if other is None or other.settings.decoding != decoding:
        return None
    alike = {"adapter_sha256", "data_sha256", "rows"}
    same = own is None or own.settings.model_dump(include=alike) == other.settings.model_dump(include=alike)
    return other if same else None
