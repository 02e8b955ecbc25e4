"""Training work of a config: tokens, steps, floating-point operations and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..base.errors import UserError
from ..check import check
from ..config import datafiles, keys, models
from ..config.compose import Composed
from ..config.gpus import Gpu
from ..config.training_settings import TrainingSettings
from ..data import studies
from ..data.studies import Study
from .step_plan import StepPlan

UTILIZATION = 0.3
"""Assumed share of the GPU's peak rate."""


class TokenCount(StrEnum):
    """Origin of a number of tokens, in words for tables and JSON."""

    UNKNOWN = ""
    COUNTED = "counted, without padding"
    DECLARED = "declared by the study, without padding; the hours also ignore padding"
    UPPER_BOUND = "every row counted at full length"


@dataclass(frozen=True)
class Lengths:
    """Counts of rows and tokens per epoch, all above 0.

    Attributes:
        rows: number of training rows; a preference pair is one.
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

    @property
    def mean(self) -> int:
        """Mean number of tokens of a row, with padding."""
        return round(self.padded / self.rows)


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
    def full_rows(self) -> bool:
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
        if not datafiles.present_files(dataset.entry):
            raise UserError(f"--all-rows: {dataset.key}: its rows are not on this machine; leave --all-rows out")
    sizes, padding = check.training_lengths(composed, force)
    if not sizes:
        raise UserError("--all-rows: sequence_len and val_set_size leave no training rows; leave --all-rows out")
    tokens = sum(sizes)
    return Lengths(len(sizes), tokens, round(tokens / (1 - padding)), TokenCount.COUNTED)


def published(composed: Composed) -> Lengths | None:
    """Row and token counts declared by a study for the model's tokenizer; None if a change affects the rows.

    The counts also apply to an ungated copy of the model, because it has the same tokenizer.
    """
    study = studies.study_of(composed.origin)
    if study is None or any(keys.affects(change.key) == "rows" for change in composed.from_origin):
        return None
    model = str(models.original(composed.config["base_model"]))
    name = _training_split(composed, study)
    split = study.data.splits.get(name)
    rows = study.data.rows_of(name)
    tokens = split.tokens.get(model) if split else None
    if not rows or not tokens:
        return None
    return Lengths(rows, tokens, tokens, TokenCount.DECLARED, "the study's data")


def work(composed: Composed, step_plan: StepPlan, gpu: Gpu | None, gpus: int, lengths: Lengths | None) -> Work:
    """Estimate the training work of a config.

    Args:
        composed: the config.
        step_plan: plan of the config's step.
        gpu: the GPU, if known.
        gpus: number of GPUs.
        lengths: counts of rows and tokens; without them every row counts at full length.
    """
    settings = TrainingSettings.of(composed.config)
    answers = 2 if step_plan.pair_loss else 1
    lengths = lengths or _full(composed, answers * settings.sequence_len)
    tokens, origin = _tokens_of_training(settings, lengths, gpus)
    if lengths is None:
        rows, rows_are = None, ""
        per_token = flops_of_token(step_plan, settings.sequence_len)
    else:
        rows, rows_are = lengths.rows, lengths.rows_are
        length = settings.sequence_len if settings.sample_packing else lengths.mean // answers
        per_token = flops_of_token(step_plan, length) * (lengths.padded / lengths.tokens)
    rate = gpu.tflops * 1e12 * UTILIZATION * gpus / per_token if gpu and gpu.tflops else None
    hours = tokens / rate / 3600 if tokens and rate else None
    return Work(rows, rows_are, tokens, origin, settings.steps(rows, gpus), per_token, rate, hours)


def _tokens_of_training(
    settings: TrainingSettings, lengths: Lengths | None, gpus: int
) -> tuple[int | None, TokenCount]:
    """Number of tokens in all epochs or steps, and the origin of the count."""
    rows = settings.max_steps * settings.rows_per_step * gpus
    if settings.max_steps and settings.sample_packing:  # each row of a step is a full sequence
        return settings.sequence_len * rows, TokenCount.UPPER_BOUND
    if lengths is None:
        return None, TokenCount.UNKNOWN
    epochs = rows / lengths.rows if settings.max_steps else settings.num_epochs
    return round(lengths.tokens * epochs), lengths.origin


def _full(composed: Composed, length: int) -> Lengths | None:
    """Upper bound of the counts, from the row count of the data or study."""
    rows, rows_are = datafiles.training_rows(composed.config), "the config's data"
    if rows is None:
        rows, rows_are = _declared_rows(composed), "the study's data"
    if not rows:
        return None
    return Lengths(rows, rows * length, rows * length, TokenCount.UPPER_BOUND, rows_are)


def _declared_rows(composed: Composed) -> int | None:
    """Row count declared by the study; None if the config trains on other rows than its recipe."""
    study = studies.study_of(composed.origin)
    if study is None or any(change.key.startswith(("datasets", "val_set_size")) for change in composed.from_origin):
        return None
    return study.data.rows_of(_training_split(composed, study))


def _training_split(composed: Composed, study: Study) -> str:
    """Split on which a config trains: the pairs, if the study has them beside other rows."""
    if composed.config.get("rl") and "train_pairs" in study.data.splits:
        return "train_pairs"
    return "train"


def flops_of_token(step_plan: StepPlan, length: int) -> float:
    """Floating-point operations per token of a training step on rows of `length` tokens.

    Each weight costs 2 operations forward, 2 for the input gradient and, if trained, 2 for the weight gradient. LoRA
    weights are trained. The output head counts; the embedding does not. In each layer, attention costs 4 * width *
    length / 2 forward (a token sees half the row on average), and twice as much backward. Checkpointing repeats the
    forward pass, and DPO's reference has one of its own, unless it is precomputed.
    """
    step, sizes, parameters = step_plan.step, step_plan.memory.sizes, step_plan.memory.parameters
    forward = 2 if step.checkpointing else 1  # number of forward passes
    if step_plan.pair_loss and step_plan.pair_loss.has_reference_pass:
        forward += 1
    operations = 0.0
    for kind, count in parameters.items():
        if kind not in ("norm", "embed_tokens", "vision_tower"):
            operations += 2 * count["frozen"] * (forward + 1) + 2 * count["trainable"] * (forward + 2)
    head = sizes["vocabulary"] * sizes["width"]
    if sum(parameters.get("lm_head", {}).values()) < head:  # tied to the embedding, at most with LoRA weights
        backward = 1 if step.adapter else 2
        operations += 2 * head * (forward + backward)
    attention = 4 * sizes["attention_width"] * length / 2 * sizes["layers"]
    return operations + attention * (forward + 2)
