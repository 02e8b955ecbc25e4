"""Records of runs and of published predictions: `recipe results --export`."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import get_args

import orjson
from pydantic import ValidationError

from ..base import paths
from ..base.errors import UserError
from ..base.files import Row, write_atomically
from ..base.terminal import say
from ..config import gpus
from ..config.training_settings import TrainingSettings
from ..data.studies import Study
from ..evaluate.score import by_declared_model
from ..evaluate.settings import REFERENCE
from ..run import backends
from ..run.rundir import RunDir
from ..study import published_predictions
from ..training.run_record import Provenance, Run, collect
from . import score_records
from .run_result import RunResult, other_training
from .score_records import Package, Record, Score


def export_run(run_dir: RunDir) -> Path:
    """Write the record of a run to the current folder.

    Raises:
        UserError: the run cannot be recorded, or a value for the record is missing or invalid.
    """
    result = RunResult(run_dir, backends.read(run_dir))
    reason = _refusal(result)
    if reason:
        raise UserError(f"not exported: {reason}", file=run_dir.path)
    try:
        record = record_of_run(result)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, mistake["loc"])) for mistake in error.errors())
        problem = f"not exported: the run's record of {fields} is missing or invalid"
        raise UserError(problem, file=run_dir.path) from None
    return _written(record, paths.study_name(result.run.origin))


def refuse_recorded(folder: RunDir) -> None:
    """Refuse a run that a study's record describes, because nobody could check the record without it.

    Raises:
        UserError: there is a record of the run.
    """
    result = RunResult(folder, backends.read(folder))
    if result.study is None or result.run.digest is None:
        return
    adapter = _adapter(result)
    for record in score_records.records(result.study):
        if record.config_sha256 == result.run.digest and record.adapter_sha256 in (None, adapter):
            problem = f"not removed: {record.file_name()} is a record of this run"
            raise UserError(problem, file=folder.path, remedy="--checkpoints removes only its checkpoints")


def export_predictions(study: Study, rows: Sequence[Row]) -> list[Path]:
    """Write records of published predictions to the current folder.

    Args:
        rows: scores from `reproduce.score_predictions`.
    """
    files = []
    for name, scored in groupby(rows, key=lambda row: str(row["name"])):
        record = _record_of_predictions(study, name, [*scored])
        files.append(_written(record, study.folder.name))
    return files


def _record_of_predictions(study: Study, name: str, scored: Sequence[Row]) -> Record:
    """Record of a recipe's or baseline's published predictions.

    Args:
        scored: scores by metric, from `reproduce.score_predictions`.
    """
    owners = study.published | {baseline.name: baseline for baseline in study.baselines}
    published = owners[name].predictions
    assert published
    predictions = published_predictions.read(study, published, scored[0]["test_set"])
    first = scored[0]
    texts = b"".join(orjson.dumps([row["reference"], row["prediction"]]) + b"\n" for row in predictions)
    content = {
        "made": datetime.now(UTC).date(),
        "name": name,
        "revision": _revision(collect()),
        "scores": {row["metric"]: _score_of(row) for row in scored},
        "invalidated": None,
        "stage": "predictions",
        "rows": first["rows"],
        "texts_sha256": hashlib.sha256(texts).hexdigest(),
    }
    return Record.model_validate(content)


def _score_of(row: Row) -> Score:
    """Score in a row of `reproduce.score_predictions`."""
    if row["low"] is None:
        return Score(value=row["score"])
    return Score(value=row["score"], interval=(row["low"], row["high"]))


def _written(record: Record, study_name: str) -> Path:
    file = Path(record.file_name())
    write_atomically(file, record.text())
    where = f"recipes/{study_name}/{score_records.FOLDER}/"
    say(f"the record belongs in {where}; CONTRIBUTING.md describes how to submit it")
    return file


def _refusal(result: RunResult) -> str | None:
    """Reason not to record a run, or None."""
    run, study = result.run, result.study
    if study is None or not study.aimed_at(run.origin).scores:
        return f"{run.origin} has no published scores"
    if run.rehearsal or run.state not in ("finished", "failed"):
        return f"a record needs a finished or failed run that is not a rehearsal; this one is {run.state}"
    if result.incomparable_loss:
        return result.incomparable_loss
    if run.state == "finished" and not result.is_comparable(study.first):
        return (
            f"it needs the recipe's model and data, and a current evaluation of its adapter on {study.test_title}, "
            f"decoded as in study.yaml; run `recipe evaluate {result.folder.quoted}`"
        )
    if result.evaluation:
        settings = result.evaluation.settings
        if not settings.engine_stands_for(settings.model_copy(update={"engine": REFERENCE})):
            return f"its predictions were {settings.note}"
    changes = other_training(run)
    if changes and not result.grid_point:
        return f"it differs from the recipe in {', '.join(changes)}"
    return None


def _adapter(result: RunResult) -> str | None:
    """Hash of the scored adapter."""
    if result.evaluation:
        return result.evaluation.settings.adapter_sha256
    if result.run.adapter:
        return result.run.adapter.sha256
    return None


def _revision(provenance: Provenance) -> str | None:
    """Commit of the project, with + for uncommitted changes; None outside a checkout."""
    git = provenance.get("git")
    if git is None:
        return None
    return f"{git['revision']}+" if git["dirty"] else git["revision"]


def record_of_run(result: RunResult) -> Record:
    """Create the record of a run.

    Raises:
        ValidationError: a value for the record is missing or invalid.
    """
    run = result.run
    assert result.study
    moment: str | None = run.created
    if result.evaluation:
        moment = result.evaluation.created
    elif run.launches:
        moment = run.launches[-1].ended
    content: Row = {
        "made": str(moment)[:10],
        "name": run.origin,
        "settings_sha256": score_records.settings_sha256(run.origin),
        "config_sha256": run.digest,
        "adapter_sha256": None,
        "scores": {},
        "invalidated": None,
        "outcome": _outcome(run),
        "stage": "adapter",
    }
    content |= {
        "profiles": [name for name in run.profiles if name in score_records.PROFILES],
        "revision": _revision(run.provenance),
        "packages": _packages(run.provenance),
        "gpus": run.ranks,
        "gpu": _gpu(run.provenance),
    }
    if run.state == "finished":
        content |= {"adapter_sha256": _adapter(result), "scores": _scores(result, result.study)}
    if not run.published_adapter:
        content |= {
            "stage": "training",
            "settings": result.grid_point.settings if result.grid_point and other_training(run) else {},
            "seed": TrainingSettings.of(result.config).seed,
            "seconds": result.summary.train_seconds,
            "peak_gib": result.summary.peak_memory,
        }
    return Record.model_validate(content)


def _packages(provenance: Provenance) -> dict[str, str]:
    """Versions of the installed packages that records name."""
    versions = provenance.get("packages", {})
    return {name: version for name, version in versions.items() if version and name in get_args(Package)}


def _gpu(provenance: Provenance) -> str:
    """Name of the first GPU in gpus.yaml; for an unlisted one, its capability, such as sm_86."""
    first = (provenance.get("gpus") or [{}])[0]
    gpu = gpus.named(str(first.get("name")))
    if gpu:
        return gpu.name
    return f"sm_{first.get('compute_capability')}".replace(".", "")


def _outcome(run: Run) -> str:
    """Outcome of a run: finished, failed or out of memory."""
    if run.launches and run.launches[-1].out_of_memory:
        return "out of memory"
    return run.state


def _scores(result: RunResult, study: Study) -> dict[str, Score]:
    """Scores by the study's metrics.

    Scores from a scorer model that the study does not declare are left out.
    """
    records, scores = result.score_records, {}
    for name, column in study.columns.items():
        value = result.score(column)
        if value is None or not by_declared_model(column, records):
            continue
        interval = records[name].interval if name in records else None
        scores[name] = Score(value=value, interval=interval)
    return scores
