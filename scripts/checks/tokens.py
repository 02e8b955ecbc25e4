"""Rows of a config as Axolotl's own code tokenizes them. Importing this imports Axolotl: some 10 s."""

import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import batched, groupby, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies import load as load_strategy
from axolotl.utils.data import prepare_datasets, sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.samplers import MultipackBatchSampler
from torch.utils.data import RandomSampler

from ..base.errors import UserError, did_you_mean
from ..base.files import Row, json_rows
from ..base.progress import Bar
from ..base.yamlfiles import Config
from ..configs import datafiles
from ..configs.substitution import stands_in
from ..runs.eval_loss import MASKED
from .finding import Finding, Level
from .installed import Tokens, as_trained, require_one_each, taught_ends, tokenize

_NO_LIMIT = 2**24  # tokens


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

    def tokenize(self, key: str, rows: Sequence[Row]) -> list[Tokens]:
        """Rows of the data set at a key such as `datasets.0`, not cut. Raises as `tokenize`."""
        section, _, position = key.partition(".")
        dataset = self.cfg[section][int(position)]
        pieces = dataset["type"] == "completion"  # which Axolotl makes rows of sequence_len tokens from
        longest = self.cfg.sequence_len if pieces else _NO_LIMIT
        return tokenize(key, self.cfg, dataset, self.tokenizer, rows, longest)

    def load(self, key: str) -> list[Row]:
        """Rows of a data set as loaded by Axolotl: its split, shard and weight.

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

    def held_out(self) -> list[tuple[str, Row]]:
        """Rows that val_set_size holds out, in order, each with the key of its data set.

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
            raise UserError(f"val_set_size: {len(held_out) - len(found)} rows that it holds out are not in the data")
        return [found[position] for position in range(len(held_out))]


