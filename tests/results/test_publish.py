"""Cards of a faked finished run, pushes to a small hub of this machine's, and a real merge by Axolotl."""

import base64
import contextlib
import io
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import yaml
from conftest import recipe_config
from huggingface_hub import close_session, constants
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.base.files import sha256
from qlora_recipes.configs import config, models
from qlora_recipes.configs.config import Difference
from qlora_recipes.configs.datafiles import DataFile
from qlora_recipes.data.study import Decoding
from qlora_recipes.results import card as model_card
from qlora_recipes.results import publish
from qlora_recipes.runs.rundir import Launch, Run, RunDir, Summary
from qlora_recipes.scores import evaluations

if TYPE_CHECKING:
    from qlora_recipes.scores.engines.reference import Reference

RECIPE = "haider2024/llama-3-8b"
BASE = "meta-llama/Meta-Llama-3-8B"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with what a training leaves, its weights a few numbers."""
    folder = RunDir(tmp_path / "work" / "runs" / "run")
    for file in (
        *TOKENIZER,
        "config.json",
        "adapter_model.safetensors",
        "debug.log",
        "README.md",
        "training_args.bin",
        "checkpoint-9/adapter_model.safetensors",
        "checkpoint-9/tokenizer.json",
        "checkpoint-9/optimizer.pt",
        "merged/model.safetensors",
    ):
        (folder.output / file).parent.mkdir(parents=True, exist_ok=True)
        (folder.output / file).write_bytes(f"{file}'s content".encode() * 99)
    save_file({"lora_A": np.ones((8, 4), np.float32)}, folder.output / "adapter_model.safetensors")
    (folder.output / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": BASE, "r": 32}))
    ours = {
        "output_dir": str(folder.output),
        "dataset_prepared_path": "/home/someone/.cache/prepared",
        "plugins": ["qlora_recipes.plugin.RunPlugin"],
        "deepspeed": str(tmp_path / "elsewhere" / "zero2.json"),
        "use_wandb": True,
        "wandb_entity": "someone",
        "hf_mlflow_log_artifacts": True,
    }
    folder.config.write_text(yamlfiles.write_yaml(recipe_config(RECIPE) | ours))
    folder.write(record(tmp_path))
    return folder


def record(tmp_path: Path, **changes: Any) -> Run:
    """The record of a run on a GPU."""
    return Run(
        **{
            "state": "finished",
            "recipe": RECIPE,
            "recipe_file": str(tmp_path / "work" / "mine.yaml"),
            "recipe_sha256": "a" * 64,
            "data": [DataFile(path="data/codereviewer/train.jsonl", sha256="b" * 64, bytes=9, rows=117739)],
            "cwd": str(tmp_path / "work"),
            "launches": [Launch(command=["/home/someone/axolotl"], started="2026-01-01T00:00:00+00:00")],
            "summary": Summary(
                step=70, max_steps=70, epoch=2.0, loss=1.5, eval_loss_first=2.6, eval_loss=1.3, train_seconds=7200,
                eval_loss_per_token_first=2.5, eval_loss_per_token=1.25,
                tokens_per_second=1234.5, peak_memory=13.2, memory_kind="GPU, reserved",
            ),
            "provenance": {
                "git": {"revision": "d" * 40, "dirty": True},
                "lock_sha256": "e" * 64,
                "packages": {"axolotl": "0.21.0", "deepspeed": None},
                "python": "3.13.5",
                "host": platform.node(),
                "gpus": [{"name": "NVIDIA T4"}],
            },
        }
        | changes
    )  # fmt: skip


def evaluated(run: RunDir, **settings: Any) -> None:
    """Give a run the scores of an evaluation."""
    evaluation = evaluations.Evaluation(
        made="2026-01-02T00:00:00+00:00",
        rehearsal=False,
        scores={
            "rows": 5000,
            "bleu4": 5.12345,
            "rouge_l": 0.1,
            "bertscore_f1": None,
            "intervals": {"bleu4": [4.9, 5.3]},
            "bertscore": None,
            "sacrebleu": 1.5,
            "sacrebleu_signature": "nrefs:1|case:mixed",
            "exact": 0,
        },
        code_sha256="f" * 64,
        settings=evaluations.EvaluationSettings(
            **{
                "base_model": BASE,
                "adapter": str(run.output),
                "adapter_sha256": sha256(run.output / "adapter_model.safetensors"),
                "data": str(run.path.parents[1] / "data" / "codereviewer" / "test-subset-1.jsonl"),
                "data_sha256": "9" * 64,
                "test_set": "test-subset-1",
                "rows": 5000,
                "decoding": Decoding(max_new_tokens=96),
                "batch_size": 16,
                "quantized": True,
                "dtype": "float16",
            }
            | settings
        ),
    )
    (run.path / "scores.json").write_text(evaluation.model_dump_json())


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the text of a card."""
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, as text."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level >= 4:
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


