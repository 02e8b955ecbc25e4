"""Rewards of held-out preference pairs, over the pairs and not over batches.

The reward of an answer is beta times the difference of its log-probabilities under the policy and under the reference
(Rafailov 2023, arXiv 2305.18290); SimPO and ORPO have no reference, and take beta times the mean log-probability of the
answer's tokens. The accuracy is the share of pairs whose chosen answer has the higher reward. TRL
logs means over batches, so that a pair in a short last batch weighs more; with several ranks, repeated rows count
twice.
"""

import hashlib
from collections.abc import Sequence
from itertools import batched
from typing import Any

import numpy as np
import torch

from .run_record import EvalTokens

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_LABELLED = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""Columns of tokens of TRL's trainers for SimPO and ORPO."""
NAMES = ("eval_reward_accuracy", "eval_reward_margin", "eval_reward_chosen", "eval_reward_rejected")
TRAINED = {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}
"""Fields of metrics.jsonl by TRL's names: means over the micro batches since the last record."""


def has_pairs(rows: Any) -> bool:
    """True for pairs that one of TRL's trainers has tokenized."""
    return bool(_token_columns(rows))


def _token_columns(rows: Any) -> tuple[str, ...]:
    """Columns with the tokens of pairs; empty for other rows."""
    names = set(getattr(rows, "column_names", None) or ())
    for columns in (_IDS, _LABELLED):
        if names.issuperset(columns):
            return columns
    return ()


def scored_pairs(rows: Any) -> EvalTokens:
    """Number of pairs, and a hash of their tokens that does not depend on their order."""
    digests = []
    columns = _token_columns(rows)
    for row in rows.select_columns(columns):
        digest = hashlib.sha256()
        for name in columns:
            digest.update(np.array([len(row[name]), *row[name]], dtype="<i8").tobytes())
        digests.append(digest.digest())
    return {"count": len(digests), "sha256": hashlib.sha256(b"".join(sorted(digests))).hexdigest()}


def measured(trainer: Any, rows: Any) -> dict[str, float]:
    """Accuracy as a share, and means of margins and rewards over all pairs, by their names in `NAMES`.

    Empty if answers differ in the weight of their tokens (dpo_ld_alpha), because rewards then have another meaning.
    """
    if getattr(trainer, "ld_alpha", None) is not None:
        return {}
    columns = _token_columns(rows)
    lengths = [_length(row, columns) for row in rows]
    longest_first = sorted(range(len(rows)), key=lambda i: -lengths[i])  # similar lengths need little padding
    batches = list(batched(longest_first, trainer.args.per_device_eval_batch_size))
    ranks = trainer.accelerator.num_processes
    sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=trainer.args.device)
    for first in range(0, len(batches), ranks):
        mine = first + trainer.accelerator.process_index
        # engines that exchange weights need equally many steps of each rank: extra steps repeat the last batch
        values = _rewards(trainer, [rows[i] for i in batches[min(mine, len(batches) - 1)]])
        if mine < len(batches):
            sums += values
    *totals, count = trainer.accelerator.reduce(sums, "sum").tolist()
    return {name: total / count for name, total in zip(NAMES, totals, strict=True)} if count else {}


def _length(row: dict[str, Any], columns: Sequence[str]) -> int:
    return sum(len(row[name]) for name in columns)


def _rewards(trainer: Any, pairs: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Sums of the values in `NAMES` over some pairs, then the number of pairs."""
    batch = trainer._prepare_inputs(trainer.data_collator([*pairs]))
    with torch.no_grad(), trainer.compute_loss_context_manager():  # same precision as the trainer's evaluation
        if "chosen_labels" in batch:
            scores = trainer.concatenated_forward(trainer.model, batch)[:2]  # means over the tokens of an answer
        else:
            scores = _ratios(trainer, batch)
    chosen, rejected = (trainer.beta * score.double() for score in scores)
    margins = chosen - rejected
    values = torch.stack([(margins > 0).double(), margins, chosen, rejected, torch.ones_like(margins)])
    return values.sum(dim=1)


def _ratios(trainer: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Differences of log-probabilities to the reference, of the chosen and of the rejected answers."""
    policy = _log_probabilities(trainer.model, batch)
    if "ref_chosen_logps" in batch:
        reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    else:
        reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    return [mine - base for mine, base in zip(policy, reference, strict=True)]


def _log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of the chosen and of the rejected answers in a batch."""
    from trl.trainer.utils import selective_log_softmax

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    mask = batch["completion_mask"][:, 1:]
    return selective_log_softmax(logits, batch["input_ids"][:, 1:], row_mask=mask).sum(dim=1).chunk(2)
