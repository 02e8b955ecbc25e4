"""Metrics, columns (named metrics with parameters), and score records."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..base.errors import UserError, with_type
from ..base.files import Row
from ..base.registry import Registry
from ..base.yamlfiles import Config

Pair = tuple[str, str]  # reference and prediction
Bounds = tuple[float, float]  # lower and upper end of a 95 % interval
NORMAL = 1.959964  # 97.5 % quantile of the standard normal distribution
FEWEST = 5  # minimum number of rows for an interval: fewer rows have too few distinct resamples
RESAMPLES = 9_999


def wilson(share: float, rows: int) -> Bounds:
    """Wilson's 95 % interval of a share in percent, which is not 0 wide at 0 and 100 % (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * rows / 100), rows).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def bootstrap(values: Sequence[float]) -> Bounds:
    """95 % interval of the mean of some values, by scipy's percentile method."""
    import numpy as np
    from scipy import stats

    interval = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=20,  # stays in the processor's cache
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


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
    def interval(self) -> Bounds | None:
        """95 % interval from the standard error, or Wilson's if that is 0; None without a standard error."""
        if self.stderr is None:
            return None
        if self.stderr == 0:
            return wilson(self.value, self.rows)
        half = NORMAL * self.stderr
        return max(self.value - half, 0.0), min(self.value + half, 100.0)


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
        interval: 95 % interval; None without one.
        declaration: the column's declaration, see `Column.entry`.
        scorer: scorer model that computed the score.
        signature: sacrebleu's description of its settings.
        notes: notes for readers, such as on texts without a number.
        benchmark: measurement of a benchmark task.
    """

    value: float | None
    interval: Bounds | None = None
    declaration: Config
    scorer: ScorerRecord | None = None
    signature: str | None = None
    notes: list[str] = []
    benchmark: Benchmark | None = None


class Rewards(NamedTuple):
    """Rewards of held-out preference pairs: accuracy as a share, mean margin, and number of pairs."""

    accuracy: float | None = None
    margin: float | None = None
    pairs: int = 0


class EvalLosses(NamedTuple):
    """Eval losses of a run, in nats.

    Attributes:
        tokens: mean over all tokens with a label, see the module `losses`.
        trainer: `eval_loss` of the Trainer: the mean over batches of their mean per token, weighted by the rows of a
            batch if rows are not packed. Of preference pairs: the mean per pair, without a unit.
        rewards: rewards of a preference training, see the module `rewards`.
    """

    tokens: float | None = None
    trainer: float | None = None
    rewards: Rewards = Rewards()


NO_LOSSES = EvalLosses()


@dataclass(frozen=True)
class ScoringInput:
    """Inputs of metrics.

    Attributes:
        rows: predictions with their row scores.
        columns: scored columns by name.
        scorers: scorer models by column name.
        losses: eval losses of the run; None values if they do not apply.
        benchmarks: measurements of benchmark tasks by column name.
        groups: groups of the data, of which the rows can be a part.
    """

    rows: Sequence[Row] = ()
    columns: Mapping[str, "Column"] = field(default_factory=dict)
    scorers: Mapping[str, Parameters] = field(default_factory=dict)
    losses: EvalLosses = NO_LOSSES
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    groups: Collection[str] = ()

    @cached_property
    def pairs(self) -> list[Pair]:
        """Reference and prediction of each row."""
        return [(row["reference"], row["prediction"]) for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """Method to score predictions or a run.

    Attributes:
        name: name in study.yaml, options and files.
        label: name in tables and figures.
        hub_type: type in https://huggingface.co/metrics.
        low, high: lowest and highest possible value, by default 0 and 100; `high` is None without an upper limit.
        source: source of the definition.
        unit: unit, such as %; empty for a plain number.
        higher_is_better: True if higher values are better.
        parameters: class of the parameters.
        scope: scored unit, for titles; may be empty.
    """

    name: str
    label: str
    hub_type: str
    source: str
    low: float = 0
    high: float | None = 100
    unit: str = ""
    higher_is_better: bool = True
    parameters: type[Parameters] = Parameters
    scope: ClassVar[str] = ""

    @abstractmethod
    def measure(self, column: "Column", data: ScoringInput) -> ScoreRecord:
        """Score by a column with this metric.

        Raises:
            UserError, WorkFailed: the score cannot be computed.
        """


def no_notes(_pairs: Sequence[Pair], _parameters: Parameters) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class RowMetric(Metric):
    """Metric that scores single rows; the overall score is their mean.

    Attributes:
        score_rows: computes the score of each (reference, prediction), with parameters.
        notes: notes for readers of the scores, such as on texts without a number.
        all_or_nothing: True if each row scores either 0 or 100.
    """

    score_rows: Callable[[Sequence[Pair], Any], list[float]]
    notes: Callable[[Sequence[Pair], Any], list[str]] = no_notes
    all_or_nothing: bool = False
    scope: ClassVar[str] = "mean over rows"

    def require(self, rows: Iterable[Row], parameters: Any) -> None:
        """Raise UserError if the metric lacks something to score rows with, before their predictions are generated."""

    def scores_of(self, rows: Sequence[Row], parameters: Any) -> list[float]:
        """Score of each row, which has `reference`, `prediction` and perhaps other fields."""
        return self.score_rows([(row["reference"], row["prediction"]) for row in rows], parameters)

    def measure(self, column: "Column", data: ScoringInput) -> ScoreRecord:
        values = [row[column.name] for row in data.rows]
        return ScoreRecord(
            value=sum(values) / len(values),
            interval=self.interval(values),
            declaration=column.entry,
            notes=self.notes(data.pairs, column.parameters),
        )

    def interval(self, values: Sequence[float]) -> Bounds | None:
        """95 % interval of the mean of row scores: Wilson's for shares, else a bootstrap percentile interval.

        None below `FEWEST` rows, or if scores that are not shares are all equal, because their spread is then unknown.
        """
        if len(values) < FEWEST:
            return None
        if self.all_or_nothing:
            return wilson(fmean(values), len(values))
        if min(values) == max(values):
            return None
        return bootstrap(values)


@dataclass(frozen=True, kw_only=True)
class CorpusMetric(Metric):
    """Metric that computes one score from all rows together.

    Attributes:
        score_corpus: computes the score of all (reference, prediction), with parameters.
        signature: describes the computation, from parameters.
    """

    score_corpus: Callable[[Sequence[Pair], Any], float]
    signature: Callable[[Any], str]

    def measure(self, column: "Column", data: ScoringInput) -> ScoreRecord:
        value = self.score_corpus(data.pairs, column.parameters)
        signature = self.signature(column.parameters)
        return ScoreRecord(value=value, declaration=column.entry, signature=signature)


class LossParameters(Parameters):
    """Kind of eval loss: per token, or the Trainer's own; see `EvalLosses`."""

    by: Literal["tokens", "trainer"] = "tokens"


