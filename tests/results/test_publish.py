"""Cards of a faked finished run, pushes to a small hub of this machine's, and a real merge by Axolotl."""

import contextlib
import io
import json
import os
import platform
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import orjson
import pytest
import run_folders
import yaml
from conftest import recipe_config
from huggingface_hub.utils import filter_repo_objects
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.base.files import sha256
from qlora_recipes.config import merging
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.config.merging import Difference, Override, Source, parse_override
from qlora_recipes.config.numerics import quantized
from qlora_recipes.data.studies import Decoding
from qlora_recipes.evaluate import scores_file
from qlora_recipes.evaluate.prompter import Prompter
from qlora_recipes.results import card as model_card
from qlora_recipes.results import publish
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run import launch
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import FileState, Launch, Run, Summary

RECIPE = "haider2024/llama-3-8b"
BASE = "meta-llama/Meta-Llama-3-8B"
OF_THE_SAME = "Test Subset 1, 5,000 rows.\n"
PATH = {"key": "datasets.0.path", "recipe": "data/codereviewer/train.jsonl", "run": "mine.jsonl"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with what a training leaves, its weights a few numbers."""
    folder = RunDir(tmp_path / "work" / "runs" / "run")
    names = [*TOKENIZER, "config.json", "debug.log", "README.md", "training_args.bin", "merged/model.safetensors"]
    names += [f"checkpoint-9/{name}" for name in ("adapter_model.safetensors", "tokenizer.json", "optimizer.pt")]
    for file in names:
        (folder.output / file).parent.mkdir(parents=True, exist_ok=True)
        (folder.output / file).write_bytes(f"{file}'s content".encode() * 99)
    save_file({"lora_A": np.ones((8, 4), np.float32)}, folder.output / "adapter_model.safetensors")
    adapter_for(folder, BASE)
    ours = {
        "output_dir": str(folder.output),
        "dataset_prepared_path": "/home/someone/.cache/prepared",
        "plugins": ["qlora_recipes.plugin.RunPlugin"],
        "deepspeed": str(tmp_path / "elsewhere" / "zero2.json"),
        "use_wandb": True,
        "wandb_entity": "someone",
        "push_dataset_to_hub": "someone/rows",
        "hf_mlflow_log_artifacts": True,
    }
    folder.config_file.write_text(yamlfiles.write_yaml(recipe_config(RECIPE) | ours))
    folder.write(record(tmp_path))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """huggingface_hub's API; `files` are those of its last upload."""
    api = Mock(files={})

    def upload(repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        names = [str(file.relative_to(folder_path)) for file in folder_path.rglob("*") if file.is_file()]
        uploaded = filter_repo_objects(names, allow_patterns=allow_patterns)
        api.files = {name: (folder_path / name).read_bytes() for name in uploaded}

    api.create_repo.return_value = "https://hub/owner/model"
    api.repo_info.return_value.private = True
    api.upload_folder = upload
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return api


def adapter_for(run: RunDir, base: str) -> None:
    (run.output / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 32}))


def record(tmp_path: Path, **changes: Any) -> Run:
    fields = {
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
            "git": {"revision": "d" * 40, "dirty": True}, "lock_sha256": "e" * 64, "host": platform.node(),
            "packages": {"axolotl": "0.21.0", "deepspeed": None}, "python": "3.13.5", "gpus": [{"name": "NVIDIA T4"}],
        },
    }  # fmt: skip
    return Run(**fields | changes)


def evaluated(run: RunDir, **settings: Any) -> None:
    scores = {"rows": 5000, "bleu4": 5.12345, "rouge_l": 0.1, "bertscore_f1": None, "bertscore": None}
    scores |= {"intervals": {"bleu4": [4.9, 5.3]}, "sacrebleu": 1.5, "sacrebleu_signature": "nrefs:1|case:mixed"}
    default = {
        "base_model": BASE,
        "adapter": str(run.output),
        "adapter_sha256": sha256(run.output / publish.ADAPTER),
        "data": str(run.path.parents[1] / "data" / "codereviewer" / "test-subset-1.jsonl"),
        "data_sha256": "9" * 64,
        "decoding": Decoding(max_new_tokens=96),
        "batch_size": 16,
    }
    run_folders.evaluated(run, scores, **default | settings)


