"""Write docs/json/: a JSON Schema for what each command prints with --json; `make generated`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypedDict

from qlora_recipes.check.environment import Line
from qlora_recipes.config.finding import Level
from qlora_recipes.evaluate.scores_file import Changed
from qlora_recipes.plan.plan import Plan
from qlora_recipes.results.compare import Divergence
from qlora_recipes.results.public_records import PublicScore
from qlora_recipes.results.score_records import Status
from qlora_recipes.training.run_record import EvalTokens, State, TrackedRun

FOLDER = Path(__file__).parents[1] / "docs" / "json"
Settings = dict[str, Any]
Label = Annotated[str, Field(pattern="^[a-z]$")]


def described(kind: Any, text: str) -> Any:
    return Annotated[kind, Field(description=text)]


def with_fields(**kinds: Any) -> Any:
    """Decorator: fields whose names match a pattern have a type; see JSON Schema's patternProperties."""
    schemas = {pattern: TypeAdapter(kind).json_schema() for pattern, kind in kinds.items()}
    return with_config(ConfigDict(json_schema_extra={"patternProperties": schemas}))


class ListedRecipe(TypedDict, extra_items=float | None):
    """A recipe or variant; `published_METRIC` is its published score."""

    recipe: str
    study: str | None
    base_model: str | None
    epochs: float | None
    optimizer: str | None
    variant_of: described(str | None, "recipe that a variant changes")
    hours: described(float | None, "estimated hours on one GPU")
    hours_are: described(str | None, "published, or estimated")


class Shown(TypedDict, closed=True):
    recipe: str
    config: Settings


class DifferingKey(TypedDict, extra_items=Any):
    """A key with another value; the other fields are named by the recipes, files or runs, and have their values."""

    key: str


class Fetched(TypedDict, closed=True):
    file: str
    bytes: int
    sha256: str
    verified: described(bool | None, "null if study.yaml has no checksum")


class Subset(TypedDict, closed=True):
    file: str
    rows: int
    sha256: str
    is_the_study_file: bool


class Split(TypedDict, extra_items=Any):
    """Rows of a split, and how they were chosen and ordered, as study.yaml declares it."""

    file: str
    rows: described(int, "rows written")
    sha256: str
    sources: described(dict[str, str], "checksums of the raw files by path")
    is_the_study_file: described(bool | None, "null if study.yaml has no checksum")
    read: described(int, "rows read")
    kept: described(int, "rows that pass the filters")
    dropped: described(dict[str, int], "rows left out by reason")
    moved: NotRequired[described(dict[str, int], "rows moved to other splits")]
    subsets: NotRequired[dict[str, Subset]]
    left_out: NotRequired[described(dict[str, str], "subsets that were not written, and why")]


class Manifest(TypedDict, closed=True):
    made_by: str
    study: str
    splits: dict[str, Split]


class Found(TypedDict, closed=True):
    """A mistake or a note."""

    level: Level
    rule: described(str, "if empty, --force cannot accept the finding")
    key: described(str, "dotted key of the config; empty if it concerns no single key")
    problem: str
    remedy: str
    where: described(str, "file or option that sets the key")
    line: int | None
    name: described(str, "name for --force")


class CheckedData(TypedDict, closed=True):
    """Rows of a data set; lengths in tokens with --all-rows, if the tokenizer is on this machine."""

    key: str
    files: list[str]
    rows: int | None
    unread_fields: list[str]
    tokens: NotRequired[int]
    with_loss: NotRequired[int]
    median: NotRequired[int]
    percentile_95: NotRequired[int]
    longest: NotRequired[int]
    too_long: NotRequired[described(int, "rows longer than sequence_len")]
    padding: NotRequired[described(float | None, "share of padding; null if rows are packed")]


class Checked(TypedDict, closed=True):
    checked: str
    findings: list[Found]
    data: list[CheckedData]


class TokenizedRow(TypedDict, closed=True):
    """A row with --show-tokens; ⟪ and ⟫ are around the tokens with loss."""

    dataset: str
    row: int
    answer: NotRequired[Literal["chosen", "rejected"]]
    length: int
    learnt: described(int, "tokens with loss")
    too_long: bool
    ids: list[int]
    labels: list[int]
    text: str


@dataclass(kw_only=True)
class PlannedRecipe(Plan):
    """A plan; memory is in bytes."""

    recipe: str


class Step(TypedDict, closed=True):
    """A recipe or trial, with the state of each step."""

    recipe: NotRequired[str]
    trial: NotRequired[str]
    check: str | None
    plan: str | None
    run: str | None
    evaluate: str | None
    problem: str | None


