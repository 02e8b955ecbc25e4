"""Choices by a part of their name, and hints if no choice matches."""

import pytest

from qlora_recipes.base.errors import UserError, did_you_mean, meant

RECIPES = [
    "haider2024/all-linear/code-llama-7b",
    "haider2024/all-linear/llama-2-7b",
    "haider2024/as-released/llama-3-8b",
    "haider2024/code-llama-7b",
    "haider2024/llama-2-7b",
    "haider2024/llama-3-8b",
    "haider2024/llama-3.1-8b",
    "haider2024/llama-3.2-3b",
    "llama-3.2",
]


@pytest.mark.parametrize(
    ("word", "choice"),
    [
        ("haider2024/llama-3-8b", "haider2024/llama-3-8b"),  # itself, though others have it as a part
        ("Llama-3.1", "haider2024/llama-3.1-8b"),
        ("code-llama-7b", "haider2024/code-llama-7b"),  # of the fewest levels
        ("all-linear/code", "haider2024/all-linear/code-llama-7b"),
    ],
)
def test_a_part_that_no_other_has_is_enough(word, choice):
    assert meant(word, RECIPES, "recipe") == choice


@pytest.mark.parametrize(
    ("word", "message"),
    [
        pytest.param(
            "all-linear",
            "all-linear: matches haider2024/all-linear/code-llama-7b, haider2024/all-linear/llama-2-7b; give more of "
            "the name",
            id="folder inside a study",
        ),
        pytest.param(
            "haider2024",
            "haider2024: matches haider2024/code-llama-7b, haider2024/llama-2-7b, haider2024/llama-3-8b, "
            "haider2024/llama-3.1-8b, haider2024/llama-3.2-3b; give more of the name",
            id="study",
        ),
        pytest.param(
            "ode-llama", "ode-llama: no recipe of that name; did you mean code-llama-7b?", id="middle of a word"
        ),
        pytest.param("zzz", f"zzz: no recipe of that name; there are {', '.join(RECIPES)}", id="nothing near"),
        pytest.param("", f"'': no recipe of that name; there are {', '.join(RECIPES)}", id="empty"),
    ],
)
def test_a_word_that_no_or_several_choices_match_is_refused(word, message):
    with pytest.raises(UserError) as refused:
        meant(word, RECIPES, "recipe")
    assert str(refused.value) == message


def test_many_matches_are_counted():
    with pytest.raises(UserError) as refused:
        meant("a", [f"a-{i}" for i in range(11)], "run", option="--only")
    assert str(refused.value) == (
        "--only a: matches a-0, a-1, a-10, a-2, a-3, a-4, a-5, a-6 and 3 more; give more of the name"
    )


def test_choices_with_the_same_first_word_are_suggested_alone():
    assert did_you_mean("lora_rank", ["local_rank", "lora_r", "qgalore_rank"]) == "; did you mean lora_r?"


def test_the_text_of_an_error_has_place_key_problem_and_remedy():
    second = UserError("missing", file="a.yaml", line=4, key="c")
    error = UserError("unknown", file="a.yaml", line=3, key="b", remedy="delete it")
    error.further = [second]
    assert str(error) == "a.yaml:3: b: unknown; delete it\na.yaml:4: c: missing"
    assert str(UserError("unknown", file="a.yaml")) == "a.yaml: unknown"
    assert str(UserError("unknown", key="--set b")) == "--set b: unknown"
