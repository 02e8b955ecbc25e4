"""Declaration of published results in study.yaml."""

import csv
from collections.abc import Collection, Iterator
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from ..base.errors import UserError
from ..base.run_files import RunFile
from ..base.yamlfiles import Config
from .declaration import Count, Data, FilePath, Key, Mistake, Strict, Text, undeclared

ADAPTER_FILES: tuple[str, str] = (RunFile.ADAPTER_CONFIG, RunFile.ADAPTER)
"""Files of an adapter saved by PEFT."""
FORK_WEIGHTS = "adapter_model.bin"
"""File of weights that a fork of PEFT saved, by torch.save."""

TRAIN_LOSS = "train_loss"  # column of a published curve; its tolerance limits the largest gap to a run's curve


def _printed(value: Any) -> Any:
    """Decimal with the digits of a number in study.yaml; other values unchanged."""
    return Decimal(str(value)) if isinstance(value, float) or type(value) is int else value


Printed = Annotated[Decimal, BeforeValidator(_printed), WithJsonSchema({"type": "number"})]
"""Number with the digits that were printed."""


ROUNDING = 1e-9
"""Relative rounding error of computed numbers, by which a bound may be exceeded."""


def rounding(number: Decimal) -> float:
    """Largest difference that rounding to the printed digits can make: half a unit of the last one."""
    return (0.5 + ROUNDING) * 10.0 ** int(number.as_tuple().exponent)


Point = tuple[int, float]
"""Step and value."""


def read_points(file: Path, column: str) -> list[Point]:
    """Read the columns step and `column` of a CSV file.

    Raises:
        UserError: the file cannot be read as CSV with numbers in both columns.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [(int(row["step"]), float(row[column])) for row in csv.DictReader(stream)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected the columns step and {column} with a number in each row ({error!r:.60})"
        ) from None


class PublishedScore(Strict):
    """Published score, and the ± printed with it if there is one."""

    value: Printed
    spread: Annotated[Printed, Field(ge=0), WithJsonSchema({"type": "number", "minimum": 0})] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"value": value}

    @property
    def margin(self) -> float:
        """Largest distance from the printed value that its digits and the ± allow."""
        spread = 0.0 if self.spread is None else float(self.spread) + rounding(self.spread)
        return rounding(self.value) + spread

    def __str__(self) -> str:
        return f"{self.value}" if self.spread is None else f"{self.value} ± {self.spread}"


Figure = Literal["steps", "learning_rates", "trainable", "adapter_bytes", "reserved_bytes"]
"""Figure of a log that a plan computes."""


class Log(Strict):
    """Published figures of a training besides its scores.

    Attributes:
        source: file or page that states the figures.
        rows: training rows per epoch; by default those of the study.
        settings: settings of Axolotl in which the training differs from the recipe.
        steps: number of optimizer steps.
        learning_rates: CSV file beside study.yaml with the columns step and learning_rate. Each rate is that after the
            step, as transformers 4 logs it.
        skipped_steps: logged steps; before each, the gradient scaler of fp16 skipped one step since the previous one.
        trainable: number of trained parameters.
        adapter_bytes: size of adapter_model.safetensors.
        reserved_bytes: largest GPU memory that torch reserved in training.
        train_seconds, tokens_per_second: duration and speed of the training alone.
        remarks: remarks on figures, such as a known reason for a difference from the plan. A figure that nobody has
            read in the source needs one; no status names a figure with a remark.
    """

    source: Text
    rows: Count | None = None
    settings: Config = Field(default={})
    steps: Count | None = None
    learning_rates: FilePath | None = None
    skipped_steps: list[Count] = Field(default=[])
    trainable: Count | None = None
    adapter_bytes: Count | None = None
    reserved_bytes: Count | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    remarks: dict[Figure, Text] = Field(default={})

    @property
    def is_of_recipe(self) -> bool:
        """True if the training has the recipe's rows and settings."""
        return self.rows is None and not self.settings

    def mistakes(self, at: Key, folder: Path) -> Iterator[Mistake]:
        """Yield a missing file of learning rates."""
        if self.learning_rates and not (folder / self.learning_rates).is_file():
            yield (*at, "learning_rates"), f"no such file beside study.yaml: {self.learning_rates}; add it"


class Texts(Strict):
    """Texts in a data file: its lines, or a field of its rows.

    Attributes:
        field: name of the field, such as answer.text; None if each line is a text.
    """

    file: Text
    field: Text | None = None


class PublishedPredictions(Strict):
    """Predictions and references that authors published, in the order of the test rows.

    Attributes:
        test_set: test set of the predictions; by default that of the published scores.
    """

    prediction: Texts
    reference: Texts
    test_set: Text | None = None

    @property
    def files(self) -> list[str]:
        """Data files with the predictions and references."""
        return list(dict.fromkeys(texts.file for texts in (self.prediction, self.reference)))