def published(run: RunDir, **options: Any) -> tuple[dict[str, Any], str]:
    publish.publish(run, **options)
    return card(run.output)


def card(folder: Path) -> tuple[dict[str, Any], str]:
    match = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.DOTALL)
    assert match
    return yaml.safe_load(match[1]), match[2]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, as text."""
    cells: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            cells.append([])
        elif token.type == "tr_open":
            cells[-1].append([])
        elif token.type == "inline" and token.level >= 4:
            cells[-1][-1].append("".join(child.content for child in token.children or []))
    return cells


def links(text: str) -> list[str]:
    inline = [below for token in MarkdownIt("commonmark").parse(text) for below in token.children or ()]
    return [str(token.attrs["href"]) for token in inline if token.type == "link_open"]


def blocks(text: str) -> dict[str, str]:
    """The last block of code of each language."""
    return {token.info: token.content for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"}


def test_the_card_says_how_the_model_was_made(run, capsys):
    evaluated(run)
    assert publish.publish(run) == [str(run.output / "README.md")]
    assert capsys.readouterr().err == f"writing {run.output}/README.md\n"
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
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"bleu": 5.1235, "rouge": 0.1, "sacrebleu": 1.5}

    data, training, scores, provenance = tables(text)
    assert data[1] == ["data/codereviewer/train.jsonl", "117,739", "b" * 64]
    values = {value for _, value in training}
    assert values >= {"2.50, 1.25", "13.20 GiB (GPU, reserved)", "2.00", "1 x NVIDIA T4"}
    on = "CodeReviewer, comment generation, Test Subset 1, 5,000 rows"
    assert scores[1] == ["bleu4", "5.12", "4.90 to 5.30", on, "5.27"]
    assert ["sacrebleu", "1.50", "–", on, "–"] in scores
    words = {word for _, value in provenance for word in value.split()}
    assert words >= {"d" * 40, "uncommitted", sha256(run.config_file)}
    assert ["packages", "axolotl 0.21.0, Python 3.13.5"] in provenance

    assert blocks(text)["sh"] == f"recipe run {RECIPE}\n"
    shown = yaml.safe_load(blocks(text)["yaml"])
    assert shown.pop("deepspeed") == "zero2.json"
    assert shown == {key: value for key, value in recipe_config(RECIPE).items() if key != "output_dir"}
    parts = [OF_THE_SAME, "CC-BY-4.0", "`data/codereviewer/test-subset-1.jsonl`", "9" * 64, '"max_new_tokens": 96']
    parts += ["`nrefs:1|case:mixed`", "**Built with Meta Llama 3**"]
    parts.append(f'revision="{recipe_config(RECIPE)["revision_of_model"]}"')
    assert [part for part in parts if part not in text] == []
    assert "https://arxiv.org/abs/2411.10129" in links(text)
    assert "ehearsal" not in text


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, ["4 bits", "='nf4'", "_use_double_quant=True"], []),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, ["='fp4'", "_use_double_quant=True"], ["nf4"]),
        ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True, "bnb_config_kwargs": {}},
         ["8-bit", "8 bits", "load_in_8bit=True)"], ["4 bits", "nf4"]),
        ({"adapter": "lora", "load_in_4bit": False}, [], ["4-bit", " bits", "nf4", "quantization_config"]),
    ],
)  # fmt: skip
def test_a_card_tells_quantization_and_decoding(run, settings, said, unsaid):
    cfg = yamlfiles.read_yaml(run.config_file) | settings
    run.config_file.write_text(yamlfiles.write_yaml(cfg))
    (run.output / "merged" / publish.MADE_FROM).write_text(sha256(run.output / publish.ADAPTER))
    evaluated(run, quantized=quantized(cfg), decoding=run_folders.STUDY.decoding)
    texts = published(run, merge=True)[1], card(run.output / "merged")[1]
    text = "".join(text.partition("## Provenance")[0] for text in texts)
    assert [word for word in said if word not in text] == []
    assert [word for word in (*unsaid, "other settings") if word in text] == []
    evaluated(run, decoding=Decoding(max_new_tokens=8))
    assert "other settings" in published(run)[1]


SECRETS = {
    "model_kwargs": {"token": "planted"},
    "optim_args": "betas=1,token=planted",
    "comet_experiment_config": {"COMET_API_KEY": "planted"},
    "lora_qkv_name": "hf_planted" + "1A" * 9,
    "lora_uri": "https://user:planted/word@example.org",
    "trl": {"beta": 0.1, "vllm_server_host": "planted.example"},
    "vllm": {"host": "10.0.0.1.planted"},
    "hatchery": {"base_url": "https://planted.example"},
    "dynamic_checkpoint": {"enabled": True, "trigger_file_path": "planted.txt"},
}


def test_a_card_names_nothing_of_the_machine_and_no_secret(run, tmp_path):
    run.config_file.write_text(yamlfiles.write_yaml(yamlfiles.read_yaml(run.config_file) | SECRETS))
    absolute = str(tmp_path / "my data" / "train.jsonl")
    changes = SECRETS | {"datasets.0.path": absolute, "deepspeed": "../someone/zero.json", "wandb_entity": "someone"}
    changes |= {"push_dataset_to_hub": "someone/rows", "otel_metrics_host": "someone.example"}
    overrides = [Override(key, value) for key, value in changes.items()]
    planted = [Difference(key=o.key, run=o.value, source=o.source) for o in overrides if o.key in SECRETS]
    run.write(
        record(
            tmp_path,
            recipe="mine",
            profiles=[str(tmp_path / "work" / "profiles" / "p.yaml"), "/home/someone/q.yaml"],
            overrides=overrides,
            differences=[
                Difference(
                    key="datasets.0.path", recipe="a", run=absolute, source=Source("profile", "/home/someone/q.yaml")
                ),
                Difference(key="special_tokens", run={"pad_token": "</s>"}, source=Source("gpus", "--gpus 2", "a/b")),
                Difference(key="wandb_entity", run="someone", source=Source("override", "wandb_entity", "someone")),
                *planted,
            ],
            data=[DataFile(path=absolute, sha256="b" * 64, bytes=9)],
        )
    )
    evaluated(run, data=absolute, test_set=None, limit=12)
    front, text = published(run)
    content = f"{front}{text}"
    for private in (str(tmp_path), "/home", "someone", str(Path.home()), f"`{platform.node()}`", ".cache", "planted"):
        assert private not in content
    words = shlex.split(blocks(text)["sh"])
    assert words[2:7] == ["mine.yaml", "--profile", "profiles/p.yaml", "--profile", "q.yaml"]
    differences, data = tables(text)[:2]
    assert differences[1:3] == [
        ["datasets.0.path", "a", "train.jsonl", "profile q.yaml"],
        ["special_tokens", "–", '{"pad_token": "</s>"}', "--gpus 2: a/b"],
    ]
    assert data[1][0] == "train.jsonl"
    assert front["model-index"][0]["results"][0]["dataset"]["name"].startswith("train.jsonl, ")


def test_text_of_a_run_neither_breaks_its_card_nor_is_markdown_or_html(run, tmp_path):
    odd = "a|b `c` ``d``\n| --- |\n```\n---\n<b>\\ x](https://evil.example) <img src=//evil.example/a> **b**"
    odd += " ![c](https://evil.example/d)\n# e"
    run.write(
        record(
            tmp_path,
            recipe="x: |y|\n---\n# z",
            overrides=[Override("chat_template", odd)],
            differences=[Difference(key="k|k", recipe="`", run=odd, source=Source("recipe", "|"))],
            data=[DataFile(path="a|b `c`\n---\n<b>", sha256="b" * 64, bytes=9)],
            provenance={"packages": {odd: odd}, "python": odd, "gpus": [{"name": odd}]},
            summary=Summary(memory_kind=odd),
        )
    )
    run.config_file.write_text(yamlfiles.write_yaml(recipe_config(RECIPE) | {"chat_template": odd, "base_model": BASE}))
    adapter_for(run, odd)
    evaluated(run, test_set=None, data="|`.jsonl", batch_size=None)
    _, text = published(run)
    differences, data = tables(text)[:2]
    assert differences[1:] == [["k|k", "`", " ".join(odd.split()), "|"]]
    assert data[1:] == [["a|b `c` --- <b>", "–", "b" * 64]]
    assert yaml.safe_load(blocks(text)["yaml"])["chat_template"] == odd
    assert parse_override(shlex.split(blocks(text)["sh"])[-1]).value == odd
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    types = {token.type for token in tokens} | {below.type for token in tokens for below in token.children or ()}
    assert not types & {"html_block", "html_inline", "image", "strong_open"}
    assert links(text) and not [link for link in links(text) if link.startswith("https://evil")]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 7]


@pytest.mark.parametrize(
    "text",
    [
        *("# a", "## a #", "1. a", "12) a", "1.", "- a", "+ a", "* a", "---", "===", "> a", "~~~", "```", "|a|"),
        *("<!-- a -->", "&lt;b&gt;", "<https://evil.example>", "[a]: https://evil.example", "{{ 7 * 7 }}", "2.14 -1"),
    ],
)
def test_prose_is_a_paragraph_of_the_same_text(text):
    for line, depth in ((model_card._prose(text), 0), (f"- {model_card._prose(text)}", 2)):
        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(line)
        (inline,) = (token for token in tokens if token.type == "inline")
        assert inline.level == depth + 1
        assert "".join(below.content for below in inline.children) == text


MINE = {"recipe": "mine", "data": [DataFile(path="mine.jsonl", sha256="b" * 64, bytes=9, rows=40)]}
VARIANT = {"variant_of": RECIPE, "of_variant": [Difference(**PATH, source=Source("recipe", "variants/mine.yaml"))]}
OWN = {"base_model": "owner/model", "datasets": [{"path": "owner/data", "type": "chat_template"}]}
QWEN = "Qwen/Qwen2.5-3B"  # whose licence the hub does not know
MIRROR = "NousResearch/Meta-Llama-3-8B"


@pytest.mark.parametrize(
    ("changes", "settings", "base", "front", "said", "unsaid"),
    [
        (
            {"rehearsal": True, "differences": [Difference(**PATH, source=Source("profile", "rehearsal"))]}, {}, BASE,
            {"model-index": None}, ["[!WARNING]", "2411.10129"], ["published", "CC-BY"],
        ),
        (
            {"recipe": "mine", "data": []}, OWN, "owner/model",
            {"base_model": "owner/model", "datasets": ["owner/data"], "license": None},
            ["https://huggingface.co/owner/model"],
            ["study", "2411.10129", "CC-BY", "published", "Below is an instruction", "code-review"],
        ),
        (MINE | VARIANT, {}, BASE, {}, ["mine.jsonl", "other data"], ["CC-BY", "published", "code-review"]),
        (
            {"recipe": "mine", "data": []}, OWN | {"base_model": QWEN}, QWEN,
            {"license": "other", "license_name": "qwen-research", "license_link": f"https://huggingface.co/{QWEN}"},
            [], ["Built with"],
        ),
        (
            {"profiles": ["mirror"]}, {}, MIRROR,
            {"base_model": MIRROR, "license": "llama3"}, [f"recipe run {RECIPE} --profile mirror\n"], [],
        ),
    ],
)  # fmt: skip
def test_a_card_claims_no_more_than_the_run_was(run, tmp_path, changes, settings, base, front, said, unsaid):
    run.write(record(tmp_path, **changes))
    run.config_file.write_text(yamlfiles.write_yaml(recipe_config(RECIPE) | settings))
    adapter_for(run, base)
    evaluated(run, test_set=None)
    metadata, text = published(run)
    assert {key: metadata.get(key) for key in front} == front
    assert [word for word in said if word not in text] == []
    assert [word for word in unsaid if word in text or word in metadata["tags"]] == []


def test_a_card_does_not_count_test_rows_as_the_rows_of_a_benchmark(run, tmp_path):
    recipe = "qlora-guanaco/llama-7b"
    run.write(record(tmp_path, recipe=recipe))
    run.config_file.write_text(yamlfiles.write_yaml(recipe_config(recipe)))
    adapter_for(run, "huggyllama/llama-7b")
    evaluated(run, test_set="test")
    assert "\nThe published scores are on the benchmark's own rows" in published(run)[1]
    assert "1,024" not in published(run)[1]


PUSH = {"push": "owner/model"}
REFUSALS = [
    ({"state": "failed"}, {}, "{run}: the run is failed; wait until it ends, or run `recipe resume {run}`"),
    ({"published_adapter": "x"}, {}, "{run}: the adapter x was not trained here; publish another run"),
    ({}, {"push": "model"}, "--push model: expected OWNER/NAME, of letters, digits, -, _ and ."),
    ({}, {"push": "a/b/c"}, "--push a/b/c: expected OWNER/NAME, of letters, digits, -, _ and ."),
    ({}, {"push": "a/b c"}, "--push a/b c: expected OWNER/NAME, of letters, digits, -, _ and ."),
    ({"rehearsal": True}, PUSH, "--push: {run} is a rehearsal with a small model; push a real run"),
]


@pytest.mark.parametrize(("changes", "options", "message"), REFUSALS)
def test_publish_refuses_before_it_writes(run, tmp_path, hub, changes, options, message):
    before = (run.output / "README.md").read_bytes()
    run.write(record(tmp_path, **changes))
    with pytest.raises(UserError) as raised:
        publish.publish(run, **options)
    assert str(raised.value) == message.format(run=run.path)
    assert (run.output / "README.md").read_bytes() == before
    assert hub.files == {}


def test_a_run_without_its_adapter_is_not_published(run):
    adapter = run.output / publish.ADAPTER
    adapter.unlink()
    with pytest.raises(UserError) as raised:
        publish.publish(run)
    assert str(raised.value) == f"{adapter}: damaged or missing; restore a copy, or train again: `recipe run {RECIPE}`"


@pytest.mark.long
def test_a_merge_that_loses_trained_modules_fails(tmp_path, tiny, tiny_profile):
    """A rehearsal; Axolotl merges no LoRA on the embedding."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunDir(tmp_path / "run")
    lora = {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False}
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(**lora)).save_pretrained(run.output)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(run.output)
    cfg = merging.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(tiny_profile))
    cfg = merging.merge(cfg, {"bf16": False, "output_dir": "elsewhere", "lora_target_modules": lora["target_modules"]})
    run.config_file.write_text(yamlfiles.write_yaml(cfg))
    run.write(record(tmp_path, recipe="haider2024/llama-2-7b", rehearsal=True, cwd=str(tmp_path)))
    with pytest.raises(WorkFailed, match="Axolotl's merge of this adapter is wrong: its logits differ by"):
        publish.publish(run, merge=True)
    assert not (run.output / "merged").exists()


