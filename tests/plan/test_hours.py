"""Hours of the built-in recipes, in recipes/hours.json and in the tables that show them."""

from collections.abc import Iterable
from typing import Any

import pytest

from qlora_recipes.base import paths
from qlora_recipes.base.files import Row, read_json
from qlora_recipes.data import studies

REMEDY = "run `.venv/bin/python tools/plans.py` and `recipe render`"


@pytest.fixture
def built_in() -> dict[str, Any]:
    return read_json(paths.HOURS)


def test_each_recipe_has_hours_and_the_published_ones_are_those_of_its_log(built_in):
    hours = built_in["recipes"]
    assert hours.keys() <= set(paths.recipe_names()), REMEDY
    for study in studies.load_all():
        for name, results in study.published.items():
            if results.log and results.log.train_seconds:
                expected = pytest.approx(results.log.train_seconds / 3600, abs=0.005, rel=0.05)
                assert hours[name] == {"hours": expected, "hours_are": "published"}, REMEDY


MARKS = ["published", "estimated", "estimated, full rows"]
"""Sources of hours, from the surest to the least sure."""


def total_of(rows: Iterable[Row]) -> str:
    total = sum(row["hours"] for row in rows)
    return f"{total:,.0f}" if total >= 1000 else f"{total:.3g}"


def test_the_readme_shows_the_hours_of_each_study_and_of_its_cheapest_verdict(built_in):
    cells = {}
    for line in (paths.RECIPES.parent / "README.md").read_text().splitlines():
        if line.startswith("| `"):
            cells[line.split("`")[1]] = line.rstrip(" |").split(" | ")[-2:]
    expected = {}
    for folder in paths.studies():
        study = studies.load(folder)
        rows = {name: built_in["recipes"][name] for name in study.recipes}
        published = [rows[name] for name in study.published]
        cheapest = min(published, key=lambda row: row["hours"])
        total, everything = total_of(published), total_of(rows.values())
        if everything != total:
            total += f" ({everything} with ablations)"
        mark = max((row["hours_are"] for row in rows.values()), key=MARKS.index)
        expected[folder.name] = [f"{cheapest['hours']}, {cheapest['hours_are']}", f"{total}, {mark}"]
    assert cells == expected


def test_list_names_the_cheapest_run_with_a_verdict(recipe, built_in):
    cheapest = built_in["cheapest"]
    note = f"cheapest run with a verdict: {cheapest}; estimated hours are for one A100 80GB"
    assert recipe("list").stdout.splitlines()[-1] == note
    (row,) = [row for row in recipe.json("list") if row["recipe"] == cheapest]
    assert {key: row[key] for key in ("hours", "hours_are")} == built_in["recipes"][cheapest]
    assert f"{cheapest}`" in (paths.RECIPES.parent / "docs/first-gpu-run.md").read_text()
