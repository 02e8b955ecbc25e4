"""How many tokens a config trains on in an epoch: counted, measured on some of its rows, or as its study says."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from ..base import paths
from ..base.errors import UserError
from ..base.files import read_json, sha256
from ..base.yamlfiles import Config
from ..checks import check
from ..configs import datafiles, models
from ..configs.compose import Composed
from ..data import study
from .planner import keep

ENOUGH = 1_000
"""Rows of each data set that are tokenized where not all are asked for."""

_DECIDES = re.compile(
    "base_model|revision|trust_remote|datasets$|.*token|.*chat_template|default_system|train_on_inputs|sequence_len|"
    "excess_length|micro_batch|sample_packing|pad_to|curriculum|seed"
)
"""Begins the keys of a config that decide how its rows are tokenized, cut and padded."""


@dataclass(frozen=True)
class Lengths:
    """What an epoch has.

    Attributes:
        rows: those that are trained on.
        tokens: of these rows.
        padded: tokens with the padding of micro batches.
        longest: the tokens of the longest row; None where not all rows were counted.
        are: where the figures come from.
    """

    rows: int
    tokens: int
    padded: int
    longest: int | None
    are: str


def lengths_of(composed: Composed, counted: bool = False, force: Sequence[str] = ()) -> tuple[Lengths | None, str]:
    """The lengths of the rows that a config trains on, and why they are not known where they are None.

    Rows that are here are tokenized as Axolotl does, where the tokenizer is here too: all if they are to be counted,
    else some, unless that was done before. They are kept in the cache under the hashes of rows, tokenizer and settings.

    Args:
        composed: the config.
        counted: whether all rows are to be counted, now.
        force: the names of findings that are overridden.

    Raises:
        UserError: they are to be counted, and cannot be.
    """
    file = _cached(composed)
    measured = [] if counted or not file else read_json(file).get("measured", [])
    if counted or (file and not measured):
        try:
            measured = check.training_lengths(composed, force, None if counted else ENOUGH)
        except UserError:
            if counted:
                raise
            return None, "its rows cannot be tokenized, as `recipe check --data` shows"
        if file:
            keep(file, {"measured": measured})
    if measured:
        return _of_epoch(composed.config, measured), ""
    return _published(composed), "its rows and its tokenizer are not both on this machine"


def _cached(composed: Composed) -> Path | None:
    """The file for what is measured of a config's rows; None where they or the tokenizer are not on this machine."""
    files = [
        file
        for _, dataset in datafiles.datasets(composed.config, "datasets")
        for file in datafiles.jsonl_files(dataset)
    ]
    folder = models.folder_of(composed.config)
    if not (files and folder and check.has_tokenizer(composed)):
        return None
    settings = {key: value for key, value in composed.config.items() if _DECIDES.match(key)}
    tokenizer = sorted(file for file in folder.glob("*token*") if file.is_file())
    code = Path(check.__file__).with_name("tokens.py")
    content = [settings, version("axolotl"), *map(sha256, [*files, *tokenizer, code])]
    key = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS, default=str)).hexdigest()
    return paths.cache() / "lengths" / f"{key[:24]}.json"


def _of_epoch(config: Config, measured: list[dict[str, Any]]) -> Lengths:
    """The lengths of an epoch, from those of rows of each data set, of which val_set_size may hold some out."""
    rows = tokens = padded = 0.0
    for data_set in measured:
        share = data_set["rows_there"] / data_set["rows_read"]
        rows += share * data_set["rows_trained_on"]
        tokens += share * data_set["tokens_trained_on"]
        padded += share * data_set["tokens_trained_on"] / (1 - (data_set["padding_share"] or 0))
    there, seen = (sum(data_set[key] for data_set in measured) for key in ("rows_there", "rows_read"))
    left = (datafiles.training_rows(config) or there) / there
    are = "counted" if seen == there else f"by the lengths of {seen:,} of the rows"
    longest = max(data_set["longest_trained_on"] for data_set in measured) if seen == there else None
    return Lengths(round(left * rows), round(left * tokens), round(left * padded), longest, f"{are}, without padding")


def _published(composed: Composed) -> Lengths | None:
    """What a study says of its own rows under the model's tokenizer."""
    of_study = study.of(composed.origin or composed.recipe)
    changed = any(_DECIDES.match(change.key) for change in composed.differences)
    split = of_study.data.splits.get("train") if of_study and not changed else None
    rows = of_study.data.rows_of("train") if of_study else None
    tokens = split.tokens.get(str(composed.config["base_model"])) if split else None
    return Lengths(rows, tokens, tokens, None, "the study's, without padding") if rows and tokens else None
