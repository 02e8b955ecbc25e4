"""What SkyPilot is asked for: the user's settings file, overridden by --sky, laid over the task of a run."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import config

_OURS = ("name", "run", "num_nodes", "workdir")  # of a task, set by this project
_FILES = (
    "say how its machines get a run's files: `bucket: s3://name/folder` (or whatever fsspec reaches), where "
    "each keeps what it writes; or `shared: true` where they have this folder and this environment at the same paths"
)


def settings_file() -> Path:
    """The user's settings for SkyPilot."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qlora-recipes" / "sky.yaml"


def task_settings(overrides: Sequence[str]) -> tuple[Config, str | None]:
    """The part of a SkyPilot task that the user's file sets, with the values of --sky laid over it. SkyPilot itself
    judges its keys.

    Returns:
        That, and the URL of the bucket that its machines keep a run's files in; None where they share this one's.

    Raises:
        UserError: the file or an option is malformed, sets what this project sets, or does not say how the machines
            get a run's files.
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
    shared, bucket = settings.pop("shared", None) is True, settings.pop("bucket", None)
    if shared == bool(bucket):
        raise UserError(f"--on sky: {'either, not both: ' * shared}{file}, or --sky key=value, has to {_FILES}")
    if bucket and not re.match("[a-z0-9]+://.", str(bucket)):
        raise UserError(f"{file}: bucket: {bucket} is no URL, as s3://name/folder is")
    return settings, str(bucket) if bucket else None
