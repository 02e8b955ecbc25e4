"""Evaluated rows that are also training rows."""

from itertools import islice
from pathlib import Path

from ..base.files import json_rows
from ..base.yamlfiles import Config
from ..checks.rows import content_of, names_of
from ..configs import datafiles
from ..runs.records import Run
from .evaluation_rows import EvaluationRows, jsonl


def positions(test: EvaluationRows, run: Run, cfg: Config) -> list[int] | None:
    """Positions of evaluated rows that are also training rows, by the fields that their type reads.

    None if unknown: val_set_size holds rows out of the training data, a training data set is not one local JSONL file,
    or a file has changed since training.
    """
    entries = dict(datafiles.datasets(cfg))
    if cfg.get("val_set_size") or run.changed_data:
        return None
    trained: set[int] = set()
    for _, entry in datafiles.datasets(cfg, "datasets"):
        file = jsonl(entry, Path(run.cwd))
        if file is None:
            return None
        with file.open("rb") as lines:
            rows = islice(json_rows(lines, file, ()), datafiles.first_rows(entry))
            trained |= {hash(content_of(row, names_of(entry))) for row in rows}
    return [
        position
        for position, key, row in zip(test.positions, test.keys, test.rows, strict=True)
        if hash(content_of(row, names_of(entries[key]))) in trained
    ]
