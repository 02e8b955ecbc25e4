"""The prompt of a run as code, for whoever uses its model elsewhere."""

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import json_rows
from ..base.hub import importing_axolotl
from ..base.yamlfiles import Config
from ..checks.rows import fields_of
from ..configs import datafiles

ANSWER = "An answer."


def as_code(cfg: Config, tokenizer: Path, known: dict[str, str]) -> str | None:
    """Python code that sets `inputs` to a prompt's tokens, as Axolotl wrote them in the training.

    It is made from what Axolotl makes of a row of placeholders, and checked: its tokens are the same. None where no
    code is known that has them, or the tokenizer cannot be loaded.

    Args:
        cfg: the run's config.
        tokenizer: the folder with its tokenizer.
        known: texts of some fields; others are left to be filled in.
    """
    dataset = next((dataset for _, dataset in datafiles.datasets(cfg, "datasets")), {})
    row, names = _placeholders(dataset)
    if not names:
        return None
    with importing_axolotl(offline=True):
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            ids = _prompt(row, cfg, dataset, loaded)
        except (OSError, ValueError, UserError):
            return None
    if dataset.get("type") == "chat_template":
        return _chat(loaded, ids)
    return _text(loaded, ids, names, known)


def _prompt(row: dict[str, Any], cfg: Config, dataset: Config, tokenizer: Any) -> list[int]:
    """The tokens of a row before its answer."""
    from axolotl.utils.dict import DictDefault

    from ..checks.tokens import tokenize
    from .prompter import LOSS_ON_ANSWERS, answer_of

    answers = DictDefault(cfg | {"train_on_inputs": False}), DictDefault(dataset | LOSS_ON_ANSWERS)
    (tokens,) = tokenize("its prompt", *answers, tokenizer, [row], 2**20)
    return tokens.ids[: answer_of(tokens.labels)[0]]


def _placeholders(dataset: Config) -> tuple[dict[str, Any], list[str]]:
    """A row of a data set with {placeholders} for what a prompt is made of, and their names; none for a type that is
    not known here.

    It has the optional fields that the first row has, as prompts can be worded otherwise without them.
    """
    if dataset.get("type") == "chat_template":
        names = {"role": "role", "content": "content"} | (dataset.get("message_property_mappings") or {})
        user, assistant = ((dataset.get("roles") or {}).get(role, [role])[0] for role in ("user", "assistant"))
        turns = ((user, "{question}"), (assistant, ANSWER))
        messages = [{names["role"]: role, names["content"]: text} for role, text in turns]
        return {dataset.get("field_messages") or "messages": messages}, ["question"]
    if dataset.get("type") == "input_output":
        return {"segments": [{"label": False, "text": "{text}"}, {"label": True, "text": ANSWER}]}, ["text"]
    fields = fields_of(dataset)
    if not fields or not fields.reference or not fields.texts:
        return {}, []
    first: dict[str, Any] = {}
    for file in datafiles.jsonl_files(dataset)[:1]:
        with file.open("rb") as lines:
            first = next(islice(json_rows(lines, file, ()), 1), {})
    named = [name for name in (*fields.texts, *fields.optional) if not first or first.get(name)]
    return {name: f"{{{name}}}" for name in named} | {fields.reference: ANSWER}, named


def _chat(tokenizer: Any, ids: Sequence[int]) -> str | None:
    messages = [{"role": "user", "content": "{question}"}]
    options = {"add_generation_prompt": True, "return_dict": True}
    if tokenizer.chat_template is None or tokenizer.apply_chat_template(messages, **options)["input_ids"] != ids:
        return None
    return (
        'messages = [{"role": "user", "content": "..."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")"
    )


def _text(tokenizer: Any, ids: Sequence[int], names: Sequence[str], known: dict[str, str]) -> str | None:
    """The code for a prompt with placeholders, with the tokens that begin a text added by the tokenizer or in it."""
    for added in (True, False):
        begun = len(tokenizer("")["input_ids"]) if added else 0
        text = tokenizer.decode(ids[begun:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text, add_special_tokens=added)["input_ids"] == list(ids):
            lines = [f"{name} = {json.dumps(known.get(name, '...'), ensure_ascii=False)}" for name in names]
            option = "" if added else ", add_special_tokens=False"
            call = f'inputs = tokenizer(prompt, return_tensors="pt"{option})'
            return "\n".join([*lines, f"prompt = {_formatted(text, names)}", call])
    return None


def _formatted(text: str, names: Sequence[str]) -> str:
    """A text as an f-string in which only the placeholders of some names are replaced, on lines as in the text."""
    parts = re.split(f"({'|'.join(re.escape(f'{{{name}}}') for name in names)})", text)
    escaped = [part if i % 2 else part.replace("{", "{{").replace("}", "}}") for i, part in enumerate(parts)]
    lines = "".join(escaped).splitlines(keepends=True)
    return "(\n" + "".join(f"    f{json.dumps(line, ensure_ascii=False)}\n" for line in lines) + ")"
