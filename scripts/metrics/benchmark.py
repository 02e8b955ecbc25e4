"""Tasks of lm-evaluation-harness as metrics; `scores.benchmarks` has the harness score them."""

import re

from pydantic import BaseModel

from ..base.yamlfiles import write_flow
from .metric import Metric, Parameters


class BenchmarkParameters(Parameters):
    """A task of the harness, and the number of its results that counts.

    Attributes:
        task: its name there, that of a group of tasks, or a YAML file that declares one.
        result: the metric of that number, with its filter if the task has several, as in `exact_match,strict-match`;
            by default the first.
        mean_of_tasks: whether the score of a group is the unweighted mean of its tasks, as published tables often have
            it; the harness weights some groups by size.
        shots: the number of examples in each prompt; by default the task's.
    """

    task: str
    result: str | None = None
    mean_of_tasks: bool = False
    shots: int | None = None


class Benchmark(BaseModel):
    """The score of a task, in percent, and how it was measured.

    Attributes:
        version: the task's; a group has its own.
        filter: how the harness took answers from texts.
        rows: how many were scored, in all tasks of a group.
        limit: the most rows of a task that were asked for.
    """

    value: float
    stderr: float | None
    task: str
    result: str
    version: str
    shots: int | None
    filter: str
    rows: int
    limit: int | None = None
    harness: str

    @property
    def interval(self) -> list[float] | None:
        """The 95 % interval of the value, by its standard error."""
        return [self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr] if self.stderr else None


METRIC = Metric(
    name="benchmark",
    label="benchmark",
    hub_type="accuracy",
    low=0,
    high=100,
    unit="%",
    source="a task of lm-evaluation-harness",
    of_model=True,
    parameters=BenchmarkParameters,
)


def as_metric(task: str) -> str:
    """Return a task as `--metric` takes it, in a column of its name."""
    name = re.sub(r"\W+", "_", task.removesuffix(".yaml").rpartition("/")[2])
    return write_flow({name: {"metric": METRIC.name, "label": name, "task": task}})
