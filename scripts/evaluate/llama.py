"""llama.cpp's server as an engine: a GGUF file, its tokens, and its distance from the trained model.

The server generates by OpenAI's protocol. Its own endpoints, /props, /tokenize and /apply-template, show the prompts of
a chat. Tried with llama.cpp of October 2026:

- The tokens of an answer are in its log-probabilities, with the EOS or end-of-turn token, which its text lacks.
- Log-probabilities are the model's, before any sampler or `logit_bias`. A bias of 1000 therefore forces a token whose
  log-probability can be read. With `post_sampling_probs`, a forced token has probability 1. A grammar of token ids
  fails with error 500, and `echo` is refused.
- The server ends answers at its own set of tokens, which no endpoint names.
"""

import asyncio
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import batched, takewhile
from operator import eq, sub
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import openai
from pydantic import BaseModel, Field, ValidationError

from ..base.errors import UserError, WorkFailed
from ..base.terminal import Bar, say
from .server import RETRIES, Api, Listed, Server, TokenId, api_at, cause
from .settings import Completion, Distance, Example, ServedFile, sampled, until_end

if TYPE_CHECKING:
    import torch

    from .prompter import Prompter  # imports torch and Axolotl, which `served_file` does not need
    from .transformers_engine import TransformersEngine

COMPARED_TOKENS = 32  # maximum number of tokens per row, from the start of its answer; each is a request
MOST_PROBABLE = 64  # tokens whose log-probabilities a response lists
FORCING = 1000.0  # bias that makes a token certain
LOWEST = -80.0  # log-probability that stands for zero, which the server writes as -3.4e38
LEAST = 1e-6  # least probability of all unlisted tokens; the server's probabilities are rounded to about 1e-7
MOST_KL = 0.0005
"""Maximum mean KL of a file with 16-bit weights from the merged weights, in nats.

Right files had at most 0.0001. The smallest fault, after 8 steps of training, had 0.0013 (docs/how/gguf.md).
"""


class _Probability(BaseModel):
    id: TokenId
    logprob: float = Field(le=0.01)  # and not NaN; rounding can exceed 0


class _Token(_Probability):
    """Token of an answer, with the most probable tokens in its place."""

    top_logprobs: Listed[_Probability]


class _LogProbabilities(BaseModel):
    content: Listed[_Token]


class _Answer(BaseModel):
    """Answer with its log-probabilities; `finish_reason` is "stop" if its last token ends it."""

    finish_reason: str
    logprobs: _LogProbabilities


class _LlamaAnswer(BaseModel):
    choices: list[_Answer] = Field(min_length=1)


class _Slot(BaseModel):
    n_ctx: int


class _Props(BaseModel):
    """Properties of a server; old servers send no type of the file."""

    model_path: str
    model_ftype: str = "unknown"
    total_slots: int = Field(ge=1, le=1024)
    default_generation_settings: _Slot


class _Chat(BaseModel):
    prompt: str


class _Text(BaseModel):
    tokens: Listed[TokenId]


def served_file(url: str, model: str | None) -> ServedFile | None:
    """GGUF file behind a model of a server; None if the server is not llama.cpp's, or does not respond.

    Raises:
        UserError, WorkFailed: see `_failures`.
    """
    api = api_at(url)
    with _failures(api):
        return asyncio.run(_served_file(api, model))


async def _served_file(api: Api, name: str | None) -> ServedFile | None:
    models = []
    with suppress(openai.APIError, ValidationError, TimeoutError):
        models = await api.models()
    for model in models:
        if model.id == name and model.meta:  # which only llama.cpp's server sends
            async with _root(api) as root:
                props = await _props(root)
            bits = round(8 * model.meta.size / model.meta.n_params, 2)
            return ServedFile(name=Path(props.model_path).name, quantization=props.model_ftype, bits=bits)
    return None


def _root(api: Api) -> openai.AsyncOpenAI:
    """Client for the endpoints besides OpenAI's."""
    return Api(api.url.removesuffix("v1/"), api.key, api.timeout).client(RETRIES)


