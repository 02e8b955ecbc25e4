"""Chat templates that would take hours or gigabytes; see also test_prompt_text.py for the texts of right ones."""

from typing import Any

import pytest
import random_models

from qlora_recipes.base import processes
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.hub import importing_axolotl

with importing_axolotl(offline=True):
    from qlora_recipes.training.tokens import DictDefault, tokenize

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def tokenized(template: str) -> Any:
    """Token ids of a chat with a template, as in training."""
    tokenizer = random_models.tokenizer()
    dataset = DictDefault(
        {"type": "chat_template", "chat_template": "jinja", "chat_template_jinja": template, "field_messages": "chat"}
    )
    cfg = DictDefault({"train_on_inputs": False, "sequence_len": 99, "datasets": [dataset]})
    return tokenize("datasets.0", cfg, dataset, tokenizer, [{"chat": CHAT}], 99)


@pytest.mark.parametrize(
    "template",
    [
        LOOPS,
        "{{ 'a' * 9999999999 }}",  # computed when the template is read
        "{{ 'a' * (messages|length * 3000000000) }}",
        "{{ 'a' * (messages|length * 3000000) }}",  # little for Python, but not for a tokenizer
        "{{ ([1] * 9999999999)|length }}",
        "{{ 'a'.center(9999999999) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    ],
)
def test_a_template_without_bounds_is_refused(monkeypatch, template):
    monkeypatch.setattr(processes, "SECONDS", 0.5)
    monkeypatch.setattr(processes, "_exceeding", set())
    with pytest.raises(UserError) as refused:
        tokenized(template)
    assert str(refused.value) == (
        f"datasets.0: Axolotl cannot tokenize these rows as chat_template: UserError: {template[:60]}: takes more than "
        "0.5 s or 256 MiB"
    )


def test_a_long_chat_is_rendered():
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    [tokens] = tokenized(template)
    assert len(tokens.ids) > 4
