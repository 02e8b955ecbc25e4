"""Model families besides Llama: a shipped size of each, and one small enough to be trained in a test."""

from typing import Any

# Sizes from litgpt's config.py (github.com/Lightning-AI/litgpt); what it does not have is transformers' default for the
# family. Parameters as the safetensors on the hub have them.
SHIPPED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3-8B": (
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        8_190_735_360,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        7_241_732_096,
    ),
    "gemma-2-9b": (
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "sliding_window": 4096,
        },
        9_241_705_984,
    ),
    "gemma-3-1b-it": (
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
        999_885_952,
    ),
    "gemma-3-4b-it": (  # with its part for images
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": 896,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        4_300_079_472,
    ),
    "Phi-3-mini-128k-instruct": (
        {
            "model_type": "phi3",
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "sliding_window": 262144,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0 + i / 10 for i in range(48)],
                "short_factor": [1.0] * 48,
            },
        },
        3_821_079_552,
    ),
}

_TINY = {
    "vocab_size": 8192,  # more than the tokenizer has, so that logits weigh as much as they do in large vocabularies
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 96,
    "max_position_embeddings": 2048,
    "sliding_window": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

TINY: dict[str, dict[str, Any]] = {
    "qwen2": {key: value for key, value in _TINY.items() if key != "head_dim"},
    "qwen3": _TINY,
    "mistral": _TINY,
    "gemma2": _TINY,
    "gemma3_text": _TINY | {"sliding_window_pattern": 2},
    "phi3": {
        **{key: value for key, value in _TINY.items() if key != "head_dim"},
        "original_max_position_embeddings": 128,
        "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 32, "short_factor": [1.0] * 32},
    },
}
TINY = {family: {"model_type": family} | sizes for family, sizes in TINY.items()}
