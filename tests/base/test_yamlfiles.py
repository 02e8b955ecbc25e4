"""Messages for text that is not YAML, or not allowed in a config."""

import time

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.yamlfiles import parse
from qlora_recipes.run.backends import slurm_site

AT = r"mine.yaml:{}: [^\n]*\(column {}\)$"
MISTAKES = {
    "a: 1\n\tb: 2\n": AT.format(2, 1),
    "a: x\nnote: see: here\n": AT.format(2, 10),
    'a: "x\nb: 3\n': AT.format(3, 1),
    "a:\n  - b\n - c\n": AT.format(3, 2),
    "a: 1\nb: *c\n": AT.format(2, 4),
    "a: !!python/object/apply:os.system [id]\n": AT.format(1, 4),
    "the tag: 1\nb: 2\nthe tag: 3\n": "mine.yaml:3: .*the tag .*\\(column 1\\)$",
    **dict.fromkeys(
        ("a: \x01\n", "? [a]\n: 1\n", "1: a", "\x00", "a: 2024-99-01", "a: 2024-01-01", "a: .nan"), r"mine.yaml: .*$"
    ),
    # texts that would explode
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)): "mine.yaml: ",
    "a: " + "[" * 200_000: "mine.yaml: ",  # which ends a process that loads it
    "a: &a [*a]": "mine.yaml: ",
}


@pytest.mark.parametrize(("text", "says"), MISTAKES.items(), ids=[text[:40] for text in MISTAKES])
def test_a_mistake_is_refused_in_one_line_with_its_place(text, says):
    with pytest.raises(UserError, match=rf"\A{says}"):
        parse(text, "mine.yaml")


@pytest.mark.parametrize("number", ["012", "1:30", "-0_1", "1:30.5"])
def test_a_number_of_another_base_is_text(number):
    assert parse(f"a: {number}", "f") == {"a": number}


def test_aliases_of_a_usual_size_are_values():
    assert parse("a: &a {k: 1}\nb: *a\nc: {<<: *a, l: 2}", "f") == {
        "a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}}  # fmt: skip


def nested(head: str, item: str, levels: int, times: int = 9) -> str:
    """Anchors of which each refers to the one before it several times."""
    lines = [head]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} {item.format(', '.join([f'*a{i - 1}'] * times))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        nested("a0: &a0 {k: 1}", "{{<<: [{}]}}", 12),
        nested("a0: &a0 {k: 1}", "{{<<: [{}], x: 1}}", 12),
        nested("a0: &a0 [x]", "[{}]", 12),
        nested("a0: &a0 [x]", "[{}]", 60, 1),
        nested(f"a0: &a0 {'x' * 100_000}", "[{}]", 5, 12),
        "a: &a {b: *a}",
        "a: &a {<<: *a}",
        "a: &a [*a]",
    ],
    ids=lambda text: text[:40],
)
def test_what_aliases_and_merge_keys_expand_to_is_bounded_before_they_do(tmp_path, text):
    start = time.process_time()
    with pytest.raises(UserError, match=r"^f: too large or nested too deeply"):
        parse(text, "f")
    (tmp_path / "qlora-recipes").mkdir()
    (tmp_path / "qlora-recipes" / "slurm.yaml").write_text(text)
    with pytest.raises(UserError, match=r"slurm\.yaml: too large or nested too deeply"):
        slurm_site._read(tmp_path / "qlora-recipes" / "slurm.yaml")
    assert time.process_time() - start < 2
