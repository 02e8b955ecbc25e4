"""How jobs are submitted on a site of SLURM: the user's file of settings, and what is given to --slurm."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..base import yamlfiles
from ..base.errors import UserError

STEPS = ("prepare", "run", "evaluate", "results")
_OURS = {  # options that each job has its own of, or that would keep its id from being known
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "output"),
    *("clusters", "parsable", "test-only", "wait", "wrap"),
}
_OWN = ("card", "prefix", "setup")  # keys of the settings that are no options of sbatch


def settings_file() -> Path:
    """The user's settings for the clusters that they use."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qlora-recipes" / "slurm.yaml"


@dataclass
class Settings:
    """How jobs are submitted on a site.

    Attributes:
        card: the GPU that jobs get, to check and plan for.
        prefix: what stands before `recipe` in a job, as a container's `apptainer exec --nv IMAGE`; None where the
            environment of this command is there too.
        setup: lines of shell for the beginning of a job.
        options: sbatch's long options and their values, {gpus} in which is the number of GPUs on a node; an empty value
            gives the option without one.
        of_step: further options for a step alone.
    """

    card: str | None = None
    prefix: str | None = None
    setup: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    of_step: dict[str, dict[str, str]] = field(default_factory=dict)


def settings(given: Sequence[str]) -> Settings:
    """The settings of the user's file, with what was given to --slurm laid over.

    Raises:
        UserError: the file or an option has another form.
    """
    file, found = settings_file(), Settings()
    for key, value in (_read(file) if file.is_file() else {}).items():
        _set(found, key, value, f"{file}: {key}")
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--slurm {text}: expected key=value, as in --slurm partition=gpu")
        step, dot, option = key.partition(".")
        _set(found, step if dot else key, {option: value} if dot else value, f"--slurm {text}")
    return found


def _read(file: Path) -> dict[str, Any]:
    """A mapping whose values are text, as they stand there: YAML would read 12:00:00 as a number."""
    try:
        content = yaml.load(yamlfiles.read_text(file), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping of sbatch's long options to values")
    return content


def _set(found: Settings, key: str, value: Any, where: str) -> None:
    if key in STEPS:
        if not isinstance(value, dict) or any(not isinstance(text, str) for text in value.values()):
            raise UserError(f"{where}: options for the step {key} are a mapping of their own")
        for option in value:
            _check_option(option, where)
        found.of_step[key] = found.of_step.get(key, {}) | value
    elif key == "setup":
        found.setup = value.splitlines() if isinstance(value, str) else value
        if not isinstance(found.setup, list) or any(not isinstance(line, str) for line in found.setup):
            raise UserError(f"{where}: expected lines of shell")
    elif isinstance(value, dict):
        raise UserError(f"{where}: no step of that name; there are {', '.join(STEPS)}")
    elif not isinstance(value, str) or "\n" in value:
        raise UserError(f"{where}: expected one line of text")
    elif key in _OWN:
        setattr(found, key, value)
    else:
        _check_option(key, where)
        found.options[key] = value


def _check_option(option: str, where: str) -> None:
    if option in _OURS:
        instead = "; --nodes sets it" if option == "nodes" else ""
        raise UserError(f"{where}: {option} is not for jobs of this command to have from outside{instead}")
