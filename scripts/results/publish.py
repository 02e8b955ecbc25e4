"""A run's adapter made ready for others: its model card, the merged model, and the hub. `recipe publish`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from .. import backends
from ..base import yamlfiles
from ..base.errors import UserError, WorkFailed
from ..base.files import opened, sha256, tensor_shapes, write_atomically
from ..base.machine import held, start_child, stop_requests
from ..base.progress import Bar, say
from ..checks import trust
from ..runs.records import Run
from ..runs.rundir import RunDir
from ..scores.evaluations import ADAPTER, changed, current, read_scores
from .card import base_model, card
from .run_rows import RunResult

CARD = "README.md"
MERGED_FROM = "adapter.sha256"  # hash of the adapter that is in a merged model
_TOKENIZER = ["tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]
_PUSHED = [CARD, ADAPTER, "adapter_config.json", *_TOKENIZER]
_PUSHED_MERGED = [CARD, "model*.safetensors*", "config.json", "generation_config.json", *_TOKENIZER,
                  "LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*"]  # fmt: skip


def publish(
    folder: RunDir, merge: bool = False, push: str | None = None, private: bool = False, force: Sequence[str] = ()
) -> list[str]:
    """Write a model card beside a finished run's adapter; merge it and push it to the hub if asked to.

    Args:
        folder: the run.
        merge: make one model of base model and adapter, in output/merged; a push then uploads that one.
        push: the repository on the hub, as owner/name.
        private: the repository is to be private.
        force: findings about code in the run's config that are overridden, for a merge.

    Returns:
        The cards written, and the repository's address.

    Raises:
        UserError: the run has nothing to publish or nothing that may be pushed, its config names others' code, or the
            hub refuses the token.
        WorkFailed: Axolotl cannot merge, or the hub cannot be reached or fails.
    """
    run = backends.read(folder)
    adapter = folder.output / ADAPTER
    if run.state != "finished":
        first = "wait for its end" if run.state in ("created", "running") else f"`recipe resume {folder.path}` first"
        raise UserError(f"{folder.path}: the run is {run.state}; {first}")
    if run.published_adapter:
        raise UserError(f"{folder.path}: its adapter {run.published_adapter} was not trained here; publish a run's own")
    if tensor_shapes(adapter) is None:
        raise UserError(f"{adapter}: damaged, or not there; put a copy there, or `recipe run {run.recipe}` trains one")
    if push is not None:
        _check_push(folder, run, push)
    elif private:
        raise UserError("--private: works only with --push")
    evaluation = current(folder.path, run)
    if not evaluation or evaluation.settings.adapter_sha256 != sha256(adapter):
        problem = changed(folder.path, read_scores(folder.path), run) or ("stale" if evaluation else "not evaluated")
        say(f"{folder.path}: {problem}; `recipe evaluate {folder.path}` and this command again add scores")
        evaluation = None
    models = [folder.output, *([_merge(folder, run, force)] if merge else [])]
    for model in models:
        repository = push if model == models[-1] else None
        write_atomically(model / CARD, card(RunResult(folder, run), evaluation, model != folder.output, repository))
    cards = [str(model / CARD) for model in models]
    return cards if push is None else [*cards, _push(models[-1], push, private, run.recipe)]


def _merge(folder: RunDir, run: Run, force: Sequence[str]) -> Path:
    """The folder of base model and adapter as one model; made by Axolotl unless it is of the adapter that is there."""
    merged = folder.output / "merged"
    log = folder.path / "merge.log"
    digest, merged_from = sha256(folder.output / ADAPTER), merged / MERGED_FROM
    if merged_from.is_file() and merged_from.read_text() == digest and any(merged.glob("*.safetensors")):
        say(f"{merged}: merged already")
        return merged
    trust.refuse_code(folder, run, yamlfiles.read_yaml(folder.config), force)
    trust.restore_stand_in(folder, run)
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1"}
    if run.rehearsal:
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (
        stop_requests(signal.SIGHUP) as stops,
        _scratch(folder) as scratch,
        opened(log, "wb") as stream,
        Bar(f"merging into {merged}"),
    ):
        code = _run(
            stops,
            [Path(sys.executable).with_name("axolotl"), "merge-lora", folder.config.resolve(),
             "--lora-model-dir", folder.output.resolve(), "--output-dir", scratch.resolve()],
            cwd=run.cwd if Path(run.cwd).is_dir() else None, env=environment, stdout=stream,
        )  # fmt: skip
        if stops:
            raise WorkFailed(f"{folder.path}: interrupted, and not merged; the same command begins anew")
        new = scratch / "merged"
        if code or not any(new.glob("*.safetensors")):
            tail = log.read_text(errors="replace").splitlines()[-15:]
            raise WorkFailed("\n".join([*tail, f"{folder.path}: Axolotl could not merge; the whole log is {log}"]))
        require_applied(lambda: _base_folder(folder, run), folder.output, new)
        for file in (file for pattern in _TOKENIZER for file in folder.output.glob(pattern)):
            shutil.copy2(file, new)  # Axolotl copies the base model's, which lacks what the config adds to it
        (new / MERGED_FROM).write_text(digest)
        if merged.exists():
            merged.rename(scratch / "former")  # deleting it takes seconds, in which this process may be killed
        new.rename(merged)
    return merged


def _base_folder(folder: RunDir, run: Run) -> Path:
    """The folder with the base model that was merged, in the hub's cache unless it is local."""
    from huggingface_hub import snapshot_download

    cfg = yamlfiles.read_yaml(folder.config)
    local = Path(run.cwd, str(cfg["base_model"]))
    if local.is_dir():
        return local
    return Path(snapshot_download(cfg["base_model"], revision=cfg.get("revision_of_model"), local_files_only=True))


