"""`recipe reproduce --from`: score published predictions, or evaluate published adapters."""

from collections.abc import Sequence
from typing import Any, Literal

from ..backends import DONE, Backend, TaskResult
from ..base.errors import UserError, WorkFailed
from ..base.progress import say
from ..configs.compose import Request
from ..data import fetch
from ..data.published import adapter_files
from ..data.study import Study
from ..scores import evaluate, published
from ..scores.evaluate import EvaluationRequest
from ..scores.score import scorer_models
from . import reproduce
from .evaluation import as_peft, checked, located, run_of

Stage = Literal["predictions", "adapter", "training"]


def score_predictions(
    of_study: Study, only: Sequence[str], scorer: str | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Fetch and score a study's published predictions.

    Args:
        of_study: the study.
        only: names of recipes; by default all recipes and the baselines.
        scorer: BERTScore's model, see `score.scorer_model`.

    Returns:
        Rows of `published.scores`, and problems by the name of the recipe or baseline. Each row has two more keys:
        `of`, the name of the recipe or baseline; and `verified`, true if the files match the study's checksums.

    Raises:
        UserError: a name is wrong, or no predictions are published.
    """
    data, chosen = of_study.data, reproduce.chosen(of_study, list(only))
    owners = [
        (name, of_recipe.scores, of_recipe.predictions, data.test_set)
        for name in chosen
        if (of_recipe := of_study.published.get(name))
    ]
    if not only:
        owners += [(of.name, of.scores, of.predictions, of.test_set) for of in of_study.baselines]
    if not any(predictions for *_, predictions, _ in owners):
        raise UserError(_none_published(of_study, "predictions", only))
    models = scorer_models(of_study.columns, scorer, report=True)
    rows, problems = [], {}
    for name, scores, predictions, test_set in owners:
        if predictions is None:
            say(f"{name}: no predictions are published")
            continue
        try:
            fetched = fetch.fetch(data, data.raw, only=data.sources_of(predictions.files))
            verified = all(row["verified"] for row in fetched if row["file"] in predictions.files)
            made = published.scores(of_study, predictions, test_set, scores, models)
            rows += [{"of": name} | row | {"verified": verified} for row in made]
        except (UserError, WorkFailed) as error:
            problems[name] = str(error)
    return rows, problems


def evaluate_adapters(
    of_study: Study, request: Request, only: Sequence[str], evaluation: EvaluationRequest, backend: Backend
) -> list[TaskResult]:
    """Fetch a study's published adapters, and evaluate each with its recipe's settings.

    Args:
        of_study: the study.
        request: the study's name, and overrides for each recipe.
        only: names of recipes; by default all.
        evaluation: settings of the evaluations.
        backend: backend of this machine.

    Returns:
        Results of the recipes; a failure does not stop the others.

    Raises:
        UserError: a name is wrong, or no adapter is published.
    """
    chosen = [name for name in reproduce.chosen(of_study, list(only)) if name in of_study.published]
    named = {name: published.adapter for name in chosen if (published := of_study.published[name]).adapter}
    if not named:
        raise UserError(_none_published(of_study, "adapter", only))
    results = [TaskResult(recipe) for recipe in named]
    for result, adapter in zip(results, named.values(), strict=True):
        step = "check"
        try:
            asked = reproduce.request_for(request, result.recipe)
            composed = checked(asked, backend)
            files = adapter_files(of_study.data, adapter)
            if not request.rehearse:
                reproduce.have_data(of_study, [composed])
                fetch.fetch(of_study.data, of_study.data.raw, only=of_study.data.sources_of(files))
            elif missing := of_study.data.missing(files):
                fetching = " ".join(f"--only {source}" for source in missing)
                raise UserError(
                    f"{result.recipe}: a rehearsal does not fetch the adapter; run `recipe data fetch "
                    f"{of_study.data.key} {fetching}`"
                )
            if not all(of_study.data.files[file].sha256 for file in files):
                say(f"{result.recipe}: adapter not verified, because study.yaml lacks checksums for the files")
            folder, form = of_study.data.raw / adapter, of_study.published[result.recipe].adapter_format
            folder, _ = located(str(as_peft(folder, form) if form else folder))
            step = "evaluate"
            with run_of(composed, asked, folder, adapter) as made:
                evaluate.evaluate(made, evaluation)
            result.run, result.steps[step] = made.path, DONE
        except (UserError, WorkFailed) as error:
            result.fail(step, str(error))
    return results


def _none_published(of_study: Study, what: Stage, only: Sequence[str]) -> str:
    having = [name for name, of in of_study.published.items() if getattr(of, what)]
    hint = f"available for {', '.join(having)}" if having else "templates/README.md shows how to declare one"
    return f"--from {what}: {of_study.folder.name}'s study.yaml has none for {', '.join(only) or 'any recipe'}; {hint}"
