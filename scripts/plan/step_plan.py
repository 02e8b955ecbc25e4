"""Built-in or cached memory of a training step, and memory of a config on each GPU.

Reading a built-in or cached step does not import torch.
"""

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..base import paths
from ..base.errors import UserError, with_type
from ..base.files import digest, read_json, write_json
from ..base.hardware import GIB
from ..base.yamlfiles import Config
from ..config import models
from ..config.gpus import Gpu, parallelism_of
from ..config.numerics import attention, precision
from ..config.training_settings import TrainingSettings
from . import allocator, steps
from .allocator import Counts, Shape, Usage, rounded
from .steps import PairLoss, Step

VERSION = 3
"""Version of the built-in and cached figures; raise it when the computation changes."""
BUILT_IN = Path(__file__).with_name("plans.json")
"""Memory of the built-in recipes' steps, by `StepPlan.key`; tools/plans.py writes it."""
CONTEXT = 0.14 * GIB
"""Memory of the CUDA context: 133 to 147 MiB in fitcheck's published runs on a T4 (process minus allocator)."""
ROUND = 64
"""Planned lengths are multiples of this number of tokens, Axolotl's default padding."""
USABLE = 14.5 / 16
"""Usable share of GPU memory.
Of 16 GB, torch finds 14.56 GiB on a T4 (ECC takes the rest) and 15.56 GiB on a Quadro RTX 5000. A display, allocator
losses and the driver need room too."""


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that build models, tokenize rows and train, without a build's tag such as +cu126."""
    names = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "axolotl")
    return {name: version(name).partition("+")[0] for name in names}


@cache
def built_in() -> dict[str, Any]:
    """Built-in figures by key; empty for a damaged file."""
    return read_json(BUILT_IN).get("plans", {})


@dataclass(frozen=True)
class Memory:
    """Memory of a step in bytes, and counts from the trace.

    Attributes:
        usage: memory peaks of the step.
        paged: optimizer state that can leave the GPU.
        parameters, sizes: see `MemoryTrace`.
    """

    usage: Usage
    paged: int
    parameters: Counts
    sizes: dict[str, int]

    def total(self, kind: str) -> int:
        """Number of `frozen` or `trainable` parameters."""
        return sum(count[kind] for count in self.parameters.values())


