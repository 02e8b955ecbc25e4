import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.metrics.rouge_l import MOST, RougeParameters, rouge_l


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("please rename this variable", "rename it", 2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4)),
        ("fixes", "fixed", 1.0),  # stemmed
        ("a b", "", 0.0),
    ],
)
def test_rouge_l(reference: str, prediction: str, expected: float) -> None:
    assert rouge_l([(reference, prediction)], RougeParameters()) == pytest.approx([expected])


@pytest.mark.parametrize("side", [0, 1])
def test_a_text_that_would_take_minutes_is_refused(side: int) -> None:
    texts = "a", "a " * MOST
    with pytest.raises(UserError):
        rouge_l([("a", "a"), (texts[side], texts[1 - side])], RougeParameters())


# in a process of its own, as absl's logging, which it imports, closes what pytest captures once Axolotl sets up its own
LIBRARY = """
import json, sys
from rouge_score.rouge_scorer import RougeScorer
scorer = RougeScorer(["rougeL"], use_stemmer=sys.argv[1] == "True")
print([scorer.score(*pair)["rougeL"].fmeasure for pair in json.load(sys.stdin)])
"""


@pytest.mark.parametrize("stemmed", [True, False])
def test_rouge_l_is_that_of_the_library(stemmed: bool) -> None:
    words = ["the", "a", "renamed", "renaming", "fix", "fixes", "Fixed", "foo_bar", "x", "é", "--", "..."]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.randrange(100))) for _ in range(400)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    command = [sys.executable, "-c", LIBRARY, str(stemmed)]
    expected = json.loads(subprocess.check_output(command, input=json.dumps(pairs), text=True))
    assert rouge_l(pairs, RougeParameters(stemmed=stemmed)) == expected


def test_rouge_l_is_computed_with_a_release_of_nltk_that_needs_scipy(tmp_path: Path) -> None:
    for name, content in {
        "scipy/__init__.py": "",
        "nltk/__init__.py": "import scipy",
        "nltk/stem/__init__.py": "",
        "nltk/stem/porter.py": "class PorterStemmer:\n    def stem(self, word): return word[:3]",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    code = (
        "from qlora_recipes.metrics import rouge_l as r\n"
        "print(r.rouge_l([('renames', 'renamed')], r.RougeParameters()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("[1.0]\n", 0), done.stderr
