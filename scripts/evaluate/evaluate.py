"""Generate and score a run's predictions on test rows: `recipe evaluate`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..base.errors import UserError
from ..base.files import Row, tensor_shapes
from ..base.hub import importing_axolotl
from ..base.processes import held, now
from ..base.run_files import RunFile
from ..base.terminal import Bar, say, warn_once
from ..base.yamlfiles import Config
from ..config import substitution
from ..config.numerics import precision, quantized
from ..data import studies
from ..data.studies import Decoding
from ..metrics import registry
from ..metrics.bertscore import is_recorded
from ..metrics.metric import NO_LOSSES, BenchmarkMetric, Column, EvalLosses, LossMetric, ScoringInput
from ..run import trust
from ..run.rundir import RunDir
from ..training.run_record import FileState, Run, Summary
from ..training.summary import summarise
from ..training.trackers import add_scores
from . import benchmarks, evaluation_rows
from .engines import ENGINES
from .evaluation_rows import NO_ROWS, NO_SOURCE, EvaluationRows, RowSource, sample_positions
from .predict import part_file, predict
from .score import (
    ScorerModels,
    columns_of,
    computable,
    keep_scorer_scores,
    model_record,
    require_models,
    score,
    scorer_models,
)
from .scores_file import (
    ADAPTER,
    NO_SCORES,
    PREDICTIONS,
    SCORES,
    VERSION,
    Evaluation,
    Scores,
    changed,
    finish_write,
    notes,
    read_predictions,
    read_scores,
    write,
)
from .settings import BASE, REFERENCE, SERVER, EvaluationSettings, ServedFile

REHEARSED = 12  # maximum number of rows that a rehearsal evaluates
# Config keys without a field in `EvaluationSettings` that affect the model or the tokens that end answers.
BUILT_WITH = ("overrides_of_model_config", "eot_tokens")


@dataclass
class EvaluationRequest:
    """Rows, adapter and engine of an evaluation.

    Attributes:
        data: JSONL file of rows; `evaluation_rows.default_source` finds the default.
        limit: number of rows to evaluate, see `sample_positions`; by default all, or `REHEARSED` in a rehearsal.
        adapter: adapter folder, or `none` for the base model alone; by default the run's adapter.
        max_new_tokens: maximum number of tokens in an answer; by default the study's, or at most 96 in a rehearsal.
        batch_size: maximum number of rows in a batch, or of simultaneous server requests; None lets the engine choose.
        metrics: values of --metric, added to the study's metrics.
        decoding: name of a decoding configuration in the study; by default the study's default.
        engine: transformers, vllm, or the URL of a vLLM or llama.cpp server.
        model: name of the run's model on the server.
        force: names of the findings about untrusted code to accept; see `trust.refuse_code`.
    """

    data: Path | None = None
    limit: int | None = None
    adapter: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    metrics: Sequence[str] = ()
    decoding: str | None = None
    engine: str = REFERENCE
    model: str | None = None
    force: Sequence[str] = ()

    @property
    def server(self) -> str | None:
        """URL of the user's server; None for transformers and vllm."""
        if self.engine in ENGINES and self.engine != SERVER:
            return None
        return self.engine

    @property
    def kind_of_engine(self) -> str:
        """Engine without a URL, see `EvaluationSettings`."""
        return SERVER if self.server else self.engine

    @property
    def scorer(self) -> str | None:
        """Scorer model named by --metric, see `score.scorer_model`."""
        return registry.requested_scorer(self.metrics)

    def options(self) -> list[str]:
        """The request as options of `recipe evaluate`."""
        options = {
            "--data": self.data,
            "--limit": self.limit,
            "--adapter": self.adapter,
            "--max-new-tokens": self.max_new_tokens,
            "--batch-size": self.batch_size,
            "--decoding": self.decoding,
            "--engine": self.engine,
            "--served-model": self.model,
        }
        words = []
        for option, value in options.items():
            if value is not None:
                words += [option, str(value)]
        for name in self.force:
            words += ["--force", name]
        for metric in self.metrics:
            words += ["--metric", metric]
        return words


