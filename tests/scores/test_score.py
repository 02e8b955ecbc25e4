import statistics
from pathlib import Path

import orjson
import pytest
from conftest import SHARED, Recipe

from qlora_recipes.scores import bertscore, compare, score
from qlora_recipes.scores.bleu import bleu4
from qlora_recipes.scores.metrics import METRICS, PER_ROW, Metric

ROWS = [
    {"reference": "please fix this typo now", "prediction": "fix"},
    {"reference": "Same text, four tokens.", "prediction": "Same text, four tokens. ", "lang": "py"},
    {"reference": "why?", "prediction": ""},
    {"reference": "use a constant", "prediction": "nit"},
    {"reference": "name this", "prediction": "nit"},
]


def test_rows_keep_their_own_scores_and_their_means_are_the_scores() -> None:
    scores, rows = score.score(ROWS)
    assert [row["bleu4"] for row in rows] == [pytest.approx(bleu4(row["reference"], row["prediction"])) for row in ROWS]
    assert scores["bleu4"] == pytest.approx(statistics.fmean(row["bleu4"] for row in rows))
    assert scores["rouge_l"] == pytest.approx(statistics.fmean(row["rouge_l"] for row in rows))
    assert rows[1]["lang"] == "py"
    low, high = scores["intervals"]["bleu4"]
    assert low <= scores["bleu4"] <= high
    assert scores["bertscore"] is None and "bertscore_f1" not in scores


def test_a_metric_is_an_entry_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    length = Metric("length", "length in characters", "length", lambda _, prediction: float(len(prediction)))
    for metrics in (METRICS, PER_ROW):
        monkeypatch.setitem(metrics, "length", length)
    scores, rows = score.score(ROWS)
    assert scores["length"] == statistics.fmean(len(row["prediction"]) for row in ROWS)
    low, high = scores["intervals"]["length"]
    assert low <= scores["length"] <= high
    compared = compare.compare(compare.Predictions(rows), compare.Predictions(rows))
    assert [row["score"] for row in compared] == ["bleu4", "rouge_l", "length"]


def test_older_scores_of_rows_are_dropped() -> None:
    before = [row | {"bertscore_f1": 0.5, "bleu4": 1.0, "exact": True} for row in ROWS[:2]]
    assert score.score([*before, *ROWS[2:]]) == score.score(ROWS)


def test_shares_and_lengths() -> None:
    scores, rows = score.score(ROWS)
    assert [row["exact"] for row in rows] == [False, True, False, False, False]
    assert (scores["rows"], scores["exact"], scores["empty"], scores["repeated"]) == (5, 0.2, 0.2, 0.4)
    assert scores["length_ratio"] == pytest.approx((1 + 6 + 0 + 1 + 1) / (5 + 6 + 2 + 3 + 2))


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
    (row,) = score.with_scores([{"reference": reference, "prediction": prediction}])
    assert row["rouge_l"] == pytest.approx(expected)


def test_bertscore_is_named_with_its_model() -> None:
    scores, rows = score.score(ROWS, bertscore.judge(None, None, rehearsal=True))
    assert scores["bertscore"]["model"] == "all-MiniLM-L6-v2"
    assert scores["bertscore_f1"] == pytest.approx(statistics.fmean(row["bertscore_f1"] for row in rows))
    assert rows[1]["bertscore_f1"] == pytest.approx(1, abs=1e-5)


def test_the_command_prints_scores_and_writes_rows(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in ROWS))
    result = recipe("score", "pairs.jsonl", "--out", "scored.jsonl", "--bertscore", "none", "--json")
    assert result.returncode == 0, result.stderr
    assert orjson.loads(result.stdout) == score.score(ROWS)[0]
    assert list(map(orjson.loads, (tmp_path / "scored.jsonl").read_bytes().splitlines())) == score.score(ROWS)[1]
    assert "bleu4" in recipe("score", "pairs.jsonl").stdout


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs CodeReviewer's predictions, which are not ours to ship")
def test_the_baselines_predictions_score_as_recomputed() -> None:
    from qlora_recipes.data import study

    rows = score.with_scores(score.read_rows(SHARED / "codereviewer-test-predictions.jsonl"))
    assert statistics.fmean(row["bleu4"] for row in rows) == pytest.approx(5.44, abs=0.005)
    of_study = study.find("haider2024")
    (baseline,) = [b for b in of_study.baselines if "recomputed" in b.name]
    subset = of_study.data.subsets[baseline.test_set]
    positions = orjson.loads((of_study.folder / str(subset.positions)).read_bytes())["rows"]
    on_subset = statistics.fmean(rows[idx]["bleu4"] for idx in positions)
    assert 5.4 < on_subset < 5.5
    assert on_subset == pytest.approx(baseline.bleu4, abs=0.005)
