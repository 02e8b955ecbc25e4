import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.checks import rows

LLAMA_2, LLAMA_3 = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"
GOOD = {"instruction": "Review it.", "input": "@@ -1 +1 @@\n-a\n+b", "output": "Why b?"}


def found(lines: list[Any], dataset: dict[str, Any] | None = None, model: str = LLAMA_2) -> list[str]:
    """The findings for a training file of some rows (or raw lines), without the names of files."""
    file = Path("train.jsonl")
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    file.write_bytes(b"\n".join(raw) + b"\n")
    data = {"path": str(file), "type": "alpaca"} | (dataset or {})
    return [str(finding) for finding in rows.check({"base_model": model, "datasets": [data]})[0]]


FORMATS = {"format": "[Q] {instruction} {input} ### Answer:", "no_input_format": "[Q] {instruction} ### Answer:"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"instruction": ', "train.jsonl:2: error: datasets.0.path: 1 row with no JSON (unexpected end of data"),
        (b"[1, 2]", "1 row with no mapping of fields to values"),
        (b'{"instruction": "caf\xe9", "output": "a"}', "1 row with not UTF-8"),
        ({"instruction": "a"}, "1 row with nothing in the field output"),
        (b'{"instruction": "a", "output": "b", "output": "c"}', "the field output twice"),
        (b'{"instruction":"a","output":"b","more":[{"x":"\\":","y":1,"y":2}]}', "the field y twice"),
        (GOOD | {"output": 3}, "1 row with no text in the field output"),
        (GOOD | {"instruction": None}, "1 row with no text in the field instruction"),
        (GOOD | {"input": ["a"]}, "1 row with no text in the field input"),
        (GOOD | {"output": " \n"}, "train.jsonl:2: warning: datasets.0.path: 1 row with an empty output"),
        (GOOD | {"input": "a\n### Response:\nb"}, "1 row with ### Response:, which the prompt uses itself"),
        (GOOD | {"input": "<s>old</s>"}, "the text <s>, which the tokenizer reads as its special token"),
        (GOOD | {"input": "a\x00b"}, "the control character U+0000"),
        (GOOD | {"input": "a\x1b[0m"}, "the control character U+001B"),
        (GOOD | {"input": "caf\ufffd"}, "the control character U+FFFD"),
        (GOOD, "1 row seen before (train.jsonl:1) [repeated-row:datasets.0.path]"),
        ({"instruction": "a", "outptu": "b"}, "1 row with nothing in the field output, but with outptu"),
        (
            {"instruction": "a", "inptu": "b", "output": "c"},
            "warning: datasets.0.path: 1 row with the field inptu, which is not read; did you mean input?",
        ),
    ],
)
def test_a_row_that_spoils_a_training_is_found_with_its_line(row: Any, says: str) -> None:
    (only,) = found([GOOD, row])
    assert says in only
    assert only.startswith("train.jsonl:2: ")


@pytest.mark.parametrize(
    ("lines", "dataset"),
    [
        ([GOOD, GOOD | {"input": None}, b"", GOOD | {"output": "Other.", "more": [1]}], {}),
        ([{"instruction": "a", "output": "b"}], {}),
        ([GOOD | {"input": "tab\tand\r\nline ends, \u00e9 and \u4e2d\u6587 \U0001f600"}], {}),
        ([GOOD | {"input": "### Response:"}], {"type": "alpaca:chat"}),
        ([{"question": "a", "answer": "b"}], {"type": "alpaca_chat.load_qa"}),
        ([{"code": "a"}], {"type": "completion", "field": "code"}),
        ([{"patch": "a", "msg": "b"}], {"type": {"field_instruction": "patch", "field_output": "msg"}}),
        ([GOOD | {"inputs": "a"}, {"instruction": "a", "output": "b", "id": 1, "language": "c"}], {}),
        ([{"q": "a", "output": "b", "input": "### Question:"}], {"type": {"field_instruction": "q"} | FORMATS}),
        ([{"input_ids": [1], "attention_mask": [1], "labels": [1]}], {"type": None}),
        ([GOOD, b"{"], {"split": "train[:1]"}),  # what is not trained on is not judged
    ],
)
def test_rows_that_are_right_give_no_finding(lines: list[Any], dataset: dict[str, Any]) -> None:
    assert found(lines, dataset) == []


def test_rows_of_a_prompt_of_ones_own_are_checked_like_others() -> None:
    row = {"instruction": "a", "output": "b"}
    (own_marker,) = found([row, row | {"input": "### Answer: c"}], {"type": FORMATS})
    assert "train.jsonl:2: warning: datasets.0.path: 1 row with ### Answer:, which the prompt uses" in own_marker
    (misspelt,) = found([row | {"sytem": "c"}], {"type": FORMATS})
    assert "the field sytem, which is not read; did you mean system?" in misspelt
    (without,) = found([row | {"input": "c"}, row], {"type": FORMATS | {"no_input_format": None}})
    assert "train.jsonl:2: error: datasets.0.path: 1 row without input: no_input_format is not set" in without


def test_rows_that_differ_in_the_order_of_their_keys_are_the_same() -> None:
    row = {"input_ids": [1], "attention_mask": [1], "labels": [1]}
    (only,) = found([row, dict(reversed(row.items()))], {"type": None})
    assert "train.jsonl:2: warning: datasets.0.path: 1 row seen before" in only


