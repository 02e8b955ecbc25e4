"""Generate and score a run's predictions on test rows: `recipe evaluate`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..base.errors import UserError
from ..base.files import Row, sha256, tensor_shapes
from ..base.hub import importing_axolotl
from ..base.processes import held, now
from ..base.run_files import RunFile
from ..base.terminal import Bar, say, say_once
from ..config import substitution
from ..config.numerics import precision, quantized
from ..data import studies
from ..data.studies import Decoding
from ..metrics import registry
from ..metrics.bertscore import is_recorded
from ..metrics.metric import NO_LOSSES, BenchmarkMetric, LossMetric, ScoringInput
from ..run import trust
from ..run.rundir import RunDir
from ..training.run_record import FileState, Summary
from . import benchmarks, evaluation_rows, scores_file
from .changes import changed
from .evaluation_rows import NO_ROWS, EvaluationRows, RowSource
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
    read_predictions,
    read_scores,
    write,
)
from .settings import BASE, ORIGIN, REFERENCE, SERVER, VLLM, EvaluationSettings, ServedFile

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
        return None if self.engine in (REFERENCE, VLLM) else self.engine

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


class EvaluationTask:
    """Checked request for an evaluation.

    Attributes:
        run: evaluated run.
        cfg: the run's config.
        adapter: folder of the adapter; None for the base model alone.
        all_rows: all rows of the data.
        rows: evaluated rows; empty if no metric needs predictions.
        settings: settings of the predictions.
        columns: metrics by name.
        most_rows: maximum number of rows, of the data and of each benchmark task.
        where: folder for predictions and scores.
        files: states of the files `adapter` and `data` before generation; an entry is absent if there is no such file.

    Raises:
        UserError: the request is invalid, or adapter, rows or answers are missing; see also `trust.refuse_code`.
    """

    def __init__(self, run_dir: RunDir, request: EvaluationRequest):
        self.folder = run_dir
        self.request = request
        self.run = run_dir.read()
        if self.run.rehearsal:  # before anything imports torch
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.cfg = run_dir.config
        trust.refuse_code(run_dir, self.run, request.force, request.adapter or str(run_dir.output.resolve()))
        substitution.restore(self.cfg)
        self.columns = columns_of(self.run.origin, request.metrics)
        self.adapter = self._adapter()
        self.files = {"adapter": FileState.of(self.adapter / ADAPTER)} if self.adapter else {}
        default = evaluation_rows.default_source(self.run, self.cfg)
        self.all_rows = self._read_rows(default)
        self.most_rows = request.limit
        if self.run.rehearsal and not request.limit:
            self.most_rows = REHEARSED
        self.rows = self.all_rows.sample(self.most_rows if self.predicts else 0)
        self.settings = self._settings()
        has_default_rows = default is None or self.all_rows.data in (default.data, NO_ROWS.data)
        is_default = request.adapter is None and not request.decoding and not self.settings.file
        if has_default_rows and is_default:
            self.where = run_dir.path
        else:
            self.where = self.settings.folder(run_dir.path)

    @cached_property
    def summary(self) -> Summary:
        """Summary of the run's metrics."""
        return self.folder.summary(self.run)

    @cached_property
    def models(self) -> ScorerModels:
        """Scorer models of the columns."""
        return scorer_models(self.columns, self.request.scorer, self.run.rehearsal)

    @property
    def predicts(self) -> bool:
        """True if a metric needs predictions; eval loss and benchmarks need no rows."""
        return any(not isinstance(column.metric, LossMetric | BenchmarkMetric) for column in self.columns.values())

    def _adapter(self) -> Path | None:
        """Folder of the adapter; None for the base model alone."""
        output, state = self.folder.output, self.run.state
        adapter = output if self.request.adapter is None else Path(self.request.adapter)
        is_base = self.request.adapter == BASE
        if not is_base and tensor_shapes(adapter / ADAPTER) is None:
            raise UserError(
                f"{adapter / ADAPTER}: damaged or missing; the run is {state}; resume it, or name a "
                "checkpoint's folder with --adapter"
            )
        if not (output / "tokenizer_config.json").is_file():
            raise UserError(f"{self.folder.path}: has no tokenizer; the run is {state}")
        if is_base:
            return None
        trained = self.run.adapter
        if self.request.adapter is None and trained and trained.sha256 != sha256(adapter / ADAPTER):
            problem = f"{adapter}: differs from the adapter at the end of training"
            raise UserError(f"{problem}; restore that adapter, or evaluate the current one with --adapter {adapter}")
        return adapter

    def _read_rows(self, default: RowSource | None) -> EvaluationRows:
        """Rows of --data, or else of the default source.

        `NO_ROWS` if the default rows have no answers; only metrics that need no predictions then remain.
        """
        source = default
        if self.request.data:
            source = evaluation_rows.source_of_file(self.request.data, self.cfg, Path(self.run.cwd))
        try:
            source = evaluation_rows.require_reference(self.folder, self.cfg, source)
        except UserError as error:
            self.columns = registry.requested(self.request.metrics) or self.columns  # default metrics need answers
            if self.predicts or self.request.data:
                raise
            say(f"{error}; scoring without rows: {', '.join(self.columns)}")
            return NO_ROWS
        rows = evaluation_rows.read_source(source, self.folder, self.run, self.cfg)
        self.columns = columns_of(self.run.origin, self.request.metrics, rows.references)
        return rows

    def _settings(self) -> EvaluationSettings:
        """Settings for the predictions."""
        request, run, cfg = self.request, self.run, self.cfg
        adapter, adapter_sha256 = BASE, None
        if self.adapter:
            adapter, adapter_sha256 = str(self.adapter.resolve()), self.files["adapter"].sha256
        local_model = Path(run.cwd, str(cfg["base_model"]))
        base_model = str(local_model) if local_model.is_dir() else cfg["base_model"]
        # resolves `bf16: auto` as in training; if a run recorded no list of GPUs, assume a GPU
        on_gpu = not run.rehearsal and bool(run.provenance.get("gpus", True))
        return EvaluationSettings(
            base_model=base_model,
            adapter=adapter,
            adapter_sha256=adapter_sha256,
            data=self.rows.data,
            data_sha256=self.rows.sha256,
            test_set=self.rows.test_set,
            rows=len(self.rows.rows),
            total_rows=len(self.all_rows.rows),
            limit=self._recorded_limit(),
            decoding=self._decoding(),
            batch_size=request.batch_size,
            quantized=quantized(cfg),
            built_with={key: cfg[key] for key in BUILT_WITH if cfg.get(key)},
            dtype=precision(cfg, on_gpu).weights,
            engine=request.kind_of_engine,
            model=request.model,
            file=self._served_file(),
        )

    def _served_file(self) -> ServedFile | None:
        """GGUF file that a llama.cpp server answers with; None for other engines, and if no server responds yet."""
        if self.request.server is None:
            return None
        from .llama import served_file

        return served_file(self.request.server, self.request.model)

    def _recorded_limit(self) -> int | None:
        """Limit, if it leaves out rows of the data, or may leave out rows of a benchmark; otherwise None."""
        has_benchmark = any(isinstance(column.metric, BenchmarkMetric) for column in self.columns.values())
        if has_benchmark or len(self.rows.rows) < len(self.all_rows.rows):
            return self.most_rows
        return None

    def _decoding(self) -> Decoding:
        """Decoding of the study, with the requested maximum of new tokens."""
        request = self.request
        decoding = studies.decoding_of(studies.study_of(self.run.origin), request.decoding)
        if request.engine != REFERENCE and decoding.num_beams > 1:
            raise UserError(f"--engine: decoding uses {decoding.num_beams} beams; only --engine {REFERENCE} has beams")
        most = decoding.max_new_tokens
        # a rehearsal's model rarely ends an answer; results find those of another decoding by all of its settings
        if self.run.rehearsal and not request.decoding:
            most = min(most, studies.OF_NO_STUDY.max_new_tokens)
        return decoding.model_copy(update={"max_new_tokens": request.max_new_tokens or most})