def blocks(text: str) -> dict[str, str]:
    """The last block of code of each language."""
    return {token.info: token.content for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"}


def test_the_card_says_how_the_model_was_made(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(run)
    assert publish.publish(run) == [str(run.output / "README.md")]
    assert capsys.readouterr().err == ""
    front, text = card(run.output)
    results = front.pop("model-index")
    assert front == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "llama3",
        "tags": ["axolotl", "lora", "qlora", "code-review"],
    }
    (result,) = results[0]["results"]
    assert result["dataset"]["name"] == "CodeReviewer, comment generation, Test Subset 1, 5,000 rows"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"bleu": 5.1235, "rouge": 0.1, "sacrebleu": 1.5}

    data, training, scores, provenance = tables(text)
    assert data[1] == ["data/codereviewer/train.jsonl", "117,739", "b" * 64]
    assert ["validation loss, first and last", "2.50, 1.25"] in training
    assert ["peak memory", "13.20 GiB (GPU, reserved)"] in training
    assert ["hours of training steps", "2.00"] in training
    assert ["GPU", "1 x NVIDIA T4"] in training
    assert scores[:2] == [["score", "value", "95 % interval", "published"], ["bleu4", "5.12", "4.90 to 5.30", "5.27"]]
    assert ["sacrebleu", "1.50", "–", "–"] in scores
    assert ["git revision of the recipes", f"{'d' * 40} with uncommitted changes"] in provenance
    assert ["the run's config.yaml, SHA-256", sha256(run.config)] in provenance
    assert ["packages", "axolotl 0.21.0, Python 3.13.5"] in provenance

    assert blocks(text)["sh"] == f"recipe run {RECIPE}\n"
    shown = yaml.safe_load(blocks(text)["yaml"])
    hidden = {"output_dir", "deepspeed"}
    assert {key: value for key, value in shown.items() if key != "deepspeed"} == {
        key: value for key, value in recipe_config(RECIPE).items() if key not in hidden
    }
    assert shown["deepspeed"] == "zero2.json"
    for said in (
        "Nothing differs from the recipe",
        "arXiv 2411.10129",
        "licence CC-BY-4.0",
        "smoothed sentence BLEU-4",
        "The published scores are on Test Subset 1, 5,000 rows.\n",
        "`data/codereviewer/test-subset-1.jsonl`",
        "9" * 64,
        '"max_new_tokens": 96',
        "`nrefs:1|case:mixed`",
        "**Built with Meta Llama 3**",
        'begin the model\'s name with "Llama 3"',
        f'revision="{recipe_config(RECIPE)["revision_of_model"]}"',
    ):
        assert said in text
    assert "ehearsal" not in text


