"""Axolotl's types of data sets: the fields that they read from a row, and the mistakes in a row."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import orjson

from ..base.files import Row
from ..base.yamlfiles import Config


@dataclass(frozen=True)
class RowMistake:
    """A mistake in a row.

    Attributes:
        rule: the name of the mistake; `bad-row` and `other-fields` if Axolotl cannot read the row.
        about: the field or the kind of mistake; equal in all rows with the same mistake.
    """

    rule: str
    about: str = ""

    @property
    def is_unreadable(self) -> bool:
        """True if Axolotl cannot read the row."""
        return self.rule in ("bad-row", "other-fields")


def texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Paths and texts within a value, apart from names of types and numbers of calls."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item, f"{path}[]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "arguments" and isinstance(item, str):
                yield from texts(_parsed(item), f"{path}.{key}")
            elif key not in ("type", "id"):
                yield from texts(item, f"{path}.{key}")


def _parsed(text: str) -> Any:
    """Meaning of JSON text, which templates get; other text as it is."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


@lru_cache(1000)
def misspelt(names: tuple[str, ...], fields: tuple[str, ...]) -> dict[str, str]:
    """Missing fields of a row, each with the misspelt name that the row has instead.

    `inptu` counts as a misspelt `input`; `output` does not, because it resembles `input` too little.
    """
    missing = [field for field in fields if field not in names]
    meant = {}
    for name in names:
        if name not in fields:
            for field in get_close_matches(name, missing, 1, 0.75):
                meant[field] = name
    return meant


@dataclass(frozen=True)
class RowType:
    """A type of data set; without fields, a type that this project does not know.

    Attributes:
        required: the fields that a row must have.
        optional: the fields that a row can have.
        reference: the required text field that the model learns; empty if it does not learn exactly one field.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    reference: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Fields that the type reads, in a fixed order."""
        return self.required + self.optional

    def content_of(self, row: Row) -> str:
        """Text to compare rows by: the values of the fields, or the whole row if the type is unknown."""
        content: Any = row
        if self.names:
            content = [row[name] for name in self.names if row.get(name) is not None]
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS, default=str).decode()

    def prompt_of(self, row: Row) -> list[tuple[str, str]]:
        """Names and texts of what precedes the answer; for an unknown type, all texts of the row."""
        texts = {name: row.get(name) for name in self.names or row if name != self.reference}
        return [(name, text) for name, text in texts.items() if text and isinstance(text, str)]

    def texts_of(self, row: Row) -> Iterator[tuple[str, str]]:
        """Paths and texts of all fields that training reads."""
        for name in self.names:
            if isinstance(row.get(name), str):
                yield name, row[name]

    def answer_of(self, row: Row) -> str:
        """Text that the model learns to answer; empty if the type has no field for it."""
        return str(row.get(self.reference) or "")

    def mistakes(self, row: Row) -> Iterator[RowMistake]:
        """Mistakes in a row."""
        meant = misspelt(tuple(row), self.names)
        if self.required and not meant and row.keys().isdisjoint(self.names):
            yield RowMistake("other-fields", ", ".join(self.required))
            return
        for name in self.names:
            if name in meant:
                rule = "misspelt-field" if name in self.optional else "bad-row"
                yield RowMistake(rule, f"the field {meant[name]}; did you mean {name}?")
            else:
                yield from self.field_mistakes(name, row)
        yield from self.further_mistakes(row)

    def field_mistakes(self, name: str, row: Row) -> Iterator[RowMistake]:
        """Mistake in the value of a field, if there is one."""
        yield from ()

    def further_mistakes(self, row: Row) -> Iterator[RowMistake]:
        """Mistakes apart from those in single fields."""
        yield from ()


@dataclass(frozen=True)
class TextRows(RowType):
    """A type whose fields are texts: completion, alpaca, and the types that a config describes.

    Attributes:
        needs_input: the first optional field must have a text.
    """

    needs_input: bool = False

    def field_mistakes(self, name: str, row: Row) -> Iterator[RowMistake]:
        value = row.get(name)
        if value is None and name in self.optional:
            return
        if not isinstance(value, str):
            yield RowMistake("bad-row", f"the field {name} is {'not text' if name in row else 'missing'}")
        elif name == self.reference and not value.strip():
            yield RowMistake("empty-reference", name)

    def further_mistakes(self, row: Row) -> Iterator[RowMistake]:
        if self.needs_input and not row.get(self.optional[0]):
            yield RowMistake("no-format", self.optional[0])


