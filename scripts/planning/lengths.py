"""How many tokens a config trains on in an epoch: counted, measured on some of its rows, or as its study says."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import files
from ..base.errors import UserError
from ..base.yamlfiles import Config
from ..checks import check, rows
from ..configs import datafiles, models
from ..configs.compose import Composed
from ..data import study
from . import cache

ENOUGH = 1_000
"""Rows of each data set that are tokenized where not all are asked for."""

_DECIDES = re.compile(
    "base_model|revision|trust_remote|datasets$|.*token|.*chat_template|default_system|train_on_inputs|sequence_len|"
    "excess_length|micro_batch|sample_packing|pad_to|curriculum|seed"
)
"""Begins the keys of a config that decide how its rows are tokenized, cut and padded."""
_DECIDES_TOKENS = re.compile(
    r"base_model|revision|trust_remote|datasets\b|dataset_exact|.*token|.*chat_template|default_system|"
    "train_on_inputs|sequence_len|min_sample_len|excess_length|val_set_size"
)
"""Begins the dotted keys that decide which rows are trained on and how many tokens these have, padding aside."""
_OF_TOKENIZER = ("*token*", "*.jinja", "*.model", "vocab*", "merges*")


@dataclass(frozen=True)
class Lengths:
    """What an epoch has.

    Attributes:
        rows: those that are trained on.
        rows_are: whose data they are.
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
    rows_are: str = "the config's data"


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
    if (unknown := _unknown(composed)) and not counted:
        return _published(composed), unknown
    if unknown and check.has_tokenizer(composed):  # else it is said below how to get that
        raise UserError(f"--data: {unknown}; leave --data out")
    file = _cached(composed)
    measured = [] if counted else files.read_json(file).get("measured", [])
    if not measured:
        try:
            measured = check.training_lengths(composed, force, None if counted else ENOUGH)
        except UserError:
            if counted:
                raise
            return None, "its rows cannot be tokenized, as `recipe check --data` shows"
        cache.keep(file, {"measured": measured})
    found = _of_epoch(composed.config, measured)
    return (found, "") if found.rows > 0 else (None, "sequence_len and val_set_size leave none of its rows")


def _unknown(composed: Composed) -> str:
    """Why the rows that a config trains on cannot be measured; empty where they can."""
    for key, dataset in datafiles.datasets(composed.config, "datasets"):
        if len(datafiles.jsonl_files(dataset)) != 1:
            return f"the rows of {key} are not in one JSONL file on this machine"
        if datafiles.training_rows({"datasets": [dataset]}) is None:
            return f"{key} takes none of its file's rows, or others than the first"
    if not composed.config.get("datasets"):
        return "it lists no datasets"
    return "" if check.has_tokenizer(composed) else "its tokenizer is not on this machine"


def _cached(composed: Composed) -> Path:
    """The file for what is measured of a config's rows, which are on this machine, as is the tokenizer."""
    config = composed.config
    data = [dataset for _, dataset in datafiles.datasets(config, "datasets")]
    settings = {key: value for key, value in config.items() if _DECIDES.match(key)}
    written = [one["chat_template_jinja"] for one in (config, *data) if one.get("chat_template_jinja")]
    templates = [rows.read_template(str(template)) for template in written]
    folders = [models.folder_of(config), models.folder_of({"base_model": config.get("tokenizer_config")})]
    tokenizer = {file for folder in folders if folder for some in _OF_TOKENIZER for file in folder.glob(some)}
    read = [*(file for dataset in data for file in datafiles.jsonl_files(dataset)), *sorted(tokenizer)]
    return cache.file("lengths", settings, templates, [files.sha256(file) for file in read if file.is_file()])


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
    """What a study says of its own rows under the model's tokenizer, which a mirror has too."""
    of_study = study.of(composed.origin or composed.recipe)
    changed = {change.key: change for change in composed.from_origin if _DECIDES_TOKENS.match(change.key)}
    name = composed.config["base_model"]
    if (model := changed.get("base_model")) and models.is_copy(model.run, model.recipe):
        name = model.recipe
        changed = {key: change for key, change in changed.items() if key not in ("base_model", "revision_of_model")}
    split = of_study.data.splits.get("train") if of_study and not changed else None
    rows = of_study.data.rows_of("train") if of_study else None
    tokens = split.tokens.get(str(name)) if split else None
    are = "the study's, without padding, of which the hours count none"
    return Lengths(rows, tokens, tokens, None, are, "the study's data") if rows and tokens else None
