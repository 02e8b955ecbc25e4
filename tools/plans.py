"""Writes plans of the shipped recipes and their logs, which `recipe plan` and `recipe check` show without a trace.

.venv/bin/python tools/plans.py          # traces the steps that the files lack, and drops those of no recipe
.venv/bin/python tools/plans.py --all    # traces all of them again, in some minutes
"""

import json
import sys
from dataclasses import asdict

from qlora_recipes.base import paths
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.data import studies
from qlora_recipes.plan import published_log, step_plan
from qlora_recipes.plan.published_log import PlannedLog
from qlora_recipes.plan.step_plan import StepPlan

GENERATIONS = ("T4", "A100", "H100")
"""A GPU of each generation that `steps.oldest_alike` tells apart."""


def step_plans(study: str = "") -> dict[str, StepPlan]:
    """Planners of the shipped recipes' steps, by key, or of one study's; recipes can share a step."""
    steps = {}
    for gpu in map(gpus.find, GENERATIONS):
        for name in paths.recipe_names():
            if name.startswith(study):
                step, _ = step_plan.plan_step(compose(Request(name), gpu).config, gpu)
                steps[step.key] = step
        for log in logs(study, gpu):
            if log.log.reserved_bytes:
                steps[log.step_plan.key] = log.step_plan
    return steps


def logs(study: str = "", gpu: gpus.Gpu | None = None) -> list[PlannedLog]:
    """Plans of the shipped recipes with the inputs of their logs, or those of one study's."""
    plans = []
    for name in paths.recipe_names():
        of = studies.study_of(name)
        if of and name.startswith(study):
            plans.append(PlannedLog.of(of, name, compose(Request(name), gpu).config, gpu))
    return [plan for plan in plans if plan]


def write(again: bool) -> None:
    """Write the files, with all figures computed again if asked."""
    figures = {}
    for key, step in sorted(step_plans().items()):
        shipped = None if again else step_plan.shipped().get(key)
        figures[key] = shipped or asdict(step.traced())
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(figure)}" for key, figure in figures.items())
    versions = json.dumps(step_plan.packages())
    step_plan.SHIPPED.write_text(f'{{"versions": {versions},\n"plans": {{\n{lines}\n}}}}\n')
    computed = {log.key: [asdict(figure) for figure in log.compute()] for log in logs()}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(figure)}" for key, figure in sorted(computed.items()))
    published_log.SHIPPED.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    write("--all" in sys.argv[1:])
