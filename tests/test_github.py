"""GitHub's files and CITATION.cff: `make lint` finds mistakes in each kind, and they fit the project."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
WORKFLOWS = Path(".github", "workflows")
FORMS = Path(".github", "ISSUE_TEMPLATE")
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="the container has no .github")


def steps(workflow: str) -> list[dict[str, Any]]:
    (job,) = yaml.safe_load((ROOT / WORKFLOWS / workflow).read_text())["jobs"].values()
    return job["steps"]


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        pytest.param(WORKFLOWS / "ci.yml", "runs-on:", "run-on:", id="workflow"),
        pytest.param(FORMS / "result.yml", "type: textarea", "type: text", id="issue form"),
        pytest.param(FORMS / "config.yml", "true", "perhaps", id="settings of issues"),
        pytest.param(Path("CITATION.cff"), "authors:", "author:", id="citation"),
    ],
)
def test_make_lint_finds_a_mistake(file, right, wrong, tmp_path):
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(TOOLS)
    for name in ("CITATION.cff", "Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (".locked", ".complete"):  # `make setup` has nothing left to do
        (tmp_path / ".venv" / name).touch()
    text = (ROOT / file).read_text()
    (tmp_path / file).write_text(text.replace(right, wrong, 1))
    done = subprocess.run(["make", "UV=uv", "lint-github"], cwd=tmp_path, capture_output=True, text=True)
    assert re.findall(r"^ +(\S+?)::", done.stdout, re.MULTILINE)[:1] == [str(file)]
    assert done.returncode == 2


@pytest.mark.parametrize("workflow", ["ci.yml", "verify.yml"])
def test_actions_have_versions(workflow):
    actions = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert [action for action in actions if not re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+\.\d+)?", action)] == []


@pytest.mark.parametrize("workflow", ["ci.yml", "verify.yml"])
def test_commands_of_a_workflow_pass_shellcheck_and_call_targets_that_exist(workflow):
    for step in steps(workflow):
        script = re.sub(r"\$\{\{.*?\}\}", "value", step.get("run", ""))
        command = [TOOLS / "shellcheck", "--shell=bash", "-"]
        assert subprocess.run(command, input=script, capture_output=True, text=True).stdout == ""
        for target in re.findall(r"\bmake ([a-z-]+)", script):
            assert f"\n{target}:" in MAKEFILE


def test_ci_runs_all_tests_on_each_python_that_the_project_supports():
    (job,) = yaml.safe_load((ROOT / WORKFLOWS / "ci.yml").read_text())["jobs"].values()
    pythons = job["strategy"]["matrix"]["python"]
    first, last = (int(python.removeprefix("3.")) for python in (pythons[0], pythons[-1]))
    assert pythons == [f"3.{minor}" for minor in range(first, last + 1)]
    assert PROJECT["requires-python"] == f">=3.{first},<3.{last + 1}"
    assert steps("ci.yml")[-1]["run"].endswith(" .ci/run")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
