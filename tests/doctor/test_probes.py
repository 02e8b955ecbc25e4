"""Libraries that answer, cannot be imported, end their process or hang; a long test asks the real ones."""

import signal
import subprocess
import time
from pathlib import Path

import bitsandbytes
import psutil
import pytest
from conftest import start

from qlora_recipes.base.processes import start_child
from qlora_recipes.doctor import gpu, packages, probes
from qlora_recipes.doctor.gpu import Driver


def ask(path: Path, patch: pytest.MonkeyPatch, **modules: str) -> probes.Facts:
    """The facts where some modules have a source of the test's."""
    for name, source in modules.items():
        (path / name).mkdir(parents=True)
        (path / name / "__init__.py").write_text(source)
    patch.setenv("PYTHONPATH", str(path))
    return probes.start()()


def test_what_cannot_be_imported_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "print('on stdout')\nraise ImportError('libcudart.so.13: cannot open shared object file\\nmore')\n"
    facts = ask(tmp_path, monkeypatch, torch=broken, axolotl="import sys; sys.exit('not here')\n")
    reason = "ImportError: libcudart.so.13: cannot open shared object file"
    assert facts["torch"] == facts["bitsandbytes"] == {"error": reason}
    assert facts["axolotl"] == {"error": "SystemExit: not here"}
    assert gpu.torch_line(Driver(), facts["torch"], None).found == f"cannot be imported: {reason}"
    assert packages.axolotl(facts["axolotl"]).state == "wrong"


def test_a_module_in_the_current_folder_is_not_taken_for_a_librarys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    facts = ask(tmp_path / "path", monkeypatch, torch="import mine", axolotl="import mine")
    assert facts["torch"] == facts["axolotl"] == {"error": "ModuleNotFoundError: No module named 'mine'"}


def test_a_process_that_ends_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = "import os, sys; print('at the end', file=sys.stderr, flush=True); os.abort()\n"
    facts = ask(tmp_path, monkeypatch, torch=crashing, axolotl="")
    died = {"error": "its process ended with SIGABRT: at the end"}
    assert facts["torch"] == facts["bitsandbytes"] == died
    assert facts["axolotl"] == {"error": "ModuleNotFoundError: No module named 'axolotl.train'"}


def test_a_process_that_hangs_is_ended_at_the_limit() -> None:
    child = start_child(["sleep", "600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert probes._answer(child, 0.2) == {"ended": "no answer within 0.2 s"}
    assert child.returncode == -signal.SIGKILL


def test_an_interrupted_command_ends_at_once_and_takes_the_probes_along(tmp_path: Path) -> None:
    for name in ("torch", "axolotl"):
        (tmp_path / name).mkdir()
        waiting = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, '{name}.there').touch(); time.sleep(600)\n"
        (tmp_path / name / "__init__.py").write_text(waiting)
    doctor = start(tmp_path, "doctor", PYTHONPATH=str(tmp_path))
    deadline = time.monotonic() + 120
    while len([*tmp_path.glob("*.there")]) < 2:
        assert time.monotonic() < deadline and doctor.poll() is None
        time.sleep(0.05)
    probing = [child.pid for child in psutil.Process(doctor.pid).children() if "-m" in child.cmdline()]
    while doctor.poll() is None:  # one that comes while Python cleans up after an import is lost: it ignores it there
        assert time.monotonic() < deadline
        doctor.send_signal(signal.SIGINT)
        time.sleep(2)
    assert doctor.returncode not in (0, 2) and len(probing) == 2
    psutil.wait_procs([psutil.Process(pid) for pid in probing if psutil.pid_exists(pid)], timeout=10)
    assert not [pid for pid in probing if psutil.pid_exists(pid)]


@pytest.mark.long
def test_the_real_libraries_are_whole_and_bitsandbytes_without_its_own_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probes.start()()
    assert whole["axolotl"] == {} and whole["torch"]["cuda"] and whole["torch"]["gpus"] == 0
    assert gpu.bitsandbytes_line(Driver(), whole["bitsandbytes"], None).state == "ok"
    real = Path(bitsandbytes.__file__).parent
    (tmp_path / "bitsandbytes").mkdir()
    for file in real.iterdir():
        if file.suffix != ".so":
            (tmp_path / "bitsandbytes" / file.name).symlink_to(file)
    facts = ask(tmp_path, monkeypatch, axolotl="")
    line = gpu.bitsandbytes_line(Driver(), facts["bitsandbytes"], None)
    assert line.state == "wrong" and "libbitsandbytes_cpu.so: cannot open shared object file" in line.found
    assert line.command.endswith("make setup")
    assert "error" not in facts["torch"]