def test_a_card_names_nothing_of_the_machine(run: RunDir, tmp_path: Path) -> None:
    absolute = str(tmp_path / "my data" / "train.jsonl")
    run.write(
        record(
            tmp_path,
            recipe="mine",
            profiles=[str(tmp_path / "work" / "profiles" / "p.yaml"), "/home/someone/q.yaml"],
            overrides=[f"datasets.0.path={absolute}", "deepspeed=../someone/zero.json", "wandb_entity=someone"],
            differences=[
                Difference(key="datasets.0.path", recipe="a", run=absolute, why="profile /home/someone/q.yaml"),
                Difference(key="special_tokens", run={"pad_token": "</s>", "url": "https://a.org/b/c"}, why="--set"),
                Difference(key="wandb_entity", run="someone", why="--set wandb_entity=someone"),
            ],
            data=[DataFile(path=absolute, sha256="b" * 64, bytes=9)],
        )
    )
    evaluated(run, data=absolute, test_set=None, limit=12)
    publish.publish(run)
    front, text = card(run.output)
    whole = f"{front}{text}"
    for private in (str(tmp_path), "/home", "someone", str(Path.home()), f"`{platform.node()}`", ".cache"):
        assert private not in whole
    assert blocks(text)["sh"].startswith("recipe run mine.yaml --profile profiles/p.yaml --profile q.yaml --set ")
    differences, data = tables(text)[:2]
    assert differences[1:] == [
        ["datasets.0.path", "a", "train.jsonl", "profile q.yaml"],
        ["special_tokens", "–", '{"pad_token": "</s>", "url": "https://a.org/b/c"}', "--set"],
    ]
    assert data[1][0] == "train.jsonl"
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "train.jsonl, the first 5,000 rows"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_kwargs", {"token": "planted"}),
        ("optim_args", "betas=1,token=planted"),
        ("comet_experiment_config", {"COMET_API_KEY": "planted"}),
        ("lora_qkv_name", "hf_planted" + "1A" * 9),
        ("lora_uri", "https://user:planted/word@example.org"),
    ],
)
def test_a_card_of_a_run_that_has_secrets_leaves_them_out(run: RunDir, tmp_path: Path, key: str, value: Any) -> None:
    cfg = yamlfiles.read_yaml(run.config)
    run.config.write_text(yamlfiles.write_yaml(cfg | {key: value}))
    differences = [Difference(key=key, run=value, why=f"--set {key}={json.dumps(value)}")]
    changes = {"differences": differences, "overrides": [f"{key}={json.dumps(value)}"]}
    run.write(record(tmp_path, **changes))
    assert "planted" not in model_card.card(run, run.read(), None, False, None)


def test_text_of_a_run_does_not_break_its_card(run: RunDir, tmp_path: Path) -> None:
    odd = "a|b `c` ``d``\n| --- |\n```\n---\n<b>\\"
    run.write(
        record(
            tmp_path,
            recipe="x: |y|\n---\n# z",
            overrides=[f"chat_template={odd}"],
            differences=[Difference(key="k|k", recipe="`", run=odd, why="|")],
            data=[DataFile(path=odd, sha256="b" * 64, bytes=9)],
        )
    )
    run.config.write_text(yamlfiles.write_yaml(recipe_config(RECIPE) | {"chat_template": odd, "base_model": BASE}))
    evaluated(run, test_set=None, data="|`.jsonl")
    publish.publish(run)
    front, text = card(run.output)
    assert front["model-index"][0]["name"] == "x: |y|\n---\n# z"
    one_line = " ".join(odd.split())
    differences, data = tables(text)[:2]
    assert differences[1:] == [["k|k", "`", one_line, "|"]]
    assert data[1:] == [[one_line, "–", "b" * 64]]
    assert yaml.safe_load(blocks(text)["yaml"])["chat_template"] == odd
    assert odd in blocks(text)["sh"]
    headings = [t for t in MarkdownIt("commonmark").enable("table").parse(text) if t.type == "heading_open"]
    assert [heading.tag for heading in headings] == ["h1", *["h2"] * 7]


def test_nothing_from_a_run_is_markdown_or_html_in_its_card(run: RunDir, tmp_path: Path) -> None:
    odd = "x](https://evil.example) <img src=//evil.example/a> **b** ![c](https://evil.example/d)\n# e"
    settings = json.loads((run.output / "adapter_config.json").read_text())
    (run.output / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": odd}))
    provenance = {"packages": {odd: odd}, "python": odd, "gpus": [{"name": odd}]}
    run.write(record(tmp_path, provenance=provenance, summary=Summary(memory_kind=odd)))
    evaluated(run)
    scores = orjson.loads((run.path / "scores.json").read_bytes())
    scores["scores"] |= {"notes": [odd]}
    (run.path / "scores.json").write_bytes(orjson.dumps(scores | {"made": odd}))
    publish.publish(run)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card(run.output)[1])
    inline = [below for token in tokens for below in token.children or ()]
    links = [token.attrs["href"] for token in inline if token.type == "link_open"]
    assert links
    assert not [link for link in links if str(link).startswith("https://evil")]
    assert not [token.type for token in inline if token.type in ("html_inline", "image", "strong_open")]
    assert not [token for token in tokens if token.type == "html_block"]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 7]


