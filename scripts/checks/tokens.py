"""What a config trains on: its rows as Axolotl's own code tokenizes them. Importing this imports Axolotl: some 10 s."""

import math
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from axolotl.loaders import load_tokenizer
from axolotl.utils.config import normalize_cfg_datasets, normalize_config
from axolotl.utils.data import prepare_datasets, sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers import MultipackBatchSampler, get_dataset_lengths
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch.utils.data import RandomSampler

from ..base.errors import UserError
from ..base.files import json_rows
from ..base.processes import end_with_parent
from ..base.progress import Bar
from ..base.yamlfiles import Config
from ..configs import datafiles
from ..runs.eval_loss import MASKED
from .finding import Finding, Level
from .installed import validated

disable_progress_bar()
# Axolotl tokenizes in a process that it forks, which would outlive a killed command and keep the locks it inherited
os.register_at_fork(after_in_child=end_with_parent)

_NO_LIMIT = 2**24  # tokens


@dataclass
class Tokens:
    """A tokenized row: token ids, and for each the id that is to be learnt there, or MASKED."""

    ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """How many tokens carry loss."""
        return sum(label != MASKED for label in self.labels)


def tokenize(
    where: str, cfg: Any, dataset: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], longest: int
) -> list[Tokens]:
    """Rows as Axolotl tokenizes them for training, before it drops or cuts the long ones.

    Args:
        where: what messages call the rows.
        cfg: a config, as Axolotl's DictDefault.
        dataset: the entry of the rows' data set in it.
        tokenizer: the tokenizer.
        rows: fields by name.
        longest: the most tokens of a prompt, and of an answer, which Axolotl cuts separately.

    Raises:
        UserError: Axolotl cannot tokenize them.
    """
    kind = dataset["type"]
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    # its | would keep cfg's values; any number of processes, 1 too, would have some started for these few rows
    limited = DictDefault({**cfg, "sequence_len": longest, "dataset_num_proc": None})
    fields = dict.fromkeys(name for row in rows for name in row)
    try:
        table = Dataset.from_list([{name: row.get(name) for name in fields} for row in rows])
        tokenized, _ = get_dataset_wrapper(dataset, tokenizer, limited, base, table, style or None)
    except Exception as error:  # a strategy can raise anything, and so can values of several types in a field
        problem = f"Axolotl cannot tokenize these rows as {kind}: {type(error).__name__}: {error}"
        raise UserError(f"{where}: {problem}") from None
    return [Tokens(row["input_ids"], row["labels"]) for row in tokenized]


def require_one_each(where: str, dataset: Any, rows: Sequence[Any], tokenized: Sequence[Tokens]) -> None:
    """Raise UserError where a data set's type does not make one training row of each row."""
    if len(tokenized) != len(rows):
        problem = f"Axolotl makes {len(tokenized)} training rows of {len(rows)} ({dataset['type']})"
        raise UserError(f"{where}: {problem}; they cannot be evaluated")


def taught_ends(cfg: Config, tokenizer: Any) -> set[int]:
    """Tokens that a training teaches as the end of an answer: the end-of-text token and `eot_tokens`."""
    of_turns = tokenizer.convert_tokens_to_ids(list(cfg.get("eot_tokens") or []))
    return ({tokenizer.eos_token_id} | (set(of_turns) - {tokenizer.unk_token_id})) - {None}


def as_trained(content: Config) -> Any:
    """A config as a training has it: validated, with defaults, and each data set's chat template. Raises anything."""
    cfg = validated(content)
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg


