"""llama.cpp's server as an engine: a GGUF file, its tokens, and its distance from the trained model.

The server generates by OpenAI's protocol. Its own endpoints, /props, /tokenize and /apply-template, show the prompts of
a chat. Tried with llama.cpp of October 2026:

- The tokens of an answer are in its log-probabilities, with the end token, which its text lacks.
- Log-probabilities are the model's, before any sampler or `logit_bias`. A bias of 1000 therefore forces a token whose
  log-probability can be read. With `post_sampling_probs`, a forced token has probability 1. A grammar of token ids
  fails with error 500, and `echo` is refused.
- The server ends answers at its own set of tokens, which no endpoint names.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import batched
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import openai
from pydantic import BaseModel, Field, ValidationError

from ..base.errors import UserError, WorkFailed
from ..base.terminal import Bar, say
from .scores_file import Distance, ServedFile, until_end
from .server import LIST_TIMEOUT, RETRIES, Api, Server, api_at, cause

if TYPE_CHECKING:
    import torch

    from .prompter import Example, Prompter  # imports torch and Axolotl, which `served_file` does not need

OWNER = "llamacpp"  # of the models in the server's list
COMPARED_ROWS = 32  # maximum number of rows for the distance; they are evenly spaced
COMPARED_TOKENS = 32  # maximum number of tokens per row, from the start of its answer; each is a request
MOST_PROBABLE = 64  # tokens whose log-probabilities a response lists
FORCING = 1000.0  # bias that makes a token certain
LOWEST = -80.0  # log-probability that stands for zero, which the server writes as -3.4e38
LEAST = 1e-6  # least probability of all unlisted tokens; the server's probabilities are rounded to about 1e-7
MOST_KL = 0.003
"""Maximum mean KL, in nats, of a file with 16-bit weights."""


class _Slot(BaseModel):
    n_ctx: int


class _Props(BaseModel):
    """Answer of /props; the context is that of a slot."""

    model_path: str
    model_ftype: str = "unknown"
    total_slots: int = Field(ge=1)
    default_generation_settings: _Slot


class _Prompt(BaseModel):
    prompt: str


class _Tokens(BaseModel):
    tokens: list[int]


class _Probability(BaseModel):
    id: int = Field(ge=0)
    logprob: float


class _Token(_Probability):
    """Token of an answer, with the most probable tokens in its place."""

    top_logprobs: list[_Probability]


class _LogProbabilities(BaseModel):
    content: list[_Token]


class _Choice(BaseModel):
    logprobs: _LogProbabilities


class _Response(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


def served_file(url: str, model: str | None) -> ServedFile | None:
    """GGUF file behind a model of a server; None if the server is not llama.cpp's, or does not respond."""
    with suppress(openai.APIError, ValidationError, TimeoutError):
        return asyncio.run(_served_file(api_at(url), model))
    return None


async def _served_file(api: Api, name: str | None) -> ServedFile | None:
    for model in await api.models():
        if model.id == name and model.owned_by == OWNER and model.meta:
            async with _root(api).client(retries=0) as client, asyncio.timeout(LIST_TIMEOUT):
                props = await _props(client)
            bits = 8 * model.meta.size / model.meta.n_params
            return ServedFile(name=Path(props.model_path).name, quantization=props.model_ftype, bits=round(bits, 2))
    return None


def _root(api: Api) -> Api:
    """Access to the endpoints besides OpenAI's."""
    return Api(api.url.removesuffix("v1/"), api.key, api.timeout)


async def _props(client: openai.AsyncOpenAI) -> _Props:
    return _Props.model_validate_json(await client.get("props", cast_to=str))


async def _post(client: openai.AsyncOpenAI, endpoint: str, body: dict[str, Any]) -> str:
    return await client.post(endpoint, cast_to=str, body=body)


async def _tokens_of_text(client: openai.AsyncOpenAI, text: str) -> list[int]:
    """Tokens of a prompt's text, with those that the server adds."""
    body = {"content": text, "add_special": True, "parse_special": True}
    return _Tokens.model_validate_json(await _post(client, "tokenize", body)).tokens


