"""The command plan."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..base import tables
from ..base.files import Row
from ..base.hardware import GIB
from ..base.paths import selected
from ..base.terminal import Bar
from ..config.merging import Override
from .help import RecipeCommand, run_arguments, suggest
from .options import Force, Json, Names, Overrides, Profiles, repeatable_option

if TYPE_CHECKING:
    from ..config.gpus import Gpu
    from ..plan.plan import Fit, Plan, PlannedChange
    from ..plan.work import Work

commands = typer.Typer(rich_markup_mode=None)


@commands.command(
    "plan",
    cls=RecipeCommand,
    epilog="recipe plan llama-3.2-3b --gpu 4090\nrecipe plan llama-3.2-3b --gpu 16GB",
)
def plan_command(
    *,
    names: Names,
    profile: Profiles,
    set_: Overrides,
    gpu: Annotated[
        list[str],
        repeatable_option(
            metavar="NAME",
            help="GPU (T4) or memory (24GB); default: this machine's, else all sizes. Repeatable.",
        ),
    ],
    gpu_count: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs to train on.")] = 1,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Also tokenize all rows, to count their tokens.")
    ] = False,
    force: Force,
    json: Json = False,
) -> None:
    """Estimate memory, steps and hours, and whether GPUs suffice. Needs no GPU."""
    from ..config import gpus
    from ..config.compose import Request
    from ..plan import plan

    targets = [_target(name) for name in gpu] or [(gpus.here(), None)]
    requests = [Request(name, profile, set_, gpus=gpu_count, force=force) for name in selected(names)]
    plans = []
    with Bar("planning", len(requests)) as bar:
        for done, request in enumerate(requests, 1):
            bar.begin(f"planning {request.name}")
            for target, memory in targets:
                plans.append((request.name, plan.plan_request(request, target, memory, all_rows)))
            bar.update(done)
    if json:
        tables.print_json([{"recipe": name, **asdict(planned)} for name, planned in plans])
    elif len(plans) > 1:
        _print_plans(plans)
    else:
        planned = plans[0][1]
        _print_plan(planned)
        if any(fit.fits for fit in planned.gpus):
            suggest("run", *run_arguments(requests[0]))


def _target(name: str) -> "tuple[Gpu | None, float | None]":
    """Value of --gpu: a GPU, or a memory size in GiB."""
    from ..config import gpus

    size = gpus.SIZE.fullmatch(name)
    if size:
        return None, float(size[1])
    return gpus.find_gpu(name), None


def _print_plan(planned: "Plan") -> None:
    """Print a plan as tables."""
    adapter = planned.adapter or "all weights"
    tables.print_text(f"{planned.model}, {adapter}, {_micro_batch(planned)} tokens per micro batch")
    print()
    tables.print_table(_parameters(planned))
    print(f"{planned.trainable_share:.3%} trainable\n")
    tables.print_table([{"memory": name, "GiB": _gib(size)} for name, size in _memory(planned) if size])
    print()
    tables.print_table([_fit_row(fit) for fit in planned.gpus])
    for change in planned.changes:
        tables.print_text(_advice(change))
    print()
    if planned.work:
        facts = dict(_work(planned.work)) | {"checkpoints": _checkpoints(planned), "main memory": _loading(planned)}
        tables.print_table([{"work": name, "": text} for name, text in facts.items()], below=[""])
    for note in planned.notes:
        tables.print_text(f"note: {note}")


def _parameters(planned: "Plan") -> list[Row]:
    """Rows of parameter counts by kind of layer."""
    counts = planned.parameters | {"all": {"frozen": planned.frozen, "trainable": planned.trainable}}
    rows = []
    for layer, count in counts.items():
        rows.append({"parameters": layer} | {kind: f"{number:,}" for kind, number in count.items()})
    return rows


def _advice(change: "PlannedChange") -> str:
    from ..config.compose import Request

    settings = shlex.join(Request("", overrides=[Override(*setting) for setting in change.set.items()]).options)
    verdict = "then it fits" if change.fits else "not enough"
    return f"{verdict}, {_gib(change.needed)} GiB: {settings} ({change.effect})"


def _gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.2f}"


def _checkpoints(planned: "Plan") -> str:
    size, most = planned.checkpoints.size, planned.checkpoints.most
    return f"{_gib(size)} GiB each, up to {most} at a time: {_gib(size * most)} GiB"


def _loading(planned: "Plan") -> str:
    processes = f" in each of {planned.loading.processes} processes" if planned.loading.processes > 1 else ""
    return f"{_gib(planned.loading.size)} GiB{processes} to load the model, beside the libraries"


def _micro_batch(planned: "Plan") -> str:
    return f"{planned.micro_batch.rows} x {planned.micro_batch.tokens}"


def _memory(planned: "Plan") -> Iterator[tuple[str, float]]:
    """Parts of the memory at the peak, and sums, in bytes."""
    memory = planned.memory
    yield from sorted(memory.parts.items(), key=lambda part: -part[1])
    yield "allocated at the peak", memory.allocated
    yield "reserved but unused", memory.reserved - memory.allocated
    yield "more in evaluation", max(memory.evaluation - memory.reserved, 0)
    yield "CUDA context", memory.context
    yield "needed", memory.needed
    yield "paged optimizer state, not included", memory.paged
    for parallelism, size in planned.per_gpu.items():
        yield f"needed on each GPU with {parallelism}", size


def _fit_row(fit: "Fit") -> Row:
    return {"GPU": fit.gpu, "usable GiB": _gib(fit.usable), "fits": fit.verdict, "free GiB": _gib(fit.free)}


def _work(work: "Work") -> Iterator[tuple[str, str]]:
    """Known facts about a training's rows, tokens, steps and time, as label and text."""
    if work.full_rows:
        yield (
            "row lengths",
            "unknown; tokens and hours assume full rows; if the rows are local, --all-rows measures lengths",
        )
    rows = "unknown; only complete rows in local JSONL files are counted"
    if work.rows:
        rows = f"{work.rows:,} ({work.rows_are})"
    yield "rows", rows
    if work.tokens:
        up_to = "up to " if work.full_rows else ""
        yield "tokens in all epochs", f"{up_to}{work.tokens:,} ({work.tokens_are})"
    if work.steps:
        yield "optimizer steps", f"{work.steps:,}"
    yield "operations per token", f"{work.flops_per_token:.3g}"
    if work.tokens_per_second:
        yield "tokens per second", f"{work.tokens_per_second:,.0f}"
    if work.hours:
        yield "hours", f"about {tables.hours(work.hours)} ({work.hours_are})"


def _print_plans(plans: "list[tuple[str, Plan]]") -> None:
    """Print several plans as one table."""
    tables.print_table([_row(name, planned) for name, planned in plans])
    notes = [f"note: {name}: {note}" for name, planned in plans for note in planned.notes]
    for note in dict.fromkeys(notes):
        tables.print_text(note)


def _row(name: str, planned: "Plan") -> Row:
    """Row of a plan, with the requested GPU or the smallest one that suffices."""
    row: Row = {
        "recipe": name,
        "trainable": f"{planned.trainable:,}",
        "micro batch": _micro_batch(planned),
        "needed GiB": _gib(planned.memory.needed),
    }
    if len(planned.gpus) > 1:
        row["smallest GPU"] = next((fit.gpu for fit in planned.gpus if fit.fits), "none")
        return row
    [fit] = planned.gpus
    row |= {"GPU": fit.gpu, "fits": fit.verdict, "free GiB": _gib(fit.free), "hours": None}
    if planned.work and planned.work.hours:
        row["hours"] = tables.hours(planned.work.hours, planned.work.full_rows)
    return row
