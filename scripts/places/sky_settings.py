"""What SkyPilot is asked for: the user's settings file, overridden by --sky, laid over the task of a run."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import config

_OURS = ("name", "run", "num_nodes", "workdir")  # of a task, set by this project
_SHARED = "shared"
_WITHOUT = (
    "that its machines have this folder at this path, and this environment, as those of a cluster with shared storage; "
    "others are not supported yet"
)


def settings_file() -> Path:
    """The user's settings for SkyPilot."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qlora-recipes" / "sky.yaml"


def task_settings(overrides: Sequence[str]) -> Config:
    """The part of a SkyPilot task that the user's file sets, with the values of --sky laid over it. SkyPilot itself
    judges its keys.

    Raises:
        UserError: the file or an option is malformed, sets what this project sets, or does not say that the machines
            share this one's files.
    """
    file = settings_file()
    settings = yamlfiles.read_yaml(file) if file.is_file() else {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--sky {text}: expected key=value, as in --sky resources.infra=slurm/cluster/partition")
        try:
            settings = config.override(settings, key.strip(), yamlfiles.parse(value, f"--sky {text}"))
        except UserError as error:
            raise UserError(str(error).replace("--set", "--sky", 1)) from None
    for key in _OURS:
        if key in settings:
            raise UserError(f"{file}: {key} cannot be set for the jobs of this command")
    if not isinstance(settings.setdefault("resources", {}), dict):
        raise UserError(f"{file}: resources: expected a mapping, as SkyPilot's tasks have it")
    secrets = settings.get("secrets") or []
    if not isinstance(secrets, list) or any(not isinstance(name, str) for name in secrets):
        raise UserError(f"{file}: secrets: give a list of names, as in [HF_TOKEN]; values come from the environment")
    if missing := [name for name in secrets if name not in os.environ]:
        raise UserError(f"{file}: secrets: {', '.join(missing)}: not set in this environment")
    if settings.pop(_SHARED, None) is not True:
        raise UserError(f"--on sky: `{_SHARED}: true` in {file}, or --sky {_SHARED}=true, has to say {_WITHOUT}")
    return settings
