"""A server as an engine: completions of prompts as tokens where it takes them, otherwise as text."""

import asyncio
from collections.abc import AsyncIterator, Container, Iterator, Sequence
from typing import Any, NamedTuple

import httpx

from ...base.errors import UserError
from ..prompter import Prompter
from .api import Api, Refused, completion
from .engine import Answer

AT_ONCE = 16
"""Requests that somebody's server gets at a time, unless another number is asked for."""


MOST_STOPS = 4
"""Texts that end an answer, in a request of OpenAI's protocol."""


class Form(NamedTuple):
    """How requests are put: prompts as tokens or as text, with or without what OpenAI's protocol does not have."""

    tokens: bool
    more: bool


FORMS = (Form(True, True), Form(True, False), Form(False, True), Form(False, False))
"""The exact ones first."""


class Server:
    """An `Engine`: a model on a server, whoever started that.

    Args:
        prompter: the run's, with the settings.
        api: the server.
        model: its name for the model.
        weights: what it has of the model, in words.
        prompts: all that it will be asked; the shortest is used to find out which form it takes.
        at_once: how many requests it gets at a time.

    Raises:
        UserError: the server takes no form of request, or not the settings of the decoding.
        WorkFailed: it does not answer.
    """

    def __init__(
        self, prompter: Prompter, api: Api, model: str, weights: str, prompts: Sequence[list[int]], at_once: int
    ):
        self.settings = prompter.settings
        self.tokenizer = prompter.tokenizer
        self.api = api
        self.model = model
        self.at_once = at_once
        self.ends = sorted(prompter.ends)
        self.form = self._taken(min(prompts, key=len))
        if self.form.tokens:
            how = "as tokens"
        else:
            others = sum(self.tokenizer(self._as_text(prompt))["input_ids"] != prompt for prompt in prompts)
            how = f"as text, {others} of {len(prompts)} with other tokens than in training" if others else "as text"
        self.served: str | None = f"{weights}; prompts {how}"

    def _taken(self, prompt: list[int]) -> Form:
        """The first form that the server takes."""
        reasons = []
        for form in FORMS:
            try:
                self.api.takes(self._body(form, prompt, 0) | {"max_tokens": 1})
            except Refused as refused:
                reasons.append(str(refused))
                continue
            if not form.more and self.settings.decoding.do_sample and self.settings.decoding.top_k:
                raise UserError(f"--server {self.api.url}: it does not take the decoding's top_k: {reasons[0]}")
            return form
        raise UserError(f"--server {self.api.url}: it refuses the prompts, as tokens and as text: {reasons[-1]}")

    def _body(self, form: Form, prompt: list[int], number: int) -> dict[str, Any]:
        """A request, without what is the server's default anyway."""
        decoding = self.settings.decoding
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt if form.tokens else self._as_text(prompt),
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature if decoding.do_sample else 0,
        }
        if decoding.do_sample:
            body |= {"top_p": decoding.top_p, "seed": decoding.seed + number}
        if form.more:
            body |= {"stop_token_ids": self.ends, "return_token_ids": True, "repetition_penalty": 1.0}
            if decoding.do_sample and decoding.top_k:
                body["top_k"] = decoding.top_k
        else:
            body["stop"] = self.tokenizer.convert_ids_to_tokens(self.ends)[:MOST_STOPS]
        return body

    def _as_text(self, prompt: list[int]) -> str:
        """A prompt's text without the tokens that its tokenizer puts before any text, as the server's does too."""
        first = len(self.tokenizer("")["input_ids"])
        if prompt[:first] != self.tokenizer("")["input_ids"]:
            first = 0
        return str(self.tokenizer.decode(prompt[first:], clean_up_tokenization_spaces=False))

    def generate(self, prompts: Sequence[list[int]], done: Container[int]) -> Iterator[dict[int, Answer]]:
        """See `Engine`."""
        groups = self._groups(prompts, [i for i in range(len(prompts)) if i not in done])

        async def following() -> dict[int, Answer] | None:
            return await anext(groups, None)

        with asyncio.Runner() as runner:  # which cancels what is under way when this ends, for whatever reason
            while (group := runner.run(following())) is not None:
                yield group

    async def _groups(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> AsyncIterator[dict[int, Answer]]:
        left, under_way = iter(numbers), set[asyncio.Task[tuple[int, Answer]]]()
        async with self.api.client() as client:
            while True:
                while len(under_way) < self.at_once and (i := next(left, None)) is not None:
                    under_way.add(asyncio.create_task(self._answer(client, i, prompts[i])))
                if not under_way:
                    return
                ended, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                failed = [error for task in ended if (error := task.exception())]
                if made := dict(task.result() for task in ended if not task.exception()):
                    yield made
                if failed:
                    raise failed[0]

    async def _answer(self, client: httpx.AsyncClient, i: int, prompt: list[int]) -> tuple[int, Answer]:
        what = f"row {i + 1}, a prompt of {len(prompt):,} tokens"
        response = await self.api.ask(client, self._body(self.form, prompt, i), what)
        made = completion(response, what)
        tokens = made["tokens"]
        text = made["text"] if tokens is None else self.tokenizer.decode(tokens, skip_special_tokens=True)
        return i, Answer(str(text).strip(), tokens)
