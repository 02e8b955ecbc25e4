"""Rows beside the training text that Axolotl makes of them: what it leaves out, adds, masks and dates."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from typing import Any

import numpy

from ..base.errors import UserError
from ..base.files import Row
from ..base.yamlfiles import Config, write_flow
from ..config import datafiles, models
from ..config.datafiles import DatasetRef
from ..config.finding import DATED, Faults, Finding
from ..config.substitution import uses_small_model
from ..training.losses import MASKED
from ..training.row_types import Chat, Pairs, Segments, row_type
from ..training.tokens import Tokenizer, Tokens, changed_by_loading, end_ids, on_day, read_keys, without_nulls
from .rows import Place, Wording

_PIECES = re.compile(r"(?<=>)|(?=<)|\n")
"""Where to divide a text: templates leave out lines, or what stands between tags."""
_MOST_EXAMPLE = 60  # characters
_MOST_UNENDED = 0.1  # share of rows without their end; more is an error
_REPEATED = 4  # words; shorter texts can also stand in other ones
_DATED = 3  # rows that show if a template writes the date
_DAYS = (981173106, 1795996800)
"""Two times in seconds since 1970, on different days of week, month and year."""
_FIXED_DATE = {"date_string": "26 Jul 2024"}
"""Argument of Llama's templates, with the date that they write if they know no other."""
_EMPTY_REASONING = {"enable_thinking": False}
"""Argument of Qwen's templates, which then put an empty reasoning into the generation prompt."""

_PARTLY = {"training_detail", "reasoning_training_detail"}
"""Keys by which Axolotl gives parts of a message loss."""
_LEFT_OUT = "use a template or format that writes it, or move it to where this one does, such as the last turn"
_TRAINING_PROMPT = "generate with the training prompt"
_MASKS = ("weight", "train", "training", "trainable", "loss")
"""Fields by which formats of other programs exclude a message from training."""

_WORDING = {
    "text-left-out": Wording("warning", "{n}: the training text lacks text of {about}", _LEFT_OUT),
    "changed-row": Wording("warning", "{n}: loading changes {about}", "write nested values as JSON text"),
    "ignored-mask": Wording("error", "{n}: messages have `{about}`, which Axolotl ignores", ""),
    "doubled-bos": Wording("error", "{n} with {about} twice at the beginning", "remove it from the rows or the format"),
    "other-prompt": Wording("warning", "{n}: training and generation prompt differ", ""),
    "end-masked": Wording("warning", "{n} with {about} whose end is not learnt", "inspect rows with --show-tokens"),
    "repeated-text": Wording("warning", "{n}: the training text repeats text of {about}", "correct the template"),
    "end-cut": Wording("warning", "{n}: sequence_len truncates {about} the answer", ""),
}


