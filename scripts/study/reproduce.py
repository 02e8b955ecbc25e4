"""Reproduction of a study, from data to results table; finished steps are skipped.

With `recipe reproduce --stage`, only published predictions are scored, or published adapters evaluated.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..base import paths, tables
from ..base.errors import UserError, WorkFailed, meant
from ..base.files import Row
from ..base.hardware import GIB
from ..base.processes import LOCK_TIMEOUT, held
from ..base.terminal import Bar, say, warn
from ..config import datafiles, models
from ..config.compose import MIRROR, Composed, Request
from ..config.gpus import Gpu
from ..config.merging import Override, recipe_content
from ..data import fetch, manifest, prepare
from ..data.declaration import Data, PreparedFormat
from ..data.published import Baseline, adapter_files
from ..data.raw_rows import fetched_files
from ..data.studies import Study
from ..evaluate.evaluate import EvaluationRequest, evaluate_run
from ..evaluate.score import declared_models, scorer_models
from ..metrics.registry import SCORER
from ..plan import plan
from ..run import backends
from ..run.backends import DONE, Backend, TaskResult
from ..run.rundir import all_runs, readable
from . import published_predictions
from .evaluation import adapter_run, compose_for_adapter, convert_to_peft, locate_adapter
from .pipeline import Pipeline, link, pipelines_of, require_known, require_scorer_models, seeds_of, validate_all
from .sweep import recorded_sweeps


def cancel(study: Study) -> list[str]:
    """Ask the commands that reproduce or sweep a study to stop, or else its runs; return messages."""
    name, runs = study.folder.name, paths.runs()
    sweeps = [sweep for sweep in recorded_sweeps().values() if paths.study_name(sweep.recipe) == name]
    folders = [folder for folder, run in readable(all_runs(runs)) if paths.study_name(run.origin) == name]
    return backends.cancel(folders, [lock(name), *(sweep.lock(runs) for sweep in sweeps)])


def selected_recipes(study: Study, only: Sequence[str]) -> list[str]:
    """Recipes of a study by name or pattern; by default, all with published scores.

    Raises:
        UserError: a name or pattern matches no recipe of the study, or a name matches several.
    """
    if not only:
        return list(study.published)
    recipes = study.recipes
    selected = []
    for name in only:
        selected += paths.matching(name, recipes) or [meant(name, recipes, "recipe of the study", option="--only")]
    return list(dict.fromkeys(selected))


def reproduce(
    study: Study,
    request: Request,
    only: list[str],
    evaluation: EvaluationRequest,
    backend: Backend,
    seeds: int = 1,
) -> list[TaskResult]:
    """Train and score every recipe of a study; reuse earlier results.

    All recipes are checked and planned before the first one starts. A failed recipe does not stop the others.

    Args:
        study: the study.
        request: the study's name, and overrides for each recipe. A mirror applies only to recipes with a gated model.
        only: recipes to run; by default those with published scores.
        evaluation: settings of each evaluation. By default, BERTScore uses the same model as the published scores; in a
            rehearsal, a small model.
        backend: backend that carries out the recipes.
        seeds: number of seeds per recipe, beginning with the recipe's seed.

    Raises:
        UserError: the request is wrong, or existing data differs from the study's; nothing was started.
        WorkFailed: the data cannot be fetched, or BERTScore's model cannot be loaded.
    """
    requested = _requested_runs(study, request, only, seeds)
    if not request.rehearse and evaluation.scorer is None:
        evaluation.metrics = [*evaluation.metrics, *_declared_scorer(study)]
    with held(lock(request.name), "another reproduction of this study is running"):
        pipelines = pipelines_of(requested, evaluation, backend)
        link(pipelines)
        ready = _planned(_with_data(study, pipelines))
        require_known(request.force, pipelines)
        tasks = [pipeline.task() for pipeline in ready]
        require_scorer_models(tasks, study.columns, evaluation, request.rehearse)
        while ready:  # first those on which others are based
            first = [pipeline for pipeline in ready if pipeline.base not in ready]
            backend.submit([pipeline.task() for pipeline in first], request.name)
            ready = [pipeline for pipeline in ready if pipeline not in first]
    return [result for result, _ in requested]


def _declared_scorer(study: Study) -> list[str]:
    """Value for --metric that names the scorer model of the published scores; none if they have several."""
    scorers = {declared.model for declared in declared_models(study.columns).values()}
    # `require_scorer_models` fetches this model if it is missing; --metric cannot name more than one
    return [f"{SCORER}{scorers.pop()}"] if len(scorers) == 1 else []


def _with_data(study: Study, pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """Pipelines whose config has no errors, with their data fetched and prepared and their existing runs looked up."""
    for pipeline in pipelines:
        pipeline.look_up()
    validate_all([pipeline for pipeline in pipelines if not pipeline.is_finished()])
    runnable = [pipeline for pipeline in pipelines if pipeline.is_finished() or pipeline.check_config()]
    ensure_data(study, [pipeline.composed for pipeline in runnable])
    for pipeline in runnable:
        pipeline.look_up()  # `ensure_data` may have fetched the data that the digest needs
    return runnable


def _planned(pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """Pipelines that are finished, or whose rows have no errors and whose plan fits."""
    ready = []
    with Bar("checking and planning", len(pipelines)) as bar:
        for done, pipeline in enumerate(pipelines, start=1):
            bar.begin(f"checking and planning {pipeline.result.label}")
            if pipeline.is_finished() or (pipeline.check_rows() and pipeline.plan()):
                ready.append(pipeline)
            bar.update(done)
    return ready


def representative_runs(results: Iterable[TaskResult]) -> dict[str, Path | None]:
    """Representative run of each recipe: the finished run with the first seed."""
    first: dict[str, Path | None] = {}
    for result in results:
        first[result.recipe] = first.get(result.recipe) or result.run
    return first


def outline(
    study: Study,
    request: Request,
    only: list[str],
    evaluation: EvaluationRequest,
    backend: Backend,
    gpu: Gpu | None,
    seeds: int = 1,
) -> Row:
    """Preview `reproduce` with the same arguments, without starting anything.

    Plans are cached.

    Args:
        gpu: GPU to plan for; by default the backend's.

    Returns:
        `data`: one line for each part of the data to fetch or prepare. `models`: size in GB of each base model that is
        not on this machine. `recipes`: one row per recipe, with the state of its training, required memory and time.

    Raises:
        UserError: see `selected_recipes`.
    """
    requested = _requested_runs(study, request, only, seeds)
    pipelines = {pipeline.result.label: pipeline for pipeline in pipelines_of(requested, evaluation, backend, gpu)}
    link([*pipelines.values()])
    rows = []
    sizes: dict[str, float] = {}
    with Bar("planning", len(requested)) as bar:
        for result, _ in requested:
            bar.begin(f"planning {result.label}")
            row: Row = dict.fromkeys(_OUTLINED) | {"recipe": result.label}
            row |= {"training": "refused", "problem": result.problem}
            if result.label in pipelines:
                row |= _outlined(pipelines[result.label], sizes)
            if not request.rehearse:
                row["note"] = study.aimed_at(result.recipe).note
            rows.append(row)
            bar.update(len(rows))
    require_known(request.force, [*pipelines.values()], dry_run=True)
    data = _outlined_data(study, [pipeline.composed for pipeline in pipelines.values()])
    return {"data": data, "models": sizes, "recipes": rows}


_OUTLINED = ("recipe", "training", "steps", "needs GiB", "fits", "hours", "full_rows", "changes", "note", "problem")
"""Columns of a preview; `full_rows` is true if `hours` count every row as full."""


def _outlined(pipeline: Pipeline, sizes: dict[str, float]) -> Row:
    """Preview of one recipe with a valid config; adds the size of a missing base model in GB to `sizes`."""
    changes = [str(change) for change in pipeline.composed.differences if change.source.kind == "override"]
    row: Row = {"training": "new", "changes": "; ".join(changes) or None}
    pipeline.look_up()
    if pipeline.existing:
        row["training"] = f"{pipeline.state}: {pipeline.existing[0].path}"
    if pipeline.state == "finished":
        return row
    if not pipeline.check_config(starts=False):
        return row | {"training": "refused", "problem": pipeline.result.problem}
    if pipeline.request.rehearse:
        return row | {"steps": datafiles.training_steps(pipeline.composed.config)}
    return row | _planned_cells(pipeline, sizes)


def _planned_cells(pipeline: Pipeline, sizes: dict[str, float]) -> Row:
    """Cells of a recipe's plan; if it cannot be planned, the reason."""
    try:
        planned = plan.plan_request(pipeline.request, pipeline.gpu, suggests=False)
    except UserError as error:
        return {"problem": f"not planned: {error}"}
    row: Row = {"needs GiB": planned.memory.needed / GIB}
    if pipeline.gpu and pipeline.gpu.memory:
        row["fits"] = f"{pipeline.gpu.name}: {planned.gpus[0].verdict}"
    if not models.find(pipeline.composed.config).weights_here:
        sizes[planned.model] = 2 * max(planned.frozen, planned.trainable) / 1e9  # 16 bits per weight
    if planned.work:
        row |= {"steps": planned.work.steps, "hours": planned.work.hours, "full_rows": planned.work.full_rows}
    return row