@dataclass(frozen=True)
class EvaluationPlan:
    """Checked request for an evaluation.

    `resolve` makes a plan without reading rows; `with_rows` then adds their number and hash.

    Attributes:
        run_dir: folder of the evaluated run.
        run: record of the run.
        request: the request.
        summary: summary of the run's metrics.
        adapter: state of the adapter's file before generation; None for the base model alone.
        source: source of the rows.
        without_rows: reason to score no rows; None with rows.
        positions: positions of the evaluated rows in the data; empty if no metric needs predictions.
        columns: metrics by name.
        settings: settings of the predictions.
        is_default: True if predictions and scores belong into the run folder itself.
    """

    run_dir: RunDir
    run: Run
    request: EvaluationRequest
    summary: Summary
    adapter: FileState | None
    source: RowSource
    without_rows: str | None
    positions: list[int]
    columns: dict[str, Column]
    settings: EvaluationSettings
    is_default: bool

    @property
    def limit(self) -> int | None:
        """Maximum number of rows, of the data and of each benchmark task."""
        if self.run.rehearsal and not self.request.limit:
            return REHEARSED
        return self.request.limit

    @property
    def folder(self) -> Path:
        """Folder for predictions and scores."""
        if self.is_default:
            return self.run_dir.path
        return self.settings.folder(self.run_dir.path)

    @cached_property
    def models(self) -> ScorerModels:
        """Scorer models of the columns."""
        return scorer_models(self.columns, self.request.scorer, self.run.rehearsal)

    def with_rows(self, sha256: str, total: int, references: Sequence[str]) -> "EvaluationPlan":
        """Plan with the hash, number and expected answers of the rows in the source."""
        positions = self.positions
        if _predicts(self.columns):
            positions = sample_positions(total, self.limit)
        settings = self.settings.model_copy()
        settings.data_sha256, settings.total_rows = sha256, total
        settings.rows = len(positions)
        settings.test_set = evaluation_rows.test_set(self.source.file, sha256)
        has_benchmark = any(isinstance(column.metric, BenchmarkMetric) for column in self.columns.values())
        if has_benchmark or len(positions) < total:
            settings.limit = self.limit
        columns = self.columns
        if total:
            columns = columns_of(self.run.origin, self.request.metrics, references)
        return replace(self, positions=positions, columns=columns, settings=settings)


def evaluate_run(run_dir: RunDir, request: EvaluationRequest) -> Evaluation:
    """Generate and score a prediction for each test row.

    A call continues an interrupted evaluation, and does not repeat a complete one.

    Raises:
        UserError: see `RunDir.refuse_links`, `resolve`, `prepare`, `reusable_evaluation`, `_require`, `_make_room` and
            `predict`.
        WorkFailed: the scorer model cannot be loaded, or memory does not suffice.
    """
    run_dir.refuse_links()
    plan, rows = prepare(resolve(run_dir, request))
    if plan.run.state != "finished":
        say(f"{run_dir.path}: the run is {plan.run.state} at step {plan.summary.step} of {plan.summary.max_steps}")
    if plan.run.recipe_note:
        warn_once(plan.run.recipe_note)  # also with --base
    folder = plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / RunFile.EVALUATION_LOCK, "another evaluation is running"):
        part = part_file(folder, plan.settings)
        finish_write(folder, part)
        former = reusable_evaluation(plan)
        if former is None:
            predictions, settings = _generate(plan, rows, part)
        elif reason := outdated(former, plan):
            predictions, settings = _reuse(plan, former, reason)
        else:
            say(f"{folder / PREDICTIONS}: complete and scored as requested; generated by {former.settings.engine}")
            return former
        evaluation, predictions = _score(plan, rows, predictions, settings, former)
        # for existing predictions, the file `part` has predictions of more rows
        write(folder, evaluation, predictions, None if former else part)
    # other evaluations have other settings, and another user's record could name any folder or account
    if request.adapter is None and folder == run_dir.path and run_dir.is_own(plan.run):
        add_scores(plan.summary.tracked, evaluation.scores)
    return evaluation


