"""Evaluation prompts, identical to the prompts in training."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from axolotl.loaders import ModelLoader
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from ..base.errors import UserError, WorkFailed
from ..base.files import Row, json_rows
from ..base.yamlfiles import Config
from ..config import datafiles
from ..config.datafiles import DatasetRef
from ..training.losses import MASKED
from ..training.row_types import Chat, row_type
from ..training.tokens import as_trained, load_strategy, require_one_each, taught_ends, tokenize
from .evaluation_rows import EvaluationRow
from .scores_file import EvaluationSettings

LOSS_ON_ANSWERS = {  # overrides keys of chat data sets that can put loss on more than the answers
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "message_field_training": None,
    "message_field_training_detail": None,
}


@dataclass
class Example:
    """Prompt and expected answer of a test row.

    Attributes:
        prompt: tokens of the prompt.
        reference: text of the answer.
        answer: tokens of the answer, with the token that ends it if training puts loss on it.
        messages: messages of the prompt, with `role` and `content`; None if the row is no chat, or calls tools.
    """

    prompt: list[int]
    reference: str
    answer: list[int]
    messages: list[Row] | None = None


class Prompter:
    """Writer of prompts for a run.

    Args:
        settings: base model, and maximum number of tokens in an answer.
        cfg: the run's config.
        tokenizer: folder of the training tokenizer, with the run's special tokens.
    """

    def __init__(self, settings: EvaluationSettings, cfg: Config, tokenizer: Path):
        self.settings = settings
        self.cfg = cfg
        self.revision = cfg.get("revision_of_model", "main")
        # never None: transformers would ask on the terminal whether to trust the model's code
        self.remote_code = bool(cfg.get("trust_remote_code"))
        self.tokenizer = AutoTokenizer.from_pretrained(
            tokenizer, padding_side="left", trust_remote_code=self.remote_code
        )
        try:
            self.trained = as_trained(cfg | {"base_model": settings.base_model})
            self.trained.torch_dtype = getattr(torch, settings.dtype)
            self._loader = ModelLoader(self.trained, self.tokenizer, inference=True)
        except (OSError, WorkFailed):  # the hub lacks the model or does not respond
            raise
        except Exception as error:  # plugins and validators can raise anything
            raise UserError(f"{settings.data}: Axolotl refuses the run's config: {error}") from None
        self.config = self._loader.model_config

    @cached_property
    def quantization(self) -> BitsAndBytesConfig | None:
        """Quantization of the base model in training; None without quantization."""
        if not self.settings.quantized:
            return None
        self._loader._set_quantization_config()
        return self._loader.model_kwargs["quantization_config"]

    @property
    def longest(self) -> int:
        """Maximum number of tokens in a prompt; longer prompts are truncated."""
        return int(self.config.get_text_config().max_position_embeddings - self.settings.decoding.max_new_tokens)

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer: from training, and from the base model's config."""
        try:
            config = GenerationConfig.from_pretrained(self.settings.base_model, revision=self.revision)
        except OSError:  # the model has no generation config
            config = GenerationConfig.from_model_config(self.config)
        ends = {*taught_ends(self.cfg, self.tokenizer)}
        if isinstance(config.eos_token_id, list):
            ends.update(config.eos_token_id)
        elif config.eos_token_id is not None:
            ends.add(config.eos_token_id)
        return ends

    def examples(self, rows: Sequence[EvaluationRow]) -> list[Example]:
        """Prompt and reference of each row, written by Axolotl's code as in training.

        Here Axolotl marks only the tokens of answers for loss, even if training marked more. The answer is the last
        sequence of tokens with loss; in a chat this is the assistant's last turn. All tokens before the answer are the
        prompt. The reference is the answer field of the row, or the decoded answer if the data set type has no such
        field. A prompt that leaves no room for an answer in the model's context is truncated: at its end if Axolotl
        tokenizes prompt and answer separately, otherwise at its beginning. If a chat's prompt and answer share a token,
        like `:The` in Llama 3, the prompt is tokenized with another answer.

        Raises:
            UserError: Axolotl cannot tokenize the rows, a row has no prompt or no answer, or the context is too short.
        """
        by_dataset: dict[DatasetRef, list[Row]] = defaultdict(list)
        for row in rows:
            by_dataset[row.dataset].append(row.content)
        examples = {dataset: iter(self._examples(dataset, contents)) for dataset, contents in by_dataset.items()}
        in_order = [next(examples[row.dataset]) for row in rows]
        for row, example in zip(rows, in_order, strict=True):
            answered = example.reference.strip()  # without an answer, the end of the prompt is unknown
            if not (answered and example.prompt):
                missing = "prompt" if answered else "answer"
                remedy = "use --data with a copy that has no such rows"
                raise UserError(f"row {row.position + 1} has no {missing}", key=self.settings.data, remedy=remedy)
        return in_order

    def _examples(self, ref: DatasetRef, rows: Sequence[Row]) -> list[Example]:
        """Examples of one data set; a missing answer or prompt is empty."""
        longest = self.longest
        if longest < 1:
            raise UserError("--max-new-tokens: leaves no room for a prompt in the model's context; give fewer tokens")
        data = self.settings.data
        cfg = DictDefault({**self.trained, "train_on_inputs": False})  # DictDefault's | would keep existing values
        dataset = DictDefault({**cfg[ref.section][ref.index], **LOSS_ON_ANSWERS})
        tokenized = tokenize(data, cfg, dataset, self.tokenizer, rows, longest)
        require_one_each(data, dataset, rows, tokenized)
        kind = row_type(dataset)
        examples: list[Example] = []
        with_other_answer: dict[int, Row] = {}
        for number, (row, tokens) in enumerate(zip(rows, tokenized, strict=True)):
            start, end = answer_of(tokens.labels)
            reference = row.get(kind.reference)
            if reference is None:
                reference = self._decode(tokens.ids[start:end])
            if isinstance(kind, Chat):
                answer = kind.answer_of(row).strip()
                first_token = str(self.tokenizer.decode(tokens.ids[start : start + 1])).strip()
                if answer and not answer.startswith(first_token):  # the token also has the end of the prompt
                    with_other_answer[number] = replace_answer(kind, row, NEUTRAL)
                    if reference.endswith(answer):
                        reference = answer
            reference = reference if start < end else ""
            examples.append(Example(tokens.ids[:start][-longest:], reference, tokens.ids[start:end]))
        if isinstance(kind, Chat):
            strategy = load_strategy("chat_template", self.tokenizer, cfg, dataset)
            for row, example in zip(rows, examples, strict=True):
                example.messages = _prompt_messages(strategy, row)
        if not with_other_answer:
            return examples
        tokenized = tokenize(data, cfg, dataset, self.tokenizer, [*with_other_answer.values()], longest)
        for number, tokens in zip(with_other_answer, tokenized, strict=True):
            start, _ = answer_of(tokens.labels)
            examples[number].prompt = tokens.ids[:start][-longest:]
            reference = examples[number].reference
            examples[number].answer = self.tokenizer(reference, add_special_tokens=False)["input_ids"]
        return examples

    def _decode(self, tokens: Sequence[int]) -> str:
        """Text of some tokens, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _prompt_messages(strategy: Any, row: Row) -> list[Row] | None:
    """Messages before the answer of a chat, as Axolotl's strategy reads them; None if the row has tools."""
    if row.get("tools"):
        return None
    messages = []
    for turn in strategy.get_conversation_thread(row)[:-1]:
        messages.append({key: turn[key] for key in ("role", "content") if key in turn})
    return messages


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str | None:
    """Text that the tokenizer turns into these tokens, without those that it adds to any text, such as BOS.

    None if there is no such text.
    """
    prefix = len(tokenizer("")["input_ids"])
    text = str(tokenizer.decode(tokens[prefix:], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return text if tokenizer(text)["input_ids"] == list(tokens) else None


def replace_answer(kind: Chat, row: Row, answer: str) -> Row:
    """Chat with another text in its last turn."""
    *turns, last = row[kind.messages]
    return row | {kind.messages: [*turns, last | {kind.content: answer}]}


NEUTRAL = "0"  # tokenizers separate a digit from the text before it


def answer_of(labels: Sequence[int]) -> tuple[int, int]:
    """Start and end of the last sequence of tokens with loss; (0, 0) if no token has loss."""
    end = len(labels)
    while end > 0 and labels[end - 1] == MASKED:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != MASKED:
        start -= 1
    return start, end


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
    ids = tokens.ids[: answer_of(tokens.labels)[0]]
    text = text_of(loaded, ids)
    if text is None:
        return None
    fields = [name for name in (_QUESTION, *row) if f"{{{name}}}" in text]
    return PromptText(text, fields, [str(loaded.decode([end])) for end in taught_ends(cfg, loaded)])


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
    first: Row = {}
    for file in datafiles.jsonl_files(dataset)[:1]:
        with file.open("rb") as lines:
            first = next(islice(json_rows(lines, file, ()), 1), {})
    placeholders = {name: f"{{{name}}}" for name in kind.names if not first or first.get(name)}
    return placeholders | {kind.reference: ANSWER}
