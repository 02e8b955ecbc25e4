"""The config that a run hands to Axolotl: with its own folders, the plugin, and names for its trackers."""

import hashlib
import os
import re
from pathlib import Path

from ..base import paths
from ..base.yamlfiles import Config
from ..configs.compose import Composed, filled
from ..configs.datafiles import DataFile
from .rundir import RunDir

PLUGIN = "qlora_recipes.plugin.RunPlugin"
AUTO_RESUME = "auto_resume_from_checkpoints"


def launched(composed: Composed, folder: RunDir) -> Config:
    """The config with what a run adds to it: its output folder, its plugin, the folder for prepared data, and its name
    for trackers. Axolotl's own resuming is off, because it would take a damaged checkpoint.
    """
    return _named_for_trackers(composed, folder) | {
        "output_dir": str(folder.output),
        "dataset_prepared_path": str(prepared_folder(composed.data)),
        "plugins": [*(composed.config.get("plugins") or []), PLUGIN],
        **({AUTO_RESUME: False} if composed.config.get(AUTO_RESUME) else {}),
    }


def prepared_folder(data: list[DataFile]) -> Path:
    """The folder for what Axolotl prepares of some files.

    It keys its cache by settings alone; a hash of the data in the path keeps a changed file from being taken for the
    old one.
    """
    content = hashlib.sha256("".join(file.sha256 for file in data).encode()).hexdigest()
    return paths.cache() / "prepared" / content[:16]


def _named_for_trackers(composed: Composed, folder: RunDir) -> Config:
    """The config with the {placeholders} of its trackers' keys filled in.

    project is the recipe's study, or the recipe where it has none; rehearsals have one of their own. run is the run's
    folder below that, the end of its path, so that other verbs find the run by it too; runs is the folder of all runs.
    Axolotl hands each of these keys to its tracker in the environment variable of the same name. A variable that the
    user has set takes precedence.
    """
    runs = folder.runs(composed.recipe)
    study = (composed.origin or composed.recipe).partition("/")[0]
    values = {
        "project": f"{study}-rehearsal" if composed.rehearsal else study,
        "run": str(folder.path.relative_to(runs)).removeprefix(f"{study}/"),
        "runs": str(runs),
    }
    trackers = {key: value for key, value in composed.config.items() if re.match("(wandb|mlflow|trackio)_", key)}
    named = {key: text for key, value in trackers.items() if (text := filled(value, values)) != value}
    return composed.config | {key: None if key.upper() in os.environ else text for key, text in named.items()}
