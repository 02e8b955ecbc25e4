"""What a pipeline does with commands, jobs and failures; test_reproduce.py and test_sweep.py have the commands."""

from pathlib import Path

import pytest

from qlora_recipes import pipeline
from qlora_recipes.errors import UserError
from qlora_recipes.pipeline import Outcome


def commands(words: list[str], outcome: Outcome, codes: list[int]) -> pipeline._Commands:
    """A recipe's commands, as `work` yields them; what became of each is noted."""
    for _ in range(2):
        code, _shown = yield words
        codes.append(code)
    outcome.steps["run"] = "done"


def test_jobs_each_see_a_gpu_of_their_own_and_write_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    devices = pipeline.devices_for(2, rehearsal=False)
    assert devices == ["5", "7"]
    with pytest.raises(UserError, match="--jobs 3: one GPU a job, and this machine has 2"):
        pipeline.devices_for(3, rehearsal=False)
    assert pipeline.devices_for(3, rehearsal=True) == [None, None, None]
    outcomes, codes = [Outcome("a"), Outcome("b"), Outcome("c")], list[int]()
    works = [(outcome, commands(["show", "nothing"], outcome, codes)) for outcome in outcomes]
    pipeline.work_off(works, devices, tmp_path)
    assert codes == [2] * 6
    assert [outcome.steps for outcome in outcomes] == [{"run": "done"}] * 3
    assert "no recipe of that name" in (tmp_path / "c" / "reproduce.log").read_text()


def test_exit_codes() -> None:
    fine, refused, failed = Outcome("a"), Outcome("b"), Outcome("c")
    refused.fail("check", "wrong")
    failed.fail("run", "broke")
    codes = [pipeline.exit_code(some) for some in ([fine], [fine, refused], [refused], [refused, failed])]
    assert codes == [0, 1, 2, 1]
