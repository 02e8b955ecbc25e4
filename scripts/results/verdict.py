"""A study's runs beside its published scores: the rows of `recipe results --study`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import places
from ..base import paths, tables, yamlfiles
from ..base.progress import say
from ..configs import config, datafiles
from ..configs.compose import REHEARSAL, TRACKERS
from ..data import study
from ..data.study import Study
from ..runs import lookup
from ..runs.lookup import all_runs
from ..runs.rundir import Run, RunDir
from ..scores import evaluations
from ..scores.evaluations import Evaluation
from . import run_rows
from .listing import REHEARSALS, baselines

WITHIN, ACCEPTABLE, OFF = "within the interval", "acceptable", "off"


def rows(
    of_study: Study, runs: Path, rehearsal: bool, speakers: Mapping[str, Path | None] | None = None
) -> list[dict[str, Any]]:
    """For each of a study's recipes the run that speaks for it, or none, and how its score compares.

    The run is the newest that was evaluated; a finished one, and one without overrides, is preferred. A run on another
    base model speaks for no recipe. Rehearsals are never mixed with real runs, and compared with nothing; a recipe that
    has none has no row among them.

    Args:
        of_study: the study.
        runs: the folder with the runs.
        rehearsal: whether it is about rehearsals.
        speakers: the folders of the runs that speak for some recipes; None has nothing speak for one.
    """
    by_recipe: dict[str, list[tuple[RunDir, Run]]] = {}
    for folder, run in lookup.readable(all_runs(runs), places.read):
        chosen_one = speakers is None or run.recipe not in speakers or speakers[run.recipe] == folder.path
        if run.rehearsal == rehearsal and chosen_one and (rehearsal or not run_rows.other_model(run)):
            by_recipe.setdefault(run.recipe, []).append((folder, run))
    found = []
    for recipe in [*of_study.published, *of_study.beside]:
        of_recipe = by_recipe.get(recipe, [])
        if of_recipe or (recipe in of_study.published and not rehearsal):
            chosen = max(of_recipe, key=lambda one: _speaks_for(*one), default=None)
            found.append(row(of_study, recipe, chosen, rehearsal))
    return found


def _speaks_for(folder: RunDir, run: Run) -> tuple[bool, bool, bool, str]:
    """What of a recipe's runs is preferred: to be finished, an evaluation, the recipe's own settings, being new."""
    plain = not run.overrides and not set(run.profiles) - {REHEARSAL, *TRACKERS} and not run.axolotl_arguments
    evaluated = evaluations.of_run(folder.path, run) is not None
    return run.state == "finished" and evaluated, evaluated, plain and run.ranks == 1, folder.path.name


def row(of_study: Study, recipe: str, chosen: tuple[RunDir, Run] | None, rehearsal: bool) -> dict[str, Any]:
    """What one run reached beside what was published.

    Returns:
        Scores and their intervals; `verdict`, whether the published BLEU-4 is in our interval, else whether it is
        acceptably near; the gain over each baseline in percent; costs; `differs`, the settings that the paper states
        and the run has otherwise; and `open`, those that the paper leaves open, as the run has them.
    """
    of_run = run_rows.row(*chosen) if chosen else {}
    scored = evaluations.of_run(chosen[0].path, chosen[1]) if chosen else None
    scores = scored.scores if scored else {}
    compared = bool(chosen and scored and run_rows.comparable(scored, chosen[1]))
    aim = None if rehearsal else of_study.aimed_at(recipe)
    ours, interval = scores.get("bleu4"), scores.get("intervals", {}).get("bleu4") or [None, None]
    difference = ours - aim.bleu4 if compared and aim and ours is not None else None
    verdict = None
    if aim and difference is not None:
        near = abs(difference) <= of_study.acceptable_bleu4_difference
        inside = interval[0] is not None and interval[0] <= aim.bleu4 <= interval[1]
        verdict = WITHIN if inside else ACCEPTABLE if near else OFF
    on_gpu = str(of_run.get("memory_kind")).startswith("GPU")
    hours = chosen[0].summary(chosen[1]).train_seconds * chosen[1].ranks / 3600 if chosen and on_gpu else None
    differs, left_open = _settings(of_study, recipe, chosen, scored) if chosen and not rehearsal else ([], [])
    return {
        "recipe": recipe,
        "run": of_run.get("run"),
        "state": of_run.get("state"),
        "rehearsal": rehearsal,
        "rows": scores.get("rows"),
        "test_set": scored.settings.test_set if scored else None,
        "bleu4": ours,
        "bleu4_low": interval[0],
        "bleu4_high": interval[1],
        "bleu4_published": aim.bleu4 if aim else None,
        "bleu4_difference": difference,
        "verdict": verdict,
        "gains_percent": {
            b.name: 100 * (ours / b.bleu4 - 1) if compared and ours is not None else None for b in of_study.baselines
        },
        "bertscore_f1": scores.get("bertscore_f1"),
        "bertscore_model": (scores.get("bertscore") or {}).get("model"),
        "bertscore_f1_published": aim.bertscore_f1 if aim else None,
        "rouge_l": scores.get("rouge_l"),
        "sacrebleu": scores.get("sacrebleu"),
        "bleu4_base_model": of_run.get("bleu4_base_model"),
        "eval_loss": of_run.get("eval_loss"),
        "peak_gpu_memory_gib": of_run.get("peak_memory_gib") if on_gpu else None,
        "tokens_per_second": of_run.get("tokens_per_second"),
        "gpu_hours": hours,
        "differs": differs,
        "open": left_open,
    }


def _settings(
    of_study: Study, recipe: str, chosen: tuple[RunDir, Run], scored: Evaluation | None
) -> tuple[list[str], list[str]]:
    """The settings that the paper states and a run has otherwise, and those that it leaves open, as the run has them.

    Which of the two a setting is, the comment behind it in the study's own recipe says; where the run has its value
    from, the comment in its recipe, or what was laid over that.
    """
    folder, run = chosen
    origin = of_study.origin(recipe)
    file = paths.RECIPES / f"{origin}.yaml"
    of_paper, paper = yamlfiles.sources(file), yamlfiles.read_yaml(file)
    sources = yamlfiles.sources(paths.RECIPES / f"{recipe}.yaml")
    sources |= {difference.key.partition(".")[0]: difference.why for difference in run.differences}
    ours = yamlfiles.read_yaml(folder.config)
    differs = [
        f"{key}: {_shown(after)} instead of {_shown(before)}"
        for key, (before, after) in config.differences(paper, ours).items()
        if of_paper.get(key.partition(".")[0], "").startswith("paper")
    ]
    if run.ranks > 1:
        rows, of_paper_rows = run.ranks * datafiles.effective_batch(ours), datafiles.effective_batch(paper)
        steps = "" if rows == of_paper_rows else f", with steps of {rows:g} rows instead of {of_paper_rows:g}"
        differs.append(f"GPUs: {run.ranks} instead of 1{steps}")
    left_open = [
        f"{key}: {_shown(ours[key])} ({sources.get(key, 'Axolotl')})"
        for key in of_study.open_settings
        if key in ours and not of_paper.get(key, "").startswith("paper")
    ]
    published = of_study.published[origin]
    if published.trainer != "Axolotl":
        left_open.append(f"trainer: Axolotl (the paper used {published.trainer})")
    decoding = (scored.settings.decoding if scored else of_study.decoding).model_dump(exclude_defaults=True)
    left_open.append(f"decoding: {_shown(decoding)} (the paper gives none)")
    return differs, left_open


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def tables_of(rows: list[dict[str, Any]], of_study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows as two tables that fit a terminal: BLEU-4 and its verdict, and everything else."""
    bleu, more = [], []
    for full in rows:
        low, high = full["bleu4_low"], full["bleu4_high"]
        gains = [(b.bleu4, full["gains_percent"][b.name]) for b in of_study.baselines]
        bleu.append(
            {
                "recipe": full["recipe"],
                "rows": full["rows"],
                "BLEU-4": full["bleu4"],
                "95 %": None if low is None else [low, high],
                "published": full["bleu4_published"],
                "difference": full["bleu4_difference"],
                "verdict": full["verdict"],
                **{f"over {bleu4}": None if gain is None else f"{gain:+.1f} %" for bleu4, gain in gains},
            }
        )
        speed = full["tokens_per_second"]
        more.append(
            {
                "recipe": full["recipe"],
                "BERTScore": full["bertscore_f1"],
                "published": full["bertscore_f1_published"],
                "by": full["bertscore_model"],
                "ROUGE-L": full["rouge_l"],
                "eval loss": full["eval_loss"],
                "peak GPU GiB": full["peak_gpu_memory_gib"],
                "tokens/s": round(speed) if speed else None,
                "GPU hours": full["gpu_hours"],
            }
        )
    return bleu, more


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Lines under the table: where a run departs from the paper, and what may explain a score that is off."""
    lines = []
    for full in rows:
        if full["differs"]:
            lines.append(f"{full['recipe']} differs from the paper: {'; '.join(full['differs'])}")
        if full["verdict"] == OFF:
            lines.append(f"{full['recipe']} is off, and the paper leaves open: {'; '.join(full['open'])}")
    return lines


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
    for i, table in enumerate(tables_of(rows, of_study)):
        heading = (REHEARSALS if rehearsal else title) if i == 0 else None
        tables.write(table, form, heading, empty=True)
    if not rehearsal:
        tables.write(baselines(of_study), form, "To compare with")
        for line in notes(rows):
            print(line)


def _flat(full: dict[str, Any]) -> dict[str, Any]:
    """A row without anything below it, as CSV needs it."""
    gains = {f"gain_percent over {name}": gain for name, gain in full["gains_percent"].items()}
    texts = {key: "; ".join(full[key]) for key in ("differs", "open")}
    return {key: value for key, value in full.items() if key != "gains_percent"} | gains | texts
