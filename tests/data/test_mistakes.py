"""Mistakes in study.yaml and in raw rows: each is refused with its file, line and key."""

import re
import time
import tracemalloc

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
INPUT, MORE = "data > fields > input", "data > sources > more"

_PART = r"[^/\\.\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*"
FILE, FOLDER = rf"^({_PART}/)*{_PART}$", rf"^data(/{_PART})+$"


def not_matching(pattern: str, value: str) -> str:
    return f"String should match pattern '{pattern}', not {value}"


UNREAD = {"source": "a", "learning_rates": "r.csv"}  # a log
# fmt: off
IN_STUDY_YAML = [
    pytest.param({"titel": "x"}, "titel", "unknown key; correct or delete it", id="unknown key"),
    pytest.param({f"{SOURCE} > hub": "a/b"}, "data.sources.train.jsonl",
        "give url or hub, not both; with neither, users copy the file to the raw folder", id="source with url and hub"),
    pytest.param({MORE: {"hub": "a/b"}}, "data.sources.more",
        "give a commit as revision, because branches change", id="hub without revision"),
    pytest.param({"data > sources > ../x.jsonl": {"url": URL}}, "data.sources.../x.jsonl",
        not_matching(FILE, "../x.jsonl"), id="file outside the folder"),
    pytest.param({FORMAT: {"folder": "data/a", "fields": {"inptu": "sum"}}}, "data.input_formats.a.fields.inptu",
        "inptu is unknown; did you mean input?", id="unknown field"),
    pytest.param({"data > extra_fields > output": "answer"}, "data.fields.output",
        "scored rows have another field of this name; rename one", id="extra field of a used name"),
    pytest.param({f"{TRAIN} > from": "trains.jsonl"}, "data.splits.train.from",
        "trains.jsonl is unknown; did you mean train.jsonl?", id="misspelt raw file"),
    pytest.param({"data > lookups": {"words": "trains.jsonl"}}, "data.lookups.words",
        "trains.jsonl is unknown; did you mean train.jsonl?", id="misspelt lookup"),
    pytest.param({f"{VALID} > sample": None, f"{VALID} > seed": None}, "data.splits.valid",
        "sample_from needs sample, the number of rows to sample", id="sample_from without sample"),
    pytest.param({f"{VALID} > filters": {"a": "b"}}, "data.splits.valid",
        "filters and sample_from exclude each other; delete one", id="filters of a sampled split"),
    pytest.param({f"{TRAIN} > subsets > a": ONE}, "data.splits.train.subsets",
        "only the split test can have subsets; delete them", id="subset of train"),
    pytest.param({SUBSET: {"title": "a", "rows": 1}}, "data.splits.test.subsets.a",
        "give either positions or seed", id="subset without seed"),
    pytest.param({SUBSET: {"title": "a", "rows": 1, "positions": "none.json"}}, "data.splits.test.subsets.a.positions",
        "no such file beside study.yaml: none.json; add it, with row numbers from 0", id="no positions"),
    pytest.param({f"{TEST} > subsets > valid": ONE}, "data.splits.test.subsets.valid",
        "a split has this name; choose another", id="subset called valid"),
    pytest.param({"data > sample": "few"}, "data.sample",
        "no few/train.jsonl or few/test.csv beside study.yaml; add a few rows, or delete the key", id="missing sample"),
    pytest.param({"metrics > blue": {}}, "metrics.blue",
        "no metric is called blue; did you mean bleu4?", id="unknown metric"),
    pytest.param({"metrics > other": {"metric": "bleu4"}}, "metrics.other",
        "expected a label other than that of bleu4", id="two metrics with one label"),
    pytest.param({"metrics > number": {"marker": ["x"]}}, "metrics.number.marker",
        "Extra inputs are not permitted, not [x]; number takes parser, markers", id="misspelt parameter"),
    pytest.param({"metrics > all": {"metric": "mean_of_groups", "of": "x"}}, "metrics.all.of",
        "x is unknown; known: bleu4, bertscore_f1, rouge_l, sacrebleu, all", id="mean of an unknown metric"),
    pytest.param({f"{TRAIN} > from": ["train.jsonl", "trains.jsonl"]}, "data.splits.train.from",
        "trains.jsonl is unknown; did you mean train.jsonl?", id="two files, one misspelt"),
    pytest.param({f"{RESULTS} > scores > bleu": 5}, "published.haider2024/llama-3.2-3b.scores.bleu",
        "bleu is unknown; did you mean bleu4 or sacrebleu?", id="score of an unknown metric"),
    pytest.param({f"{RESULTS} > curve": "c.csv"}, "published.haider2024/llama-3.2-3b.curve",
        "no such file beside study.yaml: c.csv; add it", id="missing curve"),
    pytest.param({f"{RESULTS} > log": {"steps": 3}}, f"published.{RECIPE}.log.source",
        "missing; add this key", id="log without a source"),
    pytest.param({f"{RESULTS} > log": UNREAD},
        f"published.{RECIPE}.log.learning_rates", "no such file beside study.yaml: r.csv; add it",
        id="missing learning rates"),
    pytest.param({f"{RESULTS} > log": {"source": "a", "remarks": {"step": "rounding"}}},
        f"published.{RECIPE}.log.remarks.step", "Input should be 'steps', 'learning_rates', 'trainable', "
        "'adapter_bytes' or 'reserved_bytes', not step", id="remark on an unknown figure"),
    pytest.param({"ablations > a/b": {"parent": RECIPE, "reproduces": True, "log": UNREAD}},
        "ablations.a/b.log.learning_rates", "no such file beside study.yaml: r.csv; add it",
        id="ablation with missing learning rates"),
    pytest.param({f"{RESULTS} > repeats > bleu4": [5.0]}, "published.haider2024/llama-3.2-3b.repeats.bleu4",
        "List should have at least 2 items after validation, not 1, not [5.0]", id="a single repeat"),
    pytest.param({f"{RESULTS} > predictions > prediction > file": "test.csv"},
        "published.haider2024/llama-3.2-3b.predictions.reference",
        "missing; add this key", id="no references"),
    pytest.param({f"{RESULTS} > adapter": "mine"}, "published.haider2024/llama-3.2-3b.adapter",
        "mine/adapter_config.json is unknown; known: train.jsonl, test.csv", id="adapter without files"),
    pytest.param({"ablations > a/b": {"parent": "lama-2-7b", "reproduces": True}}, "ablations.a/b.parent",
        "lama-2-7b is unknown; did you mean haider2024/llama-2-7b?", id="ablation of no recipe"),
    pytest.param({"tolerances > bleu": 0.1}, "tolerances.bleu",
        "bleu is unknown; did you mean bleu4 or sacrebleu?", id="tolerance of an unknown metric"),
    pytest.param({"baselines": [{"name": "a", "scores": {}, "test_set": "x"}]}, "baselines.0.test_set",
        "x is unknown; known: test", id="unknown test set"),
    pytest.param({INPUT: "question ~"}, "data.fields.input",
        "'question ~': unexpected 'end of template' (put literal text in additional quotes)",
        id="expression that ends early"),
    pytest.param({INPUT: "question | tagd"}, "data.fields.input",
        "'question | tagd': No filter named 'tagd'. (put literal text in additional quotes)", id="unknown filter"),
    pytest.param({ORDER: {"buckets": 3, "longest_first": "question |"}}, "data.splits.train.order.longest_first",
        "'question |': unexpected end of template, expected 'name'. (put literal text in additional "
        "quotes)", id="wrong order"),
    *(
        pytest.param({f"{FORMAT} > folder": path}, "data.input_formats.a.folder", not_matching(FOLDER, path),
            id=f"format in {path}")
        for path in ("../victim", "/victim", "victim", "data", "data/", "data/../v", "data/./v", "data//v")
    ),
    pytest.param({f"{FORMAT} > folder": "data/a\nb"}, "data.input_formats.a.folder",
        not_matching(FOLDER, '"data/a\\nb"'), id="format in two lines"),
    *(
        pytest.param({f"{RESULTS} > curve": path}, f"published.{RECIPE}.curve", not_matching(FILE, path),
            id=f"curve at {path}" )
        for path in ("../c.csv", "/etc/passwd")
    ),
]
# fmt: on


