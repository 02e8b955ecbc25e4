"""Reference engine: transformers, with the base model quantized as in training."""

import gc
from collections.abc import Container, Iterator, Sequence, Set
from copy import deepcopy
from functools import partial
from itertools import batched, groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, set_seed
from transformers.utils.logging import disable_progress_bar

from ..base import paths
from ..base.errors import UserError, WorkFailed, first_line
from ..base.files import digest, embedding_rows, tensor_shapes
from ..base.processes import make_once
from ..base.terminal import say
from .prompter import Prompter
from .scores_file import ADAPTER
from .settings import Completion, Engine, until_end

disable_progress_bar()

# Default maximum number of rows in a batch. For each token, the weights are read (and in 4 bit
# dequantized) once per batch. More than a few dozen rows gain little, and finished rows wait for unfinished ones.
MOST_ROWS = 64
# Maximum numbers of rows and tokens in a batch, for large models on a CPU and for sampling. Large models on a CPU are
# bound by arithmetic, so larger batches are not faster. Sampling is seeded per batch, so batches must not depend on the
# available memory.
FIXED = 16, 8192

# Maximum size in bytes of a small model on a CPU. A small model is dequantized once, unless the dtype of its 4-bit
# layers' computations differs from the model's dtype. Dequantizing for each token would be slower. On a CPU
# with AVX512-BF16, that would also round to bf16, and answers would depend on the number of rows in a batch.
SMALL = 4e9
# Maximum size in bytes of a batch's keys and values, for a small model on a CPU. The maximum is a quarter of
# the free memory if that is less.
SMALL_CACHE = 1_000_000_000


# Attention that only Axolotl has, for speed in training. Predictions use the default instead.
OF_AXOLOTL = ("fp8", "sage", "varlen", "xformers")


