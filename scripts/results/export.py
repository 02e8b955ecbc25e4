"""Records of runs and of published predictions: `recipe results --export`."""

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import get_args

import orjson
from pydantic import ValidationError

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import Row, write_atomically
from ..base.terminal import say
from ..config import gpus, merging
from ..config.training_settings import TrainingSettings
from ..data import studies
from ..data.published import Baseline
from ..data.studies import Study
from ..evaluate import scores_file
from ..evaluate.score import by_declared_model
from ..run import backends
from ..run.rundir import RunDir
from ..study import published_predictions
from ..training.run_record import Provenance, Run, collect
from . import score_records
from .run_result import RunResult


def export(folder: RunDir) -> Path:
    """Write the record of a run to the current folder.

    Raises:
        UserError: the run cannot be recorded, or a value for the record is missing or invalid.
    """
    result = RunResult(folder, backends.read(folder))
    if reason := _refused(result):
        raise UserError(f"{folder.path}: not exported: {reason}")
    try:
        record = record_of_run(result)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())
        raise UserError(f"{folder.path}: not exported: the run's record of {wrong} is missing or invalid") from None
    return _written(record, result.run.origin.partition("/")[0])


def export_predictions(of_study: Study, rows: Sequence[Row]) -> list[Path]:
    """Write records of published predictions to the current folder.

    Args:
        rows: scores from `reproduce.score_predictions`.
    """
    files = []
    owners = of_study.published | {baseline.name: baseline for baseline in of_study.baselines}
    for name, of_owner in groupby(rows, key=lambda row: str(row["of"])):
        owner = owners[name]
        test_set = owner.test_set if isinstance(owner, Baseline) else of_study.data.test_set
        assert owner.predictions
        read = published_predictions.read(of_study, owner.predictions, test_set)
        pairs = b"".join(orjson.dumps([row["reference"], row["prediction"]]) + b"\n" for row in read)
        scored = list(of_owner)
        record = score_records.Record.model_validate(
            {
                "made": datetime.now(UTC).date(),
                "of": name,
                "revision": _revision(collect()),
                "scores": {row["metric"]: _score(row["score"], row["low"], row["high"]) for row in scored},
                "invalidated": None,
                "stage": "predictions",
                "rows": scored[0]["rows"],
                "texts_sha256": hashlib.sha256(pairs).hexdigest(),
            }
        )
        files.append(_written(record, of_study.folder.name))
    return files


def _score(value: float, low: float | None, high: float | None) -> score_records.Score:
    return score_records.Score(value=value, interval=None if low is None or high is None else (low, high))


def _written(record: score_records.Record, study_name: str) -> Path:
    file = Path(record.file_name())
    write_atomically(file, record.text())
    where = f"recipes/{study_name}/{score_records.FOLDER}/"
    say(f"the record belongs in {where}; CONTRIBUTING.md describes how to submit it")
    return file


def _refused(result: RunResult) -> str | None:
    """Reason not to record a run, or None."""
    run, own = result.run, result.evaluation
    of_study = studies.study_of(run.origin)
    if of_study is None or run.origin not in {*of_study.published, *of_study.variants}:
        return f"{run.origin} is not a recipe of a study"
    if run.rehearsal or run.state not in ("finished", "failed"):
        return f"a record needs a finished or failed run that is not a rehearsal; this one is {run.state}"
    if result.other_tokens:
        return result.other_tokens
    if run.state == "finished" and not (result.is_comparable(of_study.first) and _adapter(result)):
        return (
            f"it needs the recipe's model and data, and a current evaluation of its adapter on {of_study.test_title}, "
            f"decoded as in study.yaml; run `recipe evaluate {result.folder.path}`"
        )
    if own and not own.settings.stands_for(own.settings.model_copy(update={"engine": scores_file.REFERENCE})):
        return f"its predictions were {own.settings.note}"
    if changed := [key for key in _changes(run) if key not in _cell_values(run, of_study)]:
        return f"it differs from the recipe in {', '.join(changed)}"
    return None


def _adapter(result: RunResult) -> str | None:
    """Hash of the scored adapter."""
    if result.evaluation:
        return result.evaluation.settings.adapter_sha256
    return result.run.adapter.sha256 if result.run.adapter else None


def _changes(run: Run) -> yamlfiles.Config:
    """Changed settings with the run's values, except those that leave the recipe's meaning."""
    changes = {}
    for difference in run.from_origin:
        key, source = difference.key, difference.source
        if source.kind == "gpus" or (source.kind == "profile" and source.name in score_records.PROFILES):
            continue
        if key == "seed" or merging.TRACKING.match(key) or re.fullmatch(r"(test_)?datasets\b.*\.path", key):
            continue
        changes[key] = difference.run
    return changes


def _cell_values(run: Run, of_study: Study) -> yamlfiles.Config:
    """Settings of the published grid point that a run repeats; empty if it repeats none."""
    changes = _changes(run)
    recipe = yamlfiles.read_yaml(paths.recipe_file(run.origin))
    cell = of_study.cell(run.origin, recipe, changes) if changes else None
    return cell.values if cell else {}


def _revision(made_with: Provenance) -> str | None:
    git = made_with.get("git")
    return f"{git['revision']}{'+' if git['dirty'] else ''}" if git else None


def record_of_run(result: RunResult) -> score_records.Record:
    """Create the record of a run.

    Raises:
        ValidationError: a value for the record is missing or invalid.
    """
    run, own, summary = result.run, result.evaluation, result.summary
    assert result.study
    used = (run.provenance.get("gpus") or [{}])[0]
    gpu = gpus.named(str(used.get("name")))
    versions = run.provenance.get("packages", {})
    finished = run.state == "finished"
    ended = own.made if own else run.launches[-1].ended if run.launches else None
    content: Row = {
        "made": (ended or run.created)[:10],
        "of": run.origin,
        "settings_sha256": score_records.settings_sha256(run.origin),
        "config_sha256": run.digest,
        "adapter_sha256": _adapter(result) if finished else None,
        "profiles": [name for name in run.profiles if name in score_records.PROFILES],
        "revision": _revision(run.provenance),
        "packages": {name: versions[name] for name in get_args(score_records.Package) if versions.get(name)},
        "gpus": run.ranks,
        "gpu": gpu.name if gpu else f"sm_{used.get('compute_capability')}".replace(".", ""),
        "scores": _scores(result, result.study) if finished else {},
        "invalidated": None,
        "outcome": _outcome(run),
        "stage": "adapter",
    }
    if not run.published_adapter:
        content |= {
            "stage": "training",
            "values": _cell_values(run, result.study),
            "seed": TrainingSettings.of(result.config).seed,
            "seconds": summary.train_seconds,
            "peak_gib": summary.peak_memory,
        }
    return score_records.Record.model_validate(content)


def _outcome(run: Run) -> str:
    """Outcome of a run: finished, failed or out of memory."""
    if run.state == "failed" and run.launches and run.launches[-1].out_of_memory:
        return "out of memory"
    return run.state


def _scores(result: RunResult, of_study: Study) -> dict[str, score_records.Score]:
    """Scores by the study's metrics.

    Scores from a scorer model that the study does not declare are left out.
    """
    found, own = {}, result.evaluation.scores if result.evaluation else {}
    for name, column in of_study.columns.items():
        value = result.score(column)
        if value is not None and by_declared_model(column, own):
            interval = own[name].interval if name in own else None
            found[name] = _score(value, *(interval or (None, None)))
    return found
