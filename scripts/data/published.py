"""What was published of a study's runs, as its study.yaml declares it."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from .declaration import Strict

TRAIN_LOSS = "train_loss"  # a curve's column, and in a study's tolerances what is said of the largest gap to it


class Score(Strict):
    """A published score, and the ± that it is printed with. A number alone is one without that."""

    value: float
    spread: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, given: Any) -> Any:
        if isinstance(given, bool) or not isinstance(given, int | float | dict):
            raise ValueError("expected a number, or as in {value: 67.4, spread: 1.0}")
        return given if isinstance(given, dict) else {"value": given}

    def __str__(self) -> str:
        return f"{self.value:g}" + ("" if self.spread is None else f" ± {self.spread:g}")


class Measured(Strict):
    """What else was published of a run: the time of its steps, its speed, the memory that its training reserved on the
    GPU, and how many parameters it trained."""

    train_seconds: float | None = None
    tokens_per_second: float | None = None
    reserved_bytes: int | None = None
    trainable: int | None = None


class Published(Strict):
    """What was published of one recipe.

    Attributes:
        scores: by metric, in the unit of that.
        repeats: by metric, the scores of runs that repeat it, itself among them.
        curve: a CSV file beside study.yaml with the columns step and train_loss.
    """

    scores: dict[str, Score] = Field(default={})
    repeats: dict[str, Annotated[list[float], Field(min_length=2)]] = Field(default={})
    trainer: str = "Axolotl"
    measured: Measured = Measured()
    curve: str | None = None


class Beside(Strict):
    """A recipe that is not among the study's own.

    Attributes:
        of: the study's recipe that it is a variant of.
        reproduces: whether its score is meant to be that recipe's published one.
    """

    of: str
    reproduces: bool


class Baseline(Strict):
    """Scores to compare with, and the model and test set that they are of."""

    name: str
    scores: dict[str, Score]
    test_set: str