@dataclass
class StepPlan:
    """Planned memory of one training step.

    Attributes:
        step: the step.
        rows: rows per micro batch; a preference pair has two.
        length: maximum number of tokens per row.
        evaluation: rows and tokens per row of an evaluation batch, if it can need more memory than a micro batch.
        pair_loss: the loss on preference pairs.
    """

    step: Step
    rows: int
    length: int
    evaluation: Shape | None = None
    pair_loss: PairLoss | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the model input that Axolotl makes, with the length rounded up."""
        if self.step.flat:
            return 1, rounded(self.rows * self.length, ROUND)
        return self.rows, rounded(self.length, ROUND)

    @property
    def key(self) -> str:
        """Hash of the step, its shapes, package versions and `VERSION`."""
        optional: list[Any] = [self.evaluation] if self.evaluation else []
        if self.pair_loss:
            optional.append(asdict(self.pair_loss))
        return digest([VERSION, packages(), asdict(self.step), self.shape, *optional])[:24]

    @property
    def file(self) -> Path:
        """Cache file."""
        return paths.cache() / "plans" / f"{self.key}.json"

    @cached_property
    def stored(self) -> Memory | None:
        """Memory from a built-in or an earlier plan, or None."""
        with suppress(KeyError, TypeError):  # missing or damaged file
            content = built_in().get(self.key) or read_json(self.file)
            return Memory(**content | {"usage": Usage(**content["usage"])})
        return None

    @cached_property
    def memory(self) -> Memory:
        """Memory of the step, from a built-in plan, the cache or a new trace.

        Raises:
            UserError: the step cannot be traced.
        """
        if self.stored:
            return self.stored
        memory = self.traced()
        with suppress(OSError):
            write_json(self.file, asdict(memory))
        return memory

    @property
    def required(self) -> float:
        """Required bytes: peak reserved memory of training and evaluation, plus the CUDA context."""
        return self.memory.usage.reserved + self.more_in_evaluation + CONTEXT

    @property
    def more_in_evaluation(self) -> int:
        """Bytes that evaluation reserves in addition to training."""
        return max(self.memory.usage.evaluation - self.memory.usage.reserved, 0)

    def traced(self) -> Memory:
        """Memory of the step, from a new trace.

        Raises:
            UserError: the step cannot be traced.
        """
        from ..base.hub import importing_axolotl, without

        with importing_axolotl():
            with without("sklearn", "torchao"):
                from .fake_step import trace

            logging.disable(logging.CRITICAL)  # otherwise torch logs a traceback
            try:
                traced = trace(self.step, self.shape, self.evaluation, self.pair_loss)
            except Exception as error:  # the trace runs model code, which can raise anything
                problem = shorten(with_type(error), 200)
                raise UserError(f"this model and adapter cannot be planned: {problem}") from None
        return Memory(allocator.usage(traced), traced.paged, traced.parameters, traced.sizes)


def plan_step(config: Config, gpu: Gpu | None, download: bool = True) -> tuple[StepPlan, list[str]]:
    """StepPlan of a config's step, and notes on settings that it does not trace.

    Args:
        config: the config.
        gpu: the GPU; None selects the oldest GPU generation that supports the config.
        download: allow fetching the model's config.json from the hub.
    """
    capability = gpu.capability if gpu else least_capability(config)
    step, notes = steps.step_of(config, models.architecture(config, download), capability)
    settings, pair_loss = TrainingSettings.of(config), PairLoss.of(config)
    rows, evaluation = settings.micro_batch_size, _evaluation(config, settings)
    if pair_loss:
        rows *= 2
    return StepPlan(step, rows, settings.sequence_len, evaluation, pair_loss), notes


def _evaluation(config: Config, settings: TrainingSettings) -> Shape | None:
    """Rows and tokens per row of an evaluation batch; None if it has at most those of a micro batch.

    Only rows of test_datasets can be longer than sequence_len (axolotl/utils/data/sft.py); pad_to_sequence_len pads
    them to a multiple of it (core/builders/causal.py). Preference pairs can not, and are not padded to it
    (utils/data/rl.py). A batch without gradients needs less memory than a micro batch of the same shape.
    """
    if config.get("eval_strategy") == "no" or not (settings.val_set_size or config.get("test_datasets")):
        return None
    rows, length = settings.eval_batch_size, settings.sequence_len
    if config.get("rl"):
        return (2 * rows, rounded(length, ROUND)) if rows > settings.micro_batch_size else None
    if config.get("test_datasets"):
        length = settings.eval_sequence_len
    if rows <= settings.micro_batch_size and length <= settings.sequence_len:
        return None
    if config.get("pad_to_sequence_len"):
        length = rounded(length, settings.sequence_len)
    return rows, rounded(length, ROUND)


def required_gib(config: Config, gpu: Gpu | None = None, trace: bool = False, gpus: int = 1) -> float | None:
    """GiB that a config's training needs on each GPU; None if no plan is built in or cached.

    Args:
        config: the config.
        gpu: see `plan_step`.
        trace: make a plan if none is built in or cached.
        gpus: number of GPUs.

    Raises:
        UserError: planning does not support the config.
    """
    step_plan, _ = plan_step(config, gpu, download=trace)
    if not step_plan.stored and not trace:
        return None
    return (needed_per_gpu(step_plan, config, gpus) - step_plan.more_in_evaluation) / GIB


def needed_per_gpu(step_plan: StepPlan, config: Config, gpus: int) -> float:
    """Bytes that a config needs on each of its GPUs, under its parallelism."""
    return bytes_by_parallelism(step_plan, gpus).get(parallelism_of(config), step_plan.required)


@dataclass(frozen=True)
class Loading:
    """Main memory for loading a model: bytes in each of some processes."""

    size: float
    processes: int


def loading(step_plan: StepPlan, config: Config, gpus: int) -> Loading:
    """Main memory that the training processes need to load the model, without the mapped files; from source code.

    transformers maps safetensors files into memory. It copies one tensor at a time to the GPU if it quantizes, and
    otherwise four (GLOBAL_WORKERS in core_model_loading.py); the embedding is the largest. It ignores
    low_cpu_mem_usage. Under ZeRO-3 and FSDP, Axolotl loads the weights into main memory (axolotl/loaders/model.py):
    with cpu_ram_efficient_loading in one process only, and without it QLoRA's under FSDP go to the GPU.
    """
    step, memory = step_plan.step, step_plan.memory
    parallelism = parallelism_of(config)
    weights = sum(memory.usage.parts.get(kind, 0) for kind in WEIGHTS)
    if parallelism == "FSDP" and config["fsdp_config"].get("cpu_ram_efficient_loading"):
        return Loading(weights, 1)
    if parallelism == "ZeRO-3" or (parallelism == "FSDP" and not step.is_quantized):
        return Loading(weights, gpus)
    tensors = 1 if step.is_quantized else 4
    return Loading(tensors * memory.sizes["vocabulary"] * memory.sizes["width"] * _bytes_of_weight(step), gpus)


WEIGHTS = ("base weights", "quantization constants", "embeddings and head")
"""Kinds of memory that hold the base model."""


def least_capability(config: Config) -> tuple[int, int]:
    """Lowest compute capability for a config: Turing, or Ampere for bf16 and FlashAttention."""
    newer = precision(config, on_gpu=True).weights == "bfloat16" or attention(config) == "flash_attention_2"
    return (8, 0) if newer else (7, 5)


def bytes_by_parallelism(step_plan: StepPlan, gpus: int) -> dict[str, float]:
    """Required bytes on each of several GPUs, by parallelism, derived from one GPU's peak; empty for one GPU.

    DDP keeps a second copy of the gradients in buckets.

    DeepSpeed's ZeRO (arXiv 1910.02054) holds trained weights and gradients in 16 bits, or without mixed precision in
    fp32. The optimizer works on large partitions of a copy in fp32. So bitsandbytes' 8-bit state has no exceptions in
    fp32, which it otherwise makes for embeddings and small tensors. Stage 1 shards this copy and the state, stage 2
    also the gradients, stage 3 also all weights.

    FSDP shards everything. Axolotl's fsdp2_prepare_model keeps the dtype of trained weights, and Adam's state has the
    same dtype; bitsandbytes' optimizers do not work. Under QLoRA, embeddings and head are in fp32
    (should_convert_embedding_dtypes in axolotl/loaders/model.py).

    Stage 3 and FSDP gather one layer or embedding at a time. None of them shards activations and logits. A second
    model for the reference counts in full on each GPU. The estimate ignores all other buffers.
    """
    if gpus == 1:
        return {}
    step, memory = step_plan.step, step_plan.memory
    parts = Counter(memory.usage.parts)  # 0 for kinds that the step lacks
    trained, embeddings = memory.total("trainable"), parts["embeddings and head"]
    weights = parts["base weights"] + parts["quantization constants"] + embeddings
    frozen = weights if step.adapter else 0
    rest = step_plan.required - weights - parts["adapters"] - parts["gradients"] - parts["optimizer"]
    in_zero = trained * (2 if step.autocast else 4)
    copies = (4 * trained + _state_under_zero(step_plan)) / gpus
    largest_layer = max((frozen + in_zero) / memory.sizes["layers"], embeddings)
    gathered = largest_layer * (1 - 1 / gpus)
    in_fsdp, upcast = _trained_under_fsdp(step_plan), _upcast_under_fsdp(step_plan)
    required = {"DDP": step_plan.required + parts["gradients"]}
    required["ZeRO-1"] = rest + frozen + 2 * in_zero + copies
    required["ZeRO-2"] = rest + frozen + in_zero + in_zero / gpus + copies
    required["ZeRO-3"] = rest + (frozen + 2 * in_zero) / gpus + copies + gathered
    required["FSDP"] = rest + (frozen + upcast + 4 * in_fsdp) / gpus + gathered  # weights, gradients, two states
    return required


def _state_under_zero(step_plan: StepPlan) -> float:
    """Bytes of optimizer state under ZeRO, in all shards together."""
    optimizer, trained = step_plan.step.optimizer, step_plan.memory.total("trainable")
    if "torch" in optimizer:
        return 8 * trained
    if "paged" in optimizer:
        return step_plan.memory.usage.parts.get("optimizer", 0)
    return trained * (2 + 2 * 4 / 256)  # two bytes, and an fp32 constant each for 256 of them


def _trained_under_fsdp(step_plan: StepPlan) -> float:
    """Bytes of the trained weights under FSDP, in all shards together."""
    trained, memory = step_plan.memory.total("trainable"), step_plan.memory
    if step_plan.step.adapter == "lora":
        return memory.usage.parts.get("adapters", 0)
    if step_plan.step.adapter == "qlora":
        return 4 * trained
    return _bytes_of_weight(step_plan.step) * trained


def _upcast_under_fsdp(step_plan: StepPlan) -> float:
    """Bytes that embeddings and head take in fp32 under FSDP, beyond those in the dtype of the weights."""
    if step_plan.step.adapter != "qlora":
        return 0
    embeddings = step_plan.memory.usage.parts.get("embeddings and head", 0)
    return embeddings * (4 / _bytes_of_weight(step_plan.step) - 1)


def _bytes_of_weight(step: Step) -> int:
    return 4 if step.weights == "float32" else 2
