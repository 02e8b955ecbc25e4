"""Published results of a study's recipes, as its study.yaml declares them."""

from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ..base.yamlfiles import Config
from .declaration import Data, Key, Mistake, Name, Strict, Text, undeclared

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files that PEFT saves of every adapter."""

TRAIN_LOSS = "train_loss"  # a curve's column; in a study's tolerances the largest acceptable gap to it


class PublishedScore(Strict):
    """A published score, and the ± that it is printed with. A number alone is one without that."""

    value: float
    spread: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, given: Any) -> Any:
        return given if isinstance(given, dict) else {"value": given}

    def __str__(self) -> str:
        return f"{self.value:g}" + ("" if self.spread is None else f" ± {self.spread:g}")


class Measured(Strict):
    """Other published figures of a run: the time of its steps, its speed, the memory that its training reserved on the
    GPU, and the number of parameters that it trained."""

    train_seconds: float | None = None
    tokens_per_second: float | None = None
    reserved_bytes: int | None = None
    trainable: int | None = None


class Texts(Strict):
    """Texts in a file of the data: a line each, or a field, as in answer.text."""

    file: Text
    field: Text | None = None


class PublishedPredictions(Strict):
    """Predictions that authors published, with the references that they scored them against, in the test rows' order.

    Attributes:
        test_set: the test rows that they belong to; by default those of the scores beside them.
        absent: the reason why they cannot be had, instead of the files.
    """

    prediction: Texts | None = None
    reference: Texts | None = None
    test_set: Text | None = None
    absent: Text | None = None

    @model_validator(mode="after")
    def _are_there_or_not(self) -> Self:
        if {self.prediction is None, self.reference is None} != {self.absent is not None}:
            raise ValueError("give prediction and reference, or absent, the reason why there are none")
        return self

    @property
    def files(self) -> list[str]:
        """The files of the data that they are in."""
        return list(dict.fromkeys(texts.file for texts in (self.prediction, self.reference) if texts))


class Cell(Strict):
    """Scores published of other settings of a recipe.

    Attributes:
        values: of keys of the recipe.
        scores: by metric, of each run.
    """

    values: Annotated[Config, Field(min_length=1)]
    scores: dict[str, Annotated[list[float], Field(min_length=1)]]


class AdapterFormat(Strict):
    """The format of an adapter that a fork of PEFT saved.

    Attributes:
        weights: its file of weights, by torch.save.
        names: parts of the names of weights, each with PEFT's instead.
        config: what PEFT's adapter_config.json has otherwise.
    """

    weights: Name = "adapter_model.bin"
    names: dict[Text, str]
    config: Config = Field(default={})


class Published(Strict):
    """Results published of one recipe.

    Attributes:
        scores: by metric, in the unit of that.
        repeats: by metric, the scores of runs that repeat it, itself among them.
        cells: results of its other settings, for sweeps.
        curve: a CSV file beside study.yaml with the columns step and train_loss.
        adapter: the folder, among the data's files, of the adapter that the authors trained.
        adapter_format: its format, where that is not PEFT's.
    """

    scores: dict[str, PublishedScore] = Field(default={})
    repeats: dict[str, Annotated[list[float], Field(min_length=2)]] = Field(default={})
    cells: list[Cell] = Field(default=[])
    trainer: str = "Axolotl"
    measured: Measured = Measured()
    curve: str | None = None
    predictions: PublishedPredictions | None = None
    adapter: Text | None = None
    adapter_format: AdapterFormat | None = None

    def mistakes(self, at: Key, metrics: list[str], data: Data, folder: Path) -> Iterator[Mistake]:
        """Names that it uses and the study does not declare."""
        scores: dict[Key, Collection[str]] = {("scores",): self.scores, ("repeats",): self.repeats}
        scores |= {("cells", str(i), "scores"): cell.scores for i, cell in enumerate(self.cells)}
        for key, names in scores.items():
            for name in names:
                yield from undeclared((*at, *key, name), name, metrics)
        if self.curve and not (folder / self.curve).is_file():
            yield (*at, "curve"), f"no such file beside study.yaml: {self.curve}; add it"
        config, weights = ADAPTER_FILES
        weights = self.adapter_format.weights if self.adapter_format else weights
        for file in (config, weights) if self.adapter else ():
            yield from undeclared((*at, "adapter"), f"{self.adapter}/{file}", data.files)
        yield from undeclared_predictions(at, self.predictions, data)


class Variant(Strict):
    """A recipe that is not among the study's own.

    Attributes:
        of: the study's recipe that it is a variant of.
        reproduces: whether its score is meant to be that recipe's published one.
    """

    of: str
    reproduces: bool


class Baseline(Strict):
    """Scores to compare with, and the test set that they are on.

    Attributes:
        compared: whether runs are compared with it; otherwise it is only there for its predictions.
    """

    name: str
    scores: dict[str, PublishedScore]
    test_set: str
    predictions: PublishedPredictions | None = None
    compared: bool = True

    def mistakes(self, at: Key, metrics: list[str], data: Data) -> Iterator[Mistake]:
        """Names that it uses and the study does not declare."""
        for name in self.scores:
            yield from undeclared((*at, "scores", name), name, metrics)
        yield from undeclared_predictions(at, self.predictions, data)


def undeclared_predictions(at: Key, predictions: PublishedPredictions | None, data: Data) -> Iterator[Mistake]:
    """Names that published predictions use and the data does not declare."""
    if predictions:
        at = (*at, "predictions")
        yield from undeclared((*at, "test_set"), predictions.test_set, ["test", *data.subsets])
        for side in ("prediction", "reference"):
            texts = getattr(predictions, side)
            yield from undeclared((*at, side, "file"), texts and texts.file, data.files)


def adapter_files(data: Data, folder: str) -> list[str]:
    """The files of the data that are in an adapter's folder."""
    return [name for name in data.files if str(PurePosixPath(name).parent) == str(PurePosixPath(folder))]


def released(data: Data, published: dict[str, Published], baselines: list[Baseline]) -> set[str]:
    """The sources of the data that only published predictions and adapters need."""
    predictions = [of.predictions for of in published.values()] + [of.predictions for of in baselines]
    files = [file for some in predictions if some for file in some.files]
    files += [file for of in published.values() if of.adapter for file in adapter_files(data, of.adapter)]
    return set(data.sources_of(files)) - set(data.sources_of(data.raw_files))
