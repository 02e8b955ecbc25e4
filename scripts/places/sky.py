"""Machines that SkyPilot finds: `--on sky`.

Each run is a managed job of SkyPilot's, which carries out its commands one behind the other, takes down its machine in
the end, and is begun again where that is taken away: the training then resumes from the last whole checkpoint. The
tasks, rendered from templates/sky.yml.j2, are kept below runs/sky/. A job is known by its name, which is noted before
SkyPilot gets it.
"""

import copy
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from getpass import getuser
from pathlib import Path
from typing import Any

from ..base import paths, yamlfiles
from ..base.errors import UserError, WorkFailed
from ..base.files import write_atomically
from ..base.machine import now
from ..base.progress import say
from ..base.yamlfiles import Config
from ..configs import config, gpus, models
from ..configs.gpus import Gpu
from ..runs.rundir import Job, JobState, Launch, RunDir, new_folder
from ..runs.tasks import Command, Outcome, Work
from . import bucket, claim, sky_cards, sky_client, sky_task
from .sky_settings import settings_file, task_settings

CONFIRM = 600
"""Seconds in which SkyPilot has to confirm that nothing is left of a cancelled job."""
HANDING_OVER = 900
"""Seconds in which SkyPilot may take a job that is noted already: it may have to start its controller before that."""
_CARDS = {"accelerators", "instance_type"}  # what says which GPU


