"""The installed Axolotl: configs and rows as in training.

Importing this module imports Axolotl, which takes some 10 s.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl.utils.config import normalize_cfg_datasets, normalize_config
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from ..base.errors import UserError
from ..base.files import Row
from ..base.machine import end_with_parent
from ..base.yamlfiles import Config
from ..runs.eval_loss import MASKED
from .validator import validated

disable_progress_bar()
# Axolotl forks to tokenize; without this, a child would outlive a killed command and keep its locks
os.register_at_fork(after_in_child=end_with_parent)


@dataclass
class Tokens:
    """Token ids of a row, and labels: MASKED for tokens without loss."""

    ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """Number of tokens that carry loss."""
        return sum(label != MASKED for label in self.labels)


def tokenize(where: str, cfg: Any, dataset: Any, tokenizer: Any, rows: Sequence[Row], longest: int) -> list[Tokens]:
    """Tokenize rows as Axolotl does, but keep rows that exceed the config's sequence_len.

    Args:
        where: the name of the rows in messages.
        cfg: a config, as Axolotl's DictDefault.
        dataset: the config's entry for the rows' data set.
        tokenizer: the tokenizer.
        rows: the rows, each a mapping of field names to values.
        longest: the sequence_len to tokenize with. Some types cut the prompt and the answer, each to this length; the
            type completion splits rows into pieces of this length.

    Raises:
        UserError: Axolotl cannot tokenize the rows.
    """
    kind = dataset["type"]
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    # not DictDefault's |, which would keep cfg's values; any dataset_num_proc, even 1, would fork for these few rows
    limited = DictDefault({**cfg, "sequence_len": longest, "dataset_num_proc": None})
    fields = dict.fromkeys(name for row in rows for name in row)
    try:
        table = Dataset.from_list([{name: row.get(name) for name in fields} for row in rows])
        tokenized, _ = get_dataset_wrapper(dataset, tokenizer, limited, base, table, style or None)
    except Exception as error:  # prompt strategies, and fields with values of several types, can raise any exception
        problem = f"Axolotl cannot tokenize these rows as {kind}: {type(error).__name__}: {error}"
        raise UserError(f"{where}: {problem}") from None
    return [Tokens(row["input_ids"], row["labels"]) for row in tokenized]


def require_one_each(where: str, dataset: Any, rows: Sequence[Any], tokenized: Sequence[Tokens]) -> None:
    """Raise UserError unless a data set's type makes one training row from each row."""
    if len(tokenized) != len(rows):
        problem = f"Axolotl turns {len(rows)} rows into {len(tokenized)} training rows ({dataset['type']})"
        raise UserError(f"{where}: {problem}; evaluation needs exactly one training row for each row")


def taught_ends(cfg: Config, tokenizer: Any) -> set[int]:
    """Tokens that end an answer in training: the end-of-text token and `eot_tokens`."""
    of_turns = tokenizer.convert_tokens_to_ids(list(cfg.get("eot_tokens") or []))
    return ({tokenizer.eos_token_id} | (set(of_turns) - {tokenizer.unk_token_id})) - {None}


def as_trained(content: Config) -> Any:
    """Config as in training: validated, with defaults and chat templates. Can raise any exception."""
    cfg = validated(content)
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg
