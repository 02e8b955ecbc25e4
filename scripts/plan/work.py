"""Training work of a config: tokens, steps, floating-point operations and time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..base.errors import UserError
from ..check import check
from ..config import datafiles, models
from ..config.compose import Composed
from ..config.gpus import Gpu
from ..config.training_settings import TrainingSettings
from ..data import studies
from .step_plan import StepPlan

UTILIZATION = 0.3
"""Assumed share of the GPU's peak rate."""

_DECIDES_TOKENS = re.compile(
    r"base_model|revision|trust_remote|datasets\b|dataset_exact|.*token|.*chat_template|default_system|"
    "train_on_inputs|sequence_len|min_sample_len|excess_length|val_set_size"
)
"""Prefixes of dotted keys that determine training rows and tokens, but not padding."""


class TokenCount(StrEnum):
    """Origin of a number of tokens, in words for tables and JSON."""

    UNKNOWN = ""
    COUNTED = "counted, without padding"
    DECLARED = "declared by the study, without padding; the hours also ignore padding"
    UPPER_BOUND = "every row counted at full length"


@dataclass(frozen=True)
class Lengths:
    """Counts of rows and tokens per epoch.

    Attributes:
        rows: number of training rows.
        rows_are: source of the row count.
        tokens: number of tokens without padding.
        padded: number of tokens with the padding of micro batches.
        origin: origin of the token counts.
    """

    rows: int
    tokens: int
    padded: int
    origin: TokenCount
    rows_are: str = "the config's data"


@dataclass(frozen=True)
class Work:
    """Training work of a config; None for unknown figures.

    Attributes:
        rows, rows_are: number of rows per epoch, and the source of the count.
        tokens, tokens_are: number of tokens in all epochs, without padding, and the origin of the count.
        flops_per_token: floating-point operations per token, including a share for padding.
        tokens_per_second: speed at `UTILIZATION` of the GPUs' peak rate.
    """

    rows: int | None
    rows_are: str
    tokens: int | None
    tokens_are: TokenCount
    steps: int | None
    flops_per_token: float
    tokens_per_second: float | None
    hours: float | None

    @property
    def at_most(self) -> bool:
        """True if row lengths are unknown and every row counts at full length."""
        return self.tokens_are is TokenCount.UPPER_BOUND

    @property
    def hours_are(self) -> str:
        """Assumptions behind the hours."""
        return f"speed: {UTILIZATION:.0%} of the GPU's peak; tokens: {self.tokens_are}"


def counted(composed: Composed, force: Sequence[str] = ()) -> Lengths:
    """Tokenize a config's training rows like Axolotl, and count rows and tokens.

    Args:
        composed: the config.
        force: names of overridden findings.

    Raises:
        UserError: rows or tokenizer are missing on this machine, Axolotl refuses the rows, or no rows are left.
    """
    for dataset in datafiles.training_sets(composed.config):
        if not any(file.is_file() for file in datafiles.local_files(dataset.entry)):
            raise UserError(f"--data: {dataset.key}: its rows are not on this machine; leave --data out")
    sizes, padding = check.training_lengths(composed, force)
    if not sizes:
        raise UserError("--data: sequence_len and val_set_size leave no training rows; leave --data out")
    tokens = sum(sizes)
    return Lengths(len(sizes), tokens, round(tokens / (1 - padding)), TokenCount.COUNTED)


def published(composed: Composed) -> Lengths | None:
    """Row and token counts declared by a study for the model's tokenizer.

    The counts also apply to an ungated copy of the model, because it has the same tokenizer.
    """
    of_study = studies.study_of(composed.origin or composed.recipe)
    changed = {change.key: change for change in composed.from_origin if _DECIDES_TOKENS.match(change.key)}
    name = composed.config["base_model"]
    if (model := changed.get("base_model")) and models.is_copy(model.run, model.recipe):
        name = model.recipe
        changed = {key: change for key, change in changed.items() if key not in ("base_model", "revision_of_model")}
    split = of_study.data.splits.get("train") if of_study and not changed else None
    rows = of_study.data.rows_of("train") if of_study else None
    tokens = split.tokens.get(str(name)) if split else None
    return Lengths(rows, tokens, tokens, TokenCount.DECLARED, "the study's data") if rows and tokens else None