def test_the_paper_is_a_link_and_a_batch_size_that_was_left_open_is_left_out(run: RunDir) -> None:
    evaluated(run, batch_size=None)
    text = model_card.card(run, run.read(), evaluations.of_run(run.path, run.read()), False, None)
    inline = [below for token in MarkdownIt().parse(text) for below in token.children or ()]
    assert "https://arxiv.org/abs/2411.10129" in [below.attrs["href"] for below in inline if below.type == "link_open"]
    assert "None" not in text and "rows at a time" not in text


@pytest.mark.parametrize(("why", "of_study"), [("profile rehearsal", True), ("variants/mine.yaml", False)])
def test_a_rehearsal_on_data_of_ones_own_is_not_of_the_study(
    run: RunDir, tmp_path: Path, why: str, of_study: bool
) -> None:
    path = {"key": "datasets.0.path", "recipe": "data/codereviewer/train.jsonl", "run": "mine.jsonl"}
    step = "differences" if of_study else "of_variant"
    run.write(record(tmp_path, rehearsal=True, **{step: [Difference(**path, why=why)]}))
    text = model_card.card(run, run.read(), None, False, None)
    assert ("The recipe is of the study" in text) == of_study


def test_a_rehearsal_is_marked_and_never_pushed(run: RunDir, tmp_path: Path) -> None:
    path = {"key": "datasets.0.path", "recipe": "data/codereviewer/train.jsonl", "run": "sample/train.jsonl"}
    run.write(record(tmp_path, rehearsal=True, differences=[Difference(**path, why="profile rehearsal")]))
    evaluated(run)
    publish.publish(run)
    front, text = card(run.output)
    assert "A sample that comes with the recipes." in text
    assert text.lstrip().startswith("> [!WARNING]\n> **A rehearsal with a stand-in model")
    assert "model-index" not in front
    assert "published" not in text
    assert "CC-BY" not in text
    with pytest.raises(UserError, match="rehearsal"):
        publish.publish(run, push="someone/model")


@pytest.mark.parametrize(
    ("state", "says"),
    [("interrupted", "`recipe resume"), ("failed", "`recipe resume"), ("running", "interrupted; `recipe resume")],
)
def test_only_a_finished_run_is_published(run: RunDir, tmp_path: Path, state: str, says: str) -> None:
    run.write(record(tmp_path, state=state))
    before = (run.output / "README.md").read_bytes()
    with pytest.raises(UserError, match=says):
        publish.publish(run)
    assert (run.output / "README.md").read_bytes() == before


def test_a_run_that_goes_on_is_waited_for(run: RunDir, tmp_path: Path) -> None:
    run.write(record(tmp_path, state="running"))
    with run.held(), pytest.raises(UserError, match="running"):
        publish.publish(run)


def test_a_run_without_its_adapter_is_not_published(run: RunDir) -> None:
    (run.output / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=f"`recipe run {RECIPE}`"):
        publish.publish(run)


