"""Processes that end with their parent, whatever happens between fork and exec."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from qlora_recipes.base.machine import start_child


@pytest.mark.parametrize(
    ("at_fork", "end"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", "-15"),  # by what stops all processes of a user
        ("os.kill(os.getppid(), signal.SIGKILL), time.sleep(0.5)", ""),
    ],
    ids=["the child is stopped", "the parent is killed"],
)
def test_a_child_that_is_not_yet_a_program_ends_too(at_fork: str, end: str) -> None:
    script = f"""
    import os, signal, time
    from qlora_recipes.base.machine import start_child, stop_requests

    os.register_at_fork(after_in_child=lambda: ({at_fork}))
    with stop_requests():
        print(start_child(["sleep", "60"]).wait(), end="")
    """
    run = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=30)
    assert run.stdout == end  # the child has the same stdout, which is open until it ends


@pytest.mark.parametrize("options", [{}, {"env": {}}])
def test_no_python_below_a_child_imports_from_the_working_directory(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit(3)")
    command = [sys.executable, "-m", "colorsys"]
    script = f"import subprocess; raise SystemExit(subprocess.call({command}))"
    assert start_child(command, cwd=tmp_path, **options).wait() == 0
    assert start_child([sys.executable, "-c", script], cwd=tmp_path, **options).wait() == 0  # as of torchrun's ranks
