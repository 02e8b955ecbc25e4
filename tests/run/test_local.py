"""Requests to stop for processes on this machine."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_recipes.run.backends import stop_holders

HOLDS = """
import sys
from pathlib import Path
from qlora_recipes.base.processes import held
with held(Path(sys.argv[1]), "held"):
    print(1, flush=True)
    input()
"""


@pytest.fixture
def holding(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds the lock `.lock`."""
    words = [sys.executable, "-c", HOLDS, str(tmp_path / ".lock")]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    yield child
    child.kill()
    child.wait()


def test_the_holder_of_a_lock_is_asked_to_stop(tmp_path, holding):
    assert stop_holders([tmp_path / ".lock", tmp_path / ".lock"]) == [f"process {holding.pid} is asked to stop"]
    assert holding.wait(10) == -15
    assert stop_holders([tmp_path / ".lock"]) == []  # nobody holds the lock file that it left


@pytest.mark.parametrize("record", ["elsewhere {pid}", "{host} 1", "{host} {other}", "{host} none", ""])
def test_a_lock_that_names_another_process_or_machine_stops_none(tmp_path, holding, record):
    lock = tmp_path / ".lock"
    host, pid = lock.read_text().split()
    assert host == platform.node()
    assert pid == str(holding.pid)
    lock.write_text(record.format(host=host, pid=pid, other=os.getpid()))
    (tmp_path / "copy").write_text(f"{host} {pid}")  # without a holder
    assert stop_holders([lock, tmp_path / "copy", tmp_path / "none"]) == []
    assert holding.poll() is None
