"""Tokens of a config's rows: lengths, mistakes, and rows to look at."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import batched, chain, islice
from typing import TYPE_CHECKING

import numpy

from ..base.errors import UserError, did_you_mean
from ..base.files import Row
from ..base.terminal import Bar
from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.datafiles import DatasetRef
from ..config.finding import LEAKED, NO_BATCH, Faults, Finding
from ..config.training_settings import TrainingSettings
from ..data.raw_rows import parquet_batches
from ..training.losses import pieces
from ..training.row_types import OF_PAIRS, row_type
from ..training.tokens import Tokenizer, Tokens, count_packed, padding, unknown_roles
from .rendered_rows import RenderedRows
from .rows import LEAKED_ROWS, Place, Wording, example, lines_of, readable

if TYPE_CHECKING:
    from ..training.preferences import PairIds

_MOST_REFUSED = 20  # rows of a data set that Axolotl cannot tokenize; finding each takes ten calls or more


_WORDING = {
    "refused-row": Wording("error", "{n}: {about}", "correct the rows, the type or the template", rule="bad-row"),
    "unknown-role": Wording("warning", "{n} with the role {about}", "correct it, or add it to `roles`"),
    "nothing-learnt": Wording(
        "warning",
        "{n} without tokens to train on (empty answer, or wrong role)",
        "correct or drop these rows",
    ),
    LEAKED: LEAKED_ROWS,
}


def by_token(content: Config, count: int) -> list[Row]:
    """The first rows of each training data set, tokenized as in training.

    Returns:
        For each row: the data set's key, the row's number and length, the number of tokens trained on, a flag for
        rows longer than sequence_len, token ids, labels, and text. In the text, ⟪ and ⟫ enclose tokens trained on. A
        preference pair has two rows, with `answer`: chosen and rejected.
    """
    tokenizer = Tokenizer(content)
    rows = []
    for dataset in datafiles.training_sets(content):
        numbered = [*islice(_numbered(tokenizer, dataset), count)]
        if not numbered:
            continue
        lines = [line for (_, line), _ in numbered]
        content_rows = [row for _, row in numbered]
        if dataset.rl in OF_PAIRS:
            for line, pair in zip(lines, tokenizer.pairs(dataset, content_rows), strict=True):
                for answer, tokens in _answers(pair).items():
                    rows.append(_shown(tokenizer, dataset, line, tokens) | {"answer": answer})
            continue
        for line, tokens in zip(lines, tokenizer.tokenize(dataset, content_rows), strict=False):
            rows.append(_shown(tokenizer, dataset, line, tokens))
    return rows


def _answers(pair: "PairIds") -> dict[str, Tokens]:
    """Tokens of each answer of a pair, behind the prompt."""
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {name: Tokens.answered(pair.prompt, ids) for name, ids in answers.items()}


def _shown(tokenizer: Tokenizer, dataset: DatasetRef, line: int, tokens: Tokens) -> Row:
    """Fields of a row in the result of `by_token`."""
    length = len(tokens.ids)
    return {
        "dataset": dataset.key,
        "row": line,
        "length": length,
        "learnt": tokens.learnt,
        "too_long": length > tokenizer.cfg.sequence_len,
        "ids": tokens.ids,
        "labels": tokens.labels,
        "text": _marked_text(tokenizer, tokens),
    }


def _marked_text(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """Text of a row, with ⟪ and ⟫ around the tokens trained on."""
    text = ""
    for piece in pieces(tokenizer.tokenizer, tokens.ids, tokens.labels):
        text += f"⟪{piece['text']}⟫" if piece["learnt"] else piece["text"]
    return text


def lengths(content: Config, sample: int | None = None, gpus: int = 1) -> tuple[list[Finding], list[Row]]:
    """Check each data set's tokenized rows and measure their lengths; skip JSONL rows that Axolotl cannot read.

    Args:
        content: the config.
        sample: the number of rows to read from each data set, drawn over the file; None for all.
        gpus: the number of GPUs that train.

    Returns:
        Findings, and measures of each data set with tokenized rows, see `_TokenizedSet.measures`.
    """
    tokenizer = Tokenizer(content)
    findings: list[Finding] = []
    measured = []
    trained: dict[int, Place] = {}
    for dataset in datafiles.datasets(content):
        total = datafiles.count_jsonl(dataset.entry)
        if dataset.rl and dataset.rl not in OF_PAIRS:
            problem = f"rows of rl: {dataset.rl} are not tokenized"
            findings.append(Finding("note", "not-checked", f"{dataset.key}.type", problem))
            continue
        tokenized = (_TokenizedPairs if dataset.rl else _TokenizedSet)(tokenizer, dataset, trained)
        with Bar(f"tokenize {dataset.key}", sample or total) as bar:
            for batch in batched(_numbered(tokenizer, dataset, sample), 1000):
                tokenized.add(batch)
                if tokenized.is_given_up:
                    break
                bar.update(tokenized.rows)
        findings += tokenized.findings()
        if tokenized.sizes:
            measured.append(tokenized.measures())
        is_whole = len(tokenizer.cfg.datasets) == 1 and tokenized.rows == total
        if tokenizer.cfg.sample_packing and dataset.is_training and is_whole:
            findings += tokenized.packing_findings(gpus)
    return findings, measured


def _percentile(sizes: list[int], share: int) -> int:
    return int(numpy.percentile(sizes, share, method="inverted_cdf"))


class _TokenizedSet:
    """Lengths of one data set's tokenized rows, and mistakes by rule and subject.

    Args:
        tokenizer: the config's tokenizer.
        dataset: the data set.
        trained: the place of each training row, by the hash of its tokens; rows of training data are added.

    Attributes:
        rows: number of rows that Axolotl has tokenized.
        sizes: lengths in tokens; the type completion makes several of one row.
        learnt: numbers of tokens trained on.
        refused: number of rows that Axolotl cannot tokenize.
    """

    def __init__(self, tokenizer: Tokenizer, dataset: DatasetRef, trained: dict[int, Place]):
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.trained = trained
        self.kind = tokenizer.entry(dataset)["type"]
        self.rendered = RenderedRows(tokenizer, dataset)
        self.rows = 0
        self.sizes: list[int] = []
        self.learnt: list[int] = []
        self.refused = 0
        self.faults = Faults()

    @property
    def is_given_up(self) -> bool:
        """True if Axolotl cannot tokenize so many rows that no more are read."""
        return self.refused >= _MOST_REFUSED

    def add(self, rows: Sequence[tuple[Place, Row]]) -> bool:
        """Tokenize more rows; return False if Axolotl cannot tokenize all of them."""
        if self.is_given_up:
            return False
        try:
            self._tokenize(rows)
        except UserError as error:
            self._add_halves(rows, error.problem)
            return False
        return True

    def _tokenize(self, rows: Sequence[tuple[Place, Row]]) -> None:
        """Tokenize and measure rows.

        Raises:
            UserError: Axolotl cannot tokenize them.
        """
        self._measure(rows, self.tokenizer.tokenize(self.dataset, [row for _, row in rows]))

    def _add_halves(self, rows: Sequence[tuple[Place, Row]], problem: str) -> None:
        """Bisect rows that Axolotl refuses, so that it reads the others; some rows fail only together."""
        middle = len(rows) // 2
        if middle:
            reads_first = self.add(rows[:middle])
            reads_second = self.add(rows[middle:])
            if not (reads_first and reads_second):
                return
        self.refused += 1
        place, row = rows[middle]
        for mistake in self.rendered.kind.mistakes(row):  # says more than a tokenizer's error
            if mistake.rule == "bad-row":
                problem = mistake.about
        self.faults.note("refused-row", problem, *place)

    def _measure(self, rows: Sequence[tuple[Place, Row]], tokenized: list[Tokens]) -> None:
        """Add rows to the statistics, and count the faulty ones."""
        self.rows += len(rows)
        for tokens in tokenized:
            self.sizes.append(len(tokens.ids))
            self.learnt.append(tokens.learnt)
        if len(tokenized) != len(rows):
            self.rendered.add_pieces(tokenized)
        else:
            self.rendered.add(rows, tokenized)
            for (place, _), tokens in zip(rows, tokenized, strict=True):
                if not tokens.learnt:
                    self.faults.note("nothing-learnt", "", *place)
                self._compare_sets(place, tokens)
        if self.kind == "chat_template":
            self._check_roles(rows)

    def _compare_sets(self, place: Place, tokens: Tokens) -> None:
        """Find evaluation rows with the tokens of a training row."""
        key = hash(tuple(tokens.ids))
        if self.dataset.is_training:
            self.trained.setdefault(key, place)
        elif original := self.trained.get(key):
            self.faults.note(LEAKED, "", *place, "{}:{}".format(*original))

    def _check_roles(self, rows: Sequence[tuple[Place, Row]]) -> None:
        for place, row in rows:
            for role in unknown_roles(self.rendered.chats, row):
                near = did_you_mean(role.lower(), [*self.rendered.chats.prompter.roles])
                about = f"{role[:60]}, unknown to `roles` and the template{near}"
                self.faults.note("unknown-role", about, *place)

    def measures(self) -> Row:
        """Lengths in tokens, and the share of padding in one epoch's micro batches; None for packed rows."""
        sizes, share = self.sizes, None
        if not self.tokenizer.cfg.sample_packing:
            share = padding(self.tokenizer.cfg, self._trained_sizes())
        return {
            "key": self.dataset.key,
            "rows": len(sizes),
            "tokens": sum(sizes),
            "with_loss": sum(self.learnt),
            "median": _percentile(sizes, 50),
            "percentile_95": _percentile(sizes, 95),
            "longest": max(sizes),
            "too_long": self._count_long(),
            "padding": share,
        }

    def _count_long(self) -> int:
        """Number of rows longer than sequence_len."""
        return sum(size > self.tokenizer.cfg.sequence_len for size in self.sizes)

    def _trained_sizes(self) -> list[int]:
        """Lengths of the rows after Axolotl drops or truncates long rows; packing also drops rows without loss."""
        cfg = self.tokenizer.cfg
        trained = []
        for size, learnt in zip(self.sizes, self.learnt, strict=True):
            if cfg.sample_packing and not learnt:
                continue
            if size <= cfg.sequence_len:
                trained.append(size)
            elif cfg.excess_length_strategy == "truncate":
                trained.append(cfg.sequence_len)
        return trained

    def findings(self) -> Iterator[Finding]:
        """Findings about rows, each at the first row concerned, then about all rows together."""
        key = self.dataset.key
        for fault, rows in self.faults.items():
            finding = _WORDING[fault[0]].finding(f"{key}.path", fault, rows)
            if finding.rule == LEAKED:
                finding.problem += example(LEAKED, rows)
            if finding.rule == "nothing-learnt" and rows.count == self.rows:
                finding.level = "error"
            yield finding
        if self.is_given_up:
            problem = f"stopped after {self.refused} rows that Axolotl cannot read"
            yield Finding("note", "not-checked", f"{key}.path", problem)
        yield from self._long_rows()
        yield from self.rendered.findings()

    def _long_rows(self) -> Iterator[Finding]:
        """Finding about rows longer than sequence_len, by what Axolotl does with them."""
        cfg, rows, long = self.tokenizer.cfg, len(self.sizes), self._count_long()
        if not long:
            return
        level = "warning"
        if cfg.excess_length_strategy == "truncate":
            consequence = "truncated"
        elif cfg.excess_length_strategy == "raise":
            level, consequence = "error", "an error"
        else:
            level, consequence = "error" if long == rows else "warning", "dropped"
        limit = f"sequence_len, {cfg.sequence_len}"
        remedy = f"raise it, or shorten these rows: the longest has {max(self.sizes)} tokens"
        if "sequence_len" not in self.tokenizer.content:
            level, limit = "error", f"{cfg.sequence_len} tokens, the default of sequence_len"
            remedy = f"set and {remedy}"
        problem = f"{long} of {rows} rows exceed {limit}: {consequence}"
        yield Finding(level, "too-long", f"{self.dataset.key}.path", problem, remedy)

    def packing_findings(self, gpus: int) -> Iterator[Finding]:
        """Error if the packed rows are too few for a micro batch on each GPU, so that training would have no step."""
        cfg, trained = self.tokenizer.cfg, self._trained_sizes()
        sizes = trained[: TrainingSettings.of(cfg).rows_left(len(trained))]
        if not sizes:
            return
        sequences, per_batch = count_packed(cfg, sizes)
        if sequences >= per_batch * gpus:
            return
        filled = f"{sequences} of the {per_batch * gpus} packed sequences of a micro batch per GPU"
        fewer = f"micro_batch_size={sequences // gpus}" if sequences >= gpus else "sample_packing=false"
        remedy = f"set {fewer}, a smaller sequence_len, or more rows (rehearsal: `--set datasets.0.split=train[:N]`)"
        problem = f"no step: {len(sizes)} rows fill {filled}"
        yield Finding("error", NO_BATCH, "micro_batch_size", problem, remedy, rule_scope="data")


