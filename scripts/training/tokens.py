"""Configs and rows as in training: validated and tokenized by Axolotl's code.

Importing this module imports Axolotl, which takes some 10 s."""

import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy
import torch
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies import load as load_strategy
from axolotl.utils.config import normalize_cfg_datasets, normalize_config
from axolotl.utils.data import prepare_datasets, sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers import MultipackBatchSampler
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..base.errors import UserError, did_you_mean
from ..base.files import Row
from ..base.machine import end_with_parent
from ..base.progress import Bar
from ..base.yamlfiles import Config
from ..check.rows import Reader
from ..config import datafiles
from ..config.finding import Faults, Finding, Level
from ..config.substitution import stands_in
from .eval_loss import MASKED
from .validation import validated

disable_progress_bar()
# Axolotl forks to tokenize; without this, a child would outlive a killed command and keep its locks
os.register_at_fork(after_in_child=end_with_parent)

_NO_LIMIT = 2**24  # tokens
Place = tuple[str, int]
"""File and line."""
_MOST_REFUSED = 20  # rows of a data set that Axolotl cannot tokenize; finding each takes ten calls or more


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


class Tokenizer:
    """A config's tokenizer with special tokens set as in training.

    Raises:
        UserError: Axolotl refuses the config, or the tokenizer is not on this machine.
    """

    def __init__(self, content: Config):
        try:
            self.cfg = as_trained(content)
            self.tokenizer = load_tokenizer(self.cfg)
        except Exception as error:  # plugins, validators and tokenizers can raise any exception
            raise UserError(f"{content.get('base_model')}: cannot load the tokenizer: {error}") from None

    def dataset(self, key: str) -> Any:
        """The entry of the data set at a key such as `datasets.0`."""
        section, position = key.split(".")
        return self.cfg[section][int(position)]

    def tokenize(self, key: str, rows: Sequence[Row]) -> list[Tokens]:
        """Tokenize rows of the data set at a key such as `datasets.0`, without cutting long rows."""
        dataset = self.dataset(key)
        pieces = dataset["type"] == "completion"  # Axolotl splits these rows into rows of sequence_len tokens
        longest = self.cfg.sequence_len if pieces else _NO_LIMIT
        return tokenize(key, self.cfg, dataset, self.tokenizer, rows, longest)

    def load(self, key: str) -> Iterator[Row]:
        """Load rows of a data set as Axolotl does, applying split, shards and weight.

        This calls Axolotl's code (axolotl/utils/data/sft.py) and skips tokenization.

        Raises:
            UserError: Axolotl cannot load the rows.
        """
        dataset = self.dataset(key)
        split = "train" if key.startswith("datasets") else "test"
        parts = []
        try:
            with patch.object(sft, "get_dataset_wrapper", lambda dataset, **_: (dataset, None)):
                for part in datasets_with_name_generator([dataset]):
                    loaded, *_ = sft._load_and_process_single_dataset(
                        part, self.cfg, self.tokenizer, split, self.cfg.seed
                    )
                    parts.append(loaded)
        except Exception as error:  # files, the network and the hub can raise any exception
            problem = f"cannot load the rows: {type(error).__name__}: {error}"
            raise UserError(f"{key}: {dataset['path']}: {problem}") from None
        return chain(*parts)

    def held_out(self) -> list[tuple[str, Row]]:
        """Rows that val_set_size holds out, in Axolotl's order, each with its data set's key.

        Axolotl holds out rows only after tokenizing, merging, shuffling and filtering them. This method therefore gets
        the held-out tokens from Axolotl, and finds the original rows by these tokens.

        Raises:
            UserError: the rows cannot be loaded or found.
        """
        held_out = self.split()[1]
        positions = defaultdict(list)
        for position, ids in enumerate(held_out["input_ids"]):
            positions[tuple(ids)].append(position)
        cut = self.cfg.sequence_len if str(self.cfg.excess_length_strategy).lower() == "truncate" else None
        found: dict[int, tuple[str, Row]] = {}
        with Bar("finding held-out rows"):
            for i, dataset in enumerate(self.cfg.datasets):
                key = f"datasets.{i}"
                for rows in batched(self.load(key), 1000):
                    tokenized = tokenize(key, self.cfg, dataset, self.tokenizer, rows, self.cfg.sequence_len)
                    require_one_each(key, dataset, rows, tokenized)
                    for row, tokens in zip(rows, tokenized, strict=True):
                        if same := positions.get(tuple(tokens.ids[:cut])):
                            found[same.pop(0)] = key, row
        if len(found) < len(held_out):
            raise UserError(f"val_set_size: {len(held_out) - len(found)} held-out rows were not found in the data")
        return [found[position] for position in range(len(held_out))]

    def split(self) -> tuple[Any, Any]:
        """Training and held-out rows, after Axolotl tokenizes, merges, filters, shuffles and splits the rows.

        Raises:
            UserError: Axolotl cannot prepare the rows.
        """
        try:
            # without this variable, Axolotl would also count the steps of packed rows
            with patch.dict(os.environ, AXOLOTL_IS_PREPROCESS="1"):
                return prepare_datasets(self.cfg, self.tokenizer)[:2]
        except Exception as error:  # files, templates and tokenizers can raise any exception
            problem = f"Axolotl cannot prepare the rows: {type(error).__name__}: {error}"
            raise UserError(f"datasets: {problem}; run `recipe check --data`") from None


