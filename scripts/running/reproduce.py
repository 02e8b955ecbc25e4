"""A study from its data to its table, skipping the steps that were done before: `recipe reproduce`."""

from dataclasses import replace
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError, meant
from ..base.locks import PATIENCE, held
from ..base.paths import find_recipe
from ..base.progress import Bar, say
from ..configs import datafiles, models
from ..configs.compose import Composed, Request
from ..data import codereviewer, fetch
from ..data.study import Study
from ..places import Place
from ..runs.tasks import Outcome
from ..scores import bertscore, evaluate
from .pipeline import Pipeline, need_judge


def chosen(of_study: Study, only: list[str]) -> list[str]:
    """The recipes of a study to run: those with published scores, or those of its recipes that are named.

    Raises:
        UserError: a name is not that of a recipe of the study, or it may be that of several.
    """
    recipes = [*of_study.published, *of_study.beside]
    named = [meant(name, recipes, "recipe of the study", option="--only") for name in only]
    return list(dict.fromkeys(named)) or list(of_study.published)


def reproduce(
    of_study: Study, request: Request, only: list[str], evaluation: evaluate.EvaluationRequest, runs: Path, place: Place
) -> list[Outcome]:
    """Bring every recipe of a study to its scores; what was done before with the same inputs is not done again.

    All recipes are checked and planned before the first starts. One that fails does not stop the others.

    Args:
        of_study: the study.
        request: what is laid over each recipe, with the study's name. A mirror is used only where a model is gated.
        only: the recipes to run; by default those with published scores.
        evaluation: how each run is evaluated; BERTScore's model is by default that of the published scores, and the
            stand-in in a rehearsal.
        runs: the folder for the runs.
        place: where the recipes are carried out.

    Raises:
        UserError: the request is wrong, or the data there is not the study's; nothing was started.
        WorkFailed: the data cannot be fetched, or BERTScore's model cannot be loaded.
    """
    outcomes = [Outcome(recipe) for recipe in chosen(of_study, only)]
    if not request.rehearse and evaluation.judge is None:
        evaluation.judge = bertscore.DEFAULT
    with held(lock(request.name, runs), "another reproduction of it is running there"):
        pipelines = [
            Pipeline(outcome, _request(request, outcome.recipe), evaluation, runs, place) for outcome in outcomes
        ]
        for pipeline in pipelines:
            pipeline.look_up()
        begun = [pipeline for pipeline in pipelines if pipeline.is_finished() or pipeline.check(with_data=False)]
        _have_data(of_study, [pipeline.composed for pipeline in begun if pipeline.composed])
        for pipeline in begun:
            if not pipeline.former:  # without the data it could not be found
                pipeline.look_up()
        ready = []
        with Bar("checking and planning", len(begun)) as bar:
            for done, pipeline in enumerate(begun, start=1):
                bar.begin(f"checking and planning {pipeline.outcome.label}")
                if pipeline.is_finished() or (pipeline.check(with_data=True) and pipeline.plan()):
                    ready.append(pipeline)
                bar.update(done)
        works = [pipeline.work() for pipeline in ready]
        need_judge(works, evaluation, request.rehearse)
        rehearsed = ["--rehearse"] if request.rehearse else []
        place.submit(works, request.name, runs, ["results", "--study", request.name, *rehearsed, "--runs", str(runs)])
    return outcomes


def lock(name: str, runs: Path) -> Path:
    """The lock that a command holds while it reproduces the study of a name."""
    return runs / f".reproduce-{name.replace('/', '--')}.lock"


def _request(shared: Request, recipe: str) -> Request:
    """The request for one recipe, with a mirror only where the model is gated."""
    base_model = str(yamlfiles.read_yaml(find_recipe(recipe)[1]).get("base_model"))
    return replace(shared, name=recipe, mirror=shared.mirror and bool(models.entry_of(base_model).get("gated")))


def _have_data(of_study: Study, configs: list[Composed]) -> None:
    """Fetch and prepare the study's data in the forms that some configs read, unless they are there.

    Raises:
        UserError: the data there is not the study's.
    """
    entries = [entry for composed in configs for _, entry in datafiles.datasets(composed.config)]
    needed = {Path(str(entry.get("path"))).parent for entry in entries}
    for name, form in of_study.data.input_formats.items():
        folder = Path(form.folder)
        if folder not in needed:
            continue
        codereviewer.wait_for_others(folder)
        if not any(folder.glob("[!.]*")):
            say(f"data: fetching and preparing {folder}")
            if not all((of_study.data.raw / file).is_file() for file in of_study.data.files):
                fetch.fetch(of_study.data, of_study.data.raw)
            codereviewer.prepare(codereviewer.fetched(of_study.data), folder, of_study, name, patience=PATIENCE)
        if reason := codereviewer.is_not_prepared(of_study, folder, name):
            raise UserError(
                f"{folder}: not the study's data: {reason}; move it away to have it prepared, or run the recipes on it "
                "one by one"
            )
        say(f"data: {folder} is the study's")
