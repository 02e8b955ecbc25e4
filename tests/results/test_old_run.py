"""A run folder that an earlier version left is still listed, scored and reported.

tests/support/old_run is a rehearsal by revision 24b9ed8, before there was a loss per token, a reason for a run's end or
the version of a score; its folders are placeholders, and its adapter and checkpoints are left out.
"""

import shutil
from pathlib import Path

import orjson
import pytest
from conftest import SUPPORT, Recipe

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / NAME / "20261126-101023-e5c4a94"
    shutil.copytree(SUPPORT / "old_run", folder)
    return folder


def test_an_old_run_is_listed(recipe: Recipe, old_run: Path) -> None:
    (row,) = orjson.loads(recipe("results", "--json").stdout)
    assert (row["recipe"], row["state"], row["ended"]) == (NAME, "finished", None)
    assert (row["eval_loss"], row["eval_loss_axolotl"]) == (None, pytest.approx(4.1054, abs=1e-4))
    assert (row["rehearsal"], row["rows_evaluated"]) == (True, 12)
    assert row["bleu4"] == pytest.approx(1.4204, abs=1e-4)
    assert "1.42" in recipe("results").stdout
    assert NAME in recipe("results", "haider2024", "--rehearse").stdout


def test_an_old_run_is_reported_and_compared_but_not_published_without_its_adapter(
    recipe: Recipe, old_run: Path, tmp_path: Path
) -> None:
    compared = recipe("results", str(old_run), str(old_run), "--json")
    assert compared.returncode == 0, compared.stderr
    assert recipe("report", str(old_run)).returncode == 0
    assert "4.105" in (tmp_path / "report.html").read_text()
    done = recipe("publish", str(old_run))
    assert (done.returncode, "recipe run" in done.stderr) == (2, True)
