"""Generate and score a run's predictions on test rows: `recipe evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UserError
from ..base.files import Row, sha256, tensor_shapes
from ..base.hub import importing_axolotl
from ..base.processes import held, now
from ..base.terminal import Bar, say
from ..config import substitution
from ..config.numerics import precision, quantized
from ..data import studies
from ..metrics import registry
from ..metrics.bertscore import made_by
from ..metrics.metric import BenchmarkMetric, CorpusMetric, RowMetric, ScoringInput
from ..run import trust
from ..run.rundir import RunDir
from ..training.run_record import FileState
from . import benchmarks, evaluation_rows, scores_file
from .predict import part_file, predict
from .score import (
    VERSION,
    ScorerModels,
    columns_of,
    keep_scorer_scores,
    model_record,
    require_models,
    score,
    scorer_models,
)
from .scores_file import (
    ADAPTER,
    BASE,
    PREDICTIONS,
    REFERENCE,
    SCORES,
    SERVER,
    VLLM,
    Evaluation,
    EvaluationSettings,
    Prediction,
    changed,
    read_predictions,
    read_scores,
    write,
)

REHEARSED = 12  # maximum number of rows that a rehearsal evaluates
# Config keys without a field in `EvaluationSettings` that affect the model or the end token of answers.
BUILT_WITH = ("overrides_of_model_config", "eot_tokens")


@dataclass
class EvaluationRequest:
    """Rows, adapter and engine of an evaluation.

    Attributes:
        data: JSONL file of rows; `evaluation_rows.usual` finds the default.
        limit: number of rows to evaluate, see `scores_file.taken`; by default all, or `REHEARSED` in a rehearsal
            without `data`.
        adapter: adapter folder, or `none` for the base model alone; by default the run's adapter.
        max_new_tokens: maximum number of tokens in an answer; by default the study's, or at most 96 in a rehearsal.
        batch_size: maximum number of rows in a batch, or of simultaneous server requests; None lets the engine choose.
        metrics: values of --metric, added to the study's metrics.
        decoding: name of a decoding configuration in the study; by default the study's default.
        engine: transformers, vllm, or the address of a vLLM server.
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
        """Address of the user's server; None for transformers and vllm."""
        return None if self.engine in (REFERENCE, VLLM) else self.engine

    @property
    def judge(self) -> str | None:
        """Scorer model named by --metric, see `score.scorer_model`."""
        return registry.scorer_named(self.metrics)

    def options(self) -> list[str]:
        """The request as options of `recipe evaluate`."""
        options = {
            "--data": self.data,
            "--limit": self.limit,
            "--adapter": self.adapter,
            "--max-new-tokens": self.max_new_tokens,
            "--batch-size": self.batch_size,
            "--decoding": self.decoding,
            "--engine": None if self.engine == REFERENCE else self.engine,
            "--model": self.model,
        }
        words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
        words += [word for name in self.force for word in ("--force", name)]
        return words + [word for metric in self.metrics for word in ("--metric", metric)]


