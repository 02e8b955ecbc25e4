"""A row a run, ours beside the published scores: `recipe results`."""

from pathlib import Path
from typing import Any

from . import study, tables
from .errors import UserError
from .evaluate import BASE_MODEL, Evaluation, read_scores
from .progress import say
from .rundir import Run, RunDir, all_runs


def row(folder: RunDir) -> dict[str, Any]:
    """What one run is and reached. Rehearsals are not compared with published scores."""
    run = folder.read()
    of_study = study.of(run.recipe)
    published = of_study.published.get(run.recipe) if of_study and not run.rehearsal else None
    own = _evaluation(folder.path, run)
    base = _evaluation(folder.path / "evaluations" / BASE_MODEL, None)
    if own and base and any(getattr(own.settings, key) != getattr(base.settings, key) for key in _ALIKE):
        base = None  # made on other rows or otherwise, so not to be shown beside
    scores: dict[str, Any] = dict(own.scores) if own else {}
    summary = run.summary
    bleu4: float | None = scores.get("bleu4")
    difference = None
    if bleu4 is not None and published and own and _whole_test_set(own, run):
        difference = bleu4 - published.bleu4
    changed = [d.key for d in run.differences] + run.axolotl_arguments
    return {
        "run": str(folder.path),
        "recipe": run.recipe,
        "rehearsal": run.rehearsal,
        "state": run.state,
        "step": summary.step,
        "steps": summary.max_steps,
        "eval_loss_first": summary.eval_loss_first,
        "eval_loss": summary.eval_loss,
        "rows_evaluated": scores.get("rows"),
        "bleu4": bleu4,
        "bleu4_base_model": base.scores["bleu4"] if base else None,
        "bleu4_published": published.bleu4 if published else None,
        "bleu4_difference": difference,
        "sacrebleu": scores.get("sacrebleu"),
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(changed),
    }


_ALIKE = ("data_sha256", "rows", "max_new_tokens", "do_sample")


def _evaluation(folder: Path, run: Run | None) -> Evaluation | None:
    """The evaluation in a folder; not one of an adapter that its run has trained on since."""
    found = read_scores(folder)
    if found and run and run.launches and found.made < (run.launches[-1].ended or found.made):
        return None
    return found


def _whole_test_set(evaluation: Evaluation, run: Run) -> bool:
    """Whether an evaluation is of all rows of the data that is prepared for it; others compare with nothing."""
    test_data = Path(run.cwd, str(run.test_data)).resolve()
    return evaluation.settings.limit is None and Path(evaluation.settings.data) == test_data


def _short(full: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that fit a terminal."""
    step = f"{full['step']}/{full['steps'] or '?'}"
    minutes = full["train_seconds"] / 60
    losses = None
    if full["eval_loss"] is not None:
        losses = f"{tables.text_of(full['eval_loss_first'])} → {tables.text_of(full['eval_loss'])}"
    short = {
        "run": Path(full["run"]).name,
        "recipe": full["recipe"],
        "state": full["state"],
        "step": step,
        "eval loss": losses,
        "BLEU-4": full["bleu4"],
        "base model": full["bleu4_base_model"],
    }
    if not full["rehearsal"]:
        short |= {"published": full["bleu4_published"], "difference": full["bleu4_difference"]}
    speed = full["tokens_per_second"]
    more = {} if full["rehearsal"] else {"changed": full["changed_keys"] or None}
    return short | {
        "rows": full["rows_evaluated"],
        "peak GiB": full["peak_memory_gib"],
        "tokens/s": round(speed) if speed else None,
        "minutes": f"{minutes:.1f}",
        **more,
    }


def show(runs: Path, form: str) -> None:
    """Print the results of all runs below a folder as `table`, `md`, `csv` or `json`."""
    rows = []
    for folder in all_runs(runs):
        try:
            rows.append(row(folder))
        except UserError as error:
            say(str(error))
    if form == "json":
        tables.print_json(rows)
    elif not rows:
        say(f"no runs below {runs}/; `recipe run NAME --rehearse` makes one")
    elif form == "csv":
        tables.print_csv(rows)
    else:
        write = tables.print_markdown if form == "md" else tables.print_table
        real = [_short(r) for r in rows if not r["rehearsal"]]
        rehearsals = [_short(r) for r in rows if r["rehearsal"]]
        if real:
            write(real, "Runs")
            write(_baselines({r["recipe"] for r in rows if not r["rehearsal"]}), "To compare with")
        if rehearsals:
            write(
                rehearsals,
                "Rehearsals (small stand-in model and sample; not comparable with any published score)",
            )


def _baselines(recipes: set[str]) -> list[dict[str, Any]]:
    """The baselines of the studies that recipes belong to, each named."""
    found = {id(s): s for s in map(study.of, sorted(recipes)) if s}
    return [
        {"baseline": b.name, "BLEU-4": b.bleu4, "BERTScore F1": b.bertscore_f1, "on": b.test_set}
        for s in found.values()
        for b in s.baselines
    ] or [{"baseline": "none: these recipes belong to no study"}]
