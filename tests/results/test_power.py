"""What a study's runs can see rests on the runs there, or on what was published, and says so."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import small_study
from conftest import Recipe
from small_study import PLAIN, WIDE

from qlora_recipes.base.files import write_rows
from qlora_recipes.data import study
from qlora_recipes.results import power
from qlora_recipes.scores import noise

ROWS = 400


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for runs in a folder of work with the small study."""
    small_study.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def of_seeds(runs: Path, seeds: int, recipe: str = PLAIN, **more: Any) -> list[list[float]]:
    """Runs of a recipe with so many seeds, and their scores of each row: rows are hard, and seeds bad, by chance."""
    rng = np.random.default_rng(len(recipe))
    hard, table = rng.normal(size=ROWS), []
    for seed in range(42, 42 + seeds):
        right = 100.0 * (hard + 0.1 * rng.normal() + 0.5 * rng.normal(size=ROWS) > 0)
        changed = {"seed": seed} if seed != 42 else {}
        folder = small_study.ran(runs, recipe, f"2026-{seed}", float(right.mean()), set=changed, **more)
        rows = [
            {"row": i, "accuracy": value, "reference": "1", "prediction": "1"} for i, value in enumerate(right.tolist())
        ]
        write_rows(folder.path / "predictions.jsonl", rows)
        table.append(right.tolist())
    return table


def test_runs_of_several_seeds_tell_all_of_it(runs: Path) -> None:
    one, other = of_seeds(runs, 3), of_seeds(runs, 2, WIDE)
    found = power.outlook(small_study.read(), runs)
    assert re.findall(r"(\d) runs \w+ (\S+)", found["rests_on"]) == [("3", PLAIN), ("2", WIDE)]
    expected = noise.estimated([noise.mean_squares(one), noise.mean_squares(other)])
    assert found["deviation_of_rows"] == pytest.approx(expected.of_rows**0.5)
    assert found["deviation_of_a_row_in_a_run"] == pytest.approx(expected.rest**0.5)
    assert found["difference"] == 1
    assert [(row["seeds"], row["rows"]) for row in found["rows"]] == [
        (seeds, rows) for rows in (400, 200, 100) for seeds in (1, 2, 3, 5, 10)
    ]
    by_seeds = {row["seeds"]: row for row in found["rows"][:5]}
    assert by_seeds[10]["sees"] > by_seeds[3]["sees"] and by_seeds[10]["smallest"] < by_seeds[3]["smallest"]
    assert found["rows"][4]["smallest"] < found["rows"][14]["smallest"]  # with a quarter of the rows
    assert all(0.03 <= row["false_alarms"] <= 0.07 for row in found["rows"] if row["seeds"] > 1)
    assert by_seeds[1]["false_alarms"] > by_seeds[10]["false_alarms"] and found["one_run"] == noise.ROWS_ONLY
    planned = noise.power(expected, 3, 400)
    assert by_seeds[3]["sees"] == pytest.approx(planned.sees(1)) and planned.sees(by_seeds[3]["smallest"]) >= 0.8


def test_a_larger_difference_is_seen_more_often(runs: Path) -> None:
    of_seeds(runs, 3)
    chances = [power.outlook(small_study.read(), runs, x)["rows"][2]["sees"] for x in (1, 5, 20)]
    assert chances == sorted(chances) and chances[0] < 0.1 and chances[2] > 0.4


def test_what_it_lacks_is_told(runs: Path, recipe: Recipe) -> None:
    for seeds in (0, 1):
        of_seeds(runs, seeds)
        lacks = recipe("results", "--power", "sums2030")
        assert lacks.returncode == 2
        assert "recipe reproduce sums2030 --seeds 3" in lacks.stderr
    both = recipe("results", "--power", "sums2030", "--study", "sums2030")
    assert both.returncode == 2
    assert "--power" in recipe("results", "--difference", "0").stderr
    assert recipe("results", "--power", "sums2030", "--difference", "nan").returncode == 2


def test_too_few_rows_to_plan_with_are_told(runs: Path, recipe: Recipe) -> None:
    of_seeds(runs, 3)
    for file in runs.rglob("predictions.jsonl"):
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[-4:]))
    done = recipe("results", "--power", "sums2030")
    assert (done.returncode, "4 rows" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "more", [{"rehearsal": True}, {"settings": {"test_set": "test"}}, {"state": "failed"}, {"set_again": True}]
)
def test_runs_that_do_not_compare_tell_nothing(runs: Path, recipe: Recipe, more: dict[str, Any]) -> None:
    again = more.pop("set_again", False)
    of_seeds(runs, 3, **more)
    if again:  # all of one seed
        for folder in runs.glob(f"{PLAIN}/*"):
            (folder / "config.yaml").write_text((runs / PLAIN / "2026-42" / "config.yaml").read_text())
    assert recipe("results", "--power", "sums2030").returncode == 2


def test_published_repeats_stand_in_for_seeds(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "sums2030").rename(tmp_path / "before")
    published = {PLAIN: {"scores": {"accuracy": 60}, "repeats": {"accuracy": [60, 61.0, 62.0]}}, WIDE: {}}
    small_study.write(tmp_path, published=published, tolerances={"accuracy": 2.5})
    found = power.outlook(small_study.read(), runs)
    assert found["deviation_of_runs"] == 1 and found["deviation_of_rows"] == pytest.approx((60 * 40) ** 0.5)
    rests_on = found["rests_on"]
    assert rests_on.startswith("3 ") and PLAIN in rests_on and "60 %" in rests_on
    assert (found["rows"][0]["rows"], found["difference"]) == (5000, 2.5)
    assert noise.BORROWED in found["one_run"]
    (table,) = of_seeds(runs, 1)
    found = power.outlook(small_study.read(), runs)
    assert found["rests_on"].count(PLAIN) == 2 and "%" not in found["rests_on"]
    assert (found["deviation_of_rows"], found["rows"][0]["rows"]) == (pytest.approx(np.std(table, ddof=1)), ROWS)


def test_a_published_score_that_none_can_have_tells_nothing_of_rows(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "sums2030").rename(tmp_path / "before")
    published = {PLAIN: {"scores": {"accuracy": 120}, "repeats": {"accuracy": [60, 60.0]}}, WIDE: {}}
    small_study.write(tmp_path, published=published)
    with pytest.raises(power.UserError, match="--only"):
        power.outlook(small_study.read(), runs)


def test_a_metric_of_no_range_needs_a_difference_and_one_of_no_rows_has_no_power(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes" / "sums2030").rename(tmp_path / "before")
    small_study.write(
        tmp_path, metrics={"perplexity": {}}, columns=["perplexity"], published={PLAIN: {}, WIDE: {}}, tolerances={}
    )
    with pytest.raises(power.UserError, match="--difference"):
        power.outlook(small_study.read(), runs)
    with pytest.raises(power.UserError, match="perplexity"):
        power.outlook(small_study.read(), runs, 0.1)


def test_peft_can_be_planned_before_any_run(recipe: Recipe) -> None:
    found = orjson.loads(recipe("results", "--power", "peft", "--json").stdout)
    assert found["difference"] == study.find("peft").tolerances["accuracy"]
    assert found["deviation_of_runs"] == pytest.approx(np.std([47.84, 48.22, 49.05], ddof=1))
    table = recipe("results", "--power", "peft", "--difference", "4")
    assert "sees 4.00" in table.stdout
    assert recipe("results", "--power", "peft", "--csv").stdout.startswith("seeds,rows,sees,smallest,false_alarms\n")
