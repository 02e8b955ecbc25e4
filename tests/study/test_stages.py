"""Stages of a reproduction before the training: published predictions are scored, published adapters evaluated."""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import published_study
import pytest
from conftest import SAMPLE, SHARED, Recipe
from file_server import Server, serving
from published_study import ADAPTER, BASELINE, FILES, GOLD, PREDICTED, RECIPE, SUBSET, TEST
from safetensors.numpy import save_file

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.data import studies
from qlora_recipes.evaluate.scores_file import read_predictions
from qlora_recipes.metrics.text import bleu4
from qlora_recipes.results import score_records
from qlora_recipes.run import rundir

SMALLER = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
"""The sizes of a model that no adapter of the tiny one fits."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(monkeypatch) as orders:
        orders.content, orders.files = None, dict(FILES)
        yield orders
    studies._load.cache_clear()


def url_of(server: Server) -> str:
    return server.url.rpartition("/")[0]


def scored(recipe: Recipe, *words: str, code: int = 0) -> Any:
    return recipe.json("reproduce", "reviews", "--stage", "predictions", *words, code=code)


def row_of(printed: Any, name: str = RECIPE) -> dict[str, Any]:
    """The BLEU-4 of a recipe's or baseline's predictions."""
    (row,) = [row for row in printed["scores"] if row["name"] == name and row["metric"] == "bleu4"]
    assert row["test_set"] == "some"
    return row


def mean(predictions: list[str], references: list[str]) -> float:
    scores = [bleu4(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return sum(scores) / len(scores)


def test_published_predictions_are_fetched_and_scored_beside_the_published_score(recipe, server, tmp_path):
    ours = mean(PREDICTED, GOLD)
    published_study.write(tmp_path, url_of(server), {"bleu4": round(ours, 2), "eval_loss": 1.0})
    printed = scored(recipe)
    assert row_of(printed) == {
        "name": RECIPE,
        "test_set": "some",
        "rows": 4,
        "metric": "bleu4",
        "score": pytest.approx(ours),
        "low": None,
        "high": None,
        "published": round(ours, 2),
        "difference": pytest.approx(ours - round(ours, 2)),
        "agrees": True,
        "verified": True,
    }
    baseline = row_of(printed, BASELINE)  # its predictions are of the whole test set
    assert baseline["rows"] == len(SUBSET)
    step = mean([TEST[i] if i % 2 else "no" for i in SUBSET], GOLD) - 4.0
    assert baseline["difference"] == pytest.approx(step)
    assert baseline["agrees"] is False
    assert {row["name"] for row in printed["scores"]} == {RECIPE, BASELINE}
    assert printed["problems"] == {}
    assert rundir.all_runs(tmp_path / "runs") == []


def test_published_predictions_are_recorded(recipe, server, place):
    published_study.write(place, url_of(server), {"bleu4": 1.0})
    refused = recipe.fails("results", "--export", "reviews").stderr.strip()
    remedy = "`recipe reproduce reviews --stage predictions` fetches and scores them"
    assert refused == f"recipe: --export reviews: its published predictions are not on this machine; {remedy}"
    scored(recipe)
    done = recipe.ok("results", "--export", "reviews")
    results = place / "recipes" / "reviews" / "results"
    results.mkdir()
    for name in done.stdout.split():
        (place / name).rename(results / name)
    study = studies.find("reviews")
    records = score_records.records(study)
    assert {record.name: record.rows for record in records} == {RECIPE: 4, BASELINE: 4}
    recipes, _, baseline = score_records.statuses(study, records)
    assert recipes.status == "scored from the authors' predictions"
    assert baseline.status == "scored from the authors' predictions"


def test_files_without_a_checksum_are_marked(recipe, server, tmp_path):
    published_study.write(tmp_path, url_of(server), pred__txt={"sha256": None})
    assert row_of(scored(recipe))["verified"] is False


def test_a_file_that_cannot_be_fetched_stops_no_other(recipe, server, tmp_path):
    published_study.write(tmp_path, url_of(server))
    del server.files["pred.txt"]
    printed = scored(recipe, code=1)
    assert list(printed["problems"]) == [RECIPE]
    assert {row["name"] for row in printed["scores"]} == {BASELINE}
    assert not (tmp_path / "data" / "reviews-raw" / "pred.txt").exists()
    server.files = dict(FILES)
    assert scored(recipe)["problems"] == {}


@pytest.mark.parametrize(
    ("file", "content", "name", "problem"),
    [
        pytest.param(
            "pred.txt",
            published_study.lines(PREDICTED[:3]),
            RECIPE,
            ": 3 predictions for 4 references; the two numbers must be equal",
            id="too few",
        ),
        pytest.param(
            "whole.jsonl",
            FILES["whole.jsonl"].splitlines()[0],
            BASELINE,
            f": 1 predictions, but the complete test set of the study has {len(TEST)} rows",
            id="other rows",
        ),
        pytest.param(
            "whole.jsonl",
            b'{"target": "a", "model": {}}\n' * len(TEST),
            BASELINE,
            ": row 1 has no text field model.output; correct the field in study.yaml",
            id="no field",
        ),
        pytest.param("whole.jsonl", b"{\n", BASELINE, ":1: not JSON: unexpected end of data", id="not JSON"),
        pytest.param("pred.txt", b"\xff\n" * 4, RECIPE, ": not UTF-8 text", id="not UTF-8"),
    ],
)
def test_files_without_the_predictions_are_refused(recipe, server, tmp_path, file, content, name, problem):
    server.files[file] = content
    declared = {"sha256": published_study.digest(content), "bytes": len(content)}
    published_study.write(tmp_path, url_of(server), **{file.replace(".", "__"): declared})
    assert scored(recipe, code=1)["problems"] == {name: f"data/reviews-raw/{file}{problem}"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["reviews", "--rehearse"],
            "--rehearse: works only with a later stage than --stage predictions",
            id="rehearsal",
        ),
        pytest.param(
            ["reviews", "--only", "other"],
            f"--stage predictions: reviews's study.yaml declares none for these recipes, but for {RECIPE}",
            id="recipe without predictions",
        ),
        pytest.param(
            ["reviews", "--only", "nothing"],
            f"--only nothing: no recipe of the study of that name; there are {RECIPE}, reviews/other",
            id="unknown recipe",
        ),
        pytest.param(
            ["peft-metamathqa"],
            "--stage predictions: peft-metamathqa's study.yaml declares none for these recipes, but for no recipe",
            id="study without predictions",
        ),
    ],
)
def test_a_wrong_request_fetches_nothing(recipe, server, tmp_path, words, message):
    published_study.write(tmp_path, url_of(server))
    done = recipe.fails("reproduce", *words, "--stage", "predictions")
    assert done.stderr == f"recipe: {message}\n"
    assert server.paths == []


@pytest.mark.skipif(not (SHARED / "haider2024").is_dir(), reason="the authors' files are not part of the project")
def test_the_first_studys_predictions(recipe, server, tmp_path):
    """The real files behind a server in place of the internet: Table II's score of Llama 3, and not its baseline's."""
    content = yamlfiles.read_yaml(studies.find("haider2024").folder / "study.yaml")
    server.files = {}
    for file in ("msg-5000-pred.txt", "msg-5000-gold.txt"):
        server.files[file] = (SHARED / "haider2024" / file).read_bytes()
        content["data"]["sources"][file]["url"] = f"{url_of(server)}/{file}"
    server.files["base.jsonl"] = (SHARED / "codereviewer-test-predictions.jsonl").read_bytes()
    content["data"]["sources"]["base.jsonl"] = {"url": f"{url_of(server)}/base.jsonl"}
    content["published"] = {"reviews/mine": content["published"]["haider2024/llama-3-8b"]}
    content |= {"ablations": {}, "metrics": {"bleu4": {}, "bertscore_f1": {}}}  # the others take longer
    sides = {side: {"file": "base.jsonl", "field": side} for side in ("prediction", "reference")}
    content["baselines"][0]["predictions"] = {"test_set": "test"} | sides
    published_study.write(tmp_path, url_of(server))
    (tmp_path / "recipes" / "reviews" / "study.yaml").write_text(yamlfiles.write_yaml(content))
    shutil.copy(paths.RECIPES / "haider2024" / "test-subset-1.json", tmp_path / "recipes" / "reviews")
    studies._load.cache_clear()
    rows = [
        (row["name"], row["test_set"], round(row["score"], 2), row["published"], row["agrees"])
        for row in scored(recipe)["scores"]
        if row["metric"] == "bleu4"
    ]
    baseline, recomputed = content["baselines"][0]["name"], content["baselines"][1]["scores"]["bleu4"]
    assert rows == [
        (RECIPE, "test-subset-1", 5.27, 5.27, True),
        (baseline, "test-subset-1", recomputed, 4.28, False),
    ]


def adapters(recipe: Recipe, profile: Path, code: int = 0) -> Any:
    """Evaluate the study's published adapters in a rehearsal."""
    rehearse = ("--profile", "rehearsal", "--profile", profile)
    words = ("reproduce", "reviews", "--stage", "adapter", "--metric", "bertscore:none")
    return recipe.json(*words, *rehearse, code=code)


