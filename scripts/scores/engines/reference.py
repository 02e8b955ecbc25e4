"""The reference: transformers, with the base model quantized as in training, in batches of rows of about one length."""

from collections.abc import Container, Iterator, Sequence
from itertools import batched, groupby
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ...base.errors import WorkFailed
from ...base.files import embedding_rows
from ..evaluations import ADAPTER
from ..prompter import Prompter
from .engine import Answer

disable_progress_bar()

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # Axolotl's defaults for qlora
BATCH_TOKENS = 8192
"""The most tokens of a batch. Their keys and values take 4 GiB in a Llama 2 7B, more than in any other of the study's
models; a card of 16 GB has that beside the weights."""


class Reference:
    """An `Engine`: a run's base model, quantized as in training, with or without an adapter.

    Args:
        prompter: the run's, with the settings that say which model and adapter, and how it decodes.
    """

    served: str | None = None

    def __init__(self, prompter: Prompter):
        self.prompter = prompter
        self.settings = settings = prompter.settings
        self.tokenizer = prompter.tokenizer
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        kinds = NF4 | {"bnb_4bit_compute_dtype": dtype} | (prompter.cfg.get("bnb_config_kwargs") or {})
        self.model = AutoModelForCausalLM.from_pretrained(
            settings.base_model,
            revision=prompter.revision,
            dtype=dtype,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, **kinds) if settings.quantized else None,
            device_map=self.device,
            attn_implementation=prompter.cfg.get("attn_implementation"),
        )
        self._ends = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig()  # the model's own decodes in its own way
        grow_embedding(self.model, len(self.tokenizer), settings.adapter if settings.adapter_sha256 else None)
        if settings.adapter_sha256:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, settings.adapter)
        self.model.eval()
        self._cache: tuple[tuple[int, int], StaticCache] | None = None

    def decoding(self) -> GenerationConfig:
        """The settings' decoding, and of the model's own only the tokens that end an answer."""
        decoding = self.settings.decoding
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        ends = self._ends if isinstance(self._ends, list) else [self._ends]
        return GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=decoding.do_sample,
            eos_token_id=sorted({self.tokenizer.eos_token_id, *ends} - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if decoding.do_sample else {}),
        )

    def _static_cache(self, rows: int, room: int) -> StaticCache | None:
        """An empty cache: the last one, if its shape is the same, as the compiled code is bound to its memory."""
        if self.settings.cache != "static":
            return None
        if self._cache and self._cache[0] == (rows, room):
            self._cache[1].reset()
        else:
            self._cache = None  # frees its memory before the next takes some
            self._cache = (rows, room), StaticCache(config=self.prompter.config, max_cache_len=room)
        return self._cache[1]

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Answer]]:
        """See `Engine`.

        Batches are the same whatever is done: in half precision an answer can depend on the other rows of its batch.

        Raises:
            WorkFailed: a batch does not fit the GPU's memory.
        """
        lengths = [len(prompt) + self.settings.decoding.max_new_tokens for prompt in prompts]
        for number, (room, batch) in enumerate(batches(lengths, self.settings.batch_size)):
            if all(i in done for i in batch):
                continue
            try:
                answers = self.answers([prompts[i] for i in batch], number, room)
            except torch.OutOfMemoryError:
                raise WorkFailed(
                    f"{len(batch)} rows of up to {room} tokens do not fit the GPU's memory; --batch-size "
                    f"{max(len(batch) // 2, 1)} takes fewer"
                ) from None
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            yield {i: Answer(text.strip(), tokens) for i, text, tokens in zip(batch, texts, answers, strict=True)}

    @torch.inference_mode()
    def answers(self, prompts: Sequence[list[int]], number: int, room: int) -> list[list[int]]:
        """The tokens of one answer per prompt, independent of the batches before; without padding.

        Args:
            prompts: the tokens of each.
            number: the batch's number, which is added to the seed where the decoding samples.
            room: the tokens that a static cache has room for, at least prompt and answer of the longest.
        """
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        set_seed(self.settings.decoding.seed + number)
        decoding = self.decoding()
        cache = self._static_cache(len(prompts), room)
        output = self.model.generate(**batch, generation_config=decoding, past_key_values=cache)
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        ends = set(decoding.eos_token_id)
        return [answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), None)] for answer in answers]

    @torch.inference_mode()
    def best(self, prompt: list[int], answer: list[int], count: int) -> list[dict[int, float]]:
        """At each token of an answer the log-probabilities of the best tokens, in one pass without a cache."""
        tokens = torch.tensor([prompt + answer], device=self.device)
        logits = self.model(tokens, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        best = logits.float().log_softmax(dim=-1).topk(count)
        return [dict(zip(*of, strict=True)) for of in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def batches(lengths: Sequence[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Which rows are generated together, the longest first: too little memory shows at once.

    Rows that need about the same room are together, and there are few sizes of room, so that a static cache, and what
    is compiled for it, can be reused.

    Args:
        lengths: for each row the tokens of its prompt and of the longest answer.
        most: the most rows in a batch.

    Yields:
        The room, a power of two of tokens, and the positions of `most` rows, or of as many as `BATCH_TOKENS` allow.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for room, same in groupby(by_length, key=lambda i: max(1 << (lengths[i] - 1).bit_length(), 256)):
        for batch in batched(same, max(min(most, BATCH_TOKENS // room), 1)):
            yield room, list(batch)


def grow_embedding(model: PreTrainedModel, tokens: int, adapter: str | None) -> None:
    """Give a base model's embedding as many rows as it was trained with, if it has fewer.

    Axolotl adds rows for tokens that a config adds to the tokenizer (loaders/model.py); PEFT saves them with the
    adapter, but does not add them when it loads that.

    Args:
        model: the base model.
        tokens: how many the training's tokenizer has.
        adapter: the adapter's folder; None where it is not to be loaded.
    """
    saved = embedding_rows(Path(adapter) / ADAPTER) if adapter else None
    if (rows := saved or tokens) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows)
