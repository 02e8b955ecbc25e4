"""`make verify` on this CPU: all passes, and planted errors are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent / "gpu"


def verify(folder: Path, *words: str) -> tuple[int, dict[str, set[str]]]:
    command = [sys.executable, "-m", "pytest", str(TESTS), f"--confcutdir={TESTS}", f"--basetemp={folder / 'runs'}"]
    env = os.environ | {"PYTHONPATH": str(TESTS.with_name("support"))}
    done = subprocess.run([*command, *words], cwd=folder, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    rows = json.loads((folder / "build" / "verify.json").read_text())["rows"]
    results = {result: {row["what"] for row in rows if row["result"] == result} for result in ("pass", "FAIL", "skip")}
    assert all(f"  {result}" in done.stdout for result, names in results.items() if names)
    return done.returncode, results


def test_what_a_cpu_can_show_passes(tmp_path):
    code, results = verify(tmp_path)
    assert code == 0
    assert results["FAIL"] == set()
    assert {"adapter scale, as saved", "resumed, values of the adapter that differ"} <= results["pass"]
    assert {"half precision", "shape[haider2024/llama-3-8b]", "engine[zero3]"} <= results["skip"]


def test_planted_errors_are_found(tmp_path):
    code, results = verify(tmp_path, "-p", "planted", "-k", "scale or saved_adapter or 4_bits")
    assert code == 1
    assert results["FAIL"] == {
        *("adapter scale, in training", "adapter scale, as saved"),
        *("NF4 beside its definition, loss", "NF4 beside its definition, gradient norm"),
    }
    assert results["pass"] == {"merged adapter, largest error"}
