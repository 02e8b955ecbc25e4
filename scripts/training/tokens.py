"""Configs and rows as in training: validated and tokenized by Axolotl's code.

Importing this module imports Axolotl, which takes some 10 s."""

import json
import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, tzinfo
from itertools import batched, chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy
import torch
from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies import load as load_strategy
from axolotl.utils.config import normalize_cfg_datasets, normalize_config
from axolotl.utils.data import prepare_datasets, sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault, remove_none_values
from axolotl.utils.samplers import MultipackBatchSampler
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch.utils.data import RandomSampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import chat_template_utils

from ..base.errors import UserError, with_type
from ..base.files import Row, json_rows, reading, write_rows
from ..base.processes import end_with_parent
from ..base.terminal import Bar
from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.datafiles import DatasetRef
from ..config.training_settings import TrainingSettings
from . import chat_templates
from .losses import MASKED
from .row_types import Chat, RowType, row_type
from .validation import validated

if TYPE_CHECKING:
    from .preferences import PairIds

disable_progress_bar()
chat_templates.bound()
# Axolotl forks to tokenize; without this, a child would outlive a killed command and keep its locks
os.register_at_fork(after_in_child=end_with_parent)

_NO_LIMIT = 2**24  # tokens
_NUMBER = re.compile(r"\[\d+\]")
LOSS_ON_ANSWERS = {  # overrides keys of chat data sets that can put loss on more than the answers
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "message_field_training": None,
    "message_field_training_detail": None,
}


@dataclass
class Tokens:
    """Token ids of a row, and labels: MASKED for tokens without loss."""

    ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """Number of tokens trained on."""
        return sum(label != MASKED for label in self.labels)

    def last_part(self) -> tuple[int, int]:
        """Start and end of the last sequence of tokens with loss; (0, 0) if no token has loss."""
        end = len(self.labels)
        while end > 0 and self.labels[end - 1] == MASKED:
            end -= 1
        start = end
        while start > 0 and self.labels[start - 1] != MASKED:
            start -= 1
        return start, end

    @classmethod
    def answered(cls, prompt: list[int], answer: list[int]) -> "Tokens":
        """Tokens of a prompt, and of an answer with loss."""
        return cls(prompt + answer, [MASKED] * len(prompt) + answer)

    def parts(self) -> tuple[list[int], list[int]]:
        """Prompt and answer: the last sequence of tokens with loss, and all before it; empty if no token has loss."""
        start, end = self.last_part()
        return self.ids[:start], self.ids[start:end]


def tokenize(where: str, cfg: Any, dataset: Any, tokenizer: Any, rows: Sequence[Row], longest: int) -> list[Tokens]:
    """Tokenize rows as Axolotl does, but keep rows that exceed the config's sequence_len.

    Args:
        where: the name of the rows in messages.
        cfg: a config, as Axolotl's DictDefault.
        dataset: the config's entry for the rows' data set.
        tokenizer: the tokenizer.
        rows: the rows, each a mapping of field names to values.
        longest: the sequence_len to tokenize with. Some types truncate the prompt and the answer, each to this length;
            the type completion splits rows into pieces of this length.

    Raises:
        UserError: Axolotl cannot tokenize the rows.
    """
    kind = dataset["type"]
    base, _, style = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    # not DictDefault's |, which would keep cfg's values; any dataset_num_proc, even 1, would fork for these few rows
    limited = DictDefault({**cfg, "sequence_len": longest, "dataset_num_proc": None})
    fields = dict.fromkeys(chain.from_iterable(rows))
    try:
        table = Dataset.from_list([{name: row.get(name) for name in fields} for row in rows])
        tokenized, _ = get_dataset_wrapper(dataset, tokenizer, limited, base, table, style or None)
    except Exception as error:  # prompt strategies, and fields with values of several types, can raise any exception
        problem = f"Axolotl cannot tokenize these rows as {kind}: {with_type(error)}"
        raise UserError(problem, key=where) from None
    return [Tokens(row["input_ids"], row["labels"]) for row in tokenized]


