"""SkyPilot, asked in the Python of its own environment, which `make sky` makes; and the states of its jobs."""

import os
import subprocess
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import orjson

from ..base import paths
from ..base.errors import UserError
from ..base.progress import say
from ..runs.rundir import JobState

ENVIRONMENT = Path(os.environ.get("QLORA_RECIPES_SKY") or paths.LOCK.parent / ".sky")
_HELPER = Path(__file__).with_name("sky_helper.py")


def installed() -> bool:
    """Whether there is an environment with SkyPilot."""
    return (ENVIRONMENT / "bin" / "sky").is_file()


def ask(do: str, **arguments: Any) -> dict[str, Any]:
    """What SkyPilot answers; see `sky_helper`. It takes seconds, and where its server has to start, a minute.

    Raises:
        UserError: it is not installed, or refuses.
    """
    if not installed():
        raise UserError(
            f"--on sky: there is no SkyPilot in {ENVIRONMENT}; `make sky` in {ENVIRONMENT.parent} installs it"
        )
    command = [str(ENVIRONMENT / "bin" / "python"), "-I", str(_HELPER)]
    request = orjson.dumps({"do": do} | arguments)
    done = subprocess.run(command, input=request, capture_output=True, umask=0o077)  # its databases hold secrets
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"--on sky: SkyPilot's program ended with code {done.returncode}: {''.join(said[-1:])}")
    answer: dict[str, Any] = orjson.loads(lines[-1])
    if error := answer.get("error"):
        raise UserError(f"--on sky: SkyPilot: {error}")
    return answer


@dataclass(frozen=True)
class Reported:
    """What SkyPilot reports about a job.

    Attributes:
        id: its number there.
        status: SkyPilot's word for its state.
        ended: whether that is its last.
        reason: why it waits or failed.
    """

    id: int
    status: str
    ended: bool
    reason: str

    def state(self, name: str) -> JobState:
        """The state of a job of this name that has not ended."""
        if self.status in ("RUNNING", "WINDING_DOWN", "CANCELLING"):
            return JobState("running", "" if self.status == "RUNNING" else self.status.lower().replace("_", " "), name)
        waits = "" if self.status == "PENDING" else self.status.lower()
        return JobState("queued", "; ".join(filter(None, (waits, self.reason))), name)


def reported() -> dict[str, Reported] | UserError:
    """What SkyPilot reports about all of the user's jobs, by name; an error where it does not answer. It is asked once
    a minute, since that takes seconds."""
    return _reported(int(time.monotonic() / 60))


@lru_cache(maxsize=1)
def _reported(minute: int) -> dict[str, Reported] | UserError:
    try:
        answer = ask("states")
    except UserError as error:
        return error
    return {name: Reported(**facts) for name, facts in answer.items()}


def forget() -> None:
    """Have SkyPilot asked again, once something has changed."""
    _reported.cache_clear()


@cache
def report_once(problem: str) -> None:
    """Report that SkyPilot does not answer."""
    say(problem)
