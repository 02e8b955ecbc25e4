"""Rows that spoil a training, found with their lines, without a tokenizer."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_rows
from qlora_recipes.check import check, rows
from qlora_recipes.config.compose import Request
from qlora_recipes.training import row_types

pytestmark = pytest.mark.usefixtures("place")

LLAMA_2 = "meta-llama/Llama-2-7b-hf"
GOOD = {"instruction": "Review it.", "input": "@@ -1 +1 @@\n-a\n+b", "output": "Why b?"}
FORMATS = {"format": "[Q] {instruction} {input} ### Answer:", "no_input_format": "[Q] {instruction} ### Answer:"}
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


def findings_of(lines: list[Any], dataset: dict[str, Any] | None = None, rl: str | None = None) -> list[str]:
    """Findings for a training file of some rows or raw lines."""
    write("train.jsonl", lines)
    data = {"path": "train.jsonl", "type": "alpaca"} | (dataset or {})
    findings, _ = rows.check_rows({"base_model": LLAMA_2, "rl": rl, "datasets": [data]})
    return [str(finding).replace("datasets.0.path", "KEY") for finding in findings]


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages)} | fields


BAD = "error: KEY: 1 row: {}; correct or drop these rows [bad-row:KEY]"
EMPTY = "warning: KEY: 1 row with an empty {}: the model learns nothing; drop these rows [empty-reference:KEY]"
MISSPELT = "warning: KEY: 1 row: the field {} [misspelt-field:KEY]"
REPEATED = (
    "warning: KEY: 1 row: repeated (train.jsonl:1); `dataset_exact_deduplication: true` drops them [repeated-row:KEY]"
)
OF_TEXTS = [  # a row, or line, behind a good one, and the one finding that it gives
    (b'{"instruction": ', BAD.format("not JSON in UTF-8 (unexpected end of data)")),
    (b'{"a": "caf\xe9"}', BAD.format("not JSON in UTF-8 (str is not valid UTF-8: surrogates not allowed)")),
    ([1], BAD.format("not a mapping of fields to values")),
    ({"instruction": "a"}, BAD.format("the field output is missing")),
    (GOOD | {"instruction": None}, BAD.format("the field instruction is not text")),
    (GOOD | {"input": 3}, BAD.format("the field input is not text")),
    ({"instruction": "a", "outptu": "c"}, BAD.format("the field outptu; did you mean output?")),
    ({"instruction": "a", "inptu": "b", "output": "c"}, MISSPELT.format("inptu; did you mean input?")),
    (GOOD | {"output": " \n"}, EMPTY.format("output")),
    (
        GOOD | {"input": "<s>old</s>"},
        "warning: KEY: 1 row with the text <s>, which the tokenizer reads as a special token; remove it, "
        "unless you mean the token [special-token:KEY]",
    ),
    (GOOD, REPEATED),
]
OF_CHATS = [
    ({"text": "a"}, BAD.format("the type reads other fields: messages (fields: text)")),
    (chat(), BAD.format("the field messages is missing or not a list")),
    (chat(ASKED, "A test."), BAD.format("an item of messages is not a mapping")),
    (chat(ASKED | {"content": None}, ANSWER), BAD.format("an item of messages lacks content")),
    (chat({"role": "user"}, {"role": "assistant"}), BAD.format("an item of messages lacks content")),
    (
        chat({"role": "user", "contnet": "a"}, ANSWER),
        BAD.format("the field contnet in messages; did you mean content?"),
    ),
    (chat(ASKED, ANSWER | {"content": " "}), EMPTY.format("content")),
    (chat(ASKED, ANSWER, sytem="Be brief."), MISSPELT.format("sytem; did you mean system?")),
    (chat(*[dict(reversed(turn.items())) for turn in GOOD_CHAT["messages"]]), REPEATED),
]
OF_SEGMENTS = [
    ({"segments": [{"label": "false", "text": "a"}]}, BAD.format("label is text; Axolotl reads any text as true")),
    ({"segments": [{"text": "a"}]}, BAD.format("an item of segments lacks label")),
    ({"segments": ["a"]}, BAD.format("an item of segments is not a mapping")),
]
GOOD_PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
PAIRS = {"type": "chat_template", "field_messages": "prompt"}
FULL_PAIR = {"chosen": [ASKED, ANSWER], "rejected": [ASKED, ANSWER | {"content": "No test."}]}
FULL_PAIRS = {"type": "chat_template.argilla_chat"}
OF_PAIRS = [
    ({"prompt": "a", "chosen": "b"}, BAD.format("the field rejected is missing")),
    (GOOD_PAIR | {"chosen": 3}, BAD.format("the field chosen is not text or messages")),
    (GOOD_PAIR | {"rejected": [{"role": "assistant"}]}, BAD.format("the field rejected is not text or messages")),
    (GOOD_PAIR | {"rejected": " "}, BAD.format("the field rejected is empty")),
    ({"prompt": "a", "chosn": "b", "rejected": "c"}, BAD.format("the field chosn; did you mean chosen?")),
    (
        {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "b"}]},
        "error: KEY: 1 row: chosen and rejected are equal, so that the pair shows no preference; drop these rows "
        "[equal-answers:KEY]",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "error: KEY: 1 row: chosen and rejected are equal, so that the pair shows no preference; drop these rows "
        "[equal-answers:KEY]",
    ),
    (
        {"prompt": "Why?", "chosen": "No.", "rejected": "So."},
        "warning: KEY: 1 row: an earlier pair prefers the other answer (train.jsonl:1); swap the answers, or drop "
        "these rows [swapped-pair:KEY]",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 5},
        "warning: KEY: 1 row: score_chosen is lower than score_rejected; swap the answers, or drop these rows "
        "[swapped-pair:KEY]",
    ),
    (GOOD_PAIR, REPEATED),
]
OF_FULL_PAIRS = [
    ({"chosen": "a", "rejected": "b"}, BAD.format("the field chosen is not messages")),
    (
        FULL_PAIR | {"chosen": [SYSTEM, ASKED, ANSWER]},
        "error: KEY: 1 row: the conversations differ before the last message; Axolotl takes the chosen one's; correct "
        "or drop these rows [other-prompt:KEY]",
    ),
]
WITHOUT_INPUT = (
    {"instruction": "a", "output": "b"},
    "error: KEY: 1 row without input: Axolotl uses its own prompt instead of format; "
    "set no_input_format [no-format:KEY]",
)


@pytest.mark.parametrize(
    ("good", "dataset", "row", "finding"),
    [
        *((GOOD, {}, *mistake) for mistake in OF_TEXTS),
        *((GOOD_CHAT, CHATS, *mistake) for mistake in OF_CHATS),
        *((GOOD_SEGMENTS, SEGMENTS, *mistake) for mistake in OF_SEGMENTS),
        (GOOD, NO_FORMAT, *WITHOUT_INPUT),
    ],
)
def test_a_row_that_spoils_a_training_is_found_with_its_line(good, dataset, row, finding):
    assert findings_of([good, row], dataset) == [f"train.jsonl:2: {finding}"]


@pytest.mark.parametrize(
    ("good", "dataset", "row", "finding"),
    [
        *((GOOD_PAIR, PAIRS, *mistake) for mistake in OF_PAIRS),
        *((FULL_PAIR, FULL_PAIRS, *mistake) for mistake in OF_FULL_PAIRS),
        (
            {"prompt": "<s>a", "chosen": "b</s>", "rejected": "c</s>"},  # tokens on purpose
            {"type": "passthrough"},
            {"prompt": "a", "chosen": {}},
            BAD.format("the field chosen is not text"),
        ),
        (
            {"q": "a", "chosen": "b", "rejected": "c"},
            {"type": {"field_prompt": "q"}},
            {"q": "a", "chosen": "b", "rejected": None},
            BAD.format("the field rejected is not text"),
        ),
    ],
)
def test_a_pair_that_spoils_a_training_is_found_with_its_line(good, dataset, row, finding):
    assert f"train.jsonl:2: {finding}" in findings_of([good, row], dataset, "dpo")
    assert findings_of([good], dataset, "dpo") == []


ARGILLA = {"type": "chat_template.argilla"}
ANSWERED = {"prompt": "<s>Why?", "completion": "So.</s>", "label": True}  # tokens on purpose
UNTYPED = {"type": None}
NO_LABEL = BAD.format("the field label is missing, or neither true nor false")


@pytest.mark.parametrize(
    ("rl", "good", "dataset", "row", "finding"),
    [
        ("orpo", GOOD_PAIR, UNTYPED, {"prompt": "a", "chosen": "b"}, BAD.format("the field rejected is missing")),
        ("orpo", GOOD_PAIR, UNTYPED, FULL_PAIR | {"prompt": "a"}, BAD.format("the field chosen is not text")),
        ("orpo", GOOD_PAIR, UNTYPED, *OF_PAIRS[6]),
        ("orpo", FULL_PAIR | {"system": "Be brief."}, ARGILLA, *OF_FULL_PAIRS[0]),
        ("kto", ANSWERED, UNTYPED, {"prompt": "a", "completion": "b"}, NO_LABEL),
        ("kto", ANSWERED, UNTYPED, ANSWERED | {"label": "no"}, NO_LABEL),
        ("kto", ANSWERED, UNTYPED, ANSWERED | {"completion": " "}, EMPTY.format("completion")),
    ],
)
def test_a_row_of_orpo_or_kto_that_spoils_a_training_is_found(rl, good, dataset, row, finding):
    assert f"train.jsonl:2: {finding}" in findings_of([good, row], dataset, rl)
    assert findings_of([good], dataset, rl) == []


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
    assert findings_of(lines, dataset) == []


def test_a_system_text_that_only_some_rows_have_is_an_error():
    assert findings_of([chat(ASKED, ANSWER), GOOD_CHAT | {"system": "Be brief."}], CHATS) == [
        "train.jsonl:1: error: KEY: 1 row without the field system, which Axolotl fills with None; "
        'add it; it can be "" [lacks-system:KEY]'
    ]


def test_rows_with_the_same_mistake_are_one_finding():
    assert findings_of([GOOD, *({"instruction": str(i)} for i in range(11))]) == [
        "train.jsonl:2: error: KEY: 11 rows (lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …): the field output is missing; "
        "correct or drop these rows [bad-row:KEY]"
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        pytest.param(GOOD_CHAT, "(fields: messages); set type: chat_template to", id="chat"),
        pytest.param({"q": "a", "a": "b"}, "(fields: q, a); set type: {field_output: answer} to", id="unknown fields"),
    ],
)
def test_rows_of_another_form_are_one_finding_that_names_it(row, says):
    assert findings_of([row, row | {"more": 1}]) == [
        "train.jsonl:1: error: KEY: 2 rows (lines 1, 2): the type reads other fields: instruction, output "
        f"{says} read them [bad-row:KEY]"
    ]


def test_rows_of_a_misspelt_type_are_not_judged():
    write("train.jsonl", [GOOD_CHAT])
    config = {"base_model": LLAMA_2, "datasets": [{"path": "train.jsonl", "type": "chat_tempate"}]}
    Path("mine.yaml").write_text(yamlfiles.write_yaml(config))
    request = Request("mine.yaml")
    report = check.check_request(request, data=True)
    check.tokenize_all(report, request)
    findings = report.findings
    assert {finding.name for finding in findings if finding.key.startswith("datasets")} == {"value:datasets.0.type"}
    assert findings[-1].rule == "not-checked"  # the tokens


def test_evaluation_rows_that_were_trained_on_are_found():
    other = GOOD | {"output": "Another."}
    write("train.jsonl", [GOOD, other])
    write("test.jsonl", [other, GOOD, GOOD | {"output": "New."}])
    sections = {"datasets": "train.jsonl", "test_datasets": "test.jsonl"}
    findings, sizes = rows.check_rows({key: [{"path": file, "type": "alpaca"}] for key, file in sections.items()})
    assert list(map(str, findings)) == [
        "test.jsonl:1: warning: test_datasets.0.path: 2 rows (lines 1, 2) also in the training data: scores mean "
        "little (1 = train.jsonl:2, 2 = train.jsonl:1); drop them from it [leaked-row:test_datasets.0.path]"
    ]
    assert [size["rows"] for size in sizes] == [2, 3]


def test_test_rows_that_no_data_set_names_are_compared_with_the_training_rows():
    write("train.jsonl", [GOOD, GOOD | {"output": "Another."}])
    write("valid.jsonl", [GOOD | {"output": "New."}])
    write("test.jsonl", [{"other": "fields"}, GOOD | {"id": 7}])
    config = {"datasets": [{"path": "train.jsonl", "type": "alpaca", "split": "train[:1]"}]}
    config["test_datasets"] = [{"path": "valid.jsonl", "type": "alpaca"}]
    findings, sizes = rows.check_rows(config)
    assert list(map(str, findings)) == [
        "test.jsonl:2: warning: 1 row also in the training data: scores mean little (train.jsonl:1); drop them from it "
        "[leaked-row]"
    ]
    assert [size["files"] for size in sizes] == [["train.jsonl"], ["valid.jsonl"]]


def test_a_folder_is_read_file_by_file(place):
    (place / "rows").mkdir()
    for i in range(2):
        (place / "rows" / f"{i}.jsonl").write_text(json.dumps(GOOD | {"output": str(i)}) + "\n")
    (place / "rows" / "manifest.json").write_text("{}")
    findings, (size,) = rows.check_rows({"datasets": [{"path": "rows", "type": "alpaca"}]})
    assert size["files"] == ["rows/0.jsonl", "rows/1.jsonl"]
    assert size["rows"] == 2
    assert list(map(str, findings)) == [
        "rows/manifest.json: note: datasets.0.path: not JSONL: missing fields and repeated rows are not reported; "
        "convert it to JSONL [not-checked:datasets.0.path]"
    ]


@pytest.mark.parametrize("kind", sorted(row_types.TYPES))
def test_fields_are_those_that_axolotl_reads(kind, tiny):
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    from qlora_recipes.training.tokens import tokenize

    fields = row_types.TYPES[kind]
    row = {name: f"the {name}" for name in fields.required}
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    cfg = DictDefault(sequence_len=512, train_on_inputs=False)

    def tokenized(row: dict[str, str]) -> str:
        (only,) = tokenize(kind, cfg, DictDefault(path="x", type=kind), tokenizer, [row], 512)
        return str(tokenizer.decode(only.ids))

    text = tokenized({name: f"the {name}" for name in fields.names})
    assert [name for name in fields.names if f"the {name}" not in text] == []
    assert tokenized(row)  # optional fields may be missing
    for name in fields.required:
        with pytest.raises(UserError, match="KeyError"):
            tokenized({other: text for other, text in row.items() if other != name} | {"some": "x"})


def test_each_repeated_row_is_listed_with_its_original():
    other = GOOD | {"output": "Another."}
    assert findings_of([GOOD, other, GOOD, other, other]) == [
        "train.jsonl:3: warning: KEY: 3 rows (lines 3, 4, 5): repeated "
        "(3 = train.jsonl:1, 4 = train.jsonl:2, 5 = train.jsonl:2); "
        "`dataset_exact_deduplication: true` drops them [repeated-row:KEY]"
    ]


def test_repeated_rows_that_axolotl_drops_are_none():
    write_rows(Path("train.jsonl"), [GOOD, GOOD])
    cfg = {"datasets": [{"path": "train.jsonl", "type": "alpaca"}], "dataset_exact_deduplication": True}
    assert rows.check_rows(cfg)[0] == []


def test_memory_does_not_grow_with_the_number_of_faulty_rows():
    write("train.jsonl", [b"{"] * 30_000)
    tracemalloc.start()
    (finding,), _ = rows.check_rows({"datasets": [{"path": "train.jsonl", "type": "alpaca"}]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert finding.problem.startswith("30000 rows ")
    assert peak < 500_000, peak


def test_memory_does_not_grow_with_the_kinds_of_faults():
    findings = findings_of([{"instruction": "a", f"output{i}": "b"} for i in range(300)])
    assert len(findings) == 101  # also one for the repeated rows
    assert findings[-1] == (
        "train.jsonl:100: error: KEY: 201 rows (lines 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, …): …; "
        "correct or drop these rows [bad-row:KEY]"
    )
