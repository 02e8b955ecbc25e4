"""The task of a job of SkyPilot's, rendered from templates/sky.yml.j2."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.progress import PART
from ..base.templating import environment
from ..base.yamlfiles import Config
from ..runs.rundir import JOB
from ..runs.tasks import Command
from . import bucket

_KEPT = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_OFFLINE")  # where a job finds what is here


def rendered(name: str, commands: Sequence[Command], url: str | None) -> Config:
    """The task that carries out commands, one behind the other.

    Args:
        name: the job's.
        commands: none, to have only the machine judged.
        url: the bucket that has the files of its machine; None for a machine that shares this one's.
    """
    kept = {PART: "1", JOB: name}
    if url:
        kept |= {bucket.URL: url, "XDG_CACHE_HOME": str(paths.cache().parent.absolute())}
    else:
        kept |= {key: os.environ[key] for key in _KEPT if key in os.environ}
    text = (
        environment(paths.TEMPLATES)
        .get_template("sky.yml.j2")
        .render(
            name=name,
            environment={key: yamlfiles.write_flow(value) for key, value in kept.items()},
            shared=not url,
            home=shlex.quote(str(Path.home())),
            cwd=shlex.quote(str(Path.cwd())),
            bin=shlex.quote(str(Path(sys.executable).parent)),
            checkout=shlex.quote(str(paths.LOCK.parent)),
            folders=shlex.join(_folders(commands) if url else ()),
            commands=[
                {"words": shlex.join(command.words), "log": shlex.quote(str(log(command)))} for command in commands
            ],
        )
    )
    task: Config = yamlfiles.parse(text, "templates/sky.yml.j2")
    return task


def log(command: Command) -> Path:
    """The file for the messages of all attempts at a command."""
    return command.folder.path / f"sky-{command.step}.log"


def _folders(commands: Sequence[Command]) -> list[str]:
    """The folders that a machine of its own has to have, and to write to, for files to be where they are here."""
    folders = {Path.cwd(), paths.cache().absolute()}
    for command in commands:
        folders.add(command.folder.path.absolute().parent)
        inputs = bucket.read_by(command.folder.read(), command.words)
        folders |= {path.absolute().parent for path in inputs if path.exists()}
    return sorted(map(str, folders))