class EvaluationTask:
    """Checked request for an evaluation.

    Attributes:
        run: evaluated run.
        cfg: the run's config.
        every: all rows of the data.
        rows: evaluated rows; empty if no metric needs predictions.
        settings: settings of the predictions.
        columns: metrics by name.
        most_rows: maximum number of rows per benchmark task.
        where: folder for predictions and scores.
        files: states of the files `adapter` and `data` before generation; an entry is absent if there is no such file.

    Raises:
        UserError: the request is invalid, or adapter, rows or answers are missing; see also `trust.refuse_code`.
    """

    def __init__(self, folder: RunDir, request: EvaluationRequest):
        self.request = request
        self.run = folder.read()
        self.cfg = folder.config
        trust.refuse_code(folder, self.run, request.force, request.adapter or "")
        substitution.restore(self.cfg)
        self.columns = columns_of(self.run.origin, request.metrics)
        adapter = self._adapter(folder)
        self.files = {"adapter": FileState.of(adapter / ADAPTER)} if adapter else {}
        usual = evaluation_rows.usual(self.run, self.cfg)
        source = usual
        if request.data:
            source = evaluation_rows.named(request.data, self.cfg, Path(self.run.cwd))
        try:
            source = evaluation_rows.require_reference(folder, self.cfg, source)
        except UserError as error:
            self.columns = registry.requested(request.metrics) or self.columns  # default metrics need answers
            if self.predicts or request.data:
                raise
            say(f"{error}; scoring without rows: {', '.join(self.columns)}")
            source = usual = None
        self.every = evaluation_rows.read(source, folder, self.run, self.cfg) if source else evaluation_rows.NONE
        self.most_rows = request.limit or (REHEARSED if self.run.rehearsal else None)
        limit = request.limit if request.data else self.most_rows
        self.rows = self.every.part(limit if self.predicts else 0)
        self.settings = self._settings(adapter)
        if source and source.file:
            self.settings.test_set = evaluation_rows.test_set(source.file, self.every.sha256)
        left_out = len(self.rows.rows) < len(self.every.rows)
        if left_out or any(isinstance(column.metric, BenchmarkMetric) for column in self.columns.values()):
            self.settings.limit = self.most_rows
        other_rows = source and usual and source.data != usual.data
        is_default = request.adapter is None and not request.decoding and not other_rows
        self.where = folder.path if is_default else self.settings.folder(folder.path)

    @property
    def predicts(self) -> bool:
        """True if a metric needs predictions; eval loss and benchmarks need no rows."""
        return any(isinstance(column.metric, RowMetric | CorpusMetric) for column in self.columns.values())

    def _adapter(self, folder: RunDir) -> Path | None:
        """Folder of the adapter; None for the base model alone."""
        asked = self.request.adapter
        adapter = folder.output if asked is None else Path(asked)
        if asked != BASE and tensor_shapes(adapter / ADAPTER) is None:
            raise UserError(
                f"{adapter / ADAPTER}: damaged or missing; the run is {self.run.state}; resume it, or name a "
                "checkpoint's folder with --adapter"
            )
        if not (folder.output / "tokenizer_config.json").is_file() or "base_model" not in self.cfg:
            raise UserError(f"{folder.path}: has no tokenizer or no base_model; the run is {self.run.state}")
        trained = self.run.adapter
        if asked is None and trained and trained.sha256 != sha256(adapter / ADAPTER):
            problem = f"{adapter}: differs from the adapter at the end of training"
            raise UserError(f"{problem}; restore that adapter, or evaluate the current one with --adapter {adapter}")
        return None if asked == BASE else adapter

    def _settings(self, adapter: Path | None) -> EvaluationSettings:
        """Settings for the predictions."""
        request, run, cfg = self.request, self.run, self.cfg
        decoding = studies.decoding_of(studies.study_of(run.origin), request.decoding)
        cap = studies.OF_NO_STUDY if run.rehearsal and not request.decoding else decoding
        most = min(decoding.max_new_tokens, cap.max_new_tokens)  # a rehearsal's model rarely ends an answer
        if request.engine != REFERENCE and decoding.num_beams > 1:
            raise UserError(f"--engine: decoding uses {decoding.num_beams} beams; only --engine {REFERENCE} has beams")
        local = Path(run.cwd, str(cfg["base_model"]))
        # resolves `bf16: auto` as in training; if a run recorded no list of GPUs, assume a GPU
        on_gpu = not run.rehearsal and bool(run.provenance.get("gpus", True))
        return EvaluationSettings(
            base_model=str(local) if local.is_dir() else cfg["base_model"],
            adapter=str(adapter.resolve()) if adapter else BASE,
            adapter_sha256=self.files["adapter"].sha256 if adapter else None,
            data=self.rows.data,
            data_sha256=self.rows.sha256,
            rows=len(self.rows.rows),
            total_rows=len(self.every.rows),
            decoding=decoding.model_copy(update={"max_new_tokens": request.max_new_tokens or most}),
            batch_size=request.batch_size,
            quantized=quantized(cfg),
            built_with={key: cfg[key] for key in BUILT_WITH if cfg.get(key)},
            dtype=precision(cfg, on_gpu).weights,
            engine=SERVER if request.server else request.engine,
            model=request.model,
        )


def outdated(former: Evaluation, task: EvaluationTask, judged: ScorerModels) -> str | None:
    """Reason to compute scores of existing predictions again, or None."""
    if former.version != VERSION:
        return "the scoring code has changed"
    if former.settings.limit != task.settings.limit:
        return "another --limit"
    if former.settings.test_set != task.settings.test_set:
        return "another test set"
    for name, model in judged.items():
        record = model_record(task.columns[name], former.scores)
        # earlier scores remain valid without their model, unless --metric names another model, or none
        if (model or task.request.judge) and not made_by(model, record):
            return "another scorer model"
    for name, column in task.columns.items():
        # a metric without its scorer model is left out of the scores
        if judged.get(name, True) and not column.same_scores(former.columns.get(name)):
            return f"metric {name} is new or has changed"
    if task.run.rehearsal:  # leaves out benchmarks whose rows are not on this machine
        return None
    valid = benchmarks.kept(task.columns, former, task.most_rows)
    for name, column in task.columns.items():
        if isinstance(column.metric, BenchmarkMetric) and name not in valid:
            return f"benchmark {name}: another limit, or a task in a file"
    return None


def complete(task: EvaluationTask, judged: ScorerModels) -> Evaluation | None:
    """Return the existing evaluation if it has all predictions and scores of a task."""
    former = _same_work(task)
    if former is None or outdated(former, task, judged):
        return None
    return former


def _same_work(task: EvaluationTask) -> Evaluation | None:
    """Existing evaluation, if it has all predictions of a task; None if they have to be generated."""
    former = read_scores(task.where)
    if not former or former.settings.identity() != task.settings.identity():
        return None
    if not former.settings.stands_for(task.settings):
        return None
    if [row["row"] for row in read_predictions(task.where)] != task.rows.positions:
        return None
    if changed(task.where, former) == "edited":
        raise UserError(
            f"{task.where / PREDICTIONS}: edited since it was scored; restore it, or move it and {SCORES} away to "
            "generate new predictions"
        )
    return former


