"""Fields that Axolotl's data set types read from a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from ..base.files import Row
from ..base.yamlfiles import Config


@dataclass(frozen=True)
class Fields:
    """The fields that a data set type reads from a row.

    Attributes:
        reference: the text field that the model learns; None if it does not learn exactly one field.
        texts: other required text fields.
        optional: optional fields.
        lists: required fields that hold lists.
        items: required keys of each mapping in these lists.
        optional_items: optional keys of each mapping in these lists.
    """

    reference: str | None = None
    texts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    optional_items: tuple[str, ...] = ()


_ALPACA = Fields("output", ("instruction",), ("input",))


_WITH_SYSTEM = Fields("output", ("instruction", "system"), ("input",))


_ORCA = Fields("response", ("question", "system_prompt"))


# By the part of the type before any colon; from axolotl/prompt_strategies and prompt_tokenizers.py.
FIELDS = {
    "alpaca": _ALPACA,
    "alpaca_chat": _ALPACA,
    "alpaca_chat.load_concise": _ALPACA,
    "alpaca_chat.load_no_prompt": _ALPACA,
    "alpaca_chat.load_qa": Fields("answer", ("question",)),
    "alpaca_instruct": _ALPACA,
    "alpaca_instruct.load_no_prompt": _ALPACA,
    "alpaca_w_system": _WITH_SYSTEM,
    "alpaca_w_system.load_chat": _WITH_SYSTEM,
    "alpaca_w_system.load_instruct": _WITH_SYSTEM,
    "alpaca_w_system.load_open_orca": _ORCA,
    "alpaca_w_system.load_open_orca_chatml": _ORCA,
    "completion": Fields("text"),
}


def names_of(dataset: Config) -> tuple[str, ...]:
    """Names of the fields that a data set's type reads, in a fixed order."""
    fields = fields_of(dataset) or Fields()
    return tuple(filter(None, (*fields.texts, fields.reference, *fields.optional, *fields.lists)))


def content_of(row: Row, names: Sequence[str]) -> str:
    """Text to compare rows of one type by: their values of these fields, or of all fields if there are none."""
    read = [row[name] for name in names if row.get(name) is not None] if names else row
    return orjson.dumps(read, option=orjson.OPT_SORT_KEYS, default=str).decode()


def fields_of(dataset: Config) -> Fields | None:
    """The fields that a data set's type reads; None for an unknown type."""
    kind = dataset.get("type")
    if isinstance(kind, dict):
        named = {name: kind.get(f"field_{name}") or name for name in ("output", "instruction", "input", "system")}
        return Fields(named["output"], (named["instruction"],), (named["input"], named["system"]))
    if kind is None:
        return Fields(lists=("input_ids", "attention_mask", "labels"))  # tokenized already
    if kind == "completion":
        return Fields(dataset.get("field") or "text")
    if kind == "chat_template":
        names = {name: dataset.get(f"message_field_{name}") or name for name in ("role", "content")}
        names |= {name: key for name, key in (dataset.get("message_property_mappings") or {}).items() if key}
        messages, (role, content, *others) = dataset.get("field_messages") or "messages", names.values()
        optional = (*others, "tool_calls", "tool_call_id", "reasoning_content", "name")
        return Fields(None, (), ("system", "tools"), (messages,), (role, content), optional)
    if kind == "input_output":
        return Fields(lists=("segments",), items=("text", "label"))
    return FIELDS.get(str(kind).partition(":")[0])
