"""Predictions of a run's model on test rows, and their scores: `recipe evaluate`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import BaseModel

from . import bertscore, config, gpus, study
from .data import MANIFEST
from .errors import UserError
from .files import json_rows, read_json, sha256, write_atomically, write_rows
from .progress import Bar, say
from .quiet import importing_axolotl
from .rundir import Run, RunDir, held, now
from .score import Row, code_sha256, score
from .study import Decoding

BASE = "none"  # --adapter none: the base model without an adapter
BASE_MODEL = "base-model"  # the folder of the base model's evaluation
_PART, _PREDICTIONS, _SCORES = "predictions.part.jsonl", "predictions.jsonl", "scores.json"


class Settings(BaseModel):
    """All that predictions depend on besides the packages; recorded with them.

    Attributes:
        test_set: which of the study's sets of test rows they are, by their content: `test` is all of them, and None
            is none of them.
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
    batch_size: int
    cache: Literal["static", "dynamic"]
    quantized: bool
    dtype: str

    def same_predictions(self) -> dict[str, Any]:
        """What two evaluations with the same predictions have in common: all but how things were named."""
        return self.model_dump(exclude={"adapter", "data", "limit", "test_set"})


class Evaluation(BaseModel):
    """The content of scores.json: when, what and how; see `score.score` for the scores."""

    made: str
    rehearsal: bool
    scores: dict[str, Any]
    code_sha256: str
    settings: Settings


@dataclass
class Request:
    """What is to be evaluated.

    Attributes:
        data: prepared rows; by default the study's own test set beside the run's training data, else test.jsonl there.
        limit: evaluate the first so many rows only.
        adapter: an adapter's folder, or `none` for the base model alone; by default the run's adapter.
        max_new_tokens: by default the study's.
        batch_size: rows generated at a time.
        cache: the form of the cache of keys and values; `auto` is static on a GPU, where transformers compiles for it.
        judge: BERTScore's model, see `bertscore.judge`.
        judge_layer: its layer.
    """

    data: Path | None = None
    limit: int | None = None
    adapter: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    cache: Literal["auto", "static", "dynamic"] = "auto"
    judge: str | None = None
    judge_layer: int | None = None


class Task:
    """A checked request: the run, its config, the rows, and what their predictions will depend on.

    Raises:
        UserError: the adapter or the data is missing, or a row has no output.
    """

    def __init__(self, folder: RunDir, request: Request):
        self.folder, self.run = folder, folder.read()
        self.cfg = config.read_yaml(folder.config)
        adapter = request.adapter
        weights = None if adapter == BASE else folder.output if adapter is None else Path(adapter)
        if weights and not (weights / "adapter_model.safetensors").is_file():
            hint = "" if adapter else f"; the run is {self.run.state}"
            raise UserError(f"{weights}: no adapter (adapter_model.safetensors) there{hint}")
        if not (folder.output / "tokenizer_config.json").is_file() or "base_model" not in self.cfg:
            raise UserError(
                f"{folder.path}: the run ended before it had a tokenizer and a model; it is {self.run.state}"
            )
        of_study = study.of(self.run.recipe)
        file = request.data or _test_file(self.run, of_study, folder)
        self.rows = _read_rows(file, request.limit)
        decoding = of_study.decoding if of_study else Decoding(max_new_tokens=96)
        local = Path(self.run.cwd, str(self.cfg["base_model"]))
        data_sha256 = sha256(file)
        self.settings = Settings(
            base_model=str(local) if local.is_dir() else self.cfg["base_model"],
            adapter=str(weights.resolve()) if weights else BASE,
            adapter_sha256=sha256(weights / "adapter_model.safetensors") if weights else None,
            data=str(file.resolve()),
            data_sha256=data_sha256,
            test_set=_test_set(file, data_sha256),
            rows=len(self.rows),
            limit=request.limit,
            decoding=decoding.model_copy(update={"max_new_tokens": request.max_new_tokens or decoding.max_new_tokens}),
            batch_size=request.batch_size,
            cache=_cache(request, self.run),
            quantized=bool(self.cfg.get("load_in_4bit")),
            dtype="bfloat16" if self.cfg.get("bf16") else "float16" if self.cfg.get("fp16") else "float32",
        )
        self.where = folder.path if adapter is None else folder.path / "evaluations" / _label(self.settings)


