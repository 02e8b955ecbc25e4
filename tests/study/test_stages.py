"""Stages of a reproduction before the training: published predictions are scored, published adapters evaluated."""

import re
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


def address(server: Server) -> str:
    return server.url.rpartition("/")[0]


def scored(recipe: Recipe, *words: str, code: int = 0) -> Any:
    return recipe.json("reproduce", "reviews", "--from", "predictions", *words, code=code)


def row_of(found: Any, of: str = RECIPE, test_set: str = "some", metric: str = "bleu4") -> dict[str, Any]:
    (row,) = [row for row in found["scores"] if (row["of"], row["test_set"], row["metric"]) == (of, test_set, metric)]
    return row


def mean(predictions: list[str], references: list[str]) -> float:
    scores = [bleu4(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return sum(scores) / len(scores)


def test_published_predictions_are_fetched_and_scored_beside_the_published_score(recipe, server, tmp_path):
    ours = mean(PREDICTED, GOLD)
    published_study.write(tmp_path, address(server), {"bleu4": round(ours, 2), "eval_loss": 1.0})
    found = scored(recipe)
    row = row_of(found)
    assert row["rows"] == 4
    assert row["score"] == pytest.approx(ours)
    assert row["agrees"] is True
    assert row["low"] is row["high"] is None and row["verified"] is True and found["problems"] == {}
    assert row["difference"] == pytest.approx(ours - round(ours, 2))
    some = row_of(found, BASELINE)  # its predictions are of the whole test set
    assert some["rows"] == len(SUBSET)
    step = mean([TEST[i] if i % 2 else "no" for i in SUBSET], GOLD) - 4.0
    assert some["difference"] == pytest.approx(step)
    assert some["agrees"] is False
    assert {row["of"] for row in found["scores"]} == {RECIPE, BASELINE}
    assert rundir.all_runs(tmp_path / "runs") == []


def test_published_predictions_are_recorded(recipe, server, place):
    published_study.write(place, address(server), {"bleu4": 1.0})
    done = recipe.ok("results", "--export", "reviews")
    results = place / "recipes" / "reviews" / "results"
    results.mkdir()
    for name in done.stdout.split():
        (place / name).rename(results / name)
    of_study = studies.find("reviews")
    records = score_records.records(of_study)
    assert {(record.of, record.rows) for record in records} == {(RECIPE, 4), (BASELINE, 4)}
    own, _, base = score_records.statuses(of_study, records)
    assert (own.status, base.status) == ("scored from the authors' predictions",) * 2


def test_files_without_a_checksum_are_marked(recipe, server, tmp_path):
    published_study.write(tmp_path, address(server), pred__txt={"sha256": None})
    assert row_of(scored(recipe))["verified"] is False


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda server: server.files.update({"pred.txt": b"x" * len(FILES["pred.txt"])}), "sha256"),
        (lambda server: server.files.pop("pred.txt"), "404"),
    ],
)
def test_what_cannot_be_had_says_why_and_stops_nothing_else(recipe, server, tmp_path, break_it, says):
    published_study.write(tmp_path, address(server))
    break_it(server)
    found = scored(recipe, code=1)
    assert says in found["problems"][RECIPE] and {row["of"] for row in found["scores"]} == {BASELINE}
    assert not (tmp_path / "data" / "reviews-raw" / "pred.txt").exists()
    server.files = dict(FILES)
    assert scored(recipe)["problems"] == {}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("pred.txt", published_study.lines(PREDICTED[:3]), "pred.txt: 3 .* 4 "),
        ("whole.jsonl", FILES["whole.jsonl"].splitlines()[0], "whole.jsonl: 1 "),
        ("whole.jsonl", b'{"target": "a", "model": {}}\n' * len(TEST), "row 1 .*model.output"),
        ("whole.jsonl", b"{\n", "whole.jsonl:1: "),
        ("pred.txt", b"\xff\n" * 4, "pred.txt: .*UTF-8"),
    ],
)
def test_files_that_do_not_hold_the_predictions_are_refused(recipe, server, tmp_path, file, content, says):
    server.files[file] = content
    known = {"sha256": published_study.digest(content), "bytes": len(content)}
    published_study.write(tmp_path, address(server), **{file.replace(".", "__"): known})
    problems = scored(recipe, code=1)["problems"]
    assert problems and all(re.search(says, problem) for problem in problems.values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reviews", "--rehearse"], "--rehearse: "),
        (["reviews", "--only", "other"], f"--from predictions: .*{RECIPE}"),
        (["reviews", "--only", "nothing"], "--only nothing: "),
        (["peft-metamathqa"], "--from predictions: peft-metamathqa"),
    ],
)
def test_a_wrong_request_fetches_nothing(recipe, server, tmp_path, words, says):
    published_study.write(tmp_path, address(server))
    done = recipe.fails("reproduce", *words, "--from", "predictions")
    assert re.search(says, done.stderr)
    assert not server.paths