class _TokenizedPairs(_TokenizedSet):
    """Lengths of preference pairs, each that of the prompt with its longer answer, and mistakes.

    Attributes:
        dropped: number of pairs that Axolotl finds too long. It counts neither the BOS nor the EOS that TRL adds.
    """

    def __init__(self, tokenizer: Tokenizer, dataset: DatasetRef, trained: dict[int, Place]):
        super().__init__(tokenizer, dataset, trained)
        self.dropped = 0

    def _tokenize(self, rows: Sequence[tuple[Place, Row]]) -> None:
        pairs = self.tokenizer.pairs(self.dataset, [row for _, row in rows])
        self.rows += len(rows)
        for (place, row), pair in zip(rows, pairs, strict=True):
            self.sizes.append(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
            self.learnt.append(len(pair.chosen) + len(pair.rejected))
            self.dropped += pair.is_dropped
            chosen, rejected = _answers(pair).values()
            self.rendered.add_pair(place, row, chosen, rejected)
            self._compare_sets(place, Tokens(chosen.ids + rejected.ids, []))

    def measures(self) -> Row:
        """Lengths of pairs in tokens; the padding, which depends on both answers, is unknown."""
        return super().measures() | {"padding": None}

    def _count_long(self) -> int:
        return self.dropped


def _numbered(tokenizer: Tokenizer, dataset: DatasetRef, sample: int | None = None) -> Iterator[tuple[Place, Row]]:
    """Rows of a data set's local files, each with file and line, or with its number among the rows that Axolotl loads.

    Axolotl loads formats other than JSONL, and parts of files. JSONL rows that it cannot read are left out. Missing
    files have no rows. With a sample, at most so many rows are drawn over all of them."""
    files = datafiles.jsonl_files(dataset.entry)
    present = datafiles.present_files(dataset.entry)
    if present and not (files and datafiles.has_all_lines(dataset.entry)):
        for file in present:
            if file.suffix == ".parquet":
                deque(parquet_batches(file), maxlen=0)  # Axolotl would expand it without a bound
        for number, row in tokenizer.load(dataset, sample):
            yield (dataset.path, number), row
        return
    lines = chain.from_iterable(map(lines_of, files))
    kind = row_type(dataset.entry, dataset.rl)
    step = datafiles.stride(datafiles.count_jsonl(dataset.entry), sample)
    for place, line in islice(lines, 0, datafiles.first_rows(dataset.entry), step):
        row = readable(kind, line)
        if row is not None:
            yield place, row
