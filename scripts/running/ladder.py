"""What authors published on the way to their scores, fetched and evaluated: `recipe reproduce --from`."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ..backends import Backend
from ..base import yamlfiles
from ..base.disks import naming
from ..base.errors import UserError, WorkFailed
from ..base.files import Row, read_json, sha256, tensor_shapes, write_atomically
from ..base.locks import held
from ..base.progress import say
from ..base.quiet import importing_axolotl
from ..checks import trust
from ..configs import standin
from ..configs.compose import Composed, Request
from ..data import fetch
from ..data.published import ADAPTER_FILES, adapter_files
from ..data.study import Study
from ..results import comparable, ladder
from ..results.ladder import Owner
from ..runs.rundir import Run, RunDir
from ..runs.tasks import Outcome
from ..scores import evaluate, judges, released
from ..scores.task import EvaluationRequest, EvaluationTask
from . import reproduce
from .pipeline import Pipeline
from .run import record_of

From = Literal["predictions", "adapter", "training"]
TOKENIZER = "tokenizer_config.json"


class AdapterDir(RunDir):
    """A folder that is evaluated as a run's is, and is no run: a published adapter beside the config of its recipe."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._json = path / "record.json"  # by run.json it would be found among the runs


def owners(of_study: Study, only: Sequence[str], down_to: From, rehearsal: bool) -> list[Owner]:
    """Those whose rungs are to be evaluated.

    Args:
        only: names of recipes, see `reproduce.chosen`.
        down_to: the last rung that is asked for.

    Raises:
        UserError: a name is wrong, or nothing that was asked for is published.
    """

    def has(one: Owner) -> bool:
        predicted = one.predictions is not None and not rehearsal
        return predicted if down_to == "predictions" else predicted or one.adapter is not None

    found = ladder.owners(of_study, reproduce.chosen(of_study, list(only)) if only else ())
    if having := [one for one in found if has(one)]:
        return having
    what = "predictions" if down_to == "predictions" else "adapters" if rehearsal else "predictions or adapters"
    there = ", ".join(one.name for one in ladder.owners(of_study) if has(one))
    hint = f"it names some of {there}" if there else "templates/README.md says how to declare what authors published"
    of_whom = ", ".join(only) or "its authors"
    raise UserError(f"--from {down_to}: {of_study.folder.name}'s study.yaml names no {what} of {of_whom}; {hint}")


def climb(
    of_study: Study,
    request: Request,
    only: Sequence[str],
    evaluation: EvaluationRequest,
    runs: Path,
    backend: Backend,
    down_to: From,
) -> dict[tuple[str, str], str]:
    """Fetch and evaluate what was published between a study's scores and our training.

    What was done before with the same inputs is not done again. A rung that cannot be had does not stop the others.

    Args:
        of_study: the study.
        request: what is laid over the recipes whose adapters are evaluated, with the study's name.
        only: the recipes; by default all that something is published of, and the baselines.
        evaluation: how an adapter is evaluated, and who judges.
        runs: the folder for the runs, and for this.
        backend: where adapters are evaluated: this machine.
        down_to: `predictions`, or `adapter` for both.

    Returns:
        Why rungs cannot be had, see `ladder.Problems`.

    Raises:
        UserError: the request is wrong; nothing was started.
    """
    chosen = owners(of_study, only, down_to, request.rehearse)
    problems: dict[tuple[str, str], str] = {}

    with held(reproduce.lock(request.name, runs), "another reproduction of it is running there"):
        for owner in chosen:
            for rung in ("predictions", "adapter")[: 1 if down_to == "predictions" else 2]:
                try:
                    if rung == "predictions":
                        _predictions(of_study, owner, request, evaluation, runs)
                    else:
                        _adapter(of_study, owner, request, evaluation, runs, backend)
                except (UserError, WorkFailed) as error:
                    problems[owner.name, rung] = str(error)
    return problems


def outline(of_study: Study, only: Sequence[str], down_to: From, rehearsal: bool) -> list[dict[str, Any]]:
    """What `climb` would fetch and do, a row for each rung.

    Raises:
        UserError: see `owners`.
    """
    rows = []
    for owner in owners(of_study, only, down_to, rehearsal):
        rungs: dict[str, list[str]] = {}
        if owner.predictions and not rehearsal:
            rungs["predictions"] = owner.predictions.files
        if owner.adapter and down_to != "predictions":
            rungs["adapter"] = adapter_files(of_study.data, owner.adapter)
        for rung, files in rungs.items():
            known = [of_study.data.files[file] for file in files]
            absent = rung == "predictions" and owner.predictions and owner.predictions.absent
            rows.append(
                {
                    "of": owner.name,
                    "rung": rung,
                    "fetch": None if absent else ", ".join(reproduce.missing(of_study.data, files)) or "nothing",
                    "MB": sum(file.bytes for file in known if file.bytes) / 1e6
                    if any(f.bytes for f in known)
                    else None,
                    "verified": None if absent else all(file.sha256 for file in known),
                    "then": absent or ("score" if rung == "predictions" else "generate with it, on a GPU, and score"),
                }
            )
    return rows


