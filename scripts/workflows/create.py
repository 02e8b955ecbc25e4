"""Creation of run folders, each with a record and a launch config."""

import os
import re
import shutil
from pathlib import Path

from ..base import paths, yamlfiles
from ..base.files import sha256, write_atomically
from ..base.progress import say, say_once
from ..base.secrets import masked
from ..base.yamlfiles import Config
from ..checks import trust
from ..configs import datafiles, substitution
from ..configs.compose import Composed, Request, filled
from ..runs.records import Run, collect
from ..runs.rundir import PLUGIN, RunDir, new_folder

AUTO_RESUME = "auto_resume_from_checkpoints"


def create(composed: Composed, request: Request) -> RunDir:
    """Create a run folder with launch config and record.

    Args:
        composed: the run's checked config.
        request: request from which the config was composed.
    """
    if composed.rehearsal and substitution.stands_in(composed.config):
        substitution.model_folder()
    folder = RunDir(new_folder(paths.runs() / composed.recipe, composed.digest[:7]))
    ours = launch_config(composed, folder)
    for difference in composed.differences:  # record tracker keys with placeholders filled in
        difference.run = ours.get(difference.key, difference.run)
    record = record_of(composed, request)
    try:
        write_atomically(folder.config, yamlfiles.write_yaml(ours))
        record.seal = trust.seal(folder, record)
        folder.write(record)
    except OSError:
        shutil.rmtree(folder.path)  # without a record the folder is not a run
        raise
    say(f"run {folder.path}")
    if record.variant_of:
        say(f"  a variant of {record.variant_of}")
    for difference in composed.differences:
        say_once(f"  {difference}")  # printed only once if this command creates several runs
    return folder


def record_of(composed: Composed, request: Request) -> Run:
    """Record of a new run, or of an adapter evaluated as a run.

    Args:
        composed: the run's checked config.
        request: request from which the config was composed.
    """
    return Run(
        recipe=composed.recipe,
        variant_of=composed.origin if composed.origin != composed.recipe else None,
        recipe_file=str(composed.recipe_file),
        recipe_sha256=sha256(composed.recipe_file),
        digest=composed.digest,
        rehearsal=composed.rehearsal,
        profiles=composed.profiles,
        overrides=[*map(masked, request.overrides)],
        forced=request.force,
        gpus_used=request.gpus,
        nodes=request.nodes,
        differences=[difference.public() for difference in composed.differences],
        of_variant=[difference.public() for difference in composed.of_variant],
        data=composed.data,
        named_files=datafiles.named_files(composed.config),
        test_data=datafiles.test_file(composed.config),
        cwd=str(Path.cwd()),
        provenance=collect(),
    )


def launch_config(composed: Composed, folder: RunDir) -> Config:
    """Config for Axolotl, with the run's folders, plugin and tracker names.

    Axolotl's own hash of prepared rows does not cover the data and some settings, so their folder's name has a hash
    that does. auto_resume_from_checkpoints is off, because Axolotl would also resume from a damaged checkpoint.
    """
    return _with_tracker_names(composed, folder) | {
        "output_dir": str(folder.output),
        "dataset_prepared_path": str(paths.cache() / "prepared" / composed.rows_digest[:16]),
        "plugins": [*(composed.config.get("plugins") or []), PLUGIN],
        **({AUTO_RESUME: False} if composed.config.get(AUTO_RESUME) else {}),
    }


def _with_tracker_names(composed: Composed, folder: RunDir) -> Config:
    """Fill in {placeholders} in the values of tracker keys.

    {project} is the name of the study, or of the recipe if it belongs to no study; rehearsals add a suffix. {run} is
    the path of the run folder below the project; `recipe` commands accept this path as a run's name. {runs} is the
    folder of all runs. Axolotl passes the value of each key to the tracker in the environment variable of the same
    name, unless the user has set this variable.
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
