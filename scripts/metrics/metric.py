"""Metrics, and columns of scores: a metric with its parameters, under a name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

Pair = tuple[str, str]  # reference and prediction


class Parameters(BaseModel):
    """Parameters of a metric without any."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True)
class Metric:
    """Score of predictions, or of a run.

    It has one of `of_rows`, `of_all`, `of_loss`, `of_groups` and `of_model`, and the first two get its parameters too.

    Attributes:
        name: its name in study.yaml, options and files.
        label: its name in tables and figures.
        hub_type: its kind as https://huggingface.co/metrics names it.
        low, high: the least and the greatest value; None for no greatest.
        source: source of its definition.
        unit: its unit, such as %; empty for a plain number.
        higher_is_better: direction of better values.
        of_rows: a score for each (reference, prediction); the score of all is their mean, and has an interval.
        of_all: one score of all pairs together.
        of_loss: one score of a run, from its eval loss in nats a token; it needs no predictions.
        of_groups: a score and its interval, from another column's scores of rows by the group of each row.
        of_model: lm-evaluation-harness measures it with the run's model.
        parameters: form of its parameters.
        record: details of its computation for scores.json.
        notes: notes for a reader on the scores of these pairs.
        judged: a model scores, so that its parameters are a `ScorerModel`.
        all_or_nothing: each row has the least value or the greatest, and nothing between.
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
    of_groups: Callable[[Mapping[str, Sequence[float]], Any], tuple[float, list[float]] | None] | None = None
    of_model: bool = False
    parameters: type[Parameters] = Parameters
    record: Callable[[Any], dict[str, Any]] | None = None
    notes: Callable[[Sequence[Pair], Any], Iterator[str]] | None = None
    judged: bool = False
    all_or_nothing: bool = False


@dataclass(frozen=True)
class Column:
    """Metric with its parameters.

    Attributes:
        name: its key in predictions.jsonl and scores.json, and in study.yaml.
        given_label: its name in tables and figures, where that is not the metric's.
    """

    name: str
    metric: Metric
    parameters: Parameters
    given_label: str | None = None

    @property
    def label(self) -> str:
        """Its name in tables and figures, with the unit."""
        name = self.given_label or self.metric.label
        return f"{name}, {self.metric.unit}" if self.metric.unit else name

    @property
    def title(self) -> str:
        """Its name on a model card."""
        of_what = "mean over rows" if self.metric.of_rows else "of the run" if self.metric.of_loss else ""
        return ", ".join(filter(None, [self.label, of_what]))

    @property
    def meaning(self) -> str:
        """Description in a line: kind of mean, range, source, and parameters other than the defaults."""
        high = "" if self.metric.high is None else f", {self.metric.low:g} to {self.metric.high:g}"
        given = self.parameters.model_dump(mode="json", exclude_defaults=True)
        with_given = f"; with {', '.join(f'{key} {value}' for key, value in given.items())}" if given else ""
        return f"{self.title}{high}; {self.metric.source}{with_given}"

    @property
    def better(self) -> Callable[..., Any]:
        """`max` or `min`, which takes the better of values."""
        return max if self.metric.higher_is_better else min

    @cached_property
    def entry(self) -> dict[str, Any]:
        """Metric and parameters in the form of study.yaml and scores.json."""
        label = {"label": self.given_label} if self.given_label else {}
        return {"metric": self.metric.name} | label | self.parameters.model_dump(mode="json", exclude_defaults=True)

    def same_scores(self, other: "Column | None") -> bool:
        """True if another column has the same scores for the same texts, whatever its label."""
        return other is not None and (self.metric, self.parameters) == (other.metric, other.parameters)

    def recorded(self, key: str) -> str:
        """Key in scores.json of a part of the metric's record; with the column's name if that is not the metric's."""
        return key if self.name == self.metric.name else f"{self.name}_{key}"
