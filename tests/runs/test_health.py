import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.runs import health, rundir

STEP = {"max_steps": 99, "step_seconds": 4.0}


def records(*losses: float | None) -> list[dict[str, Any]]:
    return [STEP | {"time": 4.0 * step, "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([2.0, 1.5, None, None], "NaN 3"),
        ([2.0, None, 1.5], None),
        ([2.0] * 10 + [1.0] * 10 + [9.0] * 10, "9 1"),
        ([2.0] * 10 + [9.0] * 5, None),
        ([2.0] * 10 + [0.01] * 10 + [0.05] * 10, None),  # little learnt anew is no divergence
        ([2.0] * 10 + [9.0] * 10 + [1.0] * 10, None),
        ([], None),
    ],
)
def test_a_loss_that_is_none_or_diverges_is_told(losses: list[float | None], says: str | None) -> None:
    told = health.of_losses(records(*losses))
    assert rundir.summarise(records(*losses)).trouble == told
    assert (told and " ".join(re.findall(r"NaN|\d+", told))) == says


def test_it_stands_in_results_report_and_card(recipe: Recipe, tmp_path: Path) -> None:
    run = a_run(tmp_path / "runs", "haider2024/code-llama-7b", "a", 5.0, state="failed")
    run.metrics.write_bytes(b"\n".join(map(orjson.dumps, records(2.0, None))))
    says = health.of_losses(records(2.0, None))
    assert says and "NaN" in says
    assert says in " ".join(recipe("results").stdout.split())
    assert orjson.loads(recipe("results", "--json").stdout)[0]["trouble"] == says
    recipe("report")
    assert says in (tmp_path / "report.html").read_text()
