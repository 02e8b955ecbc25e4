"""Predictions made elsewhere: the prompts to make them from, and the file that they come back in."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..base.errors import UserError
from ..base.files import Row
from ..base.quiet import importing_axolotl
from ..base.yamlfiles import Config
from .evaluation_rows import EvaluationRows
from .evaluations import EvaluationSettings
from .predict import as_row
from .score import read_rows

HASH = "prompt_sha256"
NOTE = "the predictions were made elsewhere, from the run's prompts; by which adapter and decoding is not checked"


def prompts(
    evaluated: EvaluationRows, settings: EvaluationSettings, cfg: Config, tokenizer: Path, offline: bool
) -> list[Row]:
    """The model's exact input for each test row.

    Args:
        evaluated: the test rows.
        settings: the base model, and how many tokens an answer may have.
        cfg: the run's config.
        tokenizer: the folder in which the training left its tokenizer.
        offline: whether to leave the hub alone.

    Returns:
        Rows with `row`, `reference`, `idx` and `lang` if known, `prompt`, `prompt_token_ids`, and `prompt_sha256` of
        the latter. Use the ids: they begin with the token that starts a text, which a server may add to a `prompt` a
        second time, or not at all.
    """
    with importing_axolotl(offline=offline):
        from .prompter import Prompter

        prompter = Prompter(settings, cfg, tokenizer)
        examples = prompter.examples(evaluated.rows, evaluated.keys)
        texts = prompter.tokenizer.batch_decode([example.prompt for example in examples], skip_special_tokens=False)
    return [
        as_row(i, row, example.reference)
        | {"prompt": text, "prompt_token_ids": example.prompt, HASH: _sha256(example.prompt)}
        for i, (row, text, example) in enumerate(zip(evaluated.rows, texts, examples, strict=True))
    ]


def predictions(file: Path, asked: Sequence[Row]) -> list[Row]:
    """The test rows with the predictions that a file has for them, in whatever order.

    Args:
        file: the rows of `prompts` in JSONL, each with `prediction`; the texts of the prompts can be gone.
        asked: what `prompts` returns now.

    Raises:
        UserError: a row has no prediction or is not there, or was made from another prompt.
    """
    given: dict[int, Row] = {}
    for line, row in enumerate(read_rows(file, ("prediction", HASH), "; --export-prompts makes its rows"), start=1):
        number = row.get("row")
        if not isinstance(number, int) or number in given:
            twice = isinstance(number, int)
            was = f"has the row {number}, as another line" if twice else f"has no whole number as its row ({number!r})"
            raise UserError(f"{file}:{line}: {was}; keep the field row of --export-prompts")
        given[number] = row
    if unknown := sorted(given.keys() - range(len(asked))):
        raise UserError(
            f"{file}: has row {unknown[0]}, and {len(asked)} rows are evaluated, from 0 on; --limit, --data and "
            "--decoding have to be those of the export"
        )
    missing = [number for number in range(len(asked)) if number not in given]
    if missing:
        raise UserError(
            f"{file}: has only {len(given)} of {len(asked)} rows; row {missing[0]} is missing; add it, or evaluate the "
            "first rows alone with --limit"
        )
    for number, row in enumerate(asked):
        if given[number][HASH] != row[HASH]:
            raise UserError(
                f"{file}: row {number} was made from another prompt than the run's: of other rows, or of another run; "
                "--export-prompts writes this run's"
            )
    kept = ("row", "idx", "lang", "reference")
    return [
        {key: row[key] for key in kept if key in row} | {"prediction": given[number]["prediction"]}
        for number, row in enumerate(asked)
    ]


def _sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
