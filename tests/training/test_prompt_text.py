"""The prompt of a run as code: run, it gives the tokens that the training had."""

import json
from typing import Any

import orjson
import pytest

from qlora_recipes.base.files import write_rows
from qlora_recipes.config import substitution
from qlora_recipes.training import tokens

CHAT = {"type": "chat_template", "field_messages": "talk"}
SHAREGPT = {
    "type": "chat_template",
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human"], "assistant": ["gpt"]},
}
FORMAT = {
    "field_instruction": "ask",
    "field_output": "reply",
    "format": "Q: {instruction} {{}}\nA:",
    "no_input_format": "Q: {instruction}\nA:",
}


def trained(cfg: dict[str, Any], row: dict[str, Any], tokenizer: Any) -> list[int]:
    """The tokens of a row that carry no loss at its beginning."""
    from axolotl.utils.dict import DictDefault

    from qlora_recipes.training.losses import MASKED
    from qlora_recipes.training.tokens import tokenize

    (tokens,) = tokenize("rows", DictDefault(cfg), DictDefault(cfg["datasets"][0]), tokenizer, [row], 4096)
    return tokens.ids[: next(i for i, label in enumerate(tokens.labels) if label != MASKED)]


@pytest.mark.parametrize(
    ("dataset", "row", "values"),
    [
        ({"type": "alpaca"}, {"instruction": "Do {this}.", "input": "Now", "output": "Yes."}, ["instruction", "input"]),
        ({"type": "alpaca"}, {"instruction": "Do it.", "output": "Yes."}, ["instruction"]),
        ({"type": "alpaca:chatml"}, {"instruction": "Do it.", "input": "", "output": "Yes."}, ["instruction"]),
        ({"type": FORMAT}, {"ask": "Why \"it\"?", "reply": "So."}, ["ask"]),
        (CHAT, {"talk": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}, []),
        (SHAREGPT, {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, []),
    ],
)  # fmt: skip
def test_the_code_gives_the_tokens_of_the_training(dataset, row, values, tmp_path):
    from transformers import AutoTokenizer

    write_rows(tmp_path / "own.jsonl", [row])
    folder = substitution.model_folder()
    cfg = {
        "base_model": str(folder),
        "sequence_len": 512,
        "chat_template": "tokenizer_default",
        "datasets": [{"path": str(tmp_path / "own.jsonl")} | dataset],
    }
    code = tokens.as_code(cfg, folder, {})
    assert code
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, text in {name: row[name] for name in values}.items() or [("question", "Why?")]:
        assert f"{{{name}}}" in code
        code = code.replace(f"{{{name}}}", json.dumps(text)[1:-1])
    scope: dict[str, Any] = {"tokenizer": tokenizer}
    exec(code, scope)
    assert scope["inputs"]["input_ids"][0].tolist() == trained(cfg, row, tokenizer)


def test_a_type_that_is_not_known_has_no_code(tmp_path):
    cfg = {"datasets": [{"path": "mine.jsonl", "type": "my_module.strategy"}]}
    assert tokens.as_code(cfg, tmp_path, {}) is None
    assert tokens.as_code({"datasets": [{"path": "mine.jsonl", "type": "completion"}]}, tmp_path, {}) is None
    assert tokens.as_code({"datasets": [{"path": "mine.jsonl", "type": "alpaca"}]}, tmp_path, {}) is None


def test_the_code_of_a_tokenizer_is_not_even_asked_about(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\nclass Evil: pass\n")
    asks = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(asks))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert tokens.as_code({"datasets": [{"type": "alpaca"}]}, tmp_path, {}) is None