def test_a_rehearsal_fetches_no_adapter(recipe, server, tmp_path, tiny_profile):
    published_study.write(tmp_path, url_of(server))
    (step,) = adapters(recipe, tiny_profile, code=2)["steps"]
    sources = " ".join(f"--only theirs/{name}" for name in ADAPTER)
    fetch = f"run `recipe data fetch reviews {sources}`"
    assert step["problem"] == f"{RECIPE}: a rehearsal does not fetch the adapter; {fetch}"
    assert server.paths == []


def test_a_published_adapter_is_evaluated_once_and_marked(recipe, server, tmp_path, tiny, tiny_profile):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    published_study.write(tmp_path, url_of(server))
    theirs = tmp_path / "data" / "reviews-raw" / "theirs"
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny), lora).save_pretrained(theirs)
    printed = adapters(recipe, tiny_profile)
    (step,), (row,) = printed["steps"], printed["results"]
    assert step["evaluate"] == "done"
    assert row["rows"] == 12
    assert row["published_adapter"] == "theirs"
    (run,) = rundir.all_runs(tmp_path / "runs")
    assert tmp_path / row["run"] == run.path
    assert len(read_predictions(run.path)) == 12
    assert adapters(recipe, tiny_profile) == printed
    assert [folder.path for folder in rundir.all_runs(tmp_path / "runs")] == [run.path]
    recipe.fails("publish", "latest")
    for command in (("results",), ("results", "reviews", "--rehearse"), ("report", "-o", "a.html")):
        recipe.ok(*command)
    assert "theirs" in recipe("results").stdout

    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    shutil.rmtree(theirs)
    get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALLER)), lora).save_pretrained(theirs)
    (step,) = adapters(recipe, tiny_profile, code=1)["steps"]
    assert step["evaluate"] == "failed"
    assert "adapter_model.safetensors" in step["problem"]
    assert [folder.path for folder in rundir.all_runs(tmp_path / "runs")] == [run.path]


