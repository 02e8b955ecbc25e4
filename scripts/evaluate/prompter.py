"""Evaluation prompts, identical to the prompts in training."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from axolotl.loaders import ModelLoader
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from ..base.errors import UserError, WorkFailed
from ..base.files import JsonObject, Row
from ..base.yamlfiles import Config
from ..config.datafiles import DatasetRef
from ..training.row_types import Chat, row_type
from ..training.tokens import (
    LOSS_ON_ANSWERS,
    as_trained,
    end_ids,
    load_strategy,
    require_one_training_row_each,
    tokenize,
)
from .evaluation_rows import EvaluationRow
from .settings import Completion, EvaluationSettings, Example


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
        """Maximum number of tokens in a prompt; longer prompts are truncated.

        Raises:
            UserError: the context is too short.
        """
        longest: int = self.config.get_text_config().max_position_embeddings - self.settings.decoding.max_new_tokens
        if longest < 1:
            raise UserError("--max-new-tokens: leaves no room for a prompt in the model's context; give fewer tokens")
        return longest

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end an answer, ascending: from training, and from the base model's config."""
        try:
            config = GenerationConfig.from_pretrained(self.settings.base_model, revision=self.revision)
        except OSError:  # the model has no generation config
            config = GenerationConfig.from_model_config(self.config)
        ends = config.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        return sorted(end_ids(self.cfg, self.tokenizer).union(ends) - {None})

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
        by_dataset = defaultdict(list)
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
        data = self.settings.data
        cfg = DictDefault({**self.trained, "train_on_inputs": False})  # DictDefault's | would keep existing values
        dataset = DictDefault({**cfg[ref.section][ref.index], **LOSS_ON_ANSWERS})
        kind = row_type(dataset)
        tokenized = tokenize(data, cfg, dataset, self.tokenizer, rows, longest)
        require_one_training_row_each(data, dataset, rows, tokenized)
        examples = []
        for row, tokens in zip(rows, tokenized, strict=True):
            prompt, answer = tokens.parts()
            reference = row.get(kind.reference)
            if reference is None:
                reference = Completion.of(self.tokenizer, answer).text
            examples.append(Example(prompt[-longest:], reference if answer else "", answer))
        if not isinstance(kind, Chat):
            return examples
        strategy = load_strategy("chat_template", self.tokenizer, cfg, dataset)
        shared = []  # whose answer begins with a token that holds the prompt's end, too
        neutral = []
        for row, example in zip(rows, examples, strict=True):
            example.messages = _prompt_messages(strategy, row)
            text = kind.answer_of(row).strip()
            if text and not text.startswith(Completion.of(self.tokenizer, example.answer[:1]).text):
                shared.append(example)
                neutral.append(kind.with_answer(row, NEUTRAL))
                if example.reference.endswith(text):
                    example.reference = text
        if not shared:
            return examples
        tokenized = tokenize(data, cfg, dataset, self.tokenizer, neutral, longest)
        for example, tokens in zip(shared, tokenized, strict=True):
            example.prompt = tokens.parts()[0][-longest:]
            example.answer = self.tokenizer(example.reference, add_special_tokens=False)["input_ids"]
        return examples


def _prompt_messages(strategy: Any, row: Row) -> list[JsonObject] | None:
    """Messages before the answer of a chat, as Axolotl's strategy reads them; None if the row has tools."""
    if row.get("tools"):
        return None
    messages = []
    for turn in strategy.get_conversation_thread(row)[:-1]:
        messages.append({key: turn[key] for key in ("role", "content") if key in turn})
    return messages


NEUTRAL = "0"  # tokenizers separate a digit from the text before it
