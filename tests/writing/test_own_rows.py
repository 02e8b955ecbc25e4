"""`recipe new --data`: forms of rows, columns of other names, and chats made from questions and answers."""

import codecs
import csv
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import recipe_config

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_rows, write_rows
from qlora_recipes.config import datafiles
from qlora_recipes.data import raw_rows
from qlora_recipes.writing import own_rows
from qlora_recipes.writing.own_rows import RowsRequest

PAIR = {"question": "Was ist 2 + 3?", "answer": "5"}
CHAT = {"messages": [{"role": "user", "content": "Was ist 2 + 3?"}, {"role": "assistant", "content": "5"}]}
PROMPTED = {
    "field_instruction": "question",
    "field_output": "answer",
    "no_input_format": "Question: {instruction}\nAnswer: ",
}
BASE_MODEL, INSTRUCT_MODEL, UNKNOWN_MODEL = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B-Instruct", "a/model"
COLUMNS = "--fields", "question=Frage,answer=Antwort"

ASKED, REPLIED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PREFERENCES = [  # rows of public data sets, and the entry that reads them
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"type": "chat_template", "field_messages": "prompt"}),
    (
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
        {"type": "chat_template", "field_messages": "question"},
    ),
    (
        {"messages": [ASKED], "chosen": REPLIED, "rejected": REPLIED},
        {"type": "chat_template", "field_messages": "messages"},
    ),
    (
        {"prompt": [ASKED], "chosen": [REPLIED], "rejected": [REPLIED]},
        {"type": "chat_template", "field_messages": "prompt"},
    ),
    (
        {"prompt": "a", "chosen": [ASKED, REPLIED], "rejected": [ASKED, REPLIED]},
        {"type": "chat_template.argilla_chat"},
    ),
    (
        {"chosen": SAID, "rejected": SAID},
        {
            "type": "chat_template.argilla_chat",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"system": ["system"], "user": ["human", "user"], "assistant": ["gpt", "assistant"]},
        },
    ),
]


def entry_of(file: Path) -> dict[str, Any]:
    """Data set entry of the variant beside a file of rows."""
    (entry,) = yamlfiles.read_yaml(file.parent / "variants" / "mine.yaml")["datasets"]
    return entry


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        ({"messages": []}, {"type": "chat_template"}),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}]},
            {"type": "chat_template", "field_messages": "conversations"},
        ),
        ({"messages": [{"role": "user"}], "conversations": [{"from": "human"}]}, {"type": "chat_template"}),
        ({"instruction": "a", "output": "b", "text": "c"}, {"type": "alpaca"}),
        ({"segments": []}, {"type": "input_output"}),
        ({"question": "a", "answer": "b"}, {"type": PROMPTED}),
        ({"text": "a"}, {"type": "completion"}),
        *PREFERENCES,
    ],
)
def test_the_fields_of_rows_decide_their_type(tmp_path, row, entry):
    file = tmp_path / "rows.jsonl"
    for before in (b"\n", codecs.BOM_UTF8):
        file.write_bytes(before + orjson.dumps(row))
        rows = own_rows.recognize(RowsRequest(file, {}, None), tmp_path / "copy.jsonl")
        assert rows.entry == entry
        assert rows.path == file
        assert read_rows(file) == [row]


@pytest.fixture
def questions(place: Path) -> Path:
    """A file of questions and answers."""
    file = place / "rows.jsonl"
    write_rows(file, [PAIR] * 30)
    return file


@pytest.mark.parametrize(
    ("model", "options", "explanation"),
    [
        pytest.param(
            INSTRUCT_MODEL,
            [],
            f"because {INSTRUCT_MODEL} is an instruct model; --type plain omits its template",
            id="instruct-model",
        ),
        pytest.param(
            UNKNOWN_MODEL,
            [],
            f"because {UNKNOWN_MODEL} may be an instruct model; for a base model, --type plain",
            id="unknown-model",
        ),
        pytest.param(BASE_MODEL, ["--type", "chat"], "as --type says", id="chat-on-request"),
    ],
)
def test_questions_become_chats_with_the_models_template(recipe, questions, model, options, explanation):
    base = [] if model == INSTRUCT_MODEL else ["--model", model]  # the model of start/qlora
    done = recipe.ok("new", "mine", "--data", "rows.jsonl", *base, *options)
    copy = questions.parent / "variants" / "mine.jsonl"
    assert done.stderr.splitlines()[:2] == [
        "rows: 30 of rows.jsonl, copied to variants/mine.jsonl",
        f"prompts: type: chat_template, {explanation}",
    ]
    assert entry_of(questions) == {"path": "variants/mine.jsonl", "type": "chat_template"}
    assert yamlfiles.read_yaml(copy.with_suffix(".yaml"))["chat_template"] == "tokenizer_default"
    assert read_rows(copy) == [CHAT] * 30


