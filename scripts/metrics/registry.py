"""Metrics of runs, and columns from study.yaml, --metric and scores.json."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from pydantic import ValidationError

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.files import Row
from ..base.yamlfiles import Config
from .metric import METRICS, BenchmarkMetric, Column, LossMetric, Parameters, RewardMetric, RowMetric, ScoreRecord


class BenchmarkParameters(Parameters):
    """Benchmark task, and the result that counts as its score.

    Attributes:
        task: name of a task or group in lm-evaluation-harness, or a YAML file that declares a task.
        result: metric, followed by a filter if the task has several filters, as in `exact_match,strict-match`; by
            default the first result.
        mean_of_tasks: True to score a group by the unweighted mean of its tasks, as in many published tables. The
            harness weights the tasks of some groups by size.
        shots: number of examples in each prompt; by default the task's.
    """

    task: str
    result: str | None = None
    mean_of_tasks: bool = False
    shots: int | None = None


BENCHMARK = BenchmarkMetric(
    name="benchmark",
    label="benchmark",
    hub_type="accuracy",
    unit="%",
    source="a task of lm-evaluation-harness",
    parameters=BenchmarkParameters,
)
EVAL_LOSS = LossMetric(
    name="eval_loss",
    label="eval loss",
    hub_type="loss",
    high=None,
    unit="nats per token",
    source="the last eval loss of the training, by default a mean over all tokens with loss",
    higher_is_better=False,
    score_loss=float,
)
PERPLEXITY = LossMetric(
    name="perplexity",
    label="perplexity",
    hub_type="perplexity",
    low=1,
    high=None,
    source="exp of the eval loss",
    higher_is_better=False,
    score_loss=math.exp,
)
_REWARD = (
    "beta times the difference of log-probabilities to the reference; for orpo and simpo, which have none, beta times "
    "the mean log-probability of the answer's tokens"
)
REWARD_ACCURACY = RewardMetric(
    name="reward_accuracy",
    label="reward accuracy",
    hub_type="accuracy",
    unit="%",
    source=f"share of held-out preference pairs whose chosen answer has the higher reward ({_REWARD})",
    is_share=True,
)
REWARD_MARGIN = RewardMetric(
    name="reward_margin",
    label="reward margin",
    hub_type="reward margin",
    low=-math.inf,
    high=None,
    source=f"mean over held-out preference pairs of the chosen answer's reward minus the rejected one's ({_REWARD})",
)
for _metric in (EVAL_LOSS, PERPLEXITY, REWARD_ACCURACY, REWARD_MARGIN, BENCHMARK):
    METRICS.include(_metric)
TASK, SCORER = "benchmark:", "bertscore:"  # prefixes in --metric
OF_TEXT_ROWS = ("bleu4", "rouge_l", "sacrebleu", "chrf", "exact_match", "bertscore_f1")
"""Keys of rows that are earlier scores, if no column has the name."""
DEFAULT: tuple[str, ...] = ("eval_loss", "exact_match")
"""Default metrics, for use if neither a study nor --metric names any."""
DEFAULT_FOR_TEXTS = (*DEFAULT, "rouge_l", "sacrebleu")
"""Default metrics for longer answers, of which a good one rarely equals the reference."""
FOR_PREFERENCES: dict[str, Config] = {"eval_loss": {"by": "trainer"}, "reward_accuracy": {}, "reward_margin": {}}
"""Metrics of a preference training without a study: what its trainer measures."""
LONGER = 60
"""Median number of characters from which answers are longer ones: about ten words, so two dozen n-grams for BLEU."""
_NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")
_TAKEN = (
    *("rows", "intervals", "metrics", "notes", "empty", "repeated", "bertscore"),
    *("row", "idx", "lang", "group", "reference", "prediction", "prompt", "prompt_token_ids", "database"),
    *("run", "recipe", "variant_of", "study", "state", "jobs", "step", "steps", "ended", "verdict", "differs", "open"),
    *("rehearsal", "test_set", "rows_evaluated", "memory", "time", "trial", "settings", "runs", "states", "seeds"),
    "database_sql",
)
"""Keys with another meaning in predictions.jsonl and `--json` outputs."""


class WrongMetric(Exception):
    """Mistake in a metric's declaration; `key` is the wrong key, or empty if the whole declaration is wrong."""

    def __init__(self, key: str, problem: str):
        self.key, self.problem = key, problem
        super().__init__(f"{key}: {problem}" if key else problem)