def test_an_adapter_for_a_folder_is_not_pushed(run, tmp_path):
    (tmp_path / "work" / "models" / "own").mkdir(parents=True)
    adapter_for(run, "models/own")
    with pytest.raises(UserError) as raised:
        publish.publish(run, **PUSH)
    assert str(raised.value) == (
        "--push: the base model models/own is a local folder, which others cannot load; train with base_model set to "
        "its name on the hub"
    )
    assert "base_model" not in published(run)[0]


def test_a_card_tells_the_rows_of_a_file_from_those_trained_on_and_the_scored_ones_from_all(run, tmp_path):
    run.write(record(tmp_path, summary=Summary(step=2, max_steps=2, training_rows=64)))
    evaluated(run, rows=100, total_rows=22_000, limit=100)
    front, text = published(run)
    data, training = tables(text)[:2]
    assert data[0][1] == "rows in the file"
    assert data[1][1] == "117,739"
    assert ["rows trained on", "64"] in training
    assert "Test Subset 1, 100 of 22,000 rows" in text
    assert front["model-index"][0]["results"][0]["dataset"]["name"].endswith(", 100 of 22,000 rows")


@pytest.mark.parametrize(("adapter", "problem"), [(None, "not evaluated"), ("0" * 64, "stale")])
def test_a_card_without_current_scores_says_so(run, adapter, problem, capsys):
    if adapter:
        run.write(run.read().model_copy(update={"adapter": FileState.of(run.output / publish.ADAPTER)}))
        evaluated(run, adapter_sha256=adapter)
    front, text = published(run)
    assert capsys.readouterr().err == (
        f"{run.path}: {problem}; for scores, run `recipe evaluate {run.path}` and repeat this command\n"
        f"writing {run.output}/README.md\n"
    )
    assert "model-index" not in front
    assert [table[0][0] for table in tables(text)] == ["training or validation file", "", ""]


