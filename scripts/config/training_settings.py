"""Settings of a training, read from a config with Axolotl's defaults."""

import math
from contextlib import suppress
from dataclasses import dataclass

from ..base.yamlfiles import Config
from .merging import listed


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training. Values that the schema refuses count as missing; a check reports them.

    Attributes:
        micro_batch_size: rows per micro batch on one device.
        gradient_accumulation_steps: micro batches per optimizer step.
        max_steps: number of optimizer steps, in place of `num_epochs`; 0 if not set.
        eval_batch_size: rows per batch of an evaluation on one device.
        sequence_len, eval_sequence_len: maximum number of tokens per row in training and in test_datasets.
        val_set_size: rows held out of the training data: their number, or up to 1 their share.
        adapter: qlora, lora, another adapter, or None for full fine-tuning.
        rank, dropout: of LoRA.
        targets: layers with LoRA, as in PEFT: their names, a regular expression, or all-linear.
        saved_modules: modules that are fully trained beside LoRA.
    """

    micro_batch_size: int
    eval_batch_size: int
    gradient_accumulation_steps: int
    num_epochs: float
    max_steps: int
    sequence_len: int
    eval_sequence_len: int
    sample_packing: bool
    val_set_size: float
    seed: int
    optimizer: str
    adapter: str | None
    rank: int
    dropout: float
    targets: tuple[str, ...] | str
    saved_modules: tuple[str, ...]

    @classmethod
    def of(cls, config: Config) -> "TrainingSettings":
        """Read the settings from a config. Each default is that of Axolotl 0.21, in the file of the comment."""
        micro_batch_size = _count(config, "micro_batch_size", 1)  # axolotl/utils/schemas/training.py
        sequence_len = _count(config, "sequence_len", 512)  # schemas/config.py
        return cls(
            micro_batch_size=micro_batch_size,
            eval_batch_size=_count(config, "eval_batch_size", micro_batch_size),  # axolotl/utils/config
            gradient_accumulation_steps=_count(config, "gradient_accumulation_steps", 1),  # schemas/training.py
            num_epochs=_number(config, "num_epochs", 1),  # schemas/training.py
            max_steps=_count(config, "max_steps", 0),  # schemas/config.py
            sequence_len=sequence_len,
            eval_sequence_len=_count(config, "eval_sequence_len", sequence_len),  # axolotl/utils/data/sft.py
            sample_packing=bool(config.get("sample_packing")),  # schemas/config.py
            val_set_size=_number(config, "val_set_size", 0),  # schemas/config.py
            seed=_seed(config),
            optimizer=str(config.get("optimizer") or OPTIMIZER),
            adapter=config.get("adapter") or None,  # schemas/peft.py
            rank=_count(config, "lora_r", 8),  # peft/tuners/lora/config.py
            dropout=_number(config, "lora_dropout", 0.0),  # schemas/peft.py
            targets=_targets(config),  # schemas/peft.py
            saved_modules=tuple(listed(config, "lora_modules_to_save")),  # schemas/peft.py
        )

    @property
    def rows_per_step(self) -> int:
        """Number of rows per optimizer step on one device."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    def steps(self, rows: int | None, gpus: int = 1) -> int | None:
        """Number of optimizer steps for a number of rows; None if unknown, as for packed rows.

        Axolotl counts steps in the same way (utils/trainer.py, calculate_total_num_steps).
        """
        if self.max_steps:
            return self.max_steps
        if rows is None or self.sample_packing:
            return None
        return math.ceil(rows * self.num_epochs / (self.rows_per_step * gpus))

    def rows_left(self, rows: int) -> int:
        """Number of rows that `val_set_size` leaves for training (axolotl/utils/data/sft.py)."""
        held_out = int(self.val_set_size)
        if self.val_set_size <= 1:
            held_out = math.ceil(self.val_set_size * rows)
        return max(rows - held_out, 0)


SEED = 42  # axolotl/utils/schemas/validation.py
OPTIMIZER = "adamw_torch_fused"  # axolotl/utils/schemas/training.py
KEPT_CHECKPOINTS = 4  # axolotl/core/builders/base.py


def _number(config: Config, key: str, default: float) -> float:
    value = config.get(key)
    return float(value) if isinstance(value, int | float) and value else default


def _count(config: Config, key: str, default: int) -> int:
    value = _number(config, key, default)
    return int(value) if value.is_integer() else default


def _seed(config: Config) -> int:
    with suppress(ValueError):
        return int(str(config.get("seed")))  # Axolotl takes text, too
    return SEED


def _targets(config: Config) -> tuple[str, ...] | str:
    if config.get("lora_target_linear"):
        return "all-linear"
    targets = config.get("lora_target_modules")
    return targets if isinstance(targets, str) else tuple(listed(config, "lora_target_modules"))
