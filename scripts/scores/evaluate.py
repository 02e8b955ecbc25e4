"""Predictions of a run's model on test rows, and their scores: `recipe evaluate`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..base import yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import Row, sha256, tensor_shapes, write_atomically, write_rows
from ..base.locks import held
from ..base.machine import now
from ..base.progress import Bar, say
from ..base.quiet import importing_axolotl
from ..checks import cached, strangers
from ..configs import gpus
from ..configs.precision import precision
from ..data import study
from ..data.study import Decoding
from ..runs.rundir import Run, RunDir
from ..runs.tasks import Command
from . import elsewhere, evaluation_rows, judges
from .columns import columns_of
from .evaluations import (
    ADAPTER,
    BASE_MODEL,
    DECODED,
    ELSEWHERE,
    PREDICTIONS,
    SCORES,
    Evaluation,
    EvaluationSettings,
    read_predictions,
    read_scores,
)
from .predict import predict
from .score import VERSION, code_sha256, score

BASE = "none"  # --adapter none: the base model without an adapter
REHEARSED = 12  # rows, which show that the path works


@dataclass
class EvaluationRequest:
    """What to evaluate, and how.

    Attributes:
        data: a JSONL file; by default see `evaluation_rows.usual`.
        limit: evaluate only this many rows, from the first; by default all, or `REHEARSED` of a rehearsal's own.
        adapter: an adapter's folder, or `none` for the base model alone; by default the run's adapter.
        max_new_tokens: by default the study's.
        batch_size: the most rows generated at a time; fewer where they are long, see `batches`.
        cache: the form of the key-value cache; `auto` is static on a GPU, where transformers compiles for it.
        judge: BERTScore's model, see `judges.judge`.
        judge_layer: its layer.
        metrics: what to score with beside the study's metrics, as --metric takes it; without both see
            `registry.DEFAULT`.
        decoding: one of the study's further ways to decode, by name.
        predictions: a file of predictions that were made elsewhere, see `elsewhere.predictions`.
        validation: whether the rows are those that the run validates on.
        force: findings about code in the run's config that are overridden, see `strangers`.
        checkpoints: whether it is about every kept checkpoint, see `choice.choose`.
    """

    data: Path | None = None
    limit: int | None = None
    adapter: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    cache: Literal["auto", "static", "dynamic"] = "auto"
    judge: str | None = None
    judge_layer: int | None = None
    metrics: Sequence[str] = ()
    decoding: str | None = None
    predictions: Path | None = None
    validation: bool = False
    checkpoints: bool = False
    force: Sequence[str] = ()

    def options(self) -> list[str]:
        """The request as options of `recipe evaluate`."""
        options = {
            "--data": self.data,
            "--limit": self.limit,
            "--adapter": self.adapter,
            "--max-new-tokens": self.max_new_tokens,
            "--batch-size": self.batch_size,
            "--cache": self.cache,
            "--bertscore": self.judge,
            "--bertscore-layer": self.judge_layer,
            "--decoding": self.decoding,
        }
        words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
        words += ["--checkpoints"] if self.checkpoints else []
        words += [word for name in self.force for word in ("--force", name)]
        return words + [word for metric in self.metrics for word in ("--metric", metric)]


class EvaluationTask:
    """A checked request.

    Attributes:
        run: the run.
        cfg: its config.
        rows: the rows, as many as are evaluated.
        settings: what their predictions depend on.
        columns: what they are scored with.
        where: the folder for predictions and scores.

    Raises:
        UserError: a metric, the adapter or the data is missing, or there is no answer to compare a prediction with.
    """

    def __init__(self, folder: RunDir, request: EvaluationRequest):
        self.run = folder.read()
        self.cfg = yamlfiles.read_yaml(folder.config)
        strangers.refuse_unseen(folder, self.run, self.cfg, request.force)
        cached.restore(folder, self.run)
        self.columns = columns_of(self.run.origin, request.metrics)
        adapter = request.adapter
        weights = None if adapter == BASE else folder.output if adapter is None else Path(adapter)
        if weights and not (weights / ADAPTER).is_file():
            raise UserError(
                f"{weights}: no adapter ({ADAPTER}) there{'' if adapter else _unfinished(folder, self.run)}"
            )
        if weights and tensor_shapes(weights / ADAPTER) is None:
            raise UserError(f"{weights / ADAPTER}: damaged; --adapter takes the folder of a checkpoint instead")
        if not (folder.output / "tokenizer_config.json").is_file() or "base_model" not in self.cfg:
            raise UserError(f"{folder.path}: no tokenizer and model there{_unfinished(folder, self.run)}")
        of_study = study.of(self.run.origin)
        usual = evaluation_rows.usual(self.run, self.cfg)
        source = evaluation_rows.validation(self.run, self.cfg) if request.validation else usual
        if request.data:
            source = evaluation_rows.named(request.data, self.cfg, Path(self.run.cwd))
        source = evaluation_rows.require_reference(folder, self.run, self.cfg, source)
        every = evaluation_rows.read(source, folder, self.run, self.cfg)
        limit = request.limit or (REHEARSED if self.run.rehearsal and request.data is None else None)
        self.rows = replace(every, rows=every.rows[:limit], keys=every.keys[:limit])
        evaluation_rows.require_answers(self.rows, self.cfg)
        decoding = _decoding(of_study, request.decoding)
        local = Path(self.run.cwd, str(self.cfg["base_model"]))
        caching: Literal["static", "dynamic"] = "static" if gpus.here() and not self.run.rehearsal else "dynamic"
        # what bf16: auto became in the training; runs from before their GPUs were recorded had one
        on_gpu = not self.run.rehearsal and bool(self.run.provenance.get("gpus", True))
        self.settings = EvaluationSettings(
            base_model=str(local) if local.is_dir() else self.cfg["base_model"],
            adapter=str(weights.resolve()) if weights else BASE,
            adapter_sha256=sha256(weights / ADAPTER) if weights else None,
            data=source.data,
            data_sha256=every.sha256,
            test_set=evaluation_rows.test_set(source.file, every.sha256) if source.file else None,
            rows=len(self.rows.rows),
            limit=limit if len(self.rows.rows) < len(every.rows) else None,
            decoding=decoding.model_copy(update={"max_new_tokens": request.max_new_tokens or decoding.max_new_tokens}),
            batch_size=request.batch_size,
            cache=caching if request.cache == "auto" else request.cache,
            quantized=bool(self.cfg.get("load_in_4bit")),
            dtype=precision(self.cfg, on_gpu).weights,
            engine=ELSEWHERE if request.predictions else "transformers",
            predictions_sha256=_digest(request.predictions),
        )
        labels = []
        if adapter is not None:
            digest = self.settings.adapter_sha256
            labels.append(f"{Path(self.settings.adapter).name}-{digest[:7]}" if digest else BASE_MODEL)
        if request.decoding:
            labels.append(f"{DECODED}{request.decoding}")
        if usual and source != usual and (request.validation or not _is_of(usual.file, every.sha256)):
            labels.append(_data_label(self.settings))
        self.where = folder.path / "evaluations" / "-".join(labels) if labels else folder.path


def _decoding(of_study: study.Study | None, name: str | None) -> Decoding:
    """The study's decoding, or the further one of a name.

    Raises:
        UserError: the study declares none of that name.
    """
    if name is None:
        return of_study.decoding if of_study else study.OF_NO_STUDY
    there = of_study.decodings if of_study else {}
    if name not in there:
        declared = f"its study declares {', '.join(there)}" if there else "decodings in study.yaml declares some"
        raise UserError(f"--decoding {name}: no decoding of that name{did_you_mean(name, there)}; {declared}")
    return there[name]


def _unfinished(folder: RunDir, run: Run) -> str:
    """The state of a run that left nothing to evaluate, and what to do about it."""
    if run.state in ("failed", "interrupted"):
        return f": the run is {run.state}; `recipe resume {folder.path}` continues it"
    return f": the run is {run.state}{'' if run.state == 'finished' else '; evaluate it once it is finished'}"


def complete(task: EvaluationTask, judged: judges.Judges) -> Evaluation | None:
    """The evaluation that a task asks for, if it is there: of the same rows, by the same model and code."""
    former = _same_work(task)
    scored = former.columns if former else {}
    current = (
        former
        and former.version == VERSION
        and judges.same(judged, task.columns, former.scores)
        and all(column.same_scores(scored.get(name)) for name, column in task.columns.items() if name not in judged)
        and former.settings.limit == task.settings.limit
        and former.settings.test_set == task.settings.test_set
    )
    return former if current else None


def _same_work(task: EvaluationTask) -> Evaluation | None:
    former = read_scores(task.where)
    same = former and former.settings.same_work() == task.settings.same_work()
    if former and task.settings.predictions_sha256:
        same = same and former.settings.predictions_sha256 == task.settings.predictions_sha256
    return former if same and len(read_predictions(task.where)) == task.settings.rows else None


def evaluate(folder: RunDir, request: EvaluationRequest) -> Evaluation:
    """Generate a prediction for each test row and score them all.

    predictions.jsonl and scores.json go to the run's folder; those of the base model, of another adapter, decoding or
    rows than the usual, to a folder below evaluations/. An interrupted evaluation continues where it
    stopped, a complete one is not repeated.

    Raises:
        UserError: see `EvaluationTask`, and `judges.require`.
        WorkFailed: BERTScore's model cannot be loaded, or memory does not suffice.
    """
    task = EvaluationTask(folder, request)
    judged = judges.of_columns(task.columns, request.judge, request.judge_layer, task.run.rehearsal)
    judges.say_left_out(task.columns, judged, request.judge)
    summary = folder.summary(task.run)
    if task.run.state != "finished":
        say(f"{folder.path}: the run is {task.run.state} at step {summary.step} of {summary.max_steps}")
    task.where.mkdir(parents=True, exist_ok=True)
    with held(task.where / ".evaluation.lock", "another evaluation is running"):
        predictions = task.where / PREDICTIONS
        settings = task.settings
        part = task.where / "predictions.part.jsonl"
        if former := complete(task, judged):
            how = "made and scored with the same settings"
            if former.settings.made_elsewhere and not request.predictions:
                how = f"made elsewhere; to generate here, move it and {SCORES} away"
            say(f"{predictions}: complete, {how}")
            return former
        if any(judged.values()):
            with Bar("looking for BERTScore's model", 1):
                judges.require(judged.values())
        old: Iterable[str] = ()
        if former := _same_work(task):
            say(f"{predictions}: complete, made with the same settings; scoring it anew")
            rows, old = read_predictions(task.where), former.columns
            kept = {"batch_size", "cache", "engine", "predictions_sha256"}
            settings = settings.model_copy(update=former.settings.model_dump(include=kept))
        else:
            _make_way(task)
            rows = _predicted(folder, task, request.predictions, part)
        with Bar("scoring", 1):
            own = request.adapter is None  # the eval loss is not that of another adapter
            scores, rows = score(rows, task.columns, judged, old, summary.eval_loss_per_token if own else None)
        if settings.made_elsewhere:
            scores["notes"] = [elsewhere.NOTE, *scores.get("notes", [])]
        write_rows(predictions, rows)
        result = Evaluation(
            made=now(),
            rehearsal=task.run.rehearsal,
            scores=scores,
            version=VERSION,
            code_sha256=code_sha256(),
            settings=settings,
        )
        write_atomically(task.where / SCORES, result.model_dump_json(indent=1) + "\n")
        part.unlink(missing_ok=True)
    return result


def _predicted(folder: RunDir, task: EvaluationTask, file: Path | None, part: Path) -> list[Row]:
    """The test rows with their predictions: generated, or out of a file."""
    if file:
        return elsewhere.predictions(file, _prompts(folder, task))
    with importing_axolotl(offline=task.run.rehearsal):
        return predict(task.rows, task.settings, task.cfg, folder.output, part, on_cpu=task.run.rehearsal)


def _prompts(folder: RunDir, task: EvaluationTask) -> list[Row]:
    return elsewhere.prompts(task.rows, task.settings, task.cfg, folder.output, offline=task.run.rehearsal)


def command(folder: RunDir, request: EvaluationRequest, runs: Path) -> Command:
    """The command that evaluates a run as requested."""
    return Command("evaluate", folder, ["evaluate", str(folder.path), *request.options(), "--runs", str(runs)])


def _make_way(task: EvaluationTask) -> None:
    """Move an evaluation of the same adapter on other rows aside, as they may have been the usual ones; refuse to lose
    rows of the same data, or predictions of this project's own to some that were made elsewhere."""
    former = read_scores(task.where)
    if former is None or former.settings.adapter_sha256 != task.settings.adapter_sha256:
        return
    if former.settings.data_sha256 != task.settings.data_sha256:
        aside = task.where / "evaluations" / _data_label(former.settings)
        aside.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.is_file, (task.where / PREDICTIONS, task.where / SCORES)):
            file.replace(aside / file.name)
        say(f"{task.where / SCORES}: of other rows; it is now in {aside}")
    elif former.settings.rows > task.settings.rows:
        raise UserError(
            f"{task.where / SCORES}: of {former.settings.rows} rows, more than the {task.settings.rows} asked for; "
            f"move it and {PREDICTIONS} away to evaluate fewer"
        )
    elif task.settings.made_elsewhere and not former.settings.made_elsewhere:
        raise UserError(
            f"{task.where / SCORES}: of predictions that were generated here; `recipe results --compare` compares the "
            f"file with them, or move it and {PREDICTIONS} away"
        )


def export_prompts(folder: RunDir, request: EvaluationRequest, file: Path) -> int:
    """Write the rows of `elsewhere.prompts`, to make predictions elsewhere; returns how many there are.

    `recipe evaluate` takes the file with --predictions once each row has the field `prediction`.

    Raises:
        UserError: see `EvaluationTask`.
    """
    rows = _prompts(folder, EvaluationTask(folder, replace(request, adapter=BASE)))
    write_rows(file, rows)
    return len(rows)


def _data_label(settings: EvaluationSettings) -> str:
    """The name, of a folder below evaluations/, for rows other than the usual ones."""
    return f"{evaluation_rows.slug(settings.data)}-{settings.data_sha256[:7]}"


def _digest(file: Path | None) -> str | None:
    if file and not file.is_file():
        raise UserError(f"--predictions {file}: no such file")
    return sha256(file) if file else None


def _is_of(file: Path | None, digest: str) -> bool:
    return file is not None and file.is_file() and sha256(file) == digest
