"""The verb plan."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..base import tables, yamlfiles
from ..base.paths import selected
from ..base.terminal import Bar
from .help import Verb, launching, next_step
from .options import Force, Json, Names, Overrides, Profiles

if TYPE_CHECKING:
    from ..config.gpus import Gpu
    from ..plan.plan import Plan
    from ..plan.work import Work

verbs = typer.Typer(rich_markup_mode=None)


@verbs.command(
    "plan",
    cls=Verb,
    epilog="recipe plan llama-3.2-3b --gpu 4090\nrecipe plan llama-3.2-3b --gpu 16GB",
)
def plan_verb(
    names: Names = None,
    profile: Profiles = None,
    set_: Overrides = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A GPU (T4) or its memory (24GB); default: this machine's. Repeatable.",
        ),
    ] = None,
    gpu_count: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs to train on.")] = 1,
    data: Annotated[bool, typer.Option("--data", help="Also tokenize all rows, to count those trained on.")] = False,
    force: Force = None,
    json: Json = False,
) -> None:
    """Estimate memory, steps and hours, and whether GPUs suffice. Needs no GPU."""
    from ..config import gpus
    from ..config.compose import Request
    from ..plan import plan

    targets = [_target(name) for name in gpu or []] or [(gpus.here(), None)]
    requests = [Request(name, profile or [], set_ or [], gpus=gpu_count, force=force or []) for name in selected(names)]
    plans = []
    with Bar("planning", len(requests)) as bar:
        for done, request in enumerate(requests, 1):
            bar.begin(f"planning {request.name}")
            for target, memory in targets:
                plans.append((request.name, plan.plan_request(request, target, memory, data)))
            bar.update(done)
    if json:
        tables.print_json([{"recipe": name, **asdict(planned)} for name, planned in plans])
    elif len(plans) > 1:
        _print_plans(plans)
    else:
        planned = plans[0][1]
        _print_plan(planned)
        if any(each.fits for each in planned.gpus):
            next_step("run", *launching(requests[0]))


def _target(name: str) -> "tuple[Gpu | None, float | None]":
    """Value of --gpu: a GPU, or a memory size in GiB."""
    from ..config import gpus

    size = gpus.SIZE.fullmatch(name)
    return (None, float(size[1])) if size else (gpus.find(name), None)


def _print_plan(planned: "Plan") -> None:
    """Print a plan as tables."""
    from ..plan.step_plan import GIB

    batch, memory = planned.micro_batch, planned.memory
    tables.print_text(
        f"{planned.model}, {planned.adapter or 'all weights'}, {batch.rows} x {batch.tokens} tokens per micro batch"
    )
    print()
    counts = planned.parameters | {"all": {"frozen": planned.frozen, "trainable": planned.trainable}}
    tables.print_table(
        [{"parameters": layer} | {kind: f"{n:,}" for kind, n in count.items()} for layer, count in counts.items()]
    )
    print(f"{planned.trainable_share:.3%} trainable\n")
    lines = [
        *sorted(memory.parts.items(), key=lambda part: -part[1]),
        ("allocated at the peak", memory.allocated),
        ("reserved but unused", memory.reserved - memory.allocated),
        ("CUDA context", memory.context),
        ("needed", memory.needed),
        ("paged optimizer state, not included", memory.paged),
        *((f"needed on each GPU with {method}", size) for method, size in planned.per_gpu.items()),
    ]
    tables.print_table([{"memory": name, "GiB": f"{size / GIB:.2f}"} for name, size in lines if size])
    print()
    tables.print_table(
        [
            {
                "GPU": each.gpu,
                "usable GiB": f"{each.usable / GIB:.2f}",
                "fits": each.verdict,
                "free GiB": f"{each.free / GIB:.2f}",
            }
            for each in planned.gpus
        ]
    )
    for change in planned.changes:
        settings = " ".join(f"--set {key}={yamlfiles.write_flow(value)}" for key, value in change.set.items())
        verdict = "then it fits" if change.fits else "not enough"
        tables.print_text(f"{verdict}, {change.needed / GIB:.2f} GiB: {settings} ({change.effect})")
    print()
    if planned.work:
        tables.print_table([{"work": name, "": text} for name, text in _work(planned.work)], below=[""])
    for note in planned.notes:
        tables.print_text(f"note: {note}")


def _work(work: "Work") -> Iterator[tuple[str, str]]:
    """Known facts about a training's rows, tokens, steps and time, as label and text."""
    up_to = "up to " if work.at_most else ""
    if work.at_most:
        yield (
            "row lengths",
            "unknown; tokens and hours assume full rows; if rows and tokenizer are local, --data measures lengths",
        )
    yield "rows", f"{work.rows:,} ({work.rows_are})" if work.rows else "unknown; the data is not local JSONL"
    if work.tokens:
        yield "tokens in all epochs", f"{up_to}{work.tokens:,} ({work.tokens_are})"
    if work.steps:
        yield "optimizer steps", f"{work.steps:,}"
    yield "operations per token", f"{work.flops_per_token:.3g}"
    if work.tokens_per_second:
        yield "tokens per second", f"{work.tokens_per_second:,.0f}"
    if work.hours:
        yield "hours", f"{up_to}{work.hours:,.{1 if work.hours >= 1 else 2}f} ({work.hours_are})"


def _print_plans(plans: "list[tuple[str, Plan]]") -> None:
    """Print several plans as one table."""
    from ..plan.step_plan import GIB

    rows = []
    for name, planned in plans:
        fits = planned.gpus
        row: dict[str, str | None] = {
            "recipe": name,
            "trainable": f"{planned.trainable:,}",
            "micro batch": f"{planned.micro_batch.rows} x {planned.micro_batch.tokens}",
            "needed GiB": f"{planned.memory.needed / GIB:.2f}",
        }
        if len(fits) == 1:
            first, hours = fits[0], planned.work and planned.work.hours
            row |= {"GPU": first.gpu, "fits": first.verdict, "free GiB": f"{first.free / GIB:.2f}"}
            row["hours"] = f"{'up to ' if planned.work.at_most else ''}{hours:.3g}" if planned.work and hours else None
        else:
            row["smallest GPU"] = next((each.gpu for each in fits if each.fits), "none")
        rows.append(row)
    tables.print_table(rows)
    notes = [f"note: {name}: {note}" for name, planned in plans for note in planned.notes]
    for note in dict.fromkeys(notes):
        tables.print_text(note)