def by_token(content: Config, count: int) -> list[Row]:
    """The first rows of each training data set, tokenized as in training.

    Returns:
        For each row: the data set's key, the row's number and length, the number of tokens that carry loss, a flag for
        rows longer than sequence_len, token ids, labels, and text. In the text, ⟪ and ⟫ enclose tokens that carry loss.
    """
    tokenizer = Tokenizer(content)
    rows = []
    for key, dataset in datafiles.datasets(content, "datasets"):
        read = [*islice(_numbered(tokenizer, key, dataset), count)]
        tokenized = tokenizer.tokenize(key, [row for _, row in read]) if read else []
        for ((_, line), _), row in zip(read, tokenized, strict=False):
            text = ""
            for learnt, parts in groupby(zip(row.ids, row.labels, strict=True), lambda part: part[1] != MASKED):
                decoded = tokenizer.tokenizer.decode([token for token, _ in parts], skip_special_tokens=False)
                text += f"⟪{decoded}⟫" if learnt else decoded
            rows.append(
                {
                    "dataset": key,
                    "row": line,
                    "length": len(row.ids),
                    "learnt": row.learnt,
                    "too_long": len(row.ids) > tokenizer.cfg.sequence_len,
                    "ids": row.ids,
                    "labels": row.labels,
                    "text": text,
                }
            )
    return rows


def lengths(content: Config, most: int | None = None, gpus: int = 1) -> tuple[list[Finding], list[Row]]:
    """Check each data set's tokenized rows and measure their lengths; skip JSONL rows that `rows.check` refuses.

    Args:
        content: the config.
        most: the number of first rows to read from each data set; None for all.
        gpus: the number of GPUs that train.

    Returns:
        Findings, and measures of each data set with tokenized rows: their lengths, and the share of padding in one
        epoch's micro batches (None for packed rows).
    """
    tokenizer = Tokenizer(content)
    cfg = tokenizer.cfg
    findings: list[Finding] = []
    measured = []
    for key, dataset in datafiles.datasets(content):
        total = sum(datafiles.count_rows(file) for file in datafiles.jsonl_files(dataset))
        total = min(total, datafiles.first_rows(dataset) or total)
        read = _Read(tokenizer, key)
        with Bar(f"tokenize {key}", most or total) as bar:
            for some in batched(islice(_numbered(tokenizer, key, dataset), most), 1000):
                read.add(some)
                if read.refused >= _MOST_REFUSED:
                    break
                bar.update(read.rows)
        findings += read.findings()
        if sizes := read.sizes:
            kept = _kept(cfg, read)
            measured.append(
                {
                    "key": key,
                    "rows": len(sizes),
                    "tokens": sum(sizes),
                    "with_loss": sum(read.learnt),
                    "median": _percentile(sizes, 50),
                    "percentile_95": _percentile(sizes, 95),
                    "longest": max(sizes),
                    "too_long": sum(size > cfg.sequence_len for size in sizes),
                    "padding": None if cfg.sample_packing else _padding(cfg, kept),
                }
            )
            left = kept[: datafiles.not_held_out(content, len(kept))]
            is_whole = len(cfg.datasets) == 1 and read.rows == total
            if left and cfg.sample_packing and key.startswith("datasets") and is_whole:
                findings += _without_batch(cfg, left, gpus)
    return findings, measured


def _percentile(sizes: list[int], share: int) -> int:
    return int(numpy.percentile(sizes, share, method="inverted_cdf"))


