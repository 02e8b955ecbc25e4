"""Reference engine: transformers, the base model quantized as in training, in batches of rows of about one length."""

import gc
import hashlib
from collections.abc import Container, Iterator, Sequence
from copy import deepcopy
from itertools import batched, groupby
from pathlib import Path
from typing import Any

import orjson
import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ..base import paths
from ..base.errors import UserError, WorkFailed
from ..base.files import embedding_rows, tensor_shapes
from ..base.machine import make_once
from ..base.progress import say
from .evaluations import ADAPTER, Completion
from .prompter import Prompter

disable_progress_bar()

# Of a batch, unless another number is asked for. Weights are read, and in 4 bit dequantized, once a token for all rows
# of a batch; beyond some dozens that is little, and rows that have ended wait for those that have not.
MOST_ROWS = 64
# The most rows and tokens of a batch of large models on a CPU, where arithmetic takes the time and larger ones are not
# faster, and of samples, whose seeds are those of their batches: they are not to depend on how much memory there is.
FIXED = 16, 8192

# Bytes of memory below which a model is small on a CPU, as those of rehearsals are. Its weights are dequantized once,
# unless a config has its 4-bit layers compute in another dtype: doing so for each token is slower, and bitsandbytes'
# kernel for CPUs rounds to bf16, with answers that depend on how many rows are computed at once.
SMALL = 4e9
# The most bytes of keys and values of a small model's batch on a CPU, as far as a quarter of the free memory has room
# for them.
SMALL_CACHE = 1_000_000_000


class Reference:
    """An `Engine`: a run's base model, quantized as in training, with or without an adapter.

    Args:
        prompter: the run's, with the settings of model, adapter and decoding.
    """

    def __init__(self, prompter: Prompter):
        self.prompter = prompter
        self.settings = settings = prompter.settings
        self.tokenizer = prompter.tokenizer
        self.model = base_model(prompter)
        self.device = self.model.device
        dtype = getattr(torch, settings.dtype)
        small = self.device.type == "cpu" and self.model.num_parameters() * dtype.itemsize < SMALL
        how = prompter.quantization
        if small and how and how.load_in_4bit and how.bnb_4bit_compute_dtype == dtype:
            self.model = self.model.dequantize(dtype=dtype)
        self.model.generation_config = GenerationConfig()  # the model's own decodes in its own way
        grow_embedding(self.model, len(self.tokenizer), settings.adapter if settings.adapter_sha256 else None)
        if settings.adapter_sha256:
            self.model = with_adapter(self.model, settings.adapter)
        self.model.eval()
        by_memory = (small or self.device.type == "cuda") and not settings.decoding.do_sample
        if settings.batch_tokens is None and by_memory:
            self.settings = settings.model_copy(update={"batch_tokens": self._room()})

    def decoding(self) -> GenerationConfig:
        """Decoding of the settings, and of the model's own only the tokens that end an answer."""
        decoding = self.settings.decoding
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        return GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=decoding.do_sample,
            eos_token_id=sorted(self.prompter.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if decoding.do_sample else {}),
        )

    def _room(self) -> int:
        """Tokens in a batch, by the memory for their keys and values; each beam of a row has its own.

        That is half of a GPU's free memory, as a pass needs the other half, or `SMALL_CACHE` on a CPU. A power of two,
        so that a resumed evaluation mostly has the same number.
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
        """See `Engine`.

        Batches do not depend on the rows done: in half precision an answer can depend on the other rows of its batch.
        One that does not fit the GPU's memory is halved.

        Raises:
            WorkFailed: not even a row fits.
        """
        lengths = [len(prompt) + self.settings.decoding.max_new_tokens for prompt in prompts]
        most, tokens = MOST_ROWS, self.settings.batch_tokens
        if tokens is None or self.settings.decoding.do_sample:
            most, tokens = FIXED
        fits = most = self.settings.batch_size or most
        for number, (room, batch) in enumerate(batches(lengths, most, tokens)):
            waiting = [] if all(i in done for i in batch) else [list(part) for part in batched(batch, fits)][::-1]
            while waiting:
                part = waiting.pop()
                try:
                    answers = self.answers([prompts[i] for i in part], number)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise WorkFailed(f"a row of up to {room} tokens does not fit the GPU's memory") from None
                    say(f"{len(part)} rows of up to {room} tokens do not fit the GPU's memory; they are halved")
                    fits = len(part) // 2
                    waiting += [list(half) for half in batched(part, fits)][::-1]
                    continue
                texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
                yield {i: Completion(text.strip(), ids) for i, text, ids in zip(part, texts, answers, strict=True)}

    @torch.inference_mode()
    def answers(self, prompts: Sequence[list[int]], number: int) -> list[list[int]]:
        """Tokens of one answer per prompt, independent of the batches before; without padding.

        Args:
            prompts: the tokens of each.
            number: the batch's number, which is added to the seed where the decoding samples.
        """
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        set_seed(self.settings.decoding.seed + number)
        output = self.model.generate(**batch, generation_config=self.decoding())
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        ends = self.prompter.ends
        return [answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), None)] for answer in answers]

    def free(self) -> None:
        """Free its memory for another engine; it cannot be used afterwards."""
        del self.model
        gc.collect()
        torch.cuda.empty_cache()


def batches(lengths: Sequence[int], most: int, tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Divide rows into batches, the longest first: too little memory shows at once.

    Rows of about the same room are together, so that little of a batch is padding.

    Args:
        lengths: for each row the tokens of its prompt and of the longest answer.
        most: the most rows in a batch.
        tokens: the most tokens in one of several rows.

    Yields:
        The room, a power of two of tokens, and the positions of the rows.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for room, same in groupby(by_length, key=lambda i: max(1 << (lengths[i] - 1).bit_length(), 256)):
        for batch in batched(same, max(min(most, tokens // room), 1)):
            yield room, list(batch)


def base_model(prompter: Prompter) -> Any:
    """Load a run's base model, configured and quantized as in training, on the GPU if there is one."""
    settings = prompter.settings
    return AutoModelForCausalLM.from_pretrained(
        settings.base_model,
        config=deepcopy(prompter.config),  # the model's has more than was asked for
        revision=prompter.revision,
        trust_remote_code=prompter.remote_code,
        dtype=getattr(torch, settings.dtype),
        quantization_config=prompter.quantization,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        attn_implementation=prompter.cfg.get("attn_implementation"),
    )


