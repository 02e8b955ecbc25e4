"""`recipe plan`: parameters, memory and work of a config before it runs."""

from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..base import paths
from ..base.yamlfiles import Config
from ..checks import check
from ..checks.finding import refuse
from ..configs import datafiles
from ..configs.compose import Composed, Request, compose
from ..configs.gpus import Gpu, engine_of
from . import lengths, steps, work
from .fit import usable_gib
from .need import held_at_peak, per_gpu, planner_of, totals
from .planner import CONTEXT, GIB, ROUND, Planner
from .traces import NotAlike

SIZES = (8, 12, 16, 24, 40, 48, 80)
"""Cards by their memory in GB, for a plan that names none."""
_MOST_ROWS = 1024


def of_request(
    request: Request,
    gpu: Gpu | None = None,
    vram: float | None = None,
    data: bool = False,
    price: float | None = None,
    runs: Path = paths.RUNS,
) -> dict[str, Any]:
    """Parameters, memory and work of a request.

    Args:
        gpu: the card that it is meant for.
        vram: its memory in GiB, if different from the card's, or if nothing else is known.
        data: tokenize all training data, to count its tokens and to plan for its longest row; else some of it.
        price: of a card for an hour.
        runs: the folder with earlier runs, whose speed is used.

    Raises:
        UserError: it has an error that leaves nothing to plan, or it cannot be planned.
    """
    composed = composed_for(request, gpu)
    found, unknown = lengths.lengths_of(composed, data, request.force)
    planned, planner = plan(composed.config, gpu, vram, request.gpus)
    told = [finding for finding in check.examine(composed, gpu).findings if finding.scope in ("gpu", "code")]
    for finding in told:
        about = f"{finding.key}: " if finding.key else ""
        planned["notes"].append(f"{about}{finding.problem}; {finding.remedy}".removesuffix("; "))
    if found and found.longest and not composed.config.get("sample_packing"):  # packed batches are always full
        with suppress(NotAlike):
            size = planner.need(length=found.longest)
            planned["longest_batch"] = {"rows": planner.rows, "tokens": found.longest, "needed": size}
    planned["work"] = work.work(composed, planner, gpu, request.gpus, found, price, runs)
    if planned["work"]["hours"] and not found:
        planned["notes"].append(f"tokens are an upper bound, every row counted as a full one: {unknown}")
    return planned


def composed_for(request: Request, gpu: Gpu | None = None) -> Composed:
    """A request's config, for a card where that is known.

    Raises:
        UserError: it has an error that leaves nothing to plan, or a secret, which what is printed would repeat.
    """
    composed = compose(request, gpu)
    findings = check.examine(composed, gpus=request.gpus).findings
    refuse([finding for finding in findings if finding.scope == "step" or finding.rule == "secret"])
    return composed


def plan(
    config: Config, gpu: Gpu | None = None, vram: float | None = None, gpus: int = 1
) -> tuple[dict[str, Any], Planner]:
    """What a config needs: parameters, bytes of memory at a full micro batch, and the cards that hold it.

    Raises:
        UserError: it cannot be planned.
    """
    planner, notes = planner_of(config, gpu)
    trace = planner.trace
    engines = per_gpu(planner, gpus)
    if gpus > 1:
        notes.append(f"cards are judged under {engine_of(config)}")
    saved = planner.need() - engines[engine_of(config)] if engines else 0
    size = vram or (gpu and gpu.memory)
    cards = [
        Gpu(gpu.name if gpu and size else f"{gib:g} GB", planner.step.capability or (0, 0), gib)
        for gib in ([size] if size else SIZES)
    ]
    planned = {
        "model": config["base_model"],
        "adapter": planner.step.adapter,
        "loop": "Axolotl's",
        "micro_batch": {"rows": planner.rows, "tokens": planner.length},
        "parameters": trace.parameters,
        **totals(trace.parameters),
        "memory": asdict(planner.usage()) | {"paged": trace.paged, "context": CONTEXT, "needed": planner.need()},
        "cards": [_verdict(planner, card, saved) for card in cards],
        "changes": [],
        "per_gpu": engines,
        "notes": notes + _of_paged(trace.paged),
    }
    if size and not planned["cards"][0]["fits"]:
        planned["changes"] = _changes(config, planner, cards[0], saved)
    return planned, planner


def _of_paged(paged: int) -> list[str]:
    """A note on the optimizer state that no figure for a GPU counts: bitsandbytes allocates it in CUDA's unified memory
    (cudaMallocManaged), whose pages the driver moves to main memory where the GPU has no room for them."""
    note = (
        f"{paged / GIB:.2f} GiB of optimizer state is paged, and not part of what a GPU needs: it stays on the "
        "GPU while there is room, and moves to main memory, which must hold all of it, when there is none"
    )
    return [note] if paged else []