@pytest.mark.skipif(not (SHARED / "haider2024").is_dir(), reason="the authors' files are not part of the project")
def test_the_first_studys_predictions(recipe, server, tmp_path):
    """The real files behind a server in place of the internet: Table II's score of Llama 3, and not its baseline's."""
    of_study = studies.find("haider2024")
    content = yamlfiles.read_yaml(of_study.folder / "study.yaml")
    server.files = {}
    for file in ("msg-5000-pred.txt", "msg-5000-gold.txt"):
        server.files[file] = (SHARED / "haider2024" / file).read_bytes()
        content["data"]["sources"][file]["url"] = f"{address(server)}/{file}"
    server.files["base.jsonl"] = (SHARED / "codereviewer-test-predictions.jsonl").read_bytes()
    content["data"]["sources"]["base.jsonl"] = {"url": f"{address(server)}/base.jsonl"}
    content["published"] = {"reviews/mine": content["published"]["haider2024/llama-3-8b"]}
    content |= {"variants": {}, "metrics": {"bleu4": {}, "bertscore_f1": {}}}  # the others take longer
    sides = {side: {"file": "base.jsonl", "field": side} for side in ("prediction", "reference")}
    content["baselines"][0]["predictions"] = {"test_set": "test"} | sides
    published_study.write(tmp_path, address(server))
    (tmp_path / "recipes" / "reviews" / "study.yaml").write_text(yamlfiles.write_yaml(content))
    shutil.copy(paths.RECIPES / "haider2024" / "test-subset-1.json", tmp_path / "recipes" / "reviews")
    studies._load.cache_clear()
    found = [
        (row["of"], row["test_set"], round(row["score"], 2), row["published"], row["agrees"])
        for row in scored(recipe)["scores"]
        if row["metric"] == "bleu4"
    ]
    baseline, recomputed = content["baselines"][0]["name"], content["baselines"][1]["scores"]["bleu4"]
    assert found == [
        (RECIPE, "test-subset-1", 5.27, 5.27, True),
        (baseline, "test-subset-1", recomputed, 4.28, False),
    ]


def adapters(recipe: Recipe, profile: Path, code: int = 0) -> Any:
    """Evaluate the study's published adapters in a rehearsal."""
    rehearse = ("--profile", "rehearsal", "--profile", profile)
    words = ("reproduce", "reviews", "--from", "adapter", "--metric", "bertscore:none")
    return recipe.json(*words, *rehearse, code=code)


def test_a_rehearsal_fetches_no_adapter(recipe, server, tmp_path, tiny_profile):
    published_study.write(tmp_path, address(server))
    (step,) = adapters(recipe, tiny_profile, code=2)["steps"]
    fetch = f"`recipe data fetch reviews {' '.join(f'--only theirs/{name}' for name in ADAPTER)}`"
    assert fetch in step["problem"] and not server.paths


def test_a_published_adapter_is_evaluated_once_and_marked(recipe, server, tmp_path, tiny, tiny_profile):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    published_study.write(tmp_path, address(server))
    theirs = tmp_path / "data" / "reviews-raw" / "theirs"
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny), lora).save_pretrained(theirs)
    found = adapters(recipe, tiny_profile)
    (step,), (row,) = found["steps"], found["results"]
    assert step["evaluate"] == "done"
    assert row["rows"] == 12
    assert row["published_adapter"] == "theirs"
    (made,) = rundir.all_runs(tmp_path / "runs")
    assert tmp_path / row["run"] == made.path and len(read_predictions(made.path)) == 12
    assert adapters(recipe, tiny_profile) == found
    assert [run.path for run in rundir.all_runs(tmp_path / "runs")] == [made.path]
    recipe.fails("publish", "latest")
    for verb in (("results",), ("results", "reviews", "--rehearse"), ("report", "-o", "a.html")):
        recipe.ok(*verb)
    assert "theirs" in recipe("results").stdout

    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    shutil.rmtree(theirs)
    get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALLER)), lora).save_pretrained(theirs)
    (step,) = adapters(recipe, tiny_profile, code=1)["steps"]
    assert step["evaluate"] == "failed" and "adapter_model.safetensors" in step["problem"]
    assert [run.path for run in rundir.all_runs(tmp_path / "runs")] == [made.path]