@dataclass(frozen=True, kw_only=True)
class LossMetric(Metric):
    """Metric that is computed from a run's eval loss, without predictions.

    Attributes:
        score_loss: computes the score from an eval loss in nats.
    """

    score_loss: Callable[[float], float]
    parameters: type[Parameters] = LossParameters
    scope: ClassVar[str] = "of the run"

    def measure(self, column: "Column", data: ScoringInput) -> ScoreRecord:
        value, interval = self.score(column, data.losses), self.interval(data.losses)
        return ScoreRecord(value=value, interval=interval, declaration=column.entry)

    def interval(self, losses: EvalLosses) -> Bounds | None:
        """95 % interval over the rows; None, because an eval loss has none."""
        return None

    def score(self, column: "Column", losses: EvalLosses) -> float | None:
        """Score from the eval loss that a column takes; None if the run lacks it."""
        loss = losses.trainer if is_of_trainer(column) else losses.tokens
        return None if loss is None else self.score_loss(loss)


@dataclass(frozen=True, kw_only=True)
class RewardMetric(LossMetric):
    """Metric of held-out preference pairs, which the training measures.

    Attributes:
        is_share: the share of pairs, in percent; otherwise the margin.
    """

    is_share: bool = False
    score_loss: Callable[[float], float] = float
    parameters: type[Parameters] = Parameters

    def score(self, column: "Column", losses: EvalLosses) -> float | None:
        if not self.is_share:
            return losses.rewards.margin
        share = losses.rewards.accuracy
        return None if share is None else 100 * share

    def interval(self, losses: EvalLosses) -> Bounds | None:
        """Wilson's 95 % interval of a share; None for a margin, or below `FEWEST` pairs."""
        share, _, pairs = losses.rewards
        if not self.is_share or share is None or pairs < FEWEST:
            return None
        return wilson(100 * share, pairs)


