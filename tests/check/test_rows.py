"""Rows that spoil a training, found with their lines, without a tokenizer."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.check import check, rows
from qlora_recipes.config.compose import Request
from qlora_recipes.training import row_fields

pytestmark = pytest.mark.usefixtures("place")

LLAMA_2, LLAMA_3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"
GOOD = {"instruction": "Review it.", "input": "@@ -1 +1 @@\n-a\n+b", "output": "Why b?"}
FORMATS = {"format": "[Q] {instruction} {input} ### Answer:", "no_input_format": "[Q] {instruction} ### Answer:"}
OWN = {"type": FORMATS}
NO_FORMAT = {"type": FORMATS | {"no_input_format": None}}
CHATS = {"type": "chat_template"}
SEGMENTS = {"type": "input_output"}
ASKED, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD_CHAT = {"messages": [{"role": "user", "content": "Fine?"}, ANSWER]}
GOOD_SEGMENTS = {"segments": [{"label": True, "text": "good"}]}


def write(name: str, lines: list[Any]) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    Path(name).write_bytes(b"\n".join(raw) + b"\n")


def found(lines: list[Any], dataset: dict[str, Any] | None = None, model: str = LLAMA_2) -> list[tuple[Any, str]]:
    """The line, level and rule of each finding for a training file of some rows or raw lines, and its problem."""
    write("train.jsonl", lines)
    data = {"path": "train.jsonl", "type": "alpaca"} | (dataset or {})
    findings, _ = rows.check({"base_model": model, "datasets": [data]})
    assert {finding.where for finding in findings} <= {"train.jsonl"}
    return [
        ((finding.line, finding.level, finding.rule), f"{finding.problem} {finding.remedy}") for finding in findings
    ]


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | fields


# a row, or line, behind a good one; the level and rule of the one finding that it gives, and a value that this tells
MISTAKES: list[tuple[Any, dict[str, Any], str, str]] = [
    (b'{"instruction": ', {}, "error bad-row", "JSON"),
    (b'{"instruction": "caf\xe9", "output": "a"}', {}, "error bad-row", "UTF-8"),
    ({"instruction": "a"}, {}, "error bad-row", "output"),
    (GOOD | {"instruction": None}, {}, "error bad-row", "instruction"),
    (GOOD | {"output": " \n"}, {}, "warning empty-reference", "output"),
    (GOOD | {"input": "<s>old</s>"}, {}, "warning special-token", "<s>"),
    (GOOD, {}, "warning repeated-row", "train.jsonl:1"),
    ({"instruction": "a", "inptu": "b", "output": "c"}, {}, "warning misspelt-field", "mean input?"),
    ({"instruction": "a", "output": "b"}, NO_FORMAT, "error no-format", "no_input_format"),
    ({"text": "a"}, CHATS, "error bad-row", "messages"),
    (chat(ASKED, "A test."), CHATS, "error bad-row", "mapping"),
    (chat({"role": "user", "content": None}, ANSWER), CHATS, "error bad-row", "content"),
    (chat(ASKED, ANSWER | {"content": " "}), CHATS, "warning empty-reference", "content"),
    (chat(ASKED, ANSWER, sytem="Be brief."), CHATS, "warning misspelt-field", "mean system?"),
    ({"messages": [dict(reversed(turn.items())) for turn in GOOD_CHAT["messages"]]}, CHATS, "warning repeated-row", ""),
    ({"segments": [{"label": "false", "text": "a"}]}, SEGMENTS, "error bad-row", "label"),
]


@pytest.mark.parametrize(("row", "dataset", "name", "value"), MISTAKES)
def test_a_row_that_spoils_a_training_is_found_with_its_line(row, dataset, name, value):
    good = {"chat_template": GOOD_CHAT, "input_output": GOOD_SEGMENTS}.get(str(dataset.get("type")), GOOD)
    ((where, says),) = found([good, row], dataset)
    assert where == (2, *name.split())
    assert value in says


SHAREGPT = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
SHARED = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("lines", "dataset"),
    [
        ([GOOD, GOOD | {"input": None}, b"", GOOD | {"output": "Other.", "more": [1]}], {}),
        ([b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), {"instruction": "a", "output": "b"}], {}),
        ([{"question": "a", "answer": "b"}], {"type": "alpaca_chat.load_qa"}),
        ([{"code": "a"}], {"type": "completion", "field": "code"}),
        ([{"patch": "a", "msg": "b"}], {"type": {"field_instruction": "patch", "field_output": "msg"}}),
        ([{"q": "a", "output": "b", "input": "c"}], {"type": {"field_instruction": "q"} | FORMATS}),
        ([{"input_ids": [1], "attention_mask": [1], "labels": [1]}], {"type": None}),
        ([GOOD, b"{"], {"split": "train[:1]"}),  # what is not trained on is not judged
        ([chat(SYSTEM, ASKED, ANSWER), chat(ASKED, ANSWER, more="x", id=3)], CHATS),
        ([chat(ASKED, {"role": "assistant", "tool_calls": [1]}, {"role": "tool", "content": "a"}, ANSWER)], CHATS),
        ([{"messages": json.dumps([ASKED, ANSWER])}], CHATS),
        ([SHARED], CHATS | SHAREGPT),
        ([chat(SYSTEM, ASKED, ANSWER), chat(ASKED, ANSWER, system="Be brief.")], CHATS),
        ([{"segments": [{"label": False, "text": "<s>a"}, {"label": True, "text": "b</s>"}], "more": 1}], SEGMENTS),
    ],
)
def test_rows_that_are_right_give_no_finding(lines, dataset):
    assert found(lines, dataset) == []


def test_a_system_text_that_only_some_rows_have_is_an_error():
    ((where, _),) = found([chat(ASKED, ANSWER), GOOD_CHAT | {"system": "Be brief."}], CHATS)
    assert where == (1, "error", "lacks-system")


def test_rows_with_the_same_mistake_are_one_finding():
    ((where, says),) = found([GOOD, *({"instruction": str(i)} for i in range(11))])
    assert where == (2, "error", "bad-row") and says.startswith("11 rows") and " 2, 3, " in says and " 12" not in says


@pytest.mark.parametrize(("row", "form"), [(GOOD_CHAT, "type: chat_template"), ({"q": "a", "a": "b"}, "field_output")])
def test_rows_of_another_form_are_one_finding_that_names_it(row, form):
    ((where, says),) = found([row, row | {"more": 1}], {})
    assert where == (1, "error", "bad-row") and form in says and says.startswith("2 rows")


def test_rows_of_a_misspelt_type_are_not_judged():
    write("train.jsonl", [GOOD_CHAT])
    config = {"base_model": LLAMA_2, "datasets": [{"path": "train.jsonl", "type": "chat_tempate"}]}
    Path("mine.yaml").write_text(yamlfiles.write_yaml(config))
    report = check.check_request(Request("mine.yaml"), data=True)
    check.tokenize_all(report)
    findings = report.findings
    assert {finding.name for finding in findings if finding.key.startswith("datasets")} == {"value:datasets.0.type"}
    assert findings[-1].rule == "not-checked"  # the tokens


def test_evaluation_rows_that_were_trained_on_are_found():
    other = GOOD | {"output": "Another."}
    write("train.jsonl", [GOOD, other])
    write("test.jsonl", [other, GOOD, GOOD | {"output": "New."}])
    sections = {"datasets": "train.jsonl", "test_datasets": "test.jsonl"}
    findings, read = rows.check({key: [{"path": file, "type": "alpaca"}] for key, file in sections.items()})
    (finding,) = findings
    assert finding.name == "leaked-row:test_datasets.0.path"
    assert finding.where == "test.jsonl"
    assert finding.line == 1
    assert finding.problem.startswith("2 rows ") and "train.jsonl:2" in finding.problem
    assert [one["rows"] for one in read] == [2, 3]


def test_a_folder_is_read_file_by_file(place):
    (place / "rows").mkdir()
    for i in range(2):
        (place / "rows" / f"{i}.jsonl").write_text(json.dumps(GOOD | {"output": str(i)}) + "\n")
    (place / "rows" / "manifest.json").write_text("{}")
    findings, (read,) = rows.check({"datasets": [{"path": "rows", "type": "alpaca"}]})
    assert read["files"] == ["rows/0.jsonl", "rows/1.jsonl"]
    assert read["rows"] == 2
    assert [(finding.rule, finding.where) for finding in findings] == [("not-checked", "rows/manifest.json")]


@pytest.mark.parametrize("kind", sorted(row_fields.FIELDS))
def test_fields_are_those_that_axolotl_reads(kind, tiny):
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    from qlora_recipes.training.tokens import tokenize

    fields = row_fields.FIELDS[kind]
    needed = [*fields.texts, *([fields.reference] if fields.reference else [])]
    row = {name: f"the {name}" for name in needed}
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    cfg = DictDefault(sequence_len=512, train_on_inputs=False)

    def tokenized(row: dict[str, str]) -> str:
        (only,) = tokenize(kind, cfg, DictDefault(path="x", type=kind), tokenizer, [row], 512)
        return str(tokenizer.decode(only.ids))

    whole = tokenized(row | {name: f"the {name}" for name in fields.optional})
    assert all(f"the {name}" in whole for name in (*needed, *fields.optional))
    assert tokenized(row)  # optional fields may be missing
    for name in needed:
        with pytest.raises(UserError, match="KeyError"):
            tokenized({other: text for other, text in row.items() if other != name} | {"some": "x"})


def test_each_repeated_row_is_listed_with_its_original():
    other = GOOD | {"output": "Another."}
    ((where, says),) = found([GOOD, other, GOOD, other, other])
    assert where == (3, "warning", "repeated-row")
    assert "3 rows (lines 3, 4, 5): repeated (3 = train.jsonl:1, 4 = train.jsonl:2, 5 = train.jsonl:2)" in says


def test_memory_does_not_grow_with_the_number_of_faulty_rows():
    write("train.jsonl", [b"{"] * 30_000)
    tracemalloc.start()
    (finding,), _ = rows.check({"datasets": [{"path": "train.jsonl", "type": "alpaca"}]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert finding.problem.startswith("30000 rows (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …): not JSON")
    assert peak < 500_000, peak


def test_memory_does_not_grow_with_the_kinds_of_faults():
    findings = found([{"instruction": "a", f"output{i}": "b"} for i in range(300)])  # also one repeated row
    says = [text for where, text in findings if where[2] == "bad-row"]
    assert sum(int(text.split()[0]) for text in says) == 300
    assert len(says) == 100
    assert says[-1].startswith("201 rows (lines 100, 101, ")
