"""Records for a study's ledger, made of runs: `recipe results --export`."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from .. import places
from ..base import paths, private, yamlfiles
from ..base.errors import UserError
from ..base.files import sha256, write_atomically
from ..base.progress import say
from ..configs import config, datafiles, gpus, models
from ..configs.engines import KEYS
from ..data import ledger, study
from ..data.ledger_record import MOST_POINTS, NOT_SHOWN, Evaluation, Judge, Record, settings_sha256
from ..data.study import Study
from ..metrics.metric import Column
from ..planning import need
from ..runs.handover import AUTO_RESUME, PLUGIN
from ..runs.rundir import Run, RunDir
from ..scores import agreement, evaluations, score
from ..scores.judges import record_of
from . import card, comparable, curves

_NOT_SETTINGS = {*config.OF_THE_RUN, AUTO_RESUME, "seed"}


def export(folder: RunDir) -> Path:
    """Write the record of a run, for a study's ledger, into the current folder.

    Raises:
        UserError: the run is not one that a ledger takes, or the record would give something private away.
    """
    run = places.read(folder)
    record = of_run(folder, run)
    file = Path(record.file_name)
    text = record.model_dump_json(indent=1)
    write_atomically(file, re.sub(r"\[\s+(-?[\d.e-]+),\s+(-?[\d.e-]+)\s+\]", r"[\1, \2]", text) + "\n")
    if record.rehearsal:
        say("it is of a rehearsal, to try this out: the project's ledger takes none")
    else:
        say(f"it belongs in recipes/{record.study}/{ledger.FOLDER}/; CONTRIBUTING.md says how to hand it in")
        if str(record.revision).endswith("+"):
            say("the project's files had been changed when it ran, which the record says: a + behind the commit")
        if record.changed:
            say(f"it differs in {', '.join(record.changed)}, so tables show it apart from runs of the recipe itself")
    return file


def of_run(folder: RunDir, run: Run) -> Record:
    """The record of a run.

    Raises:
        UserError: see `export`.
    """
    of_study, own = _accepted(folder, run)
    recipe, cfg = yamlfiles.read_yaml(paths.recipe_file(run.origin)), yamlfiles.read_yaml(folder.config)
    made_with, git = run.provenance, run.provenance.get("git")
    content = {
        "made": own.made[:10],
        "rehearsal": run.rehearsal,
        "study": of_study.folder.name,
        "recipe": run.origin,
        "recipe_sha256": sha256(paths.recipe_file(run.origin)),
        "settings_sha256": settings_sha256(run.origin),
        "config_sha256": run.digest,
        "changed": {key: _shown(value) for key, value in changed(recipe, cfg, run).items()},
        "seed": cfg.get("seed", config.AXOLOTL_SEED),
        "profiles": [name for name in run.profiles if (paths.PROFILES / f"{name}.yaml").is_file()],
        "mirror": cfg.get("base_model") != recipe.get("base_model") and not run.rehearsal,
        "revision": f"{git['revision']}{'+' if git['dirty'] else ''}" if git else None,
        "lock_sha256": made_with.get("lock_sha256"),
        "packages": {"python": made_with.get("python")} | made_with.get("packages", {}),
        "machine": _machine(folder, run),
        "data": [{"name": Path(file.path).name, "sha256": file.sha256, "rows": file.rows} for file in run.data],
        "training": _training(folder, run, cfg),
        "evaluation": _evaluation(folder, run, of_study, own),
    }
    try:
        record = Record.model_validate_json(orjson.dumps(content))  # as it will be read
    except ValidationError as error:
        wrong = [*ledger.in_words(error)]
    else:
        hosts = {str(host) for host in (made_with.get("host"), *(launch.host for launch in run.launches)) if host}
        names = private.names_here() | hosts | {job.user for job in folder.jobs()}
        wrong = [*ledger.problems(record, of_study, names)]
    if wrong:
        raise UserError("\n".join(f"{folder.path}: no record is made of it: {what}" for what in wrong))
    return record


def _accepted(folder: RunDir, run: Run) -> tuple[Study, evaluations.Evaluation]:
    """The study of a run that a ledger takes, and its evaluation.

    Raises:
        UserError: it takes none such.
    """
    of_study, own = study.of(run.origin), evaluations.of_run(folder.path, run)
    again = f"`recipe evaluate {folder.path}` does that"
    if of_study is None or run.origin not in {*of_study.published, *of_study.beside}:
        reason = f"{run.origin} is no recipe of a study, nor a variant of one; a ledger is a study's"
    elif run.state != "finished":
        reason = f"the run is {run.state}, and a record is of a finished one"
    elif own is None:
        changed = evaluations.changed(folder.path, evaluations.read_scores(folder.path), run)
        reason = f"its evaluation is {changed}; {again} anew" if changed else f"it is not evaluated; {again}"
    elif own.version != score.VERSION:
        reason = f"it was scored by an earlier version of this project; {again} anew"
    elif own.settings.made_elsewhere:
        reason = "its predictions were made elsewhere, so that this project does not know by what"
    elif not own.settings.stands_for(own.settings.model_copy(update={"engine": evaluations.REFERENCE, "model": None})):
        reason = f"its predictions were {agreement.note(own.settings)}"
    elif own.settings.adapter_sha256 is None:
        reason = f"its evaluation does not say which adapter it is of; {again} anew"
    elif run.axolotl_arguments:
        reason = "Axolotl was given arguments beside its config, and a record has no place for them"
    elif not run.rehearsal and comparable.of_something_else(run):
        reason = "it is on another base model or other data than the recipe"
    elif not run.rehearsal and not comparable.comparable(own, run, of_study.first):
        rows = f"{of_study.test_title}, decoded and scored as study.yaml says"
        reason = f"it is not evaluated on all rows of {rows}; {again}"
    elif comparable.value(of_study.first, own, None) is None and not of_study.first.metric.of_loss:
        reason = f"it is not scored by {of_study.first.label}, the study's first metric; {again}"
    else:
        return of_study, own
    raise UserError(f"{folder.path}: no record is made of it: {reason}")


def changed(recipe: yamlfiles.Config, cfg: yamlfiles.Config, run: Run) -> dict[str, Any]:
    """The settings in which a run's config differs from its recipe, with the run's values: neither those that every run
    sets itself, nor what decides nothing about its numbers, such as trackers and where the study's data lie; that these
    are the study's is for `_accepted` to see."""
    plugins = [name for name in cfg.get("plugins") or [] if name != PLUGIN]
    ours = {key: value for key, value in cfg.items() if key != "plugins"} | ({"plugins": plugins} if plugins else {})
    found = {key: after for key, (_, after) in config.differences(recipe, ours).items()}
    same_model = models.is_copy(cfg.get("base_model"), recipe.get("base_model"))
    moved = not run.rehearsal and any(key.startswith("datasets.") and key.endswith(".path") for key in found)
    same_rows = run.ranks * datafiles.effective_batch(cfg) == datafiles.effective_batch(recipe)

    def counts(key: str) -> bool:
        top, last = key.partition(".")[0], key.rpartition(".")[2]
        if top in _NOT_SETTINGS or (top != "plugins" and card.is_private(key)):
            return False
        if key in ("base_model", "revision_of_model") and same_model:
            return False
        if top in ("datasets", "test_datasets") and last == "path" and moved:
            return False
        return not (key == "gradient_accumulation_steps" and run.ranks > 1 and same_rows)

    return {key: after for key, after in found.items() if counts(key)}