@dataclass(frozen=True)
class ForcedRow:
    """Prompt and answer of a row, and what the server says of each token of the answer."""

    prompt: list[int]
    answer: list[int]
    tokens: list[_Token]


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
        self.prompter = prompter
        self.file = file

    def options(self, i: int) -> dict[str, object]:
        """Options of the request for a prompt, in addition to OpenAI's.

        The list of samplers leaves out all penalties, which the server can have by default.
        """
        decoding = self.settings.decoding
        options: dict[str, object] = {"logprobs": 1, "samplers": ["temperature"], "temperature": 0}
        if decoding.do_sample:
            options |= {"samplers": ["temperature", "top_k", "top_p"], "temperature": decoding.temperature}
            options |= {"top_k": decoding.top_k, "top_p": decoding.top_p, "seed": decoding.seed + i}
        return options

    def tokens_of(self, content: bytes) -> list[int]:
        """Implement `Server.tokens_of`; the server knows no stop tokens, so an answer can go on behind its end."""
        return until_end([token.id for token in _answer_of(content)], self.prompter.ends)

    def require_tokens(self, examples: Sequence["Example"]) -> None:
        """Compare end tokens and prompts with the training's, before any answer is generated.

        Raises:
            UserError: the context is too small, the server does not end answers at an end token of the training, or the
                tokens of a prompt differ.
            WorkFailed: the server does not respond.
        """
        with self._failures():
            asyncio.run(self._require_tokens(examples))

    async def _require_tokens(self, examples: Sequence["Example"]) -> None:
        async with _root(self.api).client(RETRIES) as root:
            self._require_context(await _props(root), examples)
            await self._require_ends(examples[0].prompt)
            compared = 0
            with Bar("comparing prompts", len(examples)) as bar:
                for batch in batched(enumerate(examples), self.at_once):
                    prompts = await asyncio.gather(*[self._served_prompt(root, example) for _, example in batch])
                    for (i, example), served in zip(batch, prompts, strict=True):
                        if served is not None and served != example.prompt:
                            raise self._differing(i, example.prompt, served)
                        compared += served is not None
                    bar.update(batch[-1][0] + 1)
        about = f"{self.file.name}: tokens of {compared:,} of {len(examples):,} prompts equal the training's"
        if examples[0].messages is None:
            about += "; its chat template was not compared, because the run did not train on chats"
        say(about)

    def _require_context(self, props: _Props, examples: Sequence["Example"]) -> None:
        longest = max(len(example.prompt) for example in examples) + self.settings.decoding.max_new_tokens
        context = props.default_generation_settings.n_ctx
        if context < longest:
            raise UserError(
                f"--engine {self.api.url}: the server has a context of {context:,} tokens for each of its "
                f"{props.total_slots} slots, and the longest row needs {longest:,}; start it with "
                f"`-c {longest * props.total_slots}`"
            )

    async def _require_ends(self, prompt: list[int]) -> None:
        """Force each token that ends an answer in training, and require that the server then stops."""
        from ..training.tokens import taught_ends

        async with self.api.client(RETRIES) as client:
            for end in sorted(taught_ends(self.prompter.cfg, self.tokenizer)):
                tokens = await self._forced(client, prompt, end, {"max_tokens": 2})
                if len(tokens) > 1:
                    piece = self.tokenizer.convert_ids_to_tokens(end)
                    raise UserError(
                        f"{self.file.name}: does not end an answer at {piece!r} (token {end}), as the training does; "
                        "export it again, with the tokenizer in the run's folder"
                    )

    async def _served_prompt(self, root: openai.AsyncOpenAI, example: "Example") -> list[int] | None:
        """Tokens that the server makes of a row's prompt; None if no text has the training's tokens."""
        from .prompter import text_of

        if len(example.prompt) >= self.prompter.longest:  # truncated
            return None
        text = text_of(self.tokenizer, example.prompt)
        if example.messages is not None:
            body = {"messages": example.messages}
            text = _Prompt.model_validate_json(await _post(root, "apply-template", body)).prompt
        return None if text is None else await _tokens_of_text(root, text)

    def _differing(self, i: int, expected: list[int], served: list[int]) -> UserError:
        """Error that shows two prompts from their first difference, token by token."""
        start = 0
        while start < min(len(expected), len(served)) and expected[start] == served[start]:
            start += 1
        reason = "another chat template, system prompt or tokenizer"
        if served[1:] == expected:
            reason = "the server adds a token in front, such as a second BOS"
        elif served == expected[1:]:
            reason = "the server lacks the first token, such as BOS"
        return UserError(
            f"{self.file.name}: the prompt of row {i + 1} differs from the training's from token {start + 1} on: "
            f"{reason}\n  training: {self._shown(expected, start)}\n  server:   {self._shown(served, start)}\n"
            "export the file again, with the tokenizer and the chat template in the run's folder"
        )

    def _shown(self, tokens: list[int], start: int) -> str:
        """Some tokens around a difference, with their pieces."""
        first, end = max(start - 2, 0), start + 8
        shown = []
        for token in tokens[first:end]:
            shown.append(f"{token} {self.tokenizer.convert_ids_to_tokens(token)!r}")
        before = ["…"] if first else []
        after = ["…"] if end < len(tokens) else []
        return ", ".join([*before, *shown, *after])

    def distance(self, examples: Sequence["Example"]) -> Distance:
        """Distance of the file from the trained model, which is loaded here; log it.

        Raises:
            UserError: the file has 16-bit weights, and its distance exceeds `MOST_KL`.
            WorkFailed: the server does not respond.
        """
        from .transformers_engine import Reference

        count = min(COMPARED_ROWS, len(examples))
        chosen = [examples[i * len(examples) // count] for i in range(count)]
        with self._failures():
            rows = asyncio.run(self._forced_rows(chosen))
        with Bar("loading the model"):
            reference = Reference(self.prompter)
        with Bar("comparing with the adapter", len(rows)) as bar:
            comparisons: list[_Comparison] = []
            for number, row in enumerate(rows, start=1):
                expected = reference.log_probabilities(row.prompt, row.answer)
                for token, probabilities in zip(row.tokens, expected, strict=True):
                    comparisons.append(_Comparison.of(token, probabilities))
                bar.update(number)
        reference.free()
        distance = _mean(comparisons, len(rows))
        say(f"{self.file}: {distance}")
        if distance.kl > MOST_KL and not self.file.is_quantized:
            raise UserError(
                f"{self.file.name}: differs from the trained model by a mean KL of {distance.kl:.4f}, more than the "
                f"{MOST_KL} of a right file with 16-bit weights; export it again with `recipe publish RUN --gguf f16`, "
                "which merges the adapter into the weights that it was trained on"
            )
        return distance

    async def _forced_rows(self, examples: Sequence["Example"]) -> list[ForcedRow]:
        """Answers that the server is forced to give; each of its slots answers a share of the rows in turn."""
        async with _root(self.api).client(RETRIES) as root:
            slots = (await _props(root)).total_slots
        async with self.api.client(RETRIES) as client:
            with Bar("forcing reference answers", len(examples)) as bar:
                shares = [self._forced_share(client, examples[slot::slots], slot, bar) for slot in range(slots)]
                return [row for share in await asyncio.gather(*shares) for row in share]

    async def _forced_share(
        self, client: openai.AsyncOpenAI, examples: Sequence["Example"], slot: int, bar: Bar
    ) -> list[ForcedRow]:
        rows = []
        for example in examples:
            row = ForcedRow(example.prompt, example.answer[:COMPARED_TOKENS], [])
            for i, token in enumerate(row.answer):
                options = {"max_tokens": 1, "logprobs": MOST_PROBABLE, "id_slot": slot}
                row.tokens.extend(await self._forced(client, [*row.prompt, *row.answer[:i]], token, options))
            rows.append(row)
        return rows

    async def _forced(
        self, client: openai.AsyncOpenAI, prompt: list[int], token: int, options: dict[str, Any]
    ) -> list[_Token]:
        """Answer that begins with a token.

        Raises:
            ValueError: the server does not force tokens by `logit_bias`.
        """
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "samplers": ["temperature"], "logprobs": 1}
        body |= {"logit_bias": [[token, FORCING]]} | options
        tokens = _answer_of((await _post(client, "completions", body)).encode())
        if not tokens or tokens[0].id != token:
            raise ValueError("the server does not force tokens by logit_bias; use a newer llama.cpp")
        return tokens

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn failures of requests into errors."""
        try:
            yield
        except openai.NotFoundError as error:
            path = error.request.url.path
            raise UserError(
                f"--engine {self.api.url}: the server has no {path}; use a llama.cpp of February 2025 or newer"
            ) from None
        except (openai.APIError, ValueError, TimeoutError) as error:
            raise WorkFailed(f"{self.api.url}: {cause(error)}") from None


def _answer_of(content: bytes) -> list[_Token]:
    """Tokens of an answer, from the body of a response.

    Raises:
        ValidationError: the response has no log-probabilities.
    """
    return _Response.model_validate_json(content).choices[0].logprobs.content


@dataclass(frozen=True)
class _Comparison:
    """Token of a reference answer under the trained model and under a file; log-probabilities and KL in nats."""

    trained: float
    served: float
    kl: float

    @classmethod
    def of(cls, token: _Token, trained: "torch.Tensor") -> "_Comparison":
        """Compare a token.

        Args:
            token: the token and the most probable tokens in its place, by the server.
            trained: log-probabilities of all tokens by the trained model.
        """
        listed = {entry.id: max(entry.logprob, LOWEST) for entry in token.top_logprobs}
        served = max(token.logprob, LOWEST)
        return cls(max(float(trained[token.id]), LOWEST), served, kl(trained, listed))


def kl(trained: "torch.Tensor", listed: dict[int, float]) -> float:
    """Kullback-Leibler divergence of a server's distribution from the trained model's, in nats.

    The server lists only its most probable tokens. All others count as a single one, so this is a lower bound of the
    divergence over the whole vocabulary.
    """
    import torch

    expected = trained[list(listed)]
    served = torch.tensor([*listed.values()], dtype=trained.dtype)
    rest = (1 - expected.exp().sum()).clamp(min=LEAST)
    rest_served = (1 - served.exp().sum()).clamp(min=LEAST)
    divergence = (expected.exp() * (expected - served)).sum() + rest * (rest / rest_served).log()
    return float(divergence)


def _mean(comparisons: Sequence[_Comparison], rows: int) -> Distance:
    trained = [comparison.trained for comparison in comparisons]
    served = [comparison.served for comparison in comparisons]
    return Distance(
        rows=rows,
        tokens=len(comparisons),
        kl=fmean(comparison.kl for comparison in comparisons),
        difference=fmean(map(abs, map(sub, trained, served))),
        loss=-fmean(served),
        trained_loss=-fmean(trained),
    )
