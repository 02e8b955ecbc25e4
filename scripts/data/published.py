"""What was published of a study's runs, as its study.yaml declares it."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ..base.errors import did_you_mean
from .declaration import Data, Misdeclared, Strict, Text

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What an adapter's folder has at least, as PEFT saves it."""

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


class Texts(Strict):
    """Texts in one of the data's files: a line each, or a field of rows; a dot reaches below, as in answer.text."""

    file: Text
    field: Text | None = None


class Predictions(Strict):
    """Predictions that authors published, with the references that they scored them against, in the test rows' order.

    Attributes:
        test_set: the test rows that they are of; by default those of the scores beside them.
        absent: why they cannot be had, instead of the files.
    """

    prediction: Texts | None = None
    reference: Texts | None = None
    test_set: Text | None = None
    absent: Text | None = None

    @model_validator(mode="after")
    def _are_there_or_not(self) -> Self:
        if {self.prediction is None, self.reference is None} != {self.absent is not None}:
            raise Misdeclared("give prediction and reference, the files with them, or absent, why there are none")
        return self

    @property
    def files(self) -> list[str]:
        """The files of the data that they are in."""
        return list(dict.fromkeys(texts.file for texts in (self.prediction, self.reference) if texts))


class Published(Strict):
    """What was published of one recipe.

    Attributes:
        scores: by metric, in the unit of that.
        repeats: by metric, the scores of runs that repeat it, itself among them.
        curve: a CSV file beside study.yaml with the columns step and train_loss.
        adapter: the folder, among the data's files, of the adapter that the authors trained.
    """

    scores: dict[str, Score] = Field(default={})
    repeats: dict[str, Annotated[list[float], Field(min_length=2)]] = Field(default={})
    trainer: str = "Axolotl"
    measured: Measured = Measured()
    curve: str | None = None
    predictions: Predictions | None = None
    adapter: Text | None = None


class Beside(Strict):
    """A recipe that is not among the study's own.

    Attributes:
        of: the study's recipe that it is a variant of.
        reproduces: whether its score is meant to be that recipe's published one.
    """

    of: str
    reproduces: bool


class Baseline(Strict):
    """Scores to compare with, and the model and test set that they are of.

    Attributes:
        compared: whether runs are compared with it; otherwise it is only there for its predictions.
    """

    name: str
    scores: dict[str, Score]
    test_set: str
    predictions: Predictions | None = None
    compared: bool = True


def adapter_files(data: Data, folder: str) -> list[str]:
    """The files of the data that are in an adapter's folder."""
    return [name for name in data.files if str(PurePosixPath(name).parent) == str(PurePosixPath(folder))]


def released(data: Data, published: dict[str, Published], baselines: list[Baseline]) -> set[str]:
    """The sources of the data that only these are about: predictions, and adapters that authors trained."""
    predictions = [of.predictions for of in published.values()] + [of.predictions for of in baselines]
    files = [file for some in predictions if some for file in some.files]
    files += [file for of in published.values() if of.adapter for file in adapter_files(data, of.adapter)]
    return set(data.sources_of(files)) - set(data.sources_of(data.raw_files))


def undeclared(data: Data, published: dict[str, Published], baselines: list[Baseline]) -> Iterator[Misdeclared]:
    """What published predictions and adapters name, and the data does not have."""
    owners = {("published", recipe): of.predictions for recipe, of in published.items()}
    owners |= {("baselines", str(i)): baseline.predictions for i, baseline in enumerate(baselines)}
    sets = ["test", *data.subsets]
    for at, predictions in owners.items():
        if predictions is None:
            continue
        if predictions.test_set is not None and predictions.test_set not in sets:
            there = did_you_mean(predictions.test_set, sets) or f"; there are {', '.join(sets)}"
            yield Misdeclared(f"no test set {predictions.test_set}{there}", *at, "predictions", "test_set")
        for side, texts in (("prediction", predictions.prediction), ("reference", predictions.reference)):
            if texts and texts.file not in data.files:
                there = did_you_mean(texts.file, data.files) or f"; there are {', '.join(data.files)}"
                yield Misdeclared(
                    f"no source of data gives a file {texts.file}{there}", *at, "predictions", side, "file"
                )
    for recipe, of in published.items():
        files = adapter_files(data, of.adapter) if of.adapter else []
        lacking = [file for file in ADAPTER_FILES if f"{of.adapter}/{file}" not in files]
        if of.adapter and lacking:
            sources = " and ".join(f"{of.adapter}/{file}" for file in lacking)
            yield Misdeclared(f"no source of data gives {sources}; add what is missing", "published", recipe, "adapter")
