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
def test_actions_are_pinned_and_leave_no_credentials(workflow):
    lines = re.findall(r"uses: (.*)", (ROOT / WORKFLOWS / workflow).read_text())
    assert [line for line in lines if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []
    checkouts = [step for step in steps(workflow) if "actions/checkout" in step.get("uses", "")]
    assert [step["with"] for step in checkouts] == [{"persist-credentials": False}]


def test_code_of_a_pull_request_does_not_run_as_root():
    names = [step.get("name", "") for step in steps("ci.yml")]
    given_up = names.index("Give up root before code of a pull request runs")
    commands = {step.get("name", ""): step.get("run", "") for step in steps("ci.yml")}
    of_checkout = [i for i, name in enumerate(names) if re.search(r"make |\.ci/|\.venv/", commands[name])]
    assert min(of_checkout) > given_up
    rooted = [step for step in steps("ci.yml")[given_up + 1 :] if "sudo" in step.get("run", "")]
    assert [step["if"] for step in rooted] == ["github.event_name == 'push'"]


def test_inputs_do_not_become_commands():
    text = (ROOT / WORKFLOWS / "verify.yml").read_text()
    assert [step["run"] for step in steps("verify.yml") if "${{" in step.get("run", "")] == []
    (script,) = [step["run"] for step in steps("verify.yml") if step.get("name") == "Set up"]
    check = script.splitlines()[0]
    assert "CUDA_OF_TORCH: ${{ inputs.cuda }}" in text
    for cuda, code in {"": 0, "12.6": 0, "12.6; x": 1, "$(touch x)": 1, "1.2\n3": 1, "'": 1}.items():
        assert subprocess.run(["bash", "-ec", check], env={"CUDA_OF_TORCH": cuda}).returncode == code


@pytest.mark.parametrize("workflow", ["ci.yml", "verify.yml"])
def test_commands_of_a_workflow_pass_shellcheck_and_call_targets_that_exist(workflow):
    for step in steps(workflow):
        script = re.sub(r"\$\{\{.*?\}\}", "value", step.get("run", ""))
        command = [TOOLS / "shellcheck", "--shell=bash", "-"]
        assert subprocess.run(command, input=script, capture_output=True, text=True).stdout == ""
        for target in re.findall(r"\bmake (?:UV=\S+ )?([a-z-]+)", script):
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
