"""A run's base model as other engines load it: what its 4-bit weights stand for, in 16 bit, as a folder; for some with
the adapter merged into it."""

import gc
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch

from ...base import paths
from ...base.locks import make_once
from ...base.progress import say
from ..prompter import Prompter
from .reference import NF4, base_model


def folder(prompter: Prompter) -> Path:
    """The run's base model, quantized as in training and dequantized to the dtype that its layers compute in.

    At each step a 4-bit layer does the same, so that both compute with the very same weights. The folder is made once,
    in the cache, where it takes as much room as the base model in 16 bit.

    Raises:
        OSError: there is not so much.
    """
    settings = prompter.settings
    model = Path(settings.base_model)
    made_of = {
        "model": settings.base_model,
        "revision": getattr(prompter.config, "_commit_hash", None) or prompter.revision,
        "files": sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in model.glob("*.*")),
        "kinds": NF4 | (prompter.cfg.get("bnb_config_kwargs") or {}),
        "dtype": settings.dtype,
    }
    digest = hashlib.sha256(orjson.dumps(made_of, option=orjson.OPT_SORT_KEYS)).hexdigest()
    made = paths.cache() / f"dequantized-{model.name}-{digest[:16]}"
    return make_once(made, lambda target: _make(prompter, target, made))


def _make(prompter: Prompter, target: Path, made: Path) -> None:
    say(f"dequantizing {Path(prompter.settings.base_model).name} into {made}, once")
    _save(prompter, _dequantized(prompter), target)


@contextmanager
def merged(prompter: Prompter) -> Iterator[Path]:
    """As `folder`, of any base model, with the run's adapter merged into the weights, which are rounded once after
    that; for as long as they are needed."""
    from peft import PeftModel

    settings = prompter.settings
    model = _dequantized(prompter) if settings.quantized else base_model(prompter)
    model = PeftModel.from_pretrained(model.float(), settings.adapter).merge_and_unload()
    paths.cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=paths.cache()) as target:
        _save(prompter, model.to(getattr(torch, settings.dtype)), Path(target))
        del model
        yield Path(target)


def _dequantized(prompter: Prompter) -> Any:
    return base_model(prompter).dequantize(dtype=getattr(torch, prompter.settings.dtype))


def _save(prompter: Prompter, model: Any, target: Path) -> None:
    model.save_pretrained(target)
    prompter.config.save_pretrained(target)  # as it was: the model's has what was asked for beside it
    del model
    gc.collect()
    torch.cuda.empty_cache()  # the engine needs it
