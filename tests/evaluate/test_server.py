import gc
import gzip
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import pytest
import random_models
from a_server import AServer, Reply, completed, serving
from pydantic import ValidationError
from run_folders import a_tiny_run, other_evaluation

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.data.studies import Decoding
from qlora_recipes.evaluate import evaluate
from qlora_recipes.evaluate import server as servers
from qlora_recipes.evaluate.evaluate import EvaluationRequest
from qlora_recipes.evaluate.evaluation_rows import sample_positions
from qlora_recipes.evaluate.scores_file import read_predictions
from qlora_recipes.evaluate.settings import Completion

PROMPTS = [[5, 6, 7, 8], [5, 6], [9, 10, 11], [12, 13, 14, 15, 16]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "RETRIES", 2)
    monkeypatch.delenv(servers.KEY, raising=False)


def prompter(**decoding: Any) -> Any:
    from transformers import LlamaConfig

    return SimpleNamespace(
        settings=SimpleNamespace(decoding=Decoding(max_new_tokens=8, **decoding), base_model="nowhere/m"),
        tokenizer=random_models.tokenizer(),
        config=LlamaConfig(eos_token_id=[2, 77]),
        revision="main",
        ends=[2, 77],
    )


def engine(server: AServer, at_once: int = 2, timeout: float = 5, **decoding: Any) -> Any:
    api = servers.Api(servers.api_at(server.url).url, timeout=timeout)
    return servers.Server(prompter(**decoding), api, "m", at_once)


def answers(of: Any, done: tuple[int, ...] = ()) -> dict[int, Completion]:
    return {i: answer for group in of.generate(PROMPTS, done) for i, answer in group.items()}


def echo(body: dict[str, Any]) -> Reply:
    """The prompt's own tokens, as many as were requested."""
    return completed("not this", token_ids=body["prompt"][: body["max_tokens"]])


def echoed(of: Any, *numbers: int) -> dict[int, Completion]:
    return {i: Completion(of.tokenizer.decode(PROMPTS[i]).strip(), PROMPTS[i]) for i in numbers}


def test_prompts_and_answers_are_tokens():
    with serving(echo) as server:
        of = engine(server)
        assert answers(of, done=(1,)) == echoed(of, 0, 2, 3)
    asked = server.requests[-1]
    assert asked["model"] == "m"
    assert asked["max_tokens"] == 8
    assert asked["temperature"] == 0
    assert asked["stop_token_ids"] == sorted({2, 77, of.tokenizer.eos_token_id})  # as the reference's
    assert "seed" not in asked and "top_p" not in asked


@pytest.mark.parametrize(("top_k", "asked"), [(5, 5), (0, -1)])  # vLLM's -1 is all tokens
def test_samples_differ_by_row_and_repeat(top_k, asked):
    with serving(echo) as server:
        answers(engine(server, do_sample=True, temperature=0.7, top_p=0.9, top_k=top_k, seed=3))
    assert sorted(body["seed"] for body in server.requests) == [3, 4, 5, 6]
    decodings = {tuple(body[key] for key in ("temperature", "top_p", "top_k", "min_p")) for body in server.requests}
    assert decodings == {(0.7, 0.9, asked, 0)}


