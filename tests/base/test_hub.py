"""Answers of the hub, from a local server."""

from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from conftest import config_with
from file_server import Server, as_hub, serving
from huggingface_hub import constants

from qlora_recipes.base import hub, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.check import check
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.data.prepare import default_sample

COMMIT = "c" * 40  # the server's
CONFIG = b'{"model_type": "llama", "num_hidden_layers": 2}'
# status, X-Error-Code and X-Error-Message, as the hub sends them
REFUSALS: dict[str, tuple[int, str, str]] = {
    "gated": (403, "GatedRepo", "Access to model owner/gated is restricted. Visit its page to ask for access."),
    "login": (401, "GatedRepo", "Access to model owner/login is restricted. Please log in."),
    "private": (401, "RepoNotFound", "Repository not found"),
    "none": (404, "RepoNotFound", "Repository not found"),
    "mirrored": (404, "", ""),
    "token": (401, "", "Invalid credentials in Authorization header"),
    "rights": (403, "", "Please enable access to public gated repositories in your fine-grained token."),
    "broken": (503, "", "Down for maintenance"),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A hub that huggingface_hub takes for the real one, with a token for it and an empty cache."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with serving(monkeypatch) as running, as_hub(running, tmp_path / "cache", monkeypatch):
        running.files = {"owner/open/auth-check": b"{}", "/resolve/main/config.json": CONFIG}
        running.refusals = {f"owner/{name}/auth-check": refusal for name, refusal in REFUSALS.items()}
        running.silent = ("owner/never/auth-check",)
        hub.access("owner/open")  # the first request of a process imports much
        running.paths.clear()
        monkeypatch.setattr(hub, "_answers", {})
        monkeypatch.setattr(hub, "ANSWER_TIMEOUT", 1.0)
        yield running


@pytest.mark.parametrize(
    ("name", "access", "says"),
    [
        ("owner/open", "open", ""),
        ("owner/gated", "gated", "ask for access"),
        ("owner/login", "gated", "Please log in"),
        ("owner/private", "missing", "Repository not found"),
        ("owner/none", "missing", "Repository not found"),
        ("owner/token", "refused", "Invalid credentials"),
        ("owner/rights", "refused", "enable access to public gated repositories"),
        ("owner/broken", "unknown", "maintenance"),
        ("owner/never", "unknown", "no answer within 1 s"),
        ("owner/mirrored", "unknown", "status 404"),
    ],
)
def test_each_answer_of_the_hub_is_told_apart(server, name, access, says):
    answer = hub.access(name)
    assert answer.access == access
    assert says in answer.says


def test_the_hub_is_asked_once_for_a_model_and_no_more_once_it_is_silent(server):
    for _ in range(2):
        assert hub.access("owner/open").access == "open"
    assert server.paths == ["/api/models/owner/open/auth-check"]
    assert hub.access("owner/never").access == "unknown"
    assert hub.access("owner/gated") == hub.access("owner/never")
    assert len(server.paths) == 2


def own(place: Path, model: str) -> None:
    """Write a recipe for a model, whose data is there."""
    data = default_sample()
    sets = {
        section: [{"path": str(data / f"{name}.jsonl"), "type": "alpaca"}]
        for section, name in (("datasets", "train"), ("test_datasets", "valid"))
    }
    change = {"base_model": model, "revision_of_model": None, "special_tokens": None, "fp16": False} | sets
    (place / "own.yaml").write_text(yamlfiles.write_yaml(config_with(change)))


@pytest.mark.parametrize(
    ("model", "level", "says"), [("owner/gated", "warning", "is restricted"), ("owner/none", "error", "not found")]
)
def test_check_and_run_say_what_the_hub_refuses(server, recipe, tmp_path, model, level, says):
    own(tmp_path, model)
    (line,) = [line for line in recipe("check", "own.yaml").stdout.splitlines() if "no-access" in line]
    assert f"{level}: base_model: " in line
    assert model in line
    assert says in line
    ran = recipe.fails("run", "own.yaml")
    assert "error: base_model: " in ran.stderr
    assert model in ran.stderr
    assert not (tmp_path / "runs").exists()
    assert server.paths == [f"/api/models/{model}/auth-check"]  # one process: asked once


def test_a_variant_for_a_model_that_the_hub_lacks_is_refused(server, recipe, tmp_path):
    server.refusals = {"Qwen/Qwen3-8BB/auth-check": REFUSALS["none"]}
    done = recipe.fails("new", "mine", "--model", "Qwen/Qwen3-8BB")
    assert done.stderr == (
        "recipe: --set base_model=Qwen/Qwen3-8BB: error: base_model: the hub has no model Qwen/Qwen3-8BB, or the model "
        "is private: Repository not found; did you mean Qwen/Qwen3-8B or Qwen/Qwen3-4B or Qwen/Qwen3-8B-Base?; correct "
        "the name; for a private model run `hf auth login` [no-access:base_model]\n"
    )
    assert not (tmp_path / "variants").exists()


@pytest.mark.parametrize("model", ["codellama/CodeLlama-7b-hf", "./folder"])
def test_the_hub_is_not_asked_about_a_model_that_is_known_to_be_free(server, recipe, tmp_path, model):
    own(tmp_path, model)
    recipe("check", "own.yaml")
    assert server.paths == []


def test_a_silent_hub_is_no_reason_not_to_start(server, tmp_path):
    own(tmp_path, "owner/never")
    composed = compose(Request(str(tmp_path / "own.yaml")))
    assert [f for f in check.check_config(composed, launching=True).findings if f.rule == "no-access"] == []


@pytest.mark.parametrize(
    ("names", "pickled"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin"),
        (["config.json", "pytorch_model.bin", "extra.safetensors"], "pytorch_model.bin"),
        (["config.json", "pytorch_model.bin", "model.safetensors"], ""),
        (["config.json", "model.safetensors.index.json", "part.bin"], "part.bin"),
    ],
)
def test_a_pickle_on_the_hub_is_an_error_before_it_is_fetched(server, recipe, tmp_path, names, pickled):
    own(tmp_path, "owner/open")
    listed = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
    index = b'{"weight_map": {"a": "part.bin"}}'
    server.files |= {"/tree/main?recursive=true&expand=false": orjson.dumps(listed)}
    server.files |= {"/resolve/main/model.safetensors.index.json": index}
    hub.files.cache_clear()
    lines = [line for line in recipe("check", "own.yaml").stdout.splitlines() if "pickled-weights" in line]
    assert [f"would load {pickled}, " in line for line in lines] == ([True] if pickled else [])
    assert not any(path.endswith((".bin", ".safetensors")) for path in server.paths)


def test_a_tokenizer_that_is_not_here_is_fetched_without_the_weights(server, tmp_path, tiny):
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    listed = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
    info = {"id": "owner/open", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
    server.files = {f"/resolve/{COMMIT}/{name}": (tiny / name).read_bytes() for name in names}
    server.files |= {
        "/auth-check": b"{}",
        "/resolve/main/config.json": (tiny / "config.json").read_bytes(),
        "/revision/main": orjson.dumps(info),
        "/tree/main?recursive=true&expand=false": orjson.dumps(listed),
        f"/tree/{COMMIT}?recursive=true&expand=false": orjson.dumps(listed),
    }
    hub.files.cache_clear()
    own(tmp_path, "owner/open")
    request = Request(str(tmp_path / "own.yaml"))
    report = check.check_request(request, data=True)
    check.tokenize_all(report, request)
    assert [(row["rows"], row["tokens"] > 1000) for row in report.data] == [(109, True), (27, True)]
    fetched = {Path(path).name for path in server.paths if "/resolve/" in path}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_that_the_hub_refuses_is_named(server, tmp_path):
    own(tmp_path, "owner/gated")
    composed = compose(Request(str(tmp_path / "own.yaml")))
    assert check.has_tokenizer(composed) is False
    with pytest.raises(UserError, match="the tokenizer of owner/gated is not on this machine"):
        check.training_lengths(composed)
    assert server.paths == ["/api/models/owner/gated/auth-check"]
