"""vLLM server as an engine, called through OpenAI's client; for llama.cpp's server, see llama.py.

Prompts and answers are sent as tokens.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
from pydantic import AnyHttpUrl, BaseModel, FailFast, Field, ValidationError

from ..base.errors import UserError, WorkFailed, did_you_mean
from .settings import Completion, Engine

if TYPE_CHECKING:
    from .prompter import Prompter  # imports torch and Axolotl, which `require` does not need

# Environment variable for the server's key. Another tool's variable could hold a key that must not go to this server.
KEY = "QLORA_RECIPES_SERVER_KEY"
RETRIES = 9  # pauses double up to 8 s, at most 48 s in total; the server can request other pauses
NO_KEY = "none"  # the client requires a text
TIMEOUT = 300.0  # seconds for an answer; all attempts of a request together may take twice as long
LIST_TIMEOUT = 30.0  # seconds for the list of models
MOST_BYTES = 1 << 24  # bytes of a response; an answer of 100,000 tokens takes 1 MB
SENDING_TOKENS = ("vllm", "llamacpp")  # names of servers that send the tokens of their answers, as `owned_by`
AT_ONCE = 16  # default number of simultaneous requests
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
type Listed[T] = Annotated[list[T], FailFast()]  # a response could have millions of mistakes, each of 1 kB


class Choice(BaseModel):
    """Answer of a server; only vLLM sends `token_ids`."""

    finish_reason: Literal["stop", "length"]
    token_ids: Listed[TokenId]


class _Response(BaseModel):
    choices: list[Choice] = Field(min_length=1)


class Weights(BaseModel):
    """Size of a model's file, as llama.cpp's server gives it.

    Attributes:
        size: bytes of all tensors.
        n_params: number of weights.
    """

    size: float
    n_params: float = Field(ge=1)


class ServedModel(BaseModel):
    """Entry in a server's list of models; only llama.cpp's server sends `meta`."""

    id: str
    owned_by: str | None = None
    meta: Weights | None = None


class _Models(BaseModel):
    data: Listed[ServedModel]


@dataclass
class Api:
    """Access to a server.

    Attributes:
        url: base URL of the protocol, with a slash at the end.
        key: the server's key; any text for a server without a key.
        timeout: seconds for an answer; None for no limit.
    """

    url: str
    key: str = NO_KEY
    timeout: float | None = TIMEOUT

    def client(self, retries: int) -> openai.AsyncOpenAI:
        """Client that ignores OpenAI's environment variables and sends only this server's key.

        Requests to a server on this machine bypass the environment's proxy.
        """
        os.environ.pop("OPENAI_CUSTOM_HEADERS", None)  # the client has no argument that ignores this variable
        headers: dict[str, Any] = {"Accept-Encoding": "identity"}
        headers |= dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit())  # openai's way to send none
        local = urlsplit(self.url).hostname in ("127.0.0.1", "::1", "localhost")
        return openai.AsyncOpenAI(
            api_key=self.key,
            admin_api_key="",
            organization="",
            project="",
            webhook_secret="",
            base_url=self.url,
            timeout=openai.Timeout(self.timeout, connect=10),
            max_retries=retries,
            default_headers=headers,
            http_client=openai.DefaultAsyncHttpxClient(
                trust_env=not local, follow_redirects=False, event_hooks={"response": [_limit_size]}
            ),
        )

    async def models(self) -> list[ServedModel]:
        """Models of the server.

        Raises:
            TimeoutError: the server does not respond in time.
            openai.APIError, ValidationError: the server does not use OpenAI's protocol, or does not respond at all.
        """
        async with self.client(retries=0) as client, asyncio.timeout(LIST_TIMEOUT):
            response = await client.models.with_raw_response.list()
        return _Models.model_validate_json(response.content).data

    def require_model(self, name: str | None) -> None:
        """Raise UserError if the server lacks a model.

        Raises:
            UserError: the server lacks the model, refuses the key, is of another kind, or does not use OpenAI's
                protocol.
        """
        try:
            models = {model.id: model for model in asyncio.run(self.models())}
        except (openai.APIError, ValidationError, TimeoutError) as error:
            remedy = "start vLLM or llama.cpp's server there, or correct the URL"
            if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
                remedy = f"set {KEY} to the server's key"
            raise UserError(f"--engine {self.url}: {cause(error)}; {remedy}") from None
        if name in models:
            owner = models[name].owned_by
            if owner in SENDING_TOKENS:
                return
            problem = f"the server's name is {owner}; only vLLM and llama.cpp's server send the tokens of answers"
            raise UserError(problem, key=f"--engine {self.url}", remedy="start one of these there")
        if name:
            problem = f"--served-model {name}: not a model of the server{did_you_mean(name, models)}"
        else:
            problem = "--engine URL: needs --model"
        raise UserError(f"{problem}; its models: {', '.join(models) or 'none'}")


async def _limit_size(response: httpx.Response) -> None:
    """Make reading a response fail behind `MOST_BYTES`."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise httpx.DecodingError("compressed response, although none was requested")  # its size would be unknown
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = _Limited(response.stream)