def _predictions(of_study: Study, owner: Owner, request: Request, evaluation: EvaluationRequest, runs: Path) -> None:
    """Score published predictions, where there are some; never in a rehearsal, as no model is needed for it."""
    if owner.predictions is None or owner.predictions.absent or request.rehearse:
        return
    say(f"{owner.name}: published predictions")
    fetched = _fetched(of_study, owner.predictions.files)
    judged = judges.of_columns(of_study.columns, evaluation.judge, evaluation.judge_layer)
    judges.say_left_out(of_study.columns, judged, evaluation.judge)
    recipe = owner.recipe or next(iter(of_study.published))
    folders = ladder.scored_in(of_study, runs, owner)
    released.evaluate(of_study, recipe, owner.predictions, owner.predicted_on, fetched, folders, judged)


def _fetched(of_study: Study, files: Iterable[str]) -> Mapping[str, Row]:
    """Fetch some files of the study's data, unless they are there; their rows of `fetch.fetch` by name."""
    data = of_study.data
    return {row["file"]: row for row in fetch.fetch(data, data.raw, only=data.sources_of(list(files)))}


def _adapter(
    of_study: Study,
    owner: Owner,
    request: Request,
    evaluation: EvaluationRequest,
    runs: Path,
    backend: Backend,
) -> None:
    """Generate with a published adapter, where there is one, as with a run's own, and score that.

    Raises:
        UserError, WorkFailed: there is no GPU, model or data for it, or it does not fit the model.
    """
    if owner.adapter is None or owner.recipe is None:
        return
    recipe = owner.recipe
    say(f"{recipe}: published adapter")
    files = adapter_files(of_study.data, owner.adapter)
    of_recipe = reproduce.request_for(request, recipe)
    of_recipe.overrides = [*of_recipe.overrides, "lora_model_dir=null"]  # of an initialization, which theirs follows
    pipeline = Pipeline(Outcome(recipe), of_recipe, evaluation, runs, backend)
    folder = AdapterDir(ladder.adapter_folder(of_study, runs, owner, request.rehearse))
    same = folder.config.is_file() and folder.config.read_text() == _config_in(folder, pipeline.composed)
    complete = same and _is_complete(folder, evaluation, request.rehearse)
    if complete and not reproduce.missing(of_study.data, files):
        say(f"{folder.path}: complete, made with the same adapter")
        return
    if not request.rehearse and backend.gpu() is None:
        problem = f"no NVIDIA GPU was found, and {recipe}'s base model generates on one"
        raise UserError(f"{problem}; `recipe reproduce {request.name} --from predictions` needs none")
    if not pipeline.check(with_data=False):
        raise UserError(pipeline.outcome.problem or f"{recipe}: refused")
    assert pipeline.composed
    if not request.rehearse:
        reproduce.have_data(of_study, [pipeline.composed])
        _fetched(of_study, files)
    elif absent := reproduce.missing(of_study.data, files):
        fetching = " ".join(f"--only {source}" for source in absent)
        problem = "a rehearsal fetches nothing, and the adapter is not here"
        raise UserError(f"{recipe}: {problem}; `recipe data fetch {of_study.data.key} {fetching}`")
    record = record_of(pipeline.composed, pipeline.request)
    if not request.rehearse and comparable.of_something_else(record):
        raise UserError(f"{recipe}: on another base model or other data than the recipe's, its adapter says nothing")
    _lay_out(folder, [of_study.data.raw / file for file in files], pipeline.composed, record)
    try:
        evaluate.evaluate(folder, evaluation)
    except (RuntimeError, ValueError, KeyError) as error:  # PEFT's and torch's, of other shapes than the model has
        first = str(error).strip().partition("\n")[0]
        raise WorkFailed(f"{owner.adapter}: cannot be used with {recipe}'s base model: {first}") from error


def _is_complete(folder: RunDir, evaluation: EvaluationRequest, rehearsal: bool) -> bool:
    """Whether an adapter was evaluated before as it is to be now; that needs no GPU to know."""
    with suppress(UserError):
        task = EvaluationTask(folder, evaluation)
        judged = judges.of_columns(task.columns, evaluation.judge, evaluation.judge_layer, rehearsal)
        return evaluate.complete(task, judged) is not None
    return False


def _config_in(folder: RunDir, composed: Composed | None) -> str:
    return yamlfiles.write_yaml(composed.config | {"output_dir": str(folder.output)}) if composed else ""


def _lay_out(folder: AdapterDir, files: Sequence[Path], composed: Composed, record: Run) -> None:
    """Make a folder that is evaluated as a run's is: config, record, and in output/ the adapter and a tokenizer.

    The tokenizer is the adapter's own where one is published with it, otherwise the one that a training by the recipe
    would have and leave.

    Raises:
        UserError: the adapter's files are damaged, or the tokenizer is not on this machine.
    """
    config, weights = (next(file for file in files if file.name == name) for name in ADAPTER_FILES)
    if not read_json(config) or tensor_shapes(weights) is None:
        raise UserError(f"{weights.parent}: not an adapter as PEFT saves it, or a damaged one; remove it to fetch anew")
    if composed.rehearsal:
        standin.model_folder()
    record.state = "finished"
    config_text = _config_in(folder, composed)
    if folder.config.is_file() and folder.config.read_text() != config_text:
        shutil.rmtree(folder.path)  # what was generated by another config
    folder.output.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = folder.output / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.absolute())
    if not (folder.output / TOKENIZER).is_file():
        with naming(folder.output), importing_axolotl(offline=composed.rehearsal):
            from ..checks.tokens import Tokenizer

            Tokenizer(composed.config).tokenizer.save_pretrained(folder.output)
    write_atomically(folder.config, config_text)
    record.seal = trust.seal(folder, record)
    folder.write(record)
    say(f"{folder.path}: {weights.parent}, sha256 {sha256(weights)[:12]}")