class TransformersEngine(Engine):
    """`Engine` in this process: base model, with or without an adapter.

    Args:
        prompter: prompter of the run, with settings of model, adapter and decoding.
    """

    def __init__(self, prompter: Prompter):
        self.prompter = prompter
        settings = prompter.settings
        self.settings = settings
        self.ends = prompter.ends
        self.tokenizer = prompter.tokenizer
        self.model = base_model(prompter, getattr(torch, settings.dtype), prompter.quantization)
        self.device = self.model.device
        dtype = getattr(torch, settings.dtype)
        is_small = self.device.type == "cpu" and self.model.num_parameters() * dtype.itemsize < SMALL
        if is_small and _computes_in(prompter.quantization, dtype):
            self.model = self.model.dequantize(dtype=dtype)
        # The model's published config would change the decoding. The harness ends answers by this config.
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends)
        self._add_adapter()
        fits_batches_to_memory = (is_small or self.device.type == "cuda") and not settings.decoding.do_sample
        if settings.batch_tokens is None and fits_batches_to_memory:  # a resumed evaluation keeps its batches
            self.settings = settings.model_copy(update={"batch_tokens": self._room()})

    def _add_adapter(self) -> None:
        """Add the adapter, if any, and embeddings for tokens that training added.

        Axolotl adds rows for tokens that a config adds to the tokenizer (loaders/model.py). PEFT saves these rows with
        the adapter, but does not add rows to the model when it loads the adapter.
        """
        rows = len(self.tokenizer)
        if self.settings.adapter_sha256:
            rows = embedding_rows(Path(self.settings.adapter) / ADAPTER) or rows
        if rows > len(self.model.get_input_embeddings().weight):
            self.model.resize_token_embeddings(rows)
        if self.settings.adapter_sha256:
            self.model = with_adapter(self.model, self.settings.adapter)
        self.model.eval()

    def decoding(self) -> GenerationConfig:
        """Decoding configuration from the settings, with the tokens that end an answer."""
        decoding = self.settings.decoding
        sampling = {}
        if decoding.do_sample:
            sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        return GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=decoding.do_sample,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )

    def _room(self) -> int:
        """Number of tokens whose keys and values fit in memory, for all beams.

        Keys and values get half of a GPU's free memory; the forward pass needs the other half. On a CPU they get up to
        `SMALL_CACHE`. The number of tokens is rounded down to a power of two, so that a resumed evaluation usually has
        the same number.
        """
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info()[0] // 2
        else:
            memory = min(SMALL_CACHE, psutil.virtual_memory().available // 4)
        model = self.prompter.config.get_text_config()
        heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        of_token = 2 * model.num_hidden_layers * heads * width * getattr(torch, self.settings.dtype).itemsize
        return 1 << max(memory // (of_token * self.settings.decoding.num_beams), 1).bit_length() - 1

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """Implement `Engine.generate`.

        In half precision, an answer can depend on the other rows of its batch. A resumed evaluation therefore repeats a
        batch as a whole if any of its answers is missing. A batch that does not fit the GPU's memory is halved.

        Raises:
            WorkFailed: a single row or a batch of sampled answers does not fit.
        """
        decoding = self.settings.decoding
        lengths = [len(prompt) + decoding.max_new_tokens for prompt in prompts]
        most_rows, most_tokens = self._batch_limits()
        fitting_rows = most_rows
        for number, (room, batch) in enumerate(batches(lengths, most_rows, most_tokens)):
            if all(i in done for i in batch):
                continue
            parts = [*batched(batch, fitting_rows)]
            while parts:
                part = parts.pop(0)
                try:
                    answers = self.answers([prompts[i] for i in part], number)
                except torch.OutOfMemoryError:
                    if len(part) == 1 or decoding.do_sample:  # halves would draw other answers
                        raise self._too_large(len(part), room) from None
                    say(f"{len(part)} rows of up to {room} tokens do not fit the GPU's memory; halving the batch")
                    fitting_rows = len(part) // 2
                    parts[:0] = batched(part, fitting_rows)
                    continue
                yield {i: Completion.of(self.tokenizer, ids) for i, ids in zip(part, answers, strict=True)}

    def _batch_limits(self) -> tuple[int, int]:
        """Maximum numbers of rows and tokens in a batch."""
        most_rows, most_tokens = MOST_ROWS, self.settings.batch_tokens
        if most_tokens is None:
            most_rows, most_tokens = FIXED
        return self.settings.batch_size or most_rows, most_tokens

    @staticmethod
    def _too_large(rows: int, tokens: int) -> WorkFailed:
        smaller = f"; run `recipe evaluate RUN --batch-size {rows // 2}`" if rows > 1 else ""
        return WorkFailed(f"{rows} x {tokens} tokens do not fit the GPU's memory{smaller}")

    @torch.inference_mode()
    def answers(self, prompts: Sequence[list[int]], number: int) -> list[list[int]]:
        """Generate one answer per prompt; return tokens without padding.

        Args:
            prompts: tokens of each prompt.
            number: batch number; added to the seed, so that sampling does not depend on earlier batches.
        """
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        set_seed(self.settings.decoding.seed + number)
        output = self.model.generate(**batch, generation_config=self.decoding())
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        return [until_end(answer, self.ends) for answer in answers]

    @torch.inference_mode()
    def log_probabilities(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of all tokens at each token of an answer, in float64, with shape (answer, vocabulary)."""
        tokens = torch.tensor([[*prompt, *answer[:-1]]], device=self.device)
        logits = self.model(input_ids=tokens).logits[0, -len(answer) :]
        return logits.double().log_softmax(-1).cpu()

    def merge(self) -> None:
        """Replace base model and adapter by the merged weights that `axolotl merge-lora` writes.

        The adapter is added in fp32, and the sums are rounded to the dtype of the base model's files. If the run
        trained with 4-bit weights, the base model's weights are first rounded to 4 bits.
        """
        self.free()
        quantization = self.prompter.quantization if self.settings.adapter_sha256 else None
        dtype = self.prompter.config.get_text_config().dtype or getattr(torch, self.settings.dtype)
        if quantization and quantization.load_in_4bit:
            self.model = base_model(self.prompter, dtype, quantization).dequantize(dtype=dtype)
        else:
            self.model = base_model(self.prompter, dtype, None)
        self._add_adapter()
        if self.settings.adapter_sha256:
            self.model = self.model.merge_and_unload()
        self._compute_in_fp32()

    def _compute_in_fp32(self) -> None:
        """Compute in fp32 from now on; a layer's weights are in fp32 only while it computes, which saves memory."""
        if "flash" in str(self.model.config._attn_implementation):  # which refuses fp32
            self.model.set_attn_implementation("sdpa")
        for layer in self.model.modules():
            layer.register_forward_pre_hook(partial(_cast, torch.float32))
            layer.register_forward_hook(partial(_cast, self.model.dtype))

    def free(self) -> None:
        """Free memory for another engine; this object is unusable afterwards."""
        del self.model
        gc.collect()
        torch.cuda.empty_cache()


def _cast(dtype: torch.dtype, layer: torch.nn.Module, *_: object) -> None:
    """Convert the weights of a layer, without those of layers inside it."""
    for weight in layer.parameters(recurse=False):
        weight.data = weight.data.to(dtype)


def batches(lengths: Sequence[int], most: int, tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Group rows into batches, longest rows first, so that insufficient memory shows at once.

    A batch holds rows of similar length, so it needs little padding.

    Args:
        lengths: number of tokens per row: its prompt and the longest allowed answer.
        most: maximum number of rows in a batch.
        tokens: maximum number of tokens in a batch of several rows.

    Yields:
        For each batch, the length in tokens of its longest row, rounded up to a power of two, and its rows' positions.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for room, same in groupby(by_length, key=lambda i: max(1 << (lengths[i] - 1).bit_length(), 256)):
        for batch in batched(same, max(min(most, tokens // room), 1)):
            yield room, list(batch)


def base_model(prompter: Prompter, dtype: torch.dtype, quantization: BitsAndBytesConfig | None) -> Any:
    """Load the base model, configured as in training."""
    settings, attention = prompter.settings, prompter.cfg.get("attn_implementation")
    return AutoModelForCausalLM.from_pretrained(
        settings.base_model,
        config=deepcopy(prompter.config),  # from_pretrained adds keys to the config
        revision=prompter.revision,
        trust_remote_code=prompter.remote_code,
        dtype=dtype,
        quantization_config=quantization,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        attn_implementation=None if attention in OF_AXOLOTL else attention,
    )


def with_adapter(model: Any, folder: str) -> Any:
    """Load an adapter onto a model; refuse partial loads, where PEFT only warns.

    Raises:
        UserError: the model lacks layers that the adapter has weights for, shapes differ, the file lacks weights for
            some of the adapter's layers, or the adapter changes nothing.
    """
    from peft import PeftModel, get_peft_model_state_dict

    file = Path(folder, ADAPTER)
    saved = (tensor_shapes(file) or {}).keys()
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:  # shapes or layers differ from the model's
        raise UserError(f"{file}: not this model's adapter: {first_line(error)}") from error
    layers = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with_embeddings = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    _require_none(file, "the model lacks", saved - with_embeddings.keys())
    _require_none(file, "the file lacks weights for", layers.keys() - saved)
    changes = [tensor for name, tensor in layers.items() if "lora_B" in name or "lora_embedding_B" in name]
    if changes and not any(tensor.any() for tensor in changes):
        raise UserError(f"{file}: changes nothing: LoRA's B is 0 in every layer; evaluate a trained adapter")
    return adapted


def _require_none(file: Path, problem: str, layers: Set[str]) -> None:
    """Raise UserError if an adapter and a model differ in some layers."""
    if layers:
        raise UserError(
            f"{file}: not this model's adapter: {problem}: {min(layers)}; name another adapter with --adapter"
        )


def base_weights(prompter: Prompter) -> dict[str, Any]:
    """Identity of the base model's weights: revision, files, quantization and config."""
    settings, quantization = prompter.settings, prompter.quantization
    files = []
    for file in Path(settings.base_model).glob("*.*"):
        state = file.stat()
        files.append((file.name, state.st_size, state.st_mtime_ns))
    return {
        "model": settings.base_model,
        "revision": getattr(prompter.config, "_commit_hash", None) or prompter.revision,
        "files": sorted(files),
        "kinds": quantization.to_diff_dict() if quantization else None,
        "config": settings.built_with,
        "dtype": settings.dtype,
    }


def _computes_in(quantization: BitsAndBytesConfig | None, dtype: torch.dtype) -> bool:
    """True if 4-bit layers compute in a dtype."""
    if quantization is None or not quantization.load_in_4bit:
        return False
    return bool(quantization.bnb_4bit_compute_dtype == dtype)


def weights_folder(prompter: Prompter) -> Path:
    """Folder of the base model, quantized as in training and then dequantized.

    A 4-bit layer dequantizes its weights at each step. The folder holds the same dequantized weights; only if
    `bnb_4bit_compute_dtype` differs from `EvaluationSettings.dtype` are they rounded differently. The folder is created
    once, in the cache, and is as large as the base model without quantization.

    Raises:
        OSError: the disk is full.
    """
    settings, model = prompter.settings, Path(prompter.settings.base_model)
    folder = paths.cache() / f"dequantized-{model.name}-{digest(base_weights(prompter))[:16]}"

    def make(target: Path) -> None:
        say(f"dequantizing {model.name} once, to {folder}")
        dtype = getattr(torch, settings.dtype)
        base_model(prompter, dtype, prompter.quantization).dequantize(dtype=dtype).save_pretrained(target)
        prompter.config.save_pretrained(target)  # replaces the config.json written above, which has additional keys
        gc.collect()
        torch.cuda.empty_cache()  # vLLM needs the memory

    return make_once(folder, make)
