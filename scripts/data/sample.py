"""Prepare the shipped samples of studies for rehearsals."""

import hashlib
from functools import partial
from pathlib import Path

from ..base import paths
from ..base.files import sha256
from ..base.processes import make_once
from . import studies

VERSION = 2
"""Version of the preparation code; increase it when the same study and raw files give other rows."""


def rehearsal_data(study: studies.Study, input_format: str) -> Path:
    """Prepare a study's sample in the cache, if necessary; return the folder."""
    content = [str(VERSION), study.data.model_dump_json(), input_format, *map(sha256, _raw(study))]
    key = hashlib.sha256("".join(content).encode()).hexdigest()
    out = paths.cache() / f"sample-{study.folder.name}-{input_format}-{key[:16]}"
    return make_once(out, partial(_prepare, study, input_format))


def _raw(study: studies.Study) -> list[Path]:
    """Existing raw files of a study's sample."""
    return sorted(file for file in map(folder(study).joinpath, study.data.raw_files) if file.is_file())


def _prepare(study: studies.Study, input_format: str, out: Path) -> None:
    from .prepare import prepare

    prepare(_raw(study), out, _with_few_sampled(study), input_format)


def twin(path: str) -> Path | None:
    """Sample file that replaces a study's prepared file; None for other files."""
    for study, input_format in studies.prepared_formats(path):
        if study.data.sample:
            file = rehearsal_data(study, input_format) / Path(path).name
            return file if file.is_file() else None
    return None


def default_sample() -> Path:
    """Sample folder for recipes without a study, preferably with `alpaca` fields."""
    sampled = [study for study in studies.load_all() if study.data.sample]
    alpaca = [study for study in sampled if {"instruction", "output"} <= study.data.fields.keys()]
    first = [*alpaca, *sampled][0]
    return rehearsal_data(first, next(iter(first.data.formats)))


def length_of(file: Path) -> int:
    """Upper bound of tokens per row, rounded up to a multiple of 256.

    Assumes that a token has at least two bytes.
    """
    with file.open("rb") as lines:
        longest = max(map(len, lines), default=0)
    return -(-longest // 512) * 256


def _with_few_sampled(study: studies.Study) -> studies.Study:
    """Copy of a study whose sampled splits take at most a quarter of the rows."""
    splits = dict(study.data.splits)
    for name, split in splits.items():
        if split.sample_from and split.sample:
            with (folder(study) / study.data.raw_files_of(name)[0]).open("rb") as lines:
                few = max(sum(1 for _ in lines) // 4, 1)
            splits[name] = split.model_copy(update={"sample": min(split.sample, few)})
    return study.model_copy(update={"data": study.data.model_copy(update={"splits": splits})})


def folder(study: studies.Study) -> Path:
    """Folder with the raw files of a study's sample."""
    return study.folder / str(study.data.sample)