MAGNITUDE = "weight_m_wdecomp.weight"  # as DoRA's fork of PEFT calls it, with a second dimension of one


def test_an_adapter_of_a_fork_makes_the_predictions_of_its_twin(recipe, server, tmp_path, tiny, tiny_profile):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    published_study.write(tmp_path, url_of(server))
    file = tmp_path / "recipes" / "reviews" / "study.yaml"
    content = yamlfiles.read_yaml(file)
    of_hub = {"hub": "owner/fork", "kind": "model", "revision": "c" * 40}
    content["data"]["sources"] |= {"fork/adapter_config.json": of_hub, "fork/adapter_model.bin": of_hub}
    form = {"names": {MAGNITUDE: "lora_magnitude_vector"}, "config": {"peft_type": "LORA", "use_dora": True}}
    content["published"]["reviews/other"] |= {"adapter": "fork", "adapter_format": form}
    file.write_text(yamlfiles.write_yaml(content))
    studies._load.cache_clear()
    theirs, fork = (tmp_path / "data" / "reviews-raw" / name for name in ("theirs", "fork"))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=True)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny), lora).save_pretrained(theirs)
    weights = load_file(theirs / ADAPTER[1])
    weights |= {name: -2 * tensor for name, tensor in weights.items() if "magnitude" in name}
    save_file(weights, theirs / ADAPTER[1])
    fork.mkdir()
    of_fork = {}
    for name, tensor in weights.items():
        is_vector = name.endswith("lora_magnitude_vector")
        of_fork[name.replace("lora_magnitude_vector", MAGNITUDE)] = tensor[:, None] if is_vector else tensor
    torch.save(of_fork, fork / "adapter_model.bin")
    config = orjson.loads((theirs / ADAPTER[0]).read_bytes())
    del config["use_dora"]
    of_fork_alone = {"peft_type": "DORA", "dora_simple": True, "merge_weights": False}
    (fork / ADAPTER[0]).write_bytes(orjson.dumps(config | of_fork_alone))
    assert [step["evaluate"] for step in adapters(recipe, tiny_profile)["steps"]] == ["done", "done"]
    predictions, of_twin = (read_predictions(run.path) for run in rundir.all_runs(tmp_path / "runs"))
    assert predictions == of_twin
    assert any(row["prediction"] for row in predictions)
    (fork / "adapter_model.bin").write_bytes(b"")
    failed = adapters(recipe, tiny_profile, code=1)["steps"][1]
    assert "adapter_model.bin" in failed["problem"]


