"""How jobs are submitted at a SLURM site: the user's settings file, overridden by --slurm."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..base import yamlfiles
from ..base.errors import UserError

STEPS = ("prepare", "run", "evaluate", "results")
_OURS = {  # options that this project sets for each job, or that would hide its id
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "output"),
    *("clusters", "parsable", "test-only", "wait", "wrap"),
}
_TEXTS = ("card", "prefix")  # keys of the settings that are not options of sbatch


def settings_file() -> Path:
    """The user's settings for their clusters."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qlora-recipes" / "slurm.yaml"


@dataclass
class Site:
    """How jobs are submitted at a site.

    Attributes:
        card: the GPU that jobs get, to check and plan for.
        prefix: what stands before `recipe` in a job, such as a container's `apptainer exec --nv IMAGE`; None where jobs
            have the environment of this command.
        setup: lines of shell at the start of each job.
        options: sbatch's long options and their values, in which {gpus} stands for the number of GPUs on a node; an
            empty value gives the option without one.
        of_step: further options for single steps.
    """

    card: str | None = None
    prefix: str | None = None
    setup: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    of_step: dict[str, dict[str, str]] = field(default_factory=dict)


def site_settings(overrides: Sequence[str]) -> Site:
    """The settings of the user's file, with the values of --slurm laid over them.

    Raises:
        UserError: the file or an option is malformed.
    """
    file = settings_file()
    site = Site()
    for key, value in (_read(file) if file.is_file() else {}).items():
        _set(site, key, value, f"{file}: {key}")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--slurm {text}: expected key=value, as in --slurm partition=gpu")
        step, dot, option = key.partition(".")
        _set(site, step, {option: value} if dot else value, f"--slurm {text}")
    return site


def _read(file: Path) -> dict[str, Any]:
    """The file's mapping, with values as text: YAML would read 12:00:00 as a number."""
    try:
        content = yaml.load(yamlfiles.read_text(file), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping of sbatch's long options to values")
    return content


def _set(site: Site, key: str, value: Any, where: str) -> None:
    if key in STEPS:
        if not isinstance(value, dict) or any(not isinstance(text, str) for text in value.values()):
            raise UserError(f"{where}: options for the step {key} are a mapping of their own")
        for option in value:
            _check_option(option, where)
        site.of_step[key] = site.of_step.get(key, {}) | value
    elif key == "setup":
        site.setup = value.splitlines() if isinstance(value, str) else value
        if not isinstance(site.setup, list) or any(not isinstance(line, str) for line in site.setup):
            raise UserError(f"{where}: expected lines of shell")
    elif isinstance(value, dict):
        raise UserError(f"{where}: not the name of a step; there are {', '.join(STEPS)}")
    elif not isinstance(value, str) or "\n" in value:
        raise UserError(f"{where}: expected one line of text")
    elif key in _TEXTS:
        setattr(site, key, value)
    else:
        _check_option(key, where)
        site.options[key] = value


def _check_option(option: str, where: str) -> None:
    if option in _OURS:
        instead = "; --nodes sets it" if option == "nodes" else ""
        raise UserError(f"{where}: {option} cannot be set for the jobs of this command{instead}")
