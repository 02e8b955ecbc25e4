"""Metrics of texts."""

import json
import math
import random
import subprocess
import sys

import pytest

from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import RowMetric
from qlora_recipes.metrics.text import RougeParameters, bleu4, rouge_l, words


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("rename this variable please", "rename this variable please", 100),
        ("please fix this typo now", "fix", 13.5335),
        ("a b c", "", 100 * math.exp(-3)),
        ("a b c", "x y z", 0),
        # by hand: of 5 and 4 tokens, matches 3, 1, 0, 0 of 4, 3, 2, 1 n-grams
        ("a b c d e", "a b x d", 100 * (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)),
    ],
)
def test_known_scores_of_bleu4(reference, prediction, expected):
    assert bleu4(reference, prediction) == pytest.approx(expected, rel=1e-5, abs=1e-70)


def test_words():
    assert words("Use `my_Var`, größe 2.5x!") == ["use", "`", "my", "_", "var", "`", ",", "größe", "2", ".", "5x", "!"]


# in a process of its own, as absl's logging, which it imports, closes what pytest captures once Axolotl sets up its own
LIBRARY = """
import json, sys
from rouge_score.rouge_scorer import RougeScorer
pairs = json.load(sys.stdin)
for stems in (True, False):
    scorer = RougeScorer(["rougeL"], use_stemmer=stems)
    print([scorer.score(*pair)["rougeL"].fmeasure for pair in pairs])
"""


def test_rouge_l_is_that_of_the_library():
    vocabulary = ["the", "a", "renamed", "renaming", "fix", "fixes", "Fixed", "foo_bar", "x", "é", "--", "..."]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(vocabulary, k=draw.randrange(100))) for _ in range(400)]
    pairs = [*zip(texts[::2], texts[1::2], strict=True), ("fixes", "fixed"), ("a b", "")]
    output = subprocess.check_output([sys.executable, "-c", LIBRARY], input=json.dumps(pairs), text=True)
    expected = [json.loads(line) for line in output.splitlines()]
    assert [rouge_l(pairs, RougeParameters(stemmed=stemmed)) for stemmed in (True, False)] == expected
    assert expected[0][-2:] == [1, 0] and expected[1][-2:] == [0, 0]


def test_exact_match_and_what_it_can_leave_out():
    def scores(**parameters: bool) -> list[float]:
        column = registry.column("exact_match", parameters)
        assert isinstance(column.metric, RowMetric)
        return column.metric.score_rows([("a  B", "a  B\n"), ("a  B", "a B"), ("a  B", "a  b")], column.parameters)

    assert scores() == [100, 0, 0]
    assert scores(ignore_space=True) == [100, 100, 0]
    assert scores(ignore_case=True) == [100, 0, 100]