def _outlined_data(study: Study, configs: list[Composed]) -> list[str]:
    """Preview of the data to fetch and prepare for these configs."""
    unprepared = [(name, form) for name, form in _needed_formats(study, configs) if not _has_files(form)]
    files = _needed_adapter_files(study.data, configs)
    if unprepared:
        files += study.data.raw_files
    lines = _outlined_sources(study.data, study.data.missing(files))
    return lines + [f"{form.folder}: to be prepared, in the format {name}" for name, form in unprepared]


def _outlined_sources(data: Data, names: list[str]) -> list[str]:
    """Preview of missing sources: those that the user has to copy, and the size of those to be fetched."""
    to_copy = [name for name in names if data.sources[name].is_own]
    lines = []
    if to_copy:
        lines.append(f"{data.raw}: copy {', '.join(to_copy)} there; study.yaml has no URL for it")
    if len(names) > len(to_copy):
        size = sum(data.sources[name].bytes or 0 for name in names)
        amount = f"{size / 1e6:,.0f} MB or more" if size else "of unknown size,"
        lines.append(f"{data.raw}: to be fetched, {amount} from {data.source or data.name}")
    return lines


def _has_files(form: PreparedFormat) -> bool:
    """True if the folder of a format has a file that is not hidden."""
    return any(Path(form.folder).glob("[!.]*"))