def test_rows_with_the_same_mistake_are_one_finding() -> None:
    bad = [{"instruction": str(i)} for i in range(5)]
    (only,) = found([GOOD, *bad])
    assert "train.jsonl:2: error: datasets.0.path: 5 rows with nothing in the field output" in only


def test_rows_of_which_none_has_a_field_are_said_to_have_others() -> None:
    question, answer = found([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    assert (
        "2 rows with nothing in the field instruction (fields: question, answer); name their fields in the" in question
    )
    assert "2 rows with nothing in the field output (fields: question, answer); name their fields in the" in answer
    assert "correct or drop them" in found([GOOD, {"question": "a", "answer": "b"}])[0]


def test_special_tokens_are_the_models() -> None:
    row = GOOD | {"input": "<|eot_id|> </s>"}
    assert "the text </s>" in found([row])[0]
    assert "the text <|eot_id|>" in found([row], model=LLAMA_3)[0]


def test_a_byte_order_mark_is_named() -> None:
    (only,) = found([b"\xef\xbb\xbf" + json.dumps(GOOD).encode()])
    assert "train.jsonl:1: warning: datasets.0.path: a byte order mark before 1 row" in only


def test_evaluation_rows_that_were_trained_on_are_found() -> None:
    train, test = Path("train.jsonl"), Path("test.jsonl")
    other = GOOD | {"output": "Another."}
    train.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, other)))
    spaced = GOOD | {"output": "Why  b?\n"}
    test.write_text("".join(json.dumps(row) + "\n" for row in (other, spaced, GOOD | {"output": "New."})))
    data = {
        "datasets": [{"path": str(train), "type": "alpaca"}],
        "test_datasets": [{"path": str(test), "type": "alpaca"}],
    }
    findings, read = rows.check(data)
    exact, folded = map(str, findings)
    assert "test.jsonl:1: warning: test_datasets.0.path: 1 row that the training data has too: " in exact
    assert "train.jsonl:2" in exact
    assert "test.jsonl:2: " in folded
    assert "but for white space" in folded
    assert [(one["rows"], one["bytes"]) for one in read] == [(2, train.stat().st_size), (3, test.stat().st_size)]


def test_what_is_not_checked_is_said() -> None:
    assert "orcamini reads are not known here" in found([GOOD], {"type": "orcamini"})[0]
    Path("x.parquet").touch()
    assert "is not a JSONL file" in found([GOOD], {"path": "x.parquet"})[0]


def test_the_shipped_sample_has_none(sample: Path) -> None:
    findings, read = rows.check(
        {
            "base_model": LLAMA_3,
            "datasets": [{"path": str(sample / "train.jsonl"), "type": "alpaca"}],
            "test_datasets": [{"path": str(sample / "test.jsonl"), "type": "alpaca"}],
        }
    )
    assert (findings, [one["rows"] for one in read]) == ([], [109, 26])


def test_a_folder_is_read_file_by_file(place: Path) -> None:
    (place / "rows").mkdir()
    for i in range(2):
        (place / "rows" / f"{i}.jsonl").write_text(json.dumps(GOOD | {"output": str(i)}) + "\n")
    (place / "rows" / "manifest.json").write_text("{}")
    findings, (read,) = rows.check({"datasets": [{"path": "rows", "type": "alpaca"}]})
    assert (read["files"], read["rows"]) == (["rows/0.jsonl", "rows/1.jsonl"], 2)
    assert ["manifest.json is not a JSONL file" in str(finding) for finding in findings] == [True]


@pytest.mark.parametrize("kind", sorted(rows.FIELDS))
def test_fields_are_those_that_axolotl_reads(kind: str, tiny: Path) -> None:
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    from qlora_recipes.checks.tokens import tokenize

    fields = rows.FIELDS[kind]
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


@pytest.mark.parametrize("kind", ["alpaca", "alpaca:chat", "alpaca:chatml", "alpaca:phi", "alpaca_chat", "gpteacher"])
def test_markers_are_those_of_the_prompt(kind: str, tiny: Path) -> None:
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    from qlora_recipes.checks.tokens import tokenize

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = GOOD | {"response": "x"}
    cfg = DictDefault(sequence_len=512, train_on_inputs=False)
    (only,) = tokenize(kind, cfg, DictDefault(path="x", type=kind), tokenizer, [row], 512)
    markers = rows.markers_of({"type": kind})
    assert markers
    assert all(marker in tokenizer.decode(only.ids) for marker in markers)


def test_a_large_file_is_read_as_a_stream(place: Path) -> None:
    """100,000 rows of 2 KB, in a process of its own, whose memory is measured. `make benchmark` has the speed."""
    code = """
import json, re
from qlora_recipes.checks import rows
with open("train.jsonl", "w") as file:
    for i in range(100_000):
        row = {"instruction": "Review it.", "input": f"line {i}\\n" * 150, "output": f"Why {i}?"}
        file.write(json.dumps(row) + "\\n")
findings, files = rows.check({"datasets": [{"path": "train.jsonl", "type": "alpaca"}]})
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(len(findings), files[0]["rows"], files[0]["bytes"], int(peak) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True)
    findings, read, size, mebibytes = map(int, done.stdout.split())
    assert (findings, read) == (0, 100_000)
    assert size > 150_000_000
    assert mebibytes < 300
