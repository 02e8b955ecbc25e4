"""The Python interface: its functions, its page's example, and its types."""

import os
import re
import subprocess
import sys

import pytest
from conftest import SUPPORT

from qlora_recipes import api
from qlora_recipes.base.errors import UserError
from qlora_recipes.config.compose import Request
from qlora_recipes.config.merging import Override
from qlora_recipes.plan.plan import plan_request

NAME = "haider2024/code-llama-7b"
PAGE = SUPPORT.parents[1] / "docs" / "python.md"
SCRIPT = """\
from qlora_recipes import api

run: api.Run = api.find_run("latest")
loss: float | None = run.scores.get("eval_loss")
hours: float | None = api.plan("start/qlora", {"lora_r": 64}, gpus=2).trainable_share
names: list[str] = [finding.name for finding in api.check("start/qlora")]
reveal_type(api.evaluate(run, limit=2).scores)
"""


def example() -> str:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]


def test_trainings_wait_as_those_of_the_command():
    code = "import os; from qlora_recipes import api; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "PASSIVE\n"


def test_recipes_are_those_of_a_pattern(place):
    assert api.recipes("haider2024/llama-3*") == [f"haider2024/llama-3{size}" for size in ("-8b", ".1-8b", ".2-3b")]


def test_a_check_finds_what_a_setting_breaks(place, validates_here):
    errors = [finding for finding in api.check(NAME, {"lora_rr": 8}) if finding.level == "error"]
    assert [(finding.key, finding.level) for finding in errors] == [("lora_rr", "error")]
    assert [finding for finding in api.check(NAME, force=["x"]) if finding.level == "error"] == []


def test_a_plan_is_that_of_the_command(place):
    planned = api.plan("start/qlora", {"num_epochs": 2}, gpus=2)
    assert planned == plan_request(Request("start/qlora", overrides=[Override("num_epochs", 2)], gpus=2))


def test_a_run_leads_to_its_table(with_fake_axolotl, place, capsys):
    run = api.run(NAME, {"num_epochs": 1}, rehearse=True)
    assert (run.state, run.config["num_epochs"], run.scores) == ("finished", 1, {})
    assert run.metrics["loss"].dropna().size == 4
    assert run == api.find_run("latest") == api.find_run("code-llama-7b")
    table = api.results(where="num_epochs == 1", columns=["run", "state", "num_epochs"])
    assert table.to_dict("records") == [{"run": str(run.path), "state": "finished", "num_epochs": 1}]
    assert capsys.readouterr().out == ""


def test_a_wrong_request_raises_the_commands_message(place):
    with pytest.raises(UserError, match="did you mean haider2024/code-llama-7b"):
        api.run("haider2024/code-lama-7b")
    with pytest.raises(UserError, match="B200"):
        api.check(NAME, gpu="none such")


def test_an_evaluation_is_read_with_its_run(run, place):
    evaluation = api.evaluate(api.Run(run.path), limit=2, base=True, metrics=["bertscore:none"])
    assert evaluation.settings.rows == 2
    assert api.Run(run.path).evaluation is None  # of the adapter, there is none


@pytest.mark.long
def test_the_example_of_the_page_runs(place, capsys):
    exec(example(), {})
    printed = capsys.readouterr().out
    assert "finished 0.0002" in printed and "prediction" in printed


@pytest.mark.long
def test_a_users_script_has_types(tmp_path):
    file, packages = tmp_path / "script.py", tmp_path / "packages"
    file.write_text(SCRIPT)
    packages.mkdir()
    (packages / "qlora_recipes").symlink_to(SUPPORT.parents[1] / "scripts")  # mypy does not follow a checkout's link
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "--follow-imports=silent", file]
    environment = os.environ | {"MYPYPATH": str(packages)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "Success: no issues found in 1 source file", done.stdout
    assert "dict[str, qlora_recipes.metrics.metric.ScoreRecord]" in done.stdout