def test_errors_that_pass_are_waited_for_and_no_row_is_asked_twice():
    failures = iter([(429, {}), (503, b"busy"), None])  # all may come to one row
    lock = threading.Lock()

    def reply(body: dict[str, Any]) -> Reply:
        with lock:
            return next(failures, echo(body))

    with serving(reply) as server:
        of = engine(server)
        assert answers(of) == echoed(of, 0, 1, 2, 3)
    assert len(server.requests) == 4 + 3


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((429, {"error": "too many"}), "429 .*too many"),
        (None, "row 4, "),
        ((200, b"<html>Welcome</html>"), "<html>Welcome</html>"),
        ((200, {"choices": []}), "choices"),
        (completed("x"), "token_ids"),
        (completed("x", "abort", token_ids=[]), "abort"),
        (completed("x", token_ids=[5] * 9), "row 4, .*more tokens than requested"),
        (completed("x", token_ids=[-1]), r"row 4, .*: response\.choices\.0\.token_ids\.0: .*equal to 0: -1$"),
        (completed("x", token_ids=[5, 2**31 - 1]), "row 4, .*of another vocabulary"),
        (completed("x", token_ids=[5, 2**70]), "row 4, .*token_ids.1: .*less than"),
        ((401, {"error": "expired"}), "401 .*expired"),
        ((400, {"error": "context of 4 tokens"}), "row 4, .* 5 .*: .*400 .*context"),
    ],
)
def test_what_a_server_cannot_answer_ends_it_and_loses_nothing(reply, problem):
    with serving(lambda body: reply if len(body["prompt"]) == 5 else echo(body)) as server:
        completions: dict[int, Completion] = {}
        with pytest.raises(WorkFailed, match=problem):
            for group in engine(server, at_once=1).generate(PROMPTS, ()):
                completions |= group
    assert sorted(completions) == [0, 1, 2]


def test_a_response_has_one_mistake():
    with pytest.raises(ValidationError) as refused:  # with a kilobyte for each of millions, memory would not suffice
        servers.Choice.model_validate({"finish_reason": "stop", "token_ids": [None, None]})
    assert refused.value.error_count() == 1


def test_only_the_first_of_several_failures_is_reported(caplog):
    with serving(lambda body: (400, {"error": "no"})) as server, pytest.raises(WorkFailed, match="400"):
        answers(engine(server, at_once=4))
    gc.collect()  # asyncio then logs errors that nobody has seen, with tracebacks
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_a_server_that_never_answers_is_given_up():
    def reply(body: dict[str, Any]) -> Reply:
        time.sleep(0.4)
        return echo(body)

    with serving(reply) as server, pytest.raises(WorkFailed, match="row "):
        answers(engine(server, timeout=0.2))


@pytest.mark.parametrize(
    ("models", "model", "problem"),
    [
        (None, "n", "--served-model n: .* m, another"),
        (None, "anther", r"--served-model anther: .* another\?"),
        (None, None, "--model; .* m, another"),
        (None, "another", "v1/: the server's name is None; only vLLM and llama"),
        ((200, {"data": [{"id": "m", "owned_by": "library"}]}), "m", "name is library; .*; start one of these there"),
        ((200, b"<html>hello</html>"), "m", "<html>hello</html>"),
        ((404, {"error": "nothing here"}), "m", "404"),
        ((401, {"error": "who are you"}), "m", servers.KEY),
    ],
)
def test_a_model_is_asked_for_before_anything(models, model, problem):
    with serving(echo) as server:
        server.models = models or server.models
        with pytest.raises(UserError, match=problem):
            servers.api_at(server.url).require_model(model)
        assert not server.requests


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        *((url, url) for url in ("localhost:8000", "ftp://host/v1", "http://", "http://host:port")),
        ("https://user:geheim@host/v1", servers.KEY),
        ("https://host/v1?api_key=geheim", servers.KEY),
    ],
)
def test_urls_that_are_none_or_hold_a_key_are_refused(url, problem):
    with pytest.raises(UserError, match=problem) as refused:
        servers.api_at(url)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_url_may_end_as_it_is_written_anywhere(end):
    assert servers.api_at(f"https://host:1{end}").url == "https://host:1/v1/"
    assert servers.api_at("https://host/openai").url == "https://host/openai/"


