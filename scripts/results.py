"""A row a run, ours beside the published scores: `recipe results`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import models, study, tables
from .errors import UserError
from .evaluations import BASE_MODEL, Evaluation, read_scores
from .progress import say
from .rundir import Run, RunDir, all_runs

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown of runs that were made before there was one per token
REHEARSALS = "Rehearsals (small stand-in model and sample; not comparable with any published score)"


def readable(folders: Sequence[RunDir]) -> Iterator[tuple[RunDir, Run]]:
    """Runs whose run.json can be read; of the others that is said."""
    for folder in folders:
        try:
            yield folder, folder.read()
        except UserError as error:
            say(str(error))


def row(folder: RunDir, run: Run) -> dict[str, Any]:
    """What one run is and reached. Rehearsals are not compared with published scores."""
    published = aim(run)
    own = evaluation(folder.path, run)
    base = read_scores(folder.path / "evaluations" / BASE_MODEL)
    if own and base and any(getattr(own.settings, key) != getattr(base.settings, key) for key in _ALIKE):
        base = None  # made on other rows or otherwise, so not to be shown beside
    scores: dict[str, Any] = dict(own.scores) if own else {}
    summary = run.summary
    bleu4: float | None = scores.get("bleu4")
    difference = None
    if bleu4 is not None and published and own and comparable(own, run):
        difference = bleu4 - published.bleu4
    trained = run.state == "finished"
    due = [step for step, done in (("prepare", trained), ("run", trained), ("evaluate", own)) if not done]
    jobs = (f"{step}: {state}" for step in due if (state := folder.job_state(step)))
    changed = [d.key for d in run.differences if not d.why.startswith(_REHEARSED)] + run.axolotl_arguments
    return {
        "run": str(folder.path),
        "recipe": run.recipe,
        "variant_of": run.variant_of,
        "rehearsal": run.rehearsal,
        "state": run.state,
        "jobs": "; ".join(jobs) or None,
        "step": summary.step,
        "steps": summary.max_steps,
        "ended": summary.ended,
        "eval_loss_first": summary.eval_loss_per_token_first,
        "eval_loss": summary.eval_loss_per_token,
        "eval_loss_axolotl": summary.eval_loss,
        "rows_evaluated": scores.get("rows"),
        "test_set": own.settings.test_set if own else None,
        "bleu4": bleu4,
        "bleu4_base_model": base.scores["bleu4"] if base else None,
        "bleu4_published": published.bleu4 if published else None,
        "bleu4_difference": difference,
        "bertscore_f1": scores.get("bertscore_f1"),
        "rouge_l": scores.get("rouge_l"),
        "sacrebleu": scores.get("sacrebleu"),
        "peak_memory_gib": summary.peak_memory,
        "memory_kind": summary.memory_kind,
        "other_base_model": None if run.rehearsal else other_model(run),
        "tokens_per_second": summary.tokens_per_second,
        "train_seconds": summary.train_seconds,
        "changed_keys": ", ".join(changed),
    }


def aim(run: Run) -> study.Scores | None:
    """The published scores that a run tries for; a rehearsal, or a run on another base model, tries for none."""
    of_study = study.of(run.origin)
    return of_study.aimed_at(run.origin) if of_study and not run.rehearsal and not other_model(run) else None


def other_model(run: Run) -> str | None:
    """The base model of a run that is not its recipe's, nor a copy of that on the hub."""
    changed = next((difference for difference in run.differences if difference.key == "base_model"), None)
    return str(changed.run) if changed and not models.is_copy(changed.run, changed.recipe) else None


_REHEARSED = ("profile rehearsal", "rehearsal: ")  # what every rehearsal changes
_ALIKE = ("data_sha256", "rows", "decoding")


def evaluation(folder: Path, run: Run) -> Evaluation | None:
    """The evaluation of a run's own adapter; none of one that the run has trained on since."""
    found, last = read_scores(folder), run.launches[-1] if run.launches else None
    if found and last and found.made < (last.ended or last.started):
        return None
    return found