@pytest.mark.parametrize("stale", [False, True])
def test_a_card_without_scores_of_this_adapter_says_so(
    run: RunDir, stale: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if stale:
        evaluated(run, adapter_sha256="0" * 64)
    publish.publish(run)
    front, text = card(run.output)
    assert "model-index" not in front
    assert "\nNot evaluated.\n" in text
    assert f"`recipe evaluate {run.path}`" in capsys.readouterr().err


def test_scores_of_other_rows_are_not_set_beside_the_published_without_a_word(run: RunDir) -> None:
    evaluated(run, limit=100, rows=100)
    publish.publish(run)
    assert (
        "The published scores are on Test Subset 1, 5,000 rows; those beside them are on other" in card(run.output)[1]
    )


def test_a_recipe_of_ones_own_has_a_card_without_a_study(run: RunDir, tmp_path: Path) -> None:
    run.write(record(tmp_path, recipe="mine", data=[]))
    own = {"base_model": "owner/model", "datasets": [{"path": "owner/data", "type": "chat_template"}]}
    run.config.write_text(yamlfiles.write_yaml(recipe_config(RECIPE) | own))
    (run.output / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/model"}))
    evaluated(run)
    publish.publish(run)
    front, text = card(run.output)
    assert front["base_model"] == "owner/model"
    assert front["datasets"] == ["owner/data"]
    assert "license" not in front
    assert "code-review" not in front["tags"]
    assert "[owner/model](https://huggingface.co/owner/model)" in text
    for absent in ("study", "2411.10129", "CC-BY", "published", "Below is an instruction"):
        assert absent not in text


def test_the_card_of_a_variant_on_other_data_claims_nothing_of_its_study(run: RunDir, tmp_path: Path) -> None:
    changed = Difference(
        key="datasets.0.path", recipe="data/codereviewer/train.jsonl", run="mine.jsonl", why="mine.yaml"
    )
    data = [DataFile(path="mine.jsonl", sha256="b" * 64, bytes=9, rows=40)]
    run.write(record(tmp_path, recipe="mine", variant_of=RECIPE, data=data, differences=[changed]))
    evaluated(run, test_set=None)
    publish.publish(run)
    front, text = card(run.output)
    assert "code-review" not in front["tags"]
    assert "It is on other data than the study's, whose results say nothing about it." in " ".join(text.split())
    assert "Data other than the study's." in text
    for absent in ("CC-BY", "published", "not the authors' own"):
        assert absent not in text


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("odd-1", {"license": "other", "license_name": "odd-1", "license_link": f"https://huggingface.co/{BASE}"}),
    ],
)
def test_a_licence_is_named_as_the_hub_knows_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, licence: str, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(models, "catalogue", lambda: {BASE: {"licence": licence, "title": "T"}})
    publish.publish(run)
    front, text = card(run.output)
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected
    assert "Built with" not in text


