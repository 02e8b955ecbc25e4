"""llama.cpp's server as an engine: with a fake server, and with the real one, in a long test."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from a_server import AServer, serving
from fake_llama import FakeLlama, chatml, serving_llama

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.data.studies import Decoding
from qlora_recipes.evaluate import llama as llamas
from qlora_recipes.evaluate import server as servers
from qlora_recipes.evaluate import transformers_engine
from qlora_recipes.evaluate.llama import LlamaServer
from qlora_recipes.evaluate.settings import Completion, Distance, Example, ServedFile

QUESTIONS = ["Hi there", "What now?", "Bye"]
F16 = ServedFile(name="m-f16.gguf", quantization="F16", bits=16)
Q4 = ServedFile(name="m-q4_k_m.gguf", quantization="Q4_K - Medium", bits=4.9)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "RETRIES", 1)
    monkeypatch.setattr(llamas, "RETRIES", 1)


def engine(server: AServer, llama: FakeLlama, file: ServedFile = F16, **decoding: Any) -> LlamaServer:
    from transformers import LlamaConfig

    prompter: Any = SimpleNamespace(
        settings=SimpleNamespace(decoding=Decoding(max_new_tokens=8, **decoding), base_model="nowhere/m", model="m"),
        tokenizer=llama.tokenizer,
        config=LlamaConfig(vocab_size=1024),
        cfg={},
        ends=[2],
        longest=1000,
    )
    return LlamaServer(prompter, servers.Api(servers.api_at(server.url).url, timeout=5), file, at_once=2)


def chats(llama: FakeLlama) -> list[Example]:
    """Chats as their training tokenized them."""
    examples = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        examples.append(Example(llama.tokenizer(chatml(messages))["input_ids"], "Yes.", [40, 50, 2], messages))
    return examples


def test_the_file_is_named_by_its_server():
    with serving_llama(FakeLlama(quantization="Q4_K - Medium", bits=4.85)) as server:
        server.models[1]["data"][0]["meta"] = {"n_params": 100, "size": 61}
        file = llamas.served_file(server.url, "m")
        assert llamas.served_file(server.url, "other") is None
    assert file == ServedFile(name="m-f16.gguf", quantization="Q4_K - Medium", bits=4.88)
    assert file.is_quantized and not F16.is_quantized
    assert str(F16) == "m-f16.gguf (F16, 16.0 bits)"


def test_other_servers_serve_no_file():
    with serving(lambda body: None) as server:
        assert llamas.served_file(server.url, "m") is None
    assert llamas.served_file(server.url, "m") is None  # which has ended


def test_answers_are_truncated_at_the_ends_of_the_run():
    with serving_llama(FakeLlama()) as server:
        of = engine(server, FakeLlama())
        answers = [*of.generate([[5, 6]], ())]
    assert answers == [{0: Completion(of.tokenizer.decode([7, 8]).strip(), [7, 8, 2])}]
    request = server.requests[0]
    assert [request[key] for key in ("prompt", "samplers", "temperature")] == [[5, 6], ["temperature"], 0]


def test_answers_of_another_file_are_not_taken():
    llama, other = FakeLlama(), FakeLlama(quantization="Q8_0", bits=8)
    with serving_llama(llama) as server:
        answers = engine(server, llama).generate([[5, 6]] * 9, ())
        next(answers)
        server.models, server.others["/props"] = other.models(), other.props()  # another process, on the same port
        with pytest.raises(WorkFailed) as refused:
            next(answers)
    assert str(refused.value).replace(server.url, "URL") == (
        "URL/v1/: no longer serves m-f16.gguf (F16, 16.0 bits); start the server again with this file"
    )


def test_an_answer_that_ends_at_a_text_is_refused():
    llama = FakeLlama(ends={2, 50}, answer=[7, 50])
    with serving_llama(llama) as server, pytest.raises(WorkFailed) as refused:
        [*engine(server, llama).generate([[5, 6]], ())]
    assert str(refused.value).replace(server.url, "URL") == (
        "URL/v1/: row 1, a prompt of 2 tokens: ValueError: the file wrongly ends answers at 'P' (token 50); export it "
        "again"
    )


def test_samples_use_only_the_samplers_of_the_decoding():
    with serving_llama(FakeLlama()) as server:
        [*engine(server, FakeLlama(), do_sample=True, temperature=0.7, top_p=0.9, top_k=0, seed=3).generate([[5]], ())]
    asked = {key: server.requests[0][key] for key in ("samplers", "temperature", "top_p", "top_k", "seed")}
    assert asked == {
        "samplers": ["temperature", "top_k", "top_p"],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "seed": 3,
    }


def test_equal_tokens_pass(capsys):
    llama = FakeLlama()
    with serving_llama(llama) as server:
        engine(server, llama).require_same_tokens(chats(llama))
        assert capsys.readouterr().err.splitlines()[-1] == "m-f16.gguf: tokens of 3 of 3 prompts equal the training's"
        instructions = chats(llama)
        for example in instructions:
            example.messages = None
        engine(server, llama).require_same_tokens(instructions)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "m-f16.gguf: tokens of 3 of 3 prompts equal the training's; its chat template was not compared, because the "
        "run did not train on chats"
    )


AGAIN = (
    "\nexport the file again, with the tokenizer and the chat template in the run's folder, or start the server with "
    "`--chat-template-file`"
)
FIRST = "m-f16.gguf: the prompt of row 1 differs from the training's from token"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(
            {"before": [1, 1]},
            f"""{FIRST} 2 on
  training: 1 '<s>', 30 '<', 94 '|', 85 's', 91 'y', 85 's', 86 't', 71 'e', 79 'm'
  server:   1 '<s>', 1 '<s>', 30 '<', 94 '|', 85 's', 91 'y', 85 's', 86 't', 71 'e'{AGAIN}""",
            id="BOS doubled",
        ),
        pytest.param(
            {"before": []},
            f"""{FIRST} 1 on
  training: 1 '<s>', 30 '<', 94 '|', 85 's', 91 'y', 85 's', 86 't', 71 'e'
  server:   30 '<', 94 '|', 85 's', 91 'y', 85 's', 86 't', 71 'e', 79 'm'{AGAIN}""",
            id="BOS lost",
        ),
        pytest.param(
            {"system": ""},
            f"""{FIRST} 13 on
  training: 32 '>', 201 'Ċ', 36 'B', 71 'e', 223 'Ġ', 85 's', 74 'h', 81 'o', 84 'r', 86 't'
  server:   32 '>', 201 'Ċ', 201 'Ċ', 30 '<', 94 '|', 87 'u', 85 's', 71 'e', 84 'r', 94 '|'{AGAIN}""",
            id="system prompt lost",
        ),
        pytest.param(
            {"ends": {3}},
            "m-f16.gguf: does not end an answer at '</s>' (token 2), as the training does; export it again, with the "
            "tokenizer in the run's folder",
            id="EOS lost",
        ),
        pytest.param(
            {"context": 40},
            "--engine URL/v1/: the server has a context of 40 tokens for each of its 2 slots, and the longest row "
            "needs 63; start it with `-c 126`",
            id="context too small",
        ),
        pytest.param(
            {"missing": ["/apply-template"]},
            "--engine URL/v1/: the server has no /apply-template; use a llama.cpp of February 2025 or newer",
            id="old llama.cpp",
        ),
        pytest.param(
            {"forces": False},
            "URL/v1/: ValueError: the server does not force tokens by logit_bias; use a newer llama.cpp",
            id="tokens are not forced",
        ),
    ],
)
def test_faults_are_refused_before_any_answer(fault, message):
    llama = FakeLlama(**fault)
    with serving_llama(llama) as server, pytest.raises((UserError, WorkFailed)) as refused:
        engine(server, llama).require_same_tokens(chats(llama))
    assert str(refused.value).replace(server.url, "URL") == message


def props_with(*path: Any, value: Any) -> Any:
    """A right response of the server to `/props`, with another value in one place."""
    content = FakeLlama().props()[1]
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


HUGE = b'{"model_path": "m", "total_slots": 1%s, "default_generation_settings": {"n_ctx": 1}}' % (b"0" * 400)


def choice(**changes: Any) -> Any:
    """A response with one token and its most probable tokens."""
    token = {"id": 2, "logprob": 0.0, "top_logprobs": []} | changes
    return {"choices": [{"finish_reason": "stop", "logprobs": {"content": [token]}}]}


@pytest.mark.parametrize(
    ("path", "response", "problem"),
    [
        ("/props", b"<html>", "response: Invalid JSON: expected value at line 1 column 1: '<html>'"),
        ("/props", [], "response: Input should be an object: []"),
        ("/props", None, "response: Input should be an object: None"),
        ("/props", HUGE, f"response.total_slots: Input should be less than or equal to 1024: 1{'0' * 99}"),
        (
            "/props",
            props_with("total_slots", value=0),
            "response.total_slots: Input should be greater than or equal to 1: 0",
        ),
        ("/props", props_with("model_path", value=[]), "response.model_path: Input should be a valid string: []"),
        (
            "/props",
            props_with("default_generation_settings", "n_ctx", value=None),
            "response.default_generation_settings.n_ctx: Input should be a valid integer: None",
        ),
        ("/apply-template", {}, "response.prompt: Field required: {}"),
        ("/tokenize", {"tokens": None}, "response.tokens: Input should be a valid array: None"),
        ("/tokenize", {"tokens": [-1]}, "response.tokens.0: Input should be greater than or equal to 0: -1"),
        (
            "/v1/completions",
            choice(logprob=1e308),
            "response.choices.0.logprobs.content.0.logprob: Input should be less than or equal to 0.01: 1e+308",
        ),
        (
            "/v1/completions",
            choice(top_logprobs=[{"id": 1024, "logprob": 0}]),
            "ValueError: tokens of another vocabulary; serve the run's model",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("/") else "",
)
def test_an_odd_response_is_named(path, response, problem):
    llama = FakeLlama()
    with serving_llama(llama) as server:
        server.reply = lambda body: (200, response) if body["path"] == path else llama.reply(body)
        if path == "/props":
            server.others[path] = (200, response)
        with pytest.raises(WorkFailed) as refused:
            engine(server, llama).require_same_tokens(chats(llama))
        assert str(refused.value) == f"{server.url}/v1/: {problem}"
        if path == "/props":  # which also names the file
            with pytest.raises(WorkFailed) as refused:
                llamas.served_file(server.url, "m")
            assert str(refused.value) == f"{server.url}/v1/: {problem}"


def test_a_size_without_bounds_is_named():
    with serving_llama(FakeLlama()) as server:
        server.models[1]["data"][0]["meta"] = {"n_params": 1, "size": 10**400}
        with pytest.raises(WorkFailed, match=r"response\.bits: Input should be a finite number: inf$"):
            llamas.served_file(server.url, "m")


LOGITS = torch.linspace(0, 5, 1024).double()
CHANGE = torch.cos(torch.arange(1024)).double()
"""The adapter's change to the logits of the base model, which are `LOGITS`."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Logits of the merged weights; a class with these takes the place of the reference engine."""

    class Trained:
        logits = LOGITS + 1.1 * CHANGE

        def __init__(self, prompter: Any): ...

        def merge(self) -> None:
            self.logits = LOGITS + CHANGE

        def log_probabilities(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
            return self.logits.log_softmax(-1).repeat(len(answer), 1)

        def free(self) -> None: ...

    monkeypatch.setattr(transformers_engine, "TransformersEngine", Trained)
    return LOGITS + CHANGE


def measured(logits: torch.Tensor, file: ServedFile = F16) -> Distance:
    llama = FakeLlama(logits=logits)
    with serving_llama(llama) as server:
        return engine(server, llama, file).distance(chats(llama))


def test_a_right_file_has_no_distance(trained, capsys):
    distance = measured(trained)
    assert (distance.rows, distance.tokens) == (3, 9)
    assert distance.kl == pytest.approx(0, abs=1e-9)
    assert distance.difference == pytest.approx(0, abs=1e-9)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "m-f16.gguf (F16, 16.0 bits): loss 10.489 → 10.439 → 10.439 (adapter → merged → file), mean KL from the merged "
        "weights 0.0000 (a quantized file is not refused for it), mean difference of log-probabilities 0.000, on 9 "
        "tokens of 3 rows"
    )