def trained_on(content: Config) -> tuple[list[int], float]:
    """Lengths of the rows that a config trains on, and the share of padding in one epoch's micro batches.

    Raises:
        UserError: Axolotl cannot prepare the rows.
    """
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer(content | {"dataset_prepared_path": folder, "test_datasets": None})
        sizes: list[int] = []
        for rows in tokenizer.split()[0].select_columns("input_ids").iter(1000):
            sizes += map(len, rows["input_ids"])
    return sizes, 0.0 if content.get("sample_packing") else _padding(tokenizer.cfg, sizes)


class _Read:
    """Statistics of one data set's tokenized rows, and mistakes by rule and subject.

    Args:
        tokenizer: the config's tokenizer.
        key: the data set's key.
    """

    def __init__(self, tokenizer: Tokenizer, key: str):
        self.tokenizer, self.key = tokenizer, key
        self.dataset = tokenizer.dataset(key)
        self.chats: Any = None
        self.ends = taught_ends(tokenizer.cfg, tokenizer.tokenizer)
        self.rows = 0
        self.sizes, self.learnt = list[int](), list[int]()
        # the author of an input_output row writes the end token; the stand-in's tokenizer may not know it
        self.learns_end = self.dataset["type"] == "input_output" and stands_in(tokenizer.cfg)
        self.refused = 0
        self.faults = Faults()

    def add(self, rows: Sequence[tuple[Place, Row]]) -> bool:
        """Tokenize more rows; return False if Axolotl cannot tokenize all of them.

        A refused batch is bisected, so that its other rows are read. Some rows fail only together.
        """
        if self.refused >= _MOST_REFUSED:
            return False
        try:
            tokenized = self.tokenizer.tokenize(self.key, [row for _, row in rows])
        except UserError as error:
            middle = len(rows) // 2
            halves = [rows[:middle], rows[middle:]] if middle else []
            if all([self.add(half) for half in halves]):
                self.refused += 1
                self.faults.note("bad-row", str(error).partition(": ")[2], *rows[middle][0])
            return False
        self.rows += len(rows)
        self.sizes += [len(tokens.ids) for tokens in tokenized]
        self.learnt += [tokens.learnt for tokens in tokenized]
        self.learns_end = self.learns_end or any(not self.ends.isdisjoint(tokens.labels) for tokens in tokenized)
        for (place, _), tokens in zip(rows, tokenized, strict=False):
            if not tokens.learnt and len(tokenized) == len(rows):
                self.faults.note("nothing-learnt", "", *place)
        if self.dataset["type"] == "chat_template":
            cfg, tokenizer = self.tokenizer.cfg, self.tokenizer.tokenizer
            self.chats = self.chats or load_strategy("chat_template", tokenizer, cfg, self.dataset)
            for place, row in rows:
                for role in _unknown_roles(self.chats, row):
                    self.faults.note("unknown-role", role, *place)
        return True

    def findings(self) -> Iterator[Finding]:
        """Findings, each at the first row concerned."""
        cfg, sizes, data = self.tokenizer.cfg, self.sizes, f"{self.key}.path"
        for (rule, about), rows in self.faults.items():
            if rule == "bad-row":
                remedy = "correct the rows, the type or the template"
                yield Finding("error", rule, data, f"{rows}: {about}", remedy, *rows.place)
            elif rule == "unknown-role":
                problem = f"{rows} with the role {about[:60]}, unknown to `roles` and the template"
                near = did_you_mean(about.lower(), [*self.chats.prompter.roles])
                yield Finding(
                    "warning", rule, data, f"{problem}{near}", "correct it, or add it to `roles`", *rows.place
                )
            else:
                level: Level = "error" if rows.count == self.rows else "warning"
                problem = f"{rows} without tokens that carry loss (empty answer, or wrong role)"
                yield Finding(level, rule, data, problem, "correct or drop these rows", *rows.place)
        if self.refused >= _MOST_REFUSED:
            yield Finding("note", "not-checked", data, f"stopped after {self.refused} rows that Axolotl cannot read")
        if long := sum(size > cfg.sequence_len for size in sizes):
            becomes = {"truncate": "cut", "raise": "an error"}.get(cfg.excess_length_strategy, "dropped")
            problem = f"{long} of {len(sizes)} rows exceed sequence_len, {cfg.sequence_len}: {becomes}"
            level = "error" if becomes == "an error" or (long == len(sizes) and becomes == "dropped") else "warning"
            yield Finding(level, "too-long", data, problem, f"the longest has {max(sizes)} tokens")
        if sizes and not self.learns_end and self.key.startswith("datasets"):
            problem = "no end token carries loss: the model would not learn to stop"
            yield Finding("warning", "eos-masked", f"{self.key}.type", problem, "inspect rows with --show-tokens")


