"""The predictions of an evaluation, kept as they are generated, so that an interrupted one can continue."""

import os
from contextlib import suppress
from pathlib import Path

import orjson

from ..base.disks import naming
from ..base.files import Row, loads, opened, replacing
from ..base.progress import Bar
from ..base.yamlfiles import Config
from .engines.engine import Engine
from .evaluation_rows import EvaluationRows
from .evaluations import EvaluationSettings, Prediction


def as_row(i: int, row: Row, reference: str) -> Row:
    """A test row as in predictions.jsonl: its number and reference, and its position and language where known."""
    known = {"idx": (int, str), "lang": (str,)}  # anybody's data can have something else there, true among it
    kept = {key: row[key] for key, kinds in known.items() if type(row.get(key)) in kinds}
    return {"row": i} | kept | {"reference": reference}


def predict(
    evaluated: EvaluationRows, settings: EvaluationSettings, cfg: Config, tokenizer: Path, part: Path, on_cpu: bool
) -> list[Row]:
    """The test rows with their predictions.

    Args:
        evaluated: the test rows.
        settings: what the predictions depend on.
        cfg: the run's config.
        tokenizer: the folder in which the training left its tokenizer.
        part: a file that keeps what is generated, from which a second call continues.
        on_cpu: whether to leave the GPU alone, as a rehearsal does.

    Raises:
        UserError: see `Prompter.examples`.
        WorkFailed: the engine cannot go on; what it has generated is kept.
    """
    rows = evaluated.rows
    done = _continue(part, settings)
    if len(done) < len(rows):
        if on_cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with Bar("loading the model") as bar:
            from .engines.reference import Reference
            from .prompter import Prompter

            prompter = Prompter(settings, cfg, tokenizer)
            engine: Engine = Reference(prompter)
            bar.begin("tokenizing the prompts")
            examples = prompter.examples(rows, evaluated.keys)
        with Bar("evaluating", len(rows), len(done)) as bar, naming(part), opened(part, "ab") as stream:
            for answers in engine.generate([example.prompt for example in examples], done):
                made = {
                    i: as_row(i, rows[i], examples[i].reference) | {"prediction": a.text} for i, a in answers.items()
                }
                stream.write(b"".join(orjson.dumps(row) + b"\n" for row in made.values()))
                stream.flush()
                done |= made
                bar.update(len(done))
    return [done[i] for i in range(len(rows))]


def _continue(part: Path, settings: EvaluationSettings) -> dict[int, Row]:
    """The rows of an interrupted evaluation with the same settings; otherwise a new file for them."""
    header = orjson.dumps(settings.same_predictions())
    first, *lines = part.read_bytes().split(b"\n") if part.is_file() else [b""]
    done: dict[int, Row] = {}
    for line in lines if first == header else ():
        with suppress(ValueError):  # what a killed process or a machine without power left is made again
            row = loads(line)
            Prediction.model_validate(row)
            done[row["row"]] = row
    with replacing(part) as stream:
        stream.writelines(line + b"\n" for line in (header, *map(orjson.dumps, done.values())))
    return {i: row for i, row in done.items() if i in range(settings.rows)}
