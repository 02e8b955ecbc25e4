"""Records for a study's ledger: `recipe results --export` makes one of a run, and `--ledger` shows them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from .. import backends, tables
from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.files import write_atomically
from ..base.progress import say
from ..configs import config, gpus, ledger
from ..configs.gpus import ENGINE_KEYS
from ..data import study
from ..data.study import Study
from ..metrics.bertscore import ScorerModel
from ..planning import planner
from ..runs.records import Run
from ..runs.rundir import RunDir
from ..scores import evaluations
from ..scores.score import model_record
from .run_rows import RunResult


def export(folder: RunDir) -> Path:
    """Write the record of a run, for a study's ledger, into the current folder.

    Raises:
        UserError: the run is not a finished and evaluated one of a study's recipe, or does not say what it ran on.
    """
    run = backends.read(folder)
    result = RunResult(folder, run)
    if reason := _refused(result):
        raise UserError(f"{folder.path}: no record is made of it: {reason}")
    try:
        record = record_of_run(result)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())
        raise UserError(
            f"{folder.path}: no record is made of it: the run does not record {wrong} as expected"
        ) from None
    file = Path(record.file_name())
    write_atomically(file, record.text())
    say(
        f"it belongs in recipes/{run.origin.partition('/')[0]}/{ledger.FOLDER}/; CONTRIBUTING.md says how to hand it in"
    )
    return file


def _refused(result: RunResult) -> str | None:
    """The reason why a ledger does not take a run."""
    run, own = result.run, result.evaluation
    of_study = study.of(run.origin)
    if of_study is None or run.origin not in {*of_study.published, *of_study.variants}:
        return f"{run.origin} is not a recipe of a study"
    if run.state != "finished" or run.rehearsal or run.published_adapter:
        what = "a rehearsal" if run.rehearsal else run.published_adapter or run.state
        return f"it is {what}, and a record needs a finished run with an adapter that was trained here"
    of_adapter = own is not None and own.settings.adapter_sha256 is not None
    if not of_adapter or not result.is_comparable(of_study.first):
        rows = f"a current evaluation of its adapter on {of_study.test_title} as study.yaml says"
        return f"it needs the recipe's model and data, and {rows}; `recipe evaluate {result.folder.path}` does that"
    if own and not own.settings.stands_for(own.settings.model_copy(update={"engine": evaluations.REFERENCE})):
        return f"its predictions were {own.settings.note}"
    if changed := [d.key for d in run.from_origin if not _allowed(d)] or run.axolotl_arguments:
        return f"it differs from the recipe in {', '.join(changed)}"
    return None


def _allowed(difference: config.Difference) -> bool:
    """Whether a difference from the recipe is one of a shipped profile, or does not affect the result."""
    key, (how, _, which) = difference.key, difference.why.partition(" ")
    of_profile = how == "profile" and (paths.PROFILES / f"{which}.yaml").is_file()
    is_data = key.partition(".")[0] in ("datasets", "test_datasets") and key.endswith(".path")
    return of_profile or is_data or how in ("--mirror", "--gpus") or key == "seed" or bool(config.TRACKING.match(key))


def record_of_run(result: RunResult) -> ledger.Record:
    """The record of a run and the evaluation of its adapter.

    Raises:
        ValidationError: the run lacks something, or records it in another form.
    """
    run, own, summary = result.run, result.evaluation, result.summary
    assert own and result.study
    cfg, git = yamlfiles.read_yaml(result.folder.config), run.provenance.get("git")
    card = (run.provenance.get("gpus") or [{}])[0]
    gpu = gpus.named(str(card.get("name")))
    versions = run.provenance.get("packages", {})
    used = {change.why.partition(" ")[2] for change in run.from_origin if change.why.startswith("profile ")}
    return ledger.Record.model_validate(
        {
            "made": own.made[:10],
            "recipe": run.origin,
            "settings_sha256": ledger.settings_sha256(run.origin),
            "config_sha256": run.digest,
            "adapter_sha256": own.settings.adapter_sha256,
            "profiles": sorted(used),
            "seed": cfg.get("seed", config.AXOLOTL_SEED),
            "revision": f"{git['revision']}{'+' if git['dirty'] else ''}" if git else None,
            "lock_sha256": run.provenance.get("lock_sha256"),
            "packages": {name: versions[name] for name in get_args(ledger.Package) if versions.get(name)},
            "gpus": run.ranks,
            "gpu": gpu.name if gpu else f"sm_{card.get('compute_capability')}".replace(".", ""),
            "steps": summary.step,
            "seconds": summary.train_seconds,
            "tokens_per_second": summary.tokens_per_second,
            "peak_gib": summary.peak_memory,
            "planned_gib": _planned(run, cfg, card.get("compute_capability")),
            "eval_loss": summary.eval_loss_per_token,
            "scores": _scores(result, result.study, own),
        }
    )


def _planned(run: Run, cfg: yamlfiles.Config, capability: str | None) -> float | None:
    """The GiB that were planned for a run on one GPU; None for others, and where no plan is kept."""
    if capability and run.ranks == 1 and not any(cfg.get(key) for key in ENGINE_KEYS):
        with suppress(UserError):  # some configs cannot be planned
            return planner.required_gib(cfg, gpus.find(capability))
    return None


def _scores(result: RunResult, of_study: Study, own: evaluations.Evaluation) -> dict[str, ledger.Score]:
    """The scores by the study's metrics; one by another scorer model than the study's is left out."""
    found = {}
    for name, column in of_study.columns.items():
        value, by = result.score(column), model_record(column, own.scores)
        declared = column.parameters.model if isinstance(column.parameters, ScorerModel) else ""
        if value is not None and (by is None or by["model"] in (declared, declared.rpartition("/")[2])):
            interval = (own.scores.get("intervals") or {}).get(name)
            found[name] = ledger.Score(value=value, interval=interval and (interval[0], interval[1]))
    return found


def show(studies: Sequence[Study], form: tables.Form) -> None:
    """Print the ledgers of studies in a form of `tables.Form`; as JSON the records themselves."""
    found = {of_study.folder.name: (of_study, ledger.records(of_study)) for of_study in studies}
    by_study = {name: ledger.table(of_study, records) for name, (of_study, records) in found.items() if records}
    if form == "json":
        tables.write([record.model_dump(mode="json") for _, records in found.values() for record in records], form)
    elif not by_study:
        say("no record in any ledger here; `recipe results --export RUN` writes one, and CONTRIBUTING.md says more")
    elif form == "csv":
        tables.write([row for rows in by_study.values() for row in rows], form)
    else:
        for name, rows in by_study.items():
            tables.write(rows, form, f"{ledger.TITLE}: {name}", spare=["Axolotl", "seed", "hours", "tokens/s"])
