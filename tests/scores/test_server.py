import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import random_models
from a_server import AServer, Reply, completed, serving
from run_folders import a_tiny_run

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.data.study import Decoding
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.scores import evaluate
from qlora_recipes.scores.engines import api
from qlora_recipes.scores.engines.engine import Answer
from qlora_recipes.scores.evaluations import PREDICTIONS, SCORES, read_predictions
from qlora_recipes.scores.task import EvaluationRequest

PROMPTS = [[5, 6, 7, 8], [5, 6], [9, 10, 11], [12, 13, 14, 15, 16]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PAUSES", (0.01, 0.02, 0.03))
    monkeypatch.delenv(api.KEY, raising=False)


def prompter(**decoding: Any) -> Any:
    from transformers import LlamaConfig

    return SimpleNamespace(
        settings=SimpleNamespace(decoding=Decoding(max_new_tokens=8, **decoding), base_model="nowhere/m"),
        tokenizer=random_models.tokenizer(),
        config=LlamaConfig(eos_token_id=[2, 77]),
        revision="main",
        ends={2, 77},
    )


def engine(server: AServer, at_once: int = 2, timeout: float = 5, **decoding: Any) -> Any:
    from qlora_recipes.scores.engines.server import Server

    there = api.Api(api.at(server.url).url, timeout=timeout)
    return Server(prompter(**decoding), there, "m", "m on a server", PROMPTS, at_once)


def answers(of: Any, done: tuple[int, ...] = ()) -> dict[int, Answer]:
    return {i: answer for group in of.generate(PROMPTS, done) for i, answer in group.items()}


def echo(body: dict[str, Any]) -> Reply:
    """The prompt's length, so that answers tell which prompt they belong to."""
    return completed(f" {len(body['prompt'])} ")


def test_prompts_go_as_tokens_and_tokens_come_back_where_the_server_can() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        assert body["prompt"] in PROMPTS
        return completed("not this", token_ids=[*body["prompt"], 2])

    with serving(reply) as server:
        of = engine(server)
        made = answers(of, done=(1,))
    tokenizer = of.tokenizer
    assert made == {i: Answer(tokenizer.decode(PROMPTS[i]).strip(), [*PROMPTS[i], 2]) for i in (0, 2, 3)}
    assert of.served == "m on a server; prompts as tokens"
    asked = server.requests[-1]
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("m", 8, 0)
    assert asked["stop_token_ids"] == sorted({2, 77, tokenizer.eos_token_id})  # as the reference's
    assert "seed" not in asked and "top_p" not in asked
    assert server.requests[0]["max_tokens"] == 1  # which only finds out the form


def test_prompts_go_as_text_where_the_server_takes_no_tokens() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if "stop_token_ids" in body:
            return 400, {"error": "unknown parameter stop_token_ids"}
        return echo(body) if isinstance(body["prompt"], str) else (500, {"error": "prompt has to be a string"})

    with serving(reply) as server:
        of = engine(server)
        made = answers(of)
    texts = [of.tokenizer.decode(prompt) for prompt in PROMPTS]
    assert made == {i: Answer(str(len(text)), None) for i, text in enumerate(texts)}
    others = sum(of.tokenizer(text)["input_ids"] != prompt for text, prompt in zip(texts, PROMPTS, strict=True))
    differ = f", {others} of 4 with other tokens than in training" if others else ""
    assert of.served == f"m on a server; prompts as text{differ}"


def test_the_tokens_that_begin_any_text_are_left_to_the_server() -> None:
    from tokenizers import processors

    def reply(body: dict[str, Any]) -> Reply:
        return echo(body) if isinstance(body["prompt"], str) else (422, {})

    with serving(reply) as server:
        of = engine(server)
        first = of.tokenizer.convert_ids_to_tokens(1)
        of.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, 1)]
        )
        assert of._as_text([1, 5, 6]) == of.tokenizer.decode([5, 6])
        assert of._as_text([5, 6]) == of.tokenizer.decode([5, 6])


def test_samples_differ_by_row_and_repeat() -> None:
    with serving(echo) as server:
        answers(engine(server, do_sample=True, temperature=0.7, top_p=0.9, top_k=5, seed=3))
        sampled = server.requests[1:]
    assert sorted(body["seed"] for body in sampled) == [3, 4, 5, 6]
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in sampled} == {(0.7, 0.9, 5)}
    with (
        serving(lambda body: (400, {"error": "no top_k"}) if "top_k" in body else echo(body)) as server,
        pytest.raises(UserError, match=r"it does not take the decoding's top_k: 400 .*no top_k"),
    ):
        engine(server, do_sample=True, top_k=5)


