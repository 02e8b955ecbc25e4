"""Publish a run's adapter: model card, merged model, push to the hub."""

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import hub
from ..base.errors import UserError, WorkFailed, recipe_command
from ..base.files import opened, read_bytes, sha256, tensor_shapes, write_atomically
from ..base.hub import importing_axolotl
from ..base.processes import make_once, start_child
from ..base.run_files import MADE_FROM, RunFile
from ..base.terminal import Bar, say, warn
from ..config import substitution
from ..evaluate.scores_file import ADAPTER, about_rows
from ..run import backends, launch, trust
from ..run.rundir import RunDir
from ..training.run_record import Run
from . import gguf, public_records
from .card import Card, base_model, card
from .run_result import RunResult

if TYPE_CHECKING:
    from ..training.validation import GgufTools

CARD = "README.md"
SUMS = "SHA256SUMS"
_TEMPLATE = "chat_template.jinja"
_PUSHED = [CARD, ADAPTER, RunFile.ADAPTER_CONFIG, *hub.TOKENIZER]
_PUSHED_MERGED = [CARD, "model*.safetensors*", "config.json", "generation_config.json", *hub.TOKENIZER,
                  "LICENSE*", "USE_POLICY*", "NOTICE*", "Notice*"]  # fmt: skip


def publish(
    run_dir: RunDir,
    merge: bool = False,
    tools: "GgufTools | None" = None,
    push: str | None = None,
    private: bool = False,
    force: Sequence[str] = (),
) -> list[str]:
    """Write a model card for a finished run; optionally merge, export to GGUF and push.

    Args:
        run_dir: run folder.
        merge: True to merge base model and adapter into output/merged; a push then uploads the merged model.
        tools: types of GGUF files to export the merged model to; None for no export.
        push: repository on the hub, as owner/name.
        private: True to create a private repository.
        force: names of the findings about untrusted code to accept.

    Returns:
        Files of the written cards, public records and GGUF and, after a push, the URL of the repository.

    Raises:
        UserError: the run has no adapter to publish or must not be pushed, its config names untrusted code, disk
            space is missing, or the hub refuses the token.
        WorkFailed: Axolotl cannot merge or export, or the hub cannot be reached or fails.
    """
    run_dir.refuse_links()
    run = backends.read(run_dir)
    _refuse_run(run_dir, run)
    if push is not None:
        _refuse_push(run_dir, run, push)
    result = RunResult(run_dir, run)
    _report_evaluation(result)
    models = [run_dir.output]
    if tools:
        gguf.require_space(result, tools)
    if merge or tools:
        trust.refuse_code(run_dir, run, force, str(run_dir.output.resolve()))
        models.append(_merge(result))
    for model in models:
        repository = push if model == models[-1] else None
        with Bar(f"writing {model / CARD}"):
            write_atomically(model / CARD, card(result, model != run_dir.output, repository))
        _write_template(result, model)
    records = public_records.write(Card(result, models[-1] != run_dir.output, push or "."), models[-1])
    files = [str(model / CARD) for model in models]
    files += map(str, map(models[-1].joinpath, records))
    if tools:
        files += map(str, _export(result, tools))
    if push:
        files.append(_push(models[-1], records, push, private, run.recipe))
    return files