@with_fields(_benchmark=Settings, bertscore=Settings, sacrebleu_signature=str)
class Scores(TypedDict, extra_items=float | None):
    """Scores by metric, with what they were computed with."""

    rows: int
    intervals: described(dict[str, tuple[float, float] | None], "95 % intervals by metric")
    metrics: described(dict[str, Settings], "parameters by metric")
    empty: NotRequired[described(float, "share of empty predictions")]
    repeated: NotRequired[described(float, "share of predictions that repeat themselves")]
    notes: NotRequired[list[str]]


@with_fields(_interval_method=str | None, _decodings=dict[str, float | None])
class Run(TypedDict, extra_items=float | None):
    """A run.

    A metric has the fields NAME, NAME_low, NAME_high, NAME_interval_method, NAME_base_model, NAME_published,
    NAME_difference and NAME_decodings.
    """

    run: described(str, "folder")
    recipe: str
    variant_of: described(str | None, "recipe that a variant changes")
    study: str | None
    rehearsal: bool
    state: State
    verdict: described(
        Literal["within the interval", "acceptable", "off"] | None,
        "verdict on this run alone, by its study's first metric",
    )
    published_adapter: described(str | None, "adapter that was not trained here")
    jobs: described(str | None, "unfinished jobs")
    seed: int
    start: described(str | None, "start of the first launch")
    end: described(str | None, "end of the last launch; null if it runs, or was killed")
    duration_seconds: described(float | None, "all launches that ended, with loading and evaluation")
    gpu: described(str | None, "GPU, with the number of GPUs if there are several; null on a CPU")
    machine: described(str | None, "host name")
    step: int
    steps: int | None
    ended: described(str | None, "reason for the end of the training")
    kept_step: described(int | None, "step whose weights were kept")
    trouble: str | None
    eval_loss_first: float | None
    eval_loss: described(float | None, "nats per token")
    eval_loss_axolotl: float | None
    eval_tokens: EvalTokens | None
    eval_reward_accuracy: described(
        float | None, "share of held-out preference pairs whose chosen answer has the higher reward"
    )
    eval_reward_margin: described(float | None, "mean difference of both rewards over these pairs")
    eval_pairs: described(EvalTokens | None, "number and hash of these pairs")
    incomparable_loss: described(str | None, "reason not to compare the eval loss with the published one")
    rows_evaluated: int | None
    rows_total: int | None
    rows_also_trained: described(list[int] | None, "positions of evaluated rows that are also training rows")
    test_set: str | None
    evaluation: Changed | None
    files: described(list[Settings], "evaluations of GGUF files")
    peak_memory_gib: float | None
    memory_kind: str | None
    other_base_model: str | None
    other_data: bool
    tokens_per_second: float | None
    train_seconds: described(float, "training steps alone")
    changed: described(Settings, "settings that the user changed, with the run's values")
    recipe_note: described(str | None, "what has changed in the recipe since the run began")
    tracked: described(list[TrackedRun], "the run in trackers")
    settings: described(Settings, "all settings by dotted key")


@with_fields(_interval_method=str | None)
class Trial(TypedDict, extra_items=float | None):
    """A trial. A metric has the fields NAME, NAME_published, NAME_low, NAME_high and NAME_interval_method."""

    trial: str
    settings: Settings
    seeds: list[int]
    runs: described(list[str], "folders")
    states: list[str]
    eval_tokens: list[str]
    planned_gib: float | None
    peak_memory_gib: float | None
    memory_kind: str | None
    trainable: int | None
    train_seconds: float | None
    tokens_per_second: float | None
    pareto: bool


class RankedTrial(Trial, extra_items=float | None):
    best: described(bool, "the best trial by eval loss, or by --by")


class BestTrial(TypedDict, closed=True):
    """The best trial by eval loss of a sweep over a recipe; null if no eval loss may select one."""

    recipe: str
    sweep: str
    finished: int
    trials: int
    best: Trial | None


@with_fields(_verdict=str | None, _model=str | None, _interval_method=str | None, _decodings=dict[str, float | None])
class StudyRow(TypedDict, extra_items=float | None):
    """Runs of a recipe beside its published scores.

    A metric has the fields NAME, NAME_published, NAME_difference, NAME_low, NAME_high, NAME_interval_method,
    NAME_spread, NAME_verdict, NAME_model and others.
    """

    recipe: str
    run: described(str | None, "folder of the representative run")
    state: State | None
    published_adapter: str | None
    runs: int
    rehearsal: bool
    rows: int | None
    eval_loss: float | None
    incomparable_loss: str | None
    train_loss_gap_mean: float | None
    train_loss_gap_largest: float | None
    train_loss_gap_step: int | None
    train_loss_verdict: str | None
    gpu_hours: float | None
    differs: list[str]
    unreported: list[str]