async def _props(root: openai.AsyncOpenAI) -> _Props:
    return _Props.model_validate_json(await root.get("props", cast_to=str))


async def _post[T: BaseModel](client: openai.AsyncOpenAI, endpoint: str, reply: type[T], **body: object) -> T:
    """Post to an endpoint of llama.cpp's own; return its reply."""
    return reply.model_validate_json(await client.post(endpoint, cast_to=str, body=body))


@contextmanager
def _failures(api: Api) -> Iterator[None]:
    """Turn failures of requests into errors.

    Raises:
        UserError: the server lacks an endpoint.
        WorkFailed: the server does not respond, or not as llama.cpp's does.
    """
    try:
        yield
    except openai.NotFoundError as error:
        path = error.request.url.path
        raise UserError(
            f"--engine {api.url}: the server has no {path}; use a llama.cpp of February 2025 or newer"
        ) from None
    except (openai.APIError, ValueError, TimeoutError) as error:
        raise WorkFailed(f"{api.url}: {cause(error)}") from None


class LlamaServer(Server):
    """`Engine` on a llama.cpp server.

    Args:
        prompter: prompter of the run, with the settings.
        api: access to the server.
        file: file that the server answers with.
        at_once: number of simultaneous requests.
    """

    def __init__(self, prompter: "Prompter", api: Api, file: ServedFile, at_once: int):
        super().__init__(prompter, api, str(prompter.settings.model), at_once)
        self.file = file

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """Implement `Server.generate`; llama.cpp's server answers to any model's name.

        Raises:
            WorkFailed: another server, or none, is at the URL.
        """
        for answers in super().generate(prompts, done):
            if served_file(self.api.url, self.model) != self.file:
                raise WorkFailed(f"{self.api.url}: no longer serves {self.file}; start the server again with this file")
            yield answers

    def options(self, i: int) -> dict[str, object]:
        """Implement `Server.options`; the list of samplers leaves out penalties that the server has by default."""
        decoding = self.settings.decoding
        options = {"logprobs": 1, "samplers": ["temperature"], "temperature": 0}
        if decoding.do_sample:
            options |= {"samplers": ["temperature", "top_k", "top_p"], "temperature": decoding.temperature}
            options |= {"top_k": decoding.top_k, "top_p": decoding.top_p, "seed": decoding.seed + i}
        return options

    def tokens_of(self, content: bytes) -> list[int]:
        """Implement `Server.tokens_of`; the server takes no stop tokens, so an answer can go on behind its end.

        Raises:
            ValueError: a token with a text ended the answer, but ends none in training.
        """
        answer = _LlamaAnswer.model_validate_json(content).choices[0]
        tokens = until_end([token.id for token in answer.logprobs.content], self.ends)
        text = self.tokenizer.decode(tokens[-1:], skip_special_tokens=True)
        if answer.finish_reason == "stop" and text and tokens[-1] not in self.ends:
            raise ValueError(f"the file wrongly ends answers at {text!r} (token {tokens[-1]}); export it again")
        return tokens

    def check(self, examples: Sequence[Example], reference_runs_here: bool) -> Distance | None:
        """Implement `Engine.check`."""
        self.require_same_tokens(examples)
        return self.distance(examples) if reference_runs_here else None

    def require_same_tokens(self, examples: Sequence[Example]) -> None:
        """Require a sufficient context, and the training's prompt, EOS and end-of-turn tokens, before the first answer.

        Raises:
            UserError: the context is too small, the server does not end answers at a token of the training, or the
                tokens of a prompt differ.
            WorkFailed: the server does not respond.
        """
        with _failures(self.api):
            asyncio.run(self._require_tokens(examples))

    async def _require_tokens(self, examples: Sequence[Example]) -> None:
        compared = 0
        async with _root(self.api) as root:
            self._require_context(await _props(root), examples)
            await self._require_ends(root, examples[0].prompt)
            for i, example in enumerate(examples):
                compared += await self._require_prompt(root, i, example)
        about = f"{self.file.name}: tokens of {compared:,} of {len(examples):,} prompts equal the training's"
        if examples[0].messages is None:
            about += "; its chat template was not compared, because the run did not train on chats"
        say(about)

    def _require_context(self, props: _Props, examples: Sequence[Example]) -> None:
        longest = max(len(example.prompt) for example in examples) + self.settings.decoding.max_new_tokens
        context, slots = props.default_generation_settings.n_ctx, props.total_slots
        if context < longest:
            raise UserError(
                f"--engine {self.api.url}: the server has a context of {context:,} tokens for each of its {slots} "
                f"slots, and the longest row needs {longest:,}; start it with `-c {longest * slots}`"
            )

    async def _require_ends(self, root: openai.AsyncOpenAI, prompt: list[int]) -> None:
        """Force each token that ends an answer in training, and require that the server then stops."""
        from ..training.tokens import end_ids

        for end in sorted(end_ids(self.prompter.cfg, self.tokenizer)):
            if (await self._forced(root, prompt, end, logprobs=1)).finish_reason != "stop":
                piece = self.tokenizer.convert_ids_to_tokens(end)
                raise UserError(
                    f"{self.file.name}: does not end an answer at {piece!r} (token {end}), as the training does; "
                    "export it again, with the tokenizer in the run's folder"
                )

    async def _require_prompt(self, root: openai.AsyncOpenAI, i: int, example: Example) -> bool:
        """Compare a row's prompt: its text, as Ollama sends it, and its chat; False if neither can be compared.

        The text can show another use of BOS than the chat, because the server takes BOS from the start of a chat if the
        file says that the tokenizer adds it.
        """
        from ..training.tokens import text_of

        if len(example.prompt) >= self.prompter.longest:  # truncated
            return False
        texts = [text_of(self.tokenizer, example.prompt)]  # None if no text has the training's tokens
        if example.messages is not None:
            texts.append((await _post(root, "apply-template", _Chat, messages=example.messages)).prompt)
        for text in filter(None, texts):
            served = await _post(root, "tokenize", _Text, content=text, add_special=True, parse_special=True)
            if served.tokens != example.prompt:
                raise self._differing(i, example.prompt, served.tokens)
        return any(texts)

    def _differing(self, i: int, expected: list[int], served: list[int]) -> UserError:
        """Error that shows two prompts from their first difference, token by token."""
        start = len([*takewhile(bool, map(eq, expected, served))])
        return UserError(
            f"{self.file.name}: the prompt of row {i + 1} differs from the training's from token {start + 1} on\n"
            f"  training: {self._shown(expected, start)}\n  server:   {self._shown(served, start)}\n"
            "export the file again, with the tokenizer and the chat template in the run's folder, or start the server "
            "with `--chat-template-file`"
        )

    def _shown(self, tokens: list[int], start: int) -> str:
        """Tokens around a difference, with their pieces."""
        shown = tokens[max(start - 2, 0) : start + 8]
        pieces = self.tokenizer.convert_ids_to_tokens(shown)
        return ", ".join(f"{token} {piece!r}" for token, piece in zip(shown, pieces, strict=True))

    def distance(self, examples: Sequence[Example]) -> Distance:
        """Distance of the file from the trained model, which is loaded here; log it.

        Raises:
            UserError: the file has 16-bit weights, and the KL exceeds `MOST_KL`.
            WorkFailed: the server does not respond.
        """
        from .transformers_engine import TransformersEngine

        chosen = sampled(examples)
        with _failures(self.api):
            rows = asyncio.run(self._forced_rows(chosen))
        with Bar("comparing with the adapter"):
            reference = TransformersEngine(self.prompter)
            distance = compare(reference, chosen, rows)
            reference.free()
        say(f"{self.file}: {distance}")
        if distance.kl > MOST_KL and not self.file.is_quantized:  # quantization can change a model more than a fault
            raise UserError(
                f"{self.file.name}: not the trained model: its mean KL from the merged weights is {distance.kl:.4f}, "
                f"and at most {MOST_KL} in right files of 16 bits; export it again with `recipe publish RUN --gguf "
                "f16`, which merges the adapter into the weights that it was trained on"
            )
        return distance

    async def _forced_rows(self, examples: Sequence[Example]) -> list[list[_Token]]:
        """Answers that the server is forced to give, one at a time in each of its slots, which caches the prompt."""
        rows = []
        async with _root(self.api) as root:
            slots = (await _props(root)).total_slots
            with Bar("forcing reference answers", len(examples)) as bar:
                for batch in batched(examples, slots):
                    answers = [self._forced_row(root, example, slot) for slot, example in enumerate(batch)]
                    rows += await asyncio.gather(*answers)
                    bar.update(len(rows))
        return rows

    async def _forced_row(self, root: openai.AsyncOpenAI, example: Example, slot: int) -> list[_Token]:
        tokens = []
        for i, token in enumerate(example.answer[:COMPARED_TOKENS]):
            prompt = [*example.prompt, *example.answer[:i]]
            answer = await self._forced(root, prompt, token, logprobs=MOST_PROBABLE, id_slot=slot)
            tokens += answer.logprobs.content
        return tokens

    async def _forced(self, root: openai.AsyncOpenAI, prompt: list[int], token: int, **options: object) -> _Answer:
        """Answer of a given token.

        Raises:
            ValueError: the server does not force tokens by `logit_bias`.
        """
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "logit_bias": [[token, FORCING]]}
        body |= {"samplers": ["temperature"], "temperature": 0} | options
        answer = (await _post(root, "v1/completions", _LlamaAnswer, **body)).choices[0]
        if [entry.id for entry in answer.logprobs.content] != [token]:
            raise ValueError("the server does not force tokens by logit_bias; use a newer llama.cpp")
        self.require_vocabulary([entry.id for entry in answer.logprobs.content[0].top_logprobs])
        return answer