def _shown(value: Any) -> Any:
    """A changed setting's value where it is a number or one plain word, or a list of such; else `NOT_SHOWN`."""
    if isinstance(value, list):
        shown = [_shown(item) for item in value]
        return NOT_SHOWN if NOT_SHOWN in shown or any(isinstance(item, list) for item in shown) else shown
    if value is None or isinstance(value, bool | int | float):
        return value
    is_plain = isinstance(value, str) and re.fullmatch(r"[\w+-][\w.+-]{0,59}", value)
    return value if is_plain and not private.problem(value, private.names_here()) else NOT_SHOWN


def _machine(folder: RunDir, run: Run) -> dict[str, Any]:
    made_with = run.provenance
    cards = [] if run.rehearsal else made_with.get("gpus") or []
    if len(names := {str(card.get("name")) for card in cards}) > 1:
        there = ", ".join(sorted(names))
        raise UserError(f"{folder.path}: no record is made of it: its machine has {there}, and it does not say which")
    used = cards[0] if cards else {}
    return {
        "gpus": run.ranks if cards else 0,
        "nodes": run.nodes,
        "gpu": used.get("name"),
        "gpu_memory_gib": used.get("memory_gib"),
        "compute_capability": used.get("compute_capability"),
        "driver": used.get("driver"),
        "cpu": made_with.get("cpu", ""),
        "cores": made_with.get("cores"),
        "memory_gib": made_with.get("memory_gib"),
    }