def by_token(content: Config, count: int) -> list[Row]:
    """The first rows of each training data set as they are trained on.

    Returns:
        For each row the data set's key, the row's number, its length and how many tokens carry loss, whether it is
        longer than sequence_len, its token ids and labels, and its text, in which ⟪ and ⟫ enclose what carries loss.
    """
    tokenizer = Tokenizer(content)
    rows = []
    for key, dataset in datafiles.datasets(content, "datasets"):
        read = [row for _, row in islice(_numbered(dataset), count)]
        for number, row in enumerate(tokenizer.tokenize(key, read) if read else [], start=1):
            text = ""
            for learnt, parts in groupby(zip(row.ids, row.labels, strict=True), lambda part: part[1] != MASKED):
                decoded = tokenizer.tokenizer.decode([token for token, _ in parts], skip_special_tokens=False)
                text += f"⟪{decoded}⟫" if learnt else decoded
            rows.append(
                {
                    "dataset": key,
                    "row": number,
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
    """Judge each data set's rows by their tokens and labels, and measure their lengths.

    Args:
        content: the config.
        most: about how many rows of each data set to tokenize, micro batches from all over it; None for all.
        gpus: how many train it.

    Returns:
        Findings, and for each data set: the rows that are there, those read, and those made of these; of the latter
        tokens, tokens with loss, percentiles of the length, those longer than sequence_len, and the share of padding in
        batches of micro_batch_size rows, in the order of one shuffle unless the file's order is kept.
    """
    tokenizer = Tokenizer(content)
    cfg = tokenizer.cfg
    findings: list[Finding] = []
    measured = []
    for key, dataset in datafiles.datasets(content):
        total = sum(datafiles.count_rows(file) for file in datafiles.jsonl_files(dataset))
        total = min(total, datafiles.first_rows(dataset) or total)
        every = math.ceil(total / most) if most and total else 1
        read = _Read(tokenizer, key)
        with Bar(f"tokenize {key}", total // every) as bar:
            for some in batched(_numbered(dataset, every, cfg.micro_batch_size), 1000):
                if not read.add(some):
                    break
                bar.update(read.rows)
        findings += read.findings()
        if sizes := read.sizes:
            kept = _kept(cfg, sizes)
            measured.append(
                {
                    "key": key,
                    "rows_there": total,
                    "rows_read": read.rows,
                    "rows": len(sizes),
                    "tokens": sum(sizes),
                    "tokens_with_loss": read.learnt,
                    "percentiles": {
                        str(share): int(numpy.percentile(sizes, share, method="inverted_cdf"))
                        for share in (50, 90, 95, 99, 100)
                    },
                    "rows_trained_on": len(kept),
                    "tokens_trained_on": sum(kept),
                    "longest_trained_on": max(kept, default=0),
                    "longer_than_sequence_len": sum(size > cfg.sequence_len for size in sizes),
                    "padding_share": None if cfg.sample_packing else _padding(cfg, kept),
                }
            )
            if cfg.sample_packing and key.startswith("datasets") and len(cfg.datasets) == every == 1:
                findings += _without_batch(cfg, kept[: datafiles.training_rows(content)], gpus)
    return findings, measured


class _Read:
    """Tokenized rows of one data set, and mistakes in them by rule and subject.

    Args:
        tokenizer: the config's.
        key: the data set's.
    """

    def __init__(self, tokenizer: Tokenizer, key: str):
        section, _, position = key.partition(".")
        self.tokenizer, self.key = tokenizer, key
        self.dataset = tokenizer.cfg[section][int(position)]
        self.chats: Any = None
        self.ends = taught_ends(tokenizer.cfg, tokenizer.tokenizer)
        self.rows = self.learnt = 0
        self.sizes: list[int] = []
        # the writer of an input_output row puts the end of the model's texts there, which the stand-in does not know
        self.learns_end = self.dataset["type"] == "input_output" and stands_in(tokenizer.cfg)
        self.found: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, rows: Sequence[tuple[str, Row]]) -> bool:
        """Tokenize more rows, each with its file and line; False where Axolotl cannot."""
        try:
            tokenized = self.tokenizer.tokenize(self.key, [row for _, row in rows])
        except UserError as error:
            middle = len(rows) // 2  # halved until the first row that fails is alone, unless only both together fail
            if not middle or (self.add(rows[:middle]) and self.add(rows[middle:])):
                self.found["bad-row", str(error).partition(": ")[2]].append(rows[middle][0])
            return False
        self.rows += len(rows)
        for tokens in tokenized:
            self.sizes.append(len(tokens.ids))
            self.learnt += tokens.learnt
            self.learns_end = self.learns_end or not self.ends.isdisjoint(tokens.labels)
        for (place, _), tokens in zip(rows, tokenized, strict=False):
            if not tokens.learnt and len(tokenized) == len(rows):
                self.found["nothing-learnt", ""].append(place)
        if self.dataset["type"] == "chat_template":
            cfg, tokenizer = self.tokenizer.cfg, self.tokenizer.tokenizer
            self.chats = self.chats or load_strategy("chat_template", tokenizer, cfg, self.dataset)
            for place, row in rows:
                for role in _unknown_roles(self.chats, row):
                    self.found["unknown-role", role].append(place)
        return True

    def findings(self) -> Iterator[Finding]:
        """The findings, at the first row that has each."""
        cfg, sizes, data = self.tokenizer.cfg, self.sizes, f"{self.key}.path"
        for (rule, about), places in self.found.items():
            file, _, line = places[0].rpartition(":")
            where: tuple[str, int] = (file, int(line))
            rows = "1 row" if len(places) == 1 else f"{len(places)} rows"
            if rule == "bad-row":
                yield Finding("error", rule, data, about, "correct the rows, or their type or template", *where)
            elif rule == "unknown-role":
                problem = f"{rows} with the role {about[:60]}, which neither roles nor the template names"
                near = did_you_mean(about.lower(), [*self.chats.prompter.roles])
                yield Finding("warning", rule, data, f"{problem}{near}", "correct it, or name it in roles", *where)
            else:
                level: Level = "error" if len(places) == self.rows else "warning"
                problem = f"{rows} without a token to learn, which Axolotl drops: an empty answer, or another role"
                yield Finding(level, rule, data, problem, "correct them, or leave them out", *where)
        long = sum(size > cfg.sequence_len for size in sizes)
        if long:
            becomes = {"truncate": "cut", "raise": "an error"}.get(cfg.excess_length_strategy, "dropped")
            problem = f"{long} of {len(sizes)} rows are longer than sequence_len, {cfg.sequence_len}: {becomes}"
            fatal = becomes == "an error" or (long == len(sizes) and becomes == "dropped")
            longest = f"the longest has {max(sizes)} tokens"
            yield Finding("error" if fatal else "warning", "too-long", data, problem, longest)
        if sizes and not self.learns_end and self.key.startswith("datasets"):
            problem = "no token that ends a text carries loss in any row: the model would not learn to stop"
            yield Finding("warning", "eos-masked", f"{self.key}.type", problem, "see --show-tokens")


def _unknown_roles(strategy: Any, row: Row) -> set[str]:
    """Roles of a row that neither its data set nor the template names."""
    roles = {strategy.transform_message(message)["role"] for message in strategy._get_messages(row)}
    template = strategy.prompter.chat_template
    known = {*strategy.prompter.roles.values(), *strategy.roles_to_train}
    return {role for role in roles - known if not re.search(rf"""['"]{re.escape(role)}['"]""", template)}


def _without_batch(cfg: Any, sizes: list[int], gpus: int) -> Iterator[Finding]:
    """Finding if packed rows fill no micro batch on each GPU: Axolotl trains no step.

    They are packed by Axolotl's own sampler (axolotl/core/trainers/base.py, _create_multipack_sampler).
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
        problem = f"the rows fill {sequences} packed sequences, a micro batch takes {needed}{each}: no step is trained"
        fewer = f"micro_batch_size={sequences // gpus}" if sequences >= gpus else "sample_packing=false"
        yield Finding("error", "no-batch", "micro_batch_size", problem, f"--set {fewer}, or more rows")


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


def _numbered(dataset: Config, every: int = 1, batch: int = 1) -> Iterator[tuple[str, Row]]:
    """The rows of a data set's local JSONL files that its split takes, each with its file and line; of each so many
    batches of lines only the first one's."""
    rows = (row for file in datafiles.jsonl_files(dataset) for row in _of_file(file, every, batch))
    first = datafiles.first_rows(dataset)
    return islice(rows, first and math.ceil(first / every))


def _of_file(file: Path, every: int, batch: int) -> Iterator[tuple[str, Row]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream):
            if number // batch % every == 0 and line.strip():
                place = f"{file}:{number + 1}"
                for row in json_rows([line], place, ()):
                    yield place, row