def propose(run_dir: RunDir, model: str) -> str:
    """Open a pull request with the scores of an adapter that was not trained here.

    Its description is an Every Eval Ever record of all scores.

    Args:
        run_dir: run folder of the adapter's evaluation.
        model: the adapter's repository on the hub.

    Returns:
        URL of the pull request.

    Raises:
        UserError: the run scored another adapter or no benchmark that the hub registers, or the token is refused.
        WorkFailed: the hub cannot be reached or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    result = RunResult(run_dir, backends.read(run_dir))
    adapter = result.run.published_adapter or "an adapter that was trained here"
    if adapter.partition("@")[0] != model:
        remedy = "name the adapter of `recipe evaluate RECIPE --adapter OWNER/NAME`"
        raise UserError(f"the run scored {adapter}", key=f"--pr {model}", remedy=remedy)
    scores = Card(result, merged=False, repository=model)
    entries = public_records.hub_entries(scores)
    if not scores.evaluation or not entries:
        remedy = f"run `recipe evaluate {run_dir.quoted} --metric benchmark:gsm8k`"
        raise UserError("no score of a benchmark that the hub registers", file=run_dir.path, remedy=remedy)
    record = public_records.every_eval_ever(scores)
    say(f"pull request to {model}:\n{entries}")
    with hub.uploading(model, "--pr"):
        commit = HfApi().create_commit(
            model,
            [CommitOperationAdd(public_records.EVAL_RESULTS, entries.encode())],
            commit_message="Add scores by qlora-recipes",
            commit_description=f"```json\n{record}```",
            create_pr=True,
        )
    return str(commit.pr_url)


def _refuse_run(run_dir: RunDir, run: Run) -> None:
    """Raise UserError if the run has no adapter to publish."""
    adapter = run_dir.adapter
    if run.state != "finished":
        remedy = f"wait until it ends, or run `recipe resume {run_dir.quoted}`"
        raise UserError(f"the run is {run.state}", file=run_dir.path, remedy=remedy)
    if run.published_adapter:
        problem = f"the adapter {run.published_adapter} was not trained here"
        raise UserError(problem, file=run_dir.path, remedy="publish another run")
    if tensor_shapes(adapter) is None:
        remedy = f"restore a copy, or train again: {recipe_command('run', run.recipe)}"
        raise UserError("damaged or missing", file=adapter, remedy=remedy)


def _report_evaluation(result: RunResult) -> None:
    """Log a note on the scored rows; or a remedy, if the evaluation is missing or stale."""
    folder, about = result.folder, about_rows(result.evaluation)
    if result.evaluation is None:
        problem = result.changed or "not evaluated"
        warn(f"{folder.path}: {problem}; for scores, run `recipe evaluate {folder.quoted}` and repeat this command")
    elif about:
        say(f"{folder.path}: scored {about}")


def _merge(result: RunResult) -> Path:
    """Merge base model and adapter with Axolotl, if necessary; return the merged model's folder.

    Raises:
        WorkFailed: the merged model is not the trained one.
    """
    folder = result.folder
    merged = folder.output / RunFile.MERGED

    def merge_into(part: Path) -> None:  # not the output folder, where Axolotl would replace the training log
        words = ["merge-lora", "--lora-model-dir", folder.output.resolve(), "--output-dir", part.resolve()]
        _convert(folder, result.run, words, part / "merged" / "*.safetensors", {})
        for file in (part / "merged").iterdir():
            file.rename(part / file.name)
        (part / "merged").rmdir()
        (part / "debug.log").unlink(missing_ok=True)  # Axolotl's own log; merge.log has its output
        for file in _published(folder.output, hub.TOKENIZER):
            shutil.copy2(file, part)  # Axolotl copies the base model's tokenizer, without added tokens
        with importing_axolotl(offline=result.run.rehearsal):
            from ..evaluate import merge_check

            base = Path(result.run.cwd, result.config["base_model"])  # Axolotl's working folder
            config = result.config | ({"base_model": str(base)} if base.is_dir() else {})
            merge_check.require_equal(config, folder.output, part)

    return _write_once(merged, sha256(folder.adapter), [], merge_into)


def _write_template(result: RunResult, model: Path) -> None:
    """Write the chat template of training, because a chat server would use the base model's."""
    with importing_axolotl(offline=True):
        from ..training.tokens import trained_template

        template = trained_template(
            result.config, result.folder.output, Card(result, merged=False, repository=".").constant_fields
        )
    if template:
        write_atomically(model / _TEMPLATE, template)


def _write_once(folder: Path, source: str, names: Sequence[str], write: Callable[[Path], object]) -> Path:
    """Return the folder of a model's files; write them again unless it holds those of this source.

    Args:
        folder: the folder; its file `MADE_FROM` holds the source.
        source: the adapter's hash, and settings.
        names: files that must be in the folder.
        write: function that fills a temporary folder.
    """
    marker = folder / MADE_FROM
    if marker.is_file() and read_bytes(marker) == source.encode() and all((folder / name).is_file() for name in names):
        say(f"{folder}: already made")
        return folder

    def write_and_mark(part: Path) -> None:
        part.mkdir()
        with Bar(f"making {folder}"):
            write(part)
        (part / MADE_FROM).write_text(source)

    shutil.rmtree(folder, ignore_errors=True)  # made from another adapter
    return make_once(folder, write_and_mark)