@pytest.mark.parametrize(("changes", "key", "problem"), IN_STUDY_YAML)
def test_a_mistake_in_study_yaml_is_refused(tmp_path, changes, key, problem):
    with pytest.raises(UserError) as refused:
        prepare.check_expressions(sums(tmp_path, changes))
    error = refused.value
    assert (error.file, error.key, error.problem) == (str(tmp_path / "study.yaml"), key, problem)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({"titel": "x"}, "titel: x", id="key"),
        pytest.param({f"{RESULTS} > curve": "/c"}, "    curve: /c", id="key inside others"),
        pytest.param({f"{VALID} > sample": None}, "    valid:", id="missing key"),
        pytest.param({"shown": ["bleu4", "x"]}, "- x", id="item of a list"),
    ],
)
def test_a_mistake_in_study_yaml_has_the_line_of_its_key(tmp_path, changes, text):
    with pytest.raises(UserError) as refused:
        sums(tmp_path, changes)
    lines = (tmp_path / "study.yaml").read_text().splitlines()
    assert refused.value.line
    assert lines[refused.value.line - 1] == text


QUESTION = b'{"question": "a", "answer": "b"}\n'
# fmt: off
IN_ROWS = [
    pytest.param("question", "a.jsonl", QUESTION + b'{"question": "a',
        "a.jsonl:2: not JSON: unexpected end of data", id="cut line"),
    pytest.param("question", "a.jsonl", QUESTION + b'{"question": "a"}',
        "a.jsonl:2: output (answer): 'answer' is undefined; the row's fields: question", id="missing field"),
    pytest.param("qestion | trim", "a.jsonl", QUESTION,
        "a.jsonl:1: input (qestion | trim): 'qestion' is undefined; the row's fields: question, answer",
        id="misspelt field"),
    pytest.param("question", "a.jsonl", b'{"question": 3, "answer": "b"}',
        "a.jsonl:1: input (question): 3 is neither text nor a list or mapping of texts; filter such rows"
        " out; the row's fields: question, answer", id="number for a text"),
    pytest.param("question + 1", "a.jsonl", QUESTION,
        'a.jsonl:1: input (question + 1): can only concatenate str (not "int") to str; the row\'s fields:'
        " question, answer", id="expression that fails"),
    pytest.param("question", "a.csv", b"question,answer\n1,2\n3\n",
        "a.csv:3: the row does not have the 2 fields named in line 1", id="row of CSV with too few fields"),
    pytest.param("question", "a.csv", b'question,answer\n1,"2\n',
        "a.csv:2: not CSV: unexpected end of data; 0 complete rows precede", id="quote in CSV without end"),
    pytest.param("question", "a.csv", b"question,answer\n1,\xff\n",
        "a.csv:2: not UTF-8; save it as UTF-8, or convert it, as in `iconv -f WINDOWS-1252 -t UTF-8 a.csv > utf8.csv`",
        id="not UTF-8 in CSV"),
    pytest.param("question", "a.json", b"[\n1", "a.json:2: not JSON: unexpected end of data", id="array cut"),
    pytest.param("question", "a.json", b"[" + QUESTION + b',{"question": "a"}]',
        "a.json: row 2: output (answer): 'answer' is undefined; the row's fields: question",
        id="missing field in an array"),
    pytest.param("question", "a.jsonl", b"", "a.jsonl: no rows left to write; dropped: no rows", id="empty file"),
    pytest.param("question", "a.csv", b"question,answer\n1,\n",
        "a.csv: no rows left to write; dropped: {'no answer': 1}", id="no row left"),
    pytest.param("question", "a.jsonl", QUESTION + b'{"question": "a", "answer": "b", "at": "c"}',
        "a.jsonl:2: longest_first (at | default(1)): 'c' is not a number; use a number, such as a "
        "length; the row's fields: question, answer, at", id="text to sort by"),
]
# fmt: on


