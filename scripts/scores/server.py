"""Completions of a vLLM server as an engine, by OpenAI's own client: prompts and answers are tokens, as in training."""

import asyncio
import os
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import openai
from pydantic import AnyHttpUrl, BaseModel, Field, ValidationError

from ..base.errors import UserError, WorkFailed, did_you_mean
from .evaluations import Completion

if TYPE_CHECKING:
    from .prompter import Prompter  # with torch and Axolotl, which `require` does without

# In the environment. No variable of another tool, whose key this server may not be meant to get.
KEY = "QLORA_RECIPES_SERVER_KEY"
RETRIES = 9  # after pauses that the client doubles up to 8 s, for a minute in total, or that the server asks for
TIMEOUT = 300.0  # seconds that an answer may take; all tries of a request together may take twice as long
AT_ONCE = 16  # requests that a server gets at a time, unless another number is asked for


class Choice(BaseModel):
    """Answer of a server, which ended by itself or at its length; `token_ids` is vLLM's."""

    finish_reason: Literal["stop", "length"]
    token_ids: list[int]


class _Response(BaseModel):
    choices: list[Choice] = Field(min_length=1)


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


@dataclass
class Api:
    """Address of a server.

    Attributes:
        url: where its protocol begins, with a slash at the end.
        key: its key; None for a server without one.
        timeout: of an answer in seconds; None for no limit.
    """

    url: str
    key: str | None = None
    timeout: float | None = TIMEOUT

    def client(self, retries: int) -> openai.AsyncOpenAI:
        """Client that sends this server's key alone, whatever the environment has for OpenAI.

        A server on this machine is asked directly, without the environment's proxy.
        """
        os.environ.pop("OPENAI_CUSTOM_HEADERS", None)  # no argument of the client's leaves these out
        local = urlsplit(self.url).hostname in ("127.0.0.1", "::1", "localhost")
        return openai.AsyncOpenAI(
            api_key=self.key or "none",
            admin_api_key="",
            organization="",
            project="",
            webhook_secret="",
            base_url=self.url,
            timeout=openai.Timeout(self.timeout, connect=10),
            max_retries=retries,
            default_headers={"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()},  # type: ignore[dict-item]
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not local, follow_redirects=False),
        )

    async def models(self) -> list[str]:
        """Names of the server's models.

        Raises:
            openai.APIError, ValidationError: it does not answer, or not in OpenAI's protocol.
        """
        async with self.client(retries=0) as client:
            response = await client.models.with_raw_response.list()
        return [model.id for model in _Models.model_validate_json(response.content).data]

    def require_model(self, name: str | None) -> None:
        """Refuse a model that the server does not have.

        Raises:
            UserError: it has no such model, or refuses the key, or is not a server with OpenAI's protocol.
        """
        try:
            models = asyncio.run(self.models())
        except (openai.APIError, ValidationError) as error:
            key = isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError)
            remedy = f"set {KEY} to a key that the server takes" if key else "start vLLM there, or correct the address"
            raise UserError(f"--engine {self.url}: {cause(error)}; {remedy}") from None
        if name not in models:
            wrong = f"--model {name}: not a model of the server" if name else "--engine URL: needs --model"
            raise UserError(f"{wrong}{did_you_mean(name or '', models)}; it has {', '.join(models) or 'none'}")


class Server:
    """An `Engine`: a model on a server, whoever started that.

    Args:
        prompter: the run's, with the settings.
        api: the server.
        model: its name for the model.
        at_once: how many requests it gets at a time.
    """

    def __init__(self, prompter: "Prompter", api: Api, model: str, at_once: int):
        self.settings = prompter.settings
        self.tokenizer = prompter.tokenizer
        self.api = api
        self.model = model
        self.at_once = at_once
        self.ends = sorted(prompter.ends)

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """See `Engine`."""
        answers = self._answers(prompts, [i for i in range(len(prompts)) if i not in done])

        async def following() -> dict[int, Completion] | None:
            return await anext(answers, None)

        with asyncio.Runner() as runner:  # which cancels what is under way when this ends, for whatever reason
            while (answer := runner.run(following())) is not None:
                yield answer

    async def _answers(
        self, prompts: Sequence[list[int]], numbers: Sequence[int]
    ) -> AsyncIterator[dict[int, Completion]]:
        free = asyncio.Semaphore(self.at_once)
        async with self.api.client(RETRIES) as client:
            tasks = [asyncio.create_task(self._answer(client, free, i, prompts[i])) for i in numbers]
            for ended in asyncio.as_completed(tasks):
                yield await ended

    async def _answer(
        self, client: openai.AsyncOpenAI, free: asyncio.Semaphore, i: int, prompt: list[int]
    ) -> dict[int, Completion]:
        """Answer to a prompt; the client repeats requests after errors that may pass."""
        decoding = self.settings.decoding
        extra: dict[str, object] = {"stop_token_ids": self.ends, "return_token_ids": True, "repetition_penalty": 1.0}
        if decoding.do_sample:
            extra |= {"top_p": decoding.top_p, "seed": decoding.seed + i}
        if decoding.do_sample and decoding.top_k:
            extra["top_k"] = decoding.top_k
        async with free:
            try:
                async with asyncio.timeout(self.api.timeout and 2 * self.api.timeout):
                    response = await client.completions.with_raw_response.create(
                        model=self.model,
                        prompt=prompt,
                        max_tokens=decoding.max_new_tokens,
                        temperature=decoding.temperature if decoding.do_sample else 0,
                        extra_body=extra,
                    )
                tokens = _Response.model_validate_json(response.content).choices[0].token_ids
            except (openai.APIError, ValidationError, TimeoutError) as error:
                row = f"row {i + 1}, a prompt of {len(prompt):,} tokens"
                raise WorkFailed(f"{self.api.url}: {row}: {cause(error)}") from None
        return {i: Completion(str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip(), tokens)}


def at(url: str) -> Api:
    """Server at a user's address, with the key in the environment.

    Raises:
        UserError: the address is malformed, or holds a key.
    """
    if set("@?#") & set(url):
        raise UserError(f"--engine: the address has a user, a password or a query, which others see; set {KEY} instead")
    try:
        address = AnyHttpUrl(url)
    except ValidationError:
        raise UserError(
            f"--engine {url}: give transformers, vllm, or a server as in http://localhost:8000/v1"
        ) from None
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY}: has characters that no key has, such as line breaks")
    path = "" if (address.path or "/") != "/" else "/v1"
    return Api(f"{str(address).rstrip('/')}{path}/", key or None)


def cause(error: Exception) -> str:
    """Reason of an error in a line, with the server's answer where it refuses a request."""
    reason = error.__cause__ or error
    answer = error.response.text if isinstance(error, openai.APIStatusError) else ""
    return " ".join(f"{type(reason).__name__}: {reason} {answer}".split())[:300]