@pytest.mark.parametrize(
    ("model", "options", "explanation"),
    [
        pytest.param(BASE_MODEL, [], f"because {BASE_MODEL} is a base model; --type chat makes chats", id="base-model"),
        pytest.param(INSTRUCT_MODEL, ["--type", "plain"], "as --type says", id="plain-on-request"),
    ],
)
def test_questions_stay_as_they_are_for_a_base_model(recipe, questions, model, options, explanation):
    base = [] if model == INSTRUCT_MODEL else ["--model", model]
    done = recipe.ok("new", "mine", "--data", "rows.jsonl", *base, *options)
    assert done.stderr.splitlines()[0].endswith(f", {explanation}")
    assert entry_of(questions) == {"path": "rows.jsonl", "type": PROMPTED}
    variant = questions.parent / "variants" / "mine.yaml"
    assert "chat_template" not in yamlfiles.read_yaml(variant)
    assert variant.read_text().count("data/gsm8k") == 1  # as the former value only
    assert not variant.with_suffix(".jsonl").exists()


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        pytest.param(
            {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be brief."},
            {
                "system": "Be brief.",
                "messages": [{"role": "user", "content": "Add.\n2 and 3"}, {"role": "assistant", "content": "5"}],
            },
            id="alpaca",
        ),
        pytest.param(
            {"prompt": "2 + 3?", "completion": 5, "topic": "sums", "id": 7},
            {
                "topic": "sums",
                "messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}],
            },
            id="number-and-other-columns",
        ),
        pytest.param(
            {"Prompt": "2 + 3?", " Response ": "5.5\n"},
            {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5.5\n"}]},
            id="other-case",
        ),
    ],
)
def test_a_pair_and_its_chat(recipe, place, row, chat):
    write_rows(place / "rows.jsonl", [row] * 9)
    recipe.ok("new", "mine", "--data", "rows.jsonl")
    assert read_rows(place / "variants" / "mine.jsonl") == [chat] * 9


GERMAN = [("Was ist 2 + 3?", "5"), ('Sag „ja“, "nein"; oder\nnichts.', "ja;\tnein")]


def write_table(file: Path, delimiter: str) -> None:
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        rows = [("Frage", "Antwort, kurz", "Thema"), *((*pair, "") for pair in GERMAN)]
        csv.writer(stream, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", "~"])
def test_columns_with_any_delimiter(recipe, place, delimiter):
    write_table(place / "rows.tsv", delimiter)
    recipe.ok("new", "mine", "--data", "rows.tsv", "--fields", "question=Frage,answer=Antwort, kurz")
    chats = [row["messages"] for row in read_rows(place / "variants" / "mine.jsonl")]
    assert [(question["content"], answer["content"]) for question, answer in chats] == GERMAN


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "lines.json"])
def test_parquet_and_json(recipe, place, name):
    import pyarrow
    from pyarrow import parquet

    rows = [{"Frage": "2 + 3?", "Antwort": "5"}] * 9
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / "rows.parquet")
    (place / "rows.json").write_bytes(b" \n" + orjson.dumps(rows))
    write_rows(place / "lines.json", rows)
    recipe.ok("new", "mine", "--data", name, *COLUMNS, "--model", BASE_MODEL)
    assert read_rows(place / "variants" / "mine.jsonl") == [{"question": "2 + 3?", "answer": "5"}] * 9


