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
from ..scores.evaluations import VLLM
from . import bucket

_REACHES = ("AWS_ENDPOINT_URL", "AZURE_STORAGE_ACCOUNT_NAME")  # where a bucket is
_KEPT = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_OFFLINE")  # where a job finds what is here


def rendered(name: str, commands: Sequence[Command], url: str | None) -> Config:
    """The task that carries out commands, one behind the other.

    Args:
        name: the job's.
        commands: none, to have only the machine judged.
        url: the bucket that has the files of its machine; None for a machine that shares this one's.
    """
    kept = {PART: "1", JOB: name} | {key: os.environ[key] for key in (_REACHES if url else _KEPT) if key in os.environ}
    read = bucket.read_by(commands) if url else []
    if url:
        kept |= {bucket.URL: url, bucket.FILES: shlex.join(map(str, read))}
    folders = {Path.cwd(), paths.cache().absolute().parent, *(path.parent for path in read)}
    folders |= {command.folder.path.absolute().parent for command in commands}
    text = (
        environment(paths.TEMPLATES)
        .get_template("sky.yml.j2")
        .render(
            name=name,
            environment={key: yamlfiles.write_flow(value) for key, value in kept.items()},
            shared=not url,
            home=shlex.quote(str(Path.home())),
            cwd=shlex.quote(str(Path.cwd())),
            bin=shlex.quote(str(paths.LOCK.parent / ".venv" / "bin" if url else Path(sys.executable).parent)),
            checkout=shlex.quote(str(paths.LOCK.parent)),
            environments="setup vllm" if any(VLLM in command.words for command in commands) else "setup",
            cache=shlex.quote(str(paths.cache().absolute().parent)),
            folders=shlex.join(sorted(map(str, folders))),
            commands=[
                {"words": shlex.join(command.words), "log": shlex.quote(str(log(command)))} for command in commands
            ],
        )
    )
    task: Config = yamlfiles.parse(text, "templates/sky.yml.j2")
    return task


def log(command: Command) -> Path:
    """The file for the messages of all attempts at a command, absolute: elsewhere a link may lead to this folder."""
    return paths.unlinked(command.folder.path / f"sky-{command.step}.log")