def test_a_card_sets_scores_of_some_rows_beside_those_of_the_base_model_on_the_same_rows(run):
    evaluated(run, limit=100, rows=100)
    without_adapter = {"rows": 100, "adapter": "none", "adapter_sha256": None}
    evaluation = scores_file.read_scores(run.path)
    of_base = RunDir(evaluation.settings.model_copy(update=without_adapter).folder(run.path))
    shutil.copytree(run.path, of_base.path, ignore=lambda *_: ["evaluations"])
    evaluated(of_base, limit=10, **without_adapter)  # of fewer rows of a benchmark
    assert RunResult(run, run.read()).base_evaluation is None
    evaluated(of_base, limit=100, **without_adapter)
    text = published(run)[1]
    assert "Test Subset 1, 5,000 rows; this run's scores are on other rows." in text
    scores = {row[0]: row[4:] for table in tables(text) for row in table}
    assert scores["score"] == ["base model", "published"]
    assert scores["bleu4"] == ["5.12", "5.27"]


def test_a_push_lists_and_brings_the_adapter_its_tokenizer_and_its_card(run, hub, capsys):
    (run.output / "tokenizer_notes").mkdir()
    (run.output / "tokenizer_notes" / "credentials").touch()
    written = publish.publish(run, push="owner/model")
    assert written == [str(run.output / "README.md"), "https://hub/owner/model"]
    wanted = TOKENIZER | {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files == {name: (run.output / name).read_bytes() for name in wanted}
    listed = "README.md, adapter_config.json, adapter_model.safetensors, chat_template.jinja, special_tokens_map.json"
    listed += ", tokenizer.json, tokenizer_config.json"
    assert f"upload: {listed}" in capsys.readouterr().err.splitlines()
    hub.create_repo.assert_called_once_with("owner/model", private=None, exist_ok=True)
    assert 'PeftModel.from_pretrained(base, "owner/model")' in card(run.output)[1]


def test_a_push_brings_a_record_of_the_scores(run, hub):
    evaluated(run)
    (record,) = publish.publish(run, push="owner/model")[1:-1]
    assert Path(record).parent == run.output / "data" / "qlora-recipes" / "owner" / "model"
    content = hub.files[str(Path(record).relative_to(run.output))]
    assert orjson.loads(content)["model_info"]["id"] == "owner/model"


@pytest.mark.parametrize("options", [{"push": "owner/model"}, {"merge": True}], ids=str)
def test_a_link_is_not_published(run, hub, fake_axolotl, monkeypatch, options):
    monkeypatch.setattr(launch, "AXOLOTL", fake_axolotl.with_name("axolotl"))
    shutil.rmtree(run.output / "merged")
    (run.output / "tokenizer.json").rename(run.path / "credentials")
    (run.output / "tokenizer.json").symlink_to(run.path / "credentials")
    with pytest.raises(UserError) as refused:
        publish.publish(run, **options)
    assert str(refused.value) == (
        f"{run.output}/tokenizer.json: is a link; its target would be published; put a copy there"
    )
    assert hub.files == {} and not (run.output / "merged").exists()


def test_a_push_takes_no_name_for_a_pattern(run, hub):
    merged = run.output / "merged"
    (merged / "LICENSES").mkdir(parents=True)
    (merged / "LICENSES" / "credentials").touch()
    for name in ("config.json", "model.safetensors", "LICENSE*"):
        (merged / name).touch()
    publish._push(merged, ["LICENSES/a"], "owner/model", private=False, recipe="r")
    assert set(hub.files) == {"config.json", "model.safetensors", "LICENSE*"}


def test_a_push_of_a_merge_brings_the_merged_model(run, hub, capsys):
    merged = run.output / "merged"
    for name in ("config.json", "LICENSE.txt", "README.md", "pytorch_model.bin", "x.log"):
        (merged / name).write_text(name)
    (merged / publish.MADE_FROM).write_text(sha256(run.output / publish.ADAPTER))
    os.utime(run.output / publish.ADAPTER)  # a copy's time is no change
    written = publish.publish(run, merge=True, push="owner/model", private=True)
    assert f"{merged}: already made" in capsys.readouterr().err.splitlines()
    assert written == [str(run.output / "README.md"), str(merged / "README.md"), "https://hub/owner/model"]
    wanted = {"README.md", "config.json", "LICENSE.txt", "model.safetensors"}
    assert hub.files == {name: (merged / name).read_bytes() for name in wanted}
    hub.create_repo.assert_called_once_with("owner/model", private=True, exist_ok=True)
    front, text = card(merged)
    assert front["base_model_relation"] == "finetune"
    assert front["library_name"] == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("owner/model"' in text
    assert "peft" not in text.lower().replace("peft 0", "")


def test_a_private_model_is_not_pushed_to_a_public_repository(run, hub):
    hub.repo_info.return_value.private = False
    with pytest.raises(UserError) as raised:
        publish.publish(run, push="owner/model", private=True)
    assert str(raised.value) == "--private: owner/model exists and is public; make it private on the hub first"
    assert hub.files == {}


NO_ACCESS = "--push: no write access to owner/model; give a token with access by `hf auth login` or HF_TOKEN"
NOT_PUSHED = "owner/model: not uploaded: refused; repeat the command"


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, UserError, NO_ACCESS), (403, UserError, NO_ACCESS), (None, WorkFailed, NOT_PUSHED)],
)
def test_a_push_that_fails_leaves_the_card(run, hub, status, error, message):
    refusal = ConnectionError("refused")
    refusal.response = SimpleNamespace(status_code=status)
    hub.create_repo.side_effect = refusal
    with pytest.raises(error) as raised:
        publish.publish(run, push="owner/model")
    assert str(raised.value) == message
    assert hub.files == {}
    assert card(run.output)[0]["base_model"] == BASE


