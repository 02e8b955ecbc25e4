"""What comes after a run and its evaluation: results, report and publish."""

from pathlib import Path
from typing import Annotated

import typer

from .. import tables
from ..base.files import write_atomically
from ..base.paths import RUNS
from ..base.progress import Bar, say
from .help import Verb
from .options import (
    Best,
    Distance,
    ExportedRun,
    Force,
    Json,
    Metrics,
    OfLedger,
    PairOfRuns,
    PowerOf,
    RehearsalsOfStudy,
    RunName,
    Runs,
    SeveralRuns,
    StudyName,
    SweepName,
    exclusive,
    form_of,
    only_with,
)

HEADING = "After"
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Markdown = Annotated[bool, typer.Option("--md", help="Print Markdown.")]
verbs = typer.Typer()


@verbs.command(
    "results",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe results --study haider2024\nrecipe results --sweep latest --best eval_loss",
)
def results_verb(
    study_name: StudyName = None,
    rehearse: RehearsalsOfStudy = False,
    sweep_name: SweepName = None,
    best: Best = None,
    pair: PairOfRuns = None,
    power_of: PowerOf = None,
    difference: Distance = None,
    metric: Metrics = None,
    export: ExportedRun = None,
    of_ledger: OfLedger = False,
    runs: Runs = RUNS,
    json: Json = False,
    csv: Csv = False,
    md: Markdown = False,
) -> None:
    """One row per run: losses and scores, beside the published ones."""
    what = {"--ledger" if of_ledger else "--study": of_ledger or study_name, "--sweep": sweep_name}
    exclusive(what | {"--compare": pair, "--export": export, "--power": power_of})
    only_with("--difference", difference is not None, "--power", power_of)
    only_with("--best", best, "--sweep", sweep_name)
    only_with("--rehearse", rehearse, "--study", study_name and not of_ledger)
    only_with("--metric", metric, "--compare", pair)
    form = form_of(json, csv, md)
    if pair:
        from ..results import compare

        compare.show(pair, runs, metric or [], form)
    elif sweep_name:
        _show_sweep(sweep_name, best, runs, form)
    elif export:
        _export(export, runs)
    elif of_ledger:
        from ..data import study
        from ..results import ledger

        ledger.show([study.find(study_name)] if study_name else study.every(), form)
    elif study_name:
        _show_study(study_name, rehearse, runs, form)
    elif power_of:
        from ..data import study
        from ..results import repeats

        of_study = study.find(power_of)
        repeats.show_power(repeats.outlook(of_study, runs, difference), of_study, form)
    elif any(runs.rglob("run.json")):
        from ..results import listing

        listing.show(runs, form)
    elif json:
        tables.print_json([])
    else:
        say(f"no runs below {runs}/; `recipe run NAME --rehearse` makes one")


def _export(name: str, runs: Path) -> None:
    """Write the record of a run, or of the predictions that were published with a study's scores.

    Raises:
        typer.Exit: with 1, where predictions cannot be scored; the records of the others are written.
    """
    from ..data import study
    from ..results import ledger
    from ..running import stages
    from ..runs.rundir import find_run

    of_study = next((each for each in study.every() if each.folder.name == name), None)
    if of_study is None:
        print(ledger.export(find_run(name, runs)))
        return
    rows, problems = stages.score_predictions(of_study, [], None)
    for file in ledger.export_predictions(of_study, rows):
        print(file)
    for owner, problem in problems.items():
        say(f"{owner}: {problem}")
    if problems:
        raise typer.Exit(1)


def _show_sweep(name: str, best: str | None, runs: Path, form: tables.Form) -> None:
    from ..running import sweep_results
    from ..running.sweep import find_sweep

    sweep = find_sweep(name, runs)
    rows = sweep_results.rows(sweep, runs, best)
    sweep_results.show(sweep, sweep_results.columns(sweep, runs), rows, best, form)


def _show_study(name: str, rehearse: bool, runs: Path, form: tables.Form) -> None:
    from ..data import study
    from ..results import listing, verdict

    of_study = study.find(name)
    rows = verdict.rows(of_study, runs, rehearse)
    listing.show_study(of_study, rows, rehearse, form)


@verbs.command(
    "report",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe report latest\nrecipe report --study haider2024 --out study.html",
)
def report_verb(
    run: SeveralRuns = None,
    study_name: StudyName = None,
    rehearse: RehearsalsOfStudy = False,
    sweep_name: SweepName = None,
    best: Best = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="The file.")] = Path("report.html"),
    runs: Runs = RUNS,
) -> None:
    """One HTML file of runs, a study or a sweep: curves, scores, predictions to read, settings, provenance.

    By default it is about the latest run; several are compared.
    It is self-contained and opens without a network. Mind whom you give it to: it shows the diffs and references
    of the test data, and names of folders of this machine.
    """
    from ..data import study
    from ..reports import report, report_runs
    from ..running.sweep import find_sweep
    from ..runs.rundir import find_run

    exclusive({"RUN": run, "--study": study_name, "--sweep": sweep_name})
    only_with("--rehearse", rehearse, "--study", study_name)
    only_with("--best", best, "--sweep", sweep_name)
    report.check_file(out)
    with Bar(f"writing {out}", 1):
        if study_name:
            html = report.of_study(study.find(study_name), rehearse, runs)
        elif sweep_name:
            html = report.of_sweep(find_sweep(sweep_name, runs), runs, best)
        else:
            folders = {folder.path: folder for folder in (find_run(name, runs) for name in run or ["latest"])}
            html = report.of_runs(report_runs.reported_runs(list(folders.values())))
    write_atomically(out, html)
    print(out)
    say(f"next: open {out} in a browser; it needs no network")


@verbs.command(
    "publish",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe publish latest\nrecipe publish latest --push owner/name --private",
)
def publish_verb(
    run: RunName,
    merge: Annotated[
        bool, typer.Option("--merge", help="Also merge base model and adapter into one model, in output/merged.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    force: Force = None,
    runs: Runs = RUNS,
) -> None:
    """Write a model card beside a run's adapter; merge it, or upload it, only when asked."""
    from ..results import publish
    from ..runs.rundir import find_run

    for published in publish.publish(find_run(run, runs), merge, push, private, force or []):
        print(published)