def column(name: str, entry: Mapping[str, Any] | None = None) -> Column:
    """Column from a declaration: `metric` (by default the name), `label`, and parameters.

    Raises:
        WrongMetric: the metric or a parameter is unknown, or a value is invalid.
    """
    parameters = dict(entry or {})
    wrong_key = "metric" if "metric" in parameters else ""
    kind = str(parameters.pop("metric", name))
    label = parameters.pop("label", None)
    try:
        metric = METRICS.find(kind)
    except UserError as error:
        raise WrongMetric(wrong_key, error.problem) from None
    if name in _TAKEN:
        raise WrongMetric("", f"{name} has another meaning in results; give the column another name")
    if not _NAME.fullmatch(name):
        raise WrongMetric("", f"{name} must consist of letters, digits and _; give the column another name")
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise WrongMetric("label", "expected a text")
    try:
        return Column(name, metric, metric.parameters.model_validate(parameters), label)
    except ValidationError as error:
        mistake = error.errors()[0]
        names = ", ".join(metric.parameters.model_fields) or "no parameters"
        wrong_key = ".".join(map(str, mistake["loc"]))
        raise WrongMetric(wrong_key, f"{yamlfiles.in_words(mistake)}; {kind} takes {names}") from None


def default_columns(references: Sequence[str]) -> dict[str, Column]:
    """Default columns for answers."""
    names = DEFAULT
    if references and median(map(len, references)) >= LONGER:
        names = DEFAULT_FOR_TEXTS
    return columns(dict.fromkeys(names))


def columns(declared: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Column]:
    """Columns by name, from their declarations.

    Raises:
        WrongMetric: see `column`.
    """
    return {name: column(name, entry) for name, entry in declared.items()}


def require(columns: Iterable[Column], rows: Sequence[Row]) -> None:
    """Raise UserError if a metric lacks something to score rows with, see `RowMetric.require`."""
    for column in columns:
        if isinstance(column.metric, RowMetric):
            column.metric.require(rows, column.parameters)


def requested(texts: Iterable[str]) -> dict[str, Column]:
    """Columns from --metric, such as `bleu4`, `number: {markers: ["A: "]}` or `benchmark:mmlu`.

    Raises:
        UserError: a value is malformed, or two columns have the same name.
    """
    columns = {}
    for text in texts:
        if text.startswith(SCORER):
            continue
        for name, entry in _declarations(text).items():
            try:
                additional = column(name, entry)
            except WrongMetric as error:
                raise UserError(f"--metric {text}: {error}") from None
            if name in columns:
                raise UserError(
                    f"--metric {text}: two metrics are called {name}; rename one, as in "
                    f"'other: {{metric: {additional.metric.name}}}'"
                )
            columns[name] = additional
    return columns


def _declarations(text: str) -> dict[str, Config | None]:
    """Declarations by column name from a value of --metric, at least one."""
    entries = yamlfiles.parse(text, option=f"--metric {text}")
    if isinstance(entries, str):
        if text.startswith(TASK):
            return _of_task(text.removeprefix(TASK))
        return {entries: None}
    if entries and isinstance(entries, dict) and all(isinstance(entry, dict | None) for entry in entries.values()):
        return entries
    raise UserError(f"--metric {text}: expected a metric's name, or parameters as in 'number: {{markers: [\"A: \"]}}'")


def _of_task(task: str) -> dict[str, Config | None]:
    """Declaration of a column for a benchmark task, named after the task."""
    name = re.sub(r"\W+", "_", task.removesuffix(".yaml").rpartition("/")[2])
    return {name: {"metric": BENCHMARK.name, "label": name, "task": task}}


def requested_scorer(texts: Iterable[str]) -> str | None:
    """Scorer model from --metric bertscore:MODEL, or None. The model `none` leaves BERTScore out."""
    return next((text.removeprefix(SCORER) for text in texts if text.startswith(SCORER)), None)


def recorded(scores: Mapping[str, ScoreRecord]) -> dict[str, Column]:
    """Columns of recorded scores, by name.

    Raises:
        WrongMetric: see `column`.
    """
    return columns({name: record.declaration for name, record in scores.items()})


def distinct(columns: Iterable[Column]) -> dict[str, Column]:
    """Columns by heading: the label, followed by the declaration if the label is taken.

    Columns with the same name, metric and parameters occur once.
    """
    by_heading: dict[str, Column] = {}
    for column in columns:
        if heading(column, by_heading) is None:
            more = f" {yamlfiles.write_flow(column.entry)}" if column.label in by_heading else ""
            by_heading[f"{column.label}{more}"] = column
    return by_heading


def heading(column: Column, headings: Mapping[str, Column]) -> str | None:
    """Heading of a column in the result of `distinct`."""
    for text, other in headings.items():
        if other.name == column.name and other.same_scores(column):
            return text
    return None


def need_evaluation(columns: Iterable[Column]) -> bool:
    """True if any metric needs more than what the training measures."""
    return any(not isinstance(column.metric, LossMetric) for column in columns)