def test_errors_that_pass_are_waited_for_and_no_row_is_asked_twice() -> None:
    failures = iter([(429, {}), (500, {}), (503, b"busy"), None, (429, {})])
    lock = threading.Lock()

    def reply(body: dict[str, Any]) -> Reply:
        with lock:
            return next(failures, echo(body)) if body["max_tokens"] == 8 else echo(body)

    with serving(reply) as server:
        server.headers = {"Retry-After": "0"}
        assert {i: answer.text for i, answer in answers(engine(server)).items()} == {0: "4", 1: "2", 2: "3", 3: "5"}
    assert len(server.requests) == 1 + 4 + 5


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((429, {"error": "too many"}), r"the server answers 429 .*too many.*, after 4 tries"),
        ((500, b"<html>broken</html>"), r"the server answers 500 <html>broken</html>, after 4 tries"),
        (None, r"Server disconnected without sending a response\., after 4 tries"),
        ((200, b"<html>Welcome</html>"), r"no completion but 200 <html>Welcome</html>"),
        ((200, {"choices": []}), r'no completion but 200 \{"choices": \[\]\}'),
        ((200, {"choices": [{"text": 3}]}), "no completion but 200"),
        ((200, ["a"]), "no completion but 200"),
        ((200, b"[" * 100_000), "no completion but 200"),
        (completed("x", token_ids="17"), "no completion but 200"),
        (completed("x", "abort"), "the answer ended by 'abort' instead of its end or its length"),
        (completed("x", None), "the answer ended by None"),
        ((401, {"error": "expired"}), "the server refuses it: 401 .*expired"),
        ((400, {"error": "context of 4 tokens"}), r"row 4, a prompt of 5 tokens: the server refuses it: 400 .*context"),
    ],
)
def test_what_a_server_cannot_answer_ends_it_and_loses_nothing(reply: Reply, problem: str) -> None:
    with serving(lambda body: reply if len(body["prompt"]) == 5 else echo(body)) as server:
        made: dict[int, Answer] = {}
        with pytest.raises(WorkFailed, match=problem):
            for group in engine(server, at_once=1).generate(PROMPTS, ()):
                made |= group
    assert sorted(made) == [0, 1, 2]


def test_a_server_that_never_answers_is_given_up() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        time.sleep(0.4 if body["max_tokens"] == 8 else 0)
        return echo(body)

    with serving(reply) as server, pytest.raises(WorkFailed, match=r"no answer in 0 s, after 2 tries"):
        answers(engine(server, timeout=0.2))


def test_a_server_that_wants_to_be_left_alone_for_an_hour_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda body: (429, {}) if body["max_tokens"] == 8 else echo(body)) as server:
        of = engine(server)
        server.headers = {"Retry-After": "3600"}
        with pytest.raises(WorkFailed, match=r"it asks to wait 3600 s, after 1 try"):
            answers(of)


def test_a_server_that_is_gone_for_good_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PAUSES", (60,))
    with serving(lambda body: None if body["max_tokens"] == 8 else echo(body)) as server:
        of = engine(server)

        def alive() -> None:
            raise WorkFailed("it has ended")

        of.api.alive = alive
        with pytest.raises(WorkFailed, match="it has ended"):
            answers(of)


def test_whoever_needs_no_more_answers_leaves_at_once() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        time.sleep(3 if body["max_tokens"] == 8 and len(body["prompt"]) > 2 else 0)
        return echo(body)

    with serving(reply) as server:
        began = time.monotonic()
        groups: Iterator[dict[int, Answer]] = engine(server, at_once=4).generate(PROMPTS, ())
        assert list(next(groups)) == [1]
        groups.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("models", "model", "problem"),
    [
        (None, "n", r"--model n: the server has no model of that name; it has m, another"),
        (None, "anther", r"did you mean another\?"),
        (None, None, r"needs --model; it has m, another"),
        ((200, b"<html>hello</html>"), "m", r"no server that speaks OpenAI's protocol: .* 200 <html>hello</html>"),
        ((404, {"error": "no such page"}), "m", "is the address right"),
        ((401, {"error": "who are you"}), "m", "it asks for a key; set QLORA_RECIPES_SERVER_KEY to one"),
    ],
)
def test_a_model_is_asked_for_before_anything(models: Reply, model: str | None, problem: str) -> None:
    with serving(echo) as server:
        server.models = models or server.models
        with pytest.raises(UserError, match=problem):
            api.at(server.url).require_model(model)
        assert not server.requests


