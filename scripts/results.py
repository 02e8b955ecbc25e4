"""A row a run, ours beside the published scores: `recipe results`."""

from pathlib import Path
from typing import Any

import orjson

from . import study, tables
from .errors import UserError
from .progress import say
from .rundir import RunDir, all_runs


def row(folder: RunDir) -> dict[str, Any]:
    """What one run is and reached. Rehearsals are not compared with published scores."""
    run = folder.read()
    of_study = study.of(run.recipe)
    published = of_study.published.get(run.recipe) if of_study and not run.rehearsal else None
    scores, settings = _evaluation(folder.path)
    base, base_settings = _evaluation(folder.path / "evaluations" / "base-model")
    same = ("data_sha256", "rows", "max_new_tokens", "do_sample")
    if any(base_settings.get(key) != settings.get(key) for key in same):
        base = {}  # made on other rows or otherwise, so not to be shown beside
    bleu4, summary = scores.get("bleu4"), run.summary
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
        "bleu4_base_model": base.get("bleu4"),
        "bleu4_published": published.bleu4 if published else None,
        "bleu4_difference": bleu4 - published.bleu4 if published and bleu4 is not None else None,
        "sacrebleu": scores.get("sacrebleu"),
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(changed),
    }


def _evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of an evaluation and the settings they were made with; both empty where there is none."""
    adapter = folder / "output" / "adapter_model.safetensors"
    try:
        if adapter.exists() and adapter.stat().st_mtime > (folder / "scores.json").stat().st_mtime:
            return {}, {}  # of an adapter that a resumed run has trained on since
        content = orjson.loads((folder / "scores.json").read_bytes())
        return content["scores"], content["settings"]
    except (OSError, ValueError, KeyError):
        return {}, {}


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
    return short | {
        "rows": full["rows_evaluated"],
        "peak GiB": full["peak_memory_gib"],
        "tokens/s": round(speed) if speed else None,
        "minutes": f"{minutes:.1f}",
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
