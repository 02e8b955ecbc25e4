"""The commands results, report and publish."""

from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base import paths, tables
from ..base.errors import UserError, recipe_command
from ..base.files import write_atomically
from ..base.hub import importing_axolotl
from ..base.terminal import Bar, require_consent, say
from .help import RecipeCommand, name_of, rehearse_option, suggest
from .options import (
    Force,
    Json,
    Metrics,
    RehearsalsOfStudy,
    RunName,
    Things,
    complete_runs,
    refuse_together,
    refuse_without,
    report_problems,
)

if TYPE_CHECKING:
    from ..results.query import Query
    from ..run.rundir import RunDir

commands = typer.Typer(rich_markup_mode=None)
_QUERY = "--where, --sort, --columns, --limit, --csv or --raw-csv"


def _columns_option(option: str, help: str) -> Any:
    """Option with columns, separated by commas."""
    return typer.Option(
        option, callback=_split, default_factory=list, show_default=False, metavar="COLUMN[,COLUMN]...", help=help
    )


def _split(texts: list[str]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",")]


@commands.command(
    "results",
    cls=RecipeCommand,
    epilog="recipe results    # all runs\nrecipe results lora-tradeoffs"
    "\nrecipe results haider2024 CARD.md    # public records\nrecipe results RUN_A RUN_B"
    "\nrecipe results --where 'lora_r >= 16' --csv",
)
def results_command(
    *,
    names: Things,
    rehearse: RehearsalsOfStudy = False,
    metric: Metrics,
    where: Annotated[
        str,
        typer.Option(
            metavar="CONDITION",
            help="Only runs that meet it, as in 'lora_r >= 16'.",
        ),
    ] = "",
    sort: Annotated[
        list[str], _columns_option("--sort", help="Sort runs by these columns; with - in front, descending.")
    ],
    columns: Annotated[list[str], _columns_option("--columns", help="Show these columns of runs.")],
    limit: Annotated[
        int, typer.Option(metavar="N", show_default=False, help="Show only the first N runs; default: all.")
    ] = -1,
    by: Annotated[
        str, typer.Option(metavar="METRIC", help="For a sweep: metric of the best trial; default: the eval loss.")
    ] = "",
    csv: Annotated[
        bool, typer.Option("--csv", rich_help_panel="Output", help="Print runs as CSV, which spreadsheets can open.")
    ] = False,
    raw_csv: Annotated[
        bool, typer.Option("--raw-csv", rich_help_panel="Output", help="The same, without ' before formulas.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|STUDY",
            autocompletion=complete_runs,
            help="Write a record of a run, or of a study's published predictions.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show losses and scores of runs, a study or a sweep, or compare runs."""
    refuse_together({"--json": json, "--csv": csv, "--raw-csv": raw_csv})
    is_query = (where, sort, columns, limit, csv or raw_csv) != ("", [], [], -1, False)
    refuse_together({" ".join(names) or _QUERY: names or is_query, "--export": export})
    refuse_together({_QUERY: is_query, "--metric": metric, "--rehearse": rehearse})
    refuse_without("--metric", metric, "two or more runs", len(names) > 1)
    refuse_without("--by", by, "a sweep", len(names) == 1 and not is_query)
    refuse_without("--rehearse", rehearse, "a study", len(names) == 1)
    if export:
        _export(export)
    elif is_query:
        from ..results import query
        from ..results.query import Query

        asked = Query(where, sort, columns, limit)
        if csv or raw_csv:
            query.print_csv(names, asked, raw_csv)
        else:
            _show_query(names, asked, json)
    elif names and paths.is_study(names[0]) and Path(names[-1]).is_file():
        from ..data import studies
        from ..results import public_records

        public_records.show(studies.find(names[0]), names[1:], json)
    elif len(names) == 1 and not has_magic(names[0]):
        _show_one(names[0], rehearse, by, json)
    else:
        _show_runs(names, metric, json)


def _show_query(names: list[str], asked: "Query", json: bool) -> None:
    from ..results import listing, query
    from ..run.rundir import RunDir

    if json and asked.columns:
        tables.print_json(query.table(names, asked))
    elif json:
        listing.show([RunDir(Path(row["run"])) for row in query.table(names, asked)], json)
    else:
        query.show(names, asked)


def _show_runs(names: list[str], metrics: list[str], json: bool) -> None:
    """Show the runs that names stand for, or compare them."""
    if not names and not json and not any(paths.run_folders(paths.runs())):
        say(f"no runs below {paths.runs()}/; `recipe run NAME --rehearse` makes one")
        return
    from ..results import comparison, listing, query

    sides = [] if any(map(has_magic, names)) else [*map(_side, names)]
    if 1 < len(sides) <= len(comparison.LABELS) and all(sides):
        comparison.show(comparison.of_sides(filter(None, sides), metrics), json)
        if not any(Path(name).is_file() for name in names):
            suggest("report", *names, json=json)
    else:
        listing.show(query.folders_of(names), json)


def _side(name: str) -> "RunDir | Path | None":
    """Run or file of predictions to compare; None for a study or sweep."""
    from ..run.rundir import RunDir
    from ..study.sweep import find_run_sweep_or_study

    if Path(name).is_file():
        return Path(name)
    thing = find_run_sweep_or_study(name)
    return thing if isinstance(thing, RunDir) else None


def _export(name: str) -> None:
    """Write the records of a run, or of a study's published predictions.

    Raises:
        typer.Exit: code 1 if some predictions cannot be scored; the other records are still written.
    """
    from ..data import studies
    from ..results import export_records
    from ..run.rundir import find_run
    from ..study import reproduce

    if not paths.is_study(name):
        print(export_records.export_run(find_run(name, paths.runs())))
        return
    study = studies.find(name)
    if study.data.missing(reproduce.prediction_files(study)):
        remedy = f"{recipe_command('reproduce', study.folder.name, '--stage', 'predictions')} fetches and scores them"
        raise UserError("its published predictions are not on this machine", key=f"--export {name}", remedy=remedy)
    rows, problems = reproduce.score_predictions(study, [], None)
    for file in export_records.export_predictions(study, rows):
        print(file)
    report_problems(problems)


def _show_one(name: str, rehearse: bool, by: str, json: bool) -> None:
    from ..data.studies import Study
    from ..results import listing, query, study_tables, sweep_results, verdict
    from ..run import backends
    from ..study.sweep import Sweep, find_run_sweep_or_study, recorded_sweeps

    thing = find_run_sweep_or_study(name)
    suggested = ["report", name]
    refuse_without("--rehearse", rehearse, "a study", isinstance(thing, Study))
    refuse_without("--by", by, "a sweep", isinstance(thing, Sweep))
    if isinstance(thing, Study):
        rows = verdict.rows(thing, paths.runs(), rehearse)
        sweeps = [sweep for sweep in recorded_sweeps().values() if sweep.rehearsal == rehearse]
        best = sweep_results.best_rows(thing, sweeps, paths.runs())
        study_tables.show_study(thing, rows, rehearse, json, [*map(sweep_results.best_record, best)])
        if not json:
            sweep_results.show_best(best)
    elif isinstance(thing, Sweep):
        has_best = sweep_results.show(thing, json, by or sweep_results.LOSS)
        if has_best and not thing.rehearsal and not by:
            suggested = ["new", "best", "--from", f"{thing.label}/best"]
    else:
        folders = query.folders_of([name])
        listing.show(folders, json)
        if backends.read(folders[-1]).state in ("failed", "interrupted"):
            suggested = ["resume", name_of(folders[-1])]
    suggest(*suggested, *rehearse_option(rehearse), json=json)


@commands.command(
    "report",
    cls=RecipeCommand,
    epilog="recipe report latest\nrecipe report haider2024 --out study.html",
)
def report_command(
    *,
    names: Things,
    rehearse: RehearsalsOfStudy = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Output file.")] = Path("report.html"),
) -> None:
    """Write one HTML file with curves, scores, predictions, settings and provenance.

    Default: the latest run. The file contains test rows and local folder names; check it before sharing.
    """
    from ..data.studies import Study
    from ..results.reports import report, report_runs
    from ..run.rundir import RunDir
    from ..study.sweep import Sweep, find_run_sweep_or_study

    things = [find_run_sweep_or_study(name) for name in names or ["latest"]]
    refuse_without("--rehearse", rehearse, "a study", isinstance(things[0], Study))
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"-o {out}: name an .html file")
    with Bar(f"writing {out}", 1):
        match things:
            case [Study() as study]:
                html = report.study_page(study, rehearse, paths.runs()).html()
            case [Sweep() as sweep]:
                html = report.sweep_page(sweep, paths.runs()).html()
            case _:
                folders = {}
                for thing in things:
                    if not isinstance(thing, RunDir):
                        raise UserError(f"{' '.join(names)}: a report shows runs, one study or one sweep")
                    folders[thing.path] = thing
                html = report.runs_page(report_runs.reported_runs([*folders.values()])).html()
    write_atomically(out, html)
    print(out)
    say(f"next: open {out} in a browser; it needs no network")


@commands.command(
    "publish",
    cls=RecipeCommand,
    epilog="recipe publish latest --push owner/name --private\nrecipe publish latest --gguf q4_k_m,q8_0",
)
def publish_command(
    *,
    run: RunName,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also merge base model and adapter into one model, in output/merged.")
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE[,TYPE]...",
            help="Also merge, and export to GGUF with llama.cpp, such as q4_k_m,q8_0.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload the card and the adapter (--merge: merged model) to this repository."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    pr: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Open a pull request to this evaluated adapter, with its benchmarks' scores."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before an upload.")] = False,
    force: Force,
) -> None:
    """Write a run's model card; with options, also merge or upload the adapter."""
    from ..results import publish
    from ..run.rundir import find_run

    refuse_without("--private", private, "--push", push)
    refuse_together({"--gguf": gguf, "--push": push, "--pr": pr})
    refuse_together({"--merge": merge, "--pr": pr})
    run_dir = find_run(run, paths.runs())
    if repository := push or pr:
        require_consent(f"Upload to {repository}?", yes)
    if pr:
        print(publish.propose(run_dir, pr))
        return
    tools = None
    if gguf is not None:
        with importing_axolotl():
            from ..training.validation import GgufTools

            tools = GgufTools.find(gguf)
    for published in publish.publish(run_dir, merge, tools, push, private, force):
        print(published)
