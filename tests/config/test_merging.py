from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import merging
from qlora_recipes.config.merging import Override

leaves = st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.floats(allow_nan=False))
keys = st.text("abcdef_", min_size=1, max_size=4)
configs = st.dictionaries(
    keys, st.recursive(leaves, lambda v: st.dictionaries(keys, v, max_size=3), max_leaves=8), max_size=4
)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    return file


def test_numbers_are_read_as_meant(tmp_path):
    read = yamlfiles.read_yaml(write(tmp_path, "a: 2e-4\nb: 1E3\nc: 0.05\nd: 12\ne: 2e\nf: '2e-4'\n"))
    assert read == {"a": 0.0002, "b": 1000.0, "c": 0.05, "d": 12, "e": "2e", "f": "2e-4"}


def test_merge_reaches_below_replaces_lists_and_deletes_by_null():
    base = {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}
    assert merging.merge(base, {"a": {"y": None, "z": 4}, "b": [9], "c": None}) == {"a": {"x": 1, "z": 4}, "b": [9]}
    assert base == {"a": {"x": 1, "y": 2}, "b": [1, 2], "c": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=2e-4", {"a": 0.0002, "d": [{"p": "x"}, {"p": "y"}]}),
        ("d.1.p=z", {"a": 1, "d": [{"p": "x"}, {"p": "z"}]}),
        ("d.0.q=[1, two]", {"a": 1, "d": [{"p": "x", "q": [1, "two"]}, {"p": "y"}]}),
        ("n.o.p=true", {"a": 1, "d": [{"p": "x"}, {"p": "y"}], "n": {"o": {"p": True}}}),
        ("a=null", {"d": [{"p": "x"}, {"p": "y"}]}),
        ("a='x, y'", {"a": "x, y", "d": [{"p": "x"}, {"p": "y"}]}),
        ("a=train[:14]", {"a": "train[:14]", "d": [{"p": "x"}, {"p": "y"}]}),
    ],
)
def test_override_sets_what_it_names(text, expected):
    base = {"a": 1, "d": [{"p": "x"}, {"p": "y"}]}
    override = merging.parse_override(text)
    assert merging.override(base, override.key, override.value) == expected
    assert override.text == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("train[:14]", "train[:14]"),
        ("x, y", "'x, y'"),
        ("true", "'true'"),
        ("a # b", "'a # b'"),
        ("1\n2", '"1\\n2"'),
        (["a", 1], "[a, 1]"),
        (None, "null"),
    ],
)
def test_a_value_is_written_without_needless_quotes(value, text):
    assert merging.Override("k", value).text == f"k={text}"
    assert merging.parse_override(f"k={text}").value == value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        pytest.param("d.7.p", "--set d.7.p: 7 is not a position in a list of 1, counted from 0", id="position"),
        pytest.param(
            f"d.{'9' * 5000}",
            f"--set d.{'9' * 5000}: {'9' * 5000} is not a position in a list of 1, counted from 0",
            id="digits",
        ),
        pytest.param("d.x", "--set d.x: x is not a position in a list of 1, counted from 0", id="key-of-a-list"),
        pytest.param("a.b", "--set a.b: 1 has no key b", id="key-of-a-number"),
    ],
)
def test_an_override_of_a_missing_place_is_refused(key, message):
    with pytest.raises(UserError) as refused:
        merging.override({"a": 1, "d": [{"p": "x"}]}, key, 1)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("novalue", "--set novalue: expected key=value, as in --set num_epochs=3", id="no-value"),
        pytest.param("=1", "--set =1: expected key=value, as in --set num_epochs=3", id="no-key"),
        pytest.param(
            "a=[1",
            "--set a=[1: not valid YAML: did not find expected ',' or ']' (column 1)",
            id="yaml",
        ),
        pytest.param(
            "a=1,,2", "--set a=1,,2: not valid YAML: did not find expected node content (column 4)", id="empty"
        ),
        pytest.param(
            "a=1,2",
            "--set a=1,2: several values, which only `recipe sweep` takes; write a list as [a,b], and text with commas "
            "in quotes",
            id="several-values",
        ),
    ],
)
def test_a_malformed_override_is_refused(text, message):
    with pytest.raises(UserError) as refused:
        merging.parse_override(text)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("16,32", [16, 32]),
        ("'train[:14]', 'train[14:20]'", ["train[:14]", "train[14:20]"]),
        ("[q], [q, v]", [["q"], ["q", "v"]]),
        ("{a: 1, b: 2}", [{"a": 1, "b": 2}]),
        ("'.*(q|v){1,2}_proj',all", [".*(q|v){1,2}_proj", "all"]),
        ('\'a, b\',"c, \\"d"', ["a, b", 'c, "d']),
        ("'it''s, well', it's", ["it's, well", "it's"]),
        ("null,1", [None, 1]),
    ],
)
def test_several_values_are_those_of_a_yaml_list(text, values):
    assert merging.parse_overrides(f"a={text}") == ("a", values)
    for value in values:  # as a sweep passes it to `run`
        assert merging.parse_override(Override("a", value).text).value == value


@given(configs)
def test_a_config_written_and_read_again_is_the_same(content):
    assert yaml.load(yamlfiles.write_yaml(content), yamlfiles._Loader) == content


def test_the_line_of_a_nested_key_is_found(tmp_path):
    file = write(tmp_path, "# head\na: 1\nd:\n  - p: x\n  - p: y\n    q: 1\n")
    assert [yamlfiles.line_of(file, key.split(".")) for key in ("a", "d.0.p", "d.1.q", "d")] == [2, 4, 6, 3]
    assert yamlfiles.line_of(file, ["d", "9" * 5000]) == 3