class StudyRowWithRecords(StudyRow, extra_items=float | None):
    records: described(list[Status], "published numbers of the recipe")
    tuned: list[BestTrial]


class PublicScoreOfFile(PublicScore):
    file: str
    verdict: str | None


class Compared(TypedDict, extra_items=float | None):
    """Difference of two sides' scores on the rows that both have; by label, the mean of each side."""

    score: str
    rows: int
    difference: float
    interval: tuple[float, float] | None
    p_wilcoxon: float | None
    better: int
    equal: int
    worse: int


class Comparison(TypedDict, closed=True):
    """Runs or files of predictions, which have the labels a, b, c, and so on."""

    runs: dict[Label, Run]
    intervals: described(dict[Label, dict[str, tuple[float, float] | None]], "95 % intervals by metric")
    settings: described(dict[str, dict[Label, Any]], "settings, data, versions and machine that differ")
    trainings: described(
        dict[Label, Divergence | None], "first step whose loss differs from the first run's; null without a common step"
    )
    scores: list[Compared] | None


class Swept(TypedDict, closed=True):
    sweep: str
    tuned: list[BestTrial]
    steps: list[Step]
    results: list[Trial]


class Reproduced(TypedDict, closed=True):
    steps: list[Step]
    results: list[StudyRow]


class OutlinedRun(TypedDict("OutlinedRun", {"needs GiB": float | None}), closed=True):
    recipe: str
    training: str
    steps: int | None
    fits: str | None
    hours: float | None
    full_rows: described(bool | None, "true if the hours count every row as full")
    changes: str | None
    note: str | None
    problem: str | None


class Outline(TypedDict, closed=True):
    """Preview with --dry-run."""

    data: list[str]
    models: described(dict[str, float], "GB of the models to download")
    recipes: list[OutlinedRun]


class PredictionsScore(TypedDict, closed=True):
    name: described(str, "recipe or baseline")
    metric: str
    score: float
    published: float | None
    agrees: bool | None
    low: float | None
    high: float | None
    difference: float | None
    rows: int
    test_set: str
    verified: described(bool, "whether the files match the checksums of study.yaml")


class ScoredPredictions(TypedDict, closed=True):
    """Scores with --stage predictions."""

    scores: list[PredictionsScore]
    problems: described(dict[str, str], "problems by recipe or baseline")


OUTPUTS: dict[str, Any] = {
    "list": list[ListedRecipe],
    "show": Shown,
    "diff": list[DifferingKey],
    "data fetch": list[Fetched],
    "data prepare": described(dict[str, Manifest], "manifests by folder"),
    "check": list[Checked] | described(list[TokenizedRow], "with --show-tokens"),
    "plan": list[PlannedRecipe],
    "sweep": Swept,
    "reproduce": Reproduced | Outline | ScoredPredictions,
    "evaluate": Scores | described(dict[str, Scores], "of several models"),
    "score": Scores,
    "results": described(
        list[Run] | list[StudyRowWithRecords] | list[RankedTrial] | Comparison | list[PublicScoreOfFile],
        "of runs, a study, a sweep, a comparison or public records; with --columns, objects with these columns",
    ),
    "study check": list[Found],
    "doctor": list[Line],
}
"""Types of what the commands print."""


class _Schema(GenerateJsonSchema):
    """JSON Schema without titles that repeat a field's name; all fields of a dataclass are printed."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:
        return field["type"] == "dataclass-field" or super().field_is_required(field, total)


def schemas() -> dict[Path, str]:
    """Texts of the schemas by file."""
    texts = {}
    for command, kind in OUTPUTS.items():
        schema = TypeAdapter(kind).json_schema(schema_generator=_Schema, mode="serialization")
        head = {"$schema": GenerateJsonSchema.schema_dialect, "title": f"Output of recipe {command} --json"}
        file = FOLDER / f"{command.replace(' ', '-')}.schema.json"
        texts[file] = json.dumps(head | schema, indent=1, ensure_ascii=False) + "\n"
    return texts


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in schemas().items():
        file.write_text(text, encoding="utf-8")
