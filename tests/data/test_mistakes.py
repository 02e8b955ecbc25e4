"""Mistakes in study.yaml and in raw rows: each is refused with its file, line and key."""

import re
import time
import tracemalloc
from typing import Any

import pytest
from declared import sums

from qlora_recipes.base.errors import UserError
from qlora_recipes.data import prepare
from qlora_recipes.data.raw_rows import Expression

URL = "https://example.org/x"
RECIPE = "haider2024/llama-3.2-3b"  # a name with a dot
TRAIN, TEST, VALID = "data > splits > train", "data > splits > test", "data > splits > valid"
SOURCE = "data > sources > train.jsonl"
FORMAT, SUBSET, RESULTS = "data > input_formats > a", f"{TEST} > subsets > a", f"published > {RECIPE}"
ONE = {"title": "a", "rows": 1, "seed": 0}
ORDER = f"{TRAIN} > order"
INPUT, MORE, ZIP = "data > fields > input", "data > sources > more", "data > sources > a.zip"

IN_STUDY_YAML: list[tuple[str, dict[str, Any], str]] = [  # the mistake; the values that make it; the key that is named
    ("unknown key", {"titel": "x"}, "titel"),
    ("source with url and hub", {f"{SOURCE} > hub": "a/b"}, SOURCE),
    ("hub without revision", {MORE: {"hub": "a/b"}}, MORE),
    ("two sources of a file", {ZIP: {"url": URL, "files": {"test.csv": {}}}}, "data > sources"),
    ("file outside the folder", {"data > sources > ../x.jsonl": {"url": URL}}, "data > sources > ../x.jsonl"),
    ("format in the raw folder", {f"{FORMAT} > folder": "data/sums-raw"}, f"{FORMAT} > folder"),
    *(
        (f"format in {folder!r}", {f"{FORMAT} > folder": folder}, f"{FORMAT} > folder")
        for folder in (
            "../victim",
            "/victim",
            "victim",
            "data",
            "data/",
            "data/../v",
            "data/./v",
            "data/a\nb",
            "data//v",
        )
    ),
    *((f"curve at {file}", {f"{RESULTS} > curve": file}, f"{RESULTS} > curve") for file in ("../c.csv", "/etc/passwd")),
    ("unknown field", {FORMAT: {"folder": "data/a", "fields": {"inptu": "sum"}}}, f"{FORMAT} > fields > inptu"),
    ("extra field of a used name", {"data > extra_fields > output": "answer"}, "data > fields > output"),
    ("misspelt raw file", {f"{TRAIN} > from": "trains.jsonl"}, f"{TRAIN} > from"),
    ("sample_from without sample", {f"{VALID} > sample": None, f"{VALID} > seed": None}, VALID),
    ("filters of a sampled split", {f"{VALID} > filters": {"a": "b"}}, VALID),
    ("subset of train", {f"{TRAIN} > subsets > a": ONE}, f"{TRAIN} > subsets"),
    ("subset without seed", {SUBSET: {"title": "a", "rows": 1}}, SUBSET),
    ("no positions", {SUBSET: {"title": "a", "rows": 1, "positions": "none.json"}}, f"{SUBSET} > positions"),
    ("subset called valid", {f"{TEST} > subsets > valid": ONE}, f"{TEST} > subsets > valid"),
    ("missing sample", {"data > sample": "few"}, "data > sample"),
    ("unknown metric", {"metrics > blue": {}}, "metrics > blue"),
    ("two metrics with one label", {"metrics > other": {"metric": "bleu4"}}, "metrics > other"),
    ("misspelt parameter", {"metrics > number": {"marker": ["x"]}}, "metrics > number > marker"),
    ("mean of an unknown metric", {"metrics > all": {"metric": "mean_of_groups", "of": "x"}}, "metrics > all > of"),
    ("two files, one misspelt", {f"{TRAIN} > from": ["train.jsonl", "trains.jsonl"]}, f"{TRAIN} > from"),
    ("score of an unknown metric", {f"{RESULTS} > scores > bleu": 5}, f"{RESULTS} > scores > bleu"),
    ("missing curve", {f"{RESULTS} > curve": "c.csv"}, f"{RESULTS} > curve"),
    ("a single repeat", {f"{RESULTS} > repeats > bleu4": [5.0]}, f"{RESULTS} > repeats > bleu4"),
    ("no references", {f"{RESULTS} > predictions > prediction > file": "test.csv"}, f"{RESULTS} > predictions"),
    ("adapter without files", {f"{RESULTS} > adapter": "mine"}, f"{RESULTS} > adapter"),
    ("variant of no recipe", {"variants > a/b": {"of": "lama-2-7b", "reproduces": True}}, "variants > a/b > of"),
    ("tolerance of an unknown metric", {"tolerances > bleu": 0.1}, "tolerances > bleu"),
    ("unknown test set", {"baselines": [{"name": "a", "scores": {}, "test_set": "x"}]}, "baselines > 0 > test_set"),
    ("expression that ends early", {INPUT: "question ~"}, INPUT),
    ("unknown filter", {INPUT: "question | tagd"}, INPUT),
    ("wrong order", {ORDER: {"buckets": 3, "longest_first": "question |"}}, f"{ORDER} > longest_first"),
]