def require_one_training_row_each(where: str, dataset: Any, rows: Sequence[Any], tokenized: Sequence[Tokens]) -> None:
    """Raise UserError unless a data set's type makes one training row from each row."""
    if len(tokenized) != len(rows):
        problem = f"Axolotl turns {len(rows)} rows into {len(tokenized)} training rows ({dataset['type']})"
        raise UserError(problem, key=where, remedy="evaluation needs exactly one training row for each row")


def end_ids(cfg: Config, tokenizer: Any) -> set[int]:
    """Tokens that end an answer in training: the end-of-text token and `eot_tokens`."""
    turn_ends = tokenizer.convert_tokens_to_ids(list(cfg.get("eot_tokens") or []))
    return {tokenizer.eos_token_id, *(set(turn_ends) - {tokenizer.unk_token_id})} - {None}


def as_trained(content: Config) -> Any:
    """Config as in training: validated, with defaults and chat templates. Can raise any exception."""
    cfg = validated(content)
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg


class Tokenizer:
    """A config's tokenizer with special tokens set as in training.

    Raises:
        UserError: Axolotl refuses the config, or the tokenizer is not on this machine.
    """

    def __init__(self, content: Config):
        self.content = content
        try:
            self.cfg = as_trained(content)
            self.tokenizer = load_tokenizer(self.cfg)
        except Exception as error:  # plugins, validators and tokenizers can raise any exception
            problem = f"cannot load the tokenizer: {error}"
            raise UserError(problem, key=str(content.get("base_model"))) from None

    def entry(self, dataset: DatasetRef) -> Any:
        """Settings of a data set, after Axolotl's validation."""
        return self.cfg[dataset.section][dataset.index]

    def tokenize(self, dataset: DatasetRef, rows: Sequence[Row]) -> list[Tokens]:
        """Tokenize rows of a data set, without cutting long rows."""
        entry = self.entry(dataset)
        pieces = entry["type"] == "completion"  # Axolotl splits these rows into rows of sequence_len tokens
        longest = self.cfg.sequence_len if pieces else _NO_LIMIT
        return tokenize(dataset.key, self.cfg, entry, self.tokenizer, rows, longest)

    def pairs(self, dataset: DatasetRef, rows: Sequence[Row]) -> "list[PairIds]":
        """Tokenize preference pairs of a data set, without cutting long ones."""
        from . import preferences  # TRL's trainer, which only pairs need

        return preferences.tokenize(self.cfg, dataset, self.tokenizer, rows)

    def chat_strategy(self, dataset: DatasetRef) -> Any:
        """Axolotl's strategy for the chats of a data set."""
        return load_strategy("chat_template", self.tokenizer, self.cfg, self.entry(dataset))

    def load(self, dataset: DatasetRef, sample: int | None = None) -> Iterator[tuple[int, Row]]:
        """Load rows of a data set as Axolotl does, applying split, shards and weight; yield each with its number.

        With a sample, at most so many rows are drawn over all of them. This calls Axolotl's code
        (axolotl/utils/data/sft.py) and skips tokenization.

        Raises:
            UserError: Axolotl cannot load the rows.
        """
        entry = self.entry(dataset)
        split = "train" if dataset.is_training else "test"
        parts = []
        try:
            with patch.object(sft, "get_dataset_wrapper", lambda dataset, **_: (dataset, None)):
                for part in datasets_with_name_generator([entry]):
                    loaded, *_ = sft._load_and_process_single_dataset(
                        part, self.cfg, self.tokenizer, split, self.cfg.seed
                    )
                    parts.append(loaded)
        except Exception as error:  # files, the network and the hub can raise any exception
            problem = f"cannot load the rows: {with_type(error)}"
            raise UserError(f"{entry['path']}: {problem}", key=dataset.key) from None
        step = datafiles.stride(sum(map(len, parts)), sample)
        first = 1
        for part in parts:
            drawn = range(0, len(part), step)
            yield from zip((first + index for index in drawn), part.select(drawn), strict=True)
            first += len(part)

    def held_out(self) -> list[tuple[DatasetRef, Row]]:
        """Rows that val_set_size holds out, in Axolotl's order, each with its data set.

        Axolotl holds out rows only after tokenizing, merging, shuffling and filtering them. This method therefore gets
        the held-out tokens from Axolotl, and finds the original rows by these tokens.

        Raises:
            UserError: the rows cannot be loaded or found.
        """
        held_out = self.split()[1]
        positions = defaultdict(list)
        for position, ids in enumerate(held_out["input_ids"]):
            positions[tuple(ids)].append(position)
        limit = self.cfg.sequence_len if str(self.cfg.excess_length_strategy).lower() == "truncate" else None
        by_position = {}
        with Bar("finding held-out rows"):
            for dataset in datafiles.training_sets(self.cfg):
                for numbered in batched(self.load(dataset), 1000):
                    rows = [row for _, row in numbered]
                    tokenized = tokenize(
                        dataset.key, self.cfg, dataset.entry, self.tokenizer, rows, self.cfg.sequence_len
                    )
                    require_one_training_row_each(dataset.key, dataset.entry, rows, tokenized)
                    for row, tokens in zip(rows, tokenized, strict=True):
                        if same := positions.get(tuple(tokens.ids[:limit])):
                            by_position[same.pop(0)] = dataset, row
        if len(by_position) < len(held_out):
            raise UserError(
                f"{len(held_out) - len(by_position)} held-out rows were not found in the data", key="val_set_size"
            )
        return [by_position[position] for position in range(len(held_out))]

    def split(self) -> tuple[Any, Any]:
        """Training and held-out rows, after Axolotl tokenizes, merges, filters, shuffles and splits the rows.

        Raises:
            UserError: Axolotl cannot prepare the rows.
        """
        try:
            # without this variable, Axolotl would also count the steps of packed rows
            with patch.dict(os.environ, AXOLOTL_IS_PREPROCESS="1"):
                return prepare_datasets(self.cfg, self.tokenizer)[:2]
        except Exception as error:  # files, templates and tokenizers can raise any exception
            problem = f"Axolotl cannot prepare the rows: {with_type(error)}"
            raise UserError(problem, key="datasets", remedy="run `recipe check NAME --all-rows`") from None