@dataclass(frozen=True)
class LabelledRows(TextRows):
    """Answers of KTO, whose field `label` is true for a desirable one; TRL makes no tensor of a text."""

    def field_mistakes(self, name: str, row: Row) -> Iterator[RowMistake]:
        if name != "label":
            yield from super().field_mistakes(name, row)
        elif not isinstance(row.get(name), int):  # a boolean, too
            yield RowMistake("bad-row", "the field label is missing, or neither true nor false")


@dataclass(frozen=True)
class Tokenized(RowType):
    """A type whose required fields are lists: rows that are tokenized already, and the base of chats and segments."""

    def field_mistakes(self, name: str, row: Row) -> Iterator[RowMistake]:
        value = row.get(name)
        is_filled = value and isinstance(value, list | str)  # a chat can hold its messages as JSON text
        if name in self.required and not is_filled:
            yield RowMistake("bad-row", f"the field {name} is missing or not a list")

    def items_of(self, row: Row) -> list[Any]:
        """Items of the first list; none if it is missing or JSON text."""
        items = row.get(self.required[0])
        return items if isinstance(items, list) else []

    def item_mistakes(self, item: Row, required: Collection[str], keys: tuple[str, ...]) -> Iterator[RowMistake]:
        """Missing and misspelt keys of an item in the first list.

        Args:
            item: the item.
            required: the keys that it must have.
            keys: all keys that the type reads.
        """
        meant, field = misspelt(tuple(item), keys), self.required[0]
        for name in keys:
            is_missing = name in required and item.get(name) is None
            if name in meant:
                rule = "bad-row" if is_missing else "misspelt-field"
                yield RowMistake(rule, f"the field {meant[name]} in {field}; did you mean {name}?")
            elif is_missing:
                yield RowMistake("bad-row", f"an item of {field} lacks {name}")


@dataclass(frozen=True)
class Segments(Tokenized):
    """The type input_output: pieces of text, each with a label that is true if the model learns it."""

    def prompt_of(self, row: Row) -> list[tuple[str, str]]:
        """Texts of the pieces that the model does not learn."""
        return [("text", item["text"]) for item in self.items_of(row) if not item["label"]]

    def texts_of(self, row: Row) -> Iterator[tuple[str, str]]:
        for item in self.items_of(row):
            yield "segments[].text", item["text"]

    def further_mistakes(self, row: Row) -> Iterator[RowMistake]:
        keys = ("text", "label")
        for item in self.items_of(row):
            if not isinstance(item, dict):
                yield RowMistake("bad-row", f"an item of {self.required[0]} is not a mapping")
                continue
            yield from self.item_mistakes(item, keys, keys)
            if isinstance(item.get("label"), str):
                yield RowMistake("bad-row", "label is text; Axolotl reads any text as true")


@dataclass(frozen=True)
class Chat(Tokenized):
    """The type chat_template: a list of messages.

    Attributes:
        role: the key of a message's role.
        content: the key of a message's text.
        other_keys: further keys that the type reads from a message.
    """

    role: str = "role"
    content: str = "content"
    other_keys: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.optional + self.required

    @property
    def messages(self) -> str:
        """The field with the messages."""
        return self.required[0]

    def prompt_of(self, row: Row) -> list[tuple[str, str]]:
        """Text fields, such as system; roles and texts of the messages before the last one, which is the answer."""
        turns = self.items_of(row)[:-1]
        return super().prompt_of(row) + [
            (str(turn.get(self.role)), str(turn.get(self.content) or "")) for turn in turns
        ]

    def texts_of(self, row: Row) -> Iterator[tuple[str, str]]:
        path = f"{self.messages}[]"
        for message in self.items_of(row):
            for key in (self.content, *self.other_keys):
                if key not in ("tool_call_id", "name"):  # for the program that reads the chat
                    yield from texts(message.get(key), f"{path}.{key}")
        yield from texts(row.get("system"), "system")
        tools = row.get("tools")
        yield from texts(_parsed(tools) if isinstance(tools, str) else tools, "tools")

    def answer_of(self, row: Row) -> str:
        turns = self.items_of(row) or [{}]
        return str(turns[-1].get(self.content) or "")

    def with_answer(self, row: Row, answer: str) -> Row:
        """Row with another answer, in its last message."""
        *turns, last = row[self.messages]
        return row | {self.messages: [*turns, last | {self.content: answer}]}

    def further_mistakes(self, row: Row) -> Iterator[RowMistake]:
        messages = self.items_of(row)
        if not messages:
            return  # `field_mistakes` reports an empty list
        for message in messages:
            if not isinstance(message, dict):
                yield RowMistake("bad-row", f"an item of {self.messages} is not a mapping")
                return
            yield from self._message_mistakes(message)
        first, last = messages[0], messages[-1]
        if str(last.get(self.content)).isspace() and not last.get("tool_calls"):
            yield RowMistake("empty-reference", self.content)
        if first.get(self.role) != "system" and row.get("system") is None:
            yield RowMistake("lacks-system")

    def _message_mistakes(self, message: Row) -> Iterator[RowMistake]:
        required = () if message.get("tool_calls") else (self.role, self.content)
        return self.item_mistakes(message, required, (self.role, self.content, *self.other_keys))


