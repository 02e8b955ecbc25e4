"""A run folder that an earlier version left is still listed, scored and reported.

tests/support/old_run is a rehearsal by revision 24b9ed8, before there was a loss per token, a reason for a run's end or
the version of a score; its folders are placeholders, and its adapter and checkpoints are left out. So are those of
tests/support/old_run_interrupted, by revision 167dafe, when an ungated copy was an option.
"""

import shutil
from pathlib import Path

import pytest
from conftest import SUPPORT

from qlora_recipes.runs.rundir import RunDir

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / NAME / "20261126-101023-e5c4a94"
    shutil.copytree(SUPPORT / "old_run", folder)
    return folder


def test_an_old_run_is_listed(recipe, old_run):
    (row,) = recipe.json("results")
    assert (row["recipe"], row["state"], row["ended"]) == (NAME, "finished", None)
    assert (row["eval_loss"], row["eval_loss_axolotl"]) == (None, pytest.approx(4.1054, abs=1e-4))
    assert (row["rehearsal"], row["rows_evaluated"]) == (True, 12)
    assert row["bleu4"] == pytest.approx(1.4204, abs=1e-4)
    assert "1.42" in recipe("results").stdout
    assert NAME in recipe("results", "haider2024", "--rehearse").stdout


def test_an_old_run_is_reported_and_compared_but_not_published_without_its_adapter(recipe, old_run, tmp_path):
    recipe.json("results", str(old_run), str(old_run))
    recipe.ok("report", str(old_run))
    assert "4.105" in (tmp_path / "report.html").read_text()
    done = recipe("publish", str(old_run))
    assert (done.returncode, "recipe run" in done.stderr) == (2, True)


def test_a_run_that_an_earlier_version_left_unfinished_is_read_as_todays(recipe, tmp_path):
    folder = tmp_path / "runs" / "haider2024/llama-3-8b" / "20261128-202704-883091f"
    shutil.copytree(SUPPORT / "old_run_interrupted", folder)
    assert RunDir(folder).read().profiles == ["rehearsal", "mirror"]
    (row,) = recipe.json("results")
    assert (row["state"], row["step"], row["steps"], row["changed_keys"]) == ("interrupted", 2, 12, "num_epochs")
    recipe.ok("report", "latest")
    recipe.fails("cancel", "latest")
    strange, moved = recipe("resume", "latest"), recipe("resume", "latest", "--trust")
    assert (strange.returncode, "--trust" in strange.stderr, moved.returncode) == (2, True, 2)
    assert "/home/someone/work/runs/" in moved.stderr