@pytest.mark.long
def test_an_adapter_makes_the_predictions_of_the_rehearsal_that_trained_it(with_fake_axolotl, recipe, tmp_path):
    with_fake_axolotl.ok("run", "haider2024/llama-3.2-3b", "--rehearse")
    (run,) = rundir.all_runs(tmp_path / "runs")
    few = ("--limit", "3", "--max-new-tokens", "8", "--metric", "bertscore:none")
    recipe.ok("evaluate", "latest", *few)
    adapter = tmp_path / "theirs"
    adapter.mkdir()
    for file in ADAPTER:  # without a tokenizer
        shutil.copy(run.output / file, adapter)
    recipe.ok("evaluate", "llama-3.2-3b", "--adapter", adapter, *few)
    (other,) = [folder for folder in rundir.all_runs(tmp_path / "runs") if folder.path != run.path]
    assert read_predictions(other.path) == read_predictions(run.path)
    assert any(row["prediction"] for row in read_predictions(run.path))
    (row,) = recipe.json("results", "haider2024", "--rehearse")
    assert row["run"] == str(run.path.relative_to(tmp_path))  # the one that was trained here
    assert other.read().rehearsal is True
    assert other.read().published_adapter == str(adapter)


@pytest.mark.parametrize(
    ("adapter", "code", "message"),
    [
        pytest.param(
            "nowhere", 1, "recipe: --adapter nowhere: no local folder; fetching it from the hub failed: ", id="missing"
        ),
        pytest.param(
            "empty",
            2,
            "recipe: empty: adapter_config.json or adapter_model.safetensors is missing or damaged; give a folder "
            "saved by PEFT\n",
            id="empty",
        ),
        pytest.param(
            "theirs",
            2,
            "theirs: trained on somebody/model, but evaluated with meta-llama/Meta-Llama-3-8B, the base model of "
            "llama-3-8b\nrecipe: ",
            id="without a GPU",
        ),
    ],
)
def test_an_adapter_that_cannot_be_evaluated_leaves_nothing(recipe, tmp_path, adapter, code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    save_file({"lora_A": np.ones((2, 2))}, tmp_path / "theirs" / "adapter_model.safetensors")
    done = recipe("evaluate", "llama-3-8b", "--adapter", adapter)
    assert done.returncode == code
    assert done.stderr[: len(message)] == message  # the hub's and the check's own words follow
    assert not (tmp_path / "runs").exists()


def test_data_is_fetched_without_what_authors_published_unless_that_is_named(recipe, server, tmp_path):
    published_study.write(tmp_path, url_of(server))
    rows = list(SAMPLE.glob("msg-*.jsonl"))
    packed = tmp_path / "rows.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in rows:
            archive.write(file, file.name)
    server.files["rows.zip"] = packed.read_bytes()
    names = {file.name for file in rows} | {".fetch.lock"}
    folder = tmp_path / "data" / "reviews-raw"
    recipe.ok("data", "fetch", "reviews")
    assert {file.name for file in folder.iterdir()} == names
    recipe.ok("data", "fetch", "reviews", "--only", "gold")
    assert {file.name for file in folder.iterdir()} == names | {"gold.txt"}