def show_outline(outlined: Row, json: bool) -> None:
    """Print the preview from `outline`."""
    rows, lines = outlined["recipes"], [f"data: {line}" for line in outlined["data"]]
    if sizes := outlined["models"]:
        lines.append(f"models: {', '.join(sizes)}: to be fetched, about {sum(sizes.values()):,.0f} GB in 16 bits")
    totals = [f"runs: {len(rows)}, each trained and evaluated unless finished"]
    if total := sum(row["hours"] or 0 for row in rows):
        totals.append(f"training takes about {tables.hours(total)} hours in all")
    lines.append("; ".join(totals))
    shown = []
    for row in rows:
        hours = tables.hours(row["hours"], row["full_rows"]) if row["hours"] else None
        shown.append(row | {"hours": hours, "full_rows": None})
    tables.show(json, outlined, [tables.Table(shown, below=["changes", "note", "problem"])], lines)


def lock(name: str) -> Path:
    """Lock file that a command holds while it reproduces a study."""
    return paths.runs() / f".reproduce-{name.replace('/', '--')}.lock"


def _requested_runs(study: Study, request: Request, only: list[str], seeds: int) -> list[tuple[TaskResult, Request]]:
    """Requested runs of a study: one per recipe and seed.

    Raises:
        UserError: see `selected_recipes` and `seeds_of`.
    """
    overridden_keys = [override.key for override in request.overrides]
    requested = []
    for recipe in selected_recipes(study, only):
        for seed in seeds_of(recipe, seeds, overridden_keys):
            run_request = request_for(request, recipe)
            if seed is not None:
                run_request.overrides = [*run_request.overrides, Override("seed", seed)]
            requested.append((TaskResult(recipe, seed=seed), run_request))
    return requested


