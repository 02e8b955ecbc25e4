"""A run's base model as a folder that other engines load: what its 4-bit weights stand for, in 16 bit, perhaps with the
adapter merged into them."""

import gc
import hashlib
from pathlib import Path
from typing import Any

import orjson
import torch

from ...base import paths
from ...base.processes import make_once
from ...base.progress import say
from ..prompter import Prompter
from .reference import base_model, with_adapter


def folder(prompter: Prompter, merges: bool = False) -> Path:
    """The run's base model, quantized as in training and dequantized to the settings' dtype.

    At each step a 4-bit layer does the same, unless `bnb_4bit_compute_dtype` is another, so that both compute with the
    very same weights. The folder is made once, in the cache, where it takes as much room as the base model in 16 bit.

    Args:
        prompter: of the run.
        merges: whether the adapter is merged into the weights, which rounds them once more, and takes memory for all of
            them in fp32. The base model need not be quantized then.

    Raises:
        OSError: there is not so much room.
    """
    settings = prompter.settings
    model = Path(settings.base_model)
    made_of = {
        "model": settings.base_model,
        "revision": getattr(prompter.config, "_commit_hash", None) or prompter.revision,
        "files": sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in model.glob("*.*")),
        "kinds": prompter.quantization.to_diff_dict() if prompter.quantization else None,
        "config": settings.built_with,
        "dtype": settings.dtype,
        "adapter": settings.adapter_sha256 if merges else None,
    }
    digest = hashlib.sha256(orjson.dumps(made_of, option=orjson.OPT_SORT_KEYS)).hexdigest()
    made = paths.cache() / f"{'merged' if merges else 'dequantized'}-{model.name}-{digest[:16]}"
    return make_once(made, lambda target: _make(prompter, merges, target, made))


def _make(prompter: Prompter, merges: bool, target: Path, made: Path) -> None:
    what = "merging the adapter into" if merges else "dequantizing"
    say(f"{what} {Path(prompter.settings.base_model).name}, once, in {made}")
    _weights(prompter, merges).save_pretrained(target)
    prompter.config.save_pretrained(target)  # as it was: the model's has what was asked for beside it
    gc.collect()
    torch.cuda.empty_cache()  # the engine needs it


def _weights(prompter: Prompter, merges: bool) -> Any:
    settings, model = prompter.settings, base_model(prompter)
    dtype = getattr(torch, settings.dtype)
    if settings.quantized:
        model = model.dequantize(dtype=dtype)
    if merges:
        model = with_adapter(model.float(), settings.adapter).merge_and_unload().to(dtype)
    return model