def with_adapter(model: Any, folder: str) -> Any:
    """Put all of an adapter on a model's layers.

    Raises:
        UserError: the adapter has weights for layers that the model lacks, lacks some of its own layers, or changes
            nothing. PEFT only warns.
    """
    from peft import PeftModel, get_peft_model_state_dict

    file = Path(folder, ADAPTER)
    saved = (tensor_shapes(file) or {}).keys()
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:  # of other shapes, or of layers that the model lacks
        raise UserError(f"{file}: not this model's adapter: {str(error).strip().partition('\n')[0]}") from error
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    every = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    for problem, names in (("layers that the model lacks", saved - every), ("no weights for", own.keys() - saved)):
        if names:
            some = f"{min(names)}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            raise UserError(f"{file}: not this model's adapter: {problem}: {some}; name the model's own with --adapter")
    changes = [tensor for name, tensor in own.items() if "lora_B" in name or "lora_embedding_B" in name]
    if changes and not any(tensor.any() for tensor in changes):
        raise UserError(f"{file}: changes nothing: LoRA's B is 0 in every layer; evaluate one that was trained")
    return adapted


def grow_embedding(model: PreTrainedModel, tokens: int, adapter: str | None) -> None:
    """Give a base model's embedding as many rows as it was trained with, if it has fewer.

    Axolotl adds rows for tokens that a config adds to the tokenizer (loaders/model.py); PEFT saves them with the
    adapter, but does not add them when it loads the adapter.

    Args:
        model: the base model.
        tokens: number of tokens of the training's tokenizer.
        adapter: the adapter's folder; None for the base model alone.
    """
    saved = embedding_rows(Path(adapter) / ADAPTER) if adapter else None
    if (rows := saved or tokens) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows)


def base_weights(prompter: Prompter) -> dict[str, Any]:
    """Identity of the weights of the run's base model: revision, files, quantization and config."""
    settings = prompter.settings
    return {
        "model": settings.base_model,
        "revision": getattr(prompter.config, "_commit_hash", None) or prompter.revision,
        "files": sorted(
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in Path(settings.base_model).glob("*.*")
        ),
        "kinds": prompter.quantization.to_diff_dict() if prompter.quantization else None,
        "config": settings.built_with,
        "dtype": settings.dtype,
    }


def weights_folder(prompter: Prompter) -> Path:
    """Folder of the run's base model, quantized as in training and dequantized to the settings' dtype.

    At each step a 4-bit layer does the same, unless `bnb_4bit_compute_dtype` is another, so that both compute with
    identical weights. The folder is made once, in the cache, as large as the base model in 16 bit.

    Raises:
        OSError: the disk is full.
    """
    settings, model = prompter.settings, Path(prompter.settings.base_model)
    digest = hashlib.sha256(orjson.dumps(base_weights(prompter), option=orjson.OPT_SORT_KEYS)).hexdigest()
    made = paths.cache() / f"dequantized-{model.name}-{digest[:16]}"

    def make(target: Path) -> None:
        say(f"dequantizing {model.name}, once, in {made}")
        base_model(prompter).dequantize(dtype=getattr(torch, settings.dtype)).save_pretrained(target)
        prompter.config.save_pretrained(target)  # as it was: the model's has what was asked for beside it
        gc.collect()
        torch.cuda.empty_cache()  # the engine needs it

    return make_once(made, make)
