"""Experiment trackers of a config that send data to a server."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..base.yamlfiles import Config

_TRACKERS = {  # keys that turn a tracker on (axolotl/utils/wandb_.py and others); key and values that keep it local
    "wandb": (("use_wandb", "wandb_project"), "wandb_mode", "offline|disabled|dryrun"),
    "comet": (("use_comet", "comet_project_name"), "comet_online", "False"),
    "swanlab": (("use_swanlab", "swanlab_project"), "swanlab_mode", "local|offline|disabled"),
    "mlflow": (("use_mlflow", "mlflow_experiment_name"), "mlflow_tracking_uri", "(?!http|databricks).*"),
    "trackio": (("use_trackio", "trackio_project_name"), "trackio_space_id", ""),
}


def remote(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Trackers that send data to a server, by name, each with the keys of the config that turn it on."""
    for name, (switches, key, local) in _TRACKERS.items():
        on = [switch for switch in switches if config.get(switch)]
        value = config.get(key)
        if value is None:
            value = os.environ.get(key.upper(), "")
        if on and not re.fullmatch(local, str(value)):
            yield name, on


LOGINS = {"wandb": "~/.netrc", "comet": "~/.comet.config", "swanlab": "~/.swanlab/.netrc"}
"""Files in which trackers store a login."""


def has_login(name: str) -> bool:
    """True if a tracker's API key is in the environment, or its login is in its file."""
    file = Path(LOGINS[name]).expanduser()
    if os.environ.get(f"{name.upper()}_API_KEY"):
        return True
    return file.is_file() and name in file.read_text(errors="replace")
