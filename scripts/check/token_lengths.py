"""Tokens of a config's rows: lengths, mistakes, and rows to look at."""

from collections.abc import Iterator, Sequence
from itertools import batched, chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy

from ..base.errors import UserError, did_you_mean
from ..base.files import Row
from ..base.terminal import Bar
from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.datafiles import DatasetRef
from ..config.finding import Faults, Finding, Level
from ..config.substitution import stands_in
from ..config.training_settings import TrainingSettings
from ..training.losses import MASKED
from ..training.row_types import row_type
from ..training.tokens import Tokenizer, packed_sequences, padding, taught_ends, unknown_roles
from .rows import readable

Place = tuple[str, int]
"""File and line."""
_MOST_REFUSED = 20  # rows of a data set that Axolotl cannot tokenize; finding each takes ten calls or more


def by_token(content: Config, count: int) -> list[Row]:
    """The first rows of each training data set, tokenized as in training.

    Returns:
        For each row: the data set's key, the row's number and length, the number of tokens that carry loss, a flag for
        rows longer than sequence_len, token ids, labels, and text. In the text, ⟪ and ⟫ enclose tokens that carry loss.
    """
    tokenizer = Tokenizer(content)
    rows = []
    for dataset in datafiles.training_sets(content):
        read = [*islice(_numbered(tokenizer, dataset), count)]
        tokenized = tokenizer.tokenize(dataset, [row for _, row in read]) if read else []
        for ((_, line), _), row in zip(read, tokenized, strict=False):
            text = ""
            for learnt, parts in groupby(zip(row.ids, row.labels, strict=True), lambda part: part[1] != MASKED):
                decoded = tokenizer.tokenizer.decode([token for token, _ in parts], skip_special_tokens=False)
                text += f"⟪{decoded}⟫" if learnt else decoded
            rows.append(
                {
                    "dataset": dataset.key,
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
    """Check each data set's tokenized rows and measure their lengths; skip JSONL rows that Axolotl cannot read.

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
    for dataset in datafiles.datasets(content):
        total = sum(datafiles.count_rows(file) for file in datafiles.jsonl_files(dataset.entry))
        total = min(total, datafiles.first_rows(dataset.entry) or total)
        read = _Read(tokenizer, dataset)
        with Bar(f"tokenize {dataset.key}", most or total) as bar:
            for some in batched(islice(_numbered(tokenizer, dataset), most), 1000):
                read.add(some)
                if read.refused >= _MOST_REFUSED:
                    break
                bar.update(read.rows)
        findings += read.findings()
        if sizes := read.sizes:
            kept = _kept(cfg, read)
            measured.append(
                {
                    "key": dataset.key,
                    "rows": len(sizes),
                    "tokens": sum(sizes),
                    "with_loss": sum(read.learnt),
                    "median": _percentile(sizes, 50),
                    "percentile_95": _percentile(sizes, 95),
                    "longest": max(sizes),
                    "too_long": sum(size > cfg.sequence_len for size in sizes),
                    "padding": None if cfg.sample_packing else padding(cfg, kept),
                }
            )
            left = kept[: TrainingSettings.of(content).rows_left(len(kept))]
            is_whole = len(cfg.datasets) == 1 and read.rows == total
            if left and cfg.sample_packing and dataset.is_training and is_whole:
                findings += _without_batch(cfg, left, gpus)
    return findings, measured


def _percentile(sizes: list[int], share: int) -> int:
    return int(numpy.percentile(sizes, share, method="inverted_cdf"))


class _Read:
    """Statistics of one data set's tokenized rows, and mistakes by rule and subject.

    Args:
        tokenizer: the config's tokenizer.
        dataset: the data set.
    """

    def __init__(self, tokenizer: Tokenizer, dataset: DatasetRef):
        self.tokenizer, self.dataset = tokenizer, dataset
        self.kind = tokenizer.entry(dataset)["type"]
        self.chats: Any = None
        self.ends = taught_ends(tokenizer.cfg, tokenizer.tokenizer)
        self.rows = 0
        self.sizes, self.learnt = list[int](), list[int]()
        # the author of an input_output row writes the end token; the stand-in's tokenizer may not know it
        self.learns_end = self.kind == "input_output" and stands_in(tokenizer.cfg)
        self.refused = 0
        self.faults = Faults()

    def add(self, rows: Sequence[tuple[Place, Row]]) -> bool:
        """Tokenize more rows; return False if Axolotl cannot tokenize all of them.

        A refused batch is bisected, so that its other rows are read. Some rows fail only together.
        """
        if self.refused >= _MOST_REFUSED:
            return False
        try:
            tokenized = self.tokenizer.tokenize(self.dataset, [row for _, row in rows])
        except UserError as error:
            middle = len(rows) // 2
            halves = [rows[:middle], rows[middle:]] if middle else []
            if all([self.add(half) for half in halves]):
                self.refused += 1
                self.faults.note("bad-row", error.problem, *rows[middle][0])
            return False
        self.rows += len(rows)
        self.sizes += [len(tokens.ids) for tokens in tokenized]
        self.learnt += [tokens.learnt for tokens in tokenized]
        self.learns_end = self.learns_end or any(not self.ends.isdisjoint(tokens.labels) for tokens in tokenized)
        for (place, _), tokens in zip(rows, tokenized, strict=False):
            if not tokens.learnt and len(tokenized) == len(rows):
                self.faults.note("nothing-learnt", "", *place)
        if self.kind == "chat_template":
            self.chats = self.chats or self.tokenizer.chat_strategy(self.dataset)
            for place, row in rows:
                for role in unknown_roles(self.chats, row):
                    self.faults.note("unknown-role", role, *place)
        return True

    def findings(self) -> Iterator[Finding]:
        """Findings, each at the first row concerned."""
        cfg, sizes, data = self.tokenizer.cfg, self.sizes, f"{self.dataset.key}.path"
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
        if sizes and not self.learns_end and self.dataset.is_training:
            key, problem = f"{self.dataset.key}.type", "no end token carries loss: the model would not learn to stop"
            yield Finding("warning", "eos-masked", key, problem, "inspect rows with --show-tokens")


def _without_batch(cfg: Any, sizes: list[int], gpus: int) -> Iterator[Finding]:
    """Error if the packed rows are too few for a micro batch on each GPU, so that training would have no step."""
    sequences, needed = packed_sequences(cfg, sizes)
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


def _numbered(tokenizer: Tokenizer, dataset: DatasetRef) -> Iterator[tuple[Place, Row]]:
    """Rows of a data set's local files, each with file and line; for formats other than JSONL, with the row's number.

    Rows beyond the data set's split are left out, and JSONL rows that Axolotl cannot read. Axolotl loads the
    other formats. Missing files have no rows."""
    files = datafiles.jsonl_files(dataset.entry)
    if not files and any(file.is_file() for file in datafiles.local_files(dataset.entry)):
        for number, row in enumerate(tokenizer.load(dataset), start=1):
            yield (dataset.entry["path"], number), row
        return
    lines = chain.from_iterable(map(_lines_of, files))
    kind = row_type(dataset.entry)
    for place, line in islice(lines, datafiles.first_rows(dataset.entry)):
        row = readable(kind, line)
        if row is not None:
            yield place, row


def _lines_of(file: Path) -> Iterator[tuple[Place, bytes]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield (str(file), number), line
