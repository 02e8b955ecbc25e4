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


def rehearsal_data(of_study: studies.Study, input_format: str) -> Path:
    """Prepare a study's sample in the cache, if necessary; return the folder."""
    content = [str(VERSION), of_study.data.model_dump_json(), input_format, *map(sha256, _raw(of_study))]
    key = hashlib.sha256("".join(content).encode()).hexdigest()
    made = paths.cache() / f"sample-{of_study.folder.name}-{input_format}-{key[:16]}"
    return make_once(made, partial(_prepare, of_study, input_format))


def _raw(of_study: studies.Study) -> list[Path]:
    """Existing raw files of a study's sample."""
    return sorted(file for name in of_study.data.raw_files if (file := folder(of_study) / name).is_file())


def _prepare(of_study: studies.Study, input_format: str, out: Path) -> None:
    from .prepare import prepare

    prepare(_raw(of_study), out, _with_few_sampled(of_study), input_format)


def twin(path: str) -> Path | None:
    """Sample file that replaces a study's prepared file; None for other files."""
    for of_study, input_format in studies.prepared_formats(path):
        if of_study.data.sample:
            file = rehearsal_data(of_study, input_format) / Path(path).name
            return file if file.is_file() else None
    return None


def usual_sample() -> Path:
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


def _with_few_sampled(of_study: studies.Study) -> studies.Study:
    """Copy of a study whose sampled splits take at most a quarter of the rows."""
    splits = dict(of_study.data.splits)
    for name, split in splits.items():
        if split.sample_from and split.sample:
            with (folder(of_study) / of_study.data.raw_files_of(name)[0]).open("rb") as lines:
                few = max(sum(1 for _ in lines) // 4, 1)
            splits[name] = split.model_copy(update={"sample": min(split.sample, few)})
    return of_study.model_copy(update={"data": of_study.data.model_copy(update={"splits": splits})})


def folder(of_study: studies.Study) -> Path:
    """Folder with the raw files of a study's sample."""
    return of_study.folder / str(of_study.data.sample)
