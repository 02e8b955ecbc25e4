"""`make setup` and `make vllm` with a fake uv: which environment they make, and that it stays that one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
UV = """#!/bin/sh
printf '%s\\n' "$*" >> uv.log
case "$*" in
*"$FAILS"*) exit 1 ;;
venv*) mkdir -p .venv/bin && ln -sf /bin/true .venv/bin/python ;;
esac
"""
VENV = "venv --quiet --allow-existing --python >=3.12,<3.14 .venv"
SYNC = "pip sync --python .venv --require-hashes"
PROJECT = "pip install --quiet --python .venv --no-deps --no-build-isolation --editable ."
TORCH = f"torch=={re.search(r'^torch==(\S+)', LOCK, re.MULTILINE)[1]}"  # type: ignore[index]
OF_LOCK = [VENV, f"{SYNC} --reinstall-package torch requirements.lock", PROJECT]
FOR_12_6 = [
    VENV,
    f"pip install --quiet --python .venv --dry-run --no-deps --torch-backend cu126 {TORCH}",
    f"{SYNC} .venv/others.lock",
    f"pip install --python .venv --constraint .venv/others.lock --torch-backend cu126 {TORCH}",
    PROJECT,
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "uv").write_text(UV)
    (tmp_path / "uv").chmod(0o755)
    return tmp_path


def setup(checkout: Path, *words: str, target: str = "setup", code: int = 0, **env: str) -> list[str]:
    log = checkout / "uv.log"
    log.write_text("")
    env = os.environ | {"MAKEFLAGS": "", "FAILS": "no such"} | env
    command = ["make", "UV=./uv", target, *words]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return log.read_text().splitlines()


def packages(lock: str) -> dict[str, str]:
    """The entries of a lock by package and version."""
    entries = re.split(r"^(?=[a-z])", re.sub("^#.*\n", "", lock, flags=re.MULTILINE), flags=re.MULTILINE)
    return {entry.split(" ", 1)[0]: entry for entry in entries if entry}


def test_uv_is_installed_by_version_and_hash(checkout):
    ((name, entry),) = packages((ROOT / "requirements-uv.lock").read_text()).items()
    assert re.fullmatch(r"uv==\d+\.\d+\.\d+", name)
    assert entry.count("--hash=sha256:") > 9
    (checkout / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$*\" >> uv.log\n")
    (checkout / "python").chmod(0o755)
    assert setup(checkout, "PYTHON=./python", target=".uv/bin/uv") == [
        "-m pip install --quiet --disable-pip-version-check --target .uv --require-hashes --no-deps --requirement "
        "requirements-uv.lock"
    ]


def test_another_cuda_is_installed_and_remembered_until_one_goes_back(checkout):
    assert setup(checkout, CUDA="/usr/local/cuda") == OF_LOCK  # a variable of the environment, as some clusters set
    assert setup(checkout) == []
    assert setup(checkout, "CUDA=12.6") == FOR_12_6
    assert setup(checkout) == setup(checkout, "CUDA=12.6") == []
    (checkout / "requirements.lock").touch()
    assert setup(checkout) == FOR_12_6
    assert setup(checkout, "CUDA=") == OF_LOCK
    assert setup(checkout) == []


def test_all_but_torch_and_its_cuda_is_what_the_lock_pins_with_hashes(checkout):
    setup(checkout, "CUDA=12.6")
    locked = packages(LOCK)
    installed = packages((checkout / ".venv" / "others.lock").read_text())
    left_out = locked.keys() - installed.keys()
    assert installed == {name: entry for name, entry in locked.items() if name not in left_out}
    assert [name for name, entry in installed.items() if "--hash=sha256:" not in entry] == []
    assert [name for name in left_out if not name.startswith(("nvidia-", "cuda-"))] == [TORCH]
    names = {name.partition("==")[0] for name in installed}
    assert {"nvidia-ml-py", "triton", "torchao", "xformers", "bitsandbytes"} <= names
    assert [name for name in names if "cu13" in name] == []


def test_a_cuda_that_torch_is_not_built_for_changes_nothing(checkout):
    setup(checkout)
    assert setup(checkout, "CUDA=12.7", code=2, FAILS="--dry-run")[-1].endswith(f"--torch-backend cu127 {TORCH}")
    assert setup(checkout) == []


@pytest.mark.parametrize("fails", ["sync", "--constraint"])
def test_a_setup_that_was_interrupted_goes_on_with_its_cuda(checkout, fails):
    setup(checkout)
    setup(checkout, "CUDA=12.6", code=2, FAILS=fails)
    assert setup(checkout) == FOR_12_6


def test_vllm_gets_the_lock_of_the_machine_as_it_is(checkout):
    path = {"PATH": f"{checkout}:{os.environ['PATH']}"}
    for lock in ("requirements-vllm.lock", "requirements-vllm-cpu.lock"):
        shutil.copy2(ROOT / lock, checkout)
    (checkout / ".vllm").mkdir()
    gpu = checkout / "nvidia-smi"

    def installed() -> list[str]:
        return [line.rpartition(" ")[2] for line in setup(checkout, target="vllm", **path) if " sync " in line]

    assert installed() == ["requirements-vllm-cpu.lock"]
    assert installed() == []
    gpu.write_text("#!/bin/sh\necho GPU 0: Tesla T4\n")
    gpu.chmod(0o755)
    assert installed() == ["requirements-vllm.lock"]