def comparable(scored: Evaluation, run: Run) -> bool:
    """Whether an evaluation is of a finished run, on just the rows of its study's published scores, decoded its way."""
    of_study, made = study.of(run.origin), scored.settings
    if of_study is None or run.rehearsal or other_model(run) or run.state != "finished" or made.limit is not None:
        return False
    return made.test_set == of_study.data.scored_on and made.decoding == of_study.decoding


def _short(full: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that fit a terminal."""
    step = f"{full['step']}/{full['steps'] or '?'}"
    if full["ended"] == "early stopping":
        step += ", early stopping"
    minutes = full["train_seconds"] / 60
    losses = None
    if full["eval_loss"] is not None:
        losses = f"{tables.text_of(full['eval_loss_first'])} → {tables.text_of(full['eval_loss'])}"
    short = {
        "run": Path(full["run"]).name,
        "recipe": full["recipe"],
        "state": full["state"],
        "jobs": full["jobs"],
        "step": step,
        "eval loss": losses,
        AXOLOTL_EVAL_LOSS: None if losses else full["eval_loss_axolotl"],
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
        "variant of": full["variant_of"],
        "changed": full["changed_keys"] or None,
    }


def show(runs: Path, form: str) -> None:
    """Print the results of all runs below a folder as `table`, `md`, `csv` or `json`."""
    rows = [row(*one) for one in readable(all_runs(runs))]
    if not rows and form != "json":
        say(f"no runs below {runs}/; `recipe run NAME --rehearse` makes one")
    elif form in ("json", "csv"):
        tables.write(rows, form)
    else:
        real = [_short(r) for r in rows if not r["rehearsal"]]
        rehearsals = [_short(r) for r in rows if r["rehearsal"]]
        if real:
            tables.write(real, form, "Runs")
            comparable_ones = (r for r in rows if not r["rehearsal"] and not r["other_base_model"])
            of_studies = {id(s): s for r in comparable_ones if (s := study.of(r["variant_of"] or r["recipe"]))}
            for of_study in of_studies.values():
                tables.write(baselines(of_study), form, "To compare with")
        if rehearsals:
            tables.write(rehearsals, form, REHEARSALS)


def baselines(of_study: study.Study) -> list[dict[str, Any]]:
    """A study's baselines, each named."""
    return [
        {"baseline": b.name, "BLEU-4": b.bleu4, "BERTScore F1": b.bertscore_f1, "on": b.test_set}
        for b in of_study.baselines
    ]


def show_study(of_study: study.Study, rows: list[dict[str, Any]], rehearsal: bool, form: str) -> None:
    """Print the rows of `verdict.rows` in the same forms."""
    if not rows and form != "json":
        say("no run of its recipes is rehearsed yet; `recipe reproduce` with --rehearse does that")
        return
    if form in ("json", "csv"):
        tables.write(rows if form == "json" else [_flat(full) for full in rows], form)
        return
    subset = of_study.data.subsets[of_study.data.scored_on].title
    title = f"{of_study.paper['authors']}, arXiv {of_study.paper['arxiv']}; published scores are on {subset}"
    from . import verdict

    for i, table in enumerate(verdict.tables_of(rows, of_study)):
        heading = (REHEARSALS if rehearsal else title) if i == 0 else None
        tables.write(table, form, heading, empty=True)
    if not rehearsal:
        tables.write(baselines(of_study), form, "To compare with")
        for line in verdict.notes(rows):
            print(line)


def _flat(full: dict[str, Any]) -> dict[str, Any]:
    """A row without anything below it, as CSV needs it."""
    gains = {f"gain_percent over {name}": gain for name, gain in full["gains_percent"].items()}
    texts = {key: "; ".join(full[key]) for key in ("differs", "open")}
    return {key: value for key, value in full.items() if key != "gains_percent"} | gains | texts
