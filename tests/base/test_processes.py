"""Processes that end with their parent, whatever happens between fork and exec."""

import subprocess
import sys
from textwrap import dedent

import pytest


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
    from qlora_recipes.base.processes import start_child, stop_requests

    os.register_at_fork(after_in_child=lambda: ({at_fork}))
    with stop_requests():
        print(start_child(["sleep", "60"]).wait(), end="")
    """
    run = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=30)
    assert run.stdout == end  # the child has the same stdout, which is open until it ends
