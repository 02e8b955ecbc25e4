"""Tasks of one's own, the whole way: from `recipe new` to a model card, with rows of every form and no study."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe

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


def several_turns(question: str, answer: str) -> dict[str, Any]:
    texts = ("Be brief.", "Hello.", "Hi!", question, answer)
    roles = ("system", "user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


def segments(question: str, answer: str) -> dict[str, Any]:
    return {"segments": [{"label": False, "text": f"Q: {question}\nA: "}, {"label": True, "text": answer}]}


def whole_text(question: str, answer: str) -> dict[str, Any]:
    return {"text": f"{question} {answer}"}


LEARNING = ("--set", "learning_rate=0.02", "--set", "bf16=false")  # of a model without knowledge


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text(OWN_TEMPLATE)
    return folder


@pytest.mark.parametrize(
    ("row_of", "kind", "sets", "evaluation_file"),  # the latter, or a share of the rows, is evaluated on
    [
        (several_turns, "chat_template", ["chat_template=tokenizer_default"], True),
        (segments, "input_output", [], False),
        (whole_text, "completion", [], True),
    ],
)
def test_a_task_of_ones_own_goes_the_whole_way(
    row_of: Callable[[str, str], dict[str, Any]],
    kind: str,
    sets: list[str],
    evaluation_file: bool,
    recipe: Recipe,
    tmp_path: Path,
    model: Path,
) -> None:
    rows = [row_of(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    write_rows(tmp_path / "mine.jsonl", rows[:24])
    write_rows(tmp_path / "mine-eval.jsonl", rows[24:])
    data = [{"path": "mine.jsonl", "type": kind}]
    sets = [f"datasets={yamlfiles.write_flow(data)}", *sets, "num_epochs=1", "warmup_steps=1"]  # for so few rows
    if evaluation_file:
        test_data = [{"path": "mine-eval.jsonl", "split": "train", "type": kind}]
        sets.append(f"test_datasets={yamlfiles.write_flow(test_data)}")
    else:
        sets += ["test_datasets=null", "val_set_size=0.25"]

    def done(*words: str | Path) -> str:
        finished = recipe.ok(*words)
        return finished.stdout + finished.stderr

    done("new", "mine", "--from", "haider2024/llama-3.2-3b", *(word for one in sets for word in ("--set", one)))
    checked = recipe.json("check", "mine", "--data")
    (report,) = checked if isinstance(checked, list) else [checked]
    assert [found for found in report["findings"] if found["level"] == "error"] == []
    assert {file: read["rows"] for read in report["data"] for file in read["files"]} == {"mine.jsonl": 24} | (
        {"mine-eval.jsonl": 8} if evaluation_file else {}
    )
    assert "fits" in done("plan", "mine", "--gpu", "A100")

    said = done("run", "mine", "--rehearse", *LEARNING, "--set", f"base_model={model}")
    assert "config's data" in said and "sample" not in said
    (run,) = (tmp_path / "runs" / "mine").iterdir()
    metrics = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    losses = [record["eval_loss_per_token"] for record in metrics if "eval_loss_per_token" in record]
    assert len(losses) > 1
    assert losses[-1] < losses[0]

    evaluated = recipe("evaluate", "latest", "--max-new-tokens", "16")
    (row,) = recipe.json("results")
    assert (row["recipe"], row["state"], row["eval_loss"]) == ("mine", "finished", pytest.approx(losses[-1]))
    assert (row["bleu4_published"], row["test_set"]) == (None, None)
    if kind != "completion":
        assert evaluated.returncode == 0, evaluated.stderr
        predicted = [orjson.loads(line) for line in (run / "predictions.jsonl").read_bytes().splitlines()]
        references = [prediction["reference"] for prediction in predicted]
        assert (references == ANSWERS[24:]) if evaluation_file else (set(references) < set(ANSWERS[:24]))
        assert (row["rows_evaluated"], row["bleu4"] is None) == (8 if evaluation_file else 6, False)
    else:
        assert evaluated.returncode == 2
        assert re.search(r"completion.*eval loss", evaluated.stderr), evaluated.stderr
        assert row["bleu4"] is None

    done("report", "latest", "-o", "mine.html")
    page = (tmp_path / "mine.html").read_text()
    assert "mine.jsonl" in page and "Rehearsal." in page
    done("publish", "latest")
    card = (run / "output" / "README.md").read_text()
    assert "mine.jsonl" in card and "code-review" not in card
