"""Which model judges BERTScore: the one that a study or the user names, or the stand-in in a rehearsal."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..base.progress import say
from ..configs import substitution
from ..metrics.bertscore import ScorerModel, layer_of, made_by
from ..metrics.metric import Column

Judges = Mapping[str, ScorerModel | None]
"""For each column that a judge makes, by name, the one that does; None where that column is left out."""


class StandIn(ScorerModel):
    """The judge of a rehearsal."""

    @property
    def stand_in(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return substitution.SCORER

    def local_revision(self) -> str:
        return substitution.scorer_version()


def judge(asked: str | None, rehearsal: bool = False, declared: ScorerModel | None = None) -> ScorerModel | None:
    """The judge that a user asked for; None where there is to be no BERTScore.

    By default it is the stand-in in a rehearsal, otherwise the declared one if that is on this machine, as it is large.
    """
    declared = declared or ScorerModel()
    if asked == "none":
        return None
    if asked:
        return declared if asked == declared.model else ScorerModel(model=asked)
    if rehearsal:
        return StandIn(model=str(substitution.scorer_folder()), layer=substitution.SCORER_LAYERS)
    from huggingface_hub import try_to_load_from_cache

    here = declared.is_local or isinstance(try_to_load_from_cache(declared.model, "config.json"), str)
    return declared if here else None


def declared_in(columns: Mapping[str, Column]) -> dict[str, ScorerModel]:
    """The judges that columns declare, by the names of these."""
    return {name: column.parameters for name, column in columns.items() if isinstance(column.parameters, ScorerModel)}


def of_columns(columns: Mapping[str, Column], asked: str | None, rehearsal: bool = False) -> Judges:
    """The judge of each column that needs one, see `judge`."""
    return {name: judge(asked, rehearsal, by) for name, by in declared_in(columns).items()}


def say_left_out(columns: Mapping[str, Column], judges: Judges, asked: str | None) -> None:
    """Say which columns are left out because their model is not on this machine."""
    for name, by in declared_in(columns).items():
        if judges[name] is None and asked is None:
            fetched = f"`--bertscore {by.model}` fetches it"
            say(f"{columns[name].label} is left out: {by.model} is not on this machine; {fetched}")


def require(judges: Iterable[ScorerModel | None]) -> None:
    """Have the models of judges at hand, before hours are spent on what they are to score.

    Raises:
        UserError, WorkFailed: see `layer_of`.
    """
    for by in dict.fromkeys(judges):
        if by:
            layer_of(by)


def record_of(column: Column, scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """What scores.json says of the judge of a column; None where it has none, or the column was left out."""
    record = scores.get(column.recorded("bertscore")) if isinstance(column.parameters, ScorerModel) else None
    return record if isinstance(record, dict) else None


def same(judges: Judges, columns: Mapping[str, Column], scores: Mapping[str, Any]) -> bool:
    """Whether the same judges made scores."""
    return all(made_by(by, record_of(columns[name], scores)) for name, by in judges.items())
