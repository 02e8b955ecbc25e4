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


def has_wandb_login() -> bool:
    """True if wandb's API key is in the environment or in ~/.netrc."""
    file = Path("~/.netrc").expanduser()
    if os.environ.get("WANDB_API_KEY"):
        return True
    return file.is_file() and "wandb" in file.read_text(errors="replace")
