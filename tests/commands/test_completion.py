"""Completions that a shell offers after the tabulator key."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RECIPE, Recipe

from qlora_recipes.base import paths

Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """Completions at the end of a command line, as bash asks for them."""

    def offered(line: str) -> list[str]:
        monkeypatch.setenv("_RECIPE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        done = recipe()
        assert done.returncode == 0
        assert done.stderr == ""
        return done.stdout.split()

    return offered


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with runs, a variant and a file."""
    for run in ("haider2024/llama-2-7b/20260101-000000-aaaaaaa", "wide/20260102-000000-bbbbbbb"):
        for runs in ("runs", "elsewhere/of-wide"):
            (tmp_path / runs / run).mkdir(parents=True)
            (tmp_path / runs / run / "run.json").touch()
    for file in ("variants/wide.yaml", "mine.yaml", "more/other.yml", "more/notes.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


RUNS = ["latest", "haider2024/llama-2-7b", "wide", "20260101-000000-aaaaaaa", "20260102-000000-bbbbbbb"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("recipe res", ["resume", "results"]),
        ("recipe run ", ["wide", *paths.recipe_names(), "mine.yaml"]),
        ("recipe run haider2024/as-rel", ["haider2024/as-released/llama-3-8b"]),
        ("recipe evaluate ", RUNS),
        ("recipe --runs elsewhere/of-wide publish haid", ["haider2024/llama-2-7b"]),
        ("recipe results hai", ["haider2024/llama-2-7b", "haider2024"]),
        ("recipe sweep wide ", ["lora-tradeoffs", "rate-and-rank", "targets", "mine.yaml"]),
        ("recipe run wide --profile zero3", ["zero3", "zero3-offload"]),
        ("recipe reproduce ", [folder.name for folder in paths.studies()]),
        ("recipe run wide --set lora_alpha", ["lora_alpha=", "lora_alpha_pattern="]),
    ],
)
def test_names_are_completed(complete, place, line, offered):
    assert complete(line) == offered


def test_without_runs_there_is_no_latest(complete):
    assert complete("recipe evaluate ") == []


def test_quick_commands_and_completions_import_nothing_heavy(place):
    heavy = ["torch", "numpy", "pydantic", "rich.table", "jsonschema", "qlora_recipes.run", "qlora_recipes.check"]
    code = f"""
import json, os, sys
from qlora_recipes import cli
for words in (["list"], ["show", "{paths.recipe_names()[0]}"], ["--runs", "none", "results"]):
    assert cli.main(words) == 0
for line in ("recipe run co", "recipe evaluate ", "recipe run x --set l"):
    os.environ |= {{"_RECIPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}}
    cli.main([])
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""
    done = subprocess.run(
        [RECIPE.with_name("python"), "-c", code], cwd=place, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "lora_r=" in done.stdout