def complete(task: Task, judge: bertscore.Judge | None) -> Evaluation | None:
    """The evaluation that a task comes to, where it was made before: of the same rows, by the same model and code."""
    former = _same_predictions(task)
    if former is None or former.code_sha256 != code_sha256():
        return None
    return former if bertscore.made_by(judge, former.scores.get("bertscore")) else None


def _same_predictions(task: Task) -> Evaluation | None:
    former = read_scores(task.where)
    same = former and former.settings.same_predictions() == task.settings.same_predictions()
    return former if same and (task.where / _PREDICTIONS).is_file() else None


def evaluate(folder: RunDir, request: Request) -> Evaluation:
    """Generate a prediction for each test row and score them all.

    predictions.jsonl and scores.json go to the run's folder; those of the base model, or of another
    adapter than the run's, to evaluations/<its name>/ below it. An evaluation that was interrupted goes on
    where it was, one that is complete is not done again.

    Raises:
        UserError: see `Task`.
    """
    task = Task(folder, request)
    judge = bertscore.judge(request.judge, request.judge_layer, task.run.rehearsal)
    if task.run.state != "finished":
        summary = task.run.summary
        say(f"{folder.path}: the run is {task.run.state} at step {summary.step} of {summary.max_steps}")
    if judge is None and request.judge is None:
        say(f"BERTScore is left out: {bertscore.DEFAULT} is not on this machine; `--bertscore {bertscore.DEFAULT}` "
            "fetches it (1.4 GB)")  # fmt: skip
    task.where.mkdir(parents=True, exist_ok=True)
    with held(task.where / ".evaluation.lock", "another evaluation is going on"):
        predictions = task.where / _PREDICTIONS
        if former := complete(task, judge):
            say(f"{predictions}: complete, made and scored with the same settings")
            return former
        if _same_predictions(task):
            say(f"{predictions}: complete, made with the same settings; scoring it anew")
            rows = read_predictions(task.where)
        else:
            former = read_scores(task.where)
            if former and _is_smaller(task.settings, former.settings):
                raise UserError(
                    f"{task.where}: holds an evaluation of {former.settings.rows} rows; move it away to make a smaller"
                )
            with importing_axolotl(offline=task.run.rehearsal):
                done = _predict(task)
            rows = [done[i] for i in range(len(task.rows))]
        scores, rows = score(rows, judge)
        write_rows(predictions, rows)
        result = Evaluation(
            made=now(), rehearsal=task.run.rehearsal, scores=scores, code_sha256=code_sha256(), settings=task.settings
        )
        write_atomically(task.where / _SCORES, result.model_dump_json(indent=1) + "\n")
        (task.where / _PART).unlink(missing_ok=True)
    return result


def _is_smaller(settings: Settings, former: Settings) -> bool:
    """Whether an evaluation would take the place of one of more rows by the same adapter."""
    return former.adapter_sha256 == settings.adapter_sha256 and former.rows > settings.rows


def export_prompts(folder: RunDir, request: Request, file: Path) -> int:
    """Write what the model would be given for each test row, to make predictions elsewhere; how many there are.

    A row has `row`, `reference`, what else the test row carries, `prompt` and `prompt_token_ids`. The ids are what
    counts: they begin with the token that starts a text, which a server adds to a `prompt` once more or not at all.
    With the field `prediction` added, `recipe score` takes the file.

    Raises:
        UserError: see `Task`.
    """
    task = Task(folder, replace(request, adapter=BASE))
    with importing_axolotl(offline=task.run.rehearsal):
        from .generate import Prompter

        prompter = Prompter(task.settings, task.cfg, folder.output)
        prompts = prompter.prompts(task.rows)
        texts = prompter.tokenizer.batch_decode(prompts, skip_special_tokens=False)
    write_rows(
        file,
        (
            _as_row(i, row) | {"prompt": text, "prompt_token_ids": ids}
            for i, (row, text, ids) in enumerate(zip(task.rows, texts, prompts, strict=True))
        ),
    )
    return len(prompts)


def read_scores(folder: Path) -> Evaluation | None:
    """The evaluation in a folder, or None where there is none or its file is damaged."""
    try:
        return Evaluation.model_validate_json((folder / _SCORES).read_bytes())
    except (OSError, ValueError):
        return None