def resolve(run_dir: RunDir, request: EvaluationRequest) -> EvaluationPlan:
    """Plan of a requested evaluation; reads no rows, and writes nothing.

    Raises:
        UserError: the request is invalid, or adapter or answers are missing; see also `trust.refuse_code`.
    """
    run, cfg = run_dir.read(), run_dir.config
    trust.refuse_code(run_dir, run, request.force, request.adapter or str(run_dir.output.resolve()))
    columns = columns_of(run.origin, request.metrics)
    adapter, adapter_state = _adapter(run_dir, run, request.adapter)
    default = evaluation_rows.default_source(run, cfg)
    without_answers = registry.requested(request.metrics) or columns  # default metrics need answers
    source, without_rows = _source(run_dir, run, request, default, _predicts(without_answers))
    if without_rows:
        columns = without_answers
    elif not request.data:
        trust.refuse_rows(run_dir, run, source.local_files(Path(run.cwd)), request.force)
    settings = EvaluationSettings(
        base_model=_base_model(run, cfg),
        adapter=adapter,
        adapter_sha256=adapter_state.sha256 if adapter_state else None,
        data=source.data,
        data_sha256=NO_ROWS.sha256,
        rows=0,
        total_rows=0,
        decoding=_decoding(run, request),
        batch_size=request.batch_size,
        quantized=quantized(cfg),
        built_with={key: cfg[key] for key in BUILT_WITH if cfg.get(key)},
        dtype=_dtype(run, cfg),
        engine=request.kind_of_engine,
        model=request.model,
        file=_served_file(request),
    )
    has_default_rows = default is None or without_rows or source.data == default.data
    return EvaluationPlan(
        run_dir=run_dir,
        run=run,
        request=request,
        summary=run_dir.summary(run),
        adapter=adapter_state,
        source=source,
        without_rows=without_rows,
        positions=[],
        columns=columns,
        settings=settings,
        is_default=has_default_rows and request.adapter is None and not (request.decoding or settings.file),
    )


def _source(
    run_dir: RunDir, run: Run, request: EvaluationRequest, default: RowSource | None, required: bool
) -> tuple[RowSource, str | None]:
    """Source of the rows, and the reason to score none; None with rows.

    Raises:
        UserError: the rows cannot be scored, but are requested or required.
    """
    source = default
    if request.data:
        source = evaluation_rows.source_of_file(request.data, run_dir.config, Path(run.cwd))
    try:
        return evaluation_rows.require_reference(run_dir, run_dir.config, source), None
    except UserError as error:
        if request.data or required:
            raise
        return NO_SOURCE, str(error)


def _predicts(columns: Mapping[str, Column]) -> bool:
    """True if a metric needs predictions; eval loss and benchmarks need no rows."""
    return any(not isinstance(column.metric, LossMetric | BenchmarkMetric) for column in columns.values())


def _adapter(run_dir: RunDir, run: Run, requested: str | None) -> tuple[str, FileState | None]:
    """Folder of the adapter, and the state of its file; `BASE` and None for the base model alone."""
    output = run_dir.output
    adapter = output if requested is None else Path(requested)
    file = adapter / ADAPTER
    if requested != BASE and tensor_shapes(file) is None:
        raise UserError(
            f"{file}: damaged or missing; the run is {run.state}; resume it, or name a checkpoint's folder with "
            "--adapter"
        )
    if not (output / "tokenizer_config.json").is_file():
        raise UserError(f"{run_dir.path}: has no tokenizer; the run is {run.state}")
    if requested == BASE:
        return BASE, None
    state = FileState.of(file)
    if requested is None and run.adapter and run.adapter.sha256 != state.sha256:
        problem = f"{adapter}: differs from the adapter at the end of training"
        raise UserError(f"{problem}; restore that adapter, or evaluate the current one with --adapter {adapter}")
    return str(adapter.resolve()), state


def _base_model(run: Run, cfg: Config) -> str:
    """Base model; a local folder by its path."""
    base_model: str = cfg["base_model"]
    folder = Path(run.cwd, base_model)
    if folder.is_dir():
        return str(folder)
    return base_model


def _dtype(run: Run, cfg: Config) -> str:
    """Data type of the weights in training; a run that recorded no list of GPUs had a GPU."""
    on_gpu = not run.rehearsal and bool(run.provenance.get("gpus", True))
    return precision(cfg, on_gpu).weights


def _served_file(request: EvaluationRequest) -> ServedFile | None:
    """GGUF file that a llama.cpp server answers with; None for other engines, and if no server responds yet."""
    if request.server is None:
        return None
    from .llama import served_file

    return served_file(request.server, request.model)


