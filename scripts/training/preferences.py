"""Preference pairs as TRL's DPO trainer tokenizes them.

Importing this module imports Axolotl and TRL.
"""

import random
from collections.abc import Sequence
from itertools import batched
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from axolotl.prompt_strategies.dpo import load as load_strategy
from axolotl.utils.data import rl
from axolotl.utils.data.utils import remove_double_bos_token
from datasets import Dataset
from trl.data_utils import _tokenize
from trl.trainer import dpo_trainer, kto_trainer

from ..base.errors import UserError, with_type
from ..base.files import Row
from ..config.datafiles import DatasetRef


def single_bos() -> None:
    """Let rows of DPO and KTO begin with one BOS, as Axolotl intends.

    Axolotl 0.21 overrides a method for this that TRL 1.14 no longer calls (seen: a template's BOS and the tokenizer's).
    """

    def tokenize(tokenizer: Any, *arguments: Any, **options: Any) -> Any:
        tokenized = _tokenize(tokenizer, *arguments, **options)
        return remove_double_bos_token(tokenized, tokenizer.bos_token_id)

    for module in (dpo_trainer, kto_trainer):
        patch.object(module, "_tokenize", tokenize).start()


class PairIds(NamedTuple):
    """Token ids of a pair; `is_dropped` if Axolotl finds it too long."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    is_dropped: bool


def tokenize(cfg: Any, dataset: DatasetRef, tokenizer: Any, rows: Sequence[Row]) -> list[PairIds]:
    """Tokenize pairs as a training does, but keep and do not truncate those that exceed sequence_len.

    Args:
        cfg: a config, as Axolotl's DictDefault.
        dataset: the rows' data set; Axolotl reads test rows with the fields of the training set at this position.
        tokenizer: the tokenizer.
        rows: the rows.

    Raises:
        UserError: Axolotl cannot read the rows.
    """
    kind = cfg[dataset.section][dataset.index]["type"]
    try:
        with patch.dict(cfg, dataset_num_proc=None):
            pairs = _transformed(cfg, kind, dataset.index, tokenizer, Dataset.from_list([*rows]))
        ids = []
        for pair in _prepared(tokenizer, pairs):
            fits = rl._drop_long_sequences(pair, cfg["rl"], tokenizer, cfg["sequence_len"])
            ids.append(PairIds(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"], not fits))
    except Exception as error:  # templates, and fields with values of several types, can raise any exception
        raise UserError(f"Axolotl cannot read these rows as {kind}: {with_type(error)}") from None
    return ids


def trained_on(cfg: Any, tokenizer: Any) -> tuple[list[int], float]:
    """Tokens of each pair's two rows that a config trains on, and the share of padding in one epoch's micro batches.

    Axolotl's group_by_length has no effect on pairs, and TRL pads a batch to its longest row.

    Raises:
        UserError: Axolotl cannot prepare the rows.
    """
    try:
        prepared = _prepared(tokenizer, rl.prepare_preference_datasets(cfg, tokenizer)[0])
    except Exception as error:  # as above
        problem = f"Axolotl cannot prepare the rows: {with_type(error)}"
        raise UserError(problem, key="datasets", remedy="run `recipe check NAME --all-rows`") from None
    rows = []
    for pair in prepared:
        rows.append([len(pair["prompt_ids"]) + len(pair[answer]) for answer in ("chosen_ids", "rejected_ids")])
    sizes = [sum(row) for row in rows]
    random.Random(cfg.seed).shuffle(rows)
    padded = 0
    for batch in batched(rows, cfg.micro_batch_size):
        padded += 2 * len(batch) * max(map(max, batch))
    return sizes, 1 - sum(sizes) / padded if padded else 0.0


def _prepared(tokenizer: Any, pairs: Dataset) -> Any:
    """Pairs with the tokens of prompt and answers, as TRL makes them of texts."""
    single_bos()
    options: Any = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    return dpo_trainer.DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, options, "train")


def _transformed(cfg: Any, kind: Any, index: int, tokenizer: Any, rows: Dataset) -> Dataset:
    """Prompt, chosen and rejected texts of rows (axolotl/utils/data/rl.py, _load_split)."""
    if not kind:
        return rows
    transform = load_strategy("user_defined.default" if isinstance(kind, dict) else kind, cfg, dataset_idx=index)
    options: Any = {}
    if isinstance(transform, tuple):
        transform, options = transform
    return rl._map_dataset(cfg, rows, transform, tokenizer, **options)