class _Limited(httpx.AsyncByteStream):
    """Stream that ends with an error behind `MOST_BYTES`."""

    def __init__(self, stream: httpx.AsyncByteStream):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MOST_BYTES:
                raise httpx.ReadError(f"response of more than {MOST_BYTES >> 20} MiB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class Server(Engine):
    """`Engine` on a server, started by this project or by a user.

    Args:
        prompter: prompter of the run, with the settings.
        api: access to the server.
        model: name of the model on the server.
        at_once: number of simultaneous requests.
    """

    def __init__(self, prompter: "Prompter", api: Api, model: str, at_once: int):
        self.prompter = prompter
        self.ends = prompter.ends
        self.settings = prompter.settings
        self.tokenizer = prompter.tokenizer
        self.api = api
        self.model = model
        self.at_once = at_once
        self.vocabulary = max(len(self.tokenizer), prompter.config.get_text_config().vocab_size)

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Completion]]:
        """Implement `Engine.generate`."""
        answers = self._answers(prompts, [i for i in range(len(prompts)) if i not in done])

        async def following() -> dict[int, Completion] | None:
            return await anext(answers, None)

        with asyncio.Runner() as runner:  # cancels open requests whenever the generator ends
            while (answer := runner.run(following())) is not None:
                yield answer

    async def _answers(
        self, prompts: Sequence[list[int]], numbers: Sequence[int]
    ) -> AsyncIterator[dict[int, Completion]]:
        free = asyncio.Semaphore(self.at_once)
        async with self.api.client(RETRIES) as client:
            tasks = [asyncio.create_task(self._answer(client, free, i, prompts[i])) for i in numbers]
            try:
                for ended in asyncio.as_completed(tasks):
                    yield await ended
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)  # after a failure, others are not reported

    async def _answer(
        self, client: openai.AsyncOpenAI, free: asyncio.Semaphore, i: int, prompt: list[int]
    ) -> dict[int, Completion]:
        """Answer to a prompt; the client repeats requests after temporary errors."""
        most = self.settings.decoding.max_new_tokens
        async with free:
            try:
                async with asyncio.timeout(self.api.timeout and 2 * self.api.timeout):
                    response = await client.completions.with_raw_response.create(
                        model=self.model, prompt=prompt, max_tokens=most, extra_body=self.options(i)
                    )
                tokens = self.tokens_of(response.content)
                self.require_vocabulary(tokens)
                if len(tokens) > most:
                    raise ValueError("more tokens than requested; serve the run's model")
            except (openai.APIError, ValueError, TimeoutError) as error:
                row = f"row {i + 1}, a prompt of {len(prompt):,} tokens"
                raise WorkFailed(f"{self.api.url}: {row}: {cause(error)}") from None
        return {i: Completion.of(self.tokenizer, tokens)}

    def require_vocabulary(self, tokens: Sequence[int]) -> None:
        """Raise ValueError for a token that the run's model lacks."""
        if max(tokens, default=0) >= self.vocabulary:
            raise ValueError("tokens of another vocabulary; serve the run's model")

    def options(self, i: int) -> dict[str, object]:
        """Options of the request for a prompt, in addition to OpenAI's."""
        decoding = self.settings.decoding
        options = {"stop_token_ids": self.ends, "return_token_ids": True, "repetition_penalty": 1.0}
        if not decoding.do_sample:
            return options | {"temperature": 0}
        # vLLM takes missing values from the model's generation config; -1 is all tokens, also in old versions
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k or -1}
        return options | {"min_p": 0, "seed": decoding.seed + i}

    def tokens_of(self, content: bytes) -> list[int]:
        """Tokens of an answer, from the body of a response.

        Raises:
            ValidationError: the response has no tokens.
        """
        return _Response.model_validate_json(content).choices[0].token_ids


def api_at(url: str) -> Api:
    """Access to the server at a user's URL, with the key from the environment.

    Raises:
        UserError: the URL is malformed, or holds a key.
    """
    if set("@?#") & set(url):
        raise UserError(f"--engine: others can see the user, password or query in the URL; set {KEY} instead")
    try:
        parsed = AnyHttpUrl(url)
    except ValidationError:
        raise UserError(
            f"--engine {url}: give transformers, vllm, or a server's URL such as http://localhost:8000/v1"
        ) from None
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY}: contains characters that are invalid in a key, such as line breaks; correct it")
    path = "/v1" if parsed.path in (None, "/") else ""
    return Api(f"{str(parsed).rstrip('/')}{path}/", key or NO_KEY)


def cause(error: Exception) -> str:
    """One-line reason for an error, with the server's answer, if any."""
    if isinstance(error, TimeoutError):
        return "no complete response in time"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(["response", *map(str, first["loc"])])
        return f"{place}: {first['msg']}: {first['input']!r:.100}"
    reason = error.__cause__ or error
    answer = error.response.text if isinstance(error, openai.APIStatusError) else ""
    return " ".join(f"{type(reason).__name__}: {reason} {answer}".split())[:300]
