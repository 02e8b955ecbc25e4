"""The chat template of a published model writes the prompts of its training."""

from pathlib import Path
from typing import Any

import chat_models
import pytest
from transformers import AutoTokenizer

from qlora_recipes.base.files import write_rows
from qlora_recipes.training import tokens
from qlora_recipes.training.tokens import Tokenizer, on_day, trained_template

QUESTION = {"role": "user", "content": "Is 3 odd?"}
DATE = {"date_string": "26 Jul 2024"}
INSTRUCT: dict[str, Any] = {"instruction": "Is 3 odd?", "output": "Yes."}
DESCRIBED = {"field_instruction": "question", "field_output": "answer", "no_input_format": "Q: {instruction}\nA:\n"}
CHAT: dict[str, Any] = {"messages": [QUESTION, {"role": "assistant", "content": "Yes."}]}


def config(model: Path, kind: Any, **more: Any) -> dict[str, Any]:
    data = {"path": "rows.jsonl", "type": kind}
    return {"base_model": str(model), "datasets": [data], "special_tokens": {"pad_token": "<unk>"}} | more


@pytest.mark.parametrize(
    ("family", "kind", "row", "more"),
    [
        pytest.param("llama3", "alpaca", INSTRUCT, {}, id="alpaca"),
        pytest.param("mistral_v1", DESCRIBED, {"question": "Is 3 odd?", "answer": "Yes."}, {}, id="described"),
        pytest.param(
            "llama3_2_vision", "chat_template", CHAT, {"chat_template_kwargs": DATE}, id="chat with a fixed date"
        ),
    ],
)
def test_a_chat_server_writes_the_training_prompt(place, family, kind, row, more):
    model = chat_models.save(Path("model"), family)
    write_rows(Path("rows.jsonl"), [row])
    training = {"adapter": "lora", "lora_target_modules": ["q_proj"], "learning_rate": 0.1, "num_epochs": 1}
    steps = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "sequence_len": 512}
    cfg = config(model, kind, **training, **steps, **more)
    tokenizer = Tokenizer(cfg)
    (trained,) = tokens.tokenize("row", tokenizer.cfg, tokenizer.cfg.datasets[0], tokenizer.tokenizer, [row], 512)
    loaded = AutoTokenizer.from_pretrained(model)
    loaded.chat_template = trained_template(cfg, model, {})
    with on_day(0):
        prompt = loaded.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=False)
    assert prompt == trained.parts()[0]


def test_a_prompt_of_two_texts_has_no_template(place):
    model = chat_models.save(Path("model"), "llama3")
    kind: dict[str, Any] = {"field_instruction": "question", "field_system": "system", "field_output": "answer"}
    described = {"type": kind | {"format": "{instruction}", "system_format": "{system}"}}
    assert trained_template(config(model, "") | {"datasets": [described]}, model, {}) is None
    assert trained_template(config(model, "alpaca"), Path("gone"), {}) is None