def outdated(former: Evaluation, task: EvaluationTask) -> str | None:
    """Reason to compute scores of existing predictions again, or None."""
    if former.version != VERSION:
        return "the scoring code has changed"
    if former.settings.limit != task.settings.limit:  # of a benchmark that is no longer requested, for example
        return "another --limit"
    if former.settings.test_set != task.settings.test_set:
        return "another test set"
    for name, model in task.models.items():
        record = model_record(task.columns[name], former.scores)
        if record and model and not is_recorded(model, record):
            return "another scorer model"
        if record and task.request.scorer == "none":  # without the model on this machine, its scores still count
            return "no scorer model"
    for name, column in computable(task.columns, task.models).items():
        if not column.same_scores(former.columns.get(name)):
            return f"metric {name} is new or has changed"
    if task.run.rehearsal:  # leaves out benchmarks whose rows are not on this machine
        return None
    valid = benchmarks.valid_benchmarks(task.columns, former, task.most_rows)
    for name in benchmarks.missing_benchmarks(task.columns, valid):
        return f"benchmark {name}: another limit, or a task in a file"
    return None


def is_complete(task: EvaluationTask) -> bool:
    """True if the existing evaluation has all predictions and scores of a task."""
    former = reusable_evaluation(task)
    return former is not None and outdated(former, task) is None


def reusable_evaluation(task: EvaluationTask) -> Evaluation | None:
    """Existing evaluation, if it has all predictions of a task; None if they have to be generated.

    Raises:
        UserError: the predictions were edited.
    """
    former = read_scores(task.where)
    if not former or former.settings.differing_keys(task.settings):
        return None
    if not former.settings.engine_stands_for(task.settings):
        return None
    if [row["row"] for row in read_predictions(task.where)] != task.rows.positions:
        return None
    if changed(task.where, former) == "edited":
        raise UserError(
            f"{task.where / PREDICTIONS}: edited since it was scored; restore it, or move it and {SCORES} away to "
            "generate new predictions"
        )
    return former