def trained_on(content: Config) -> tuple[list[int], float]:
    """Lengths of the rows that a config trains on, and the share of padding in one epoch's micro batches.

    Raises:
        UserError: Axolotl cannot prepare the rows.
    """
    with TemporaryDirectory() as folder:
        tokenizer = Tokenizer(content | {"dataset_prepared_path": folder, "test_datasets": None})
        if content.get("rl"):
            from . import preferences

            return preferences.trained_on(tokenizer.cfg, tokenizer.tokenizer)
        sizes: list[int] = []
        for rows in tokenizer.split()[0].select_columns("input_ids").iter(1000):
            sizes += map(len, rows["input_ids"])
    return sizes, 0.0 if content.get("sample_packing") else padding(tokenizer.cfg, sizes)


def read_keys(strategy: Any) -> set[str]:
    """Fields of messages that a chat's data set or the template reads."""
    prompter = strategy.prompter
    fields = {prompter.message_field_training, prompter.message_field_training_detail} - {None}
    return {*prompter.message_property_mappings.values(), *prompter.chat_template_msg_variables, *fields}


def without_nulls(row: Row) -> Row:
    """Copy of a chat's row without nulls, as Axolotl reads it."""
    copied: Row = remove_none_values(deepcopy(row))
    return copied


@contextmanager
def on_day(seconds: float) -> Iterator[None]:
    """Let chat templates write the date of a time, in seconds since 1970."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls.fromtimestamp(seconds, tz)

    with patch.object(chat_template_utils, "datetime", Clock):
        yield


def changed_by_loading(rows: Sequence[Row], kind: RowType) -> list[list[str]]:
    """For each row of a JSONL file, the paths of values that change between the file and Axolotl's code.

    The loader makes one table of all rows; for chats, Axolotl then removes each null.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        write_rows(file, rows)
        try:
            loaded = Dataset.from_json(str(file), cache_dir=folder)
        except Exception:  # tokenizing the rows reports it
            return [[] for _ in rows]
        tables = [remove_none_values(row) for row in loaded]
    changes = []
    for row, table in zip(rows, tables, strict=True):
        after = dict(_values(table, ""))
        paths = set()
        for path, value in _values({name: row[name] for name in kind.names if name in row}, ""):
            # to a template, a null field of a message is a missing one
            is_missing = value is None and path.count(".") <= 2
            if not is_missing and repr(after.get(path, ...)) != repr(value):
                paths.add(_NUMBER.sub("[]", path.lstrip(".")))
        changes.append(sorted(paths))
    return changes


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Paths and values of what a row contains, without mappings and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _values(item, f"{path}[{index}]")
    else:
        yield path, value


