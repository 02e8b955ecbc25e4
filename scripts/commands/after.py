"""What comes after a run: evaluate, score, results, report and publish."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import UserError
from ..base.paths import RUNS
from .options import BatchSize, Best, CacheForm, Group, Json, Judge, JudgeLayer, On, RunName, Runs, SlurmOptions

HEADING = "After"
verbs = typer.Typer()


@verbs.command(rich_help_panel=HEADING)
def evaluate(
    run: RunName,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prepared rows; by default the study's test set beside the training data."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate the first so many rows only; 12 of a rehearsal's.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="DIR|none", help="Another adapter, or none for the base model alone."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="By default the study's.")] = None,
    batch_size: BatchSize = 16,
    cache: Annotated[
        CacheForm, typer.Option(help="Of keys and values. auto: static on a GPU, which compiles the decoding.")
    ] = "auto",
    bertscore: Judge = None,
    bertscore_layer: JudgeLayer = None,
    export_prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the exact prompts instead, to make the predictions elsewhere."),
    ] = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Generate predictions for test rows with a run's adapter, and score them."""
    from .. import places
    from ..base.progress import say
    from ..running import queueing
    from ..runs.lookup import find_run
    from ..scores import evaluate as evaluation

    if export_prompts and on != "local":
        raise UserError("--export-prompts: needs no GPU, and is done here")
    request = evaluation.EvaluationRequest(
        data, limit, adapter, max_new_tokens, batch_size, cache, bertscore, bertscore_layer
    )
    folder = find_run(run, runs)
    place = places.kinds()[on](rehearsal=False, jobs=None, options=slurm or [])
    if not place.here:
        queueing.submit_evaluation(folder, request, runs, place)
        print(folder.path)
    elif export_prompts:
        count = evaluation.export_prompts(folder, request, export_prompts)
        say(f"{count} prompts; add the field prediction to each row, then `recipe score {export_prompts}`")
        print(export_prompts)
    else:
        _print_scores(evaluation.evaluate(folder, request).scores, json)


@verbs.command(rich_help_panel=HEADING)
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with the fields reference and prediction.")],
    bertscore: Judge = None,
    bertscore_layer: JudgeLayer = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rows with their own scores to a JSONL file.")
    ] = None,
    json: Json = False,
) -> None:
    """Score predictions made anywhere."""
    from ..base.files import write_rows
    from ..scores import score as scoring
    from ..scores.bertscore import judge

    scores, rows = scoring.score(scoring.read_rows(file), judge(bertscore, bertscore_layer))
    if out:
        write_rows(out, rows)
    _print_scores(scores, json)


def _print_scores(scores: dict[str, Any], json: bool) -> None:
    from ..base import tables

    if json:
        tables.print_json(scores)
        return
    for name, value in scores.items():
        if name == "bertscore" and value:
            value = f"{value['model']}{' (stands in)' if value['stand_in'] else ''}, {value['hash']}"
        if name != "intervals":
            interval = scores["intervals"].get(name)
            within = f"  [{tables.text_of(interval[0])}, {tables.text_of(interval[1])}]" if interval else ""
            print(f"{name:22}{tables.text_of(value)}{within}")


@verbs.command(rich_help_panel=HEADING)
def results(
    study: Annotated[
        str | None, typer.Option(metavar="S", help="A study's table: its runs beside its published scores.")
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="With --study: its rehearsals instead.")] = False,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="S", help="A sweep's members beside each other, by what varies; latest is the newest."),
    ] = None,
    best: Best = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two runs, or a run and a file of predictions, on the same rows."),
    ] = None,
    by: Annotated[
        Group | None, typer.Option(help="The latest run's scores by language, or by length of the reference.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="With --by: another run, or a file of predictions.")
    ] = None,
    runs: Runs = RUNS,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    md: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
) -> None:
    """A row a run: losses and scores, the published ones beside them."""
    from ..base import tables
    from ..results import listing as gathered

    if sum(map(bool, (study, sweep, compare, by))) > 1:
        raise UserError("--study, --sweep, --compare and --by: one of them")
    if best and not sweep:
        raise UserError("--best: goes with --sweep")
    if (rehearse and not study) or (run and not by):
        raise UserError("--rehearse: goes with --study" if rehearse else "--run: goes with --by")
    form = "json" if json else "csv" if csv else "md" if md else "table"
    if compare:
        from ..scores import compare as comparing

        rows = comparing.compare(*(comparing.predictions(name, runs) for name in compare))
        tables.write(rows, form, f"a: {compare[0]}, b: {compare[1]}")
    elif by:
        from ..scores import compare as comparing

        tables.write(comparing.by_group(comparing.predictions(run or "latest", runs).rows, by), form, run)
    elif sweep:
        from ..running import sweep_tables, sweeps

        made = sweeps.find(sweep, runs)
        sweep_tables.show(made, sweeps.rows(made, runs, best), best, form)
    elif study:
        from ..data import study as studies
        from ..results import verdict

        of_study = studies.find(study)
        verdict.show_study(of_study, verdict.rows(of_study, runs, rehearse), rehearse, form)
    else:
        gathered.show(runs, form)


@verbs.command(rich_help_panel=HEADING)
def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Runs, compared where there are several: folders, ends of their names; by default the latest.",
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="S", help="A study instead: its table, and the runs that speak for it.")
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="With --study: its rehearsals instead.")] = False,
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME", help="A sweep instead: what its members trade for what.")
    ] = None,
    best: Best = None,
    analyze: Annotated[
        bool,
        typer.Option(
            "--analyze",
            help="Measure what takes torch too (a minute): what 4 bits lose of the base model's weights, where "
            "they are a local folder, and a plan of memory that was not made yet.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="The file.")] = Path("report.html"),
    runs: Runs = RUNS,
) -> None:
    """One HTML file of runs, a study or a sweep: curves, scores, predictions to read, settings, provenance.

    It holds all that it needs and opens without a network. Mind whom you give it to: it shows the diffs and references
    of the test data, and names of folders of this machine.
    """
    from ..base.files import write_atomically
    from ..data import study as studies
    from ..reports import report as reporting
    from ..reports import report_runs
    from ..runs.lookup import find_run

    if sum(map(bool, (run, study, sweep))) > 1:
        raise UserError("RUN, --study and --sweep: one of them")
    if rehearse and not study:
        raise UserError("--rehearse: goes with --study")
    if best and not sweep:
        raise UserError("--best: goes with --sweep")
    reporting.check_file(out)
    if study:
        html = reporting.of_study(studies.find(study), rehearse, runs, analyze)
    elif sweep:
        from ..running import sweeps

        html = reporting.of_sweep(sweeps.find(sweep, runs), runs, best, analyze)
    else:
        folders = {folder.path: folder for folder in (find_run(name, runs) for name in run or ["latest"])}
        html = reporting.of_runs(report_runs.reported_runs(list(folders.values())), analyze)
    write_atomically(out, html)
    print(out)


@verbs.command(rich_help_panel=HEADING)
def publish(
    run: RunName,
    merge: Annotated[
        bool, typer.Option("--merge", help="Make one model of base model and adapter too, in output/merged.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is new is private.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Write a model card beside a run's adapter; merge it, or upload it, only when asked."""
    from ..results import publish as publishing
    from ..runs.lookup import find_run

    for made in publishing.publish(find_run(run, runs), merge, push, private):
        print(made)
