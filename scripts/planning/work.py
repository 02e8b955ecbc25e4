"""Work of a training: tokens (counted, a study's, or an upper bound), steps, operations and time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.errors import UserError
from ..checks import check
from ..configs import datafiles, models
from ..configs.compose import Composed
from ..configs.gpus import Gpu
from ..data import study
from . import steps
from .planner import Planner

FULL = "every row counted as a full one"
UTILIZATION = 0.3
"""Assumed share of the peak rate."""

_DECIDES_TOKENS = re.compile(
    r"base_model|revision|trust_remote|datasets\b|dataset_exact|.*token|.*chat_template|default_system|"
    "train_on_inputs|sequence_len|min_sample_len|excess_length|val_set_size"
)
"""Begin of the dotted keys that decide the rows of a training and their tokens, padding aside."""


@dataclass(frozen=True)
class Lengths:
    """Rows and tokens of an epoch.

    Attributes:
        rows: trained rows.
        rows_are: their owner.
        tokens: tokens of these rows.
        padded: tokens with the padding of micro batches.
        are: source of the figures.
    """

    rows: int
    tokens: int
    padded: int
    are: str
    rows_are: str = "the config's data"


@dataclass(frozen=True)
class Work:
    """Work of a config's training.

    Attributes:
        rows: rows of an epoch, and their owner; None where they are not known.
        tokens: tokens of all epochs, without padding, and the source of the figure.
        flops_per_token: floating-point operations, with those on the padding beside it.
        tokens_per_second: speed at `UTILIZATION` of the GPUs' peak rate.
    """

    rows: int | None
    rows_are: str
    tokens: int | None
    tokens_are: str
    steps: int | None
    flops_per_token: float
    tokens_per_second: float | None
    hours: float | None

    @property
    def at_most(self) -> bool:
        """True where the lengths of rows are not known, and every row counts as a full one."""
        return self.tokens_are.startswith(FULL)

    @property
    def hours_are(self) -> str:
        """Basis of the hours."""
        return f"speed: {UTILIZATION:.0%} of the GPU's peak; tokens: {self.tokens_are}"


def counted(composed: Composed, force: Sequence[str] = ()) -> Lengths:
    """Tokenize a config's training rows as Axolotl does, and count them.

    Args:
        composed: the config.
        force: names of overridden findings.

    Raises:
        UserError: rows or tokenizer are not on this machine, or Axolotl refuses them, or leaves none.
    """
    for key, dataset in datafiles.datasets(composed.config, "datasets"):
        if len(datafiles.jsonl_files(dataset)) != 1 or datafiles.training_rows({"datasets": [dataset]}) is None:
            problem = "not the rows, or the first rows, of one JSONL file on this machine"
            raise UserError(f"--data: {key}: {problem}; leave --data out")
    measured = check.training_lengths(composed, force)
    rows, tokens = (sum(each[f"{what}_trained_on"] for each in measured) for what in ("rows", "tokens"))
    padded = sum(each["tokens_trained_on"] / (1 - (each["padding_share"] or 0)) for each in measured)
    there = sum(each["rows_there"] for each in measured)
    left = (datafiles.training_rows(composed.config) or there) / there  # val_set_size may hold some out
    if round(left * rows) <= 0:
        raise UserError("--data: sequence_len and val_set_size leave none of its rows; leave --data out")
    return Lengths(round(left * rows), round(left * tokens), round(left * padded), "counted, without padding")


def published(composed: Composed) -> Lengths | None:
    """Counts that a study declares of its own rows under the model's tokenizer, which a mirror has too."""
    of_study = study.of(composed.origin or composed.recipe)
    changed = {change.key: change for change in composed.from_origin if _DECIDES_TOKENS.match(change.key)}
    name = composed.config["base_model"]
    if (model := changed.get("base_model")) and models.is_copy(model.run, model.recipe):
        name = model.recipe
        changed = {key: change for key, change in changed.items() if key not in ("base_model", "revision_of_model")}
    split = of_study.data.splits.get("train") if of_study and not changed else None
    rows = of_study.data.rows_of("train") if of_study else None
    tokens = split.tokens.get(str(name)) if split else None
    are = "the study's, without padding, of which the hours count none"
    return Lengths(rows, tokens, tokens, are, "the study's data") if rows and tokens else None


def work(composed: Composed, planner: Planner, gpu: Gpu | None, gpus: int, lengths: Lengths | None) -> Work:
    """Estimate the work of a config's training.

    Args:
        composed: the config.
        planner: its planned step.
        gpu: the GPU, if there is one.
        gpus: their number.
        lengths: counts of the rows; without them every row counts as a full one.
    """
    config = composed.config
    length, packs = steps.length_of(config), bool(config.get("sample_packing"))
    lengths = lengths or _full(composed, length)
    rows = lengths.rows if lengths else None
    if lengths and not packs:
        length = round(lengths.padded / lengths.rows)
    tokens, tokens_are = (lengths.tokens, lengths.are) if lengths else (None, "")
    all_steps = datafiles.steps_of(config, rows, gpus)
    epochs = float(config.get("num_epochs") or 1)
    if all_steps and config.get("max_steps"):  # it wins over the epochs
        taken = all_steps * datafiles.effective_batch(config) * gpus
        if packs:  # of sequences, each with several rows
            tokens, epochs, tokens_are = length, taken, FULL
        elif rows:
            epochs = taken / rows
    tokens = round(tokens * epochs) if tokens else None
    per_token = flops_of_token(planner, length) * (lengths.padded / lengths.tokens if lengths else 1)
    rate = gpu.tflops * 1e12 * UTILIZATION * gpus / per_token if gpu and gpu.tflops else None
    hours = tokens / rate / 3600 if tokens and rate else None
    rows_are = lengths.rows_are if lengths else ""
    return Work(rows, rows_are, tokens, tokens_are, all_steps, per_token, rate, hours)


def _full(composed: Composed, length: int) -> Lengths | None:
    """Upper bound for rows of which only the number is known, from the data or the study."""
    rows, rows_are = datafiles.training_rows(composed.config), "the config's data"
    of_study = study.of(composed.origin or composed.recipe)
    others = any(change.key.startswith(("datasets", "val_set_size")) for change in composed.from_origin)
    if rows is None and of_study and not others:
        rows, rows_are = of_study.data.rows_of("train"), "the study's data"
    return Lengths(rows, rows * length, rows * length, FULL, rows_are) if rows else None


def flops_of_token(planner: Planner, length: int) -> float:
    """Floating-point operations of a training step for one token of a full row.

    A matrix takes 2 for each of its weights forward, as much for the gradient of its input, and again as much for its
    own where it is trained; the head's matrix counts, the embedding's not. Attention takes, in each layer, 4 times
    its width times the tokens before, on average half the length, forward, and twice that backward. With
    checkpointing all of it is computed forward once more. LoRA's matrices are trained ones.
    """
    sizes = planner.memory.sizes
    again = bool(planner.step.checkpointing)
    passes = 0.0
    for kind, count in planner.memory.parameters.items():
        if kind in ("norm", "embed_tokens", "vision_tower"):
            continue
        passes += 2 * count["frozen"] * (2 + again) + 2 * count["trainable"] * (3 + again)
    head = planner.memory.parameters.get("lm_head", {})
    if sum(head.values()) < sizes["vocabulary"] * sizes["width"]:  # the embedding's matrix is the head's too
        passes += 2 * sizes["vocabulary"] * sizes["width"] * (2 + again + (planner.step.adapter is None))
    attention = 4 * sizes["attention_width"] * length / 2 * sizes["layers"]
    return passes + attention * (3 + again)
