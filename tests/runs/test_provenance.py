"""What a run was made with, beside what is installed now."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.runs.provenance import other_axolotl

NAME = "haider2024/code-llama-7b"
OURS = version("axolotl")


@pytest.mark.parametrize("packages", [None, {}, [], "text", {"axolotl": None}, {"axolotl": OURS}])
def test_nothing_is_said_of_the_same_axolotl_or_of_one_that_is_not_recorded(packages: Any) -> None:
    assert other_axolotl(packages) == ""


@pytest.mark.parametrize("words", [["report", "latest"], ["results"], ["cancel", "latest"]])
def test_a_run_of_another_axolotl_says_so_where_it_is_used(recipe: Recipe, tmp_path: Path, words: list[str]) -> None:
    folder = a_run(tmp_path / "runs", NAME, "one", 5.0, provenance={"packages": {"axolotl": "0.20.1"}})
    (said,) = [line for line in recipe(*words).stderr.splitlines() if "0.20.1" in line]
    assert str(folder.path.relative_to(tmp_path)) in said and OURS in said