def _decoding(run: Run, request: EvaluationRequest) -> Decoding:
    """Decoding of the study, with the requested maximum of new tokens."""
    decoding = studies.decoding_of(studies.study_of(run.origin), request.decoding)
    if request.engine != REFERENCE and decoding.num_beams > 1:
        raise UserError(f"--engine: decoding uses {decoding.num_beams} beams; only --engine {REFERENCE} has beams")
    most = decoding.max_new_tokens
    # a rehearsal's model rarely ends an answer; results find those of another decoding by all of its settings
    if run.rehearsal and not request.decoding:
        most = min(most, studies.OF_NO_STUDY.max_new_tokens)
    return decoding.model_copy(update={"max_new_tokens": request.max_new_tokens or most})


def prepare(plan: EvaluationPlan) -> tuple[EvaluationPlan, EvaluationRows]:
    """Restore the small model of a rehearsal, and read the rows.

    Returns:
        The plan with its rows, and all rows of the data.

    Raises:
        UserError: see `evaluation_rows.read_source`.
    """
    if plan.run.rehearsal:  # before anything imports torch
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cfg = plan.run_dir.config
    substitution.restore(cfg)
    rows = NO_ROWS
    if plan.without_rows:
        say(f"{plan.without_rows}; scoring without rows: {', '.join(plan.columns)}")
    else:
        rows = evaluation_rows.read_source(plan.source, plan.run_dir, plan.run, cfg)
    return plan.with_rows(rows.sha256, len(rows.rows), rows.references), rows


def reusable_evaluation(plan: EvaluationPlan) -> Evaluation | None:
    """Existing evaluation, if it has all predictions of a plan; None if they have to be generated.

    Raises:
        UserError: the predictions were edited.
    """
    former = read_scores(plan.folder)
    if not former or former.settings.differing_keys(plan.settings):
        return None
    if not former.settings.engine_stands_for(plan.settings):
        return None
    if [row["row"] for row in read_predictions(plan.folder)] != plan.positions:
        return None
    if changed(plan.folder, former) == "edited":
        raise UserError(
            f"{plan.folder / PREDICTIONS}: edited since it was scored; restore it, or move it and {SCORES} away to "
            "generate new predictions"
        )
    return former


def outdated(former: Evaluation, plan: EvaluationPlan) -> str | None:
    """Reason to compute scores of existing predictions again, or None."""
    if former.version != VERSION:
        return "the scoring code has changed"
    if former.settings.limit != plan.settings.limit:  # of a benchmark that is no longer requested, for example
        return "another --limit"
    if former.settings.test_set != plan.settings.test_set:
        return "another test set"
    for name, model in plan.models.items():
        record = model_record(plan.columns[name], former.scores)
        if record and model and not is_recorded(model, record):
            return "another scorer model"
        if record and plan.request.scorer == "none":  # without the model on this machine, its scores still count
            return "no scorer model"
    for name, column in computable(plan.columns, plan.models).items():
        if not column.same_scores(former.columns.get(name)):
            return f"metric {name} is new or has changed"
    if plan.run.rehearsal:  # leaves out benchmarks whose rows are not on this machine
        return None
    valid = benchmarks.valid_benchmarks(plan.columns, former, plan.limit)
    for name in benchmarks.missing_benchmarks(plan.columns, valid):
        return f"benchmark {name}: another limit, or a task in a file"
    return None


def _generate(plan: EvaluationPlan, rows: EvaluationRows, part: Path) -> tuple[list[Row], EvaluationSettings]:
    """Generate the predictions that the file `part` lacks; return all, with their settings."""
    _require(plan)
    chosen = rows.at(plan.positions)
    registry.require(plan.columns.values(), [row.content for row in chosen.rows])
    _make_room(plan)
    with importing_axolotl(offline=plan.run.rehearsal):
        return predict(
            plan.settings,
            chosen,
            plan.run_dir.config,
            plan.run_dir.output,
            part,
            plan.request.server,
            plan.run.rehearsal,
        )


def _require(plan: EvaluationPlan) -> None:
    """Check scorer models and benchmark tasks before hours of generation."""
    require_models(plan.models.values())
    benchmarks.require(plan.columns, plan.run.rehearsal, plan.request.force)