def _unknown_roles(strategy: Any, row: Row) -> set[str]:
    """Roles of a row that neither its data set nor the template knows."""
    roles = {strategy.transform_message(message)["role"] for message in strategy._get_messages(row)}
    template = strategy.prompter.chat_template
    known = {*strategy.prompter.roles.values(), *strategy.roles_to_train}
    return {role for role in roles - known if not re.search(rf"""['"]{re.escape(role)}['"]""", template)}


def _without_batch(cfg: Any, sizes: list[int], gpus: int) -> Iterator[Finding]:
    """Error if the packed rows are too few for a micro batch on each GPU.

    Training would then have no step. The rows are packed as in axolotl/core/trainers/base.py.
    """
    real = cfg.multipack_real_batches
    apart = not cfg.attn_supports_packing if real is None else real
    sampler = MultipackBatchSampler(
        RandomSampler(sizes),
        batch_size=1,
        batch_max_len=cfg.sequence_len * (1 if apart else cfg.micro_batch_size),
        lengths=numpy.array(sizes),
        bin_size=cfg.sample_packing_bin_size,
        sequential=cfg.sample_packing_sequentially,
    )
    sequences, needed = len(sampler), cfg.micro_batch_size if apart else 1
    if sequences < needed * gpus:
        each = f" on each of {gpus} GPUs" if gpus > 1 else ""
        filled = f"{sequences} of the {needed * gpus} packed sequences of a micro batch{each}"
        fewer = f"micro_batch_size={sequences // gpus}" if sequences >= gpus else "sample_packing=false"
        remedy = f"set {fewer}, a smaller sequence_len, or more rows (rehearsal: `--set datasets.0.split=train[:N]`)"
        yield Finding("error", "no-batch", "micro_batch_size", f"no step: {len(sizes)} rows fill {filled}", remedy)


def _kept(cfg: Any, read: _Read) -> list[int]:
    """Lengths of the training rows after Axolotl drops or cuts long rows; packing also drops rows without loss."""
    cuts = cfg.excess_length_strategy == "truncate"
    sizes = (size for size, learnt in zip(read.sizes, read.learnt, strict=True) if learnt or not cfg.sample_packing)
    return [min(size, cfg.sequence_len) for size in sizes if cuts or size <= cfg.sequence_len]


def _padding(cfg: Any, kept: list[int]) -> float:
    """Share of padding among all tokens, if Axolotl's collator pads the batches (core/builders/causal.py)."""
    if kept and cfg.group_by_length and not cfg.curriculum_sampling:
        order = torch.Generator().manual_seed(cfg.seed)
        step = int(datafiles.effective_batch(cfg))
        kept = [kept[i] for i in LengthGroupedSampler(step, lengths=kept, generator=order)]
    elif not cfg.curriculum_sampling:  # curriculum sampling keeps the order of the file
        random.Random(cfg.seed).shuffle(kept)
    multiple = (cfg.pad_to_multiple_of or 64) if cfg.pad_to_sequence_len is not False else 1
    padded = 0
    for batch in batched(kept, cfg.micro_batch_size):
        longest = cfg.sequence_len if cfg.pad_to_sequence_len else max(batch)
        padded += math.ceil(longest / multiple) * multiple * len(batch)
    return 1 - sum(kept) / padded if kept else 0.0


def _numbered(tokenizer: Tokenizer, key: str, dataset: Config) -> Iterator[tuple[Place, Row]]:
    """Rows of a data set's local files, each with file and line; for formats other than JSONL, with the row's number.

    Rows beyond the data set's split are left out, and JSONL rows in which `rows.check` finds errors. Axolotl loads the
    other formats. Missing files have no rows."""
    files = datafiles.jsonl_files(dataset)
    if not files and any(file.is_file() for file in datafiles.local_files(dataset)):
        for number, row in enumerate(tokenizer.load(key), start=1):
            yield (dataset["path"], number), row
        return
    lines = chain.from_iterable(map(_lines_of, files))
    reader = Reader(dataset, None, {}, trained=False)
    for place, line in islice(lines, datafiles.first_rows(dataset)):
        row = reader.readable(line)
        if row is not None:
            yield place, row


def _lines_of(file: Path) -> Iterator[tuple[Place, bytes]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield (str(file), number), line
