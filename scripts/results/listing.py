"""A row a run, ours beside the published scores: `recipe results`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import backends, tables
from ..base.progress import say
from ..base.yamlfiles import write_flow
from ..data import study
from ..metrics.metric import Column
from ..runs.lookup import all_runs, readable
from ..runs.rundir import Run, RunDir
from ..scores.evaluations import of_run
from . import comparable, study_tables
from .run_rows import row
from .study_tables import REHEARSALS

AXOLOTL_EVAL_LOSS = "Axolotl's eval loss"  # shown for runs from before there was one per token
_SPARE = (
    *("minutes", "tokens/s", "rows", "peak GiB", "base model"),
    *("step", AXOLOTL_EVAL_LOSS, "eval loss", "published", "difference"),
)
_BELOW = ("trouble", "changed", "variant of", "jobs", "predictions", "adapter")


def _jobs(folder: RunDir, run: Run) -> Iterator[str]:
    """The jobs that have not ended of a run's next steps, in words."""
    trained = run.state == "finished"
    for step, done in {"prepare": trained, "run": trained, "evaluate": of_run(folder.path, run)}.items():
        if not done and (state := backends.job_state(folder, step)):
            yield f"{step}: {state}"


def _short(full: dict[str, Any], columns: Mapping[str, Column], decodings: Iterable[str]) -> dict[str, Any]:
    """The cells of a row that fit a terminal; the first of its columns is set beside what it compares with, further
    decodings among it."""
    early = ", early stopping" if full["ended"] == "early stopping" else ""
    kept = "" if full["kept_step"] in (None, full["step"]) else f", step {full['kept_step']} kept"
    losses = None
    if full["eval_loss"] is not None:
        losses = f"{tables.text_of(full['eval_loss_first'])} → {tables.text_of(full['eval_loss'])}"
    first, *others = columns
    short = {
        "run": Path(full["run"]).name,
        "recipe": full["recipe"],
        "state": full["state"],
        "jobs": full["jobs"],
        "step": f"{full['step']}/{full['steps'] or '?'}{early}{kept}",
        "eval loss": losses,
        AXOLOTL_EVAL_LOSS: None if losses else full["eval_loss_axolotl"],
        columns[first].label: full.get(first),
        **{f"{columns[first].label}, {name}": full.get(f"{first}_{name}") for name in decodings},
        "base model": full.get(f"{first}_base_model"),
    }
    if not full["rehearsal"]:
        short |= {"published": full.get(f"{first}_published"), "difference": full.get(f"{first}_difference")}
    return short | {
        **{columns[name].label: full.get(name) for name in others},
        "rows": full["rows_evaluated"],
        "peak GiB": full["peak_memory_gib"],
        "tokens/s": round(full["tokens_per_second"]) if full["tokens_per_second"] else None,
        "minutes": f"{full['train_seconds'] / 60:.1f}",
        "predictions": full["evaluation"],
        "adapter": full["published_adapter"],
        "trouble": full["trouble"],
        "variant of": full["variant_of"],
        "changed": full["changed_keys"] or None,
    }


def show(runs: Path, form: tables.Form) -> None:
    """Print the results of all runs below a folder, in a form of `tables.Form`."""
    found = [(folder, run) for folder, run in readable(all_runs(runs), backends.read)]
    rows = [row(folder, run, _jobs(folder, run)) for folder, run in found]
    if changed := [full["run"] for full in rows if full["evaluation"]]:
        say(f"{len(changed)} evaluations are stale or edited; `recipe evaluate {changed[-1]}` checks that of the last")
    if form == "json":
        tables.write(rows, form)
    elif form == "csv" and rows:
        tables.write(_of_one_shape(found, rows), form)
    else:
        for rehearsal in (False, True):
            some = [(*of, full) for of, full in zip(found, rows, strict=True) if full["rehearsal"] == rehearsal]
            groups = _groups(some)
            for of_study, columns, group in groups:
                title = REHEARSALS if rehearsal else "Runs"
                if len(groups) > 1:
                    title += f": {of_study.folder.name}" if of_study else ": of no study"
                decodings = [*of_study.decodings] if of_study else []
                spare = [*[column.label for column in columns.values()][:0:-1], *_SPARE]  # but for the first
                tables.write(
                    [_short(full, columns, decodings) for full in group], form, title, spare=spare, below=_BELOW
                )
                compared = not rehearsal and any(not (r["other_base_model"] or r["other_data"]) for r in group)
                if of_study and of_study.compared and compared:
                    tables.write(study_tables.baselines(of_study), form, "To compare with")


Group = tuple[study.Study | None, dict[str, Column], list[dict[str, Any]]]


def _groups(some: Sequence[tuple[RunDir, Run, dict[str, Any]]]) -> list[Group]:
    """Runs by their study, and those of none by what they were scored with, so that no column has numbers of two
    metrics: the study, the columns of scores, and the rows."""
    groups: list[Group] = []
    for folder, run, full in some:
        of_study = study.of_any(run.origin)
        columns = of_study.table if of_study else comparable.columns(run, of_run(folder.path, run))
        for other, there, rows in groups:
            if other is of_study and all(
                column.same_scores(there.get(name, column)) for name, column in columns.items()
            ):
                there |= columns
                rows.append(full)
                break
        else:
            groups.append((of_study, dict(columns), [full]))
    return groups


def _of_one_shape(found: Sequence[tuple[RunDir, Run]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same keys, those that a row lacks without a value; a name that means several metrics becomes one
    for each of these, with what that is."""
    of_rows = [comparable.columns(run, of_run(folder.path, run)) for folder, run in found]
    meant: dict[str, Column] = {}
    several = set()
    for columns in of_rows:
        several |= {name for name, column in columns.items() if not column.same_scores(meant.setdefault(name, column))}
    named = []
    for full, columns in zip(rows, of_rows, strict=True):
        of = {key: f"{key} {write_flow(columns[name].entry)}" for name in several & set(columns)
              for key in full if key == name or key.startswith(f"{name}_")}  # fmt: skip
        named.append({of.get(key, key): value for key, value in full.items()})
    keys = dict.fromkeys(key for full in named for key in full)
    return [{key: full.get(key) for key in keys} for full in named]