def unknown_roles(strategy: Any, row: Row) -> list[str]:
    """Roles of a row that neither its data set nor the template knows, in alphabetical order."""
    roles = {strategy.transform_message(message)["role"] for message in strategy._get_messages(row)}
    template = strategy.prompter.chat_template
    roles -= {*strategy.prompter.roles.values(), *strategy.roles_to_train, "system", "user", "assistant"}
    return sorted(role for role in roles if not re.search(rf"""['"]{re.escape(role)}['"]""", template))


def count_packed(cfg: Any, sizes: list[int]) -> tuple[int, int]:
    """Count the packed sequences of rows, and those of a micro batch.

    The rows are packed as in axolotl/core/trainers/base.py.
    """
    # a micro batch has micro_batch_size sequences or, for attention that tells rows apart, a single longer one
    real_batches = cfg.multipack_real_batches
    if real_batches is None:
        real_batches = not cfg.attn_supports_packing
    sequences = cfg.micro_batch_size if real_batches else 1
    sampler = MultipackBatchSampler(
        RandomSampler(sizes),
        batch_size=1,
        batch_max_len=cfg.sequence_len * cfg.micro_batch_size // sequences,
        lengths=numpy.array(sizes),
        bin_size=cfg.sample_packing_bin_size,
        sequential=cfg.sample_packing_sequentially,
    )
    return len(sampler), sequences


def padding(cfg: Any, sizes: list[int]) -> float:
    """Share of padding among all tokens, if Axolotl's collator pads the batches (core/builders/causal.py).

    Args:
        cfg: a config, as Axolotl's DictDefault.
        sizes: lengths of the training rows in tokens, in the order of the file.
    """
    if not sizes:
        return 0.0
    multiple = 1 if cfg.pad_to_sequence_len is False else cfg.pad_to_multiple_of or 64
    padded = 0
    for batch in batched(_in_training_order(cfg, sizes), cfg.micro_batch_size):
        longest = cfg.sequence_len if cfg.pad_to_sequence_len else max(batch)
        padded += math.ceil(longest / multiple) * multiple * len(batch)
    return 1 - sum(sizes) / padded


