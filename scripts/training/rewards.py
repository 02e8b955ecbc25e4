"""Rewards of held-out preference pairs, over the pairs and not over batches.

The reward of an answer is beta times the difference of its log-probabilities under the policy and under the reference
(Rafailov 2023, arXiv 2305.18290). The accuracy is the share of pairs whose chosen answer has the higher reward. TRL
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
NAMES = ("eval_reward_accuracy", "eval_reward_margin", "eval_reward_chosen", "eval_reward_rejected")
TRAINED = {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}
"""Fields of metrics.jsonl by TRL's names: means over the micro batches since the last record."""


def has_pairs(rows: Any) -> bool:
    """True for rows that TRL's DPO trainer has tokenized."""
    return set(_IDS) <= set(getattr(rows, "column_names", None) or ())


def scored_pairs(rows: Any) -> EvalTokens:
    """Number of pairs, and a hash of their tokens that does not depend on their order."""
    digests = []
    for row in rows.select_columns(_IDS):
        digest = hashlib.sha256()
        for name in _IDS:
            digest.update(np.array([len(row[name]), *row[name]], dtype="<i8").tobytes())
        digests.append(digest.digest())
    return {"count": len(digests), "sha256": hashlib.sha256(b"".join(sorted(digests))).hexdigest()}


def measured(trainer: Any, rows: Any) -> dict[str, float]:
    """Accuracy as a share, and means of margins and rewards over all pairs, by their names in `NAMES`.

    Empty if answers differ in the weight of their tokens (dpo_ld_alpha), because rewards then have another meaning.
    """
    if trainer.ld_alpha is not None:
        return {}
    longest_first = sorted(range(len(rows)), key=lambda i: -_length(rows[i]))  # similar lengths need little padding
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


def _length(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _rewards(trainer: Any, pairs: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Sums of the values in `NAMES` over some pairs, then the number of pairs."""
    batch = trainer._prepare_inputs(trainer.data_collator([*pairs]))
    with torch.no_grad(), trainer.compute_loss_context_manager():  # same precision as the trainer's evaluation
        policy = _log_probabilities(trainer.model, batch)
        if "ref_chosen_logps" in batch:
            reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        else:
            reference = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    chosen, rejected = (trainer.beta * (mine - base).double() for mine, base in zip(policy, reference, strict=True))
    margins = chosen - rejected
    values = torch.stack([(margins > 0).double(), margins, chosen, rejected, torch.ones_like(margins)])
    return values.sum(dim=1)


def _log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of the chosen and of the rejected answers in a batch."""
    from trl.trainer.utils import selective_log_softmax

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    mask = batch["completion_mask"][:, 1:]
    return selective_log_softmax(logits, batch["input_ids"][:, 1:], row_mask=mask).sum(dim=1).chunk(2)
