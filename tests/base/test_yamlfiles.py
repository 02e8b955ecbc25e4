"""Messages for text that is not YAML, or not allowed in a config."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.yamlfiles import duplicates, parse, read_recipe, recipe_text, write_setting
from qlora_recipes.run.backends import slurm_cluster

TOO_LARGE = "too large or nested too deeply for a config; remove values or aliases (*name)"


def nested(head: str, item: str, levels: int, times: int = 9) -> str:
    """Anchors, each of which repeats the previous one several times."""
    lines = [head]
    for i in range(1, levels):
        aliases = ", ".join([f"*a{i - 1}"] * times)
        lines.append(f"a{i}: &a{i} {item.format(aliases)}")
    return "\n".join(lines)


# fmt: off
MISTAKES = [
    pytest.param("a: 1\n\tb: 2\n",
        ":2: not valid YAML: found a tab character that violates indentation (column 1)", id="tab"),
    pytest.param("a: x\nnote: see: here\n",
        ":2: not valid YAML: mapping values are not allowed in this context (column 10)", id="two colons"),
    pytest.param('a: "x\nb: 3\n', ":3: not valid YAML: found unexpected end of stream (column 1)", id="open quote"),
    pytest.param("a:\n  - b\n - c\n", ":3: not valid YAML: did not find expected key (column 2)", id="indentation"),
    pytest.param("a: 1\nb: *c\n", ":2: not valid YAML: found undefined alias (column 4)", id="unknown alias"),
    pytest.param("a: !!python/object/apply:os.system [id]\n",
        ":1: not valid YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system' (column 4)", id="tag of Python"),
    pytest.param("the tag: 1\nb: 2\nthe tag: 3\n",
        ":3: not valid YAML: the key the tag occurs twice; delete one (column 1)", id="key that occurs twice"),
    pytest.param("a: \x01\n",
        ": not valid YAML: unacceptable character #x0001: control characters are not allowed", id="control character"),
    pytest.param("? [a]\n: 1\n", ": not valid YAML: unhashable type: 'list'", id="list as key"),
    pytest.param("1: a", ": the key 1 is not text; put it in quotes", id="number as key"),
    pytest.param("a: 2024-99-01", ": not valid YAML: month must be in 1..12", id="impossible date"),
    pytest.param("a: 2024-01-01",
        ": datetime.date(2024, 1, 1) is not allowed in a config; if it is text, put it in quotes", id="date"),
    pytest.param(f"a: {'9' * 5000}", ": not valid YAML: Exceeds the limit (4300 digits) for integer string conversion: "
        "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit", id="digits"),
    pytest.param(f"a: 0x{'f' * 4000}", ": not valid YAML: Exceeds the limit (4300 digits) for integer string "
        "conversion; use sys.set_int_max_str_digits() to increase the limit", id="digits in base 16"),
    pytest.param("a: .nan", ": nan is not allowed in a config; if it is text, put it in quotes", id="NaN"),
    pytest.param("a: " + "[" * 200_000, f": {TOO_LARGE}", id="many levels"),  # loading them would end the process
]
# fmt: on


@pytest.mark.parametrize(("text", "problem"), MISTAKES)
def test_a_mistake_is_refused_in_one_line_with_its_place(text, problem):
    with pytest.raises(UserError) as refused:
        parse(text, "mine.yaml")
    assert str(refused.value) == f"mine.yaml{problem}"


@pytest.mark.parametrize("number", ["012", "1:30", "-0_1", "1:30.5"])
def test_a_number_of_another_base_is_text(number):
    assert parse(f"a: {number}", "f") == {"a": number}


def test_few_aliases_are_values():
    assert parse("a: &a {k: 1}\nb: *a\nc: {<<: *a, l: 2}", "f") == {
        "a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}}  # fmt: skip


@pytest.mark.parametrize("part", ["```yaml\n", "```yaml\nbase_model: x\n", "base_model: x\n", "a: 1\n"])
def test_a_card_is_searched_in_linear_time(tmp_path, part):
    file = tmp_path / "README.md"
    file.write_text("```yaml\n" + part * 30_000)
    start = time.process_time()
    with suppress(UserError):
        recipe_text(file)
    assert time.process_time() - start < 2


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
def test_aliases_and_merge_keys_that_would_explode_are_refused(tmp_path, text):
    start = time.process_time()
    with pytest.raises(UserError) as refused:
        parse(text, "f")
    assert str(refused.value) == f"f: {TOO_LARGE}"
    file = tmp_path / "slurm.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        slurm_cluster._read(file)
    assert str(refused.value) == f"{file}: {TOO_LARGE}"
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        pytest.param([1, 2], ["key: [1, 2]"], id="short list"),
        pytest.param([], ["key: []"], id="empty list"),
        pytest.param([{"path": "x"}], ["key:", "  - path: x"], id="list of mappings"),
        pytest.param(f"{'a' * 99}\nb", ["key: |-", f"  {'a' * 99}", "  b"], id="several lines"),
        pytest.param(f"{'a' * 99} bc", ["key: >-", f"  {'a' * 99}", "  bc"], id="long line"),
        pytest.param(f" {'a' * 99} bc", [f"key: ' {'a' * 99} bc'"], id="not as a block"),
    ],
)
def test_a_setting_is_written_as_people_do(value, lines):
    assert write_setting("key", value) == lines


@given(st.text(st.sampled_from("ab  \n\t'\"#:{}%-|>\\é\u2028\x85"), max_size=300))
def test_a_written_setting_is_read_as_it_was(text):
    for value in (text, [{"path": text, "roles": {"user": [text]}}], {"a": text}):
        first, *lines = write_setting("key", value)
        assert parse("\n".join(["a: 1", f"{first}  # comment", *lines, "b: 2"])) == {"a": 1, "key": value, "b": 2}


TWICE = """\
lora_r: 8  # low
lora_alpha: 16
targets:
  - q_proj
  # the other
  - v_proj
