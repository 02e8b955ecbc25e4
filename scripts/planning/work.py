"""What a training takes: tokens, steps, operations, and on a known card time and cost."""

from pathlib import Path
from typing import Any

from ..configs import datafiles
from ..configs.compose import Composed
from ..configs.config import TRACKING, Difference
from ..configs.gpus import Gpu, named
from ..data import study
from ..runs.rundir import all_runs, readable
from . import steps
from .lengths import Lengths
from .planner import Planner

UTILIZATION = 0.3
"""The share of the peak rate that is assumed where nothing was measured."""


def work(
    composed: Composed,
    planner: Planner,
    gpu: Gpu | None,
    gpus: int,
    lengths: Lengths | None,
    price: float | None,
    runs: Path,
) -> dict[str, Any]:
    """What a config's training takes.

    Args:
        composed: the config.
        planner: its planned step.
        gpu: the card, if one is named or there.
        gpus: how many of them.
        lengths: of the rows, where they are known; else every row counts as a full one.
        price: of a card for an hour.
        runs: the folder with earlier runs.

    Returns:
        Among others `flops_per_token`, with those on the padding beside it; and `tokens_per_second`: of the newest run
        of this recipe on as many such cards, else of its study's records of that, else from the card's peak rate and
        UTILIZATION.
    """
    config = composed.config
    length = steps.length_of(config)
    rows, source = _rows(composed)
    if lengths:
        rows, source = lengths.rows, lengths.rows_are
        length = length if config.get("sample_packing") else round(lengths.padded / rows)
    all_steps = datafiles.steps_of(config, rows, gpus)
    tokens = lengths.tokens if lengths else rows * length if rows else None
    tokens_are = lengths.are if lengths else "at most: every row counted as a full one"
    padding = lengths.padded / lengths.tokens if lengths else 1
    epochs = float(config.get("num_epochs") or 1)
    if all_steps and config.get("max_steps"):  # it wins over the epochs
        taken = all_steps * datafiles.effective_batch(config) * gpus
        if config.get("sample_packing"):  # of sequences, each with several rows
            tokens, epochs, tokens_are = length, taken, "at most: every sequence counted as a full one"
        elif rows:
            epochs = taken / rows
    tokens = round(tokens * epochs) if tokens else None
    per_token = padding * flops_of_token(planner, length)
    rate, rate_source = _rate(composed, gpu, gpus, per_token, runs) if gpu else (None, None)
    hours = tokens / rate / 3600 if tokens and rate else None
    return {
        "rows": rows,
        "rows_are": source if rows else None,
        "tokens": tokens,
        "tokens_are": tokens_are,
        "steps": all_steps,
        "flops_per_token": per_token,
        "flops": tokens * per_token if tokens else None,
        "tokens_per_second": rate,
        "rate_is": rate_source,
        "hours": hours,
        "cost": hours * gpus * price if hours and price is not None else None,
    }


def _rows(composed: Composed) -> tuple[int | None, str]:
    """The number of rows that are trained on, where it is known, and where it comes from."""
    rows = datafiles.training_rows(composed.config)
    of_study = study.of(composed.origin or composed.recipe)
    others = any(change.key.startswith(("datasets", "val_set_size")) for change in composed.from_origin)
    if rows is None and of_study and not others:
        return of_study.data.rows_of("train"), "the study's data"
    return rows, "the config's data"


def _rate(composed: Composed, gpu: Gpu, gpus: int, per_token: float, runs: Path) -> tuple[float | None, str | None]:
    """Tokens a second, padding not counted, where that is known, and the source: the newest finished run of a config on
    as many such cards, else the card's peak rate. Where rows are packed it is the card's, since a measured speed also
    counts the padding at the ends of sequences."""
    packed = composed.config.get("sample_packing")
    for _, run in readable(() if packed else all_runs(runs)[::-1]):
        card = str((run.provenance.get("gpus") or [{}])[0].get("name"))
        done = run.state == "finished" and not run.rehearsal and run.recipe == composed.recipe and run.ranks == gpus
        same = _changed(run.from_origin) == _changed(composed.from_origin)
        if _is_card(card, gpu) and done and same and run.summary.tokens_per_second:
            return run.summary.tokens_per_second, "measured in an earlier run"
    if gpu.tflops:
        return gpu.tflops * 1e12 * UTILIZATION * gpus / per_token, f"{UTILIZATION:.0%} of the card's peak"
    return None, None


def _changed(differences: list[Difference]) -> dict[str, Any]:
    """What can change a config's speed: its differences from the recipe but for tracking and the seed."""
    return {d.key: d.run for d in differences if d.key != "seed" and not TRACKING.match(d.key)}


def _is_card(name: str, gpu: Gpu) -> bool:
    """Whether a card of that name, as its driver gives it, is a GPU."""
    return name == gpu.name or (named(name) or name) == named(gpu.name)


def flops_of_token(planner: Planner, length: int) -> float:
    """Floating-point operations that a training step spends on one token of a full row.

    A matrix takes 2 for each of its weights forward, as much for the gradient of its input, and again as much for its
    own where it is trained; the head's matrix counts, the embedding's not. Attention takes, in each layer, 4 times
    its width times the tokens before, on average half the length, forward, and twice that backward. With
    checkpointing all of it is computed forward once more. LoRA's matrices are trained ones.
    """
    sizes = planner.trace.sizes
    again = bool(planner.step.checkpointing)
    passes = 0.0
    for kind, count in planner.trace.parameters.items():
        if kind in ("norm", "embed_tokens", "vision_tower"):
            continue
        passes += 2 * count["frozen"] * (2 + again) + 2 * count["trainable"] * (3 + again)
    if "lm_head" not in planner.trace.parameters:  # the embedding's matrix is the head's too
        passes += 2 * sizes["vocabulary"] * sizes["width"] * (2 + again + (planner.step.adapter is None))
    attention = 4 * sizes["attention_width"] * length / 2 * sizes["layers"]
    return passes + attention * (3 + again)