def compare(reference: "TransformersEngine", examples: Sequence[Example], rows: Sequence[list[_Token]]) -> Distance:
    """Compare a file's log-probabilities of reference answers with those of the trained model.

    Args:
        reference: base model and adapter, which are merged here.
        examples: the rows.
        rows: tokens of each row's answer by the file; all or the first.
    """
    trained = [float(expected[token.id]) for expected, token in _at_tokens(reference, examples, rows)]
    merged = []
    served = []
    divergences = []
    reference.merge()
    for expected, token in _at_tokens(reference, examples, rows):
        merged.append(float(expected[token.id]))
        served.append(max(token.logprob, LOWEST))
        divergences.append(kl(expected, token))
    return Distance(
        rows=len(rows),
        tokens=len(served),
        kl=fmean(divergences),
        difference=fmean(map(abs, map(sub, served, merged))),
        loss=-fmean(served),
        merged_loss=-fmean(merged),
        trained_loss=-fmean(trained),
    )


def _at_tokens(
    reference: "TransformersEngine", examples: Sequence[Example], rows: Sequence[list[_Token]]
) -> Iterator[tuple["torch.Tensor", _Token]]:
    """Log-probabilities by the reference at each token that the server was forced to give, with that token."""
    for example, row in zip(examples, rows, strict=True):
        expected = reference.log_probabilities(example.prompt, [token.id for token in row])
        yield from zip(expected, row, strict=True)


def kl(trained: "torch.Tensor", token: _Token) -> float:
    """Kullback-Leibler divergence of a server's distribution from the trained model's, in nats.

    The server lists only its most probable tokens. All others count as a single one, so this is a lower bound of the
    divergence over the whole vocabulary.
    """
    import torch

    expected = trained[[entry.id for entry in token.top_logprobs]]
    served = torch.tensor([entry.logprob for entry in token.top_logprobs], dtype=trained.dtype).clamp(min=LOWEST)
    rest, rest_served = ((1 - listed.exp().sum()).clamp(min=LEAST) for listed in (expected, served))
    return float((expected.exp() * (expected - served)).sum() + rest * (rest / rest_served).log())
