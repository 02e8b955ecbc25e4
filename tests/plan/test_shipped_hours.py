"""Hours of the shipped recipes, in recipes/hours.json and in the tables that show them."""

import pytest

from qlora_recipes.base import paths
from qlora_recipes.data import studies
from qlora_recipes.plan import shipped_hours
from qlora_recipes.plan.shipped_hours import PUBLISHED, Hours

REMEDY = "run `.venv/bin/python tools/plans.py` and `recipe render`"


def test_each_recipe_has_hours_and_the_published_ones_are_those_of_its_log():
    hours = shipped_hours.read().recipes
    assert hours.keys() <= set(paths.recipe_names()), REMEDY
    for study in studies.load_all():
        for name, results in study.published.items():
            if results.log and results.log.train_seconds:
                assert hours[name] == (pytest.approx(results.log.train_seconds / 3600, abs=1e-4), PUBLISHED), REMEDY


def test_the_readme_shows_the_shortest_training_of_each_study():
    hours = shipped_hours.read().recipes
    cells = {}
    for line in (paths.RECIPES.parent / "README.md").read_text().splitlines():
        if line.startswith("| `"):
            cells[line.split("`")[1]] = line.rstrip(" |").rpartition(" | ")[2]
    for study in paths.studies():
        shortest = min(of_recipe for name, of_recipe in hours.items() if name.startswith(f"{study.name}/"))
        assert cells[study.name] == str(Hours(*shortest))


def test_list_names_the_cheapest_run_with_a_verdict(recipe):
    shipped = shipped_hours.read()
    assert shipped.note in recipe("list").stdout
    (row,) = [row for row in recipe.json("list") if row["recipe"] == shipped.cheapest]
    assert (row["hours"], row["hours_are"]) == shipped.recipes[shipped.cheapest]
    assert f"{shipped.cheapest}`" in (paths.RECIPES.parent / "docs/first-gpu-run.md").read_text()