def work(composed: Composed, step_plan: StepPlan, gpu: Gpu | None, gpus: int, lengths: Lengths | None) -> Work:
    """Estimate the training work of a config.

    Args:
        composed: the config.
        step_plan: plan of the config's step.
        gpu: the GPU, if known.
        gpus: number of GPUs.
        lengths: counts of rows and tokens; without them every row counts at full length.
    """
    config = composed.config
    settings = TrainingSettings.of(config)
    length, packs = settings.sequence_len, settings.sample_packing
    lengths = lengths or _full(composed, length)
    rows = lengths.rows if lengths else None
    if lengths and not packs:
        length = round(lengths.padded / lengths.rows)
    tokens, tokens_are = (lengths.tokens, lengths.origin) if lengths else (None, TokenCount.UNKNOWN)
    all_steps = settings.steps(rows, gpus)
    epochs = settings.num_epochs
    if all_steps and settings.max_steps:  # overrides num_epochs
        taken = all_steps * settings.rows_per_step * gpus
        if packs:  # `taken` counts packed sequences, not rows
            tokens, epochs, tokens_are = length, taken, TokenCount.UPPER_BOUND
        elif rows:
            epochs = taken / rows
    tokens = round(tokens * epochs) if tokens else None
    per_token = flops_of_token(step_plan, length) * (lengths.padded / lengths.tokens if lengths else 1)
    rate = gpu.tflops * 1e12 * UTILIZATION * gpus / per_token if gpu and gpu.tflops else None
    hours = tokens / rate / 3600 if tokens and rate else None
    rows_are = lengths.rows_are if lengths else ""
    return Work(rows, rows_are, tokens, tokens_are, all_steps, per_token, rate, hours)


def _full(composed: Composed, length: int) -> Lengths | None:
    """Upper bound of the counts, from the row count of the data or study."""
    rows, rows_are = datafiles.training_rows(composed.config), "the config's data"
    of_study = studies.study_of(composed.origin or composed.recipe)
    others = any(change.key.startswith(("datasets", "val_set_size")) for change in composed.from_origin)
    if rows is None and of_study and not others:
        rows, rows_are = of_study.data.rows_of("train"), "the study's data"
    return Lengths(rows, rows * length, rows * length, TokenCount.UPPER_BOUND, rows_are) if rows else None


def flops_of_token(step_plan: StepPlan, length: int) -> float:
    """Floating-point operations per token of a training step on full rows.

    Each weight costs 2 operations forward, 2 for the input gradient and, if trained, 2 for the weight gradient. LoRA
    weights are trained. The output head counts; the embedding does not. In each layer, attention costs 4 * width *
    length / 2 forward (a token sees half the row on average), and twice as much backward. Checkpointing repeats the
    forward pass.
    """
    sizes = step_plan.memory.sizes
    again = bool(step_plan.step.checkpointing)
    passes = 0.0
    for kind, count in step_plan.memory.parameters.items():
        if kind in ("norm", "embed_tokens", "vision_tower"):
            continue
        passes += 2 * count["frozen"] * (2 + again) + 2 * count["trainable"] * (3 + again)
    head = step_plan.memory.parameters.get("lm_head", {})
    if sum(head.values()) < sizes["vocabulary"] * sizes["width"]:  # the head shares the embedding's weights
        passes += 2 * sizes["vocabulary"] * sizes["width"] * (2 + again + (step_plan.step.adapter is None))
    attention = 4 * sizes["attention_width"] * length / 2 * sizes["layers"]
    return passes + attention * (3 + again)
