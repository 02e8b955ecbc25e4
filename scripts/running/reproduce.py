"""A study from its data to its table, each step unless it was done before: `recipe reproduce`."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from ..base import yamlfiles
from ..base.errors import UserError, did_you_mean
from ..base.locks import PATIENCE, held
from ..base.paths import RUNS, find_recipe
from ..base.progress import say
from ..configs import datafiles, models
from ..configs.compose import Composed, Request
from ..data import codereviewer, fetch
from ..data.study import Study
from ..places import Place
from ..runs.tasks import Outcome
from ..scores import bertscore, evaluate
from . import pipeline
from .pipeline import Pipeline


def chosen(of_study: Study, only: list[str]) -> list[str]:
    """The recipes of a study to run: those that it published scores of, or those of its recipes that are named.

    Raises:
        UserError: a name is that of no recipe of the study.
    """
    known = [*of_study.published, *of_study.beside]
    recipes = []
    for name in only:
        meant = [recipe for recipe in known if name in (recipe, recipe.partition("/")[2])]
        if not meant:
            short = [recipe.partition("/")[2] for recipe in known]
            raise UserError(
                f"--only {name}: no recipe of the study{did_you_mean(name, short)}; it has {', '.join(short)}"
            )
        recipes += meant
    return list(dict.fromkeys(recipes)) or list(of_study.published)


@dataclass
class Options:
    """How a study is to be reproduced.

    Attributes:
        request: what is laid over each recipe, with the study's name. A mirror is taken where a model is gated.
        only: the recipes to take, by default those with published scores.
        place: where they are carried out.
        evaluation: how each run is evaluated; BERTScore's model is by default that of the published scores, and the
            stand-in in a rehearsal.
        runs: the folder for the runs.
    """

    request: Request
    place: Place
    only: list[str] = field(default_factory=list)
    evaluation: evaluate.EvaluationRequest = field(default_factory=evaluate.EvaluationRequest)
    runs: Path = RUNS


def reproduce(of_study: Study, options: Options) -> list[Outcome]:
    """Bring every recipe of a study to its scores; what was done before with the same inputs is not done again.

    All recipes are checked and planned before the first starts. One that fails does not keep the others from going on.

    Raises:
        UserError: what was asked for is wrong, or the data there is not the study's; nothing was started.
        WorkFailed: the data cannot be fetched, or BERTScore's model not be loaded.
    """
    recipes, runs = chosen(of_study, options.only), options.runs
    rehearsal = options.request.rehearse
    if not rehearsal and options.evaluation.judge is None:
        options.evaluation.judge = bertscore.DEFAULT
    runs.mkdir(parents=True, exist_ok=True)
    with held(lock(options.request.name, runs), "another reproduction of it is going on there"):
        outcomes = [Outcome(name) for name in recipes]
        pipelines = [
            Pipeline(outcome, _request(options.request, outcome.recipe), options.evaluation, runs, options.place)
            for outcome in outcomes
        ]
        begun = [one for one in pipelines if one.is_finished() or one.check(with_data=False)]
        _have_data(of_study, [one.composed for one in begun if one.composed])
        ready = [one for one in begun if one.is_finished() or (one.check(with_data=True) and one.plan())]
        pipeline.need_judge(ready)
        results = [
            "results",
            "--study",
            options.request.name,
            *(["--rehearse"] if rehearsal else []),
            "--runs",
            str(runs),
        ]
        options.place.submit([one.work() for one in ready], options.request.name, runs, results)
    return outcomes


def lock(name: str, runs: Path) -> Path:
    """What a command that reproduces the study of a name holds."""
    return runs / f".reproduce-{name.replace('/', '--')}.lock"


def _request(shared: Request, recipe: str) -> Request:
    """What is laid over all recipes, for one; a mirror only where the model is gated."""
    base_model = str(yamlfiles.read_yaml(find_recipe(recipe)[1]).get("base_model"))
    return replace(shared, name=recipe, mirror=shared.mirror and bool(models.catalogue()[base_model]["gated"]))


def _have_data(of_study: Study, configs: list[Composed]) -> None:
    """Fetch and prepare the study's data in the forms that some configs read, where they are not there.

    Raises:
        UserError: what is there is not the study's data.
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
