"""Generating text with a run's base model and adapter, from the very prompts that it was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from .config import Config
from .tokens import MASKED, tokenize

if TYPE_CHECKING:
    from .evaluate import Settings

disable_progress_bar()

NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # Axolotl's defaults for qlora


class Generator:
    """A run's base model, quantized as in training, with or without an adapter.

    Args:
        settings: what to load and how to decode.
        cfg: the run's config.
        tokenizer: the folder in which the training left its tokenizer, special tokens set.
    """

    def __init__(self, settings: "Settings", cfg: Config, tokenizer: Path):
        self.settings, self.cfg = settings, cfg
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        dtype = getattr(torch, settings.dtype)
        quantization = None
        if settings.quantized:
            kinds = NF4 | {"bnb_4bit_compute_dtype": dtype} | (cfg.get("bnb_config_kwargs") or {})
            quantization = BitsAndBytesConfig(load_in_4bit=True, **kinds)
        self.model = AutoModelForCausalLM.from_pretrained(
            settings.base_model,
            revision=cfg.get("revision_of_model", "main"),
            dtype=dtype,
            quantization_config=quantization,
            device_map=self.device,
            attn_implementation=cfg.get("attn_implementation"),
        )
        if settings.adapter_sha256:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, settings.adapter)
        self.model.eval()

    def prompts(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        """The tokens that stand before each row's answer, as Axolotl's own code writes them in training.

        They are what it masks from the loss; for this it is told to mask the prompt even where the
        training did not. A prompt that leaves no room for an answer in the model's context loses its end.
        """
        longest = self.model.config.max_position_embeddings - self.settings.max_new_tokens
        cfg = DictDefault(self.cfg | {"train_on_inputs": False})
        return [
            [token for token, label in zip(row.ids, row.labels, strict=True) if label == MASKED]
            for row in tokenize(cfg, cfg.datasets[0], self.tokenizer, rows, longest)
        ]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]]) -> list[str]:
        """One answer a prompt."""
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        output = self.model.generate(
            **batch,
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=self.settings.do_sample,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answers = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
