"""Model families besides Llama: a built-in size of each, and one small enough to be trained in a test."""

from typing import Any

from qlora_recipes.config import models

_LISTED = {  # parameters, as the safetensors on the hub have them
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
}
_WITH_IMAGES = {
    "model_type": "gemma3",
    "text_config": {
        **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        **{"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    },
    "vision_config": {
        **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304},
        **{"num_attention_heads": 16, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14},
        "vision_use_head": False,
    },
}
_LONG = {
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "long_factor": [1 + i / 10 for i in range(48)], "short_factor": [1.0] * 48},
}
_CATALOGUE = models.catalogue()
BUILT_IN: dict[str, tuple[dict[str, Any], int]] = {
    name.partition("/")[2]: (_CATALOGUE[name]["config"], parameters) for name, parameters in _LISTED.items()
} | {
    "gemma-3-4b-it": (_WITH_IMAGES, 4_300_079_472),
    "Phi-3-mini-128k-instruct": (_CATALOGUE["microsoft/Phi-3-mini-128k-instruct"]["config"] | _LONG, 3_821_079_552),
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
_DERIVED_HEADS = {key: value for key, value in _TINY.items() if key != "head_dim"}
_LONG_TINY = {"type": "longrope", "long_factor": [2.0] * 32, "short_factor": [1.0] * 32}

TINY: dict[str, dict[str, Any]] = {
    "qwen2": _DERIVED_HEADS,
    "qwen3": _TINY,
    "mistral": _TINY,
    "gemma2": _TINY,
    "gemma3_text": _TINY | {"sliding_window_pattern": 2},
    "phi3": _DERIVED_HEADS | {"original_max_position_embeddings": 128, "rope_scaling": _LONG_TINY},
}
TINY = {family: {"model_type": family} | sizes for family, sizes in TINY.items()}
