"""Metrics, and columns: named metrics with parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Pair = tuple[str, str]  # reference and prediction
NORMAL = 1.959964  # 97.5 % quantile of the standard normal distribution
FEWEST = 5  # minimum number of rows for an interval: fewer rows have too few distinct resamples


def wilson(share: float, rows: int) -> list[float]:
    """Wilson's 95 % interval of a share in percent, which is not 0 wide at 0 and 100 % (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(round(share * rows / 100), rows).proportion_ci(method="wilson")
    return [100 * float(found.low), 100 * float(found.high)]


class Parameters(BaseModel):
    """Base class for parameters; used as is for metrics without parameters."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Benchmark(BaseModel):
    """Score of a task, in percent, and the settings of its measurement.

    Attributes:
        version: version of the task or group.
        filter: the harness's method to extract answers from texts.
        rows: number of scored rows, over all tasks of a group.
        total_rows: number of rows, scored or not.
        limit: maximum number of rows per task; None for all rows.
        ends: tokens that end an answer.
    """

    value: float
    stderr: float | None
    task: str
    result: str
    version: str
    shots: int | None
    filter: str
    rows: int
    total_rows: int
    limit: int | None
    ends: list[int]
    harness: str

    @property
    def interval(self) -> list[float] | None:
        """95 % interval from the standard error, or Wilson's if that is 0; None without a standard error."""
        if self.stderr is None:
            return None
        if self.stderr == 0:
            return wilson(self.value, self.rows)
        half = NORMAL * self.stderr
        return [max(self.value - half, 0.0), min(self.value + half, 100.0)]


class ScorerRecord(BaseModel):
    """Scorer model behind a score.

    Attributes:
        model: name on the hub, or of a local folder.
        layer: layer that provides the embeddings.
        revision: commit on the hub, or hash of the weights in a local folder; None if unknown.
        hash: bert-score's hash of the settings.
    """

    model: str
    layer: int
    revision: str | None
    hash: str


class ScoreRecord(BaseModel):
    """Score by a column's metric, as in scores.json.

    Attributes:
        value: the score; None if it could not be computed.
        interval: lower and upper end of the 95 % interval; None without one.
        declaration: the column's declaration, see `Column.entry`.
        scorer: scorer model that computed the score.
        signature: sacrebleu's description of its settings.
        notes: notes for readers, such as on texts without a number.
        benchmark: measurement of a benchmark task.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    declaration: dict[str, Any]
    scorer: ScorerRecord | None = None
    signature: str | None = None
    notes: list[str] = Field(default_factory=list)
    benchmark: Benchmark | None = None


@dataclass(frozen=True)
class Metric:
    """Method to score predictions or a run.

    Exactly one of `of_rows`, `of_all`, `of_loss`, `of_groups` and `of_model` is set. All functions except `of_loss` get
    parameters.

    Attributes:
        name: name in study.yaml, options and files.
        label: name in tables and figures.
        hub_type: type in https://huggingface.co/metrics.
        low, high: lowest and highest possible value; `high` is None without an upper limit.
        source: source of the definition.
        unit: unit, such as %; empty for a plain number.
        higher_is_better: True if higher values are better.
        of_rows: computes a score for each (reference, prediction); the overall score is their mean, with an interval.
        of_all: computes one score from all pairs together.
        of_loss: computes a run's score from the eval loss in nats per token, without predictions.
        of_groups: computes a score and an interval from another column's row scores by group; it also gets the metric
            of that column.
        of_model: True if lm-evaluation-harness measures the run's model.
        parameters: class of the parameters.
        record: returns the fields of `ScoreRecord` that describe the computation.
        notes: yields notes for readers of the scores, such as on texts without a number.
        judged: True if a scorer model computes the score; parameters are then a `ScorerModel`.
        all_or_nothing: True if each row scores either 0 or 100.
    """

    name: str
    label: str
    hub_type: str
    low: float
    high: float | None
    source: str
    unit: str = ""
    higher_is_better: bool = True
    of_rows: Callable[[Sequence[Pair], Any], list[float]] | None = None
    of_all: Callable[[Sequence[Pair], Any], float] | None = None
    of_loss: Callable[[float], float] | None = None
    of_groups: (
        Callable[[Mapping[str, Sequence[float]], Any, "Metric"], tuple[float, list[float] | None] | None] | None
    ) = None
    of_model: bool = False
    parameters: type[Parameters] = Parameters
    record: Callable[[Any], dict[str, Any]] | None = None
    notes: Callable[[Sequence[Pair], Any], Iterator[str]] | None = None
    judged: bool = False
    all_or_nothing: bool = False


@dataclass(frozen=True)
class Column:
    """Named metric with parameters.

    Attributes:
        name: key in predictions.jsonl, scores.json and study.yaml.
        given_label: name in tables and figures; None for the metric's label.
    """

    name: str
    metric: Metric
    parameters: Parameters
    given_label: str | None = None

    @property
    def label(self) -> str:
        """Name in tables and figures, with the unit."""
        name = self.given_label or self.metric.label
        return f"{name}, {self.metric.unit}" if self.metric.unit else name

    @property
    def title(self) -> str:
        """Name on a model card."""
        of_what = "mean over rows" if self.metric.of_rows else "of the run" if self.metric.of_loss else ""
        return ", ".join(filter(None, [self.label, of_what]))

    @property
    def meaning(self) -> str:
        """One-line description: title, range, source, and parameters that are not the default."""
        high = "" if self.metric.high is None else f", {self.metric.low:g} to {self.metric.high:g}"
        given = self.parameters.model_dump(mode="json", exclude_defaults=True)
        with_given = f"; with {', '.join(f'{key} {value}' for key, value in given.items())}" if given else ""
        return f"{self.title}{high}; {self.metric.source}{with_given}"

    @cached_property
    def entry(self) -> dict[str, Any]:
        """Declaration as in study.yaml and scores.json."""
        label = {"label": self.given_label} if self.given_label else {}
        return {"metric": self.metric.name} | label | self.parameters.model_dump(mode="json", exclude_defaults=True)

    def same_scores(self, other: "Column | None") -> bool:
        """True if another column has the same metric and parameters; labels can differ."""
        return other is not None and (self.metric, self.parameters) == (other.metric, other.parameters)

    def recorded(self, key: str) -> str:
        """Key of a detail, such as `bertscore`, in `--json` outputs.

        If the names of column and metric differ, the column's name is added as a prefix.
        """
        return key if self.name == self.metric.name else f"{self.name}_{key}"