datasets:
  - path: a.jsonl
    type: alpaca
    path: b.jsonl
tokens: {pad_token: <unk>, pad_token: </s>}
bf16: &on true
tf32: *on
hub_token: first
hub_token: second
lora_alpha: 16
targets: [k_proj]
lora_r: 16
lora_r: 32
tf32: false
"""
LAST = {
    "datasets": [{"type": "alpaca", "path": "b.jsonl"}],
    "tokens": {"pad_token": "</s>"},
    "bf16": True,
    "hub_token": "second",
    "lora_alpha": 16,
    "targets": ["k_proj"],
    "lora_r": 32,
    "tf32": False,
}


def test_the_last_value_of_a_key_counts_and_both_are_listed_if_they_differ(tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text(TWICE)
    assert read_recipe(file) == LAST
    assert duplicates(file) == [
        "lora_r 8 (line 1), then 32",
        "targets [q_proj, v_proj] (line 3), then [k_proj]",
        "datasets.0.path a.jsonl (line 8), then b.jsonl",
        "tokens.pad_token <unk> (line 11), then </s>",
        "tf32 true (line 13), then false",
        "lora_r 16 (line 18), then 32",
    ]
    lines = recipe_text(file).splitlines()
    assert lines[18] == "lora_r: 32"  # at its line
    assert len(lines) == TWICE.count("\n")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        pytest.param("a: &x {q: 1}\na: 2\nb: *x", {"a": 2, "b": {"q": 1}}, id="mapping"),
        pytest.param("a: &x\n- &y 3\n- *y\na: 2\nb: [*x, *y]", {"a": 2, "b": [[3, 3], 3]}, id="nested"),
        pytest.param("a: &x {q: 1}\na: 2\nb: {<<: *x, r: 1}", {"a": 2, "b": {"q": 1, "r": 1}}, id="merged"),
        pytest.param("&x a: 1\na: 2\nb: *x", {"a": 2, "b": "a"}, id="key"),
    ],
)
def test_an_anchor_in_a_former_value_keeps_its_meaning(tmp_path, text, values):
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    assert read_recipe(file) == values
