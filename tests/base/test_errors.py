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
    ("word", "names"),
    [
        ("all-linear", "haider2024/all-linear/code-llama-7b, haider2024/all-linear/llama-2-7b;"),
        ("haider2024", "haider2024/llama-3.1-8b, haider2024/llama-3.2-3b;"),
        ("ode-llama", " code-llama-7b?"),  # not from the beginning of a word
        ("zzz", " haider2024/all-linear/code-llama-7b, "),
    ],
)
def test_what_may_be_several_or_is_none_is_refused_with_their_names(word, names):
    with pytest.raises(UserError) as refused:
        meant(word, RECIPES, "recipe")
    assert names in str(refused.value)


def test_choices_with_the_same_first_word_are_suggested_alone():
    hint = did_you_mean("lora_rank", ["local_rank", "lora_r", "qgalore_rank"])
    assert "lora_r?" in hint
    assert "local_rank" not in hint
