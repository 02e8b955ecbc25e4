"""Writes plans of the built-in recipes, which `recipe plan` and `recipe check` show without a trace.

It also writes recipes/hours.json, which `recipe list` and recipes/README.md show. `make generated` runs all in order.

.venv/bin/python tools/plans.py          # traces the steps that the files lack, and drops those of no recipe
.venv/bin/python tools/plans.py --all    # traces all of them again, in some minutes
"""

import json
import sys
from dataclasses import asdict

from published_log import PlannedLog

from qlora_recipes.base import paths
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.data import studies
from qlora_recipes.plan import plan, step_plan
from qlora_recipes.plan.step_plan import StepPlan

GENERATIONS = ("T4", "A100", "H100")
"""A GPU of each generation that `steps.oldest_alike` tells apart."""


def step_plans(study: str = "") -> dict[str, StepPlan]:
    """Planners of the built-in recipes' steps, by key, or of one study's; recipes can share a step."""
    steps = {}
    for gpu in map(gpus.find_gpu, GENERATIONS):
        for name in paths.recipe_names():
            if name.startswith(study):
                config = compose(Request(name), gpu).config
                step, _ = step_plan.plan_step(config, gpu)
                steps[step.key] = step
        for log in logs(study, gpu).values():
            if log.log.reserved_bytes:
                steps[log.step_plan.key] = log.step_plan
    return steps


def logs(study: str = "", gpu: gpus.Gpu | None = None) -> dict[str, PlannedLog]:
    """Plans of the built-in recipes with the inputs of their logs, or those of one study's."""
    plans = {}
    for name in paths.recipe_names():
        of = studies.study_of(name)
        config = compose(Request(name), gpu).config
        log = of and name.startswith(study) and PlannedLog.of(of, name, config, gpu)
        if log:
            plans[name] = log
    return plans


def write(again: bool) -> None:
    """Write the files, with all figures computed again if asked."""
    figures = {}
    for key, step in sorted(step_plans().items()):
        built_in = None if again else step_plan.built_in().get(key)
        figures[key] = built_in or asdict(step.traced())
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(figure)}" for key, figure in figures.items())
    versions = json.dumps(step_plan.packages())
    step_plan.BUILT_IN.write_text(f'{{"versions": {versions},\n"plans": {{\n{lines}\n}}}}\n')


GPU = "A100 80GB"
"""GPU of estimated hours; all recipes fit on it."""


Hours = tuple[float, str]
"""Hours of a training, and their source: published, on the authors' GPU; or estimated, perhaps for full rows."""


def published_hours() -> dict[str, Hours]:
    """Published hours by recipe: those of its log, whose settings can differ."""
    hours = {}
    for study in studies.load_all():
        for name, results in study.published.items():
            if results.log and results.log.train_seconds:
                hours[name] = results.log.train_seconds / 3600, "published"
    return hours


def planned_hours(name: str) -> Hours | None:
    work = plan.plan_request(Request(name), gpus.find_gpu(GPU)).work
    if work is None or work.hours is None:
        return None
    return work.hours, "estimated, full rows" if work.full_rows else "estimated"


WORDS = {"learning_rates": "schedule", "steps": "steps", "trainable": "parameters", "adapter_bytes": "adapter"}
"""Words for figures of a log."""


def equal_to_log(planned: PlannedLog) -> str:
    """Words for the figures without a remark that equal the log; empty if none does."""
    words = []
    for figure in planned.compare():
        if figure.equal and figure.figure in WORDS.keys() - planned.log.remarks.keys():
            words.append(WORDS[figure.figure])
    return ", ".join(dict.fromkeys(words))


def recipes_with_verdicts() -> set[str]:
    """Recipes with a published score by their study's first metric, and something to judge a difference by."""
    names = set()
    for study in studies.load_all():
        metric = study.first.name
        for name, results in study.published.items():
            score = results.scores.get(metric)
            if score and (metric in study.tolerances or score.spread is not None or results.repeats.get(metric)):
                names.add(name)
    return names


def write_hours() -> None:
    """Write the hours of all recipes, the recipe whose verdict takes the fewest, and what equals the logs."""
    hours = published_hours()
    for name in paths.recipe_names():
        planned = None if name in hours else planned_hours(name)
        if planned:
            hours[name] = planned
    cheapest = min(recipes_with_verdicts() & hours.keys(), key=lambda name: hours[name])
    recipes = {}
    for name, (number, source) in sorted(hours.items()):
        recipes[name] = {"hours": round(number, 1 if number >= 1 else 2), "hours_are": source}
    equal = {name: equal_to_log(log) for name, log in logs().items()}
    content = {
        "gpu": GPU,
        "cheapest": cheapest,
        "recipes": recipes,
        "logs": {name: words for name, words in equal.items() if words},
    }
    paths.HOURS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write("--all" in sys.argv[1:])
    write_hours()
