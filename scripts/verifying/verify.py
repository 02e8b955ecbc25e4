"""`recipe verify`: what this machine can show of the project, line by line, and the record of it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from ..base import machine
from ..base.errors import UserError, WorkFailed
from ..base.files import read_json, write_atomically, write_json
from ..base.locks import held
from ..base.processes import start_child, stop_requests
from ..base.progress import Bar, say
from ..data.verified import Card, Hardware, Outcome, Record, judge
from ..runs import provenance
from . import bench
from .bench import Bench, Found
from .lines import Line, all_lines

RECORD = "record.json"
LIMIT = 900  # seconds for a job; ranks that wait for each other would never end
_SECONDS = "seconds.json"  # how long each job took
_SCRIPTS = Path(__file__).resolve().parents[1]


def verify(folder: Path, quick: bool = False, fresh: bool = False) -> tuple[Record, Path]:
    """Measure what this machine can show, go on with what an interrupted call had begun, and judge it.

    What passed under the same packages, code and driver is not measured again.

    Args:
        folder: for figures, runs and models.
        quick: see `Bench`.
        fresh: measure everything anew.

    Returns:
        The record, and its file.

    Raises:
        UserError: the folder cannot be used, or another process verifies there.
        WorkFailed: interrupted; what was found is kept.
    """
    at = bench.here(folder / _key(quick), quick)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; name another folder with --work") from None
    with held(folder / ".lock", "another verification is at work there"):
        if fresh:
            shutil.rmtree(at.folder, ignore_errors=True)
        at.folder.mkdir(exist_ok=True)
        outcomes = list(_outcomes(at))
        record = _record(at, outcomes)
        file = at.folder / RECORD
        write_atomically(file, record.model_dump_json(indent=1) + "\n")
        if not record.count("failed"):
            shutil.rmtree(at.runs, ignore_errors=True)
    return record, file


def _key(quick: bool) -> str:
    """The name of the folder for what is measured on this machine with these packages and this code."""
    code = [file.read_text() for file in sorted(_SCRIPTS.rglob("*.py"))]
    content = [quick, machine.cpu(), machine.visible_gpus(), provenance.collect()["packages"], code]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _outcomes(at: Bench) -> Iterator[Outcome]:
    """The outcome of each line, once its job was carried out or had been before."""
    jobs = {job: list(lines) for job, lines in groupby(all_lines(at), key=lambda line: line.job)}
    to_show = {job: names for job, lines in jobs.items() if (names := [line.name for line in lines if not line.lacks])}
    done = 0
    with Bar("verifying", len(to_show)) as bar:
        for job, lines in jobs.items():
            found = at.found(job) if job in to_show else None
            if job in to_show and not (found and _is_settled(lines, found)):
                bar.begin(f"{job}: {'; '.join(to_show[job])}")
                found = _carry_out(at, job)
            for outcome in (outcomes := [_outcome(line, found) for line in lines]):
                if outcome.verdict == "failed":
                    say(f"  failed: {outcome.line}; the messages of its job are in {at.log(job)}")
            yield from outcomes
            done += job in to_show
            bar.update(done)


def _is_settled(lines: list[Line], found: Found) -> bool:
    """Whether a job need not be done again: all that it can show has passed."""
    return all(line.lacks or _outcome(line, found).verdict == "passed" for line in lines)


def _outcome(line: Line, found: Found | None) -> Outcome:
    """The verdict on a line by what its job found."""
    about: dict[str, Any] = {
        "line": line.name,
        "what": line.what,
        "unit": line.unit,
        "bound": line.bound,
        "means": line.means,
    }
    lacks = line.lacks or (found.lacks if found else "")
    if lacks or found is None:
        return Outcome(**about, verdict="unverified", note=lacks or "it was not measured")
    figure = found.figures.get(line.name)
    if figure is None:
        return Outcome(**about, verdict="failed", note=found.problem or "its job found no figure")
    verdict = judge(figure.measured, figure.expected, line.bound)
    return Outcome(**about, measured=figure.measured, expected=figure.expected, note=figure.note, verdict=verdict)


def _carry_out(at: Bench, job: str) -> Found:
    """Have a process of its own carry a job out.

    Raises:
        WorkFailed: this process was asked to stop.
    """
    at.forget(job)
    started = time.monotonic()
    command = [sys.executable, "-m", "qlora_recipes.verifying.jobs", job, str(at.folder.resolve())]
    with stop_requests() as stops, at.log(job).open("wb") as log:
        options = ["--quick"] if at.quick else []
        child = start_child([*command, *options], stdout=log, stderr=subprocess.STDOUT, env=os.environ | _OFFLINE)
        in_time = _wait(child, stops)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what a job that was ended has left
    if stops:
        raise WorkFailed("interrupted; the same command goes on with what is not done")
    found = at.found(job)
    if not in_time:
        found = Found({}, problem=f"it took more than {LIMIT // 60} minutes, and was ended")
    elif found is None:
        code = child.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        found = Found({}, problem=f"its process ended with {how}")
    _note_seconds(at, job, time.monotonic() - started)
    return found


_OFFLINE = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _wait(child: "subprocess.Popen[bytes]", stops: list[int]) -> bool:
    """Wait for a job; pass a request to stop on, and at the second one kill it with all that it has started.

    Returns:
        Whether it ended in time; otherwise it is killed too.
    """
    passed_on = False
    deadline = time.monotonic() + LIMIT
    while child.poll() is None:
        time.sleep(0.05)
        if stops and not passed_on:
            passed_on = True
            child.terminate()
        in_time = time.monotonic() < deadline
        if len(stops) > 1 or not in_time:
            with suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                    process.kill()
            child.wait()
            return in_time
    return True


def _note_seconds(at: Bench, job: str, seconds: float) -> None:
    file = at.folder / _SECONDS
    write_json(file, read_json(file) | {job: seconds})


def _record(at: Bench, outcomes: list[Outcome]) -> Record:
    source = provenance.collect()
    git = source["git"]
    return Record(
        made=f"{datetime.now(UTC):%Y-%m-%d}",
        quick=at.quick,
        seconds=round(sum(read_json(at.folder / _SECONDS).values()), 1),
        hardware=Hardware(
            gpus=[Card(**card) for card in source["gpus"]] if at.gpu else [],
            cpu=source["cpu"],
            cores=source["cores"],
            memory_gib=source["memory_gib"],
        ),
        packages={"python": source["python"], **source["packages"]},
        revision=f"{git['revision']}{'+' if git['dirty'] else ''}" if git else None,
        lines=outcomes,
    )


def rows(record: Record) -> list[dict[str, Any]]:
    """The lines of a record that have a verdict, as a table shows them."""
    return [
        {
            "line": line.line,
            "measured": _number(line.measured),
            "expected": _number(line.expected),
            "unit": line.unit or None,
            "off by": None if line.difference is None else f"{line.difference:.2g}",
            "bound": f"{line.bound:g}",
            "verdict": line.verdict,
            "why": f"{line.note}; {line.means}".removeprefix("; ") if line.verdict == "failed" else line.note or None,
        }
        for line in record.lines
        if line.verdict != "unverified"
    ]


def unverified(record: Record) -> list[str]:
    """What a record does not show, a text for each reason."""
    names: dict[str, list[str]] = {}
    for line in record.lines:
        if line.verdict == "unverified":
            names.setdefault(line.note, []).append(line.line)
    return [f"unverified, {reason}: {'; '.join(lines)}" for reason, lines in names.items()]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"