def _training(folder: RunDir, run: Run, cfg: yamlfiles.Config) -> dict[str, Any]:
    summary = folder.summary(run)
    metrics = folder.read_metrics()
    steps = [record["step"] for record in metrics if record.get("loss") is not None]
    points = min(len(steps), MOST_POINTS)
    kept = [steps[len(steps) * (i + 1) // points - 1] for i in range(points)]
    curve = curves.over_the_same_steps(metrics, [(step, 0.0) for step in kept])
    return {
        "steps": summary.step,
        "epochs": summary.epoch,
        "seconds": summary.train_seconds,
        "tokens_per_second": summary.tokens_per_second,
        "peak_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "planned_gib": _planned(folder, run, cfg),
        "trainable_parameters": summary.trainable_parameters,
        "parameters": summary.parameters,
        "eval_loss_first": summary.eval_loss_per_token_first,
        "eval_loss": summary.eval_loss_per_token,
        "curve": [(step, round(loss, 5)) for step, loss in curve],
    }


def _planned(folder: RunDir, run: Run, cfg: yamlfiles.Config) -> float | None:
    """The GiB that were planned for a run on one GPU; None for others, and where no plan is kept."""
    cards = run.provenance.get("gpus") or []
    if run.rehearsal or not cards or run.ranks > 1 or any(cfg.get(key) for key in KEYS):
        return None
    planned = None
    with suppress(UserError):  # some configs cannot be planned
        planned = need.needed_gib(cfg, gpus.find(cards[0].get("compute_capability", "")))
    if planned is None:
        remedy = f"`recipe report {folder.path} --analyze` makes one"
        say(f"no plan of its memory is kept here, so the record has none; {remedy}")
    return planned


def _evaluation(folder: RunDir, run: Run, of_study: Study, own: evaluations.Evaluation) -> dict[str, Any]:
    kept = Evaluation.model_fields.keys() & type(own.settings).model_fields.keys()
    loss = folder.summary(run).eval_loss_per_token
    return {
        **own.settings.model_dump(include=kept),
        "version": own.version,
        "code_sha256": own.code_sha256,
        "scores": dict(_scores(run, of_study.columns.values(), own, loss)),
    }


def _scores(
    run: Run, columns: Iterable[Column], own: evaluations.Evaluation, loss: float | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The scores of a run by its study's metrics, as far as it was scored by these."""
    for column in columns:
        value = comparable.value(column, own, loss)
        by = record_of(column, own.scores)
        judge = None
        if by:
            revision = (
                by.get("revision") if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(by.get("revision"))) else None
            )
            judge = Judge(model=by["model"], layer=by.get("layer"), revision=revision, stand_in=by["stand_in"])
        if value is None or column.judged != (judge is not None):
            continue
        if judge and not run.rehearsal and not ledger.is_declared(judge, column):
            say(f"{column.label} is left out: {judge.model} judged it, and not the model that the study declares")
            continue
        interval = (own.scores.get("intervals") or {}).get(column.name)
        entry = {key: given for key, given in column.entry.items() if key != "label"}
        yield (
            column.name,
            {"value": value, "interval": interval, "metric": entry, "judge": judge and judge.model_dump()},
        )
