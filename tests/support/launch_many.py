"""Carries out many commands, several at a time, each in a copy of this process, as nothing is imported anew there.

On stdin it takes a JSON list of them: their `words`, what to add to their `environment`, the file `said` for all that
they print, and the `signal` that each gets `after` some seconds. It prints their exit codes.
"""

import json
import math
import os
import signal
import sys
import time
import traceback
from typing import Any

from qlora_recipes import cli
from qlora_recipes.base.machine import end_with_parent

AT_ONCE = 4


def begun(command: dict[str, Any]) -> int:
    """The id of a new process with a command."""
    said = os.open(command["said"], os.O_WRONLY | os.O_CREAT)
    if process := os.fork():
        os.close(said)
        return process
    code = 99
    try:
        end_with_parent(signal.SIGKILL)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ |= command["environment"]
        sys.argv[1:] = command["words"]
        code = cli.main()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def main() -> None:
    """Carry them all out, the first in this process, which has imported then what the others need."""
    commands = json.load(sys.stdin)
    stdout, sys.stdout = sys.stdout, sys.stderr
    codes = {0: cli.main(commands[0]["words"])}
    waiting = iter(list(enumerate(commands))[1:])
    running: dict[int, tuple[int, float]] = {}  # by process: which one, and when to send its signal
    while len(codes) < len(commands):
        while len(running) < AT_ONCE and (new := next(waiting, None)):
            running[begun(new[1])] = new[0], time.monotonic() + new[1].get("after", math.inf)
        for process, (number, when) in [*running.items()]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[number] = os.waitstatus_to_exitcode(status)
                del running[process]
            elif when < time.monotonic():
                os.kill(process, commands[number]["signal"])
                running[process] = number, math.inf
        time.sleep(0.02)
    json.dump([codes[number] for number in range(len(commands))], stdout)


if __name__ == "__main__":
    main()
