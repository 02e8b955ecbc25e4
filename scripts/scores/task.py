"""What to evaluate, and the checked task that it makes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.files import sha256, tensor_shapes
from ..checks import trust
from ..configs.numerics import precision, quantized
from ..data import study
from ..data.study import Decoding
from ..metrics.registry import scorer_named
from ..runs.records import Run
from ..runs.rundir import RunDir
from . import evaluation_rows, evaluations
from .evaluations import ADAPTER, BASE_MODEL, DECODED, REFERENCE, SERVER, VLLM, EvaluationSettings
from .score import columns_of

BASE = "none"  # --adapter none: the base model without an adapter
REHEARSED = 12  # rows, which show that the path works
# Keys of a config that change a model, or where its answers end, without a field of their own in the settings.
BUILT_WITH = ("overrides_of_model_config", "eot_tokens")


@dataclass
class EvaluationRequest:
    """What to evaluate, and how.

    Attributes:
        data: a JSONL file; by default see `evaluation_rows.usual`.
        limit: evaluate only this many rows, from the first; by default all, or `REHEARSED` of a rehearsal's own.
        adapter: an adapter's folder, or `none` for the base model alone; by default the run's adapter.
        max_new_tokens: by default the study's.
        batch_size: the most rows generated at a time; by default up to 64, as memory allows.
        metrics: what to score with beside the study's metrics, as --metric takes it; without both see
            `registry.DEFAULT`.
        decoding: one of the study's further ways to decode, by name.
        validation: whether the rows are those that the run validates on.
        engine: what generates: transformers, vllm, or the address of a server with OpenAI's completions.
        model: the server's name for the run's model.
        force: findings about code in the run's config that are overridden, see `trust`.
        checkpoints: whether it is about every kept checkpoint, see `checkpoint_selection.select`.
    """

    data: Path | None = None
    limit: int | None = None
    adapter: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    metrics: Sequence[str] = ()
    decoding: str | None = None
    validation: bool = False
    checkpoints: bool = False
    engine: str = REFERENCE
    model: str | None = None
    force: Sequence[str] = ()

    @property
    def server(self) -> str | None:
        """Address of the server that generates, where one does."""
        return None if self.engine in (REFERENCE, VLLM) else self.engine

    @property
    def judge(self) -> str | None:
        """BERTScore's model, see `score.scorer_model`."""
        return scorer_named(self.metrics)

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
        words += ["--checkpoints"] if self.checkpoints else []
        words += [word for name in self.force for word in ("--force", name)]
        return words + [word for metric in self.metrics for word in ("--metric", metric)]


class EvaluationTask:
    """A checked request.

    Attributes:
        request: what was asked for.
        run: the run.
        cfg: its config.
        rows: the rows, as many as are evaluated: none where no metric is of predictions.
        settings: what their predictions depend on.
        columns: what they are scored with.
        where: the folder for predictions and scores.

    Raises:
        UserError: a metric, the adapter or the data is missing, or there is no answer to compare a prediction with.
    """

    def __init__(self, folder: RunDir, request: EvaluationRequest):
        self.request = request
        self.run = folder.read()
        self.cfg = yamlfiles.read_yaml(folder.config)
        trust.refuse_code(folder, self.run, self.cfg, request.force)
        trust.restore_stand_in(folder, self.run)
        self.columns = columns_of(self.run.origin, request.metrics)
        adapter = request.adapter
        weights = None if adapter == BASE else folder.output if adapter is None else Path(adapter)
        if weights and tensor_shapes(weights / ADAPTER) is None:
            unfinished = "" if adapter else _unfinished(folder, self.run)
            remedy = "--adapter takes the folder of a checkpoint instead"
            raise UserError(f"{weights / ADAPTER}: damaged, or not there{unfinished}; {remedy}")
        if not (folder.output / "tokenizer_config.json").is_file() or "base_model" not in self.cfg:
            raise UserError(f"{folder.path}: no tokenizer and model there{_unfinished(folder, self.run)}")
        of_study = study.of(self.run.origin)
        usual = evaluation_rows.usual(self.run, self.cfg)
        source = evaluation_rows.validation(self.run, self.cfg) if request.validation else usual
        if request.data:
            source = evaluation_rows.named(request.data, self.cfg, Path(self.run.cwd))
        source = evaluation_rows.require_reference(folder, self.cfg, source)
        every = evaluation_rows.read(source, folder, self.run, self.cfg)
        limit = request.limit or (REHEARSED if self.run.rehearsal and request.data is None else None)
        predicts = any(column.metric.of_rows or column.metric.of_all for column in self.columns.values())
        taken = limit if predicts else 0  # the loss is there, and a benchmark has rows of its own
        self.rows = replace(every, rows=every.rows[:taken], keys=every.keys[:taken])
        evaluation_rows.require_answers(self.rows, self.cfg)
        decoding = _decoding(of_study, request.decoding)
        local = Path(self.run.cwd, str(self.cfg["base_model"]))
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
            quantized=quantized(self.cfg),
            built_with={key: self.cfg[key] for key in BUILT_WITH if self.cfg.get(key)},
            dtype=precision(self.cfg, on_gpu).weights,
            engine=SERVER if request.server else request.engine,
            model=request.model,
        )
        beams = self.settings.decoding.num_beams
        if self.settings.engine != REFERENCE and beams > 1:
            raise UserError(f"{beams} beams are asked for, and only --engine {REFERENCE} decodes with beams")
        trained = self.run.adapter
        if adapter is None and trained and trained.sha256 != self.settings.adapter_sha256:
            problem = "not the adapter that the training ended with"
            raise UserError(f"{weights}: {problem}; put that back, or evaluate this one with --adapter {weights}")
        labels = []
        if adapter is not None:
            digest = self.settings.adapter_sha256
            labels.append(f"{Path(self.settings.adapter).name}-{digest[:7]}" if digest else BASE_MODEL)
        if request.decoding:
            labels.append(f"{DECODED}{request.decoding}")
        if (
            usual
            and source != usual
            and (request.validation or not (usual.file and usual.file.is_file() and sha256(usual.file) == every.sha256))
        ):
            labels.append(data_label(self.settings))
        self.where = folder.path / "evaluations" / "-".join(labels) if labels else folder.path
        evaluations.check_again(self.where)


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


def data_label(settings: EvaluationSettings) -> str:
    """The name, of a folder below evaluations/, for rows other than the usual ones."""
    return f"{evaluation_rows.slug(settings.data)}-{settings.data_sha256[:7]}"