@pytest.mark.parametrize(
    ("changes", "key"), [case[1:] for case in IN_STUDY_YAML], ids=[case[0] for case in IN_STUDY_YAML]
)
def test_a_mistake_in_study_yaml_is_refused_with_its_line(tmp_path, changes, key):
    with pytest.raises(UserError) as refused:
        prepare.check_expressions(sums(tmp_path, changes))
    place, named, _ = str(refused.value).splitlines()[0].split(": ", 2)
    file, line = place.rsplit(":", 1)
    assert file == str(tmp_path / "study.yaml")
    assert named.startswith(key.replace(" > ", "."))
    keys = key.split(" > ")
    missing = next((path.split(" > ")[-1] for path, value in changes.items() if value is None), None)
    there = (tmp_path / "study.yaml").read_text().splitlines()[int(line) - 1]
    parent = keys[-2] if keys[1:] else "paper"  # the first line, or the place of a key that is missing
    assert (f"{parent}:" if keys[-1] == missing else "- rouge" if keys[-1] == "0" else f"{keys[-1]}:") in there


QUESTION = b'{"question": "a", "answer": "b"}\n'
IN_ROWS: list[tuple[str, str, str, bytes, str]] = [  # mistake, expression of input, raw file, its content, its place
    ("cut line", "question", "a.jsonl", QUESTION + b'{"question": "a', "a.jsonl:2"),
    ("missing field", "question", "a.jsonl", QUESTION + b'{"question": "a"}', "a.jsonl:2"),
    ("misspelt field", "qestion | trim", "a.jsonl", QUESTION, "a.jsonl:1"),
    ("number for a text", "question", "a.jsonl", b'{"question": 3, "answer": "b"}', "a.jsonl:1"),
    ("expression that fails", "question + 1", "a.jsonl", QUESTION, "a.jsonl:1"),
    ("row of CSV with too few fields", "question", "a.csv", b"question,answer\n1,2\n3\n", "a.csv:3"),
    ("quote in CSV without end", "question", "a.csv", b'question,answer\n1,"2\n', "a.csv:2"),
    ("not UTF-8 in CSV", "question", "a.csv", b"question,answer\n1,\xff\n", "a.csv:2"),
    ("array cut", "question", "a.json", b"[\n1", "a.json:2"),
    ("missing field in an array", "question", "a.json", b"[" + QUESTION + b',{"question": "a"}]', "a.json: row 2"),
    ("empty file", "question", "a.jsonl", b"", "a.jsonl"),
    ("no row left", "question", "a.csv", b"question,answer\n1,\n", "a.csv"),
    ("text to sort by", "question", "a.jsonl", QUESTION + b'{"question": "a", "answer": "b", "at": "c"}', "a.jsonl:2"),
]


