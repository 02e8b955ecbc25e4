"""Models with random weights in the shapes of others, a small tokenizer for them, and rows that fill their context."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from qlora_recipes.base.files import write_json, write_rows
from qlora_recipes.data.prepare import default_sample

FILLED = 0.93
"""Filled share of a row: not all, so that attention needs a mask, as plans assume."""
SPREAD = 0.02  # standard deviation of random weights, that of Llama's initialization
_DRAWN = 2**24 + 43
"""Random numbers that are drawn; larger weights repeat them, in rows that are no multiple of any width. On a CPU, which
keeps the GPU for the training, 8 billion would take minutes."""
_INSTRUCTION = "Review the code change and comment on it."


def make(folder: Path, architecture: dict[str, Any]) -> None:
    """A model's folder with random weights in bf16, a layer at a time, so that main memory holds no more than one."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}  # what is tied is one weight
    folder.mkdir(parents=True)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        of_layer = name.partition(".layers.")[2].partition(".")[0]
        parts.setdefault(of_layer, []).append(name)  # what belongs to no layer is together too
    drawn = (torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)) * SPREAD).bfloat16()
    files: dict[str, str] = {}
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: _weights(name, shapes[name], drawn) for name in names}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    details = {"architectures": [type(model).__name__], "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", architecture | details)
    tokenizer().save_pretrained(folder)


def _weights(name: str, shape: Any, drawn: Any) -> Any:
    """A weight: ones for a norm, else random numbers, from a place among those that are drawn that its name gives."""
    import torch

    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = shape.numel()
    shifted = drawn.roll(zlib.crc32(name.encode()) % len(drawn))
    return shifted.repeat(-(-count // len(drawn)))[:count].view(shape).clone()


def tokenizer() -> Any:
    """A byte-level tokenizer of 1,024 tokens, trained on the sample, with Llama 2's special tokens and its way of
    putting BOS first: a model of any vocabulary knows its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    tokens.train([str(default_sample() / "train.jsonl")], trainer)
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny_llama(folder: Path) -> None:
    """Save a random Llama of two layers, so small that nothing but starting takes time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = tokenizer()
    small.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=len(small), num_attention_heads=4, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_full_rows(file: Path, model: Path, length: int, count: int) -> None:
    """Rows of the sample, laid end to end until each nearly fills a length in the model's tokens."""
    from axolotl.prompters import AlpacaPrompter
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(model)
    texts = _texts()
    around = next(AlpacaPrompter().build_prompt(_INSTRUCTION, "code", "comment"))
    room = int(FILLED * length) - len(encode(around)["input_ids"])
    rows = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < room:
            ids += encode(next(texts), add_special_tokens=False)["input_ids"]
        half = room // 2
        prompt, answer = str(encode.decode(ids[:half])), str(encode.decode(ids[half:room]))
        rows.append({"instruction": _INSTRUCTION, "input": prompt, "output": answer})
    write_rows(file, rows)


def _texts() -> Iterator[str]:
    rows = list(map(orjson.loads, (default_sample() / "train.jsonl").read_bytes().splitlines()))
    while True:
        for row in rows:
            yield f"{row['input']}\n{row['output']}\n"