def _in_training_order(cfg: Any, sizes: list[int]) -> list[int]:
    """Lengths of rows in the order in which a training reads them."""
    if cfg.curriculum_sampling:
        return sizes  # the order of the file
    if cfg.group_by_length:
        order = torch.Generator().manual_seed(cfg.seed)
        step = TrainingSettings.of(cfg).rows_per_step
        return [sizes[i] for i in LengthGroupedSampler(step, lengths=sizes, generator=order)]
    shuffled = sizes.copy()
    random.Random(cfg.seed).shuffle(shuffled)
    return shuffled


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """Text that the tokenizer turns into these tokens, without those that it adds to any text, such as BOS.

    None if there is no such text.
    """
    prefix = len(tokenizer("")["input_ids"])
    text = str(tokenizer.decode(tokens[prefix:], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return text if tokenizer(text)["input_ids"] == list(tokens) else None


ANSWER = "An answer."
_QUESTION = "question"  # placeholder of a chat's first turn


@dataclass(frozen=True)
class PromptText:
    """Text of a training prompt.

    Attributes:
        text: the prompt with {placeholders}, without the tokens that the tokenizer adds before any text.
        fields: names of the placeholders.
        ends: texts of the tokens that end an answer in training.
    """

    text: str
    fields: list[str]
    ends: list[str]


def as_code(cfg: Config, tokenizer: Path, texts: dict[str, str]) -> str | None:
    """Python code that sets `inputs` to the tokens of a training prompt; for arguments and None, see `prompt_text`."""
    prompt = prompt_text(cfg, tokenizer, texts)
    if prompt is None:
        return None
    lines = "".join(f"    {json.dumps(line, ensure_ascii=False)}\n" for line in prompt.text.splitlines(keepends=True))
    call = 'inputs = tokenizer(prompt, return_tensors="pt")'
    return f"# replace each name in braces with a text\nprompt = (\n{lines})\n{call}"


def prompt_text(cfg: Config, tokenizer: Path, texts: dict[str, str]) -> PromptText | None:
    """Text of the prompt that Axolotl writes for a row whose fields are {placeholders}.

    Returns None if tokenizing the text gives tokens that differ from Axolotl's, if the data set type is unknown, or if
    there is no tokenizer.

    Args:
        cfg: the run's config.
        tokenizer: folder of the training tokenizer.
        texts: texts of some fields; all other fields stay placeholders.
    """
    first = next(iter(datafiles.training_sets(cfg)), datafiles.NO_DATASET)
    row = _placeholders(first.entry)
    if not row:
        return None
    cfg, dataset = DictDefault(cfg | {"train_on_inputs": False}), DictDefault(first.entry | LOSS_ON_ANSWERS)
    row |= {name: text for name, text in texts.items() if name in row}
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        (tokens,) = tokenize("its prompt", cfg, dataset, loaded, [row], 2**20)
    except (OSError, ValueError, UserError):
        return None
    text = text_of(loaded, tokens.parts()[0])
    if text is None:
        return None
    fields = [name for name in dict.fromkeys([_QUESTION, *row]) if f"{{{name}}}" in text]
    return PromptText(text, fields, [str(loaded.decode([end])) for end in end_ids(cfg, loaded)])


def trained_template(cfg: Config, folder: Path, texts: dict[str, str]) -> str | None:
    """Chat template that writes the prompts of training; None without a tokenizer or such a template.

    For chats this is the template of training, with its arguments as defaults; for other rows it writes the training
    prompt around the last message.

    Args:
        cfg: the run's config.
        folder: folder of the training tokenizer.
        texts: texts of some fields, see `prompt_text`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    first = next(iter(datafiles.training_sets(cfg)), datafiles.NO_DATASET)
    if isinstance(row_type(first.entry), Chat):
        return _with_defaults(str(tokenizer.chat_template or ""), cfg.get("chat_template_kwargs") or {}) or None
    prompt = prompt_text(cfg, folder, texts)
    if prompt is None or len(prompt.fields) != 1:
        return None
    before, _, after = prompt.text.partition(f"{{{prompt.fields[0]}}}")
    begin = str(tokenizer.decode(tokenizer("")["input_ids"]))  # which chat servers do not add
    return f"{{{{ {json.dumps(begin + before)} }}}}{{{{ messages[-1].content }}}}{{{{ {json.dumps(after)} }}}}"


def _with_defaults(template: str, arguments: Row) -> str:
    """Template with default values for some of its arguments."""
    for name, value in arguments.items():
        default = f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value)} %}}{{%- endif %}}"
        if default not in template:
            template = default + template
    return template


def _placeholders(dataset: Config) -> Row:
    """Row with {placeholders} in the fields that form the prompt; empty for an unknown data set type.

    Optional fields are present if the first row of the data has them, because they can change the prompt's wording.
    """
    kind = row_type(dataset)
    if isinstance(kind, Chat):
        roles = {"user": ["user"], "assistant": ["assistant"]} | (dataset.get("roles") or {})
        question = {kind.role: roles["user"][0], kind.content: f"{{{_QUESTION}}}"}
        return {kind.messages: [question, {kind.role: roles["assistant"][0], kind.content: ANSWER}]}
    if not kind.reference or len(kind.required) == 1:  # completion has no prompt
        return {}
    first = {}
    for file in datafiles.jsonl_files(dataset)[:1]:
        with reading(file) as lines:
            first = next(islice(json_rows(lines, file, ()), 1), {})
    placeholders = {name: f"{{{name}}}" for name in kind.names if not first or first.get(name)}
    return placeholders | {kind.reference: ANSWER}