@pytest.mark.parametrize("dictionary", [True, False])  # rows repeat the text, or it is compressed
def test_a_parquet_file_that_would_expand_to_gigabytes_is_refused(recipe, place, monkeypatch, dictionary):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(raw_rows, "MOST_EXPANDED", 1 << 20)
    table = pyarrow.table({"question": ["ab" * 5_000] * 600, "answer": ["x"] * 600})
    parquet.write_table(table, place / "rows.parquet", use_dictionary=dictionary, compression="zstd")
    done = recipe("new", "mine", "--data", "rows.parquet")
    assert done.returncode == 2
    assert done.stderr == (
        "recipe: rows.parquet: not a usable Parquet file: it expands to more than a thousand times its size; save it "
        "as JSON lines\n"
    )
    data = {"path": "rows.parquet", "type": {"field_instruction": "question", "field_output": "answer"}}
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(recipe_config("start/qlora") | {"datasets": [data]}))
    checked = recipe("check", "mine.yaml", "--all-rows", "--rehearse")
    assert checked.returncode == 2
    assert "it expands to more than a thousand times its size" in checked.stderr + checked.stdout
    assert not (place / "variants").exists() or not [*(place / "variants").iterdir()]


def test_a_column_with_the_name_of_a_field_does_not_replace_it(recipe, place):
    write_rows(place / "rows.jsonl", [{"Frage": "2 + 3?", "question": "a title", "Antwort": "5"}] * 9)
    recipe.ok("new", "mine", "--data", "rows.jsonl", *COLUMNS, "--type", "plain")
    assert read_rows(place / "variants" / "mine.jsonl") == [{"question": "2 + 3?", "answer": "5"}] * 9


def test_rows_without_an_answer_are_left_out_and_counted(recipe, place):
    (place / "rows.csv").write_text('question;answer\n"a\nb";c\n;\nd;\n' + "e;f\n" * 9)
    done = recipe.ok("new", "mine", "--data", "rows.csv")
    assert done.stderr.splitlines()[:2] == [
        "rows: 10 of rows.csv, copied to variants/mine.jsonl",
        "left out: 2 without question or answer, the first at rows.csv:4",
    ]
    assert datafiles.count_rows(place / "variants" / "mine.jsonl") == 10


UNKNOWN_COLUMNS = (
    "rows.csv: unknown columns Frage, Antwort; known are messages and chosen and rejected; prompt and chosen and "
    "rejected; question and chosen and rejected; chosen and rejected; messages; conversations; segments; "
    "instruction and output; question and answer; prompt and completion; prompt and response; text; map columns to "
    "these, as in `--fields question=Frage,answer=Antwort`"
)
PAIRS = b"question,answer\na,b\n"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        pytest.param("rows.csv", b"Frage,Antwort\na,b\n", [], UNKNOWN_COLUMNS, id="unknown-columns"),
        pytest.param(
            "rows.csv",
            b"Frage,Antwort\na,b\n",
            ["--fields", "Frage=question"],
            "--fields Frage=question: the columns of rows.csv are Frage, Antwort",
            id="reversed-fields",
        ),
        pytest.param(
            "rows.csv",
            PAIRS,
            ["--fields", "question"],
            "--fields question: expected FIELD=COLUMN, as in question=Frage,answer=Antwort",
            id="malformed-fields",
        ),
        pytest.param(
            "rows.csv",
            PAIRS,
            ["--fields", "title=answer"],
            "--fields title=answer: no field of the rows; they have question and answer",
            id="unknown-field",
        ),
        pytest.param("rows.csv", b"question,answer\n", [], "rows.csv: no rows", id="no-rows"),
        pytest.param(
            "rows.csv", b"question,answer\na,\n,b\n", [], "rows.csv: no row has question and answer", id="no-pairs"
        ),
        pytest.param(
            "rows.xlsx",
            b"PK\3\4",
            [],
            "--data rows.xlsx: not one of .jsonl, .json, .csv, .tsv, .txt, .parquet; save it as CSV or JSON",
            id="spreadsheet",
        ),
        pytest.param(
            "rows.csv",
            b"Frage;Antwort\nja;sch\xf6n\n",
            COLUMNS,
            "rows.csv:2: not UTF-8; save it as UTF-8, or convert it, as in `iconv -f WINDOWS-1252 -t UTF-8 rows.csv > "
            "utf8.csv`",
            id="not-utf-8",
        ),
        pytest.param(
            "rows.csv",
            b'question,answer\na,b\n"c,d\n',
            [],
            "rows.csv:3: not CSV: unexpected end of data; 1 complete rows precede",
            id="open-quotation-mark",
        ),
        pytest.param(
            "rows.csv",
            b"question,answer\na,b,c\n",
            [],
            "rows.csv:2: the row does not have the 2 fields named in line 1",
            id="too-many-columns",
        ),
        pytest.param(
            "rows.json",
            b'[{"question": "a", "answer": ["b"]}]',
            [],
            "rows.json: row 1: answer is not a text",
            id="not-a-text",
        ),
        pytest.param("rows.json", b"[1]", [], "rows.json: not a JSON array of mappings", id="not-mappings"),
        pytest.param(
            "rows.jsonl",
            b'{"question": "a", "answer": "b"}\n{',
            [],
            "rows.jsonl:2: not JSON: unexpected end of data",
            id="half-a-row",
        ),
        pytest.param(
            "rows.jsonl",
            b'{"text": "a"}\n',
            ["--type", "chat"],
            "--type: only for questions and answers; the rows have text",
            id="type-of-texts",
        ),
        pytest.param(
            "rows.jsonl",
            b'{"text": "a"}\n{"text": 5}\n',
            [],
            "rows.jsonl:2: error: datasets.0.path: 1 row: the field text is not text; correct or drop these rows "
            "[bad-row:datasets.0.path]",
            id="text-that-is-none",
        ),
    ],
)
def test_refused_rows_leave_nothing(recipe, place, name, content, options, message):
    (place / name).write_bytes(content)
    assert recipe.fails("new", "mine", "--data", name, *options).stderr == f"recipe: {message}\n"
    assert [file for file in place.rglob("*") if file.is_file()] == [place / name]
    (place / name).unlink()
    write_rows(place / "rows.jsonl", [PAIR] * 9)
    recipe.ok("new", "mine", "--data", "rows.jsonl")


