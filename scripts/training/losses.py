"""Losses: Axolotl's loss in chunks, and the eval loss per token.

The eval loss per token is the mean over all tokens with a label, equally weighted. Axolotl's `eval_loss` averages the
mean losses of batches, so that a token in a batch with few labels weighs more. With several ranks, rows repeated to
fill the last batch count twice. Packing drops some rows, or all if they are few. `eval_loss` therefore depends on
packing, batch size, row order and number of ranks. It is comparable only between runs that share all four.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import batched, groupby
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from . import rewards
from .run_record import EvalTokens, Piece

MASKED = -100  # label of a token without loss
NAME = "eval_loss_per_token"
_MULTIPLE = 64  # row lengths are padded to multiples of this, to limit the number of shapes


def add_to(trainer: Any, begins: Callable[[], None], record: Callable[[str, EvalTokens], None]) -> None:
    """Have a trainer call `begins` before each evaluation, and log the loss per token, or the rewards of pairs.

    The trainer logs this loss, in nats, under NAME. It measures the loss in a second pass over the unpacked rows;
    eval_runtime includes the time of this pass. Once, on the first rank, it calls `record` with the tokens behind the
    loss, and their name in metrics.jsonl. There is no loss per token under tensor or context parallelism, for streamed
    rows, or for rows without input_ids and labels: in these cases, it is unknown which rows each rank should process,
    or which tokens have a loss. For preference pairs, see the module `rewards`.
    """
    evaluate = trainer.evaluation_loop
    is_recorded = False

    def evaluate_twice(dataloader: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal is_recorded
        begins()
        output = evaluate(dataloader, *arguments, **options)
        if options.get("metric_key_prefix") != "eval":
            return output
        rows = dataloader.dataset
        are_pairs = rewards.has_pairs(rows)
        values = rewards.measured(trainer, rows) if are_pairs else _measured(trainer, rows)
        output.metrics.update(values)
        if values and trainer.is_world_process_zero() and not is_recorded:
            if are_pairs:
                record("eval_pairs", rewards.scored_pairs(rows))
            else:
                record("eval_tokens", scored_tokens(rows))
            is_recorded = True
        return output

    trainer.evaluation_loop = evaluate_twice


def scored_tokens(rows: Any) -> EvalTokens:
    """Tokens behind a loss per token: their number, and a hash that depends neither on order nor on padding.

    The hash covers the rows that have a label behind their first token. A row ends with its last label, because what
    follows, such as padding, has no effect on the loss.

    Args:
        rows: a data set with the columns input_ids and labels.
    """
    count = 0
    digests = []
    for row in rows.with_format("numpy", columns=["input_ids", "labels"]):
        labels = row["labels"].astype("<i8")
        labelled = np.flatnonzero(labels[1:] != MASKED) + 1
        if labelled.size:
            end = labelled[-1] + 1
            count += labelled.size
            ids = row["input_ids"].astype("<i8")
            digests.append(hashlib.sha256(ids[:end].tobytes() + labels[1:end].tobytes()).digest())
    return {"count": count, "sha256": hashlib.sha256(b"".join(sorted(digests))).hexdigest()}


def pieces(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """Text of a row in pieces that are trained on, and pieces that are not."""
    row: list[Piece] = []
    for learnt, pairs in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != MASKED):
        text = tokenizer.decode([token for token, _ in pairs], skip_special_tokens=False)
        row.append({"text": text, "learnt": learnt})
    return row


def _is_measurable(trainer: Any, rows: Any) -> bool:
    """True if each rank can compute the loss of its share of the rows, see `add_to`."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        return False
    columns = getattr(rows, "column_names", None) or ()
    return {"input_ids", "labels"} <= set(columns) and hasattr(rows, "__len__")


def _measured(trainer: Any, rows: Any) -> dict[str, float]:
    """Loss per token by its name; empty if not measurable."""
    loss = _mean_loss(trainer, rows)
    return {} if loss is None else {NAME: loss}


def _mean_loss(trainer: Any, rows: Any) -> float | None:
    """Mean loss per labelled token over all ranks; None if not measurable."""
    if not _is_measurable(trainer, rows):
        return None
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest_first = sorted(range(len(rows)), key=lambda i: -lengths[i])  # similar lengths need little padding
    batches = list(batched(longest_first, trainer.args.per_device_eval_batch_size))
    ranks = trainer.accelerator.num_processes
    total = 0.0
    tokens = 0
    for first in range(0, len(batches), ranks):
        mine = first + trainer.accelerator.process_index
        # DeepSpeed and FSDP exchange weights in each step, so all ranks need equally many;
        # extra steps repeat the last batch without labels
        batch = _collated(trainer, [rows[i] for i in batches[min(mine, len(batches) - 1)]], mine >= len(batches))
        with torch.no_grad(), trainer.compute_loss_context_manager():  # same precision as the trainer's evaluation
            loss = float(trainer.model(**batch).loss)
        if count := int((batch["labels"][:, 1:] != MASKED).sum()):  # without labels the loss is NaN
            total += loss * count
            tokens += count
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=trainer.args.device)
    total, tokens = trainer.accelerator.reduce(sums, "sum").tolist()
    return total / tokens if tokens else None


def _collated(trainer: Any, rows: Sequence[dict[str, Any]], masked: bool) -> dict[str, torch.Tensor]:
    """Batch of right-padded rows; the trainer's packing collator would join them."""
    longest = max(len(row["input_ids"]) for row in rows)
    width = -(-longest // _MULTIPLE) * _MULTIPLE
    shape = len(rows), width
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),  # padding can be any token, because attention is masked
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, MASKED),
    }
    for i, row in enumerate(rows):
        end = len(row["input_ids"])
        batch["input_ids"][i, :end] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][i, :end] = 1
        if not masked:
            batch["labels"][i, :end] = torch.as_tensor(row["labels"])
    return trainer._prepare_inputs(batch)


def highest_first_loss(guessing: float, tokens: int) -> float:
    """Highest mean loss that an intact model can have in its first step.

    1.2 times the loss of random guessing, plus three standard errors of a mean over so many tokens. It assumes that the
    losses of single tokens vary by at most the loss of guessing. Answers of a few tokens, such as a label and an end
    token, which the model never saw in this form, start far above guessing (seen: 15.7 for 10.8).

    Args:
        guessing: loss of random guessing, in nats.
        tokens: number of tokens with a label behind the mean.
    """
    return guessing * (1.2 + 3 / math.sqrt(tokens))


def chunked_loss() -> Any:
    """Axolotl's loss in eight chunks, not compiled; its memory is an upper bound."""
    with patch("torch.compile", lambda function, **_: function):
        from axolotl.monkeypatch.loss.chunked import get_causal_lm_loss

        return get_causal_lm_loss()