@pytest.mark.parametrize("key", [None, "geheim"])
def test_a_server_gets_no_key_of_another(key, monkeypatch):
    names = ["OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_WEBHOOK_SECRET"]
    foreign = {name: "theirs" for name in names} | {"http_proxy": "http://127.0.0.1:9"}
    foreign |= {"OPENAI_CUSTOM_HEADERS": "Authorization: Bearer theirs\nX-Key: theirs"}
    foreign |= {"OPENAI_BASE_URL": "http://127.0.0.1:9/theirs"} | ({servers.KEY: key} if key else {})
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    with serving(echo) as server:
        api = servers.api_at(server.url)
        api.require_model("m")
        assert answers(servers.Server(prompter(), api, "m", 1))
        with serving(echo) as other:
            server.models = 307, {}
            server.headers = {"Location": f"{other.url}/v1/models"}
            with pytest.raises(UserError, match="307") as refused:
                api.require_model("m")
    assert "geheim" not in str(refused.value)
    sent = server.requests[0]["headers"]
    assert sent["authorization"] == f"Bearer {key or 'none'}" and "theirs" not in str(server.requests + server.asked)
    assert not {"openai-organization", "openai-project"} & set(sent) and not other.asked


@pytest.mark.parametrize("key", ["geheim\r\nX: y", "gehéim"])
def test_a_key_that_is_none_is_refused_unseen(key, monkeypatch):
    monkeypatch.setenv(servers.KEY, key)
    with pytest.raises(UserError, match=servers.KEY) as refused:
        servers.api_at("http://host")
    assert "geh" not in str(refused.value)
    monkeypatch.setenv(servers.KEY, "geheim\r\n")
    assert servers.api_at("http://host").key == "geheim"


def test_an_evaluation_goes_on_when_its_server_is_there_again(tmp_path, tiny, tiny_profile, sample, monkeypatch):
    monkeypatch.setenv(servers.KEY, "geheim")
    run = a_tiny_run(tmp_path, tiny, tiny_profile, sample)
    request = EvaluationRequest(adapter="none", max_new_tokens=8, metrics=["bertscore:none"], limit=9, model="m")
    request.batch_size, left = 2, iter(range(5))

    def dies(body: dict[str, Any]) -> Reply:
        return None if next(left, None) is None else echo(body)

    with serving(dies) as server, pytest.raises(WorkFailed, match=r"\b5 of 9 "):
        request.engine = server.url
        evaluate.evaluate_run(run, request)
    with serving(echo) as server:
        request.engine = server.url
        resumed = evaluate.evaluate_run(run, request)
        assert len(server.requests) == 9 - 5
    rows = [row["row"] for row in read_predictions(other_evaluation(run))]
    assert rows == sample_positions(resumed.settings.total_rows, 9)
    assert resumed.settings.engine == "server"
    assert resumed.settings.model == "m"
    assert resumed.settings.agreement is None
    assert not any(b"geheim" in file.read_bytes() for file in run.path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("chunk", "pause", "problem"),
    [(b"x", 0.1, "no complete response in time"), (b"x" * 2**20, 0, "response of more than 16 MiB")],
    ids=["slow", "endless"],
)
def test_the_list_of_models_is_bounded_in_time_and_size(monkeypatch, chunk, pause, problem):
    monkeypatch.setattr(servers, "LIST_TIMEOUT", 0.5)
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while len(sent) < 100:
                handler.wfile.write(chunk)
                sent.append(len(chunk))
                time.sleep(pause)

    monkeypatch.setattr("a_server._Handler.do_GET", endless)
    with serving(echo) as server, pytest.raises(UserError, match=problem):
        servers.api_at(server.url).require_model("m")
    assert len(sent) < 50


def test_a_compressed_response_is_refused():
    with serving(echo) as server:
        server.headers["Content-Encoding"] = "gzip"
        server.models = (200, gzip.compress(b'{"data": [{"id": "m"}]}'))
        with pytest.raises(UserError, match="compressed response"):
            servers.api_at(server.url).require_model("m")


def test_an_endless_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(servers, "MOST_BYTES", 1000)
    monkeypatch.setattr(servers, "RETRIES", 0)
    long = completed("x" * 2000, token_ids=[5])
    with serving(lambda body: long) as server, pytest.raises(WorkFailed, match=r"row \d, .*response of more than"):
        answers(engine(server))
