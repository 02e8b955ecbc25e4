"""A study's ladder from what was scored at each rung: what the differences say, and how it is drawn."""

from pathlib import Path
from typing import Any

import pytest
import small_ladder
from run_folders import a_run
from small_ladder import RECIPE

from qlora_recipes.data import study
from qlora_recipes.data.study import Decoding
from qlora_recipes.results import ladder, verdict
from qlora_recipes.scores.evaluations import SCORES
from qlora_recipes.scores.released import Released

COLUMNS = {"bleu4": {"metric": "bleu4"}}
OF_RUN = {"test_set": "some", "rows": 4, "data_sha256": "rows"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for runs in a folder of work with the study, whose published score is 50.0."""
    small_ladder.write(tmp_path, "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def owner() -> ladder.Owner:
    return ladder.owners(small_ladder.read(), [RECIPE])[0]


def scores(bleu4: float, within: float = 1.0) -> dict[str, Any]:
    return {"rows": 4, "bleu4": bleu4, "intervals": {"bleu4": [bleu4 - within, bleu4 + within]}, "metrics": COLUMNS}


def predicted(runs: Path, bleu4: float) -> None:
    """Have the published predictions score so much."""
    where = ladder.scored_in(small_ladder.read(), runs, owner())["some"]
    where.mkdir(parents=True)
    about = {"made": "x", "version": 1, "code_sha256": "x", "files": {}, "verified": True, "matched": True}
    made = Released(scores=scores(bleu4), test_set="some", **about)
    (where / SCORES).write_text(made.model_dump_json())


def generated(runs: Path, bleu4: float, **settings: Any) -> None:
    """Have the published adapter score so much."""
    at = ladder.adapter_folder(small_ladder.read(), runs, owner(), False)
    folder = a_run(runs.parent / "x", RECIPE, "a", 0, scores=scores(bleu4), settings=OF_RUN | settings)
    at.parent.mkdir(parents=True, exist_ok=True)
    folder.path.rename(at)
    (at / "run.json").unlink()


def trained(runs: Path, bleu4: float, **settings: Any) -> None:
    """Have a run of the recipe score so much."""
    a_run(runs, RECIPE, "20260101-000000-aaaaaaa", 0, scores=scores(bleu4), settings=OF_RUN | settings)


def says(runs: Path) -> dict[str, str | None]:
    of_study = small_ladder.read()
    rows = ladder.rows(of_study, runs, False, verdict.rows(of_study, runs, False), only=[RECIPE])
    return {row["rung"]: row["bleu4_says"] for row in rows}


@pytest.mark.parametrize(
    ("score", "expected"),
    [(50.04, "scoring agrees"), (49.95, "scoring agrees"), (50.06, "scoring differs by +0.06")],  # 50.0 is printed
)
def test_scoring_agrees_to_the_last_printed_digit(runs: Path, score: float, expected: str) -> None:
    predicted(runs, score)
    assert says(runs)["predictions"] == expected


def test_each_rung_is_compared_with_the_one_above(runs: Path) -> None:
    predicted(runs, 50.0)
    generated(runs, 49.2)
    trained(runs, 45.0)
    assert says(runs) == {
        "published": None,
        "predictions": "scoring agrees",
        "adapter": "generation agrees",  # within its interval
        "training": "training differs by -4.20",
    }
    of_study = small_ladder.read()
    rows = ladder.rows(of_study, runs, False, verdict.rows(of_study, runs, False), only=[RECIPE])
    assert [row["bleu4_difference"] for row in rows] == [None, 0, pytest.approx(-0.8), -5]
    assert [row["bleu4_step"] for row in rows] == [None, 0, pytest.approx(-0.8), pytest.approx(-4.2)]


def test_what_lies_between_rungs_is_named_together_where_one_is_missing(runs: Path) -> None:
    trained(runs, 45.0)
    assert says(runs)["training"] == "scoring, generation and training differ by -5.00"
    generated(runs, 50.5)
    assert says(runs) == {
        "published": None,
        "predictions": None,
        "adapter": "scoring and generation agree",
        "training": "training differs by -5.50",
    }
    of_study = small_ladder.read()
    (predictions,) = [row for row in ladder.begun(of_study, runs, False, []) if row["of"] == RECIPE][1:2]
    assert predictions["problem"] == "not scored yet; `recipe reproduce reviews --from predictions` does that"


@pytest.mark.parametrize(
    "settings",
    [
        {"limit": 2, "rows": 2},
        {"test_set": "test", "data_sha256": "all"},
        {"decoding": Decoding(max_new_tokens=3)},
    ],
)
def test_scores_on_other_rows_or_decoded_otherwise_are_not_compared(runs: Path, settings: dict[str, Any]) -> None:
    predicted(runs, 50.0)
    generated(runs, 45.0, **settings)
    assert "generation" not in str(says(runs)["adapter"])
    trained(runs, 45.0)
    assert says(runs)["training"] == "generation and training differ by -5.00"


def test_a_run_on_the_rows_of_the_adapter_is_compared_with_that_alone(runs: Path) -> None:
    other = {"test_set": None, "data_sha256": "others"}
    generated(runs, 45.0, **other)
    trained(runs, 44.5, **other)
    assert says(runs)["training"] == "training agrees"


def test_a_score_by_a_metric_declared_otherwise_is_none(runs: Path) -> None:
    predicted(runs, 50.0)
    file = next(runs.rglob(SCORES))
    file.write_text(file.read_text().replace('{"metric":"bleu4"}', '{"metric":"chrf"}'))
    assert says(runs)["predictions"] is None


def test_the_first_studies_ladders_are_declared() -> None:
    of_loftq = ladder.owners(study.find("loftq-gsm8k"))
    assert [(one.name, one.adapter is not None) for one in of_loftq] == [
        ("loftq-gsm8k/llama-2-7b-loftq", True),
        ("loftq-gsm8k/llama-3-8b-loftq", True),
        ("GPT-3 6B, finetuned", False),
        ("GPT-3 6B, with a verifier", False),
    ]
    first, baseline = ladder.owners(study.find("haider2024"))
    assert first.name == "haider2024/llama-3-8b" and baseline.predictions and baseline.predictions.absent