_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
"""Columns of public data sets with the scores of a pair's answers."""


@dataclass(frozen=True)
class Pairs(RowType):
    """A type of preference pairs: a prompt, a chosen and a rejected answer.

    Attributes:
        prompt: the field of the prompt; empty if both answers are conversations that begin with it.
        chosen, rejected: the fields of the answers.
        content: the key of a message's text.
        are_texts: the fields are texts; otherwise messages or texts.
    """

    prompt: str = ""
    chosen: str = "chosen"
    rejected: str = "rejected"
    content: str = "content"
    are_texts: bool = True

    def swapped(self, row: Row) -> Row:
        """Row with the answers swapped."""
        return row | {self.chosen: row.get(self.rejected), self.rejected: row.get(self.chosen)}

    def texts_of(self, row: Row) -> Iterator[tuple[str, str]]:
        for name in self.names:
            value = row.get(name)
            if isinstance(value, str):
                yield name, value
        for name in (self.prompt, self.chosen, self.rejected):
            for message in _messages(row.get(name)):
                yield from texts(message.get(self.content), f"{name}[].{self.content}")

    def field_mistakes(self, name: str, row: Row) -> Iterator[RowMistake]:
        value = row.get(name)
        if name in self.optional:
            return
        if self.are_texts:
            is_read, kind = isinstance(value, str), "text"
        else:
            is_read, kind = self._is_message(name, value), "text or messages" if self.prompt else "messages"
        if not is_read:
            yield RowMistake("bad-row", f"the field {name} is {f'not {kind}' if name in row else 'missing'}")

    def _is_message(self, name: str, value: Any) -> bool:
        """True for messages with texts and, beside a prompt, for a text."""
        if isinstance(value, str):
            return bool(self.prompt)
        messages = _messages(value)
        least = 1 if self.prompt else 2
        return len(messages) >= least and all(isinstance(message.get(self.content), str) for message in messages)

    def further_mistakes(self, row: Row) -> Iterator[RowMistake]:
        chosen, rejected = self._answer(row.get(self.chosen)), self._answer(row.get(self.rejected))
        for name, answer in ((self.chosen, chosen), (self.rejected, rejected)):
            if answer is not None and not answer.strip():
                yield RowMistake("bad-row", f"the field {name} is empty")
        if chosen and chosen == rejected:
            yield RowMistake("equal-answers", f"{self.chosen} and {self.rejected} are equal")
        if not self.prompt and _messages(row.get(self.chosen))[:-1] != _messages(row.get(self.rejected))[:-1]:
            yield RowMistake("other-prompt", "the conversations differ before the last message")
        for better, worse in _SCORES:
            high, low = row.get(better), row.get(worse)
            if isinstance(high, int | float) and isinstance(low, int | float) and high < low:
                yield RowMistake("swapped-pair", f"{better} is lower than {worse}")

    def _answer(self, value: Any) -> str | None:
        """Text of an answer; None if it is malformed."""
        if isinstance(value, str):
            return value
        messages = _messages(value)
        text = messages[-1].get(self.content) if messages else None
        return text if isinstance(text, str) else None


def _messages(value: Any) -> list[Row]:
    """Messages in a field that holds one or more; empty for other values."""
    messages = [value] if isinstance(value, dict) else value
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return messages
    return []


_ALPACA = TextRows(("instruction", "output"), ("input",), "output")
_WITH_SYSTEM = TextRows(("instruction", "system", "output"), ("input",), "output")
_ORCA = TextRows(("question", "system_prompt", "response"), (), "response")

