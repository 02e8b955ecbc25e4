"""Completions of a server as an engine: vLLM, SGLang, llama.cpp, Ollama or a hosted model, by OpenAI's own client."""

import asyncio
import os
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, Field, ValidationError

from ..base.errors import UserError, WorkFailed, did_you_mean
from .evaluations import Answer

if TYPE_CHECKING:
    from .prompter import Prompter  # with torch and Axolotl, which `require` does without

# In the environment. No variable of another tool, whose key this server may not be meant to get.
KEY = "QLORA_RECIPES_SERVER_KEY"
RETRIES = 9  # after pauses that the client doubles up to 8 s, for a minute in total, or that the server asks for
TRIES_OF_A_FORM = 3  # as some servers answer 500 to a form that they refuse, others while they load
TIMEOUT = 300.0  # seconds that an answer may take; all tries of a request together may take twice as long
AT_ONCE = 16  # requests that a server gets at a time, unless another number is asked for
MOST_STOPS = 4  # texts that end an answer, in a request of OpenAI's protocol
_REFUSES_FORM = (openai.BadRequestError, openai.UnprocessableEntityError, openai.InternalServerError)
_REFUSES_KEY = (openai.AuthenticationError, openai.PermissionDeniedError)


class Choice(BaseModel):
    """Answer of a server, which ended by itself or at its length; `token_ids` is vLLM's."""

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] | None = None


class _Completion(BaseModel):
    choices: list[Choice] = Field(min_length=1)


class _Models(BaseModel):
    data: list[dict[str, Any]]


