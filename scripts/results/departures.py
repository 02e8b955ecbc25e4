"""Departures of a run from its recipe: model, data, settings, and the tokens behind the eval loss."""

from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..configs import config, models
from ..configs.compose import MIRROR
from ..configs.config import Difference
from ..configs.datafiles import DataFile
from ..data import manifest
from ..data.manifest import is_the_studys
from ..data.published import EvalTokens
from ..runs.records import Run, Summary
from ..runs.rundir import RunDir


def other_model(run: Run) -> str | None:
    """Base model of a run; None if it is the recipe's model or a copy of it."""
    changed = next((difference for difference in run.from_origin if difference.key == "base_model"), None)
    return str(changed.run) if changed and not models.is_copy(changed.run, changed.recipe) else None


def other_data(run: Run) -> bool:
    """True if the config names data files that are not the study's, or a manifest shows other content."""
    for file, entry in _entries(run):
        is_of_file = entry.get("file") == Path(file.path).name
        if is_of_file and (entry.get("is_the_study_file") is False or entry.get("sha256") != file.sha256):
            return True
    moved = any(d.key.startswith("datasets") and d.key.endswith("path") for d in run.from_origin)
    verified = 0 < len(run.data) == sum(map(is_the_studys, manifest_entries(run)))
    return moved and not verified


def manifest_entries(run: Run) -> list[Config]:
    """Manifest entries of a run's data files, found by hash."""
    return [entry for file, entry in _entries(run) if entry.get("sha256") == file.sha256]


def _entries(run: Run) -> Iterator[tuple[DataFile, Config]]:
    """Data files of a run, each with every manifest entry of its folder."""
    for file in run.data:
        for entry in manifest.entries(Path(run.cwd, file.path).parent).values():
            yield file, entry


def other_settings(run: Run) -> dict[str, Any]:
    """Settings that differ from the recipe's, except trackers, output, GPUs, and a copy of its model."""
    return {change.key: change.run for change in run.from_origin if not _is_negligible(change)}


def _is_negligible(change: Difference) -> bool:
    """True for another tracker, output or number of GPUs, and for a copy of the recipe's model."""
    if change.key in ("base_model", "tokenizer_config"):
        return models.is_copy(change.run, change.recipe)
    if change.key == "seed":
        return change.recipe is None  # Axolotl's default, see `compose`
    if change.why == f"profile {MIRROR}" or change.why.startswith("--gpus "):
        return True
    return change.key in config.OF_THE_RUN or bool(config.TRACKING.match(change.key))


def other_tokens(folder: RunDir, run: Run, summary: Summary, recipe: str, published: EvalTokens | None) -> str | None:
    """Reason not to compare a run's eval loss with a published one, or None.

    The tokens behind both must be the same: those of a run of the unchanged recipe, or else those in study.yaml.
    Without either, no setting may differ that may affect them.

    Args:
        folder: the run's folder.
        run: content of run.json.
        summary: summary of the training.
        recipe: the recipe with the published loss.
        published: the tokens in study.yaml.
    """
    if summary.eval_loss_per_token is None and summary.eval_loss is not None:
        return "the scored tokens are unknown under tensor or context parallelism, and for streamed rows"
    own, expected = summary.eval_tokens, _of_unchanged(folder.runs(run.recipe), recipe) or published
    if own and expected:
        return None if own == expected else f"the eval loss covers {own['count']:,} tokens, not those of the recipe"
    changed = [key for key in other_settings(run) if not config.NOT_OF_EVAL_TOKENS.match(key)]
    if "seed" in changed and not yamlfiles.read_yaml(folder.config).get("val_set_size"):
        changed.remove("seed")  # it decides only which rows val_set_size holds out
    return f"the eval loss may cover other tokens than the recipe's, by {', '.join(changed)}" if changed else None


def _of_unchanged(runs: Path, recipe: str) -> EvalTokens | None:
    """Tokens behind the eval loss of the newest finished run of an unchanged recipe."""
    files = sorted((runs / recipe).glob("*/run.json"), reverse=True)
    tokens = (_if_unchanged(file.parent, file.stat().st_mtime_ns) for file in files)
    return next(filter(None, tokens), None)


@cache
def _if_unchanged(folder: Path, _: int) -> EvalTokens | None:
    with suppress(UserError):
        run = RunDir(folder).read()
        if run.state == "finished" and not run.rehearsal and not other_settings(run) and not other_data(run):
            return run.summary.eval_tokens
    return None
