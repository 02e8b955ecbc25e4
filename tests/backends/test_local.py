"""Which processes on this machine are asked to stop."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_recipes.backends.local import stop_holders

LOCKS = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
READS = "import sys; f = open(sys.argv[1]); print(1, flush=True); input()"


@contextmanager
def process(does: str, file: Path) -> Iterator["subprocess.Popen[bytes]"]:
    words = [sys.executable, "-c", does, str(file)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_who_holds_a_lock_is_asked_to_stop(tmp_path: Path) -> None:
    with process(LOCKS, tmp_path / ".lock") as child:
        (said,) = stop_holders([tmp_path / ".lock"])
        assert f" {child.pid} " in said
        assert child.wait(10) == -15


@pytest.mark.parametrize(("does", "name"), [(LOCKS, "theirs"), (READS, "theirs"), (READS, ".lock")])
def test_who_only_reads_a_lock_or_holds_the_file_that_it_links_to_goes_on(tmp_path: Path, does: str, name: str) -> None:
    (tmp_path / name).touch()
    if name == "theirs":
        (tmp_path / ".lock").symlink_to("theirs")
    with process(does, tmp_path / name) as child:
        assert stop_holders([tmp_path / ".lock"]) == []
        assert child.poll() is None
