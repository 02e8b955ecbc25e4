"""What `recipe reproduce --from predictions` and `--from adapter` do."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..base.progress import say
from ..terminal import tables
from .next_step import next_step

if TYPE_CHECKING:
    from ..configs.compose import Request
    from ..data.study import Study
    from ..places import Place
    from ..running.ladder import From
    from ..scores.evaluate import EvaluationRequest


def climb(
    of_study: "Study",
    request: "Request",
    only: list[str],
    evaluation: "EvaluationRequest",
    runs: Path,
    place: "Place",
    from_: "From",
    dry_run: bool,
    form: tables.Form,
) -> None:
    """Evaluate what was published below a study's scores, and print its ladder.

    Raises:
        typer.Exit: with 1, where a rung cannot be had; the others are printed.
    """
    from ..results import ladder as results
    from ..results import verdict
    from ..running import ladder

    if dry_run:
        tables.write(ladder.outline(of_study, only, from_, request.rehearse), form, below=["fetch", "then"])
        if form != "json":
            say("next: the same command without --dry-run")
        return
    problems = ladder.climb(of_study, request, only, evaluation, runs, place, from_)
    trained = verdict.rows(of_study, runs, request.rehearse)
    chosen = [one.name for one in ladder.owners(of_study, only, from_, request.rehearse)] if only else []
    rows = results.rows(of_study, runs, request.rehearse, trained, problems, from_, chosen)
    if form == "json":
        tables.print_json(rows)
    else:
        results.show(of_study, rows, form)
    if problems:
        raise typer.Exit(1)
    next_step("reproduce", of_study.folder.name, json=form == "json", runs=runs)
