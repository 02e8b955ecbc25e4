"""The verbs report and publish."""

from pathlib import Path
from typing import Annotated

import typer

from ..base import paths
from ..base.errors import UserError
from ..base.files import write_atomically
from ..base.terminal import Bar, say
from .help import Verb
from .options import Force, RehearsalsOfStudy, RunName, Things, only_with

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "publish",
    cls=Verb,
    epilog="recipe publish latest\nrecipe publish latest --push owner/name --private",
)
def publish_verb(
    run: RunName,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also merge base model and adapter into one model, in output/merged.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload the card and the adapter (--merge: merged model) to this repository."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    force: Force = None,
) -> None:
    """Write a run's model card; with options, also merge or upload the adapter."""
    from ..results import publish
    from ..run.rundir import find_run

    for published in publish.publish(find_run(run, paths.runs()), merge, push, private, force or []):
        print(published)


@verbs.command(
    "report",
    cls=Verb,
    epilog="recipe report latest\nrecipe report haider2024 --out study.html",
)
def report_verb(
    names: Things = None,
    rehearse: RehearsalsOfStudy = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Output file.")] = Path("report.html"),
) -> None:
    """Write one HTML file with curves, scores, predictions, settings and provenance.

    Default: the latest run. The file contains test rows and local folder names; check it before sharing.
    """
    from ..data.studies import Study
    from ..results.reports import report, report_runs
    from ..run.rundir import RunDir
    from ..study.sweep import Sweep, find_any

    things = [find_any(name) for name in names or ["latest"]]
    only_with("--rehearse", rehearse, "a study", isinstance(things[0], Study))
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"-o {out}: name an .html file")
    with Bar(f"writing {out}", 1):
        match things:
            case [Study() as study]:
                html = report.of_study(study, rehearse, paths.runs())
            case [Sweep() as sweep]:
                html = report.of_sweep(sweep, paths.runs())
            case _:
                folders = {thing.path: thing for thing in things if isinstance(thing, RunDir)}
                if not all(isinstance(thing, RunDir) for thing in things):
                    raise UserError(f"{' '.join(names or ())}: a report shows runs, one study or one sweep")
                html = report.of_runs(report_runs.reported_runs(list(folders.values())))
    write_atomically(out, html)
    print(out)
    say(f"next: open {out} in a browser; it needs no network")