def request_for(shared: Request, recipe: str) -> Request:
    """Request for one recipe, with a mirror only if the model is gated."""
    base_model = str(recipe_content(recipe).get("base_model"))
    gated = models.entry_of(base_model).get("gated")
    profiles = [name for name in shared.profiles if gated or paths.find_profile(name)[0] != MIRROR]
    return replace(shared, name=recipe, profiles=profiles)


def ensure_data(study: Study, configs: list[Composed]) -> None:
    """Fetch and prepare a study's missing data in the formats that these configs read.

    Raises:
        UserError: existing data differs from the study's.
    """
    for name, form in _needed_formats(study, configs):
        folder = Path(form.folder)
        # a part is left by a preparation that was killed
        if any(folder.glob(".*.json*.part")) or not _has_files(form):
            say(f"data: fetching and preparing {folder}")
            _fetch(study.data, study.data.raw_files)
            prepare.prepare(fetched_files(study.data), folder, study, name, timeout=LOCK_TIMEOUT)
        if reason := manifest.is_not_prepared(study, folder, name):
            raise UserError(
                f"{folder}: differs from the study's data: {reason}; move the folder away and run this command again, "
                "or run the recipes one by one with this data"
            )
        say(f"data: {folder} has the study's data")
    _fetch(study.data, _needed_adapter_files(study.data, configs))


def _fetch(data: Data, files: Iterable[str]) -> None:
    """Fetch the sources of a data set's missing files."""
    if sources := data.missing(files):
        fetch.fetch(data, data.raw, sources)


def _needed_adapter_files(data: Data, configs: list[Composed]) -> list[str]:
    """Files of the configs' initial adapters (lora_model_dir) that a data set provides."""
    adapters = {Path(str(composed.config.get("lora_model_dir") or "")) for composed in configs}
    return [file for file in data.files if Path(data.raw, file).parent in adapters]


def _needed_formats(study: Study, configs: list[Composed]) -> Iterator[tuple[str, PreparedFormat]]:
    """Names and formats of the prepared data that these configs read."""
    datasets = [dataset for composed in configs for dataset in datafiles.datasets(composed.config)]
    needed = {Path(dataset.path).parent for dataset in datasets}
    return ((name, form) for name, form in study.data.formats.items() if Path(form.folder) in needed)


def score_predictions(study: Study, only: Sequence[str], scorer: str | None) -> tuple[list[Row], dict[str, str]]:
    """Fetch and score a study's published predictions.

    Args:
        study: the study.
        only: names of recipes; by default all recipes and the baselines.
        scorer: BERTScore's model, see `score.scorer_model`.

    Returns:
        Rows of `scores`, and problems by the name of the recipe or baseline. Each row has two more keys:
        `of`, the name of the recipe or baseline; and `verified`, true if the files match the study's checksums.

    Raises:
        UserError: a name is wrong, or no predictions are published.
    """
    predicted = _published_predictions(study, only)
    without = [published.name for published in predicted if published.predictions is None]
    if len(without) == len(predicted):
        raise _none_published(study, "predictions")
    models = scorer_models(study.columns, scorer)
    if without:
        say(f"no predictions are published for {', '.join(without)}")
    rows, problems = [], {}
    for published in predicted:
        if published.predictions is None:
            continue
        try:
            verified = _fetch_verified(study.data, published.predictions.files)
            for row in published_predictions.scores(study, published, models):
                rows.append({"name": published.name, **row, "verified": verified})
        except (UserError, WorkFailed) as error:
            problems[published.name] = str(error)
    return rows, problems


