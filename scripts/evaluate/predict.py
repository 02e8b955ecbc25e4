"""Generate predictions, row by row, so that an interrupted evaluation can continue.

An engine other than the reference first answers a sample of the rows, and these answers are compared with those
of the reference engine. Different engines add numbers in different orders. Occasionally this swaps two tokens of nearly
equal probability, and the answers differ from there on. With a wrong adapter or prompt, most answers differ early.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from ..base.errors import UserError, WorkFailed
from ..base.files import Row, digest, json_lines, naming, opened, parse_json, read_bytes, replacing
from ..base.run_files import RunFile
from ..base.terminal import Bar, say
from ..base.yamlfiles import Config
from ..config import gpus
from ..data.studies import Decoding
from .engines import ENGINES
from .evaluation_rows import EvaluationRows
from .scores_file import Prediction
from .settings import REFERENCE, Agreement, Completion, Engine, EvaluationSettings, sampled

if TYPE_CHECKING:
    from .prompter import Prompter  # imports torch and Axolotl

OF_ENGINE = {"batch_tokens", "agreement", "distance"}  # settings that are known only after an engine has started

ROW_FIELDS = ("idx", "lang", "group", "database", "database_sql")
"""Fields of test rows that predictions.jsonl keeps, for tables and metrics."""


def as_row(position: int, row: Row, reference: str) -> Row:
    """Row of predictions.jsonl without its prediction."""
    # user data can have other types in these fields; type() also rejects bool, which isinstance accepts as int
    fields = {key: row[key] for key in ROW_FIELDS if type(row.get(key)) in (int, str)}
    return {"row": position} | fields | {"reference": reference}


def predict(
    settings: EvaluationSettings,
    test: EvaluationRows,
    cfg: Config,
    tokenizer: Path,
    part: Path,
    server: str | None = None,
    rehearsal: bool = False,
) -> tuple[list[Row], EvaluationSettings]:
    """Generate predictions of test rows.

    vLLM's answers are first compared with the reference engine's. A server's answers are compared if this machine has a
    GPU, or in a rehearsal, which needs no GPU. Of a GGUF file, the tokens are compared, and then the log-probabilities;
    see `llama.LlamaServer`.

    Args:
        settings: model, engine and decoding.
        test: test rows.
        cfg: the run's config.
        tokenizer: folder of the training tokenizer.
        part: file of the predictions; a later call continues from it.
        server: server URL, for engine `SERVER`.
        rehearsal: True for a rehearsal.

    Returns:
        Predictions, and the settings, including those that only the running engine knows (`OF_ENGINE`).

    Raises:
        UserError: see `read_part`, `Prompter.examples`, `Starter.require` and `Starter.start`.
        WorkFailed: the engine cannot continue.
    """
    on_gpu = not rehearsal and bool(gpus.here())
    starter = ENGINES[settings.engine](server)
    starter.require(settings, on_gpu)
    done, settings = read_part(part, settings, [row.position for row in test.rows])
    if len(done) < len(test.rows):
        with Bar("tokenizing the prompts"):
            from .prompter import Prompter

            prompter = Prompter(settings, cfg, tokenizer)
            examples = prompter.examples(test.rows)
        prompts = [example.prompt for example in examples]
        compares = starter.is_compared(settings, on_gpu or rehearsal)
        expected = answers_of_reference(prompter, sampled(prompts)) if compares else []
        with starter.start(prompter, prompts, part) as engine:
            settings = settings.model_copy()
            settings.batch_tokens = engine.settings.batch_tokens
            settings.distance = engine.check(examples, on_gpu or rehearsal)
            if compares:
                settings.agreement = compare_answers(expected, engine, sampled(prompts))
            engine.settings = settings
            rows = []
            for row, example in zip(test.rows, examples, strict=True):
                rows.append(as_row(row.position, row.content, example.reference))
            _generate(engine, prompts, rows, done, part)
    return [done[place] for place in range(len(test.rows))], settings


def settings_line(settings: EvaluationSettings) -> bytes:
    """Line with the settings in `OF_ENGINE`, for the predictions that follow it in the file."""
    return orjson.dumps(settings.model_dump(include=OF_ENGINE)) + b"\n"


def part_file(folder: Path, settings: EvaluationSettings) -> Path:
    """File of predictions during an evaluation, named after the settings that change its predictions."""
    identity = settings.identity() | settings.model_dump(include={"engine", "model"})
    if settings.engine == REFERENCE and settings.decoding.do_sample:  # otherwise batches change only rounding
        identity |= settings.model_dump(include={"rows", "batch_size"})
    return folder / RunFile.PART.format(digest(identity)[:12])


def read_part(
    part: Path, settings: EvaluationSettings, positions: Sequence[int]
) -> tuple[dict[int, Row], EvaluationSettings]:
    """Read an interrupted evaluation, or start a new file.

    Args:
        part: file of the predictions.
        settings: model, engine and decoding.
        positions: positions of the requested rows in their source.

    Returns:
        Predictions by place in `positions`, and the settings, including those that only the file knows.

    Raises:
        UserError: the file has predictions of more rows.
    """
    done = {}
    lines = read_bytes(part).split(b"\n") if part.is_file() else []
    for line in lines:
        with suppress(ValueError):  # skips lines truncated by a killed process or a power failure
            row = parse_json(line)
            if isinstance(row, dict) and "agreement" in row:
                of_engine = {key: row.get(key) for key in OF_ENGINE}
                settings = EvaluationSettings.model_validate(settings.model_dump() | of_engine)
            else:
                Prediction.model_validate(row)
                done[row["row"]] = row
    if done.keys() - set(positions):
        raise UserError(f"{part}: has predictions of more rows; repeat the command that made them, or delete the file")
    with replacing(part) as stream:
        stream.write(settings_line(settings))
        stream.writelines(json_lines(done.values()))
    return {place: done[position] for place, position in enumerate(positions) if position in done}, settings


def _generate(
    engine: Engine, prompts: Sequence[list[int]], rows: Sequence[Row], done: dict[int, Row], part: Path
) -> None:
    """Generate missing predictions; add them to `done` and to the file `part`, after the engine's settings.

    A prediction is marked as truncated if it reaches the limit of new tokens without an EOS or end-of-turn
    token at its end.
    """
    most, ends = engine.settings.decoding.max_new_tokens, engine.ends
    with Bar("evaluating", len(rows), len(done)) as bar, naming(part), opened(part, "ab") as stream:
        stream.write(settings_line(engine.settings))
        try:
            for answers in engine.generate(prompts, done):
                for i, answer in answers.items():
                    done[i] = rows[i] | {"prediction": answer.text}
                    if len(answer.tokens) >= most and answer.tokens[-1] not in ends:
                        done[i]["truncated"] = True
                stream.writelines(json_lines(done[i] for i in answers))
                stream.flush()
                bar.update(len(done))
        except WorkFailed as error:
            if not done:
                raise
            kept_rows = f"{len(done):,} of {len(rows):,} rows are kept; repeat the command to continue"
            raise WorkFailed(f"{error}\n{kept_rows}") from None


def answers_of_reference(prompter: "Prompter", prompts: Sequence[list[int]]) -> list[Completion]:
    """Greedy answers of the reference engine; its memory is freed afterwards."""
    from .transformers_engine import TransformersEngine

    reference = TransformersEngine(prompter)
    answers = _greedily(reference, prompts, "the reference answers")
    reference.free()
    return answers


def compare_answers(expected: Sequence[Completion], engine: Engine, prompts: Sequence[list[int]]) -> Agreement:
    """Compare an engine's greedy answers with those of the reference engine; log the result."""
    name = engine.settings.engine
    answers = _greedily(engine, prompts, f"{name} answers")
    equal = sum(answer.text == other.text for answer, other in zip(expected, answers, strict=True))
    agreement = Agreement(rows=len(answers), equal=equal)
    say(f"{name}: {agreement}")
    return agreement


def _greedily(engine: Engine, prompts: Sequence[list[int]], doing: str) -> list[Completion]:
    settings = engine.settings
    greedy = Decoding(max_new_tokens=settings.decoding.max_new_tokens)
    engine.settings = settings.model_copy(update={"decoding": greedy})
    done: dict[int, Completion] = {}
    with Bar(doing, len(prompts)) as bar:
        for answers in engine.generate(prompts, done):
            done |= answers
            bar.update(len(done))
    engine.settings = settings
    return [done[i] for i in range(len(prompts))]