def test_rows_of_an_earlier_variant_are_kept(recipe, questions):
    copy = questions.parent / "variants" / "mine.jsonl"
    write_rows(copy, [CHAT])
    expected = "recipe: variants/mine.jsonl: has the rows of an earlier variant; choose another name, or delete this "
    assert recipe.fails("new", "mine", "--data", "rows.jsonl").stderr == f"{expected}file\n"
    assert read_rows(copy) == [CHAT]


@pytest.mark.parametrize("option", ["--fields", "--type"])
def test_options_for_rows_need_rows(recipe, option):
    value = {"--fields": "question=Frage", "--type": "chat"}[option]
    assert recipe.fails("new", "mine", option, value).stderr == f"recipe: {option}: works only with --data\n"


@pytest.mark.parametrize(("count", "held_out"), [(199, own_rows.HELD_OUT_OF_FEW), (200, own_rows.HELD_OUT)])
def test_own_rows_replace_the_rows_to_evaluate_on(recipe, place, count, held_out):
    write_rows(place / "rows.jsonl", [PAIR] * count)
    recipe.ok("new", "mine", "--from", "peft-metamathqa/lora-rank32", "--data", "rows.jsonl")
    config = yamlfiles.read_yaml(place / "variants" / "mine.yaml")
    assert config["val_set_size"] == held_out
    assert "test_datasets" not in config


def test_held_out_rows_are_explained(recipe, questions):
    options = "--from", "haider2024/llama-3-8b", "--data", "rows.jsonl", "--set", "warmup_steps=0"
    assert recipe.ok("new", "mine", *options).stderr.splitlines()[1] == (
        "held out: val_set_size 0.2, for the eval loss and `recipe evaluate`; --set val_set_size=20 holds out 20 rows"
    )


def test_a_type_of_rows_that_is_set_is_not_explained(recipe, place):
    write_rows(place / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 30)
    done = recipe.ok("new", "mine", "--data", "rows.jsonl", "--set", "datasets.0.type=alpaca")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["held out", "next"]
    assert (place / "variants" / "mine.yaml").read_text().count("data/gsm8k") == 1  # as the former value only


def test_a_type_of_chats_can_be_set(recipe, place):
    write_rows(place / "rows.jsonl", [CHAT] * 9)
    recipe.ok("new", "mine", "--data", "rows.jsonl", "--set", "datasets.0.type=chat_template.default")
    assert entry_of(place / "rows.jsonl") == {"path": "rows.jsonl", "type": "chat_template.default"}


