"""Asks SkyPilot, in the Python of an environment of its own: `python -I sky_helper.py`.

On stdin a JSON object with `do` and its arguments, on the last line of stdout one with the answer: `error` alone where
SkyPilot refuses. What SkyPilot itself prints goes to stderr. Secrets come from the environment, never from a file.
"""

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sky
from sky.client import sdk
from sky.jobs.client import sdk as jobs
from sky.utils import common_utils, yaml_utils

_SKY = Path(sys.executable).with_name("sky")
_NO_RESOURCE = (
    f"To fix: change the resources; `{_SKY} gpus list` shows the cards that there are, `{_SKY} check` the clouds"
)
_FIELDS = ["job_id", "job_name", "status", "schedule_state", "failure_reason", "details"]


def check(task: dict[str, Any]) -> dict[str, Any]:
    """Whether SkyPilot would take a task, and what it would rent for it: where, what, and for how many USD an hour."""
    with sky.Dag() as dag:
        dag.add(_task(task))
    shown = io.StringIO()
    try:
        sdk.stream_and_get(sdk.optimize(dag), output_stream=shown)
    except sky.exceptions.ResourcesUnavailableError as error:
        # what it prints says which limit was too narrow, or what is near; the error itself does not
        raise RuntimeError(f"{_plain(shown.getvalue()) or error}\n{_NO_RESOURCE}") from None
    lines = _plain(shown.getvalue()).splitlines()
    head = next((line for line in lines if line.split()[:2] == ["INFRA", "INSTANCE"]), "")
    chosen = next((line for line in lines if line.rstrip().endswith("\u2714")), "")
    if not head or not chosen:  # an answer of the API server's is only what it prints
        raise RuntimeError(_plain(shown.getvalue()) or "it says nothing of what it would take")
    columns = {title: _cell(head, chosen, title) for title in ("INFRA", "INSTANCE", "GPUS", "COST ($)")}
    infra, instance, gpus, cost = columns.values()
    return {"infra": infra, "instance": instance, "gpus": gpus, "hourly": float(cost)}


def _cell(head: str, row: str, title: str) -> str:
    """What stands below a title of a table, whose columns are aligned on the left."""
    start = head.index(title)
    following = re.search(r"\S", head[start + len(title) :])
    cell = (row[start : start + len(title) + following.start()] if following else row[start:]).strip()
    return "" if cell == "-" else cell


def launch(files: list[str]) -> dict[str, Any]:
    """Hand over tasks as managed jobs; the ids of those that SkyPilot took, in order."""
    ids: list[int] = []
    for file in files:
        try:
            task = _task(yaml_utils.read_yaml(file))
            taken, _ = sdk.stream_and_get(jobs.launch(task, name=task.name))
            ids += taken
        except Exception as error:
            return {"ids": ids, "problem": _in_words(error)}
    return {"ids": ids}


def states() -> dict[str, Any]:
    """What SkyPilot reports about the user's jobs, by name."""
    return {
        record["job_name"]: {
            "id": record["job_id"],
            "status": record["status"].value,
            "ended": record["status"].is_terminal(),
            "reason": _plain(record.get("failure_reason") or record.get("details") or ""),
        }
        for record in _records()
    }


def cancel(names: list[str], seconds: float) -> dict[str, Any]:
    """Cancel jobs, and wait until their controller is done with them: its last step takes their machines down, and
    where that fails it says so.

    Returns:
        `left`: what SkyPilot does not confirm the end of after so many seconds, in words, by name.
    """
    running = [record["job_id"] for record in _named(names) if not record["status"].is_terminal()]
    if running:
        sdk.stream_and_get(jobs.cancel(job_ids=running))
    deadline = time.monotonic() + seconds
    while (left := _left(names)) and time.monotonic() < deadline:
        time.sleep(3)
    return {"left": left}


def _left(names: list[str]) -> dict[str, str]:
    left = {}
    for record in _named(names):
        reason = record.get("failure_reason") or ""
        if record["schedule_state"] not in ("DONE", None) or not record["status"].is_terminal():
            left[record["job_name"]] = record["status"].value
        elif "may have leaked" in reason:
            left[record["job_name"]] = reason
    return left


def _named(names: list[str]) -> list[dict[str, Any]]:
    return [record for record in _records() if record["job_name"] in names]


def _records() -> list[dict[str, Any]]:
    """The records of jobs, the newest of a name last; none where there is no controller yet, so no job either."""
    try:
        found, *_ = sdk.get(jobs.queue_v2(refresh=True, fields=_FIELDS))
    except (sky.exceptions.ClusterNotUpError, sky.exceptions.ClusterDoesNotExist):
        return []
    return sorted((dict(record) for record in found), key=lambda record: record["job_id"])


def _task(config: dict[str, Any]) -> "sky.Task":
    names = config.pop("secrets", None) or ()
    return sky.Task.from_yaml_config(config, secrets_overrides=[(name, os.environ[name]) for name in names])


def _in_words(error: Exception) -> str:
    return _plain(str(error)) or type(error).__name__


def _plain(text: str) -> str:
    """A text without colours."""
    return common_utils.remove_color(text).strip()


_ANSWERS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": check,
    "launch": launch,
    "states": states,
    "cancel": cancel,
}


def main() -> None:
    """Answer the request on stdin."""
    answer_to, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    try:
        answer = _ANSWERS[request.pop("do")](**request)
    except Exception as error:  # whatever SkyPilot raises is an answer here
        answer = {"error": _in_words(error)}
    print(json.dumps(answer), file=answer_to)


if __name__ == "__main__":
    main()
