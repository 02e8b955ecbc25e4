"""A Llama so small that nothing but starting takes time."""

from pathlib import Path

import random_models


def save(folder: Path) -> None:
    """Write a random Llama of two layers, with the small tokenizer of models with random weights, to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = random_models.tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
        )
    ).to(torch.bfloat16).save_pretrained(folder)