class Tokenizer:
    """A config's tokenizer with its special tokens set, as a training has it.

    Raises:
        UserError: Axolotl refuses the config, or the tokenizer is not on this machine.
    """

    def __init__(self, content: Config):
        try:
            self.cfg = as_trained(content)
            self.tokenizer = load_tokenizer(self.cfg)
        except Exception as error:  # plugins, validators and tokenizers can raise anything
            raise UserError(f"{content.get('base_model')}: its tokenizer cannot be loaded: {error}") from None

    def tokenize(self, key: str, rows: Sequence[dict[str, Any]]) -> list[Tokens]:
        """Rows of the data set at a key such as `datasets.0`, not cut. Raises as `tokenize`."""
        section, _, position = key.partition(".")
        dataset = self.cfg[section][int(position)]
        pieces = dataset["type"] == "completion"  # which Axolotl makes rows of sequence_len tokens from
        longest = self.cfg.sequence_len if pieces else _NO_LIMIT
        return tokenize(key, self.cfg, dataset, self.tokenizer, rows, longest)

    def load(self, key: str) -> list[dict[str, Any]]:
        """The rows of the data set at a key as Axolotl loads them, from wherever they are: its split, shard and weight.

        That is Axolotl's own code (axolotl/utils/data/sft.py), stopped before it tokenizes them.

        Raises:
            UserError: they cannot be loaded.
        """
        section, _, position = key.partition(".")
        dataset = self.cfg[section][int(position)]
        split = "train" if section == "datasets" else "test"
        rows = []
        try:
            with patch.object(sft, "get_dataset_wrapper", lambda dataset, **_: (dataset, None)):
                for part in datasets_with_name_generator([dataset]):
                    loaded, *_ = sft._load_and_process_single_dataset(
                        part, self.cfg, self.tokenizer, split, self.cfg.seed
                    )
                    rows += loaded
        except Exception as error:  # anything between a file and a hub
            problem = f"its rows cannot be loaded: {type(error).__name__}: {error}"
            raise UserError(f"{key}: {dataset['path']}: {problem}") from None
        return rows

    def held_out(self) -> list[tuple[str, dict[str, Any]]]:
        """The rows that val_set_size holds out of the training data, in their order, each with the key of its data set.

        Axolotl divides tokenized rows, after it has merged, shuffled and filtered them. So it is asked for those, which
        it has on disk after a training, and the rows as written are found by their tokens.

        Raises:
            UserError: they cannot be loaded, or distinguished from the others.
        """
        try:
            with patch.dict(os.environ, AXOLOTL_IS_PREPROCESS="1"):  # it need not count the steps of packed rows
                held_out = prepare_datasets(self.cfg, self.tokenizer)[1]
        except Exception as error:
            problem = f"the rows that it holds out cannot be had: {type(error).__name__}: {error}"
            raise UserError(f"val_set_size: {problem}") from None
        positions = defaultdict(list)
        for position, ids in enumerate(held_out["input_ids"]):
            positions[tuple(ids)].append(position)
        truncates = str(self.cfg.excess_length_strategy).lower() == "truncate"
        cut = self.cfg.sequence_len if truncates else None
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        loaded = {f"datasets.{i}": self.load(f"datasets.{i}") for i in range(len(self.cfg.datasets))}
        seen = 0
        with Bar("find held-out rows", sum(map(len, loaded.values()))) as bar:
            for dataset, (key, every) in zip(self.cfg.datasets, loaded.items(), strict=True):
                for rows in batched(every, 1000):
                    tokenized = tokenize(key, self.cfg, dataset, self.tokenizer, rows, self.cfg.sequence_len)
                    require_one_each(key, dataset, rows, tokenized)
                    for row, tokens in zip(rows, tokenized, strict=True):
                        if same := positions.get(tuple(tokens.ids[:cut])):
                            found[same.pop(0)] = key, row
                    bar.update(seen := seen + len(rows))
        if len(found) < len(held_out):
            raise UserError(f"val_set_size: {len(held_out) - len(found)} rows that it holds out are not in the data")
        return [found[position] for position in range(len(held_out))]

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; a character of several tokens is counted to the last of them."""
        texts = []
        before = ""
        for end in range(1, len(ids) + 1):
            now = self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            whole = not now.endswith("\ufffd") or end == len(ids)
            texts.append(now[len(before) :] if whole else "")
            before = now if whole else before
        return texts


def by_token(content: Config, count: int) -> list[dict[str, Any]]:
    """The first rows of each training data set, token by token.

    Returns:
        For each row the data set's key, the row's number, its length and how many tokens carry loss, whether it is
        longer than sequence_len, and its tokens: id, text, whether it is special, and whether it carries loss.
    """
    tokenizer = Tokenizer(content)
    special = set(tokenizer.tokenizer.all_special_ids) | set(tokenizer.tokenizer.added_tokens_decoder)
    rows = []
    for key, dataset in datafiles.datasets(content, "datasets"):
        read = list(islice(_rows(dataset), count))
        for number, row in enumerate(tokenizer.tokenize(key, read) if read else [], start=1):
            parts = zip(row.ids, tokenizer.texts(row.ids), row.labels, strict=True)
            rows.append(
                {
                    "dataset": key,
                    "row": number,
                    "length": len(row.ids),
                    "learnt": row.learnt,
                    "too_long": len(row.ids) > tokenizer.cfg.sequence_len,
                    "tokens": [
                        {"id": token, "text": text, "special": token in special, "loss": label != MASKED}
                        for token, text, label in parts
                    ],
                }
            )
    return rows


def lengths(content: Config, most: int | None = None) -> tuple[list[Finding], list[dict[str, Any]]]:
    """How long the rows of each data set are in tokens, and the effect of sequence_len and of batches on them.

    Args:
        content: the config.
        most: about how many rows of each data set to tokenize, micro batches from all over it; None for all.

    Returns:
        Findings, and for each data set: the rows that are there, those read, and those made of these; of the latter
        tokens, tokens with loss, percentiles of the length, those longer than sequence_len, and the share of padding in
        batches of micro_batch_size rows, in the order of one shuffle unless the file's order is kept.
    """
    tokenizer = Tokenizer(content)
    ends = taught_ends(content, tokenizer.tokenizer)
    findings: list[Finding] = []
    measured = []
    for key, dataset in datafiles.datasets(content):
        sizes = []
        learnt = 0
        learns_end = False
        total = sum(datafiles.count_rows(file) for file in datafiles.jsonl_files(dataset))
        total = min(total, datafiles.first_rows(dataset) or total)
        every = math.ceil(total / most) if most and total else 1
        read = 0
        with Bar(f"tokenize {key}", total // every) as bar:
            for some in batched(_rows(dataset, every, tokenizer.cfg.micro_batch_size), 1000):
                read += len(some)
                for row in tokenizer.tokenize(key, some):
                    sizes.append(len(row.ids))
                    learnt += row.learnt
                    learns_end = learns_end or not ends.isdisjoint(row.labels)
                bar.update(read)
        if sizes:
            findings += _of_lengths(tokenizer.cfg, key, sizes, learns_end)
            kept = _kept(tokenizer.cfg, sizes)
            measured.append(
                {
                    "key": key,
                    "rows_there": total,
                    "rows_read": read,
                    "rows": len(sizes),
                    "tokens": sum(sizes),
                    "tokens_with_loss": learnt,
                    "percentiles": {str(share): _percentile(sizes, share) for share in (50, 90, 95, 99, 100)},
                    "rows_trained_on": len(kept),
                    "tokens_trained_on": sum(kept),
                    "longest_trained_on": max(kept, default=0),
                    "longer_than_sequence_len": sum(size > tokenizer.cfg.sequence_len for size in sizes),
                    "padding_share": None if tokenizer.cfg.sample_packing else _padding(tokenizer.cfg, kept),
                }
            )
    return findings, measured


def packed_sequences(content: Config) -> tuple[int, int]:
    """The sequences that packing makes of the training rows, by Axolotl's own preparation and sampler, and those that a
    micro batch takes, without which there is none (axolotl/core/trainers/base.py, _create_multipack_sampler).

    Raises:
        UserError: Axolotl cannot prepare them.
    """
    tokenizer = Tokenizer(content)
    cfg = tokenizer.cfg
    cfg.dataset_num_proc, cfg.test_datasets = None, None  # no processes for few rows
    with TemporaryDirectory() as folder, patch.dict(os.environ, AXOLOTL_IS_PREPROCESS="1"):
        cfg.dataset_prepared_path = folder
        try:
            rows = prepare_datasets(cfg, tokenizer.tokenizer)[0]
        except Exception as error:  # as in `tokenize`
            raise UserError(f"datasets: Axolotl cannot prepare the rows: {type(error).__name__}: {error}") from None
        real = cfg.multipack_real_batches
        apart = not cfg.attn_supports_packing if real is None else real
        sampler = MultipackBatchSampler(
            RandomSampler(rows),
            batch_size=1,
            batch_max_len=cfg.sequence_len * (1 if apart else cfg.micro_batch_size),
            lengths=get_dataset_lengths(rows),
            bin_size=cfg.sample_packing_bin_size,
            sequential=cfg.sample_packing_sequentially,
        )
        return len(sampler), cfg.micro_batch_size if apart else 1


def _of_lengths(cfg: Any, key: str, sizes: list[int], learns_end: bool) -> Iterator[Finding]:
    long = sum(size > cfg.sequence_len for size in sizes)
    if long:
        becomes = {"truncate": "cut", "raise": "an error"}.get(cfg.excess_length_strategy, "dropped")
        problem = f"{long} of {len(sizes)} rows are longer than sequence_len, {cfg.sequence_len}, and will be {becomes}"
        nothing_left = long == len(sizes) and becomes == "dropped"
        level: Level = "error" if nothing_left or becomes == "an error" else "warning"
        yield Finding(level, "too-long", f"{key}.path", problem, f"the longest has {max(sizes)} tokens")
    if not learns_end and key.startswith("datasets"):
        problem = "no token that ends a text carries loss in any row: the model would not learn to stop"
        yield Finding("warning", "eos-masked", f"{key}.type", problem, "see --show-tokens")


def _percentile(sizes: list[int], share: int) -> int:
    """The length that a share of the rows, in percent, does not exceed."""
    return sorted(sizes)[math.ceil(len(sizes) * share / 100) - 1]


def _kept(cfg: Any, sizes: list[int]) -> list[int]:
    """The lengths of the rows that are trained on, once the long ones are dropped or cut."""
    cuts = cfg.excess_length_strategy == "truncate"
    return [min(size, cfg.sequence_len) for size in sizes if cuts or size <= cfg.sequence_len]


def _padding(cfg: Any, kept: list[int]) -> float:
    """The share of padding among all tokens, as Axolotl's collator pads batches (core/builders/causal.py)."""
    if not cfg.curriculum_sampling:  # which keeps the order of the file
        random.Random(cfg.seed).shuffle(kept)
    multiple = (cfg.pad_to_multiple_of or 64) if cfg.pad_to_sequence_len is not False else 1
    padded = 0
    for batch in batched(kept, cfg.micro_batch_size):
        longest = cfg.sequence_len if cfg.pad_to_sequence_len else max(batch)
        padded += math.ceil(longest / multiple) * multiple * len(batch)
    return 1 - sum(kept) / padded if kept else 0.0


def _rows(dataset: Config, every: int = 1, batch: int = 1) -> Iterator[dict[str, Any]]:
    """The rows of a data set's local JSONL files that its split takes; of each so many batches of lines only the first
    one's."""
    rows = (row for file in datafiles.jsonl_files(dataset) for row in _of_file(file, every, batch))
    first = datafiles.first_rows(dataset)
    return islice(rows, first and math.ceil(first / every))


def _of_file(file: Path, every: int, batch: int) -> Iterator[dict[str, Any]]:
    with file.open("rb") as stream:
        # an empty line in the place of another keeps the numbers of lines true in messages
        lines = (b"" if number // batch % every else line for number, line in enumerate(stream))
        yield from json_rows(lines, file, ())
