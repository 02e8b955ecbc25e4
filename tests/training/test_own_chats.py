"""Chats that `recipe new --data` makes of questions and answers: their tokens and labels, by a script of its own."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_rows
from qlora_recipes.base.hub import importing_axolotl
from qlora_recipes.config import datafiles

with importing_axolotl(offline=True):
    from qlora_recipes.training.tokens import Tokenizer

INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Template of Mistral's first instruct models, which has no tokens of its own for turns."""
PAIRS = [
    ("Wie heißt die Hauptstadt von Österreich?", "Wien"),
    ("Was ist 19 + 38?", "57"),
    ("Bilde zwei Sätze;\nmit „Hund“.", "Der Hund bellt.\n\nEr schläft: *nie*."),
    ("Antworte mit </s>.", "(nein)"),
]


@pytest.fixture
def instruct_model(tmp_path: Path, model: Path) -> Path:
    """A model's folder whose tokenizer has a chat template."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").touch()
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if "chat_template" not in settings and not (folder / "chat_template.jinja").exists():
        file.write_text(json.dumps(settings | {"chat_template": INST}))
    return folder


def test_the_model_learns_the_answer_and_the_end_of_its_turn_only(recipe, tmp_path, instruct_model):
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows([("Frage", "Antwort"), *PAIRS * 3])
    options = "--fields", "question=Frage,answer=Antwort", "--set", "bf16=null", "--set", "special_tokens=null"
    recipe.ok("new", "mine", "--data", "rows.csv", "--model", instruct_model, *options)
    config = yamlfiles.read_yaml(tmp_path / "variants" / "mine.yaml")
    (dataset,) = datafiles.training_sets(config)
    rows = Tokenizer(config).tokenize(dataset, read_rows(tmp_path / "variants" / "mine.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(instruct_model)
    for (question, answer), row in zip(PAIRS, rows[: len(PAIRS)], strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert row.ids == tokenizer.apply_chat_template(messages)["input_ids"]
        learnt = [place for place, label in enumerate(row.labels) if label != -100]
        assert learnt == list(range(learnt[0], learnt[-1] + 1))
        assert [row.labels[place] for place in learnt] == [row.ids[place] for place in learnt]
        end = tokenizer.convert_ids_to_tokens(row.labels[learnt[-1]])
        assert end in ("</s>", "<|im_end|>")
        assert tokenizer.decode(row.labels[learnt[0] : learnt[-1]]).strip() == answer
        prompt = tokenizer.decode(row.ids[: learnt[0]])
        assert prompt.rstrip().endswith(("[/INST]", "<|im_start|>assistant"))
        assert tokenizer.decode(row.ids[learnt[-1] + 1 :]).strip() == ""