def evaluate(run_dir: RunDir, request: EvaluationRequest) -> Evaluation:
    """Generate and score a prediction for each test row.

    A call continues an interrupted evaluation, and does not repeat a complete one.

    Raises:
        UserError: see `RunDir.refuse_links`, `EvaluationTask`, `score.require_models`, `benchmarks.require`,
            `_make_room` and `predict`.
        WorkFailed: the scorer model cannot be loaded, or memory does not suffice.
    """
    run_dir.refuse_links()
    task = EvaluationTask(run_dir, request)
    summary = task.summary  # of this moment, if the run is in training
    if task.run.state != "finished":
        say(f"{run_dir.path}: the run is {task.run.state} at step {summary.step} of {summary.max_steps}")
    if task.run.recipe_note:
        say_once(task.run.recipe_note)  # also with --base
    task.where.mkdir(parents=True, exist_ok=True)
    with held(task.where / RunFile.EVALUATION_LOCK, "another evaluation is running"):
        part = part_file(task.where, task.settings)
        scores_file.finish_write(task.where, part)
        former = reusable_evaluation(task)
        if former is None:
            return _generate_and_score(task, part)
        reason = outdated(former, task)
        if reason is None:
            say(f"{task.where / PREDICTIONS}: complete and scored as requested; generated by {former.settings.engine}")
            return former
        return _score_again(task, former, reason)


def _generate_and_score(task: EvaluationTask, part: Path) -> Evaluation:
    """Generate the predictions that the file `part` lacks, score all, and write predictions and scores."""
    _require(task)
    _make_room(task)
    rehearsal = task.run.rehearsal
    with importing_axolotl(offline=rehearsal):
        rows, settings = predict(
            task.settings, task.rows, task.cfg, task.folder.output, part, task.request.server, rehearsal
        )
    evaluation, rows = _scored(task, rows, settings, NO_SCORES)
    write(task.where, evaluation, rows, part)
    return evaluation


def _score_again(task: EvaluationTask, former: Evaluation, reason: str) -> Evaluation:
    """Score existing predictions again, and write predictions and scores."""
    _require(task)
    say(f"{task.where / PREDICTIONS}: complete, with the same settings; computing new scores: {reason}")
    former_rows = read_predictions(task.where)
    engine = former.settings.model_dump(include={"batch_size", *ORIGIN})
    settings = EvaluationSettings.model_validate(task.settings.model_dump() | engine)
    evaluation, rows = _scored(task, former_rows, settings, former)
    if former.version == VERSION and task.request.scorer != "none":
        keep_scorer_scores(evaluation, rows, former, former_rows)
    write(task.where, evaluation, rows, None)  # the file `part` has predictions of more rows
    return evaluation


def _require(task: EvaluationTask) -> None:
    """Check scorer models and benchmark tasks before hours of generation."""
    require_models(task.models.values())
    benchmarks.require(task.columns, task.run.rehearsal, task.request.force)


def _scored(
    task: EvaluationTask,
    predictions: Sequence[Row],
    settings: EvaluationSettings,
    former: Scores,
) -> tuple[Evaluation, list[Row]]:
    """Evaluation with the scores of predictions, and the predictions with their row scores.

    Args:
        former: earlier scores of the same predictions, whose columns and valid benchmarks are kept.
    """
    request, run = task.request, task.run
    columns = former.columns | task.columns
    results = benchmarks.valid_benchmarks(task.columns, former, task.most_rows)
    if missing := benchmarks.missing_benchmarks(columns, results):
        options = benchmarks.MeasurementOptions(task.most_rows, run.rehearsal, request.force)
        results |= benchmarks.measure(missing, settings, task.cfg, task.folder.output, options)
    with Bar("scoring", 1):
        losses = NO_LOSSES
        if request.adapter is None:  # the run's eval losses do not describe another adapter
            losses = task.summary.eval_losses
        inputs = ScoringInput(losses=losses, benchmarks=results, groups=task.all_rows.groups)
        scores, rows = score(predictions, columns, task.models, inputs)
    evaluation = Evaluation(
        created=now(),
        rehearsal=run.rehearsal,
        scores=scores.scores,
        shares=scores.shares,
        version=VERSION,
        settings=settings,
        files=task.files,
        data=task.all_rows.files,
        also_trained=evaluation_rows.trained_positions(task.rows, run, task.cfg),
    )
    evaluation.notes = scores_file.notes(evaluation, rows) + scores.notes
    return evaluation, rows


def _make_room(task: EvaluationTask) -> None:
    """Make room for new predictions without losing old ones.

    Stale predictions may be replaced, and a larger --limit continues those of a smaller one. Predictions with other
    settings, such as another --max-new-tokens, move to the folder of their settings.

    Raises:
        UserError: existing predictions have more rows or another engine; the user has to move them.
    """
    evaluation, settings = read_scores(task.where), task.settings
    if evaluation is None or evaluation.settings.rows == 0:
        return
    if changed(task.where, evaluation) == "stale":
        return
    former = evaluation.settings
    differing = former.differing_keys(settings)
    if differing:
        _move_away(task.where, former, differing)
    elif former.rows > settings.rows or not former.engine_stands_for(settings):
        raise UserError(
            f"{task.where / SCORES}: has scores of {former.rows_in_words}, generated by {former.engine}; move it and "
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
