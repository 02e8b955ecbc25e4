"""OpenAI's protocol, as far as completions of prompts go: with vLLM, SGLang, llama.cpp, Ollama or a hosted model."""

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from ...base.errors import UserError, WorkFailed, did_you_mean
from ...base.files import loads
from ...base.progress import say_once

KEY = "QLORA_RECIPES_SERVER_KEY"
"""In the environment. No variable of another tool, whose key this server may not be meant to get."""
PAUSES: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 60)
"""Seconds before each further try."""
LONGEST_PAUSE = 300
"""The most seconds that a server is waited for at its own wish."""
TIMEOUTS = 2
"""How many answers to one request may fail to come in time."""
_PASSING = {408, 425, 429, 500, 502, 503, 504, 529}
_REFUSES_FORM = {400, 415, 422, 500, 501}  # llama.cpp and others answer 500 to what they cannot read


class Refused(Exception):
    """A server does not take a request of this form."""


@dataclass
class Api:
    """A server's address and how long to be patient with it.

    Attributes:
        url: where its protocol begins, with a slash at the end.
        key: that it asks for; None where it asks for none.
        timeout: seconds that an answer may take; None where only `alive` ends the wait.
        alive: raises WorkFailed where the server has ended for good.
    """

    url: str
    key: str | None = None
    timeout: float | None = 300.0
    alive: Callable[[], None] = lambda: None

    def client(self) -> httpx.AsyncClient:
        """Connections to the server. A proxy of the environment is not asked for a server on this machine."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        local = httpx.URL(self.url).host in ("127.0.0.1", "::1", "localhost")
        limits, timeout = httpx.Limits(max_connections=None), httpx.Timeout(self.timeout, connect=10)
        return httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout, limits=limits, trust_env=not local
        )

    def require_model(self, name: str | None) -> str:
        """Whose server has a model of this name, as it says itself; empty where it does not.

        Raises:
            UserError: nothing answers there, or it refuses the key, or it has no such model.
        """
        try:
            response = asyncio.run(self._get("models"))
        except httpx.RequestError as error:
            raise UserError(f"--server {self.url}: {_cause(error)}; start the server, or name where it is") from None
        self._require_key(response)
        try:
            models = {str(model["id"]): str(model.get("owned_by") or "") for model in loads(response.content)["data"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"--server {self.url}: no server that speaks OpenAI's protocol: its list of models is "
                f"{_beginning(response)}; is the address right?"
            ) from None
        if name not in models:
            wrong = f"--model {name}: the server has no model of that name" if name else "--server: needs --model"
            raise UserError(f"{wrong}{did_you_mean(name or '', models)}; it has {', '.join(models) or 'none'}")
        return models[name][:40]

    async def _get(self, path: str) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path)

    def takes(self, body: dict[str, Any]) -> None:
        """Try a request.

        Raises:
            Refused: the server does not take its form.
            UserError: it has no completions, or refuses the key.
            WorkFailed: see `ask`.
        """

        async def tried() -> httpx.Response:
            async with self.client() as client:
                first = await self.ask(client, body, "the first request", _PASSING - _REFUSES_FORM)
                if first.status_code != 500:
                    return first
                await asyncio.sleep(PAUSES[0])  # some are still loading; others say so of what they cannot read
                return await self.ask(client, body, "the first request", _PASSING - _REFUSES_FORM)

        response = asyncio.run(tried())
        self._require_key(response)
        if response.status_code in (404, 405):
            raise UserError(
                f"--server {self.url}: it has no completions ({response.status_code}), only chats perhaps, which would "
                "put another prompt around what the run was trained on"
            )
        if response.status_code in _REFUSES_FORM:
            raise Refused(_beginning(response))
        completion(response, "the first request")

    async def ask(
        self, client: httpx.AsyncClient, body: dict[str, Any], what: str, passing: set[int] = _PASSING
    ) -> httpx.Response:
        """What the server answers at last, which can be a refusal; errors that may pass are waited for.

        Args:
            client: of this server.
            body: the request.
            what: what it is about, for messages.
            passing: the status codes of errors that may pass.

        Raises:
            WorkFailed: they did not pass.
        """
        timeouts, pauses, tries = 0, iter(PAUSES), 0
        while True:
            wish: float | None = None
            tries += 1
            try:
                response = await client.post("completions", json=body)
                if response.status_code not in passing:
                    return response
                problem, wish = f"the server answers {_beginning(response)}", _wish(response)
            except httpx.TimeoutException as error:
                timeouts += not isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
                problem = f"no answer in {self.timeout:.0f} s" if self.timeout else "no answer in time"
            except httpx.RequestError as error:
                problem = _cause(error)
            self.alive()
            pause = next(pauses, None)
            if pause is None or timeouts >= TIMEOUTS or (wish or 0) > LONGEST_PAUSE:
                asks = f"; it asks to wait {wish:.0f} s" if (wish or 0) > LONGEST_PAUSE else ""
                raise WorkFailed(
                    f"{self.url}: {what}: {problem}{asks}, after {tries} {'try' if tries == 1 else 'tries'}"
                )
            say_once(f"{self.url}: {problem}; try {tries + 1} of {len(PAUSES) + 1} in {wish or pause:.0f} s")
            await asyncio.sleep(max(pause * random.uniform(0.5, 1), wish or 0))  # so that not all come at once

    def _require_key(self, response: httpx.Response) -> None:
        if response.status_code in (401, 403):
            state = "refuses the key in the environment" if self.key else "asks for a key"
            raise UserError(f"--server {self.url}: it {state}; set {KEY} to one that it takes")


def completion(response: httpx.Response, what: str) -> dict[str, Any]:
    """The one choice in an answer: a text, and perhaps its tokens.

    Raises:
        WorkFailed: it is a refusal, or no whole completion.
    """
    if response.status_code != 200:
        raise WorkFailed(f"{response.url}: {what}: the server refuses it: {_beginning(response)}")
    try:
        choice = loads(response.content)["choices"][0]
        text, reason, tokens = choice["text"], choice.get("finish_reason"), choice.get("token_ids")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        text, reason, tokens = None, None, None
    whole = tokens is None or (isinstance(tokens, list) and all(isinstance(token, int) for token in tokens))
    if not isinstance(text, str) or not whole:
        raise WorkFailed(f"{response.url}: {what}: no completion but {_beginning(response)}")
    if reason not in ("stop", "length"):
        raise WorkFailed(f"{response.url}: {what}: the answer ended by {reason!r} instead of its end or its length")
    return {"text": text, "tokens": tokens}


def at(url: str) -> Api:
    """The server at an address that a user gave, with the key in the environment.

    Raises:
        UserError: it is no address, or holds a key.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"--server: no address{'' if '@' in url else f': {error}'}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        shown = "" if "@" in url else f" {url}"
        raise UserError(f"--server{shown}: an address begins with http:// or https://, and has a host")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UserError(
            f"--server: the address of {parsed.host} has a name, a password or a query, where others can see it; leave "
            f"that out, and set {KEY} to the key"
        )
    path = parsed.path.rstrip("/").removesuffix("/completions")
    where = str(parsed.copy_with(path=f"{path if path.endswith('/v1') or path else '/v1'}/"))
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY}: has characters that no key has, such as line breaks")
    return Api(where, key or None)


def _wish(response: httpx.Response) -> float | None:
    """The seconds that a server asks to wait; None where it does not."""
    asked = response.headers.get("Retry-After", "")
    try:
        return max(float(asked), 0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0)
    except (ValueError, TypeError):
        return None


def _beginning(response: httpx.Response) -> str:
    """A response in messages: its status, and how its text begins."""
    text = " ".join(response.text[:2000].split())
    return f"{response.status_code} {text[:200] or response.reason_phrase or '(nothing)'}"


def _cause(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__
