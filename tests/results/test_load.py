"""Files that lists of many runs read."""

from collections import Counter
from pathlib import Path

import pytest
from run_folders import a_run

from qlora_recipes.base import yamlfiles
from qlora_recipes.run import rundir
from qlora_recipes.run.rundir import RunDir

COMMANDS = [("results",), ("results", "--json"), ("results", "haider2024")]


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    return [a_run(tmp_path / "runs", "haider2024/llama-2-7b", f"2026-{number}", 5.0) for number in range(4)]


@pytest.mark.parametrize("words", COMMANDS)
def test_results_of_finished_runs_read_no_log(words, recipe, runs, monkeypatch):
    def read_metrics(self: RunDir, since: int = 0) -> None:
        raise AssertionError(f"read {self.metrics}")

    monkeypatch.setattr(RunDir, "read_metrics", read_metrics)
    recipe.ok(*words)


def test_results_of_a_study_read_each_config_once(recipe, runs, monkeypatch):
    read: Counter[str] = Counter()

    def counted(file: Path) -> yamlfiles.Config:
        read[str(file)] += 1
        return yamlfiles.read_yaml(file)

    monkeypatch.setattr(rundir, "read_yaml", counted)
    recipe.ok("results", "haider2024")
    assert read == {str(Path("runs", *run.config_file.parts[-4:])): 1 for run in runs}
