"""The predictions of an evaluation, generated in batches, so that an interrupted one can continue."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import batched, groupby
from pathlib import Path

import orjson

from ..base.disks import naming
from ..base.errors import WorkFailed
from ..base.files import Row, loads, opened, replacing
from ..base.progress import Bar
from ..base.yamlfiles import Config
from .evaluation_rows import EvaluationRows
from .evaluations import EvaluationSettings, Prediction

BATCH_TOKENS = 8192
"""The most tokens of a batch. Their keys and values take 4 GiB in a Llama 2 7B, more than in any other of the study's
models; a card of 16 GB has that beside the weights."""


def as_row(i: int, row: Row, reference: str) -> Row:
    """A test row as in predictions.jsonl: its number and reference, and its position and language where known."""
    known = {"idx": (int, str), "lang": (str,)}  # anybody's data can have something else there, true among it
    kept = {key: row[key] for key, kinds in known.items() if type(row.get(key)) in kinds}
    return {"row": i} | kept | {"reference": reference}


def predict(
    evaluated: EvaluationRows, settings: EvaluationSettings, cfg: Config, tokenizer: Path, part: Path, on_cpu: bool
) -> list[Row]:
    """The test rows with their predictions.

    Batches are the same whether or not an earlier call generated some of them: in half precision a row's
    prediction can depend on the other rows of its batch.

    Args:
        evaluated: the test rows.
        settings: what the predictions depend on.
        cfg: the run's config.
        tokenizer: the folder in which the training left its tokenizer.
        part: a file that keeps finished batches, from which a second call continues.
        on_cpu: whether to leave the GPU alone, as a rehearsal does.

    Raises:
        UserError: see `Prompter.examples`.
        WorkFailed: a batch does not fit the GPU's memory.
    """
    rows = evaluated.rows
    done = _continue(part, settings)
    if len(done) < len(rows):
        if on_cpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        with Bar("loading the model") as bar:
            import torch

            from .generate import Generator

            generator = Generator(settings, cfg, tokenizer)
            bar.begin("tokenizing the prompts")
            examples = generator.examples(rows, evaluated.keys)
        with Bar("evaluating", len(rows), len(done)) as bar, naming(part), opened(part, "ab") as stream:
            lengths = [len(example.prompt) + settings.decoding.max_new_tokens for example in examples]
            for number, (room, batch) in enumerate(batches(lengths, settings.batch_size)):
                if all(i in done for i in batch):
                    continue
                try:
                    texts = generator.generate([examples[i].prompt for i in batch], number, room)
                except torch.OutOfMemoryError:
                    raise WorkFailed(
                        f"{len(batch)} rows of up to {room} tokens do not fit the GPU's memory; --batch-size "
                        f"{max(len(batch) // 2, 1)} takes fewer"
                    ) from None
                for i, text in zip(batch, texts, strict=True):
                    done[i] = as_row(i, rows[i], examples[i].reference) | {"prediction": text}
                stream.write(b"".join(orjson.dumps(done[i]) + b"\n" for i in batch))
                stream.flush()
                bar.update(len(done))
    return [done[i] for i in range(len(rows))]


def batches(lengths: Sequence[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Which rows are generated together, the longest first: too little memory shows at once.

    Rows that need about the same room are together, and there are few sizes of room, so that a static cache, and what
    is compiled for it, can be reused.

    Args:
        lengths: for each row the tokens of its prompt and of the longest answer.
        most: the most rows in a batch.

    Yields:
        The room, a power of two of tokens, and the positions of `most` rows, or of as many as `BATCH_TOKENS` allow.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for room, same in groupby(by_length, key=lambda i: max(1 << (lengths[i] - 1).bit_length(), 256)):
        for batch in batched(same, max(min(most, BATCH_TOKENS // room), 1)):
            yield room, list(batch)


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
