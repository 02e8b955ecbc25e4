"""Folders with tokenizers that have the special tokens and chat templates of published families, without weights."""

from pathlib import Path
from typing import Any

import random_models

from qlora_recipes.base.files import write_json

_LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
_MISTRAL = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
FAMILIES: dict[str, tuple[list[str], str, str]] = {
    "llama3": (_LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2_vision": (_LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen3": (["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<s>", "<|im_end|>"),
    "gemma": (_GEMMA, "<bos>", "<eos>"),
    "gemma3": (_GEMMA, "<bos>", "<eos>"),
    "mistral_v1": (_MISTRAL, "<s>", "</s>"),
    "mistral_v7_tekken": (_MISTRAL, "<s>", "</s>"),
    "phi_3": (["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], "<s>", "<|endoftext|>"),
    "chatml": (["<|im_start|>", "<|im_end|>"], "<s>", "</s>"),
}
"""For each of Axolotl's templates: further tokens of the family's tokenizers, then BOS and EOS."""


def save(folder: Path, family: str, template: str | None = None) -> Path:
    """Save a tokenizer with a family's tokens and template, or with another template."""
    from axolotl.utils.chat_templates import get_chat_template

    more, bos, eos = FAMILIES[family]
    reasoning = [token for token in more if "think" in token]  # not special in the family
    special = [token for token in more if token not in reasoning]
    tokenizer: Any = random_models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": bos, "eos_token": eos})
    tokenizer.add_tokens(reasoning)
    tokenizer.chat_template = template or get_chat_template(family)
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": tokenizer.eos_token_id} | sizes)
    return folder