def _export(result: RunResult, tools: "GgufTools") -> list[Path]:
    """Export the merged model to f16 and quantized GGUF files, with their hashes, and write a Modelfile.

    Returns:
        The files, the first type first, and the Modelfile.
    """
    folder, types = result.folder, ",".join(tools.types)
    name = re.sub(r"(?a)[^\w.-]+", "-", Path(result.run.recipe).name).strip("-")  # braces and spaces mean something
    pattern = f"{name}-{{ftype}}.gguf"
    names = [pattern.format(ftype=name) for name in (*tools.types, "f16")]

    def export_into(part: Path) -> None:
        words = [
            "export",
            "--model-dir",
            (folder.output / RunFile.MERGED).resolve(),
            "--llama-cpp-dir",
            tools.llama_cpp,
        ]
        words += ["--outfile", part.resolve() / pattern, "--outtype", "f16", "--quantize", types]
        # the converter's package, which Python does not look for beside it: see start_child
        _convert(folder, result.run, words, part / names[0], {"PYTHONPATH": str(tools.llama_cpp)})
        write_atomically(part / SUMS, "".join(f"{sha256(part / name)}  {name}\n" for name in names))

    gguf_folder = _write_once(folder.output / RunFile.GGUF, f"{sha256(folder.adapter)} {types}", names, export_into)
    files = [gguf_folder / name for name in names]
    for file in files:
        say(f"{file}: {file.stat().st_size / 1e9:.2f} GB; its hash is in {SUMS}")
    return [*files, *gguf.write_modelfile(result, files[0], files[-1])]


def _convert(run_dir: RunDir, record: Run, words: Sequence[object], output: Path, environment: dict[str, str]) -> None:
    """Convert a trained model with a command of Axolotl; a rehearsal has no GPU and no network.

    Args:
        run_dir: the run folder; it gets the log, such as merge.log for merge-lora.
        record: content of run.json.
        words: the command and its options.
        output: pattern of the files that the command must write.
        environment: further environment variables.

    Raises:
        WorkFailed: Axolotl failed; the message has the end of its output.
    """
    substitution.restore(run_dir.config)
    command, *options = words
    name = str(command).partition("-")[0]
    axolotl = [launch.AXOLOTL, command, run_dir.config_file.resolve(), *options]
    log = run_dir.path / RunFile.COMMAND_LOG.format(name)
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", **environment}
    if record.rehearsal:
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    cwd = record.cwd if Path(record.cwd).is_dir() else None
    with opened(log, "wb") as stream:
        child = start_child([*map(str, axolotl)], cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        code = child.wait()
    if code or not any(output.parent.glob(output.name)):
        tail = log.read_text(errors="replace").splitlines()[-15:]
        raise WorkFailed("\n".join([*tail, f"{run_dir.path}: Axolotl could not {name}; complete log: {log}"]))


def _refuse_push(run_dir: RunDir, run: Run, repository: str) -> None:
    """Raise UserError if the repository's name is invalid or others cannot use the model."""
    if not hub.NAME.fullmatch(repository):
        raise UserError("expected OWNER/NAME, of letters, digits, -, _ and .", key=f"--push {repository}")
    if run.rehearsal:
        problem = f"{run_dir.path} is a rehearsal with a small model"
        raise UserError(problem, key="--push", remedy="push a real run")
    base = base_model(run_dir, run)
    if base.is_local:
        problem = f"the base model {base.name} is a local folder, which others cannot load"
        raise UserError(problem, key="--push", remedy="train with base_model set to its name on the hub")


def _published(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a model's folder that match a pattern.

    Raises:
        UserError: one is a link, which could lead to a secret.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and any(map(file.match, patterns))]
    for file in files:
        if file.is_symlink():
            raise UserError("is a link; its target would be published", file=file, remedy="put a copy there")
    return files


def _push(model: Path, records: Sequence[str], repository: str, private: bool, recipe: str) -> str:
    """Upload a model's folder with its public records; return the repository's URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    patterns = _PUSHED if (model / ADAPTER).is_file() else _PUSHED_MERGED
    names = [*(file.name for file in _published(model, patterns)), *records]
    say(f"upload: {', '.join(names)}")
    with hub.uploading(repository, "--push"):
        # None leaves the decision to an organization's default; False would not
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            problem = f"{repository} exists and is public"
            raise UserError(problem, key="--private", remedy="make it private on the hub first")
        patterns = list(map(glob.escape, names))
        message = f"Model of {recipe}"
        api.upload_folder(repo_id=repository, folder_path=model, allow_patterns=patterns, commit_message=message)
    return str(url)
