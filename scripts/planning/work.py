"""What a training takes: tokens (counted, measured on some rows, or as a study says), steps, operations, time, cost."""

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
from ..configs.gpus import Gpu
from ..data import study
from . import steps
from .planner import Planner, cache_file, keep

UTILIZATION = 0.3
"""The share of the peak rate that is assumed."""
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
        keep(file, {"measured": measured})
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
    return cache_file("lengths", settings, templates, [files.sha256(file) for file in read if file.is_file()])


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


def work(
    composed: Composed, planner: Planner, gpu: Gpu | None, gpus: int, lengths: Lengths | None, price: float | None
) -> dict[str, Any]:
    """What a config's training takes.

    Args:
        composed: the config.
        planner: its planned step.
        gpu: the GPU, if one is named or there.
        gpus: how many of them.
        lengths: of the rows, where they are known; else every row counts as a full one.
        price: of a GPU for an hour.

    Returns:
        Among others `flops_per_token`, with those on the padding beside it; and `tokens_per_second`, from the GPU's
        peak rate and UTILIZATION.
    """
    config = composed.config
    length = steps.length_of(config)
    rows, source = _rows(composed)
    if lengths:
        rows, source = lengths.rows, lengths.rows_are
        length = length if config.get("sample_packing") else round(lengths.padded / rows)
    all_steps = datafiles.steps_of(config, rows, gpus)
    tokens = lengths.tokens if lengths else rows * length if rows else None
    tokens_are = lengths.are if lengths else "at most: every row counted as a full one"
    padding = lengths.padded / lengths.tokens if lengths else 1
    epochs = float(config.get("num_epochs") or 1)
    if all_steps and config.get("max_steps"):  # it wins over the epochs
        taken = all_steps * datafiles.effective_batch(config) * gpus
        if config.get("sample_packing"):  # of sequences, each with several rows
            tokens, epochs, tokens_are = length, taken, "at most: every sequence counted as a full one"
        elif rows:
            epochs = taken / rows
    tokens = round(tokens * epochs) if tokens else None
    per_token = padding * flops_of_token(planner, length)
    rate = gpu.tflops * 1e12 * UTILIZATION * gpus / per_token if gpu and gpu.tflops else None
    hours = tokens / rate / 3600 if tokens and rate else None
    return {
        "rows": rows,
        "rows_are": source if rows else None,
        "tokens": tokens,
        "tokens_are": tokens_are,
        "steps": all_steps,
        "flops_per_token": per_token,
        "flops": tokens * per_token if tokens else None,
        "tokens_per_second": rate,
        "rate_is": f"{UTILIZATION:.0%} of the GPU's peak" if rate else None,
        "hours": hours,
        "cost": hours * gpus * price if hours and price is not None else None,
    }


def _rows(composed: Composed) -> tuple[int | None, str]:
    """The number of rows that are trained on, where it is known, and where it comes from."""
    rows = datafiles.training_rows(composed.config)
    of_study = study.of(composed.origin or composed.recipe)
    others = any(change.key.startswith(("datasets", "val_set_size")) for change in composed.from_origin)
    if rows is None and of_study and not others:
        return of_study.data.rows_of("train"), "the study's data"
    return rows, "the config's data"


def flops_of_token(planner: Planner, length: int) -> float:
    """Floating-point operations that a training step spends on one token of a full row.

    A matrix takes 2 for each of its weights forward, as much for the gradient of its input, and again as much for its
    own where it is trained; the head's matrix counts, the embedding's not. Attention takes, in each layer, 4 times
    its width times the tokens before, on average half the length, forward, and twice that backward. With
    checkpointing all of it is computed forward once more. LoRA's matrices are trained ones.
    """
    sizes = planner.memory.sizes
    again = bool(planner.step.checkpointing)
    passes = 0.0
    for kind, count in planner.memory.parameters.items():
        if kind in ("norm", "embed_tokens", "vision_tower"):
            continue
        passes += 2 * count["frozen"] * (2 + again) + 2 * count["trainable"] * (3 + again)
    head = planner.memory.parameters.get("lm_head", {})
    if sum(head.values()) < sizes["vocabulary"] * sizes["width"]:  # the embedding's matrix is the head's too
        passes += 2 * sizes["vocabulary"] * sizes["width"] * (2 + again + (planner.step.adapter is None))
    attention = 4 * sizes["attention_width"] * length / 2 * sizes["layers"]
    return passes + attention * (3 + again)
