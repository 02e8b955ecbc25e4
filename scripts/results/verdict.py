"""A study's runs beside its published scores: the rows of `recipe results --study`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import places
from ..base import paths, yamlfiles
from ..base.progress import say
from ..configs import config, datafiles
from ..configs.compose import REHEARSAL, TRACKERS
from ..data.study import Study
from ..runs import lookup
from ..runs.rundir import Run, RunDir
from ..scores import evaluations
from ..scores.evaluations import Evaluation
from ..scores.metrics import METRICS, PER_ROW
from ..terminal import tables
from . import run_rows
from .listing import REHEARSALS, baselines

WITHIN, ACCEPTABLE, OFF = "within the interval", "acceptable", "off"


def rows(
    of_study: Study, runs: Path, rehearsal: bool, speakers: Mapping[str, Path | None] | None = None
) -> list[dict[str, Any]]:
    """For each of a study's recipes the run that speaks for it, or none, and how its score compares.

    The run is the newest that was evaluated; a finished one, and one without overrides, is preferred. A run on another
    base model or on other data speaks for no recipe. Rehearsals are never mixed with real runs, and compared with
    nothing; a recipe without a rehearsal has no row among them.

    Args:
        of_study: the study.
        runs: the folder with the runs.
        rehearsal: whether it is about rehearsals.
        speakers: for some recipes, the folder of the run that speaks for it, or None for none.
    """
    candidates = [
        (folder, run)
        for folder, run in lookup.readable(lookup.all_runs(runs), places.read)
        if run.rehearsal == rehearsal
        and (rehearsal or not run_rows.of_something_else(run))
        and (speakers or {}).get(run.recipe, folder.path) == folder.path
    ]
    table = []
    for recipe in [*of_study.published, *of_study.beside]:
        of_recipe = [candidate for candidate in candidates if candidate[1].recipe == recipe]
        if of_recipe or (recipe in of_study.published and not rehearsal):
            chosen = max(of_recipe, key=lambda candidate: _preference(*candidate), default=None)
            table.append(study_row(of_study, recipe, chosen, rehearsal))
    return table


def _preference(folder: RunDir, run: Run) -> tuple[bool, bool, bool, str]:
    """The order in which a recipe's runs speak for it: finished and evaluated, plain, new ones last."""
    plain = not run.overrides and not set(run.profiles) - {REHEARSAL, *TRACKERS} and not run.axolotl_arguments
    evaluated = evaluations.of_run(folder.path, run) is not None
    return run.state == "finished" and evaluated, evaluated, plain and run.ranks == 1, folder.path.name


def study_row(of_study: Study, recipe: str, chosen: tuple[RunDir, Run] | None, rehearsal: bool) -> dict[str, Any]:
    """A run's results beside what was published.

    Returns:
        Scores and their intervals; `verdict`, whether the published BLEU-4 is in our interval, else whether it is
        acceptably near; the gain over each baseline in percent; costs; `differs`, the settings that the paper states
        and the run changed; and `open`, those that the paper leaves open, with the run's values.
    """
    ours = run_rows.row(*chosen) if chosen else {}
    scored = evaluations.of_run(chosen[0].path, chosen[1]) if chosen else None
    scores = scored.scores if scored else {}
    compared = bool(chosen and scored and "bleu4" in scores and run_rows.comparable(scored, chosen[1]))
    aim = None if rehearsal else of_study.aimed_at(recipe)
    interval = scores.get("intervals", {}).get("bleu4")
    difference = ours.get("bleu4_difference")
    verdict = None
    if aim and difference is not None:
        near = abs(difference) <= of_study.acceptable_bleu4_difference
        inside = interval and interval[0] <= aim.bleu4 <= interval[1]
        verdict = WITHIN if inside else ACCEPTABLE if near else OFF
    on_gpu = str(ours.get("memory_kind")).startswith("GPU")
    hours = chosen[0].summary(chosen[1]).train_seconds * chosen[1].ranks / 3600 if chosen and on_gpu else None
    differs, left_open = _settings(of_study, recipe, chosen, scored) if chosen and not rehearsal else ([], [])
    return {
        "recipe": recipe,
        "run": ours.get("run"),
        "state": ours.get("state"),
        "rehearsal": rehearsal,
        "rows": ours.get("rows_evaluated"),
        "test_set": ours.get("test_set"),
        "bleu4": ours.get("bleu4"),
        "bleu4_low": interval[0] if interval else None,
        "bleu4_high": interval[1] if interval else None,
        "bleu4_published": aim.bleu4 if aim else None,
        "bleu4_difference": difference,
        "verdict": verdict,
        "gains_percent": {
            b.name: 100 * (ours["bleu4"] / b.bleu4 - 1) if compared else None for b in of_study.baselines
        },
        "bertscore_f1": ours.get("bertscore_f1"),
        "bertscore_model": (scores.get("bertscore") or {}).get("model"),
        "bertscore_f1_published": aim.bertscore_f1 if aim else None,
        **{name: ours.get(name) for name in sorted(METRICS)},
        "bleu4_base_model": ours.get("bleu4_base_model"),
        "eval_loss": ours.get("eval_loss"),
        "peak_gpu_memory_gib": ours.get("peak_memory_gib") if on_gpu else None,
        "tokens_per_second": ours.get("tokens_per_second"),
        "gpu_hours": hours,
        "differs": differs,
        "open": left_open,
    }