def squeezed(text: str) -> str:
    """A text without white space, and in the form NFKC, as some tokenizers normalize it."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class RenderedRows:
    """Compares rows of a data set with their tokens.

    Attributes:
        rows: number of rows with tokens trained on.
        ends: tokens that end an answer in training.
        cut: number of rows that lose the end by truncation.
        ended: number of rows with such a token at the end of what is trained on.
        learnt_ends: those tokens.
        first: the first rows, for what all rows have in common.
        left_out: number of characters that training lacks, by the path of their field.
        unread: fields of messages that neither Axolotl nor the template reads.
        other_prompt: the first row whose prompt differs from generation's.
    """

    def __init__(self, tokenizer: Tokenizer, dataset: DatasetRef):
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.entry = tokenizer.entry(dataset)
        self.kind = row_type(dataset.entry, dataset.rl)
        self.ends = end_ids(tokenizer.cfg, tokenizer.tokenizer)
        self.faults = Faults()
        self.rows = 0
        self.cut = 0
        self.ended = 0
        self.learnt_ends = set[int]()
        self.first: list[tuple[Row, Tokens]] = []
        self.left_out = Counter[str]()
        self.unread = set[str]()
        self.other_prompt: Row | None = None

    @cached_property
    def chats(self) -> Any:
        """Axolotl's strategy for the chats."""
        return self.tokenizer.chat_strategy(self.dataset)

    @cached_property
    def read_keys(self) -> set[str]:
        """Fields of messages that Axolotl or the template reads."""
        return read_keys(self.chats)

    def add(self, rows: Sequence[tuple[Place, Row]], tokenized: Sequence[Tokens]) -> None:
        """Compare more rows, each with its tokens."""
        for (place, row), tokens in zip(rows, tokenized, strict=True):
            start, end = tokens.last_part()
            self._compare_text(place, row, self._decoded(tokens.ids))
            self._compare_bos(place, tokens)
            if end:
                self._compare_end(place, tokens, start, end)
            if isinstance(self.kind, Chat):
                self._compare_keys(place, row, self.kind)
                if end and not self.entry["message_field_training_detail"]:
                    self._compare_turns(place, tokens)
                    self._compare_prompt(place, row, tokens.ids[: self._start_of_answer(tokens, start, end)])
        for (_, row), tokens in zip(rows[:_DATED], tokenized, strict=False):
            if len(self.first) < _DATED:
                self.first.append((row, tokens))
        if datafiles.jsonl_files(self.dataset.entry):
            for (place, _), paths in zip(rows, changed_by_loading([row for _, row in rows], self.kind), strict=True):
                for path in paths:
                    self.faults.note("changed-row", path, *place)

    def add_pair(self, place: Place, row: Row, chosen: Tokens, rejected: Tokens) -> None:
        """Compare a preference pair with the tokens of its prompt and each answer."""
        answer, _ = rejected.last_part()
        self._compare_text(place, row, self._decoded(chosen.ids) + self._decoded(rejected.ids[answer:]))
        self._compare_bos(place, chosen)
        if len(self.first) < _DATED:
            self.first.append((row, chosen))
        for tokens in (chosen, rejected):
            start, end = tokens.last_part()
            self._compare_end(place, tokens, start, end)

    def add_pieces(self, tokenized: Sequence[Tokens]) -> None:
        """Compare the pieces of rows that Axolotl divides; only the last piece of a row has an end."""
        for tokens in tokenized:
            learnt = self.ends.intersection(tokens.labels)
            self.rows += bool(tokens.learnt)
            self.ended += bool(learnt)
            self.learnt_ends |= learnt

    def _compare_text(self, place: Place, row: Row, decoded: str) -> None:
        """Find text of the row's fields that the training text lacks or repeats."""
        fields = [*self.kind.texts_of(row)]
        together = "\n".join(text for _, text in fields)
        for path, text in fields:
            if text in decoded:
                if len(text.split()) >= _REPEATED and decoded.count(text) > together.count(text):
                    self.faults.note("repeated-text", path, *place)
                continue
            pieces = _left_out(text, squeezed(decoded))
            if pieces:
                self.left_out[path] += sum(map(len, pieces))
                self.faults.note("text-left-out", path, *place, pieces[0][:_MOST_EXAMPLE])

    def _compare_bos(self, place: Place, tokens: Tokens) -> None:
        bos = self.tokenizer.tokenizer.bos_token_id
        if uses_small_model(self.tokenizer.cfg):  # its BOS is <|im_start|>, with which ChatML begins turns
            return
        if bos is not None and tokens.ids[:2] == [bos, bos]:
            self.faults.note("doubled-bos", self.tokenizer.tokenizer.bos_token, *place)

    def _compare_end(self, place: Place, tokens: Tokens, start: int, end: int) -> None:
        """Find rows whose last part with loss does not end, or loses its end by truncation."""
        self.rows += 1
        learnt = self.ends.intersection(tokens.ids[start:end])
        if not learnt:
            self.faults.note("end-masked", "a last answer", *place)
            return
        self.ended += 1
        self.learnt_ends |= learnt
        limit = self.tokenizer.cfg.sequence_len
        if end > limit and self.tokenizer.cfg.excess_length_strategy == "truncate":
            self.cut += 1
            keeps_start = self._start_of_answer(tokens, start, end) < limit
            self.faults.note("end-cut", "the end of" if keeps_start else "all of", *place)

    def _compare_turns(self, place: Place, tokens: Tokens) -> None:
        """Find answers that are learnt, but for the token that ends them or, without one, up to the next turn's."""
        is_open = False
        for token, label in zip(tokens.ids, tokens.labels, strict=True):
            is_end = token in self.ends
            if label != MASKED:
                is_open = not is_end
            elif is_end and is_open:
                self.faults.note("end-masked", "an earlier answer", *place)
                return

    def _compare_keys(self, place: Place, row: Row, kind: Chat) -> None:
        """Find fields of messages that Axolotl does not read, and among them those that mask a message."""
        masks = set()
        for message in kind.items_of(row):
            for key in message.keys() - self.read_keys:
                self.unread.add(key)
                if key in _MASKS and message[key] in (0, False) and self._has_loss(message):
                    masks.add(key)
        for key in sorted(masks):
            self.faults.note("ignored-mask", key, *place)

    def _has_loss(self, message: Row) -> bool:
        role = self.chats.transform_message(deepcopy(message)).get("role")
        return bool(self.tokenizer.cfg.train_on_inputs) or role in self.chats.roles_to_train

    def _start_of_answer(self, tokens: Tokens, start: int, end: int) -> int:
        """Start of the last answer, whose end can be a part of its own, after text without loss."""
        while start and self.ends.issuperset(tokens.ids[start:end]):
            start, end = Tokens(tokens.ids[:start], tokens.labels[:start]).last_part()
        return start

    def _compare_prompt(self, place: Place, row: Row, prompt: Sequence[int]) -> None:
        """Compare what precedes the last answer in training with the prompt for a generation of this answer."""
        generation = self._generation_prompt(self.chats, row)
        if generation is None:
            return
        training = self._decoded(prompt)
        if not squeezed(generation).startswith(squeezed(training)):  # shorter, if the answer shares a token with it
            self.faults.note("other-prompt", "", *place, _difference(training, generation))
            self.other_prompt = self.other_prompt or row

    def _generation_prompt(self, chats: Any, row: Row) -> str | None:
        """Text of the prompt for a row's last answer; None if the template takes none, or the last turn has no loss."""
        row = without_nulls(row)
        turns = chats.get_conversation_thread(row)
        if turns[-1]["role"] not in chats.roles_to_train or len(turns) == 1:
            return None
        if not _PARTLY.isdisjoint(turns[-1]):
            return None
        options = {"tools": chats._get_tools(row), **chats.prompter.chat_template_kwargs}
        try:
            text = self.tokenizer.tokenizer.apply_chat_template(
                turns[:-1],
                chat_template=chats.prompter.chat_template,
                add_generation_prompt=True,
                tokenize=False,
                **options,
            )
        except Exception:  # templates can raise any exception, as for a chat that ends with a system message
            return None
        return str(text)

    def _decoded(self, ids: Sequence[int]) -> str:
        # an array, because transformers looks at each item of a list
        return str(self.tokenizer.tokenizer.decode(numpy.asarray(ids, dtype=int), skip_special_tokens=False))

    def findings(self) -> Iterator[Finding]:
        """Findings about single rows, then about all of them."""
        key = f"{self.dataset.key}.path"
        for fault, rows in self.faults.items():
            rule, about = fault
            if rule == "end-masked" and not self.ended:
                continue  # a finding about all rows
            finding = _WORDING[rule].finding(key, fault, rows)
            if rule == "text-left-out":
                finding.problem += f": {self.left_out[about]} characters, such as {rows.first[0][2]!r}"
            elif rule == "ignored-mask":
                setting = f"{self.dataset.key}.message_field_training: train"
                finding.remedy = f"call it `train`, make it true or false, and set {setting}"
            elif rule == "other-prompt":
                finding.problem += rows.first[0][2]
                finding.remedy = self._prompt_remedy()
            elif rule == "end-cut" and self.cut > _MOST_UNENDED * self.rows:
                finding.level = "error"
                finding.remedy = "set a larger sequence_len, or excess_length_strategy: drop"
            yield finding
        if self.dataset.is_training and self.rows:
            yield from self._end_findings()
        if self.unread:
            problem = f"fields of messages that nothing reads: {', '.join(sorted(self.unread))}"
            yield Finding("note", "unread-field", key, problem)
        if self.first and isinstance(self.kind, Chat | Pairs):
            yield from self._date_findings()

    def _end_findings(self) -> Iterator[Finding]:
        """Findings about the token that ends an answer."""
        key = f"{self.dataset.key}.type"
        if not self.ended and isinstance(self.kind, Segments):
            # the author of segments writes what ends an answer, such as the name of the next speaker
            problem = "no EOS token is trained on: generation needs another end, such as a text at which it stops"
            yield Finding("note", "eos-masked", key, problem)
        elif not self.ended:
            problem = "no EOS or end-of-turn token is trained on: the model would not learn to stop"
            yield Finding("error", "eos-masked", key, problem, self._end_remedy())
        stops = models.stop_ids(self.tokenizer.content)
        if stops and self.learnt_ends and self.learnt_ends.isdisjoint({*stops, self.tokenizer.tokenizer.eos_token_id}):
            learnt = self._decoded([min(self.learnt_ends)])
            problem = f"the model learns to end with {learnt}, but its generation does not stop there"
            yield Finding("warning", "end-no-stop", key, problem, f"set special_tokens: {{eos_token: {learnt!r}}}")

    def _end_remedy(self) -> str:
        """Setting that makes the first row learn its end, tried on this row."""
        if not self.first:
            return "write the EOS text at the end of the rows"
        row, tokens = self.first[0]
        special = set(self.tokenizer.tokenizer.get_added_vocab().values())
        after = [token for token in tokens.ids[tokens.last_part()[1] :] if token in special]
        if after:
            end = self._decoded(after[:1])
            changed = self._retokenized({"eot_tokens": [end]}, row)
            if changed and after[0] in changed.labels:
                return f"set {write_flow({'eot_tokens': [end]})[1:-1]}"
        return "inspect rows with --show-tokens; use a template that ends answers, or write the end into the rows"

    def _retokenized(self, settings: Config, row: Row) -> Tokens | None:
        """Tokens of a row with other settings; None if Axolotl refuses them."""
        try:
            return Tokenizer(self.tokenizer.content | settings).tokenize(self.dataset, [row])[0]
        except UserError:
            return None

    def _with_template_argument(self, argument: Config) -> Config:
        """Setting that adds an argument of the chat template."""
        return {"chat_template_kwargs": (self.tokenizer.content.get("chat_template_kwargs") or {}) | argument}

    def _prompt_remedy(self) -> str:
        """Setting that makes training and generation prompt equal, tried on a row where they differ."""
        row = self.other_prompt or {}
        setting = self._with_template_argument(_EMPTY_REASONING)
        try:
            tokenizer = Tokenizer(self.tokenizer.content | setting)
            other = RenderedRows(tokenizer, self.dataset)
            other.add([(("", 0), row)], tokenizer.tokenize(self.dataset, [row]))
        except UserError:  # the template refuses the argument
            return _TRAINING_PROMPT
        if other.other_prompt:
            return _TRAINING_PROMPT
        return f"set {write_flow(setting)[1:-1]}, and generate with it"

    def _date_findings(self) -> Iterator[Finding]:
        """Finding about a template that writes the date."""
        rows = [row for row, _ in self.first]
        if not _changes_by_day(self.tokenizer, self.dataset, rows):
            return
        problem = "the chat template writes today's date: prompts differ from day to day, in training and in use"
        remedy = "use a template without a date"
        setting = self._with_template_argument(_FIXED_DATE)  # not read for pairs
        with suppress(UserError):  # the template refuses the argument
            if not _changes_by_day(Tokenizer(self.tokenizer.content | setting), self.dataset, rows):
                remedy = f"set {write_flow(setting)[1:-1]}"
        yield Finding("error", DATED, "chat_template", problem, remedy)


def _changes_by_day(tokenizer: Tokenizer, dataset: DatasetRef, rows: Sequence[Row]) -> bool:
    tokenize = tokenizer.pairs if dataset.rl else tokenizer.tokenize
    tokens = []
    for day in _DAYS:
        with on_day(day):
            tokens.append(tokenize(dataset, rows))
    return tokens[0] != tokens[1]


def _is_in(text: str, rendered: str) -> bool:
    """True if a text stands in a squeezed text, as it is or as JSON."""
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(squeezed(form) in rendered for form in forms)


def _left_out(text: str, rendered: str) -> list[str]:
    """Parts of a text that a squeezed text lacks."""
    if _is_in(text, rendered):
        return []
    return [piece.strip() for piece in _PIECES.split(text) if not _is_in(piece, rendered)]


def _difference(training: str, generation: str) -> str:
    """Difference between two prompts, for a message."""
    common = 0
    for one, other in zip(training, generation, strict=False):
        if one != other:
            break
        common += 1
    in_training, in_generation = training[common:][:_MOST_EXAMPLE], generation[common:][:_MOST_EXAMPLE]
    if not in_generation:
        return f": only training has {in_training!r} before the answer"
    return f": {in_training!r} in training, {in_generation!r} in use"
