"""The cache of what takes long to plan: traces, peaks of memory, lengths of rows, counts of parameters."""

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from ..base import paths
from ..base.files import write_atomically

VERSION = 1
"""Of the code that computes what is cached; to be raised when it computes something else."""


def file(kind: str, *depends: Any) -> Path:
    """The file for a result that depends on some values, on the packages that train models, and on this code."""
    content = orjson.dumps([VERSION, packages(), *depends], default=str, option=orjson.OPT_SORT_KEYS)
    return paths.cache() / kind / f"{hashlib.sha256(content).hexdigest()[:24]}.json"


def keep(file: Path, content: dict[str, Any]) -> None:
    """Cache something, where the cache can be written."""
    with suppress(OSError):
        write_atomically(file, orjson.dumps(content).decode())


@cache
def packages() -> dict[str, str]:
    """The versions of what builds models, tokenizes rows and trains."""
    names = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "axolotl")
    return {name: version(name) for name in names}
