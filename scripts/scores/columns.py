"""Columns that predictions are scored with, and the scorer models of BERTScore."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..base.errors import UserError
from ..base.progress import say
from ..configs import substitution
from ..data import study
from ..metrics import registry
from ..metrics.bertscore import ScorerModel, layer_of, made_by
from ..metrics.metric import Column

# Scorer models by the names of the columns that need one; None where that column is left out.
ScorerModels = Mapping[str, ScorerModel | None]


class StandIn(ScorerModel):
    """The scorer model of a rehearsal."""

    @property
    def stand_in(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return substitution.SCORER

    def local_revision(self) -> str:
        return substitution.scorer_version()


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


def declared_models(columns: Mapping[str, Column]) -> dict[str, ScorerModel]:
    """Scorer models that columns declare, by the names of the columns."""
    return {name: column.parameters for name, column in columns.items() if isinstance(column.parameters, ScorerModel)}


def scorer_model(asked: str | None, rehearsal: bool = False, declared: ScorerModel | None = None) -> ScorerModel | None:
    """The scorer model that a user asked for; None where there is to be no BERTScore.

    By default it is the stand-in in a rehearsal, otherwise the declared one if that is on this machine, as it is large.
    """
    declared = declared or ScorerModel()
    if asked:
        own = declared if asked == declared.model else ScorerModel(model=asked)
        return None if asked == "none" else own
    if rehearsal:
        return StandIn(model=str(substitution.scorer_folder()), layer=substitution.SCORER_LAYERS)
    from huggingface_hub import try_to_load_from_cache

    here = declared.is_local or isinstance(try_to_load_from_cache(declared.model, "config.json"), str)
    return declared if here else None


def scorer_models(
    columns: Mapping[str, Column], asked: str | None, rehearsal: bool = False, report: bool = False
) -> ScorerModels:
    """The scorer model of each column that needs one, see `scorer_model`; `report` logs those that are not here."""
    models = {name: scorer_model(asked, rehearsal, declared) for name, declared in declared_models(columns).items()}
    for name, declared in declared_models(columns).items():
        if report and models[name] is None and asked is None:
            fetched = f"`--bertscore {declared.model}` fetches it"
            say(f"{columns[name].label} is left out: {declared.model} is not on this machine; {fetched}")
    return models


def require_models(models: Iterable[ScorerModel | None]) -> None:
    """Have scorer models at hand, before hours are spent on what they are to score.

    Raises:
        UserError, WorkFailed: see `layer_of`.
    """
    for model in filter(None, dict.fromkeys(models)):
        layer_of(model)


def model_record(column: Column, scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a column's scorer model in scores.json; None where it has none, or the column was left out."""
    record = scores.get(column.recorded("bertscore")) if isinstance(column.parameters, ScorerModel) else None
    return record if isinstance(record, dict) else None


def same_models(models: ScorerModels, columns: Mapping[str, Column], scores: Mapping[str, Any]) -> bool:
    """Whether the same scorer models made scores."""
    return all(made_by(model, model_record(columns[name], scores)) for name, model in models.items())