class GridPoint(Strict):
    """Published scores of a recipe with changed settings.

    Attributes:
        settings: the changed keys with their values.
        scores: scores of all runs with these settings, by metric.
    """

    settings: Annotated[Config, Field(min_length=1)]
    scores: dict[str, Annotated[list[Printed], Field(min_length=1)]]


class AdapterFormat(Strict):
    """Format of an adapter that a fork of PEFT saved.

    Attributes:
        names: replacements for parts of weight names, from the fork's to PEFT's.
        config: keys to override in adapter_config.json.
    """

    names: dict[Text, str]
    config: Config = Field(default={})


class Published(Strict):
    """Published results of one recipe.

    Attributes:
        scores: scores by metric, in the metric's unit.
        repeats: scores of all repeated runs, including the reported run, by metric.
        grid: scores with changed settings, for comparison with sweeps.
        log: figures of the training.
        curve: CSV file beside study.yaml with the columns step and train_loss.
        adapter: folder of the adapter that the authors trained; its files are declared in the data's `sources`.
        adapter_format: format of the adapter if PEFT did not save it.
        unreported: settings that the authors report only for other recipes.
        note: remark that `recipe reproduce --dry-run` prints, such as the time on hardware that it does not plan.
    """

    scores: dict[str, PublishedScore] = Field(default={})
    repeats: dict[str, Annotated[list[float], Field(min_length=2)]] = Field(default={})
    grid: list[GridPoint] = Field(default=[])
    trainer: str = "Axolotl"
    log: Log | None = None
    curve: FilePath | None = None
    predictions: PublishedPredictions | None = None
    adapter: FilePath | None = None
    adapter_format: AdapterFormat | None = None
    unreported: list[str] = Field(default=[])
    note: Text | None = None

    def mistakes(self, at: Key, metrics: list[str], data: Data, folder: Path) -> Iterator[Mistake]:
        """Yield undeclared names, and a missing curve."""
        scores: dict[Key, Collection[str]] = {("scores",): self.scores, ("repeats",): self.repeats}
        scores |= {("grid", str(i), "scores"): point.scores for i, point in enumerate(self.grid)}
        for key, names in scores.items():
            for name in names:
                yield from undeclared((*at, *key, name), name, metrics)
        if self.curve and not (folder / self.curve).is_file():
            yield (*at, "curve"), f"no such file beside study.yaml: {self.curve}; add it"
        if self.log:
            yield from self.log.mistakes((*at, "log"), folder)
        if self.adapter:
            config, weights = ADAPTER_FILES
            if self.adapter_format:
                weights = FORK_WEIGHTS
            for file in (config, weights):
                yield from undeclared((*at, "adapter"), f"{self.adapter}/{file}", data.files)
        yield from undeclared_predictions(at, self.predictions, data)


class Ablation(Strict):
    """Recipe that the authors did not publish.

    Attributes:
        parent: published recipe that the ablation is based on.
        reproduces: True if the ablation should reach the published score of that recipe.
        log: figures of a training by the authors with the ablation's settings.
    """

    parent: str
    reproduces: bool
    log: Log | None = None


class Baseline(Strict):
    """Published scores of another system, for comparison.

    Attributes:
        test_set: test set of the scores.
        compared: False to show the scores only in the table of `recipe reproduce --stage predictions`.
    """

    name: str
    scores: dict[str, PublishedScore]
    test_set: str
    predictions: PublishedPredictions | None = None
    compared: bool = True

    def mistakes(self, at: Key, metrics: list[str], data: Data) -> Iterator[Mistake]:
        """Yield undeclared names."""
        for name in self.scores:
            yield from undeclared((*at, "scores", name), name, metrics)
        yield from undeclared((*at, "test_set"), self.test_set, ["test", *data.subsets])
        yield from undeclared_predictions(at, self.predictions, data)


def undeclared_predictions(at: Key, predictions: PublishedPredictions | None, data: Data) -> Iterator[Mistake]:
    """Yield undeclared names in published predictions."""
    if predictions:
        at = (*at, "predictions")
        yield from undeclared((*at, "test_set"), predictions.test_set, ["test", *data.subsets])
        for side in ("prediction", "reference"):
            texts = getattr(predictions, side)
            yield from undeclared((*at, side, "file"), texts.file, data.files)


def adapter_files(data: Data, folder: str) -> list[str]:
    """Data files in an adapter's folder."""
    return [name for name in data.files if str(PurePosixPath(name).parent) == str(PurePosixPath(folder))]


def released(data: Data, published: dict[str, Published], baselines: list[Baseline]) -> set[str]:
    """Names of the sources that are needed only for published predictions and adapters."""
    files: list[str] = []
    parts: list[Baseline | Published] = [*baselines, *published.values()]
    for part in parts:
        if part.predictions:
            files += part.predictions.files
    for results in published.values():
        if results.adapter:
            files += adapter_files(data, results.adapter)
    return set(data.sources_of(files)) - set(data.sources_of(data.raw_files))
