"""Median wall time of the quick commands, beyond that of `python -c pass`, over five calls each."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = str(Path(sys.executable).with_name("recipe"))
COMMANDS = [
    ["list"],
    ["show", "haider2024/llama-2-7b"],
    ["diff", "haider2024/llama-2-7b", "haider2024/llama-3-8b"],
    ["render", "--check"],
    ["results"],
]


def median(command: list[str]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    nothing = median([sys.executable, "-c", "pass"])
    for arguments in COMMANDS:
        print(f"{arguments[0]:8}{median([RECIPE, *arguments]) - nothing:6.3f} s")
