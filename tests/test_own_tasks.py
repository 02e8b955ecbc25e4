"""A task of one's own, the whole way: from `recipe new` to a model card, with chats and no study."""

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import write_rows

pytestmark = pytest.mark.long

QUESTIONS = [f"What is {a} times {b}?" for a in range(2, 6) for b in range(2, 10)]
ANSWERS = [f"It is {a * b}, as {a} times {b} is." for a in range(2, 6) for b in range(2, 10)]


OWN_TEMPLATE = """\
{% for message in messages %}{{ message.role }}:
{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:
{% endif %}"""
"""Of the model's tokenizer, for rows that name no other."""


def chat(question: str, answer: str) -> dict[str, Any]:
    texts = ("Be brief.", "Hello.", "Hi!", question, answer)
    roles = ("system", "user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


LEARNING = ("--set", "learning_rate=0.02", "--set", "bf16=false")  # of a model without knowledge


def test_a_task_of_ones_own_goes_the_whole_way(recipe, tmp_path, tiny):
    model = shutil.copytree(tiny, tmp_path / "tiny")
    (model / "chat_template.jinja").write_text(OWN_TEMPLATE)
    rows = [chat(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    write_rows(tmp_path / "mine.jsonl", rows[:24])
    write_rows(tmp_path / "mine-eval.jsonl", rows[24:])
    data = {"path": "mine.jsonl", "type": "chat_template"}
    test_data = data | {"path": "mine-eval.jsonl", "split": "train"}
    sets = ["chat_template=tokenizer_default", "num_epochs=1", "warmup_steps=1"]  # for so few rows
    sets += [f"datasets={yamlfiles.write_flow([data])}", f"test_datasets={yamlfiles.write_flow([test_data])}"]

    def done(*words: str | Path) -> str:
        finished = recipe.ok(*words)
        return finished.stdout + finished.stderr

    done("new", "mine", "--from", "haider2024/llama-3.2-3b", *(word for one in sets for word in ("--set", one)))
    (report,) = recipe.json("check", "mine", "--all-rows")
    read = {file: of_file["rows"] for of_file in report["data"] for file in of_file["files"]}
    assert read == {"mine.jsonl": 24, "mine-eval.jsonl": 8}
    assert "fits" in done("plan", "mine", "--gpu", "A100")

    said = done("run", "mine", "--rehearse", *LEARNING, "--set", f"base_model={model}")
    assert "config's data" in said
    assert "sample" not in said
    (run,) = (tmp_path / "runs" / "mine").glob("[!.]*")
    metrics = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    losses = [record["eval_loss_per_token"] for record in metrics if "eval_loss_per_token" in record]
    assert losses[-1] < losses[0]

    done("evaluate", "latest", "--max-new-tokens", "16")
    (row,) = recipe.json("results")
    assert row["recipe"] == "mine"
    assert row["state"] == "finished"
    assert row["eval_loss"] == pytest.approx(losses[-1])
    assert row["bleu4_published"] is None
    assert row["test_set"] is None
    assert row["rows_evaluated"] == 8
    assert row["bleu4"] is not None
    predicted = [orjson.loads(line) for line in (run / "predictions.jsonl").read_bytes().splitlines()]
    assert [prediction["reference"] for prediction in predicted] == ANSWERS[24:]

    done("report", "latest", "-o", "mine.html")
    page = (tmp_path / "mine.html").read_text()
    assert "mine.jsonl" in page
    assert "Rehearsal." in page
    done("publish", "latest")
    card = (run / "output" / "README.md").read_text()
    assert "mine.jsonl" in card
    assert "code-review" not in card
