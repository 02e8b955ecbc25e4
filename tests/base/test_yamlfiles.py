"""What is said of a file that is not YAML."""

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.yamlfiles import parse

MISTAKES = [
    ("a: 1\n\tb: 2\n", 2, "a tab; indent with spaces"),
    ("a:\n\t- 2\n", 2, "a tab; indent with spaces"),
    ("a: x\nnote: see: here\n", 2, "a value with a colon and a space in it; put it in quotes"),
    ("a: x\nlora_r 8\nb: 3\n", 2, "no colon between a key and its value"),
    ("lora_r:8\nb: 1\n", 2, "the line above lacks the colon and space behind its key"),
    ("a: 1\n  b: 2\n", 2, "indented too far"),
    ("a: x\nb: [1, 2\nc: 3\n", 2, "a [ or { that is not closed"),
    ("a: [\n", 1, "a [ or { that is not closed"),
    ("a: x\nb: {c: 1 d: 2}\n", 2, "that lacks a comma"),
    ('a: "x\nb: 3\n', 1, "a quotation mark that is not closed"),
    ("a:\n  - b\n - c\n", 3, "indented unlike the lines above"),
    ('a: 1\nb: "x" y\n', 2, "a quote or bracket ends where it should not"),
    ("a: 1\nb: *.jsonl\n", 2, "a value that begins with *; put it in quotes"),
    ("a: 1\nb: *c\n", 2, "a value that begins with *; put it in quotes"),
    ("a: 1\nb: @c\n", 2, "a value that begins with @; put it in quotes"),
    ("a: 1\nb: !c d\n", 2, "a value that begins with !; put it in quotes"),
    ('a: 1\nb: "C:\\data"\n', 2, "a backslash in double quotes; use single ones"),
    ("a: 1\n---\nb: 2\n", 2, "--- begins a second config"),
    ("a: 1\nb: 2\na: 3\n", 3, "the key a occurs twice; delete one"),
    ("the tag: 1\nthe tag: 2\n", 2, "the key the tag occurs twice; delete one"),
    ("- a\nb: 1\n", 2, "a list and keys at the same depth"),
    ("a: 1\nb: - c\n", 2, "put its first dash on a line of its own"),
    ("a: 1\nb: ]\n", 2, "a bracket ends that does not begin"),
]


@pytest.mark.parametrize(("text", "line", "says"), MISTAKES, ids=[text for text, _, _ in MISTAKES])
def test_a_mistake_of_form_is_told_in_plain_words_with_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(text, "mine.yaml")
    assert str(raised.value).startswith(f"mine.yaml:{line}: not valid YAML: ")
    assert says in str(raised.value)


def test_what_is_wrong_with_a_value_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^mine.yaml: not valid YAML: unacceptable character[^\n]*$"):
        parse("a: \x01\n", "mine.yaml")


def _chain(begin: str, level: str) -> str:
    return begin + "".join(level.format(i=i, before=", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_chain("a0: &a0 [x]\n", "a{i}: &a{i} [{before}]\n"), "too large to be a config"),
        (_chain("a0: &a0 {k: 1}\n", "a{i}: &a{i}\n  <<: [{before}]\n"), "too large to be a config"),  # 13 s before
        ("a: " + "[" * 200_000, "nested too deeply"),  # ended the process before
        ("a: &a [*a]", "nested too deeply"),
        ("a0: &a0 1\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 80)), "nested too deeply"),
    ],
)
def test_a_text_that_would_explode_is_refused_before_it_does(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(text, "bomb.yaml")


def test_aliases_of_a_usual_size_are_values() -> None:
    assert parse("a: &a {k: 1}\nb: *a\nc: {<<: *a, l: 2}", "f") == {
        "a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}}  # fmt: skip