def test_a_merge_that_fails_shows_the_end_of_its_log(run, tmp_path, monkeypatch):
    shutil.rmtree(run.output / "merged")
    (tmp_path / "axolotl").write_text("#!/bin/sh\necho no such model\nexit 3\n")
    (tmp_path / "axolotl").chmod(0o755)
    monkeypatch.setattr(launch, "AXOLOTL", tmp_path / "axolotl")
    with pytest.raises(WorkFailed) as raised:
        publish.publish(run, merge=True)
    assert str(raised.value) == (
        f"no such model\n{run.path}: Axolotl could not merge; complete log: {run.path / 'merge.log'}"
    )
    assert not (run.output / "merged").exists()


@pytest.mark.long
@pytest.mark.parametrize("pad_token", ["</s>", "<|a token that the model lacks|>"])
def test_a_merge_by_axolotl_is_the_adapter_on_its_quantized_base(tmp_path, tiny, tiny_profile, sample, pad_token):
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_recipes.evaluate.transformers_engine import TransformersEngine

    run = RunDir(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny, pad_token=pad_token)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    base.resize_token_embeddings(len(tokenizer))  # as Axolotl does
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    # weights that are not zero at the start, as lora_B otherwise is
    get_peft_model(base, LoraConfig(target_modules=layers, init_lora_weights=False)).save_pretrained(run.output)
    tokenizer.save_pretrained(run.output)
    cfg = merging.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(tiny_profile))
    cfg = merging.merge(cfg, {"bf16": False, "special_tokens": {"pad_token": pad_token}, "output_dir": "elsewhere"})
    run.config_file.write_text(yamlfiles.write_yaml(cfg))
    data = [DataFile(path=str(sample / "train.jsonl"), sha256=sha256(sample / "train.jsonl"), bytes=9)]
    run.write(record(tmp_path, recipe="haider2024/llama-2-7b", rehearsal=True, data=data, cwd=str(tmp_path)))
    assert publish.publish(run, merge=True) == [str(run.output / "README.md"), str(run.output / "merged" / "README.md")]
    left = {path.name for path in (run.output / "merged").iterdir()}
    assert left & {"merged", "debug.log"} == set()

    ids = torch.arange(5, 50)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain.resize_token_embeddings(len(tokenizer))
    with torch.inference_mode():
        of_base = plain(ids).logits
        for name, module in plain.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                codes = quantize_4bit(module.weight.to(torch.bfloat16), compress_statistics=True, quant_type="nf4")
                module.weight.copy_(dequantize_4bit(*codes))
        expected = PeftModel.from_pretrained(plain, run.output).merge_and_unload()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.output / "merged", dtype=torch.float32)(ids).logits
    assert (merged - expected).abs().max() < 1e-2
    assert (expected - of_base).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(run.output / "merged").pad_token == pad_token

    # the cards' own instructions work, and prompt as the training did
    evaluated(run, base_model=cfg["base_model"])
    prompter = Prompter(scores_file.read_scores(run.path).settings, cfg, run.output)
    adapter = {"adapter": str(run.output), "adapter_sha256": "x", "quantized": True}
    reference = TransformersEngine(Prompter(prompter.settings.model_copy(update=adapter), cfg, run.output))
    reference.merge()
    written = load_file(run.output / "merged" / "model.safetensors")
    differing = [
        name for name, weight in reference.model.state_dict().items() if not torch.equal(weight, written[name])
    ]
    assert differing == []
    row = orjson.loads((sample / "train.jsonl").read_bytes().splitlines()[0])
    for folder in (run.output, run.output / "merged"):
        snippet = blocks(card(folder)[1])["python"].replace(f'"{tiny.name}"', repr(str(tiny)))
        scope: dict[str, Any] = {}
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, scope)
        assert printed.getvalue().strip()
        (example,) = prompter.examples(run_folders.rows_for(prompter, [row | {"input": model_card._PATCH}]))
        assert scope["inputs"]["input_ids"][0].tolist() == example.prompt


def test_the_code_of_a_card_decodes_as_the_run_was_evaluated():
    greedy = Decoding(max_new_tokens=9)
    sampled = Decoding(max_new_tokens=9, do_sample=True, temperature=0.1, top_k=40, top_p=0.95)
    assert model_card._arguments(greedy) == "max_new_tokens=9, do_sample=False"
    assert model_card._arguments(sampled) == "max_new_tokens=9, do_sample=True, temperature=0.1, top_p=0.95, top_k=40"


def test_the_card_lists_gguf_files(run):
    evaluated(run)
    run_folders.a_gguf_file(run, 4.5)
    text = published(run)[1]
    row = next(line for line in text.splitlines() if "m-q4_k_m.gguf" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][:2] == [
        "`m-q4_k_m.gguf (Q4_K - Medium, 4.9 bits)`",
        "5000",
    ]
    assert "| 0.772 → 0.773 → 0.821 | 0.056 |" in row
