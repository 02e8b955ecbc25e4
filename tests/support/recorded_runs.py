"""Runs that are complete enough for a record, most of the small study, and such records in results/."""

from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import small_study
from pydantic import ValidationError

from qlora_recipes.base import paths
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.evaluate.scores_file import VERSION, read_scores
from qlora_recipes.results import export_records
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir

RTX_4090 = {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 24.0, "compute_capability": "8.9", "driver": "580.95.05"}
HOST = "gpunode17"


def a_run(name: str, accuracy: float = 67.0, recipe_name: str = small_study.PLAIN, **more: Any) -> RunDir:
    """A finished and evaluated run in runs/ of the folder of work; see `completed` for `gpus`, `training` and
    `ran`, and for the rest `small_study.ran`."""
    complete = {key: more.pop(key) for key in ("gpus", "training", "ran") if key in more}
    return completed(small_study.ran(Path("runs"), recipe_name, name, accuracy, **more), **complete)


def completed(
    folder: RunDir,
    gpus: Sequence[dict[str, Any]] = (RTX_4090,),
    training: dict[str, Any] | None = None,
    ran: str | None = None,
) -> RunDir:
    """A run folder with all that a record takes from it; `gpus` are its machine's, `training` changes its summary, and
    `ran` is the name of what it ran, if that is not its recipe."""
    run, scored = folder.read(), read_scores(folder.path)
    assert scored
    run.digest, run.recipe = "c" * 64, ran or run.recipe
    run.summary = run.summary.model_copy(
        update={"step": 4, "epoch": 2.0, "eval_loss_per_token_first": 2.0} | (training or {})
    )
    run.data = run.data or [DataFile(path="data/codereviewer/train.jsonl", sha256="e" * 64, bytes=9, rows=109)]
    run.provenance = {
        "git": {"revision": "a" * 40, "dirty": False},
        "lock_sha256": "b" * 64,
        "packages": {"axolotl": "0.21.0", "torch": "2.14.1+cu130", "trl": None},
        "python": "3.13.5",
        "host": HOST,
        "os": "Linux",
        "cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz",
        "gpus": list(gpus),
    }
    folder.write(run)
    adapter = scored.settings.adapter_sha256 and sha256(folder.path.name.encode()).hexdigest()
    settings = scored.settings.model_copy(update={"data_sha256": "d" * 64, "adapter_sha256": adapter})
    scored = scored.model_copy(update={"settings": settings, "version": VERSION})
    (folder.path / "scores.json").write_text(scored.model_dump_json())
    return folder


def recorded(folder: RunDir, **change: Any) -> Path:
    """Put the record of a run into its study's results/ in the folder of work, with some fields changed."""
    run = folder.read()
    record = export_records.record_of_run(RunResult(folder, run))
    content = record.model_dump(mode="json", exclude_unset=True) | change
    with suppress(ValidationError):
        record = type(record).model_validate_json(orjson.dumps(content))
    file = Path("recipes", run.origin.partition("/")[0], "results", record.file_name())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(orjson.dumps(content))
    return file


def study_here(monkeypatch: Any, place: Path) -> None:
    small_study.write(place)
    monkeypatch.chdir(place)
    assert "sums2030" in {folder.name for folder in paths.studies()}