@contextmanager
def _scratch(folder: RunDir) -> Iterator[Path]:
    """A folder of its own to merge in: half a model must not look like one, and Axolotl would replace the training's
    log. It is removed at the end, and so is what a merge left that was killed."""
    scratch = folder.path / ".merge"
    with held(folder.path / ".merge.lock", "another process is merging it; wait for that"):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _run(stops: list[int], command: Sequence[str | Path], **options: Any) -> int:
    """The exit code of a process, which is killed as soon as this one is asked to stop."""
    child = start_child([*map(str, command)], stderr=subprocess.STDOUT, **options)
    while child.poll() is None and not stops:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # and what it has started
    return child.wait()


def _check_push(folder: RunDir, run: Run, repository: str) -> None:
    """Refuse to push what others could not use, or to an invalid repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {error}") from None
    if "/" not in repository:
        raise UserError(f"--push {repository}: name the owner too, as in owner/{repository}")
    if run.rehearsal:
        raise UserError(f"--push: {folder.path} is a rehearsal with a stand-in model; push a real run")
    base, is_local = base_model(folder, run)
    if is_local:
        raise UserError(
            f"--push: the adapter is for {base}, a folder of this machine, which others cannot load; train with the "
            "name of base_model on the hub"
        )


def _push(model: Path, repository: str, private: bool, recipe: str) -> str:
    """Upload a model's folder; the repository's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # None rather than False: an organization may want its repositories private
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(f"--private: {repository} is there already and public; make it private on the hub first")
        files = _PUSHED if (model / ADAPTER).is_file() else _PUSHED_MERGED
        api.upload_folder(
            repo_id=repository, folder_path=model, allow_patterns=files, commit_message=f"Model of {recipe}"
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, of the network, or of the token
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(
                f"--push: the hub refuses to write {repository}; `hf auth login`, or HF_TOKEN, with a token that may"
            ) from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WorkFailed(
            f"{repository}: not pushed: {reason}\n{model / CARD} is written; the same command tries the push again"
        ) from None
    return str(address)


Shards = dict[str, tuple[Path, list[int]]]  # the tensors of a folder by name: their file and shape
_LAYERS = 16  # are compared; names are of all
_SURE = 6  # standard deviations


def require_applied(base: Callable[[], Path], adapter: Path, merged: Path) -> None:
    """Refuse a merged model without the change that its adapter makes.

    Axolotl rounds a base of QLoRA to NF4 as it merges, so merged weights differ from the base's in any case. Their
    difference is therefore compared along the adapter's own change, to which that rounding has no relation.

    Args:
        base: finds the folder of the base model.
        adapter: the folder of the adapter, of LoRA's kind; others are not compared.
        merged: the folder of both.

    Raises:
        WorkFailed: a layer of the adapter is not in the model, or the change is not there.
    """
    import torch
    from safetensors import safe_open

    def read(shards: Shards, name: str) -> torch.Tensor:
        with safe_open(shards[name][0], "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor.float()

    suffix = ".lora_A.weight"
    changes, after = _shards(adapter), _shards(merged)
    layers = sorted(name.removesuffix(suffix) for name in changes if name.endswith(suffix))
    weights = {layer: f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}
    missing = [weight for weight in weights.values() if weight not in after and "experts" not in weight]
    if missing and len(missing) < len(weights):  # all are where a checkpoint calls its layers otherwise than the model
        raise WorkFailed(f"{merged}: {missing[0]} is a layer of the adapter and not of the model; it was not merged")
    before = _shards(base()) if layers else {}
    along = variance = 0.0
    for layer, weight in islice(((layer, weight) for layer, weight in weights.items() if weight in before), _LAYERS):
        a, b = read(changes, f"{layer}{suffix}"), read(changes, f"{layer}.lora_B.weight")
        shapes = before[weight][1], after.get(weight, (None, []))[1]
        if shapes != ([len(b), a.shape[-1]],) * 2:  # packed in the base, transposed, or of a convolution
            continue
        delta = b @ a
        change = read(after, weight) - read(before, weight)
        along += (change * delta).sum().item()
        variance += (change.square().mean() * delta.square().sum()).item()
    if not variance:
        say(f"{merged}: not compared with its base, whose weights are in another form")
    elif along <= _SURE * variance**0.5:
        raise WorkFailed(f"{merged}: its weights lack the adapter's change; evaluate the adapter itself instead")


def _shards(folder: Path) -> Shards:
    files = [folder / ADAPTER] if (folder / ADAPTER).is_file() else folder.glob("*.safetensors")
    return {name: (file, shape) for file in files for name, shape in (tensor_shapes(file) or {}).items()}
