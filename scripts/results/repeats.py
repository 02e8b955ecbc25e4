"""Runs that repeat one another but for their seed, and the interval that their scores give together."""

from collections.abc import Sequence
from typing import Any

from ..base import yamlfiles
from ..base.yamlfiles import Config
from ..configs import config
from ..metrics.metric import Column
from ..runs.rundir import Run, RunDir
from ..scores import evaluations, noise
from ..scores.evaluations import Evaluation
from ..scores.judges import record_of
from . import comparable

Found = tuple[RunDir, Run]
SEED = "seed"
_SAME_ROWS = {"data_sha256", "rows"}
# settings of evaluations whose scores have one mean
_ALIKE = _SAME_ROWS | {"decoding", "quantized", "dtype", "engine"}
ONE_SEED = " of one seed"


def of(chosen: Found, candidates: Sequence[Found]) -> list[Found]:
    """A run, and behind it those of others that repeat it: finished, trained alike on the same data but for the seed,
    and evaluated alike on the same rows. Where there are several seeds, only the newest run of each counts: repeating a
    seed says nothing about others. A run that is not finished and evaluated has none."""
    own = evaluations.of_run(chosen[0].path, chosen[1])
    if chosen[1].state != "finished" or own is None or chosen[1].published_adapter:
        return [chosen]
    trained = _training(*chosen)
    found = [
        (folder, run)
        for folder, run in candidates
        if folder.path != chosen[0].path
        and run.recipe == chosen[1].recipe
        and run.state == "finished"
        and not run.published_adapter
        and run.rehearsal == chosen[1].rehearsal
        and _alike(own, evaluations.of_run(folder.path, run), _ALIKE)
        and trained is not None
        and _training(folder, run) == trained
    ]
    by_seed = {seed(folder): (folder, run) for folder, run in [*found, chosen]}
    return [chosen] + [one for one in (by_seed.values() if len(by_seed) > 1 else found) if one != chosen]


def _training(folder: RunDir, run: Run) -> Any:
    """What the training of a run depended on, but for its seed; None where its config is gone."""
    if not folder.config.is_file():
        return None
    leaves = config.flatten(yamlfiles.read_yaml(folder.config))
    settings = {key: repr(value) for key, value in leaves if not _matters_not(key.partition(".")[0])}
    return settings, [file.sha256 for file in run.data], run.ranks, run.axolotl_arguments


def _matters_not(key: str) -> bool:
    return key == SEED or key in config.OF_THE_RUN or bool(config.TRACKING.match(key))


def _alike(one: Evaluation, other: Evaluation | None, settings: set[str]) -> bool:
    return other is not None and one.settings.model_dump(include=settings) == other.settings.model_dump(
        include=settings
    )


def seed(folder: RunDir) -> Any:
    """The seed of a run."""
    cfg: Config = yamlfiles.read_yaml(folder.config) if folder.config.is_file() else {}
    return cfg.get(SEED, config.AXOLOTL_SEED)


def scores(column: Column, found: Sequence[Found]) -> dict[RunDir, float]:
    """The scores of runs by a metric, those of them that have one that compares with that of the first."""
    if not found:
        return {}
    first = evaluations.of_run(found[0][0].path, found[0][1])
    judge = record_of(column, first.scores) if first else None
    reached = {}
    for folder, run in found:
        own = evaluations.of_run(folder.path, run)
        value = comparable.value(column, own, folder.summary(run).eval_loss_per_token)
        if value is not None and (own is None or record_of(column, own.scores) == judge):
            reached[folder] = value
    return reached


def interval(
    name: str, found: Sequence[Found], scores: Sequence[float], known: Sequence[float] = ()
) -> noise.Interval | None:
    """The 95 % interval of the mean of runs' scores, see `noise.of_runs`.

    Args:
        name: the score's.
        found: the runs.
        scores: what they reached.
        known: published scores of repeats, whose spread stands in where there is only one run.
    """
    if len(found) > 1:
        made = noise.of_runs(scores, by_row(name, found))
        one_seed = len({repr(seed(folder)) for folder, _ in found}) == 1
        return noise.Interval(made.low, made.high, made.method + ONE_SEED) if made and one_seed else made
    own = evaluations.of_run(found[0][0].path, found[0][1])
    return noise.of_runs(scores, None, (own.scores.get("intervals") or {}).get(name) if own else None, known)


def by_row(name: str, found: Sequence[Found]) -> list[list[float]] | None:
    """A score of each row, for each of some runs; None where rows have none, or are not the same in all."""
    first = evaluations.of_run(found[0][0].path, found[0][1])
    if first is None or not all(_alike(first, evaluations.of_run(f.path, run), _SAME_ROWS) for f, run in found):
        return None
    predicted = [evaluations.read_predictions(folder.path) for folder, _ in found]
    if len({tuple(row.get("row") for row in rows) for rows in predicted}) != 1 or not predicted[0]:
        return None
    table = [[row[name] for row in rows if row.get(name) is not None] for rows in predicted]
    return table if all(len(one) == len(predicted[0]) for one in table) else None
