"""What comes before a run: check and plan; data is a module of its own."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import tables
from ..base.paths import recipe_names
from ..base.progress import Bar, harmless, say
from . import completion
from .data import verbs as data_verbs
from .help import Verb, next_step, over
from .options import (
    Force,
    Json,
    Mirror,
    Names,
    Overrides,
    Profiles,
    check_finite,
    single_name,
)

if TYPE_CHECKING:
    from ..checks.check import Report
    from ..checks.finding import Finding
    from ..configs.compose import Request
    from ..configs.gpus import Gpu

HEADING = "Before a run"
verbs = typer.Typer()
verbs.add_typer(data_verbs, name="data", rich_help_panel=HEADING)


Measured = Annotated[
    bool, typer.Option("--data", help="Also measure the rows, and plan for the longest (tokenizes all).")
]
ShownTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Show instead what the model is trained on: N rows, token by token."),
]


@verbs.command(
    "check",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe check code-llama-7b --gpu T4 --data\nrecipe check mine.yaml --show-tokens 2",
)
def check_verb(
    names: Names = None,
    profile: Profiles = None,
    set_: Overrides = None,
    mirror: Mirror = False,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Check the rehearsal of it.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.gpus,
            help="The GPU it is for, as T4 or sm_75; by default this machine's.",
        ),
    ] = None,
    data: Annotated[
        bool,
        typer.Option("--data", help="Also read every row of the data, and tokenize it if the tokenizer is here."),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Also run Axolotl's own validation (15 s).")] = False,
    show_tokens: ShownTokens = None,
    force: Force = None,
    json: Json = False,
) -> None:
    """All that is wrong with a config, before it reaches a GPU. Exit code 2 if there is an error."""
    from ..checks import check
    from ..checks.finding import unknown_force
    from ..configs import gpus
    from ..configs.compose import Request

    target = gpus.here() if gpu is None else gpus.find(gpu)
    requests = [
        Request(name, profile or [], set_ or [], rehearse, mirror, force=force or [])
        for name in names or recipe_names()
    ]
    if show_tokens:
        single_name(names, "--show-tokens")
        with Bar("tokenizing", 1):
            rows = check.tokens_of(requests[0], show_tokens)
        tables.print_json(rows) if json else tables.print_tokens(rows)
        return
    reports = _checked(requests, target, data, full)
    unknown_force(force or [], {finding.name for report in reports for finding in report.findings})
    if json:
        tables.print_json([report.as_json() for report in reports])
    else:
        _print_findings(finding for report in reports for finding in report.findings)
        for report in reports:
            if report.data:
                tables.print_table(
                    report.data_table(), report.name, spare=["padding", "MB", "median", "95 %", "with loss"]
                )
    counts = {level: sum(report.count(level) for report in reports) for level in ("error", "warning")}
    say(f"{len(reports)} checked; errors: {counts['error']}, warnings: {counts['warning']}")
    if counts["error"]:
        raise typer.Exit(2)
    if not rehearse and not mirror:  # which a plan does not take
        next_step("plan", *names or [], *over(profile, set_), *(["--gpu", gpu] if gpu else []), json=json)
    elif len(requests) == 1:
        next_step("run", *_launching(requests[0]), json=json)


def _checked(requests: "list[Request]", gpu: "Gpu | None", data: bool, full: bool) -> "list[Report]":
    """The report of each request; which one is at work is shown where that takes a while."""
    from ..checks import check
    from ..planning import plan

    reports: list[Report] = []
    with Bar("checking", len(requests)) as bar:
        for request in requests:
            if data or full:
                bar.begin(f"checking {request.name}")
            reports.append(check.check(request, gpu, data, full))
            plan.add_to(reports[-1], gpu, anew=full)
            bar.update(len(reports))
    return reports


def _print_findings(findings: "Iterable[Finding]") -> None:
    """Print findings, once each: several recipes can have the same one."""
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.level, finding.name, finding.problem, finding.remedy), []).append(finding)
    for first, *more in alike.values():
        others = f" (also in {', '.join(Path(str(other.where)).name for other in more)})" if more else ""
        print(harmless(f"{first}{others}"))


@verbs.command(
    "plan",
    cls=Verb,
    rich_help_panel=HEADING,
    epilog="recipe plan llama-3.2-3b --gpu 4090\nrecipe plan llama-3.2-3b --set sequence_len=4096 --vram 16",
)
def plan_verb(
    names: Names = None,
    profile: Profiles = None,
    set_: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completion.gpus,
            help="The card, as T4; by default this machine's, or a table of memory sizes.",
        ),
    ] = None,
    vram: Annotated[
        float | None, typer.Option(metavar="GB", min=1, callback=check_finite, help="A card of this memory.")
    ] = None,
    gpu_count: Annotated[int, typer.Option("--gpus", min=1, help="How many GPUs to train on.")] = 1,
    data: Measured = False,
    price: Annotated[
        float | None, typer.Option(metavar="USD", min=0, callback=check_finite, help="What the card costs an hour.")
    ] = None,
    force: Force = None,
    json: Json = False,
) -> None:
    """Parameters, memory and work of a config, and the cards that it fits, without a GPU."""
    from ..configs import gpus
    from ..configs.compose import Request
    from ..planning import plan, plan_tables

    target = gpus.find(gpu) if gpu else None if vram else gpus.here()
    requests = [
        Request(name, profile or [], set_ or [], gpus=gpu_count, force=force or []) for name in names or recipe_names()
    ]
    plans = {}
    with Bar("planning", len(requests)) as bar:
        for request in requests:
            bar.begin(f"planning {request.name}")
            plans[request.name] = plan.of_request(request, target, vram, data, price)
            bar.update(len(plans))
    if json:
        tables.print_json([{"recipe": name, **planned} for name, planned in plans.items()])
    elif len(plans) > 1:
        plan_tables.summary(plans)
    else:
        plan_tables.show(plans[requests[0].name])
        if any(card["fits"] for card in plans[requests[0].name]["cards"]):
            next_step("run", *_launching(requests[0]))


def _launching(request: "Request") -> list[str]:
    """The arguments that run a request: as a rehearsal where this machine has no GPU, or not the data."""
    from ..configs import datafiles, gpus
    from ..configs.compose import compose

    entries = datafiles.datasets(compose(request).config)
    ready = gpus.here() and all(file.is_file() for _, entry in entries for file in datafiles.local_files(entry))
    rehearsed = ["--rehearse"] if request.rehearse or not ready else []
    mirrored = ["--mirror"] if request.mirror else []
    several = ["--gpus", str(request.gpus)] if request.gpus > 1 else []
    return [request.name, *over(request.profiles, request.overrides), *mirrored, *several, *rehearsed]
