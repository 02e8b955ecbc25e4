"""The predictions of an evaluation, kept as they are generated, so that an interrupted one can continue."""

import os
from contextlib import suppress
from pathlib import Path

import orjson

from ..base.errors import UserError, WorkFailed
from ..base.files import Row, loads, naming, opened, replacing
from ..base.progress import Bar
from ..configs import gpus
from . import agreement
from .engines.start import require, started
from .evaluations import REFERENCE, SERVER, VLLM, EvaluationSettings, Prediction
from .task import EvaluationTask

KNOWN = {"batch_tokens", "served", "agreement"}
"""Those settings that are known once an engine has started."""


def as_row(i: int, row: Row, reference: str) -> Row:
    """A test row as in predictions.jsonl: its number and reference, and its position and language where known."""
    known = {"idx": (int, str), "lang": (str,)}  # anybody's data can have something else there, true among it
    kept = {key: row[key] for key, kinds in known.items() if type(row.get(key)) in kinds}
    return {"row": i} | kept | {"reference": reference}


def predict(task: EvaluationTask, tokenizer: Path, part: Path) -> tuple[list[Row], EvaluationSettings]:
    """The test rows with their predictions, and the task's settings with what became known of its engine.

    vLLM is compared with the reference before it generates all rows, and so is a server where this machine has a GPU or
    the run is a rehearsal. A rehearsal leaves the GPU alone.

    Args:
        task: what is evaluated.
        tokenizer: the folder in which the training left its tokenizer.
        part: a file that keeps what is generated, from which a second call continues.

    Raises:
        UserError: see `Prompter.examples` and `engines.start.started`.
        WorkFailed: the engine cannot go on.
    """
    rows, asked = task.rows.rows, task.request
    on_gpu = not task.run.rehearsal and bool(gpus.here())
    require(task.settings, asked.server, on_gpu)
    done, settings = _continue(part, task.settings)
    if len(done) < len(rows):
        if task.run.rehearsal:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with Bar("tokenizing the prompts"):
            from .prompter import Prompter

            prompter = Prompter(settings, task.cfg, tokenizer)
            examples = prompter.examples(rows, task.rows.keys)
        prompts = [example.prompt for example in examples]
        # vLLM that was compared is the same again; what a server has may have changed since
        compared_again = settings.engine == SERVER and (on_gpu or task.run.rehearsal)
        compares = compared_again or (settings.engine == VLLM and settings.agreement is None)
        expected = agreement.by_reference(prompter, examples) if compares else []
        with started(prompter, prompts, asked.server, part) as engine:
            if done and settings.served and settings.served != engine.served:
                raise UserError(f"{part}: begun by {settings.served}, which is now {engine.served}; move it away")
            if compares:
                found = agreement.compare(expected, engine, prompter, examples)
                settings = settings.model_copy(update={"agreement": found})
            begun = {"batch_tokens": engine.settings.batch_tokens, "served": engine.served}
            settings = settings.model_copy(update=begun)
            with Bar("evaluating", len(rows), len(done)) as bar, naming(part), opened(part, "ab") as stream:
                stream.write(_line(settings))
                try:
                    for answers in engine.generate(prompts, done):
                        made = {
                            i: as_row(i, rows[i], examples[i].reference) | {"prediction": answer.text}
                            for i, answer in answers.items()
                        }
                        stream.write(b"".join(orjson.dumps(row) + b"\n" for row in made.values()))
                        stream.flush()
                        done |= made
                        bar.update(len(done))
                except WorkFailed as error:
                    kept = f"{len(done):,} of {len(rows):,} rows are kept, and the same command goes on from there"
                    raise WorkFailed(f"{error}\n{kept}") from None
    return [done[i] for i in range(len(rows))], settings


def _line(settings: EvaluationSettings) -> bytes:
    """What is known of the engine, as a line between the predictions."""
    return orjson.dumps(settings.model_dump(include=KNOWN)) + b"\n"


def _continue(part: Path, settings: EvaluationSettings) -> tuple[dict[int, Row], EvaluationSettings]:
    """The rows of an interrupted evaluation with the same settings, and what it knew of its engine; otherwise a new
    file for them."""
    of_batches = set() if settings.engine == REFERENCE else {"batch_size"}  # which it has not
    same = {key: value for key, value in settings.same_predictions().items() if key not in of_batches}
    header = orjson.dumps(same | settings.model_dump(include={"engine", "model"}))
    first, *lines = part.read_bytes().split(b"\n") if part.is_file() else [b""]
    done: dict[int, Row] = {}
    for line in lines if first == header else ():
        with suppress(ValueError):  # what a killed process or a machine without power left is made again
            row = loads(line)
            if isinstance(row, dict) and "served" in row:
                settings = EvaluationSettings.model_validate(
                    settings.model_dump() | {key: row.get(key) for key in KNOWN}
                )
                continue
            Prediction.model_validate(row)
            done[row["row"]] = row
    with replacing(part) as stream:
        stream.write(header + b"\n" + _line(settings))
        stream.writelines(orjson.dumps(row) + b"\n" for row in done.values())
    return {i: row for i, row in done.items() if i in range(settings.rows)}, settings
