import statistics
from typing import Any

import orjson
import pytest
from scipy import stats

from qlora_recipes.base.errors import UserError
from qlora_recipes.evaluate import score
from qlora_recipes.evaluate.predict import as_row
from qlora_recipes.evaluate.score import columns_of
from qlora_recipes.evaluate.scores_file import Scores
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.metric import ScoringInput
from qlora_recipes.metrics.text import bleu4

ROWS = [
    {"reference": "please fix this typo now", "prediction": "fix"},
    {"reference": "Same text, four tokens.", "prediction": "Same text, four tokens. ", "lang": "py"},
    {"reference": "why?", "prediction": ""},
    {"reference": "use a constant", "prediction": "nit"},
    {"reference": "name this", "prediction": "nit"},
]


USUAL = registry.columns(dict.fromkeys(("bleu4", "rouge_l", "bertscore_f1", "sacrebleu")))


def scored(rows: list[dict[str, Any]]) -> tuple[Scores, list[dict[str, Any]]]:
    """Rows with the usual scores, but for BERTScore."""
    return score.score(rows, USUAL, {"bertscore_f1": None})


def test_rows_keep_their_own_scores_and_their_means_are_the_scores():
    scores, rows = scored(ROWS)
    assert [row["bleu4"] for row in rows] == [pytest.approx(bleu4(row["reference"], row["prediction"])) for row in ROWS]
    assert scores.scores["bleu4"].value == pytest.approx(statistics.fmean(row["bleu4"] for row in rows))
    assert scores.scores["rouge_l"].value == pytest.approx(statistics.fmean(row["rouge_l"] for row in rows))
    assert rows[1]["lang"] == "py"
    low, high = scores.scores["bleu4"].interval
    assert low <= scores.scores["bleu4"].value <= high
    assert "bertscore_f1" not in scores.scores
    assert scores.flat()["sacrebleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_groups_of_rows_count_alike_in_their_mean():
    right = {"a": [1, 1, 1, 0] * 5, 2: [1, 0] * 5, "c": [0] * 5, "few": [0, 1]}
    rows = [
        as_row(0, {"group": group}, "x") | {"prediction": "x" if is_right else "y"}
        for group, of_group in right.items()
        for is_right in of_group
    ]
    columns = registry.columns(
        {
            "average": {"metric": "mean_of_groups", "of": "exact_match"},
            "of_few": {"metric": "mean_of_groups", "of": "exact_match", "group": "few"},
            "of_b": {"metric": "mean_of_groups", "of": "exact_match", "group": "2"},
            "exact_match": {},
        }
    )
    few, _ = score.score(rows, columns, {})
    assert few.scores["of_few"].value == 50
    assert few.scores["of_few"].interval is None
    assert few.scores["average"].interval is None
    del columns["of_few"]
    scores, scored_rows = score.score([row for row in rows if row["group"] != "few"], columns, {})
    assert scores.scores["average"].value == pytest.approx(125 / 3)
    assert scores.scores["of_b"].value == 50
    counts = ((15, 20), (5, 10), (0, 5))
    variances = [(p := (x + 2) / (n + 4)) * (1 - p) / (n + 4) for x, n in counts]
    half = 100 * stats.norm.ppf(0.975) * sum(variances) ** 0.5 / 3
    assert scores.scores["average"].interval == pytest.approx([125 / 3 - half, 125 / 3 + half])
    wilson = stats.binomtest(5, 10).proportion_ci(method="wilson")
    assert scores.scores["of_b"].interval == pytest.approx([100 * wilson.low, 100 * wilson.high])
    assert "average" not in scored_rows[0]
    for of in ("nope", "sacrebleu", "bertscore_f1"):
        with pytest.raises(UserError, match=of):
            columns_of("", ["sacrebleu", "bertscore_f1", f"m: {{metric: mean_of_groups, of: {of}}}"])


def test_a_mean_of_groups_has_no_value_without_rows_of_each_group():
    over = {"metric": "mean_of_groups", "of": "exact_match"}
    of_groups = {f"of_{group}": over | {"group": group} for group in ["a", "b"]}
    columns = registry.columns({"average": over, "exact_match": {}} | of_groups)
    rows = [as_row(i, {"group": "a"}, "x") | {"prediction": "x"} for i in range(9)]
    scores, _ = score.score(rows, columns, {}, ScoringInput(groups=["a", "b"]))
    assert scores.scores["average"].value is None
    assert scores.scores["average"].interval is None
    assert scores.scores["of_a"].value == 100
    noted = ["average: no mean, because no row of b was scored", "of_b: no mean, because no row of b was scored"]
    assert scores.flat()["notes"] == noted
    rows.append(as_row(9, {"group": "b"}, "x") | {"prediction": "y"})
    complete, _ = score.score(rows, columns, {}, ScoringInput(groups=["a", "b"]))
    assert complete.scores["average"].value == 50
    assert "notes" not in complete.flat()


def test_older_scores_of_rows_are_dropped():
    before = [row | {"bertscore_f1": 0.5, "bleu4": 1.0} for row in ROWS[:2]]
    assert scored([*before, *ROWS[2:]]) == scored(ROWS)


def test_shares_of_empty_and_repeated_predictions():
    scores, _ = scored(ROWS)
    assert scores.shares.rows == 5
    assert scores.shares.empty == 0.2
    assert scores.shares.repeated == 0.4


def test_bertscore_is_named_with_its_model():
    scores, rows = score.score(ROWS, USUAL, score.scorer_models(USUAL, None, rehearsal=True))
    assert scores.scores["bertscore_f1"].scorer.model == "all-MiniLM-L6-v2"
    assert scores.scores["bertscore_f1"].value == pytest.approx(statistics.fmean(row["bertscore_f1"] for row in rows))
    assert rows[1]["bertscore_f1"] == pytest.approx(1, abs=1e-5)


def test_the_command_prints_scores_and_writes_rows(recipe, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in ROWS))
    scores, rows = scored(ROWS)
    metrics = [word for name in USUAL for word in ("--metric", name)]
    printed = recipe.json("score", "pairs.jsonl", "--out", "scored.jsonl", *metrics, "--metric", "bertscore:none")
    assert printed == scores.flat()
    assert list(map(orjson.loads, (tmp_path / "scored.jsonl").read_bytes().splitlines())) == rows
    assert "`--metric bertscore:roberta-large`" in recipe("score", "pairs.jsonl", "--metric", "bertscore_f1").stderr


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        pytest.param((1.0, 3.0), [1.0, 3.0], id="of some rows"),
        pytest.param(None, None, id="of too few rows, or of all rows together"),
    ],
)
def test_json_has_an_interval_for_each_score(interval, shown):
    record = {"value": 2.0, "interval": interval, "declaration": {"metric": "sacrebleu"}}
    scores = Scores.model_validate({"scores": {"x": record}, "shares": {"rows": 9}})
    assert scores.flat()["intervals"] == {"x": shown}


def test_the_command_names_scores_as_results_and_reports_do(recipe, tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in ROWS))
    lines = recipe("score", "pairs.jsonl").stdout.splitlines()
    assert [line.rpartition("  ")[0].split("  ")[0] for line in lines if line] == [
        "score",
        "rows",
        "exact match, %",
        "empty predictions, share of rows",
        "repeated predictions, share of rows",
    ]
