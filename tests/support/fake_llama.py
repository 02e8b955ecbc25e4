"""A fake of llama.cpp's server: chats in ChatML with a token per byte, and log-probabilities from a list of logits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from a_server import AServer, Reply, serving

MISSING: Reply = (404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}})


def chatml(messages: Sequence[dict[str, str]], system: str = "Be short.") -> str:
    """Prompt of a chat, with a default system prompt."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return "".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in messages) + "<|assistant|>\n"


def byte_tokenizer() -> Any:
    """A tokenizer with a token per byte, the special tokens <unk>, <s> and </s>, and BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@dataclass
class FakeLlama:
    """State of the server; a test changes attributes to plant faults.

    Attributes:
        ends: tokens at which it ends an answer.
        before: tokens in front of every prompt.
        answer: tokens that it answers any prompt with, as long as nothing is forced.
        logits: logits of its model, whatever the prompt.
        context: tokens of a slot.
        missing: endpoints that it does not have.
    """

    tokenizer: Any = field(default_factory=byte_tokenizer)
    ends: set[int] = field(default_factory=lambda: {2})
    before: list[int] = field(default_factory=lambda: [1])
    system: str = "Be short."
    answer: list[int] = field(default_factory=lambda: [7, 8, 2, 9])
    logits: torch.Tensor = field(default_factory=lambda: torch.linspace(0, 5, 1024))
    context: int = 64
    quantization: str = "F16"
    bits: float = 16.0
    forces: bool = True
    missing: Sequence[str] = ()

    def models(self) -> Reply:
        meta = {"n_params": 8, "size": int(self.bits), "n_vocab": 1024}
        return 200, {"data": [{"id": "m", "owned_by": "llamacpp", "meta": meta}]}

    def props(self) -> Reply:
        props = {"model_path": "/models/m-f16.gguf", "model_ftype": self.quantization, "total_slots": 2}
        return 200, props | {"default_generation_settings": {"n_ctx": self.context}}

    def reply(self, body: dict[str, Any]) -> Reply:
        path = body["path"]
        if path in self.missing:
            return MISSING
        if path == "/apply-template":
            return 200, {"prompt": chatml(body["messages"], self.system)}
        if path == "/tokenize":
            return 200, {"tokens": self.before + self.tokenizer(body["content"], add_special_tokens=False)["input_ids"]}
        tokens = self.answer
        if body.get("logit_bias") and self.forces:
            [[forced, _]] = body["logit_bias"]
            tokens = [forced] if forced in self.ends else [forced, 7]
        tokens = tokens[: body["max_tokens"]]
        content = [self._token(token, body["logprobs"]) for token in tokens]
        reason = "stop" if tokens[-1] in self.ends else "length"
        return 200, {"choices": [{"text": "not this", "finish_reason": reason, "logprobs": {"content": content}}]}

    def _token(self, token: int, listed: int) -> dict[str, Any]:
        probabilities = self.logits.double().log_softmax(-1)
        top = [{"id": int(i), "logprob": float(probabilities[i])} for i in probabilities.topk(listed).indices]
        return {"id": token, "logprob": float(probabilities[token]), "top_logprobs": top}


@contextmanager
def serving_llama(llama: FakeLlama) -> Iterator[AServer]:
    with serving(llama.reply) as server:
        server.models = llama.models()
        server.others["/props"] = llama.props()
        yield server