@dataclass(frozen=True, kw_only=True)
class BenchmarkMetric(Metric):
    """Score of a benchmark task, which lm-evaluation-harness measures with the run's model."""

    def measure(self, column: "Column", data: ScoringInput) -> ScoreRecord:
        benchmark = data.benchmarks.get(column.name)
        if benchmark is None:
            return ScoreRecord(value=None, declaration=column.entry)
        return ScoreRecord(
            value=benchmark.value, interval=benchmark.interval, declaration=column.entry, benchmark=benchmark
        )


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
        """Name in tables and figures, with the unit; not of the Trainer's loss, which can be one per pair."""
        name = self.given_label or self.metric.label
        if not self.metric.unit or is_of_trainer(self):
            return name
        return f"{name}, {self.metric.unit}"

    @property
    def title(self) -> str:
        """Name on a model card."""
        return f"{self.label}, {self.metric.scope}" if self.metric.scope else self.label

    @property
    def meaning(self) -> str:
        """One-line description: title, range, source, and parameters that are not the default."""
        meaning = self.title
        if self.metric.high is not None:
            meaning += f", {self.metric.low:g} to {self.metric.high:g}"
        meaning += f"; {self.metric.source}"
        parameters = self.parameters.model_dump(mode="json", exclude_defaults=True)
        if parameters:
            meaning += f"; with {', '.join(f'{key} {value}' for key, value in parameters.items())}"
        return meaning

    @cached_property
    def entry(self) -> Config:
        """Declaration as in study.yaml and scores.json."""
        entry = {"metric": self.metric.name}
        if self.given_label:
            entry["label"] = self.given_label
        return entry | self.parameters.model_dump(mode="json", exclude_defaults=True)

    def same_scores(self, other: "Column | None") -> bool:
        """True if another column has the same metric and parameters; labels can differ."""
        return other is not None and (self.metric, self.parameters) == (other.metric, other.parameters)

    def detail_key(self, detail: str) -> str:
        """Key of a detail, such as `bertscore`, in `--json` outputs.

        If the names of column and metric differ, the column's name is added as a prefix.
        """
        return detail if self.name == self.metric.name else f"{self.name}_{detail}"


class MetricRegistry(Registry[Metric]):
    """Metrics by name: this project's, and those that installed packages have in the entry-point group `GROUP`.

    The packages are searched only for a name that this project lacks, or for all names, because that takes time.
    """

    GROUP = "qlora_recipes.metrics"

    def include(self, metric: Metric) -> None:
        """Add a metric of this project."""
        self.add(metric.name, metric)

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """Entry points of other packages by the name of their metric.

        Raises:
            UserError: a name is taken.
        """
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.GROUP):
            if point.name in points or point.name in self.built_in():
                raise _refusal(point, "another metric has this name")
            points[point.name] = point
        return points

    def require_distinct(self) -> None:
        """Raise UserError if a metric of another package has a name that is taken."""
        self.names()

    def __getitem__(self, name: str) -> Metric:
        if name in self.built_in():
            return self.built_in()[name]
        return _loaded(self._entry_points[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*self.built_in(), *self._entry_points])


def _loaded(point: EntryPoint) -> Metric:
    """Metric of another package.

    Raises:
        UserError: the package has a mistake.
    """
    try:
        metric = point.load()
    except Exception as error:  # any, because the code is another package's
        raise _refusal(point, with_type(error)) from None
    if isinstance(metric, Metric) and metric.name == point.name:
        return metric
    raise _refusal(point, f"{point.value} is no Metric with this name")


def _refusal(point: EntryPoint, problem: str) -> UserError:
    assert point.dist  # of an installed package
    package = f"{point.dist.name} {point.dist.version}"
    return UserError(f"{package}: metric {point.name}: {problem}; correct or uninstall the package")


METRICS = MetricRegistry(
    "metric", *(f"{__package__}.{module}" for module in ("text", "answers", "bertscore", "execution", "registry"))
)


def is_of_trainer(column: Column) -> bool:
    """True if a column's metric takes the Trainer's own eval loss."""
    return isinstance(column.parameters, LossParameters) and column.parameters.by == "trainer"