def test_another_setting_of_the_rows_leaves_the_prompts_to_the_model(recipe, questions):
    recipe.ok("new", "mine", "--data", "rows.jsonl", "--set", "datasets.0.split=train[:20]")
    assert entry_of(questions) == {"path": "variants/mine.jsonl", "type": "chat_template", "split": "train[:20]"}


def test_no_rows_are_held_out_beside_the_users_test_rows(recipe, questions):
    tests = "test_datasets=[{path: tests.jsonl, type: alpaca, split: train}]"
    write_rows(questions.parent / "tests.jsonl", [{"instruction": "a", "output": "b"}] * 9)
    done = recipe.ok("new", "mine", "--data", "rows.jsonl", "--set", tests)
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["rows", "prompts", "next"]
    assert "val_set_size" not in yamlfiles.read_yaml(questions.parent / "variants" / "mine.yaml")


@pytest.mark.parametrize(
    ("rows", "unread"),
    [
        ([{"question": "a", "answer": "b", "context": "c"}], "context"),
        ([{"prompt": "a", "completion": "b", "response": "c"}], "response"),
        ([{"text": "a", "label": "b"}], "label"),
        ([{"text": "a"}, {"text": "a", "title": "b", "length": 3, "id": "4"}], "id, length, title"),
        ([{"messages": [{"role": "user", "content": "a"}], "source": "b", "tools": []}], "source"),
        ([{"text": "a", "label": 3}], "label"),
        ([{"question": "a", "answer": "b", "level": 3, "tags": ["c"], "context": "d"}], "context, level, tags"),
        ([{"instruction": "a", "input": "b", "output": "c"}], None),
    ],
)
def test_fields_that_are_not_used_are_named(recipe, tmp_path, rows, unread):
    write_rows(tmp_path / "rows.jsonl", rows * 9)
    done = recipe.ok("new", "mine", "--data", "rows.jsonl")
    lines = [line for line in done.stderr.splitlines() if line.startswith("not used: ")]
    assert [line.partition(";")[0] for line in lines] == [f"not used: {unread}"] * bool(unread)


def test_a_field_that_is_set_is_used(recipe, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b", "context": "c"}] * 9)
    kind = "{field_instruction: question, field_input: context, field_output: answer}"
    done = recipe.ok("new", "mine", "--data", "rows.jsonl", "--set", f"datasets.0.type={kind}")
    assert "not used" not in done.stderr


def test_preference_pairs_begin_with_the_starting_point_for_dpo(recipe, place):
    pair = {"prompt": "Was ist 2 + 3?", "chosen": "5", "rejected": "6"}
    write_rows(place / "pairs.jsonl", [pair | {"prompt": f"Was ist {i} + 3?"} for i in range(60)])
    done = recipe.ok("new", "mine", "--data", "pairs.jsonl")
    assert done.stderr.splitlines()[:2] == [
        "prompts: type: chat_template, field_messages: prompt, because of their fields; --set changes it",
        "held out: val_set_size 0.2, for the eval loss and rewards; --set val_set_size=20 holds out 20 rows",
    ]
    variant = yamlfiles.read_yaml(place / "variants" / "mine.yaml")
    assert (variant["rl"], variant["chat_template"]) == ("dpo", "tokenizer_default")
    assert variant["datasets"] == [{"path": "pairs.jsonl", "type": "chat_template", "field_messages": "prompt"}]


@pytest.mark.parametrize(
    ("row", "base", "message"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "start/lora",
            "rows.jsonl: the rows have prompt and chosen and rejected, and rl is not set; leave --from out, or name a "
            "recipe for such rows",
        ),
        (
            CHAT,
            "start/dpo-qlora",
            "rows.jsonl: the rows have messages, and rl is dpo; leave --from out, or name a recipe for such rows",
        ),
    ],
)
def test_a_recipe_for_other_rows_is_refused(recipe, place, row, base, message):
    write_rows(place / "rows.jsonl", [row])
    done = recipe("new", "mine", "--from", base, "--data", "rows.jsonl")
    assert (done.returncode, done.stderr) == (2, f"recipe: {message}\n")
    assert not (place / "variants").exists()