def test_where_nothing_answers_is_said() -> None:
    with serving(echo) as server:
        there = api.at(server.url)
    with pytest.raises(UserError, match=r"--server http://127\.0\.0\.1:\d+/v1/: .*; start the server, or name where"):
        there.require_model("m")


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((404, {"error": "not found"}), r"it has no completions \(404\), only chats perhaps"),
        ((400, {"error": "I like nothing"}), r"it refuses the prompts, as tokens and as text: 400 .*I like nothing"),
    ],
)
def test_a_server_without_completions_is_refused(reply: Reply, problem: str) -> None:
    with serving(lambda body: reply) as server, pytest.raises(UserError, match=problem):
        engine(server)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000", "begins with http"),
        ("ftp://host/v1", "begins with http"),
        ("http://", "has a host"),
        ("http://host:port", "no address"),
        ("https://user:geheim@host/v1", "a password or a query"),
        ("https://host/v1?api_key=geheim", "a password or a query"),
    ],
)
def test_addresses_that_are_none_or_hold_a_key_are_refused(url: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        api.at(url)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_an_address_may_end_as_it_is_written_anywhere(end: str) -> None:
    assert api.at(f"https://host:1{end}").url == "https://host:1/v1/"
    assert api.at("https://host/openai").url == "https://host/openai/"


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RECIPES_SERVER_KEY", "geheim")
    with serving(lambda body: (401, {"error": "no"})) as server:
        there = api.at(server.url)
        there.require_model("m")
        with pytest.raises(UserError, match="it refuses the key in the environment") as refused:
            there.takes({"max_tokens": 1})
    assert server.requests[0]["headers"]["Authorization"] == "Bearer geheim"
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("key", ["geheim\r\nX: y", "gehéim"])
def test_a_key_that_is_none_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(api.KEY, key)
    with pytest.raises(UserError, match="characters that no key has") as refused:
        api.at("http://host")
    assert "geh" not in str(refused.value)
    monkeypatch.setenv(api.KEY, "geheim\r\n")
    assert api.at("http://host").key == "geheim"


@pytest.fixture
def run(tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path) -> RunDir:
    return a_tiny_run(tmp_path, tiny, tiny_profile, sample)


def test_an_evaluation_goes_on_when_its_server_is_there_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_RECIPES_SERVER_KEY", "geheim")
    request = EvaluationRequest(adapter="none", max_new_tokens=8, judge="none", model="m", agreement_rows=0, limit=9)
    request.batch_size = 2
    left = 5
    lock = threading.Lock()

    def dies(body: dict[str, Any]) -> Reply:
        nonlocal left
        with lock:
            left -= body["max_tokens"] == 8
            return echo(body) if left >= 0 else None

    where = run.path / "evaluations" / "base-model"
    with serving(dies) as server, pytest.raises(WorkFailed) as failed:
        request.server = server.url
        evaluate.evaluate(run, request)
    kept = int(re.search(r"(\d) of 9 rows are kept, and the same command goes on from there", str(failed.value))[1])
    assert kept == 5
    with serving(echo) as server:
        request.server = server.url
        resumed = evaluate.evaluate(run, request)
        assert len([body for body in server.requests if body["max_tokens"] == 8]) == 9 - kept
        rows = read_predictions(where)
        assert [row["row"] for row in rows] == list(range(9))
        for file in (PREDICTIONS, SCORES):
            (where / file).unlink()
        undisturbed = evaluate.evaluate(run, request)
    assert rows == read_predictions(where)
    assert resumed.scores == undisturbed.scores
    assert resumed.settings == undisturbed.settings
    assert (resumed.settings.engine, resumed.settings.model) == ("server", "m")
    assert resumed.settings.served == "m on a server of tests; prompts as tokens"
    assert not any(b"geheim" in file.read_bytes() for file in run.path.rglob("*") if file.is_file())