def prediction_files(study: Study) -> list[str]:
    """Files of all published predictions of a study."""
    predictions = [published.predictions for published in _published_predictions(study, [])]
    return [file for published in predictions if published for file in published.files]


def _published_predictions(study: Study, only: Sequence[str]) -> list[Baseline]:
    """Predictions and scores of the selected recipes; by default of all recipes and baselines."""
    predicted = []
    for name in selected_recipes(study, only):
        if published := study.published.get(name):
            test_set, predictions = study.data.test_set, published.predictions
            predicted.append(Baseline(name=name, scores=published.scores, test_set=test_set, predictions=predictions))
    return predicted if only else predicted + study.baselines


def _fetch_verified(data: Data, files: Collection[str]) -> bool:
    """Fetch files of a data set; return True if they match the study's checksums."""
    fetched_files = fetch.fetch(data, data.raw, data.sources_of(files))
    return all(row["verified"] for row in fetched_files if row["file"] in files)


def evaluate_adapters(
    study: Study, request: Request, only: Sequence[str], evaluation: EvaluationRequest, backend: Backend
) -> list[TaskResult]:
    """Fetch a study's published adapters, and evaluate each with its recipe's settings.

    Args:
        study: the study.
        request: the study's name, and overrides for each recipe.
        only: names of recipes; by default all.
        evaluation: settings of the evaluations.
        backend: backend of this machine.

    Returns:
        Results of the recipes; a failure does not stop the others.

    Raises:
        UserError: a name is wrong, or no adapter is published.
    """
    adapters = {}
    for name in selected_recipes(study, only):
        published = study.published.get(name)
        if published and published.adapter:
            adapters[name] = published.adapter
    if not adapters:
        raise _none_published(study, "adapter")
    results = []
    for name, adapter in adapters.items():
        result = TaskResult(name)
        results.append(result)
        recipe_request = request_for(request, name)
        step = "check"
        try:
            composed = compose_for_adapter(recipe_request, backend)
            folder = _fetch_adapter(study, name, composed)
            step = "evaluate"
            with adapter_run(composed, recipe_request, folder, adapter) as run:
                evaluate_run(run, evaluation)
            result.run, result.steps["evaluate"] = run.path, DONE
        except (UserError, WorkFailed) as error:
            result.fail(step, str(error))
    return results


def _fetch_adapter(study: Study, recipe: str, composed: Composed) -> Path:
    """Fetch a recipe's published adapter and evaluation data; return the adapter's folder, in PEFT's format.

    A rehearsal requires an adapter that was fetched before.

    Raises:
        UserError: a file is missing or damaged.
        WorkFailed: a file cannot be fetched.
    """
    data, published = study.data, study.published[recipe]
    assert published.adapter
    files = adapter_files(data, published.adapter)
    if not composed.rehearsal:
        ensure_data(study, [composed])
        fetch.fetch(data, data.raw, data.sources_of(files))
    elif missing := data.missing(files):
        raise UserError(f"{recipe}: a rehearsal does not fetch the adapter; run {data.fetch_command(missing)}")
    if any(not data.files[file].sha256 for file in files):
        warn(f"{recipe}: adapter not verified, because study.yaml lacks checksums for the files")
    folder = data.raw / published.adapter
    if published.adapter_format:
        folder = convert_to_peft(folder, published.adapter_format)
    folder, _ = locate_adapter(str(folder))
    return folder


def _none_published(study: Study, what: Literal["predictions", "adapter"]) -> UserError:
    recipes = [name for name, published in study.published.items() if getattr(published, what)]
    return UserError(
        f"--stage {what}: {study.folder.name}'s study.yaml declares none for these recipes, but for "
        f"{', '.join(recipes) or 'no recipe'}"
    )
