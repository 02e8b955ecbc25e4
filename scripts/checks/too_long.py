"""Whether any row of a data set is left to train on, known before Axolotl starts, which would drop all and fail."""

import time
from collections.abc import Iterator, Sequence
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from typing import Any

from ..base.files import json_rows
from ..base.yamlfiles import Config
from ..configs import datafiles, models
from .finding import Finding
from .rows import fields_of

_FIRST = 200  # rows that are tokenized first, the shortest in bytes
_PATIENCE = 2.0  # seconds, where none of these fits
_MERGED = 2  # tokens that the text around a field may share with it, at most


def findings(config: Config) -> Iterator[Finding]:
    """A finding for each data set of local JSONL files whose every row is longer than sequence_len, even without the
    prompt around it, where Axolotl drops such rows, and the tokenizer is on this machine.

    It is an error where all data sets of its section are such, as Axolotl drops from what they are merged to.

    A text has at most as many tokens as bytes, so that a row is tokenized only where all rows have more bytes than
    that; usually the first few lines are all that is read.
    """
    folder = models.folder_of(config)
    if str(config.get("excess_length_strategy") or "drop").lower() != "drop" or config.get("rl") or not folder:
        return
    if not (tokenizer := folder / "tokenizer.json").is_file():
        return
    for section in ("datasets", "test_datasets"):
        own = section == "test_datasets" and config.get("eval_sequence_len")
        setting = "eval_sequence_len" if own else "sequence_len"
        limit = config.get(setting) or 512  # Axolotl's default
        entries = [*datafiles.datasets(config, section)]
        found = [too_long for entry in entries if (too_long := _judged(*entry, tokenizer, setting, limit))]
        for finding in found:
            if len(found) < len(entries):
                finding.level = "warning"
            yield finding


def _judged(key: str, dataset: Config, tokenizer: Path, setting: str, limit: int) -> Finding | None:
    """The finding for a data set by itself; None where some row fits, or it is not known."""
    files = datafiles.jsonl_files(dataset)
    if not (files and dataset.get("type") != "completion" and fields_of(dataset)):
        return None
    if any(len(line) <= limit for line in datafiles.lines(dataset)):
        return None
    sizes, are_all = _sizes(dataset, files, tokenizer, limit)
    if not sizes or min(sizes) <= limit:
        return None
    problem = f"no row fits {setting}, {limit}, so that Axolotl would drop all {len(sizes)}"
    if not are_all:
        problem = f"none of the {len(sizes)} shortest rows fits {setting}, {limit}"
    remedy = f"they have {min(sizes)} to {max(sizes)} tokens and a prompt: raise {setting}"
    return Finding("error" if are_all else "warning", "too-long", f"{key}.path", problem, remedy)


def _sizes(dataset: Config, files: Sequence[Path], tokenizer: Path, limit: int) -> tuple[list[int], bool]:
    """The least tokens that each row has, up to the first that fits, and whether there was time for all of them."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    deadline = time.monotonic() + _PATIENCE
    first: list[int] = []
    sizes = first
    shortest = nsmallest(_FIRST, datafiles.lines(dataset), key=len)
    others = datafiles.lines(dataset) if len(shortest) == _FIRST else ()
    for number, line in enumerate(chain(shortest, others)):
        if number >= len(shortest) and time.monotonic() > deadline:
            return first, False
        if number == len(shortest):
            sizes = []  # of all rows from here on
        (row,) = json_rows([line], files[0], ())
        texts = _texts(dataset, row)
        sizes.append(sum(max(len(encode(text, add_special_tokens=False)) - _MERGED, 0) for text in texts))
        if sizes[-1] <= limit:
            break
    return sizes, True


def _texts(dataset: Config, row: dict[str, Any]) -> list[str]:
    """The texts of a row that are certainly trained on."""
    if dataset.get("type") == "chat_template":
        content = (dataset.get("message_property_mappings") or {}).get("content", "content")
        messages = list(row.get(dataset.get("field_messages") or "messages") or ())
        if dataset.get("drop_system_message"):
            del messages[:1]  # whatever its role, which can have another name
        found = [one.get(content) for one in messages if isinstance(one, dict)]
    else:
        fields = fields_of(dataset)
        assert fields
        optional = () if isinstance(dataset.get("type"), dict) else fields.optional  # a format need not have them
        found = [row.get(name) for name in filter(None, (fields.reference, *fields.texts, *optional))]
    return [text for text in found if isinstance(text, str)]