TYPES = {
    "alpaca": _ALPACA,
    "alpaca_chat": _ALPACA,
    "alpaca_chat.load_concise": _ALPACA,
    "alpaca_chat.load_no_prompt": _ALPACA,
    "alpaca_chat.load_qa": TextRows(("question", "answer"), (), "answer"),
    "alpaca_instruct": _ALPACA,
    "alpaca_instruct.load_no_prompt": _ALPACA,
    "alpaca_w_system": _WITH_SYSTEM,
    "alpaca_w_system.load_chat": _WITH_SYSTEM,
    "alpaca_w_system.load_instruct": _WITH_SYSTEM,
    "alpaca_w_system.load_open_orca": _ORCA,
    "alpaca_w_system.load_open_orca_chatml": _ORCA,
    "completion": TextRows(("text",), (), "text"),
}
"""Types by the part of their name before any colon.

From axolotl/prompt_strategies and prompt_tokenizers.py."""


OF_PAIRS = ("dpo", "ipo", "simpo")
"""Values of `rl` whose rows are read by axolotl/prompt_strategies/dpo."""
_PAIRS = {
    "intel": "question",
    "icr": "input",
    "prompt_pairs": "prompt",
}
"""Field of the prompt in types of texts that begin with `chatml.` or `llama3.`."""


_CONVERSATIONS = Pairs(("chosen", "rejected"), ("system", "prompt"), are_texts=False)
_OTHER_PREFERENCES = {
    "orpo None": Pairs(("prompt", "chosen", "rejected"), (), "", "prompt"),
    "orpo chat_template.argilla": _CONVERSATIONS,
    "kto None": LabelledRows(("prompt", "completion", "label"), (), "completion"),
}
"""Types of rows by `rl` and type (axolotl/prompt_strategies/orpo; rows without a type stay as they are)."""


def row_type(entry: Config, rl: str | None = None) -> RowType:
    """Type of a data set, from its entry in a config and the preference training."""
    name = entry.get("type")
    if rl in OF_PAIRS:
        return _pairs_type(name, entry)
    if rl:
        return _OTHER_PREFERENCES.get(f"{rl} {name}", RowType())
    if isinstance(name, dict):
        return _described_type(name)
    if name is None:
        return Tokenized(("input_ids", "attention_mask", "labels"))
    if name == "completion":
        field = entry.get("field") or "text"
        return TextRows((field,), (), field)
    if name == "chat_template":
        return _chat_type(entry)
    if name == "input_output":
        return Segments(("segments",))
    return TYPES.get(str(name).partition(":")[0], RowType())


def _pairs_type(name: Any, entry: Config) -> RowType:
    """Type of preference pairs, from its name or description (axolotl/prompt_strategies/dpo)."""
    chosen, rejected = entry.get("field_chosen") or "chosen", entry.get("field_rejected") or "rejected"
    content = (entry.get("message_property_mappings") or {}).get("content") or "content"
    if isinstance(name, dict):
        prompt, system = name.get("field_prompt") or "prompt", name.get("field_system") or "system"
        chosen, rejected = name.get("field_chosen") or "chosen", name.get("field_rejected") or "rejected"
        return Pairs((prompt, chosen, rejected), (system,), "", prompt, chosen, rejected)
    if name in (None, "passthrough"):
        return Pairs(("prompt", "chosen", "rejected"), (), "", "prompt")
    if name in ("chat_template", "chat_template.default"):
        prompt = entry.get("field_messages") or "messages"
        return Pairs((prompt, chosen, rejected), (), "", prompt, chosen, rejected, content, are_texts=False)
    if name == "chat_template.argilla_chat":
        return Pairs((chosen, rejected), (), "", "", chosen, rejected, content, are_texts=False)
    family, _, style = str(name).partition(".")
    if family in ("chatml", "llama3") and style in _PAIRS:
        return Pairs((_PAIRS[style], "chosen", "rejected"), ("system",), "", _PAIRS[style])
    return RowType()


def _described_type(description: Config) -> TextRows:
    """Type that a config describes by fields and formats."""
    names = {}
    for field in ("output", "instruction", "input", "system"):
        names[field] = description.get(f"field_{field}") or field
    # without no_input_format, Axolotl uses its own prompt for rows without input (user_defined.py)
    needs_input = bool(description.get("format") and not description.get("no_input_format"))
    required, optional = (names["instruction"], names["output"]), (names["input"], names["system"])
    return TextRows(required, optional, names["output"], needs_input)


def _chat_type(entry: Config) -> Chat:
    """Type chat_template with the names of a data set's entry."""
    keys = {name: entry.get(f"message_field_{name}") or name for name in ("role", "content")}
    for name, key in (entry.get("message_property_mappings") or {}).items():
        if key:
            keys[name] = key
    role, content, *further = keys.values()
    other_keys = (*further, "tool_calls", "tool_call_id", "reasoning_content", "name")
    return Chat((entry.get("field_messages") or "messages",), ("system", "tools"), "", role, content, other_keys)
