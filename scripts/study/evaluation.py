"""Evaluation of a run, or of an external adapter."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

from ..base import paths
from ..base.errors import UserError, WorkFailed, first_line
from ..base.files import read_json, sha256, tensor_shapes, write_json
from ..base.hub import importing_axolotl
from ..base.paths import find_recipe
from ..base.run_files import RunFile
from ..base.terminal import say
from ..config import datafiles, models, substitution
from ..config.compose import MIRROR, Composed, Request
from ..config.merging import Override, recipe_content
from ..config.origin import Base, header_of
from ..data.published import FORK_WEIGHTS, AdapterFormat
from ..evaluate import evaluation_rows
from ..evaluate.engines import ENGINES
from ..evaluate.evaluate import EvaluationRequest, evaluate_run, prepare, resolve
from ..evaluate.scores_file import ADAPTER, Evaluation
from ..evaluate.settings import BASE, SERVER
from ..run import backends, run
from ..run.backends import Backend, Command, Task, TaskResult
from ..run.rundir import RunDir, find_run
from ..training.run_record import FileState, Run
from .pipeline import Pipeline, evaluation_command, existing_runs

TOKENIZER = "tokenizer_config.json"
PATTERNS = (ADAPTER, "*.json", "*.jinja", "*.model", "*.txt")
"""Files of an adapter and its tokenizer."""


def evaluate_by_name(name: str, request: EvaluationRequest, backend: Backend) -> tuple[RunDir, Evaluation | RunDir]:
    """Evaluate a run, or an external adapter with a recipe's settings; see `start`.

    An external adapter gets a run folder.

    Args:
        name: name of a run, see `find_run`; or of a recipe, if the request has an adapter.
        request: settings of the evaluation.
        backend: backend that carries out the evaluation.
    """
    if request.adapter in (None, BASE) or not _is_recipe(name):
        folder = find_run(name, paths.runs())
        return folder, start(folder, request, backend)
    adapter, label = locate_adapter(str(request.adapter))
    recipe_request = request_for(name, adapter, request.force)
    composed = compose_for_adapter(recipe_request, backend)
    with adapter_run(composed, recipe_request, adapter, label) as folder:
        return folder, start(folder, replace(request, adapter=None), backend)


def _is_recipe(name: str) -> bool:
    with suppress(UserError):
        return bool(find_recipe(name))
    return False


def start(run_dir: RunDir, request: EvaluationRequest, backend: Backend) -> Evaluation | RunDir:
    """Evaluate a run here, or queue its evaluation as a job.

    Returns:
        The run folder if the evaluation is queued; otherwise the evaluation.

    Raises:
        UserError: the evaluation is already queued, or `resolve` or the backend refuses it. Nothing was started.
        WorkFailed: see `evaluate_run`.
    """
    record = run_dir.read()
    result = TaskResult(record.recipe)
    gpus = 0 if record.rehearsal else 1

    def commands_of_job() -> list[Command]:
        waits = backend.can_wait_for(backends.job_state(run_dir, "run"))
        _check_before_queueing(run_dir, record, request, waits)
        evaluation = evaluation_command(run_dir, request, result)
        if job := backends.unfinished_job(run_dir, "evaluate", evaluation.words):
            remedy = f"`recipe cancel {run_dir.quoted}` cancels all jobs of the run"
            raise UserError(f"this evaluation is already {job}", file=run_dir.path, remedy=remedy)
        return [evaluation]

    task = Task(result, commands_of_job, run_dir.config, gpus, steps=["evaluate"])
    return backend.carry_out(task, partial(evaluate_run, run_dir, request))


def _check_before_queueing(run_dir: RunDir, record: Run, request: EvaluationRequest, waits: bool) -> None:
    """Check a requested evaluation as far as possible on this machine; only its rows if it waits for the training.

    Raises:
        UserError: see `start`.
    """
    if not waits:
        plan, _ = prepare(resolve(run_dir, request))
        if plan.settings.engine != SERVER:  # perhaps only the cluster's nodes can reach the server
            ENGINES[plan.settings.engine]().require(plan.settings, on_gpu=not record.rehearsal)
    elif request.data:
        source = evaluation_rows.source_of_file(request.data, run_dir.config, Path(record.cwd))
        evaluation_rows.read_source(source, run_dir, record, run_dir.config)


def locate_adapter(adapter: str) -> tuple[Path, str]:
    """Return an adapter's folder and name; fetch the adapter if it is not local.

    Raises:
        UserError: the adapter is neither a folder nor a hub repository, or files are missing or damaged.
        WorkFailed: the hub does not answer.
    """
    folder, name = Path(adapter), str(Path(adapter).resolve())
    if not folder.is_dir():
        from httpx import HTTPError
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[*PATTERNS]))
        except (HFValidationError, RepositoryNotFoundError):
            raise UserError(f"--adapter {adapter}: neither a folder nor a hub repository") from None
        except (HTTPError, LocalEntryNotFoundError) as error:
            raise WorkFailed(
                f"--adapter {adapter}: no local folder; fetching it from the hub failed: {first_line(error)}"
            ) from None
        name = f"{adapter}@{folder.name}"
    if not read_json(folder / RunFile.ADAPTER_CONFIG) or tensor_shapes(folder / ADAPTER) is None:
        raise UserError(
            f"{folder}: {RunFile.ADAPTER_CONFIG} or {ADAPTER} is missing or damaged; give a folder saved by PEFT"
        )
    return folder, name


def convert_to_peft(folder: Path, form: AdapterFormat) -> Path:
    """Convert a PEFT fork's adapter to PEFT's format in a subfolder; return the subfolder.

    Raises:
        UserError: the file is damaged or contains objects other than weights.
    """
    import torch
    from safetensors.torch import save_file

    try:
        fork_weights = torch.load(folder / FORK_WEIGHTS, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"{folder / FORK_WEIGHTS}: damaged, or contains more than weights: {first_line(error)}"
        ) from None
    weights = {}
    for name, tensor in fork_weights.items():
        peft_name = name
        for part, replacement in form.names.items():
            peft_name = peft_name.replace(part, replacement)
        is_vector = "magnitude" in peft_name  # in PEFT
        weights[peft_name] = (tensor.flatten() if is_vector else tensor).contiguous()
    converted = folder / "peft"
    converted.mkdir(exist_ok=True)
    save_file(weights, converted / ADAPTER)
    write_json(converted / RunFile.ADAPTER_CONFIG, read_json(folder / RunFile.ADAPTER_CONFIG) | form.config)
    return converted


def request_for(name: str, adapter: Path, force: Sequence[str]) -> Request:
    """Return a request that composes a recipe with an adapter's base model.

    The base model is the recipe's model, an ungated copy of it, or a rehearsal's small model.

    Raises:
        UserError: the recipe trains on another recipe's merged model, and the adapter names something else as its base.
    """
    trained_on = str(read_json(adapter / RunFile.ADAPTER_CONFIG).get("base_model_name_or_path"))
    base_model = recipe_content(name).get("base_model")
    request = Request(name, rehearse=Path(trained_on).name == substitution.folder().name, force=[*force])
    if base := header_of(find_recipe(name)[1]).base:
        run = Path(trained_on).parent.parent
        record = read_json(run / RunFile.RECORD)
        if record.get("recipe") != base or not Base.of_run(base, run).adapter:
            raise UserError(
                f"{trained_on}: not a merged model of {base}, on which {name} trains",
                file=adapter / RunFile.ADAPTER_CONFIG,
                key="base_model_name_or_path",
                remedy=f"if the adapter was trained on one, name its folder; {Base(base).remedy}",
            )
        return replace(request, rehearse=bool(record.get("rehearsal")), base=run)
    if models.is_copy(trained_on, base_model):
        if trained_on != base_model:
            request.profiles = [MIRROR]
    elif not request.rehearse:
        say(f"{adapter}: trained on {trained_on}, but evaluated with {base_model}, the base model of {name}")
    return request


def compose_for_adapter(request: Request, backend: Backend) -> Composed:
    """Return a recipe's config for evaluating an adapter, without lora_model_dir.

    Raises:
        UserError: the config has errors, or this machine lacks the required GPU.
    """
    request = replace(request, overrides=[*request.overrides, Override("lora_model_dir", None)])
    pipeline = Pipeline(TaskResult(request.name), request, EvaluationRequest(), backend)
    if not pipeline.check_config():
        raise UserError(str(pipeline.result.problem))
    return pipeline.composed


@contextmanager
def adapter_run(composed: Composed, request: Request, adapter: Path, name: str) -> Iterator[RunDir]:
    """Yield the run folder for an adapter and config; create it if it is missing.

    Args:
        composed: the config, see `compose_for_adapter`.
        request: request from which the config was composed.
        adapter: folder of the adapter, see `locate_adapter`.
        name: name of the adapter. run.json records it, because this run did not train the adapter.

    Raises:
        UserError: the data or the tokenizer is missing, or the `with` block raises UserError. In both cases, a folder
            that this call created is removed.
    """
    composed.data = composed.data or datafiles.record(composed.config)
    digest = hashlib.sha256(f"{composed.digest} {sha256(adapter / ADAPTER)}".encode()).hexdigest()
    if existing := existing_runs(paths.runs(), composed.recipe).get(digest):
        yield existing[0]
        return
    folder = run.create(composed, request)
    try:
        folder.output.mkdir(exist_ok=True)
        for pattern in PATTERNS:
            for file in adapter.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder.output / file.name)
        if not (folder.output / TOKENIZER).is_file():
            with importing_axolotl(offline=composed.rehearsal):
                from ..training.tokens import Tokenizer

                Tokenizer(composed.config).tokenizer.save_pretrained(folder.output)
        record = folder.read()
        record.state, record.digest, record.published_adapter = "finished", digest, name
        record.adapter = FileState.of(folder.adapter)
        folder.write(record)
        yield folder
    except UserError:
        shutil.rmtree(folder.path)
        raise