def _make_room(plan: EvaluationPlan) -> None:
    """Make room for new predictions without losing old ones.

    Stale predictions may be replaced, and a larger --limit continues those of a smaller one. Predictions with other
    settings, such as another --max-new-tokens, move to the folder of their settings.

    Raises:
        UserError: existing predictions have more rows or another engine; the user has to move them.
    """
    evaluation, settings = read_scores(plan.folder), plan.settings
    if evaluation is None or evaluation.settings.rows == 0:
        return
    if changed(plan.folder, evaluation) == "stale":
        return
    former = evaluation.settings
    differing = former.differing_keys(settings)
    if differing:
        _move_away(plan.folder, former, differing)
    elif former.rows > settings.rows or not former.engine_stands_for(settings):
        raise UserError(
            f"{plan.folder / SCORES}: has scores of {former.rows_in_words}, generated by {former.engine}; move it and "
            f"{PREDICTIONS} away to evaluate {settings.rows:,} rows with {settings.engine}"
        )


def _move_away(folder: Path, settings: EvaluationSettings, differing: list[str]) -> None:
    """Move predictions and scores to the folder of their settings, which differ from those requested.

    They are left to be replaced if that folder has these rows and more.
    """
    target = settings.folder(folder)
    moved_before = read_scores(target)
    if moved_before and moved_before.settings.rows > settings.rows:
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in (folder / PREDICTIONS, folder / SCORES):
        if file.is_file():
            file.replace(target / file.name)
    say(f"{folder / SCORES}: has another {', '.join(differing)}; moved to {target}")


def _reuse(plan: EvaluationPlan, former: Evaluation, reason: str) -> tuple[list[Row], EvaluationSettings]:
    """Existing predictions of a plan, with its settings and their engine."""
    _require(plan)
    say(f"{plan.folder / PREDICTIONS}: complete, with the same settings; computing new scores: {reason}")
    return read_predictions(plan.folder), plan.settings.with_engine_of(former.settings)


def _score(
    plan: EvaluationPlan,
    rows: EvaluationRows,
    predictions: list[Row],
    settings: EvaluationSettings,
    former: Evaluation | None,
) -> tuple[Evaluation, list[Row]]:
    """Evaluation with the scores of predictions, and the predictions with their row scores.

    Args:
        former: earlier evaluation of the same predictions, whose columns and valid benchmarks are kept.
    """
    request, run, cfg = plan.request, plan.run, plan.run_dir.config
    earlier: Scores = former or NO_SCORES
    columns = earlier.columns | plan.columns
    results = benchmarks.valid_benchmarks(plan.columns, earlier, plan.limit)
    if missing := benchmarks.missing_benchmarks(columns, results):
        options = benchmarks.MeasurementOptions(plan.limit, run.rehearsal, request.force)
        results |= benchmarks.measure(missing, settings, cfg, plan.run_dir.output, options)
    with Bar("scoring", 1):
        inputs = ScoringInput(losses=_losses(plan), benchmarks=results, groups=rows.groups)
        scores, scored = score(predictions, columns, plan.models, inputs)
    evaluation = Evaluation(
        created=now(),
        rehearsal=run.rehearsal,
        scores=scores.scores,
        shares=scores.shares,
        version=VERSION,
        settings=settings,
        files={"adapter": plan.adapter} if plan.adapter else {},
        data=rows.files,
        also_trained=evaluation_rows.trained_positions(rows.at(plan.positions), run, cfg),
    )
    evaluation.notes = notes(evaluation, scored) + scores.notes
    if former and former.version == VERSION and request.scorer != "none":
        keep_scorer_scores(evaluation, scored, former, predictions)
    return evaluation, scored


def _losses(plan: EvaluationPlan) -> EvalLosses:
    """Eval losses of the evaluated model, from the training: the base model's are those of step 0."""
    if plan.request.adapter is None:
        return plan.summary.eval_losses
    if plan.request.adapter == BASE and not plan.run_dir.config.get("lora_model_dir"):
        return summarise([record for record in plan.run_dir.read_metrics() if record["step"] == 0]).eval_losses
    return NO_LOSSES


def is_complete(plan: EvaluationPlan) -> bool:
    """True if an existing evaluation has all predictions and scores of a plan; reads no rows.

    The rows are those of an earlier evaluation whose files have not changed since.
    """
    run = plan.run_dir.path
    for folder in (run, *run.glob("evaluations/*")):
        earlier = read_scores(folder)
        if earlier and earlier.settings.data == plan.source.data and not earlier.has_other_rows:
            references = [row["reference"] for row in read_predictions(folder)]
            plan = plan.with_rows(earlier.settings.data_sha256, earlier.settings.total_rows, references)
            former = reusable_evaluation(plan)
            return former is not None and outdated(former, plan) is None
    return False