def evaluate(folder: RunDir, request: EvaluationRequest) -> Evaluation:
    """Generate and score a prediction for each test row.

    A call continues an interrupted evaluation, and does not repeat a complete one.

    Raises:
        UserError: see `RunDir.refuse_links`, `EvaluationTask`, `score.require_models`, `benchmarks.require`,
            `_make_room` and `predict`.
        WorkFailed: the scorer model cannot be loaded, or memory does not suffice.
    """
    folder.refuse_links()
    task = EvaluationTask(folder, request)
    judged = scorer_models(task.columns, request.judge, task.run.rehearsal, report=True)
    summary = folder.summary(task.run)
    if task.run.state != "finished":
        say(f"{folder.path}: the run is {task.run.state} at step {summary.step} of {summary.max_steps}")
    task.where.mkdir(parents=True, exist_ok=True)
    with held(task.where / scores_file.LOCK, "another evaluation is running"):
        part = part_file(task.where, task.settings)
        scores_file.finish_write(task.where, part)
        former = _same_work(task)
        reason = outdated(former, task, judged) if former else None
        if former and not reason:
            say(f"{task.where / PREDICTIONS}: complete and scored as requested; generated by {former.settings.engine}")
            return former
        _require(task, judged)
        if former:
            say(f"{task.where / PREDICTIONS}: complete, with the same settings; computing new scores: {reason}")
            rows, settings = _kept(task, former)
            columns = former.columns | task.columns
            measured = benchmarks.kept(task.columns, former, task.most_rows)
        else:
            _make_room(task)
            with importing_axolotl(offline=task.run.rehearsal):
                rows, settings = predict(
                    task.settings, task.rows, task.cfg, folder.output, part, request.server, task.run.rehearsal
                )
            columns, measured = task.columns, {}
        rehearsal = task.run.rehearsal
        measured |= benchmarks.measured(
            columns, measured, settings, task.cfg, folder.output, task.most_rows, rehearsal, request.force
        )
        with Bar("scoring", 1):
            # the run's eval loss does not describe another adapter
            loss = summary.eval_loss_per_token if request.adapter is None else None
            run = ScoringInput(loss=loss, benchmarks=measured, groups=task.every.groups)
            scores, rows = score(rows, columns, judged, run)
            if former and former.version == VERSION and request.judge != "none":
                keep_scorer_scores(scores, rows, former, read_predictions(task.where))
        result = Evaluation(
            made=now(),
            rehearsal=rehearsal,
            scores=scores.scores,
            shares=scores.shares,
            version=VERSION,
            settings=settings,
            files=task.files,
            data=task.every.files,
            also_trained=evaluation_rows.trained_positions(task.rows, task.run, task.cfg),
        )
        result.notes = scores_file.notes(result, rows) + scores.notes
        # the file of an existing evaluation has predictions of more rows
        write(task.where, result, rows, None if former else part)
    return result


def _require(task: EvaluationTask, judged: ScorerModels) -> None:
    """Check scorer models and benchmark tasks before hours of generation."""
    if any(judged.values()):
        with Bar("looking for the scorer model", 1):
            require_models(judged.values())
    benchmarks.require(task.columns, task.run.rehearsal, task.request.force)


def _kept(task: EvaluationTask, former: Evaluation) -> tuple[list[Row], EvaluationSettings]:
    """Return existing predictions and their settings, to compute new scores."""
    rows = [{key: row[key] for key in Prediction.model_fields if key in row} for row in read_predictions(task.where)]
    kept = former.settings.model_dump(include={"batch_size", *scores_file.ORIGIN})
    return rows, EvaluationSettings.model_validate(task.settings.model_dump() | kept)


def _make_room(task: EvaluationTask) -> None:
    """Keep predictions that are not stale, unless they are the first of the requested ones.

    Those of another decoding move to the folder of their settings, such as after another --max-new-tokens.

    Raises:
        UserError: existing predictions have other settings, more rows or another engine.
    """
    former, wanted = read_scores(task.where), task.settings
    if former is None or former.settings.rows == 0:
        return
    if changed(task.where, former, None if task.request.adapter else task.run) == "stale":
        return
    there, identity = former.settings, wanted.identity()
    differing = [key for key, value in there.identity().items() if value != identity[key]]
    if differing == ["decoding"]:
        kept = there.folder(task.where)
        kept.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.is_file, (task.where / PREDICTIONS, task.where / SCORES)):
            file.replace(kept / file.name)
        say(f"{task.where / SCORES}: has another decoding; moved to {kept}")
    elif differing or there.rows > wanted.rows or not there.stands_for(wanted):
        with_other = f", with another {', '.join(differing)}" if differing else ""
        raise UserError(
            f"{task.where / SCORES}: has scores of {there.rows_in_words}, generated by {there.engine}{with_other}; "
            f"move it and {PREDICTIONS} away to evaluate {wanted.rows:,} rows with {wanted.engine}"
        )