def test_a_mirror_has_the_licence_of_the_model_that_it_copies(run: RunDir, tmp_path: Path) -> None:
    (run.output / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "NousResearch/Meta-Llama-3-8B"})
    )
    run.write(record(tmp_path, mirror=True))
    publish.publish(run)
    front, text = card(run.output)
    assert (front["base_model"], front["license"]) == ("NousResearch/Meta-Llama-3-8B", "llama3")
    assert blocks(text)["sh"] == f"recipe run {RECIPE} --mirror\n"


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}  # by SHA-256, as LFS has it
        self.created: list[dict[str, Any]] = []
        self.refuses: int | None = None
        self.public = False
        self.lfs = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer({"id": "owner/model", "private": not self.server.public})

    def do_PUT(self) -> None:
        self.server.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if hub.refuses or self.headers["Authorization"] != "Bearer hf_right":
            self._answer({"error": "no"}, hub.refuses or 401)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer({"url": f"{hub.address}/owner/model"}, 409 if hub.public else 200)
        elif self.path == "/api/models/owner/model/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if hub.lfs and path.endswith(".safetensors") else "regular" for path in files}
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path == "/owner/model.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{hub.address}/stored/{one['oid']}"}} for one in objects]
            found = [one | {"actions": action} for one, action in zip(objects, actions, strict=True)]
            self._answer({"transfer": "basic", "objects": found})
        elif self.path == "/api/models/owner/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.stored[line["value"]["oid"]]
            self._answer({"commitUrl": f"{hub.address}/owner/model/commit/1", "commitOid": "1"})
        else:
            self._answer({})

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        return content

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, and a token for it."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield server
        close_session()
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the LFS upload of huggingface_hub
@pytest.mark.parametrize("lfs", [False, True])
def test_a_push_brings_the_adapter_its_tokenizer_and_its_card(
    run: RunDir, hub: Hub, lfs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.lfs = lfs
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", lfs)  # Xet has a server and a protocol of its own
    written = publish.publish(run, push="owner/model")
    assert written == [str(run.output / "README.md"), f"{hub.address}/owner/model"]
    wanted = TOKENIZER | {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files == {name: (run.output / name).read_bytes() for name in wanted}
    assert len(hub.stored) == lfs
    assert hub.created == [{"name": "model", "organization": "owner"}]
    assert 'PeftModel.from_pretrained(base, "owner/model")' in card(run.output)[1]


def test_a_push_of_a_merge_brings_the_merged_model(run: RunDir, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    merged = run.output / "merged"
    for name in ("config.json", "tokenizer.json", "LICENSE.txt", "README.md", "pytorch_model.bin", "x.log"):
        (merged / name).write_text(name)
    (merged / publish.MERGED_FROM).write_text(sha256(run.output / publish.ADAPTER))
    os.utime(run.output / publish.ADAPTER)  # a copy's time is no change
    written = publish.publish(run, merge=True, push="owner/model", private=True)
    assert "merged already" in capsys.readouterr().err
    assert written == [str(run.output / "README.md"), str(merged / "README.md"), f"{hub.address}/owner/model"]
    wanted = {"README.md", "config.json", "tokenizer.json", "LICENSE.txt", "model.safetensors"}
    assert hub.files == {name: (merged / name).read_bytes() for name in wanted}
    assert hub.created[0]["visibility"] == "private"
    front, text = card(merged)
    assert (front["base_model_relation"], front["library_name"]) == ("finetune", "transformers")
    assert front["license"] == "llama3"
    assert 'AutoModelForCausalLM.from_pretrained("owner/model"' in text
    assert "peft" not in text.lower().replace("peft 0", "")
    assert 'from_pretrained(base, ".")' in card(run.output)[1]


def test_what_is_to_be_private_is_not_pushed_to_a_public_repository(run: RunDir, hub: Hub) -> None:
    hub.public = True
    with pytest.raises(UserError, match="--private: owner/model"):
        publish.publish(run, push="owner/model", private=True)
    assert hub.files == {}
    with pytest.raises(UserError, match="--push"):
        publish.publish(run, private=True)


@pytest.mark.parametrize(("token", "refuses"), [(None, None), ("hf_wrong", None), ("hf_right", 403)])
def test_a_push_without_the_right_token_says_how_to_get_one(
    run: RunDir, hub: Hub, token: str | None, refuses: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = refuses
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        publish.publish(run, push="owner/model")
    assert hub.files == {}


@pytest.mark.parametrize(("offline", "says"), [(True, "HF_HUB_OFFLINE"), (False, "refused")])
def test_without_a_hub_the_card_is_there_and_the_push_can_be_repeated(
    run: RunDir, hub: Hub, offline: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WorkFailed, match=f"{says}.*\n.*README.md") as failed:
        publish.publish(run, push="owner/model")
    assert "Traceback" not in str(failed.value)
    assert card(run.output)[0]["base_model"] == BASE


@pytest.mark.parametrize("name", ["model", "", "owner/", "/model", "a/b/c", "owner/mo del", "owner/-x", "owner/a..b"])
def test_a_bad_name_of_a_repository_is_refused_before_anything_is_written(run: RunDir, name: str) -> None:
    before = (run.output / "README.md").read_bytes()
    with pytest.raises(UserError, match="--push"):
        publish.publish(run, push=name)
    assert (run.output / "README.md").read_bytes() == before


@pytest.mark.parametrize("name", ["/home/someone/model", "models/own"])
def test_an_adapter_for_a_folder_is_not_pushed(run: RunDir, tmp_path: Path, name: str) -> None:
    (tmp_path / "work" / "models" / "own").mkdir(parents=True)
    (run.output / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    with pytest.raises(UserError, match="--push"):
        publish.publish(run, push="owner/model")
    publish.publish(run)
    assert "base_model" not in card(run.output)[0]


def test_a_merge_that_fails_shows_the_end_of_its_log(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run.output / "merged")
    (tmp_path / "axolotl").write_text("#!/bin/sh\necho no such model\nexit 3\n")
    (tmp_path / "axolotl").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(WorkFailed, match=r"merge\.log"):
        publish.publish(run, merge=True)
    assert not (run.output / "merged").exists()
    assert not list(run.path.glob(".merge-*"))


@pytest.mark.long
@pytest.mark.parametrize("pad_token", ["</s>", "<|a token that the model lacks|>"])
def test_a_merge_by_axolotl_is_the_adapter_on_its_quantized_base(
    tmp_path: Path, tiny: Path, tiny_profile: Path, sample: Path, pad_token: str
) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunDir(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny, pad_token=pad_token)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    base.resize_token_embeddings(len(tokenizer))  # as Axolotl does
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    # weights that are not zero at the start, as lora_B otherwise is
    get_peft_model(base, LoraConfig(target_modules=layers, init_lora_weights=False)).save_pretrained(run.output)
    tokenizer.save_pretrained(run.output)
    cfg = config.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(tiny_profile))
    cfg = config.merge(cfg, {"bf16": False, "special_tokens": {"pad_token": pad_token}, "output_dir": "elsewhere"})
    run.config.write_text(yamlfiles.write_yaml(cfg))
    data = [DataFile(path=str(sample / "train.jsonl"), sha256=sha256(sample / "train.jsonl"), bytes=9)]
    run.write(record(tmp_path, recipe="haider2024/llama-2-7b", rehearsal=True, data=data, cwd=str(tmp_path)))
    assert publish.publish(run, merge=True) == [str(run.output / "README.md"), str(run.output / "merged" / "README.md")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # nothing was left in the folder of work

    ids = torch.arange(5, 50)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain.resize_token_embeddings(len(tokenizer))
    with torch.inference_mode():
        of_base = plain(ids).logits
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                codes, state = quantize_4bit(
                    module.weight.to(torch.bfloat16), compress_statistics=True, quant_type="nf4"
                )
                module.weight.copy_(dequantize_4bit(codes, state))
        expected = PeftModel.from_pretrained(plain, run.output).merge_and_unload()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.output / "merged", dtype=torch.float32)(ids).logits
    assert (merged - expected).abs().max() < 1e-2
    assert (expected - of_base).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(run.output / "merged").pad_token == pad_token

    # the cards' own instructions work, and prompt as the training did
    row = orjson.loads((sample / "train.jsonl").read_bytes().splitlines()[0])
    for folder in (run.output, run.output / "merged"):
        snippet = blocks(card(folder)[1])["python"].replace(f'"{tiny.name}"', repr(str(tiny)))
        scope: dict[str, Any] = {}
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, scope)
        assert printed.getvalue().strip()
        assert scope["inputs"]["input_ids"][0].tolist() == prompt(run, cfg, row | {"input": scope["input"]})

    # and so does an evaluation, with the adapter and without
    for adapter in (run.output, None):
        of_adapter = reference(run, cfg, adapter)
        answers = of_adapter.answers([[1, 50, 60], [1, 50, 60, 70, 80]], 0)  # the first one is padded
        assert answers == [of_adapter.answers([ids], 0)[0] for ids in ([1, 50, 60], [1, 50, 60, 70, 80])]
        assert of_adapter.model.get_input_embeddings().num_embeddings == len(tokenizer)


def settings(run: RunDir, cfg: yamlfiles.Config, **changes: Any) -> evaluations.EvaluationSettings:
    """Those of an evaluation of the run."""
    evaluated(run, base_model=cfg["base_model"])
    scores = evaluations.read_scores(run.path)
    assert scores
    return scores.settings.model_copy(update=changes)


def prompt(run: RunDir, cfg: yamlfiles.Config, row: dict[str, Any]) -> list[int]:
    """The tokens of a row's prompt as an evaluation of the run makes them."""
    from qlora_recipes.scores.prompter import Prompter

    return Prompter(settings(run, cfg), cfg, run.output).examples([row])[0].prompt


def reference(run: RunDir, cfg: yamlfiles.Config, adapter: Path | None) -> "Reference":
    """What an evaluation generates with."""
    from qlora_recipes.scores.engines.reference import Reference
    from qlora_recipes.scores.prompter import Prompter

    of_adapter = {"adapter": str(adapter), "adapter_sha256": "9" * 64 if adapter else None, "dtype": "float32"}
    return Reference(Prompter(settings(run, cfg, **of_adapter), cfg, run.output))


def test_the_code_of_a_card_decodes_as_the_run_was_evaluated() -> None:
    greedy = Decoding(max_new_tokens=9)
    sampled = Decoding(max_new_tokens=9, do_sample=True, temperature=0.1, top_k=40, top_p=0.95)
    assert model_card._arguments(greedy) == "max_new_tokens=9, do_sample=False"
    assert model_card._arguments(sampled) == "max_new_tokens=9, do_sample=True, temperature=0.1, top_p=0.95, top_k=40"
