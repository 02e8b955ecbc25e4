"""Keys whose values are paths, hosts or accounts, and the values that need the user's consent.

A config may come from somebody else.
"""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..base import yamlfiles
from ..base.yamlfiles import Config
from . import models


@cache
def table() -> Config:
    """Content of consent.yaml, by key."""
    return yamlfiles.read_yaml(Path(__file__).with_name("consent.yaml"))


def entry_of(key: str) -> Config:
    """Entry of a dotted key; empty if the table lacks the key."""
    name = re.sub(r"\.\d+(?=\.|$)", "", key)
    return next((entry for pattern, entry in table().items() if fnmatchcase(name, pattern)), {})


def required(key: str, value: Any) -> Config:
    """Entry of a key whose value needs the user's consent; empty if it needs none."""
    entry = entry_of(key)
    if not isinstance(value, str) or re.fullmatch(entry.get("allowed", ""), value.lower()):
        return {}
    if entry.get("kind") == "content" and _is_template(value):
        return {}
    return entry


def _is_template(written: str) -> bool:
    """True for text, which a rule checks, and for a .jinja file that uses the messages of a chat."""
    text = models.read_template(written)
    if text == written:
        return True
    return written.endswith((".jinja", ".jinja2")) and bool(re.search(r"\{[{%][^{}]*\bmessages\b", text))


_TRACKERS = {  # keys that turn a tracker on (axolotl/utils/wandb_.py and others); key and values that keep it local
    "wandb": (("use_wandb", "wandb_project"), "wandb_mode", "offline|disabled|dryrun"),
    "comet": (("use_comet", "comet_project_name"), "comet_online", "False"),
    "swanlab": (("use_swanlab", "swanlab_project"), "swanlab_mode", "local|offline|disabled"),
    "mlflow": (("use_mlflow", "mlflow_experiment_name"), "mlflow_tracking_uri", "(sqlite|file):.*|(?!databricks)[^:]*"),
    "trackio": (("use_trackio", "trackio_project_name"), "trackio_space_id", ""),
}


def remote_trackers(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Trackers that send data to a server, by name, each with the keys of the config that turn it on."""
    for name, (switches, key, local) in _TRACKERS.items():
        on = [switch for switch in switches if config.get(switch)]
        value = config.get(key, os.environ.get(key.upper(), ""))
        if on and not re.fullmatch(local, str(value)):
            yield name, on
