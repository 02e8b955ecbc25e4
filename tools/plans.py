"""Writes the plans of the shipped recipes, which `recipe plan` and `recipe check` show without tracing a step.

.venv/bin/python tools/plans.py          # traces the steps that the file lacks, and drops those of no recipe
.venv/bin/python tools/plans.py --all    # traces all of them again, in some minutes
"""

import json
import sys
from dataclasses import asdict

from qlora_recipes.base import paths
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.plan import step_plan
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
    return steps


def write(again: bool) -> None:
    """Write the file, with all figures traced again if asked."""
    figures = {}
    for key, step in sorted(step_plans().items()):
        shipped = None if again else step_plan.shipped().get(key)
        figures[key] = shipped or asdict(step.traced())
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(figure)}" for key, figure in figures.items())
    versions = json.dumps(step_plan.packages())
    step_plan.SHIPPED.write_text(f'{{"versions": {versions},\n"plans": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    write("--all" in sys.argv[1:])