@dataclass
class Api:
    """Address of a server.

    Attributes:
        url: where its protocol begins, with a slash at the end.
        key: that it asks for; None where it asks for none.
        timeout: seconds that an answer may take; None for no limit.
    """

    url: str
    key: str | None = None
    timeout: float | None = TIMEOUT

    def client(self, retries: int) -> openai.AsyncOpenAI:
        """Return a client that sends this server's key alone, whatever the environment has for OpenAI.

        A proxy of the environment is not asked for a server on this machine.
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
        """Return the names of the server's models.

        Raises:
            openai.APIError, ValidationError: it does not answer, or not in OpenAI's protocol.
        """
        async with self.client(retries=0) as client:
            response = await client.models.with_raw_response.list()
        return [str(model.get("id")) for model in _Models.model_validate_json(response.content).data]

    def require_model(self, name: str | None) -> None:
        """Refuse a model that the server does not have.

        Raises:
            UserError: it has no such model, or refuses the key, or is not a server with OpenAI's protocol.
        """
        try:
            models = asyncio.run(self.models())
        except (openai.APIError, ValidationError) as error:
            raise self.unusable(error) from None
        if name not in models:
            wrong = f"--model {name}: not a model of the server" if name else "--engine URL: needs --model"
            raise UserError(f"{wrong}{did_you_mean(name or '', models)}; it has {', '.join(models) or 'none'}")

    def unusable(self, error: Exception) -> UserError:
        """Return why the server cannot be used, and what to do about it."""
        if isinstance(error, _REFUSES_KEY):
            return UserError(f"--engine {self.url}: {cause(error)}; set {KEY} to a key that the server takes")
        remedy = "start a server with /v1/completions there, or correct the address"
        return UserError(f"--engine {self.url}: {cause(error)}; {remedy}")

    async def ask(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> Choice:
        """Return the server's answer; the client waits for errors that may pass.

        Raises:
            openai.APIError: the server refuses the request, or still fails at the last try.
            ValidationError, TimeoutError: it answers something else, or nothing.
        """
        async with asyncio.timeout(self.timeout and 2 * self.timeout):
            response = await client.completions.with_raw_response.create(**body)
        return _Completion.model_validate_json(response.content).choices[0]


class Server:
    """An `Engine`: a model on a server, whoever started that.

    Args:
        prompter: the run's, with the settings.
        api: the server.
        model: its name for the model.
        prompts: all that it will be asked; the shortest is used to find out which form it takes.
        at_once: how many requests it gets at a time.

    Attributes:
        exact: whether prompts go as tokens, with parameters that OpenAI's protocol does not have.

    Raises:
        UserError: the server takes no form of request, or not the settings of the decoding.
        WorkFailed: it does not answer.
    """

    def __init__(self, prompter: "Prompter", api: Api, model: str, prompts: Sequence[list[int]], at_once: int):
        self.settings = prompter.settings
        self.tokenizer = prompter.tokenizer
        self.api = api
        self.model = model
        self.at_once = at_once
        self.ends = sorted(prompter.ends)
        self.exact = asyncio.run(self._takes_exact(min(prompts, key=len)))
        how = "as tokens"
        if not self.exact:
            others = sum(self.tokenizer(self._as_text(prompt))["input_ids"] != prompt for prompt in prompts)
            how = f"as text, {others} of {len(prompts)} with other tokens than in training" if others else "as text"
        self.served: str | None = f"{model}; prompts {how}"

    async def _takes_exact(self, prompt: list[int]) -> bool:
        """Return whether the server takes exact requests; otherwise it takes texts."""
        async with self.api.client(TRIES_OF_A_FORM) as client:
            try:
                await self.api.ask(client, self._body(True, prompt, 0) | {"max_tokens": 1})
                return True
            except _REFUSES_FORM as error:
                refusal = cause(error)
            except (openai.NotFoundError, *_REFUSES_KEY) as error:
                raise self.api.unusable(error) from None
            except (openai.APIError, ValidationError, TimeoutError) as error:
                raise WorkFailed(f"{self.api.url}: {cause(error)}") from None
            if self.settings.decoding.do_sample and self.settings.decoding.top_k:
                raise UserError(f"--engine {self.api.url}: it does not take the decoding's top_k: {refusal}")
            try:
                await self.api.ask(client, self._body(False, prompt, 0) | {"max_tokens": 1})
            except (openai.APIError, ValidationError, TimeoutError) as error:
                raise self.api.unusable(error) from None
        return False

    def _body(self, exact: bool, prompt: list[int], number: int) -> dict[str, Any]:
        """Return a request, without the values that are a server's default."""
        decoding = self.settings.decoding
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt if exact else self._as_text(prompt),
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if decoding.do_sample else 0,
        }
        more: dict[str, Any] = {"stop_token_ids": self.ends, "return_token_ids": True, "repetition_penalty": 1.0}
        if decoding.do_sample:
            body |= {"top_p": decoding.top_p, "seed": decoding.seed + number}
            more |= {"top_k": decoding.top_k} if decoding.top_k else {}
        stops = self.tokenizer.convert_ids_to_tokens(self.ends)[:MOST_STOPS]
        return body | ({"extra_body": more} if exact else {"stop": stops})

    def _as_text(self, prompt: list[int]) -> str:
        """Return a prompt's text without the tokens that its tokenizer puts before any text, as the server's does."""
        first = len(self.tokenizer("")["input_ids"])
        if prompt[:first] != self.tokenizer("")["input_ids"]:
            first = 0
        return str(self.tokenizer.decode(prompt[first:], clean_up_tokenization_spaces=False))

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Answer]]:
        """See `Engine`."""
        answers = self._answers(prompts, [i for i in range(len(prompts)) if i not in done])

        async def following() -> dict[int, Answer] | None:
            return await anext(answers, None)

        with asyncio.Runner() as runner:  # which cancels what is under way when this ends, for whatever reason
            while (answer := runner.run(following())) is not None:
                yield answer

    async def _answers(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> AsyncIterator[dict[int, Answer]]:
        free = asyncio.Semaphore(self.at_once)
        async with self.api.client(RETRIES) as client:
            tasks = [asyncio.create_task(self._answer(client, free, i, prompts[i])) for i in numbers]
            for ended in asyncio.as_completed(tasks):
                yield await ended

    async def _answer(
        self, client: openai.AsyncOpenAI, free: asyncio.Semaphore, i: int, prompt: list[int]
    ) -> dict[int, Answer]:
        async with free:
            try:
                made = await self.api.ask(client, self._body(self.exact, prompt, i))
            except (openai.APIError, ValidationError, TimeoutError) as error:
                row = f"row {i + 1}, a prompt of {len(prompt):,} tokens"
                raise WorkFailed(f"{self.api.url}: {row}: {cause(error)}") from None
        text = made.text
        if made.token_ids is not None:
            text = str(self.tokenizer.decode(made.token_ids, skip_special_tokens=True))
        return {i: Answer(text.strip(), made.token_ids)}


def at(url: str) -> Api:
    """Return the server at an address that a user gave, with the key in the environment.

    Raises:
        UserError: it is not an address, or holds a key.
    """
    if set("@?#") & set(url):
        raise UserError(f"--engine: the address has a user, a password or a query, which others see; set {KEY} instead")
    usable = False
    with suppress(ValueError):  # an impossible host or port
        parsed = urlsplit(url)
        usable = parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    if not usable:
        raise UserError(f"--engine {url}: give transformers, vllm, or a server as in http://localhost:8000/v1")
    path = parsed.path.rstrip("/").removesuffix("/completions")
    where = parsed._replace(path=f"{path if path.endswith('/v1') or path else '/v1'}/").geturl()
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY}: has characters that no key has, such as line breaks")
    return Api(where, key or None)


def cause(error: Exception) -> str:
    """Return an error's reason in a line: a server's status and the beginning of its answer, or the wrong value."""
    if isinstance(error, openai.APIStatusError):
        text = f"the server answers {error.status_code} {error.response.text[:2000] or error.response.reason_phrase}"
    elif isinstance(error, openai.APITimeoutError | TimeoutError):
        text = "no answer in time"
    elif isinstance(error, ValidationError):
        wrong = error.errors()[0]
        text = f"not OpenAI's protocol: {'.'.join(map(str, wrong['loc']))} {wrong['msg']}: {str(wrong['input'])[:150]}"
    else:
        text = str(error.__cause__ or error)
    return " ".join(text.split())[:300]
