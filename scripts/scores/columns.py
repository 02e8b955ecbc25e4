"""What predictions are scored with."""

from collections.abc import Iterable

from ..base.errors import UserError
from ..data import study
from ..metrics import registry
from ..metrics.metric import Column


def columns_of(recipe: str | None = None, asked: Iterable[str] = ()) -> dict[str, Column]:
    """What predictions are scored with: the metrics of the study that a recipe belongs to and those asked for; where
    there are neither, `registry.DEFAULT`.

    Args:
        recipe: the recipe's name, or that of the one it is a variant of; None for predictions of no recipe.
        asked: what was given to --metric.

    Raises:
        UserError: one asked for is malformed, or has the name of one of the study's that is declared otherwise.
    """
    of_study = study.of(recipe) if recipe else None
    own = of_study.columns if of_study else {}
    named = registry.asked(asked)
    for name, column in named.items():
        if name in own and not column.same_scores(own[name]):
            raise UserError(
                f"--metric {name}: {recipe}'s study declares {name} otherwise, and its runs are scored with that; give "
                f"yours another name, as in 'other: {{metric: {column.metric.name}}}'"
            )
    return named | own or registry.columns(registry.DEFAULT)