@pytest.mark.parametrize(("expression", "name", "content", "text"), IN_ROWS)
def test_a_mistake_in_rows_is_refused_with_its_place(tmp_path, expression, name, content, text):
    sources, order = {name: {"url": URL}, "train.jsonl": None}, {"buckets": 2, "longest_first": "at | default(1)"}
    changes = {"data > sources": sources, f"{TRAIN} > from": name, VALID: None, INPUT: expression, ORDER: order}
    study = sums(tmp_path, changes)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        prepare.prepare([tmp_path / name], tmp_path / "out", study, "default")
    assert str(refused.value) == f"{tmp_path}/{text}"
    assert [*tmp_path.glob("out/[!.]*")] == []


@pytest.mark.parametrize(
    "changes", [{"titel": 1, "tags": 3, f"{TEST} > sed": 1}, {"data > test_set": "tset", "shown": ["x"]}]
)
def test_many_mistakes_are_listed_in_the_order_of_their_lines(tmp_path, changes):
    with pytest.raises(UserError) as refused:
        sums(tmp_path, changes)
    lines = [int(line) for line in re.findall(r"(?m)^.*study\.yaml:(\d+): ", str(refused.value))]
    assert len(lines) == len(changes)
    assert lines == sorted(lines)


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
    start = time.process_time()
    study = sums(tmp_path, {INPUT: expression, VALID: None})
    (tmp_path / "train.jsonl").write_bytes(QUESTION)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"(study\.yaml|train\.jsonl):\d+: "):
            prepare.prepare([tmp_path / "train.jsonl"], tmp_path / "out", study, "default")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 3


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
    study = sums(tmp_path, {"data > fields": fields | {"f0": "[input] * 990", "f1": "[f0] * 990"}, VALID: None})
    (tmp_path / "train.jsonl").write_bytes(QUESTION)
    with pytest.raises(UserError, match=r"train\.jsonl:1: f1 .*larger than"):
        prepare.prepare([tmp_path / "train.jsonl"], tmp_path / "out", study, "default")