def _verdict(planner: Planner, card: Gpu, saved: float) -> dict[str, Any]:
    """Whether a card holds a step, and how far rows and tokens could grow, None where that is not known.

    Args:
        saved: bytes that an engine saves on each of several cards.
    """
    usable = usable_gib(card) * GIB + saved
    context = planner.trace.sizes["context"]
    return {
        "card": card.name,
        "usable": usable - saved,
        "fits": planner.need() <= usable,
        "free": usable - planner.need(),
        "largest_micro_batch": largest(lambda n: planner.need(rows=n), usable, _MOST_ROWS),
        "longest_row": largest(lambda n: planner.need(length=n), usable, context, ROUND),
    }


def largest(needed: Callable[[int], float], usable: float, most: int, unit: int = 1) -> int | None:
    """The largest multiple of a unit up to `most` whose need can be met, given that this grows; 0 where none's can.

    None where shapes on the way do not follow from those that were traced.
    """
    try:
        return bisect_right(range(1, most // unit + 1), usable, key=lambda n: needed(n * unit)) * unit
    except NotAlike:
        return None


def _changes(config: Config, planner: Planner, card: Gpu, saved: float) -> list[dict[str, Any]]:
    """What to change where a step does not fit: the mildest first, each on top of those before, until it fits."""
    usable = usable_gib(card) * GIB + saved
    step = planner.step
    optimizer = str(config.get("optimizer") or steps.OPTIMIZER)
    paged = "paged_adamw_8bit" if "8bit" in optimizer else "paged_adamw_32bit"
    candidates: list[tuple[Config, str, bool]] = [
        ({"gradient_checkpointing": True}, "the same gradients, a third more time", not step.checkpointing),
        (
            {"chunked_cross_entropy": True},
            "the same loss, of an eighth of the tokens at a time",
            card.capability >= (8, 0) and not step.chunked_loss,  # compiled with Triton, which asks for 8.0
        ),
        (
            {"optimizer": paged},
            "the same steps; its state leaves the GPU when that is full",
            optimizer in steps.OPTIMIZERS and "paged" not in optimizer,
        ),
        (
            {
                "micro_batch_size": 1,
                "gradient_accumulation_steps": max(int(datafiles.effective_batch(config)), planner.rows),
                "batch_size": None,
            },
            "the same rows a step, one at a time",
            planner.rows > 1,
        ),
        (_with_adapter(config, "qlora"), "a base in 4 bits", step.adapter != "qlora"),
    ]
    changes: list[dict[str, Any]] = []
    changed = config
    tried = planner
    for settings, effect, applies in candidates:
        if not applies:
            continue
        settings = {key: value for key, value in settings.items() if value is not None or key in config}
        changed = {key: value for key, value in (changed | settings).items() if value is not None}
        tried, _ = planner_of(changed, card, alone=True)
        changes.append({"set": settings, "effect": effect, "needed": tried.need(), "fits": tried.need() <= usable})
        if changes[-1]["fits"]:
            return changes
    longest = largest(lambda n: tried.need(length=n), usable, planner.length, ROUND)
    if longest:
        changes.append(
            {
                "set": {"sequence_len": longest},
                "effect": "longer rows are lost",
                "needed": tried.need(length=longest),
                "fits": True,
            }
        )
    return changes


def _with_adapter(config: Config, adapter: str) -> Config:
    """The settings that give a config an adapter, on all linear layers where it names none."""
    settings: Config = {"adapter": adapter, "load_in_4bit": adapter == "qlora"}
    if not (config.get("lora_target_modules") or config.get("lora_target_linear")):
        settings["lora_target_linear"] = True
    return settings | ({} if config.get("lora_r") else {"lora_r": 16, "lora_alpha": 32})


def compare(request: Request, gpu: Gpu | None = None) -> list[dict[str, Any]]:
    """Full fine-tuning, LoRA and QLoRA of a config's model side by side, in bytes.

    `weights`, `gradients`, `optimizer` and `activations` are what a GPU holds at the peak, and `other` is what kernels,
    the allocator and CUDA take; together they are `needed`. `optimizer_paged` comes on top, in main memory if need be.
    """
    config = composed_for(request, gpu).config
    rows = []
    for adapter in (None, "lora", "qlora"):
        changed = {key: value for key, value in config.items() if key not in ("adapter", "load_in_4bit")}
        planner, notes = planner_of(changed | (_with_adapter(config, adapter) if adapter else {}), gpu, alone=True)
        held = held_at_peak(planner)
        rows.append(
            {
                "method": {None: "full", "lora": "LoRA", "qlora": "QLoRA"}[adapter],
                **totals(planner.trace.parameters),
                **held,
                "other": planner.need() - sum(held.values()),
                "needed": planner.need(),
                "optimizer_paged": planner.trace.paged,
                "notes": notes + _of_paged(planner.trace.paged),
            }
        )
    return rows
