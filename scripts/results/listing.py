"""A row a run, ours beside the published scores: `recipe results`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import places
from ..base.progress import say
from ..data import study
from ..runs.lookup import all_runs, readable
from ..runs.rundir import Run, RunDir
from ..scores.evaluations import of_run
from ..terminal import tables
from .run_rows import row

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown for runs from before there was one per token
_SPARE = (
    *("minutes", "tokens/s", "rows", "peak GiB", "base model"),
    *("step", AXOLOTL_EVAL_LOSS, "eval loss", "published", "difference"),
)
_BELOW = ("changed", "variant of", "jobs")
REHEARSALS = "Rehearsals (small stand-in model, few rows; not comparable with any published score)"


def _jobs(folder: RunDir, run: Run) -> Iterator[str]:
    """The jobs that have not ended of a run's next steps, in words."""
    trained = run.state == "finished"
    for step, done in {"prepare": trained, "run": trained, "evaluate": of_run(folder.path, run)}.items():
        if not done and (state := places.job_state(folder, step)):
            yield f"{step}: {state}"


def _short(full: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that fit a terminal."""
    early = ", early stopping" if full["ended"] == "early stopping" else ""
    losses = None
    if full["eval_loss"] is not None:
        losses = f"{tables.text_of(full['eval_loss_first'])} → {tables.text_of(full['eval_loss'])}"
    short = {
        "run": Path(full["run"]).name,
        "recipe": full["recipe"],
        "state": full["state"],
        "jobs": full["jobs"],
        "step": f"{full['step']}/{full['steps'] or '?'}{early}",
        "eval loss": losses,
        AXOLOTL_EVAL_LOSS: None if losses else full["eval_loss_axolotl"],
        "BLEU-4": full["bleu4"],
        "base model": full["bleu4_base_model"],
    }
    if not full["rehearsal"]:
        short |= {"published": full["bleu4_published"], "difference": full["bleu4_difference"]}
    return short | {
        "rows": full["rows_evaluated"],
        "peak GiB": full["peak_memory_gib"],
        "tokens/s": round(full["tokens_per_second"]) if full["tokens_per_second"] else None,
        "minutes": f"{full['train_seconds'] / 60:.1f}",
        "variant of": full["variant_of"],
        "changed": full["changed_keys"] or None,
    }


def show(runs: Path, form: tables.Form) -> None:
    """Print the results of all runs below a folder, in a form of `tables.Form`."""
    rows = [row(folder, run, _jobs(folder, run)) for folder, run in readable(all_runs(runs), places.read)]
    if not rows and form != "json":
        say(f"no runs below {runs}/; `recipe run NAME --rehearse` makes one")
    elif form in ("json", "csv"):
        tables.write(rows, form)
    else:
        real = [_short(r) for r in rows if not r["rehearsal"]]
        rehearsals = [_short(r) for r in rows if r["rehearsal"]]
        if real:
            tables.write(real, form, "Runs", spare=_SPARE, below=_BELOW)
            comparable = [r for r in rows if not (r["rehearsal"] or r["other_base_model"] or r["other_data"])]
            of_studies = {s.folder: s for r in comparable if (s := study.of(r["variant_of"] or r["recipe"]))}
            for of_study in of_studies.values():
                tables.write(baselines(of_study), form, "To compare with")
        if rehearsals:
            tables.write(rehearsals, form, REHEARSALS, spare=_SPARE, below=_BELOW)


def baselines(of_study: study.Study) -> list[dict[str, Any]]:
    """A study's baselines, each named."""
    return [
        {"baseline": b.name, "BLEU-4": b.bleu4, "BERTScore F1": b.bertscore_f1, "on": b.test_set}
        for b in of_study.baselines
    ]
