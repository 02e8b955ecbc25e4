"""What there is: `recipe list`, `show` and `diff`."""

from contextlib import suppress
from typing import Any

from . import config, paths, plan, study
from .errors import UserError


def recipes() -> list[dict[str, Any]]:
    """Every shipped recipe, as `entry` describes it, and the memory that it needs where that was planned before."""
    found = []
    for name in paths.recipe_names():
        recipe = config.read_yaml(paths.RECIPES / f"{name}.yaml")
        with suppress(UserError):  # one that cannot be planned
            planned = None
            planned = plan.needed_gib(recipe)
        found.append(entry(name, recipe) | {"planned_gib": planned})
    return found


def entry(name: str, recipe: config.Config) -> dict[str, Any]:
    """A recipe's model, epochs and optimizer, and its published scores."""
    of_study = study.of(name)
    published = of_study.published.get(name) if of_study else None
    return {
        "recipe": name,
        "base_model": recipe.get("base_model"),
        "epochs": recipe.get("num_epochs"),
        "optimizer": recipe.get("optimizer"),
        "published_bleu4": published.bleu4 if published else None,
        "published_bertscore_f1": published.bertscore_f1 if published else None,
    }


def diff(a: str, b: str) -> list[dict[str, Any]]:
    """The keys in which two recipes or configs differ, with both values."""
    first, second = (config.read_yaml(paths.find_recipe(name)[1]) for name in (a, b))
    changed = config.differences(first, second)
    return [{"key": key, a: left, b: right} for key, (left, right) in changed.items()]
