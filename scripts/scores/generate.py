"""Generating text with a run's base model and adapter, from the very prompts that it was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from axolotl.utils.dict import DictDefault
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ..base.errors import UserError
from ..base.files import embedding_rows
from ..base.yamlfiles import Config
from ..checks.tokens import tokenize
from ..configs.datafiles import is_alpaca
from ..runs.eval_loss import MASKED

if TYPE_CHECKING:
    from .evaluations import EvaluationSettings

disable_progress_bar()

_LOSS_ON_ANSWERS = {  # of a data set of chats, which can have it elsewhere
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "message_field_training": None,
    "message_field_training_detail": None,
}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # Axolotl's defaults for qlora


@dataclass
class Example:
    """A test row: the tokens that the model is given, and the text that it should answer with."""

    prompt: list[int]
    reference: str


class Prompter:
    """What turns rows into the prompts of a run.

    Args:
        settings: the base model, and how many tokens an answer may have.
        cfg: the run's config.
        tokenizer: the folder in which the training left its tokenizer, special tokens set.
    """

    def __init__(self, settings: "EvaluationSettings", cfg: Config, tokenizer: Path):
        self.settings, self.cfg = settings, cfg
        self.revision = cfg.get("revision_of_model", "main")
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
        self.config = AutoConfig.from_pretrained(settings.base_model, revision=self.revision)

    def examples(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        """Each row's prompt, as Axolotl's own code writes it in training, and its reference.

        The answer is the last stretch of tokens that carry loss, so in a chat the assistant's last turn; all before it
        is the prompt, with the turns before whole. For this Axolotl is asked to have loss on just the answers, whatever
        the training had it on. A prompt that leaves no room for an answer in the model's context is cut: by Axolotl at
        its end, where that writes prompt and answer apart, else at its beginning.

        Raises:
            UserError: Axolotl cannot tokenize the rows, or one has nothing to answer or nothing to answer to.
        """
        longest = self.config.max_position_embeddings - self.settings.decoding.max_new_tokens
        cfg = DictDefault(self.cfg | {"train_on_inputs": False})
        dataset = DictDefault({**cfg.datasets[0], **_LOSS_ON_ANSWERS})  # its | would keep the values that are there
        try:
            tokenized = tokenize(cfg, dataset, self.tokenizer, rows, longest)
        except Exception as error:  # a strategy can raise anything
            problem = f"Axolotl cannot tokenize these rows as {dataset.type}: {type(error).__name__}: {error}"
            raise UserError(f"{self.settings.data}: {problem}") from None
        if len(tokenized) != len(rows):
            problem = f"Axolotl makes {len(tokenized)} training rows of {len(rows)} ({dataset.type})"
            raise UserError(f"{self.settings.data}: {problem}; they cannot be evaluated")
        examples = []
        for number, (row, tokens) in enumerate(zip(rows, tokenized, strict=True), start=1):
            start, end = answer_of(tokens.labels)
            if not 0 < start < end:
                problem = (
                    "has no answer that Axolotl would train on" if start == end else "is an answer without a prompt"
                )
                raise UserError(
                    f"{self.settings.data}: row {number} {problem} ({dataset.type}); it cannot be evaluated"
                )
            own = row.get("output") if is_alpaca(dataset.type) else None  # as it was written, not as it was tokenized
            trained = str(self.tokenizer.decode(tokens.ids[start:end], skip_special_tokens=True)).strip()
            examples.append(Example(tokens.ids[:start][-longest:], trained if own is None else own))
        return examples


def answer_of(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last stretch of tokens that carry loss begins and ends; of none, both are 0."""
    end = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != MASKED), 0)
    start = next((i for i in range(end, 0, -1) if labels[i - 1] == MASKED), 0)
    return start, end


def grow_embedding(model: PreTrainedModel, tokens: int, adapter: str | None) -> None:
    """Give a base model's embedding the rows that it was trained with, if it has fewer.

    For tokens that a config adds to the tokenizer Axolotl adds rows (loaders/model.py), which PEFT saves with the
    adapter, and misses when it loads that.

    Args:
        model: the base model.
        tokens: those of the training's tokenizer.
        adapter: the adapter's folder; None where it is not to be loaded.
    """
    saved = embedding_rows(Path(adapter) / "adapter_model.safetensors") if adapter else None
    if (rows := saved or tokens) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows)


class Generator(Prompter):
    """A run's base model, quantized as in training, with or without an adapter; see `Prompter`."""

    def __init__(self, settings: "EvaluationSettings", cfg: Config, tokenizer: Path):
        super().__init__(settings, cfg, tokenizer)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        quantization = None
        if settings.quantized:
            kinds = NF4 | {"bnb_4bit_compute_dtype": dtype} | (cfg.get("bnb_config_kwargs") or {})
            quantization = BitsAndBytesConfig(load_in_4bit=True, **kinds)
        self.model = AutoModelForCausalLM.from_pretrained(
            settings.base_model,
            revision=self.revision,
            dtype=dtype,
            quantization_config=quantization,
            device_map=self.device,
            attn_implementation=cfg.get("attn_implementation"),
        )
        self.model.generation_config = self._decoding()
        grow_embedding(self.model, len(self.tokenizer), settings.adapter if settings.adapter_sha256 else None)
        if settings.adapter_sha256:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, settings.adapter)
        self.model.eval()
        self._cache: tuple[tuple[int, int], StaticCache] | None = None

    def _decoding(self) -> GenerationConfig:
        """The settings' decoding and nothing of the model's own but the tokens that end an answer."""
        decoding = self.settings.decoding
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        ends = self.model.generation_config.eos_token_id
        return GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=decoding.do_sample,
            eos_token_id=sorted({self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
            **(sampling if decoding.do_sample else {}),
        )

    def _static_cache(self, rows: int, room: int) -> StaticCache | None:
        """An empty cache; the last one again where its shape is the same, as what is compiled is for its memory."""
        if self.settings.cache != "static":
            return None
        if self._cache and self._cache[0] == (rows, room):
            self._cache[1].reset()
        else:
            self._cache = None  # its memory, before the next takes some
            self._cache = (rows, room), StaticCache(config=self.config, max_cache_len=room)
        return self._cache[1]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], number: int, room: int) -> list[str]:
        """One answer a prompt. They do not depend on the batches that came before.

        Args:
            prompts: the tokens of each.
            number: the batch's, which is added to the seed where the decoding samples.
            room: the tokens that a static cache is to have room for: prompt and answer of the longest at least.
        """
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        set_seed(self.settings.decoding.seed + number)
        output = self.model.generate(**batch, past_key_values=self._static_cache(len(prompts), room))
        answers = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]
