"""Predictions of a run's model on test rows, and their scores: `recipe evaluate`."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel

from . import config, study
from .errors import UserError
from .files import json_rows, replacing, sha256, write_atomically
from .progress import Bar, say
from .quiet import importing_axolotl
from .rundir import Run, RunDir, held, now
from .score import score

BASE = "none"  # --adapter none: the base model without an adapter


@dataclass
class Settings:
    """All that predictions depend on besides the packages; recorded with them."""

    base_model: str
    adapter: str
    adapter_sha256: str | None
    data: str
    data_sha256: str
    rows: int
    limit: int | None
    max_new_tokens: int
    do_sample: bool
    batch_size: int
    quantized: bool
    dtype: str

    def same_predictions(self) -> dict[str, Any]:
        """What two evaluations with the same predictions have in common: all but how things were named."""
        return {key: value for key, value in asdict(self).items() if key not in ("adapter", "data", "limit")}


def evaluate(
    folder: RunDir,
    data: Path | None = None,
    limit: int | None = None,
    adapter: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
) -> "Evaluation":
    """Generate a prediction for each test row and score them all.

    predictions.jsonl and scores.json go to the run's folder; those of the base model, or of another
    adapter than the run's, to evaluations/<its name>/ below it. An evaluation that was interrupted goes on
    where it was, one that is complete is not done again.

    Args:
        folder: the run.
        data: prepared rows; by default the test.jsonl beside the run's training data.
        limit: evaluate the first so many rows only.
        adapter: an adapter's folder, or `none` for the base model alone; by default the run's adapter.
        max_new_tokens: by default the study's.
        batch_size: rows generated at a time.

    Raises:
        UserError: the adapter or the data is missing, or a row has no output.
    """
    run = folder.read()
    cfg = config.read_yaml(folder.config)
    weights = None if adapter == BASE else folder.output if adapter is None else Path(adapter)
    if weights and not (weights / "adapter_model.safetensors").is_file():
        hint = "" if adapter else f"; the run is {run.state}"
        raise UserError(f"{weights}: no adapter (adapter_model.safetensors) there{hint}")
    if not (folder.output / "tokenizer_config.json").is_file() or "base_model" not in cfg:
        raise UserError(f"{folder.path}: the run ended before it had a tokenizer and a model; it is {run.state}")
    if run.state != "finished":
        say(f"{folder.path}: the run is {run.state} at step {run.summary.step} of {run.summary.max_steps}")
    if data is None and run.test_data is None:
        raise UserError(f"{folder.path}: no test.jsonl lay beside its training data; name one with --data")
    file = data or Path(run.cwd, str(run.test_data))
    rows = _read_rows(file, limit)
    of_study = study.of(run.recipe)
    local = Path(run.cwd, str(cfg["base_model"]))
    settings = Settings(
        base_model=str(local) if local.is_dir() else cfg["base_model"],
        adapter=str(weights.resolve()) if weights else BASE,
        adapter_sha256=sha256(weights / "adapter_model.safetensors") if weights else None,
        data=str(file.resolve()),
        data_sha256=sha256(file),
        rows=len(rows),
        limit=limit,
        max_new_tokens=max_new_tokens or (of_study.decoding.max_new_tokens if of_study else 96),
        do_sample=of_study.decoding.do_sample if of_study else False,
        batch_size=batch_size,
        quantized=bool(cfg.get("load_in_4bit")),
        dtype="bfloat16" if cfg.get("bf16") else "float16" if cfg.get("fp16") else "float32",
    )
    where = folder.path if adapter is None else folder.path / "evaluations" / _label(settings)
    where.mkdir(parents=True, exist_ok=True)
    with held(where / ".evaluation.lock", "another evaluation is going on"):
        predictions = where / "predictions.jsonl"
        former = read_scores(where)
        if former and former.settings.same_predictions() == settings.same_predictions() and predictions.is_file():
            say(f"{predictions}: complete, made with the same settings; scoring it anew")
            done = {row["row"]: row for row in map(orjson.loads, predictions.read_bytes().splitlines())}
        elif former and former.settings.adapter_sha256 == settings.adapter_sha256 and former.settings.rows > len(rows):
            raise UserError(
                f"{where}: holds an evaluation of {former.settings.rows} rows; move it away to make a smaller"
            )
        else:
            with importing_axolotl(offline=run.rehearsal):
                done = _predict(folder, where, rows, settings, cfg, run)
        with replacing(predictions) as stream:
            for i in range(len(rows)):
                stream.write(orjson.dumps(done[i]) + b"\n")
        scores = score([(row["reference"], row["prediction"]) for _, row in sorted(done.items())])
        result = Evaluation(made=now(), rehearsal=run.rehearsal, scores=scores, settings=settings)
        write_atomically(where / _SCORES, result.model_dump_json(indent=1) + "\n")
        (where / _PART).unlink(missing_ok=True)
    return result


_PART, _SCORES = "predictions.part.jsonl", "scores.json"
BASE_MODEL = "base-model"  # the folder of the base model's evaluation


class Evaluation(BaseModel):
    """The content of scores.json."""

    made: str
    rehearsal: bool
    scores: dict[str, int | float | str]
    settings: Settings


def read_scores(folder: Path) -> Evaluation | None:
    """The evaluation in a folder, or None where there is none or its file is damaged."""
    try:
        return Evaluation.model_validate_json((folder / _SCORES).read_bytes())
    except (OSError, ValueError):
        return None


def _label(settings: Settings) -> str:
    """The name of an evaluation that is not of the run's own adapter."""
    if settings.adapter_sha256 is None:
        return BASE_MODEL
    return f"{Path(settings.adapter).name}-{settings.adapter_sha256[:7]}"


def _read_rows(file: Path, limit: int | None) -> list[dict[str, str]]:
    """The prepared rows of a file, at most `limit`."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; `recipe data prepare` writes test.jsonl")
    with file.open("rb") as lines:
        rows = list(islice(json_rows(lines, file, ("output",)), limit))
    if not rows:
        raise UserError(f"{file}: no rows to evaluate")
    return rows


def _predict(
    folder: RunDir, where: Path, rows: list[dict[str, str]], settings: Settings, cfg: config.Config, run: Run
) -> dict[int, dict[str, Any]]:
    """Predictions by row number. Finished batches are kept in a file, so that a second call goes on there.

    Batches are the same whether or not an earlier call did some of them: in half precision a row's
    prediction can depend on what it is batched with.
    """
    part = where / _PART
    done = _continue(part, settings)
    if len(done) < len(rows):
        if run.rehearsal:
            os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        from .generate import Generator

        generator = Generator(settings, cfg, folder.output)
        prompts = generator.prompts(rows)
        # the longest first: if memory does not suffice, that shows at once
        by_length = sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))
        with Bar("evaluating", len(rows)) as bar, part.open("ab") as stream:
            bar.update(len(done))
            for batch in _batches(by_length, settings.batch_size):
                if all(i in done for i in batch):
                    continue
                texts = generator.generate([prompts[i] for i in batch])
                for i, text in zip(batch, texts, strict=True):
                    done[i] = {"row": i, "reference": rows[i]["output"], "prediction": text}
                stream.write(b"".join(orjson.dumps(done[i]) + b"\n" for i in batch))
                stream.flush()
                bar.update(len(done))
    return done


def _continue(part: Path, settings: Settings) -> dict[int, dict[str, Any]]:
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