def read_predictions(folder: Path) -> list[Row]:
    """The rows of the evaluation in a folder with their scores; none where there is none."""
    try:
        return list(map(orjson.loads, (folder / _PREDICTIONS).read_bytes().splitlines()))
    except (OSError, ValueError):
        return []


def _cache(request: Request, run: Run) -> Literal["static", "dynamic"]:
    if request.cache == "auto":
        return "static" if gpus.here() and not run.rehearsal else "dynamic"
    return request.cache


def _label(settings: Settings) -> str:
    """The name of an evaluation that is not of the run's own adapter."""
    if settings.adapter_sha256 is None:
        return BASE_MODEL
    return f"{Path(settings.adapter).name}-{settings.adapter_sha256[:7]}"


def _test_file(run: Run, of_study: study.Study | None, folder: RunDir) -> Path:
    """The rows that a run is evaluated on unless others are named."""
    if run.test_data is None:
        raise UserError(f"{folder.path}: no test.jsonl lay beside its training data; name one with --data")
    every = Path(run.cwd, run.test_data)
    scored_on = every.with_name(f"{of_study.data.scored_on}.jsonl") if of_study else every
    return scored_on if scored_on.is_file() else every


def _test_set(file: Path, digest: str) -> str | None:
    """The name of the study's set that a file holds, as the manifest beside it tells by its content."""
    test = read_json(file.with_name(MANIFEST)).get("splits", {}).get("test", {})
    sets = {"test": test} if test.get("is_the_study_file") else {}
    sets |= {name: made for name, made in test.get("subsets", {}).items() if "positions" in made}
    return next((name for name, made in sets.items() if made["sha256"] == digest), None)


def _read_rows(file: Path, limit: int | None) -> list[dict[str, Any]]:
    """The prepared rows of a file, at most `limit`."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; `recipe data prepare` writes test.jsonl")
    with file.open("rb") as lines:
        rows = list(islice(json_rows(lines, file, ("output",)), limit))
    if not rows:
        raise UserError(f"{file}: no rows to evaluate")
    return rows


def _as_row(i: int, row: dict[str, Any]) -> Row:
    """A test row as predictions.jsonl has it: its number, its reference, and its place and language where known."""
    return {"row": i} | {key: row[key] for key in ("idx", "lang") if key in row} | {"reference": row["output"]}


def _predict(task: Task) -> dict[int, Row]:
    """Predictions by row number. Finished batches are kept in a file, so that a second call goes on there.

    Batches are the same whether or not an earlier call did some of them: in half precision a row's
    prediction can depend on what it is batched with.
    """
    part, rows, settings = task.where / _PART, task.rows, task.settings
    done = _continue(part, settings)
    if len(done) < len(rows):
        if task.run.rehearsal:
            os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        from .generate import Generator

        generator = Generator(settings, task.cfg, task.folder.output)
        prompts = generator.prompts(rows)
        # the longest first: if memory does not suffice, that shows at once
        by_length = sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))
        longest = len(prompts[by_length[0]])
        with Bar("evaluating", len(rows)) as bar, part.open("ab") as stream:
            bar.update(len(done))
            for number, batch in enumerate(_batches(by_length, settings.batch_size)):
                if all(i in done for i in batch):
                    continue
                texts = generator.generate([prompts[i] for i in batch], number, longest)
                for i, text in zip(batch, texts, strict=True):
                    done[i] = _as_row(i, rows[i]) | {"prediction": text}
                stream.write(b"".join(orjson.dumps(done[i]) + b"\n" for i in batch))
                stream.flush()
                bar.update(len(done))
    return done


def _continue(part: Path, settings: Settings) -> dict[int, Row]:
    """The rows of an interrupted evaluation with the same settings; otherwise a new file for them."""
    header = orjson.dumps(settings.same_predictions())
    lines = part.read_bytes().split(b"\n") if part.is_file() else [b""]
    if lines[0] == header:
        whole = [orjson.loads(line) for line in lines[1:-1]]
        part.write_bytes(b"\n".join(lines[:-1]) + b"\n")  # without the last line of a killed process
        return {row["row"]: row for row in whole}
    part.write_bytes(header + b"\n")
    return {}


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
