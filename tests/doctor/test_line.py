"""Commands that can be pasted as they are, and lines that can be shared."""

import subprocess
from pathlib import Path

import pytest
from broken import distribution

from qlora_recipes.base import paths
from qlora_recipes.doctor import line, packages

NAMES = {"alice", "gpu01.cluster.edu"}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder in the home folder, with a name that a shell would split."""
    folder = tmp_path / "alice" / "my projects" / "q"
    (folder / ".venv").mkdir(parents=True)
    (folder / "requirements.lock").touch()
    monkeypatch.setattr(paths, "LOCK", folder / "requirements.lock")
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("USER", "alice")
    return folder


@pytest.mark.parametrize("home", ["alice", "elsewhere"])
def test_a_command_has_no_name_of_the_user_and_works_as_pasted(
    home: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / home))
    command = line.shareable(line.in_checkout("pwd"), NAMES)
    assert "alice" not in command and "~" not in command
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(checkout)


def test_an_environment_that_is_made_anew_keeps_its_cuda(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    assert line.repair("torch", anew=True) == "rm -r .venv && make setup"
    (checkout / ".venv" / ".cuda").write_text("\n")  # as make writes it for the lock's
    assert line.repair("torch", anew=True) == "rm -r .venv && make setup"
    (checkout / ".venv" / ".cuda").write_text("12.6\n")
    assert line.repair("", anew=True) == "rm -r .venv && make setup CUDA=12.6"
    assert line.torch_for("12.6") == "make setup CUDA=12.6"


def test_a_wheel_has_no_makefile_and_its_packages_keep_their_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "LOCK", tmp_path / "requirements.lock")
    distribution(tmp_path / "site", "torch", "2.13.0+cu130")
    distribution(tmp_path / "site", "bitsandbytes", "0.49.1")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    of_torch = "uv pip install --reinstall-package torch --torch-backend {} torch==2.13.0"
    assert line.torch_for("12.6") == of_torch.format("cu126")
    assert line.repair("torch", anew=True) == of_torch.format("auto")
    assert line.repair("bitsandbytes", anew=True) == "pip install --force-reinstall 'bitsandbytes==0.49.1'"
    assert line.repair("peft") == "pip install 'peft'"
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.11.2")
    python = packages.python()
    assert (python.state, python.command) == ("wrong", "") and python.remedy


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("on gpu01.cluster.edu", "on …"),
        ("on gpu01, GPU01 and gpu011", "on …, … and gpu011"),
        ("of Alice, alice_2 and malice", "of …, …_2 and malice"),
    ],
)
def test_names_of_machine_and_user_are_left_out_in_any_spelling(text: str, shared: str) -> None:
    assert line.shareable(text, NAMES) == shared