class Sky:
    """A `places.Place`.

    Args:
        rehearsal: whether a rehearsal is to run, which needs no GPU.
        jobs: how many to carry out at a time; SkyPilot decides that.
        options: the values of --sky, and `yes` alone where its price is agreed to beforehand.

    Raises:
        UserError: a setting is wrong, or SkyPilot is not installed.
    """

    here = False

    @property
    def installs(self) -> bool:
        """See `places.Place`."""
        return self.bucket is not None

    def __init__(self, rehearsal: bool, jobs: int | None, options: Sequence[str]):
        if jobs:
            raise UserError("--jobs: not with --on sky; SkyPilot decides how many of its jobs run at a time")
        self.agreed = "yes" in options
        self.settings, self.bucket = task_settings([option for option in options if option != "yes"])
        self.rehearsal = rehearsal
        self.most: float | None = None  # USD an hour that were agreed to
        if not sky_client.installed():
            sky_client.ask("states")  # says how to install it

    def gpu(self) -> Gpu | None:
        """The card that the settings name."""
        named = self.settings["resources"].get("accelerators")
        name = str(next(iter(named), "") if isinstance(named, dict) else named or "").partition(":")[0]
        return gpus.named(name) if name and not self.rehearsal else None

    def check_size(self, gpus: int, nodes: int) -> None:
        """See `places.Place`."""
        if nodes > 1:
            raise UserError(f"--nodes {nodes}: not with --on sky; --gpus takes several GPUs of one machine")

    def carry_out(self, work: Work, title: str, runs: Path, here: Callable[[], object]) -> RunDir:
        """Hand over one work; see `places.Place`.

        Raises:
            WorkFailed: SkyPilot refuses what it agreed to before.
        """
        self._agree([work], runs)
        commands = work.commands()
        self._launch([(work.outcome, commands)], title, runs, work.gpus)
        return commands[0].folder

    def submit(self, works: Sequence[Work], title: str, runs: Path, results: list[str]) -> None:
        """Hand over a job for each work; see `places.Place`.

        Raises:
            WorkFailed: SkyPilot took only some of them.
        """
        if not (to_do := [work for work in works if work.steps]):
            return
        self._agree(to_do, runs)
        claimed = claim(works)
        self._launch([(outcome, commands) for outcome, commands in claimed if commands], title, runs, works[0].gpus)

    def _agree(self, works: Sequence[Work], runs: Path) -> None:
        """Say what SkyPilot would take for works, and what that costs, and have it agreed to unless it is free.

        Raises:
            UserError: no card holds them, SkyPilot refuses the task, or the user the price.
        """
        gpus = works[0].gpus
        resources = self.settings["resources"]
        if self.bucket:
            _refuse_what_stays_here(self.bucket, works)
            if size := sky_cards.disk_gb(works):
                resources.setdefault("disk_size", size)
        if gpus and not any(_CARDS & one.keys() for one in (resources, *_alternatives(resources))):
            resources["accelerators"] = dict.fromkeys(sky_cards.holding(works), gpus)  # SkyPilot takes the cheapest
        say("asking SkyPilot what it would take")
        offer = sky_client.ask("check", task=self._task("recipe", [], gpus))
        hourly = float(offer["hourly"])
        what = ", ".join(filter(None, (offer["infra"], offer["instance"], offer["gpus"])))
        each = f" for each of {len(works)} jobs" if len(works) > 1 else ""
        if not hourly:
            say(f"{what}: costs nothing by SkyPilot's prices")
            return
        self.most = hourly + 0.01  # it is rounded to cents
        planned = [sky_cards.hours(work, offer["gpus"], runs) for work in works]
        known = [hours for hours in planned if hours is not None]
        in_all = f"; by plan {sum(known):,.1f} hours of training, {sum(known) * hourly:,.2f} USD"
        say(f"{what}: {hourly:.2f} USD an hour{each}{in_all if len(known) == len(planned) else '; hours not known'}")
        if self.agreed:
            return
        if not sys.stdin.isatty():
            raise UserError("--on sky: nobody is there to agree to that price; --yes does")
        print("rent it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("--on sky: not agreed to; nothing was started")

    def _task(self, name: str, commands: Sequence[Command], gpus: int) -> Config:
        """The task of a job: the template, with the user's settings laid over it."""
        resources = _with_cards(self.settings["resources"], gpus)
        if self.most:
            resources.setdefault("max_hourly_cost", self.most)
        task = sky_task.rendered(name, commands, self.bucket)
        return config.merge(task, self.settings | {"resources": resources})

    def _launch(self, claimed: Sequence[tuple[Outcome, list[Command]]], title: str, runs: Path, gpus: int) -> None:
        """Write the tasks, note their jobs, and give them to SkyPilot."""
        if not claimed:
            return
        for _, commands in claimed:
            _refuse_untrained(commands)
            if self.bucket:
                run = commands[0].folder
                _refuse_local_model(yamlfiles.read_yaml(run.config), run.read().rehearsal)
        if self.bucket:
            say(f"copying the runs' folders and data to {self.bucket}")
            bucket.put(self.bucket, [command for _, commands in claimed for command in commands])
        folder = new_folder(runs / "sky", title.replace("/", "-"))
        files = []
        for _, commands in claimed:
            name = f"{_plain(title)}-{secrets.token_hex(3)}"
            file = paths.unlinked(folder / f"{name}.yaml")
            write_atomically(file, yamlfiles.write_yaml(self._task(name, commands, gpus)))
            files.append(file)
            for command in commands:
                job = Job(
                    place="sky", id=name, step=command.step, user=getuser(), script=str(file), words=command.words
                )
                command.folder.add_job(job)
        again = "run the same command again to continue"
        try:
            answer = sky_client.ask("launch", files=[str(file) for file in files])
        except UserError as error:
            raise WorkFailed(f"{error}; {again}, once `recipe results` says that it is not queued") from None
        sky_client.forget()
        taken = answer["ids"]
        for file in files[: len(taken)]:
            _end(file).unlink(missing_ok=True)  # handing over took so long that it was given up
        for file in files[len(taken) :]:
            _mark_ended(file)
        for (outcome, commands), file, id_ in zip(claimed, files, taken, strict=False):
            say(f"job {file.stem}: SkyPilot's managed job {id_}; {file}")
            outcome.steps |= {command.step: f"queued (job {file.stem})" for command in commands}
        if problem := answer.get("problem"):
            raise WorkFailed(f"--on sky: SkyPilot took {len(taken)} of {len(files)} jobs: {problem}; {again}")

    def can_follow(self, job: JobState | None) -> bool:
        """No job waits there for another."""
        return False

    @classmethod
    def active(cls, jobs: Sequence[Job]) -> dict[str, JobState] | None:
        """The states that SkyPilot reports; a job that it could not carry out is noted in its run."""
        jobs = [job for job in jobs if not _end(Path(job.script)).exists()]
        if not jobs:
            return {}
        found = sky_client.reported()
        if isinstance(found, UserError):
            sky_client.report_once(str(found))
            return None
        states = {}
        for job in jobs:
            age = datetime.now(UTC) - datetime.fromisoformat(job.submitted)
            if report := found.get(job.id):
                gathered = _gather(job, report.ended)
                if not report.ended:
                    states[job.id] = report.state(job.id)
                elif gathered:
                    _note_end(job, report)
                else:
                    states[job.id] = JobState("unknown", "its bucket cannot be read", job.id)
            elif age.total_seconds() < HANDING_OVER:
                states[job.id] = JobState("queued", "is being handed over", job.id)
            elif _gather(job, ended=True):  # SkyPilot no longer knows it
                _mark_ended(Path(job.script))
            else:
                states[job.id] = JobState("unknown", "its bucket cannot be read", job.id)
        return states

    @classmethod
    def cancel(cls, folder: RunDir, jobs: Sequence[Job]) -> list[str]:
        """Cancel the jobs, and wait for SkyPilot to confirm that nothing is left of them."""
        names = list(cls.active(jobs) or {})
        if not names:
            return []
        say(f"waiting for SkyPilot to confirm that nothing is left of {', '.join(names)}")
        left = sky_client.ask("cancel", names=names, seconds=CONFIRM)["left"]
        sky_client.forget()
        for job in jobs:
            if job.id in names and job.id not in left and _gather(job, ended=True):
                _mark_ended(Path(job.script))
        sky = sky_client.ENVIRONMENT / "bin" / "sky"
        return [
            f"job {name} is asked to end, which SkyPilot does not confirm: {left[name]}; look at `{sky} jobs queue`"
            if name in left
            else f"job {name} is cancelled; SkyPilot confirms that nothing is left of it"
            for name in names
        ]


def _alternatives(resources: Config) -> Iterator[Config]:
    """Those that SkyPilot may choose among, each laid over the others' resources; malformed ones are left to it."""
    for key in ("any_of", "ordered"):
        if isinstance(listed := resources.get(key), list):
            yield from (one for one in listed if isinstance(one, dict))


def _with_cards(resources: Config, gpus: int) -> Config:
    """Resources with so many of each card that is named without a number; with no card at all where none is needed."""
    made = copy.deepcopy(resources)
    for one in (made, *_alternatives(made)):
        card = one.pop("accelerators", None)
        if gpus and card:
            one["accelerators"] = (
                [_counted(name, gpus) for name in card] if isinstance(card, list) else _counted(card, gpus)
            )
    return made


def _counted(card: Any, gpus: int) -> Any:
    return f"{card}:{gpus}" if isinstance(card, str) and ":" not in card else card


def _refuse_untrained(commands: Sequence[Command]) -> None:
    """Refuse to evaluate a run that is still to be trained: no job waits for another.

    Raises:
        UserError: it is.
    """
    folder = commands[0].folder
    if commands[0].step == "evaluate" and (
        folder.read().state == "running" or Sky.active([job for job in folder.jobs() if job.step == "run"]) != {}
    ):
        raise UserError(f"{folder.path}: is still being trained; --on sky evaluates it once it is finished")


def _refuse_what_stays_here(url: str, works: Sequence[Work]) -> None:
    """Refuse what a machine that shares no files with this one would not have.

    Raises:
        UserError: it has no such bucket, checkout, or base model.
    """
    bucket.Bucket(url)
    if not paths.LOCK.is_file():
        raise UserError("--on sky: with a bucket, the machines get this project from its checkout; this is none")
    for work in works:
        if work.composed:
            _refuse_local_model(work.composed.config, work.composed.rehearsal)


def _refuse_local_model(config: Config, rehearsal: bool) -> None:
    if not rehearsal and models.is_path(model := str(config.get("base_model"))):
        raise UserError(f"base_model: {model} is a folder of this machine; the others take models from the hub")


def _plain(title: str) -> str:
    """The last part of a title as names of jobs can have it; SkyPilot names machines by their first 25 letters."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower().rpartition("/")[2])[:18].strip("-") or "job"


def _end(task: Path) -> Path:
    """The file beside a job's task that is there once it has ended, so that SkyPilot is not asked about it again."""
    return task.with_suffix(".ended")


def _mark_ended(task: Path) -> None:
    with suppress(OSError):  # runs can be another user's
        _end(task).touch()


def _folder(job: Job) -> RunDir:
    """The folder of the run that a job is for."""
    path = Path(job.words[1])
    if path.is_relative_to(runs := job.words[-1]):  # the folder of runs/sky
        path = Path(job.script).parents[2] / path.relative_to(runs)
    return RunDir(path)


def _gather(job: Job, ended: bool) -> bool:
    """Fetch what a bucket has of a job's run, where it has one; whether that went well."""
    try:
        url = yamlfiles.read_yaml(Path(job.script))["envs"].get(bucket.URL)
    except (UserError, KeyError):
        return True  # its task is gone
    return url is None or bucket.gather(url, _folder(job), ended)


def _note_end(job: Job, report: sky_client.Reported) -> None:
    """Note that a job has ended, and in its run why it could not be carried out, if no command of it says that."""
    if report.status.startswith("FAILED") and job.step == "run":
        folder = _folder(job)
        with suppress(UserError), folder.held():
            record = folder.read()
            if record.state not in ("finished", "failed", "interrupted") or not record.launches:
                jobs = f"{sky_client.ENVIRONMENT / 'bin' / 'sky'} jobs"
                remedy = _REMEDIES.get(report.status, f"`{jobs} logs {report.id}` shows what it printed")
                problem = f"SkyPilot: {report.status}: {report.reason or 'no reason given'}; {remedy}"
                record.state = "failed"
                command = ["sky", "jobs", "launch", job.script]
                record.launches.append(Launch(command=command, started=job.submitted, ended=now(), problem=problem))
                folder.write(record)
    _mark_ended(Path(job.script))


_REMEDIES = {
    "FAILED_NO_RESOURCE": f"name another card or place in resources of {settings_file()}",
    "FAILED_PRECHECKS": f"correct {settings_file()}",
}