def _settings(
    of_study: Study, recipe: str, chosen: tuple[RunDir, Run], scored: Evaluation | None
) -> tuple[list[str], list[str]]:
    """The settings that the paper states and a run changed, and those that it leaves open, with the run's values.

    The comment behind a setting in the study's own recipe says which of the two it is; the source of the run's value is
    the comment in its recipe, or the reason for the difference from that.
    """
    folder, run = chosen
    origin = of_study.origin(recipe)
    file = paths.RECIPES / f"{origin}.yaml"
    of_paper = yamlfiles.sources(file)
    paper = yamlfiles.read_yaml(file)
    sources = yamlfiles.sources(paths.RECIPES / f"{recipe}.yaml")
    sources |= {difference.key.partition(".")[0]: difference.why for difference in run.differences}
    ours = yamlfiles.read_yaml(folder.config)
    differs = [
        f"{key}: {_in_words(after)} instead of {_in_words(before)}"
        for key, (before, after) in config.differences(paper, ours).items()
        if of_paper.get(key.partition(".")[0], "").startswith("paper")
    ]
    if run.ranks > 1:
        rows = run.ranks * datafiles.effective_batch(ours)
        of_paper_rows = datafiles.effective_batch(paper)
        steps = "" if rows == of_paper_rows else f", with steps of {rows:g} rows instead of {of_paper_rows:g}"
        differs.append(f"GPUs: {run.ranks} instead of 1{steps}")
    left_open = [
        f"{key}: {_in_words(ours[key])} ({sources.get(key, 'Axolotl')})"
        for key in of_study.open_settings
        if key in ours and not of_paper.get(key, "").startswith("paper")
    ]
    published = of_study.published[origin]
    if published.trainer != "Axolotl":
        left_open.append(f"trainer: Axolotl (the paper used {published.trainer})")
    decoding = (scored.settings.decoding if scored else of_study.decoding).model_dump(exclude_defaults=True)
    left_open.append(f"decoding: {_in_words(decoding)} (the paper gives none)")
    return differs, left_open


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def tables_of(rows: list[dict[str, Any]], of_study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows as two tables that fit a terminal: BLEU-4 and its verdict, and everything else."""
    bleu = [
        {
            "recipe": full["recipe"],
            "rows": full["rows"],
            "BLEU-4": full["bleu4"],
            "95 %": None if full["bleu4_low"] is None else [full["bleu4_low"], full["bleu4_high"]],
            "published": full["bleu4_published"],
            "difference": full["bleu4_difference"],
            "verdict": full["verdict"],
            **{
                f"over {baseline.bleu4}": None if gain is None else f"{gain:+.1f} %"
                for baseline, gain in zip(of_study.baselines, full["gains_percent"].values(), strict=True)
            },
        }
        for full in rows
    ]
    more = [
        {
            "recipe": full["recipe"],
            "BERTScore": full["bertscore_f1"],
            "published": full["bertscore_f1_published"],
            "by": full["bertscore_model"],
            **{metric.label: full[name] for name, metric in PER_ROW.items() if name not in ("bleu4", "bertscore_f1")},
            "eval loss": full["eval_loss"],
            "peak GPU GiB": full["peak_gpu_memory_gib"],
            "tokens/s": round(full["tokens_per_second"]) if full["tokens_per_second"] else None,
            "GPU hours": full["gpu_hours"],
        }
        for full in rows
    ]
    return bleu, more


def notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines under the table: where a run departs from the paper, and what may explain a score that is off."""
    for full in rows:
        if full["differs"]:
            yield f"{full['recipe']} differs from the paper: {'; '.join(full['differs'])}"
        if full["verdict"] == OFF:
            yield f"{full['recipe']} is off, and the paper leaves open: {'; '.join(full['open'])}"


def show_study(of_study: Study, rows: list[dict[str, Any]], rehearsal: bool, form: tables.Form) -> None:
    """Print the rows of `verdict.rows`, in a form of `tables.Form`."""
    if form == "json":
        tables.write(rows, form)
    elif not rows:
        say("no run of its recipes is rehearsed yet; `recipe reproduce` with --rehearse does that")
    elif form == "csv":
        tables.write([_flat(full) for full in rows], form)
    else:
        subset = of_study.data.subsets[of_study.data.scored_on].title
        title = f"{of_study.paper['authors']}, arXiv {of_study.paper['arxiv']}; published scores are on {subset}"
        bleu, more = tables_of(rows, of_study)
        over = [column for column in bleu[0] if column.startswith("over ")]
        tables.write(bleu, form, REHEARSALS if rehearsal else title, empty=True, spare=[*over, "rows", "difference"])
        tables.write(more, form, empty=True, spare=["by", "tokens/s", "peak GPU GiB", "eval loss"])
        if not rehearsal:
            tables.write(baselines(of_study), form, "To compare with")
            for line in notes(rows):
                tables.print_text(line, wide=form != "table")


def _flat(full: dict[str, Any]) -> dict[str, Any]:
    """A row without nested values, for CSV."""
    gains = {f"gain_percent over {name}": gain for name, gain in full["gains_percent"].items()}
    texts = {key: "; ".join(full[key]) for key in ("differs", "open")}
    return {key: value for key, value in full.items() if key != "gains_percent"} | gains | texts
