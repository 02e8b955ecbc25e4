import math

import pytest

from qlora_recipes.metrics.bleu4 import bleu4
from qlora_recipes.metrics.words import words


def test_known_scores() -> None:
    assert bleu4("rename this variable please", "rename this variable please") == pytest.approx(100)
    assert bleu4("please fix this typo now", "fix") == pytest.approx(13.53, abs=0.005)
    assert bleu4("a b c", "") == pytest.approx(100 * math.exp(-3))
    assert bleu4("a b c", "x y z") == pytest.approx(0, abs=1e-70)


def test_words() -> None:
    assert words("Use `my_Var`, größe 2.5x!") == ["use", "`", "my", "_", "var", "`", ",", "größe", "2", ".", "5x", "!"]


def test_by_hand() -> None:
    # reference of 5 tokens, prediction of 4: matches 3, 1, 0, 0 of 4, 3, 2, 1 n-grams
    expected = (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert bleu4("a b c d e", "a b x d") == pytest.approx(100 * expected)
