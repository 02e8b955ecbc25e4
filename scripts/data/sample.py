"""Prepares the shipped sample, which rehearsals train on."""

import hashlib
from pathlib import Path

from ..base import paths
from ..base.files import sha256
from ..base.locks import make_once
from . import codereviewer, study


def rehearsal_data(input_format: str = "diff") -> Path:
    """The folder of the prepared sample; written to the cache the first time."""
    raw = sorted(paths.SAMPLE.glob("msg-*.jsonl"))
    key = hashlib.sha256("".join(map(sha256, [*raw, Path(codereviewer.__file__)])).encode()).hexdigest()
    folder = paths.cache() / f"sample-{input_format}-{key[:16]}"
    return make_once(folder, lambda out: codereviewer.prepare(raw, out, study.find("haider2024"), input_format))