MAGNITUDE = "weight_m_wdecomp.weight"  # as DoRA's fork of PEFT calls it, with a second dimension of one


def test_an_adapter_of_a_fork_makes_the_predictions_of_its_twin(recipe, server, tmp_path, tiny, tiny_profile):
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    published_study.write(tmp_path, address(server))
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
    own = orjson.loads((theirs / ADAPTER[0]).read_bytes())
    del own["use_dora"]
    of_fork_alone = {"peft_type": "DORA", "dora_simple": True, "merge_weights": False}
    (fork / ADAPTER[0]).write_bytes(orjson.dumps(own | of_fork_alone))
    assert [step["evaluate"] for step in adapters(recipe, tiny_profile)["steps"]] == ["done", "done"]
    one, other = (read_predictions(run.path) for run in rundir.all_runs(tmp_path / "runs"))
    assert one == other and any(row["prediction"] for row in one)
    (fork / "adapter_model.bin").write_bytes(b"")
    failed = adapters(recipe, tiny_profile, code=1)["steps"][1]
    assert "adapter_model.bin" in failed["problem"]


@pytest.mark.long
def test_an_adapter_makes_the_predictions_of_the_rehearsal_that_trained_it(with_fake_axolotl, recipe, tmp_path):
    with_fake_axolotl.ok("run", "haider2024/llama-3.2-3b", "--rehearse")
    (run,) = rundir.all_runs(tmp_path / "runs")
    few = ("--limit", "3", "--max-new-tokens", "8", "--metric", "bertscore:none")
    recipe.ok("evaluate", "latest", *few)
    (adapter := tmp_path / "theirs").mkdir()
    for file in ADAPTER:  # without a tokenizer
        shutil.copy(run.output / file, adapter)
    recipe.ok("evaluate", "llama-3.2-3b", "--adapter", adapter, *few)
    (other,) = [made for made in rundir.all_runs(tmp_path / "runs") if made.path != run.path]
    assert read_predictions(other.path) == read_predictions(run.path)
    assert any(row["prediction"] for row in read_predictions(run.path))
    (row,) = recipe.json("results", "haider2024", "--rehearse")
    assert row["run"] == str(run.path.relative_to(tmp_path))  # the one that was trained here
    assert other.read().rehearsal is True
    assert other.read().published_adapter == str(adapter)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("llama-3-8b", "--adapter", "nowhere"), "--adapter nowhere"),
        (("llama-3-8b", "--adapter", "empty"), "empty: .*adapter_config.json"),
        (("llama-3-8b", "--adapter", "theirs"), "no-gpu"),
    ],
)
def test_an_adapter_that_cannot_be_evaluated_leaves_nothing(recipe, tmp_path, words, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    save_file({"lora_A": np.ones((2, 2))}, tmp_path / "theirs" / "adapter_model.safetensors")
    done = recipe("evaluate", *words)
    assert done.returncode in (1, 2) and re.search(says, done.stderr), done.stderr
    assert not (tmp_path / "runs").exists()


def test_data_is_fetched_without_what_authors_published_unless_that_is_named(recipe, server, tmp_path):
    published_study.write(tmp_path, address(server))
    rows = list(SAMPLE.glob("msg-*.jsonl"))
    with zipfile.ZipFile(packed := tmp_path / "rows.zip", "w") as archive:
        for file in rows:
            archive.write(file, file.name)
    server.files["rows.zip"] = packed.read_bytes()
    kept = {file.name for file in rows} | {"fetched.json", ".fetch.lock"}
    for fetched, words in ((set(), ()), ({"gold.txt"}, ("--only", "gold"))):
        recipe.ok("data", "fetch", "reviews", *words)
        kept |= fetched
        assert {file.name for file in (tmp_path / "data" / "reviews-raw").iterdir()} == kept