@pytest.mark.parametrize(
    ("expression", "name", "content", "place"), [case[1:] for case in IN_ROWS], ids=[case[0] for case in IN_ROWS]
)
def test_a_mistake_in_rows_is_refused_with_its_place(tmp_path, expression, name, content, place):
    sources, order = {name: {"url": URL}, "train.jsonl": None}, {"buckets": 2, "longest_first": "at | default(1)"}
    changes = {"data > sources": sources, f"{TRAIN} > from": name, VALID: None, INPUT: expression, ORDER: order}
    of_study = sums(tmp_path, changes)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        prepare.prepare([tmp_path / name], tmp_path / "out", of_study, "default")
    assert str(refused.value).startswith(f"{tmp_path / place}: ")
    assert not list(tmp_path.glob("out/[!.]*"))


@pytest.mark.parametrize(
    "changes", [{"titel": 1, "tags": 3, f"{TEST} > sed": 1}, {"data > test_set": "tset", "shown": ["x"]}]
)
def test_many_mistakes_are_listed_in_the_order_of_their_lines(tmp_path, changes):
    with pytest.raises(UserError) as refused:
        sums(tmp_path, changes)
    lines = [int(line) for line in re.findall(r"(?m)^.*study\.yaml:(\d+): ", str(refused.value))]
    assert len(lines) == len(changes) and lines == sorted(lines)


@pytest.mark.parametrize(
    "expression",
    [
        "'a' * 10**9 * 4",
        "10**9 * 'a'",
        "[question] * 10**9",
        "10**10**9",
        "(10**300) * (10**300)",
        "'%1000000000d' % 1",
        "'a'.ljust(10**9)",
        "'a'.center(10**9)",
        "'{:1000000000}'.format(1)",
        "question | center(10**9)",
        "question | replace('', 'a' * 1000000) | replace('', 'a' * 1000000)",
        "('a' * 1000000).replace('a', 'b' * 1000)",
        "('a' * 1000000) | join('a' * 1000)",
        "('a' * 1000).join('a' * 10000)",
        "(['a'] * 1000) | map('replace', 'a', 'b' * 1000000) | join",
        "'a' | list | batch(10**9, 'a') | list",
        "'a' | slice(10**9) | list",
        "1.5 | round(10**9, 'ceil')",
        "('a' * 1000000) ~ ('a' * 1000000)",
        "(1).to_bytes(10**9, 'big')",
        "'x'.encode().ljust(10**9)",
        "''.__class__.__mro__",
        "'a' ~ " * 1000 + "'a'",
        "(" * 900 + "question" + ")" * 900,
        "[" * 900 + "question" + "]" * 900,
        "- " * 900 + "1",
    ],
    ids=lambda text: text[:40],
)
def test_an_expression_that_would_grow_is_refused_before_it_does(tmp_path, expression):
    begun = time.process_time()
    of_study = sums(tmp_path, {INPUT: expression, VALID: None})
    (tmp_path / "train.jsonl").write_bytes(QUESTION)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"(study\.yaml|train\.jsonl):\d+: "):
            prepare.prepare([tmp_path / "train.jsonl"], tmp_path / "out", of_study, "default")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 3


def test_ordinary_expressions_give_what_jinja_gives():
    row = {"question": " A b ", "options": ["x", "y"], "n": 3}
    expressions = {
        "question.strip().split(' ')[-1]": "b",
        "[{'a': 'x'}, {'a': 'y'}] | map(attribute='a') | join(', ')": "x, y",
        "question | trim | replace('A', 'long text') ~ '!' * n": "long text b!!!",
        "question | replace(' ', '')": "Ab",
        "(n * 2 ** 3) % 5": 4,
        "n * options": ["x", "y"] * 3,
        "options | selectattr('z', 'undefined') | list | length": 2,
    }
    assert {text: Expression("x", text).value(row) for text in expressions} == expressions


def test_each_field_is_bounded_by_its_row(tmp_path):
    """Each field could be a thousand times the one before it."""
    fields = {"input": "question * 1000", "output": "answer", **{f"f{i}": "input ~ input" for i in range(3)}}
    of_study = sums(tmp_path, {"data > fields": fields | {"f0": "[input] * 990", "f1": "[f0] * 990"}, VALID: None})
    (tmp_path / "train.jsonl").write_bytes(QUESTION)
    with pytest.raises(UserError, match=r"train\.jsonl:1: f1 .*larger than"):
        prepare.prepare([tmp_path / "train.jsonl"], tmp_path / "out", of_study, "default")