NOISE = 0.5 * torch.sin(100 * torch.arange(1024)).double()  # like that of quantized weights


@pytest.mark.parametrize(
    ("logits", "kl"),
    [
        pytest.param(LOGITS, 0.0561, id="adapter dropped"),
        pytest.param(LOGITS + 2 * CHANGE, 0.0357, id="scale doubled"),
        pytest.param(LOGITS + CHANGE + NOISE, 0.0211, id="other weights"),
    ],
)
def test_other_weights_are_refused_in_16_bits_only(trained, logits, kl):
    with pytest.raises(UserError) as refused:
        measured(logits)
    assert str(refused.value) == (
        f"m-f16.gguf: not the trained model: its mean KL from the merged weights is {kl}, and at most 0.0005 in right "
        "files of 16 bits; export it again with `recipe publish RUN --gguf f16`, which merges the adapter into the "
        "weights that it was trained on"
    )
    assert measured(logits, Q4).kl == pytest.approx(kl, abs=5e-5)


def test_divergence_counts_unlisted_tokens_as_one(trained):
    expected = trained.log_softmax(-1)
    changed = (trained + torch.linspace(1, 0, 1024)).log_softmax(-1)
    complete = llamas.kl(expected, token(changed, 1024))
    assert complete == pytest.approx(float((expected.exp() * (expected - changed)).sum()), abs=1e-6)
    assert 0 < llamas.kl(expected, token(changed, 64)) < complete


def token(probabilities: torch.Tensor, listed: int) -> Any:
    """Token of an answer, with as many probable tokens as are listed."""
    top = [{"id": i, "logprob": float(probabilities[i])} for i in probabilities.topk(listed).indices.tolist()]
    return llamas._Token.model_validate({"id": 0, "logprob": 0, "top_logprobs": top})
