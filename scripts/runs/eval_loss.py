"""The eval loss of a model: the mean over all tokens that carry loss, each weighing the same.

Axolotl's own (`eval_loss`) is a mean of the means of batches: a token of a batch with few of them weighs more, rows
that fill up the last batch of several ranks count twice, and packing drops some, or all of few. So it depends on the
size of a batch, on the order of the rows and on the number of ranks, and two runs can be compared by it only where all
of these are the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

MASKED = -100  # the label of a token without loss
NAME = "eval_loss_per_token"
_MULTIPLE = 64  # of tokens in a batch, so that there are few shapes


def add_to(trainer: Any, begins: Callable[[], None]) -> None:
    """Have a trainer call `begins` before each evaluation, and log its eval loss, in nats, as NAME beside its own.

    It is measured in a second pass, which eval_runtime includes, over the rows as they are before packing. Where it
    is not known how rows are divided among ranks or which tokens carry loss, nothing is added: under tensor and
    context parallelism, for streamed rows, and for rows other than tokens with labels.
    """
    evaluate = trainer.evaluation_loop

    def evaluate_twice(dataloader: Any, *arguments: Any, **options: Any) -> Any:
        begins()
        output = evaluate(dataloader, *arguments, **options)
        if options.get("metric_key_prefix") == "eval" and (loss := _of_rows(trainer, dataloader.dataset)) is not None:
            output.metrics[NAME] = loss
        return output

    trainer.evaluation_loop = evaluate_twice


def _of_rows(trainer: Any, rows: Any) -> float | None:
    """The mean loss over the tokens of rows that carry loss, of all ranks; None as `add_to` says."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        return None
    if not {"input_ids", "labels"} <= set(getattr(rows, "column_names", None) or ()) or not hasattr(rows, "__len__"):
        return None
    lengths = [len(ids) for ids in rows["input_ids"]]
    longest_first = sorted(range(len(rows)), key=lambda i: -lengths[i])  # rows of like lengths need little padding
    size = trainer.args.per_device_eval_batch_size
    batches = [longest_first[start : start + size] for start in range(0, len(rows), size)]
    ranks = trainer.accelerator.num_processes
    total = 0.0
    tokens = 0
    for first in range(0, len(batches), ranks):
        mine = first + trainer.accelerator.process_index
        # all ranks make as many steps, because engines exchange weights in each; a batch that comes again is masked
        batch = _collated(trainer, [rows[i] for i in batches[min(mine, len(batches) - 1)]], mine >= len(batches))
        with (
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
        ):  # in the precision of the trainer's own evaluation
            loss = float(trainer.model(**batch).loss)
        if count := int((batch["labels"][:, 1:] != MASKED).sum()):  # without one the mean is NaN
            total += loss * count
            tokens += count
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=trainer.args.device)
    total, tokens = trainer.accelerator.reduce(sums, "sum").tolist()
    return total / tokens if tokens else None


def _collated(trainer: Any, rows: Sequence[dict[str, Any]], masked: bool) -> dict[str, torch.Tensor]:
    """Rows as a batch, padded on the right; the collator of a packed training would make one row of them."""
    longest = max(len(row["input_ids"]) for row in rows)
    width = -(-longest // _MULTIPLE) * _MULTIPLE
    shape = len(rows), width
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),  # any token will do where there is no attention
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
