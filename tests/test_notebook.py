"""The cells of a notebook in docs/free-t4.md, run as they stand on two days in an empty folder, each on a new machine.

Other programs replace what needs a GPU, the network or the notebook's host. For the end of the session, a run gets
the signal that it sends itself before its limit.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
import notebook
import psutil
import pytest
from conftest import wait_until

from qlora_recipes.base import paths
from qlora_recipes.config.merging import Override
from qlora_recipes.run import rundir
from qlora_recipes.run.rundir import RunDir

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs" / "free-t4.md").read_text().partition("\n## Time limits")[0]
CELLS = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)

SAMPLE = paths.RECIPES / "loftq-gsm8k" / "sample"

PROGRAMS = {
    "nvidia-smi": """case "$1" in *name*) echo Tesla T4, 550.54.15 ;; *) echo 550.54.15 ;; esac""",
    "uv": """case "$*" in
venv*) mkdir -p .venv/bin && ln -sf /bin/true .venv/bin/python && cp "$MACHINE/bin/recipe" .venv/bin ;;
esac""",
    "recipe": """case "$1 $2" in
"doctor "* | "data fetch") ;;
"data prepare") exec "$RECIPE" data prepare --study loftq-gsm8k "$SAMPLE"/*.jsonl ;;
"plan "*) ;;
"run "*) shift; exec "$RECIPE" run --rehearse "$@" --set fp16=false --set num_epochs=4 ;;
*) exec "$RECIPE" "$@" ;;
esac""",
}
MODULES = {
    "google/colab/drive.py": "import os\ndef mount(at): os.makedirs(f'{at}/MyDrive', exist_ok=True)",
}
BACKEND = "module://matplotlib_inline.backend_inline"
IN_A_NOTEBOOK = "import os, subprocess\ndef sh(line): subprocess.run(['bash', '-c', line])\n"


def script(cells: Sequence[str]) -> str:
    """Cells as IPython runs them: `!` is for the shell, whose exit code stops nothing, and `%cd` for this process."""
    shell = re.sub(r"^!(.*)$", lambda line: f"sh({line[1]!r})", "\n".join(cells), flags=re.MULTILINE)
    return IN_A_NOTEBOOK + re.sub(r"^%cd (.*)$", lambda line: f"os.chdir({line[1]!r})", shell, flags=re.MULTILINE)


def test_matplotlib_does_not_want_the_backend_of_the_notebook():
    """bert-score imports it."""
    code = "from qlora_recipes import cli; cli.main(['--help']); import matplotlib.pyplot"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"MPLBACKEND": BACKEND}, check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(folder)]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    return folder


def a_machine(place: Path, name: str, fake_axolotl: Path) -> dict[str, str]:
    """A new machine's folder with fake programs, and the environment of a notebook there."""
    machine = place / name
    (machine / "tmp").mkdir(parents=True)
    (machine / "bin").mkdir()
    for program, does in PROGRAMS.items():
        (machine / "bin" / program).write_text(f"#!/bin/bash\n{does}\n")
        (machine / "bin" / program).chmod(0o755)
    for module, text in MODULES.items():
        (machine / module).parent.mkdir(parents=True, exist_ok=True)
        (machine / module).write_text(f"{text}\n")
    added = {"MACHINE": machine, "RECIPE": fake_axolotl, "SAMPLE": SAMPLE, "PYTHONPATH": machine}
    added["XDG_DATA_HOME"] = machine / "data"  # without the key of another day's machine
    of_kernel = {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}", "MPLBACKEND": BACKEND}
    return os.environ | {key: str(value) for key, value in added.items()} | of_kernel | {"MAKEFLAGS": ""}


def a_session(place: Path, cells: Sequence[str], repository: Path, env: dict[str, str]) -> "subprocess.Popen[str]":
    """Begin to run cells; the drive and the disk are in the test's folder, and the repository's path is typed in."""
    text = script(cells).replace("/tmp", str(place / "disk")).replace("/content", str(place / "content"))
    text = text.replace("/kaggle", str(place / "kaggle"))
    (place / "typed").write_text(f"{repository}\n")
    shutil.rmtree(place / "disk", ignore_errors=True)
    (place / "disk").mkdir()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (place / "typed").open() as typed:
        return subprocess.Popen([sys.executable, "-c", text], cwd=place, env=env, text=True, stdin=typed, **pipes)


def limited(session: "subprocess.Popen[str]") -> psutil.Process:
    children = psutil.Process(session.pid).children(recursive=True)
    (timeout,) = (child for child in children if child.name() == "timeout")
    return timeout


def test_the_notebook_has_the_cells_of_the_page():
    page = notebook.of_page(notebook.T4.with_suffix(".md").read_text())
    assert [cell.source for cell in page.cells if cell.cell_type == "code"] == [cell.strip() for cell in CELLS]
    assert nbformat.read(notebook.T4, as_version=4) == page


@pytest.mark.long
@pytest.mark.parametrize("host", ["content/drive/MyDrive", "kaggle/working"])
def test_the_cells_train_on_one_day_and_go_on_the_next(tmp_path, repository, fake_axolotl, host):
    if host.startswith("kaggle"):
        (tmp_path / "kaggle").mkdir()
    env = a_machine(tmp_path, "first", fake_axolotl) | {"FAKE_HOLD": "3"}
    session = a_session(tmp_path, CELLS[:-1], repository, env)
    runs = tmp_path / "disk" / "qlora-recipes" / "runs"
    wait_until(lambda: any(run.summary(run.read()).step >= 3 for run in rundir.all_runs(runs)), session)
    limited(session).send_signal(signal.SIGALRM)  # as when the time is up
    said, _ = session.communicate(timeout=120)
    assert "Tesla T4, 550.54.15" in said
    (folder,) = rundir.all_runs(runs)
    on_drive = RunDir(folder.path.resolve())
    assert on_drive.path.is_relative_to(tmp_path / host)
    record = on_drive.read()
    assert record.state == "interrupted"
    assert record.rehearsal is True
    assert record.overrides[-3] == Override("save_steps", 50)
    env = a_machine(tmp_path, "second", fake_axolotl)
    another_day = a_session(tmp_path, [*CELLS[:-2], CELLS[-1]], repository, env)
    said, _ = another_day.communicate(timeout=300)
    record = on_drive.read()
    assert record.state == "finished", said
    assert len(record.launches) == 2
    assert record.launches[1].resumed_from == "checkpoint-4"
    assert (tmp_path / "disk" / "qlora-recipes" / ".venv" / ".cuda").read_text() == "12.6\n"
