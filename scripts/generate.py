"""Generating text with a run's base model and adapter, from the very prompts that it was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from axolotl.utils.dict import DictDefault
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    StaticCache,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from .config import Config
from .tokens import MASKED, tokenize

if TYPE_CHECKING:
    from .evaluations import Settings

disable_progress_bar()

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # Axolotl's defaults for qlora


class Prompter:
    """What turns rows into the prompts of a run.

    Args:
        settings: the base model, and how many tokens an answer may have.
        cfg: the run's config.
        tokenizer: the folder in which the training left its tokenizer, special tokens set.
    """

    def __init__(self, settings: "Settings", cfg: Config, tokenizer: Path):
        self.settings, self.cfg = settings, cfg
        self.revision = cfg.get("revision_of_model", "main")
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        self.config = AutoConfig.from_pretrained(settings.base_model, revision=self.revision)

    def prompts(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The tokens that stand before each row's answer, as Axolotl's own code writes them in training.

        They are what it masks from the loss; for this it is told to mask the prompt even where the
        training did not. A prompt that leaves no room for an answer in the model's context loses its end.
        """
        longest = self.config.max_position_embeddings - self.settings.decoding.max_new_tokens
        cfg = DictDefault(self.cfg | {"train_on_inputs": False})
        return [
            [token for token, label in zip(row.ids, row.labels, strict=True) if label == MASKED]
            for row in tokenize(cfg, cfg.datasets[0], self.tokenizer, rows, longest)
        ]


class Generator(Prompter):
    """A run's base model, quantized as in training, with or without an adapter; see `Prompter`."""

    def __init__(self, settings: "Settings", cfg: Config, tokenizer: Path):
        super().__init__(settings, cfg, tokenizer)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        quantization = None
        if settings.quantized:
            kinds = NF4 | {"bnb_4bit_compute_dtype": dtype} | (cfg.get("bnb_config_kwargs") or {})
            quantization = BitsAndBytesConfig(load_in_4bit=True, **kinds)
        self.model = AutoModelForCausalLM.from_pretrained(
            settings.base_model,
            revision=self.revision,
            dtype=dtype,
            quantization_config=quantization,
            device_map=self.device,
            attn_implementation=cfg.get("attn_implementation"),
        )
        self.model.generation_config = self._decoding()
        if settings.adapter_sha256:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, settings.adapter)
        self.model.eval()
        self._cache: tuple[tuple[int, int], StaticCache] | None = None

    def _decoding(self) -> GenerationConfig:
        """The settings' decoding and nothing of the model's own but the tokens that end an answer."""
        decoding = self.settings.decoding
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        ends = self.model.generation_config.eos_token_id
        return GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=decoding.do_sample,
            eos_token_id=sorted({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if decoding.do_sample else {}),
        )

    def _static_cache(self, rows: int, room: int) -> StaticCache | None:
        """An empty cache; the last one again where its shape is the same, as what is compiled is for its memory."""
        if self.settings.cache != "static":
            return None
        if self._cache and self._cache[0] == (rows, room):
            self._cache[1].reset()
        else:
            self._cache = None  # its memory, before the next takes some
            self._cache = (rows, room), StaticCache(config=self.config, max_cache_len=room)
        return self._cache[1]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], number: int, room: int) -> list[str]:
        """One answer a prompt. They do not depend on the batches that came before.

        Args:
            prompts: the tokens of each.
            number: the batch's, which is added to the seed where the decoding samples.
            room: the tokens that a static cache is to have room for: prompt and answer of the longest at least.
        """
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        set_seed(self.settings.decoding.seed + number)
        output = self.model.generate(**batch, past_key_values=self._static_cache(len(prompts), room))
        answers = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
