"""What a run was made with, beside what is installed now."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.base import paths
from qlora_recipes.runs import provenance
from qlora_recipes.runs.provenance import other_axolotl

NAME = "haider2024/code-llama-7b"
OURS = version("axolotl")


@pytest.mark.parametrize("packages", [None, {}, [], "text", {"axolotl": None}, {"axolotl": OURS}])
def test_nothing_is_said_of_the_same_axolotl_or_of_one_that_is_not_recorded(packages: Any) -> None:
    assert other_axolotl(packages) == ""


def test_the_index_of_the_checkout_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    monkeypatch.setattr(paths, "LOCK", tmp_path / "recipe.yaml")
    monkeypatch.setattr(paths, "RECIPES", tmp_path)
    paths.LOCK.write_text("lora_r: 8")
    for words in (("init", "--quiet"), ("add", "recipe.yaml"), ("commit", "--quiet", "--message", "a recipe")):
        git(*words)
    os.utime(paths.LOCK, (1, 1))  # status would note that its content is the same
    index = (tmp_path / ".git" / "index").read_bytes()
    made = provenance.collect()["git"]
    assert made and not made["dirty"]
    assert (tmp_path / ".git" / "index").read_bytes() == index


@pytest.mark.parametrize("words", [["report", "latest"], ["results"], ["cancel", "latest"]])
def test_a_run_of_another_axolotl_says_so_where_it_is_used(recipe: Recipe, tmp_path: Path, words: list[str]) -> None:
    folder = a_run(tmp_path / "runs", NAME, "one", 5.0, provenance={"packages": {"axolotl": "0.20.1"}})
    (said,) = [line for line in recipe(*words).stderr.splitlines() if "0.20.1" in line]
    assert str(folder.path.relative_to(tmp_path)) in said and OURS in said
