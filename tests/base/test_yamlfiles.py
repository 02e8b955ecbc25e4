"""What is said of a file that is not YAML."""

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.yamlfiles import parse

MISTAKES = [
    ("a: 1\n\tb: 2\n", 2, 1),
    ("a: x\nnote: see: here\n", 2, 10),
    ('a: "x\nb: 3\n', 3, 1),
    ("a:\n  - b\n - c\n", 3, 2),
    ("a: 1\nb: *c\n", 2, 4),
    ("a: !!python/object/apply:os.system [id]\n", 1, 4),
    ("a: 1\nb: 2\na: 3\n", 3, 1),
]


@pytest.mark.parametrize(("text", "line", "column"), MISTAKES, ids=[text for text, *_ in MISTAKES])
def test_a_mistake_of_form_has_its_line_and_column(text: str, line: int, column: int) -> None:
    with pytest.raises(UserError, match=rf"^mine.yaml:{line}: [^\n]*\(column {column}\)$"):
        parse(text, "mine.yaml")


@pytest.mark.parametrize("text", ["a: \x01\n", "? [a]\n: 1\n", "1: a", "a: 2024-99-01", "a: 2024-01-01", "a: .nan"])
def test_what_is_wrong_with_a_value_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^mine.yaml: [^\n]*$"):
        parse(text, "mine.yaml")


@pytest.mark.parametrize("number", ["012", "1:30", "-0_1", "1:30.5"])
def test_a_number_of_another_base_is_text(number: str) -> None:
    assert parse(f"a: {number}", "f") == {"a": number}


def test_a_key_that_occurs_twice_is_named() -> None:
    with pytest.raises(UserError, match=r"mine\.yaml:2: .*the tag"):
        parse("the tag: 1\nthe tag: 2\n", "mine.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
        "a: " + "[" * 200_000,  # which ends a process that loads it
        "a: &a [*a]",
    ],
)
def test_a_text_that_would_explode_is_refused_before_it_does(text: str) -> None:
    with pytest.raises(UserError, match=r"^bomb.yaml: "):
        parse(text, "bomb.yaml")


def test_aliases_of_a_usual_size_are_values() -> None:
    assert parse("a: &a {k: 1}\nb: *a\nc: {<<: *a, l: 2}", "f") == {
        "a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}}  # fmt: skip
