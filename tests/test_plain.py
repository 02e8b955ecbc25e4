"""tools/plain.py finds dense code and code that reads sentences; tools/words.py finds words."""

import ast
from pathlib import Path

import plain
import pytest
import words

from qlora_recipes.base import paths

DENSE = [
    pytest.param(
        "x = a and b and c and d and e",
        "4 decisions in a statement; split it, at most 3",
        id="operands",
    ),
    pytest.param(
        "x = [a for b in c if d if e for f in g]",
        "4 decisions in a statement; split it, at most 3",
        id="comprehension",
    ),
    pytest.param(
        "x = a if b else c if d else e if f else g if h else i",
        "4 decisions in a statement; split it, at most 3",
        id="conditional expressions",
    ),
    pytest.param(
        "x = all((a, b, c, d, e))",
        "4 decisions in a statement; split it, at most 3",
        id="display in all()",
    ),
    pytest.param(
        "def f():\n" + "    if a:\n        b()\n" * 16,
        "f makes 16 decisions; split it, at most 15",
        id="function",
    ),
    pytest.param(
        "def f():\n    try:\n        a()\n" + "    except E:\n        for b in c:\n            d()\n" * 8,
        "f makes 16 decisions; split it, at most 15",
        id="handlers",
    ),
    pytest.param(
        "def f():\n    match a:\n" + "        case 1 if b:\n            pass\n" * 8,
        "f makes 16 decisions; split it, at most 15",
        id="cases",
    ),
]


@pytest.mark.parametrize(("code", "problem"), DENSE)
def test_dense_code_is_found(code, problem):
    assert [*plain.dense(ast.parse(code))] == [(1, problem)]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("x = a and b and c and d", id="statement"),
        pytest.param("def f():\n" + "    if a:\n        b()\n" * 15, id="function"),
        pytest.param(
            "def f():\n    def g():\n" + "        if a:\n            b()\n" * 15 + "    if a:\n        b()", id="nested"
        ),
    ],
)
def test_code_within_the_limits_is_not_found(code):
    assert [*plain.dense(ast.parse(code))] == []


READING = [
    "change.why.startswith('--set ')",
    "reason.endswith('x')",
    "interval.method.partition(': ')",
    "note.rpartition(' ')",
    "finding.message.split(';')",
    "record['problem'].removeprefix('error: ')",
    "record.get('remedy', '').removesuffix('.')",
    "'memory' in warning",
    "'rehearsal' in str(change.reason)",
    "reason not in ('a', 'b')",
    "finding.problem == 'missing'",
    "re.match('x', error.problem)",
    "PATTERN.search(message)",
    "key.startswith('datasets')",
    "key.removeprefix('datasets.')",
]


def places(code: str) -> list[tuple[int, str]]:
    """Lines of code that read sentences."""
    return [*plain.sentences(ast.parse(code), code.splitlines())]


@pytest.mark.parametrize("code", READING)
def test_code_that_reads_a_sentence_is_found(code):
    assert [line for line, _ in places(f"x = {code}")] == [1]


def test_code_that_reads_the_text_of_an_own_error_is_found():
    code = "try:\n    f()\nexcept {} as error:\n    x = str(error).split(':')"
    assert [line for line, _ in places(code.format("UserError"))] == [4]
    assert [line for line, _ in places(code.format("(OSError, BadRow)"))] == [4]
    assert places(code.format("OSError")) == []


def test_a_problem_names_line_and_code():
    problem = "reads a sentence: change.why.startswith('--set '); read a field of a type instead"
    assert places("a = 1\nx = change.why.startswith('--set ')") == [(2, problem)]


@pytest.mark.parametrize(
    "code",
    [
        "x = reason.split(' ')  # another program's text",
        "x = reason or note",
        "x = 'datasets' in config",
        "x = problem == ''",
        "x = key.startswith('lora')",
        "x = remedy in remedies",
    ],
)
def test_other_code_is_not_found(code):
    assert places(code) == []


def test_the_source_is_plain(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plain.py", str(paths.RECIPES.parent / "scripts")])
    assert plain.main() == 0
    assert capsys.readouterr().out == ""


def test_names_that_say_little_are_found():
    code = "def of(given):\n    found = [each for each in given]\n    return found.own"
    assert sorted(words.names(Path("a.py"), code)) == [
        "a.py:1: given: name the thing",
        "a.py:1: of(): name what the function does or returns",
        "a.py:2: each: name the thing",
        "a.py:2: found: name the thing",
    ]


def test_phrases_are_found_outside_of_jinja():
    phrase = " ".join(["is", "none"])
    assert [*words.phrases(Path("a.md"), f"one\nthe file {phrase} {{{{ {phrase} }}}}")] == [
        f"a.md:2: {phrase}: use a noun or a verb, in the active voice"
    ]
