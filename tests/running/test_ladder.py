"""What authors published on the way to their scores: fetched, scored, generated with, and set beside each other."""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import small_ladder
from conftest import SAMPLE, SHARED, Recipe
from file_server import Server, serving
from safetensors.numpy import save_file
from small_ladder import ADAPTER, BASELINE, FILES, GOLD, PREDICTED, RECIPE, SUBSET, TEST

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.data import download, study
from qlora_recipes.metrics.bleu4 import bleu4
from qlora_recipes.runs import lookup
from qlora_recipes.scores.evaluations import read_predictions

SMALLER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""The sizes of a model that no adapter of the tiny one fits."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(monkeypatch) as orders:
        orders.content, orders.files = None, dict(FILES)
        yield orders
    study._load.cache_clear()


def address(server: Server) -> str:
    return server.url.rpartition("/")[0]


def climbed(recipe: Recipe, *words: str, code: int = 0) -> list[dict[str, Any]]:
    done = recipe("reproduce", "reviews", "--from", "predictions", "--json", *words)
    assert done.returncode == code, done.stderr
    return orjson.loads(done.stdout)


def rung(rows: list[dict[str, Any]], name: str, of: str = RECIPE, test_set: str = "some") -> dict[str, Any]:
    (row,) = [row for row in rows if (row["of"], row["rung"], row["test_set"]) == (of, name, test_set)]
    return row


def mean(predictions: list[str], references: list[str]) -> float:
    scores = [bleu4(reference, text) for reference, text in zip(references, predictions, strict=True)]
    return sum(scores) / len(scores)


def test_published_predictions_are_fetched_and_scored_beside_the_published_score(
    recipe: Recipe, server: Server, tmp_path: Path
) -> None:
    ours = mean(PREDICTED, GOLD)
    small_ladder.write(tmp_path, address(server), {"bleu4": round(ours, 2)})
    rows = climbed(recipe)
    row = rung(rows, "predictions")
    assert (row["rows"], row["bleu4"]) == (4, pytest.approx(ours))
    assert row["bleu4_low"] < ours < row["bleu4_high"]
    assert row["bleu4_says"] == "scoring agrees" and row["verified"] is True and row["problem"] is None
    assert row["bleu4_difference"] == row["bleu4_step"] == pytest.approx(ours - round(ours, 2))
    whole = rung(rows, "predictions", BASELINE, "test")
    assert whole["bleu4"] == pytest.approx(mean([t if i % 2 else "no" for i, t in enumerate(TEST)], TEST))
    assert (whole["rows"], whole["bleu4_difference"]) == (len(TEST), None)
    assert whole["bleu4_says"] == "no other score is on the whole test set"
    some = rung(rows, "predictions", BASELINE)
    step = mean([TEST[i] if i % 2 else "no" for i in SUBSET], GOLD) - 4.0
    assert some["bleu4_says"] == f"scoring differs by +{step:.2f}"
    assert not any("reviews/other" in row["of"] for row in rows)  # of which nothing else is published
    assert lookup.all_runs(tmp_path / "runs") == []


def test_what_was_fetched_and_scored_is_not_fetched_and_scored_again(
    recipe: Recipe, server: Server, tmp_path: Path
) -> None:
    small_ladder.write(tmp_path, address(server))
    before = climbed(recipe)
    asked = len(server.paths)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("scores.json")}
    assert climbed(recipe) == before
    assert len(server.paths) == asked
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("scores.json")}
    study_file = tmp_path / "recipes" / "reviews" / "study.yaml"
    study_file.write_text(study_file.read_text().replace("chrf: {}", "chrf: {}\n  rouge_l: {}"))
    assert rung(climbed(recipe), "predictions")["rouge_l"] > 0


def test_references_are_compared_with_the_prepared_rows(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    small_ladder.write(tmp_path, address(server))
    assert "not prepared here" in recipe("reproduce", "reviews", "--from", "predictions").stderr
    made = recipe("data", "prepare", SAMPLE, "--study", "reviews")
    assert made.returncode == 0, made.stderr
    done = recipe("reproduce", "reviews", "--from", "predictions")
    assert done.returncode == 0 and "not prepared here" not in done.stderr
    server.files["gold.txt"] = small_ladder.lines([GOLD[1], GOLD[0], *GOLD[2:]])
    digest = small_ladder.digest(server.files["gold.txt"])
    small_ladder.write(tmp_path, address(server), gold__txt={"sha256": digest})
    problem = rung(climbed(recipe, code=1), "predictions")["problem"]
    said = "gold.txt: 2 of 4 references are not those of the study's some.jsonl, the first in row 1: "
    assert said in problem and repr(" ".join(GOLD[1].split())[:60]) in problem


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda server: server.files.update({"pred.txt": b"x" * len(FILES["pred.txt"])}), "not the study's: sha256"),
        (lambda server: server.files.pop("pred.txt"), "the server answers 404"),
        (
            lambda server: server.files.update({"gold.txt": FILES["gold.txt"][:-1]}),
            "gold.txt is not the study's: bytes",
        ),
    ],
)
def test_what_cannot_be_had_says_why_keeps_nothing_and_stops_nothing_else(
    recipe: Recipe, server: Server, tmp_path: Path, break_it: Any, says: str
) -> None:
    small_ladder.write(tmp_path, address(server))
    break_it(server)
    rows = climbed(recipe, code=1)
    row = rung(rows, "predictions")
    assert says in row["problem"] and row["bleu4"] is None
    assert rung(rows, "predictions", BASELINE)["bleu4"] is not None
    raw = tmp_path / "data" / "reviews-raw"
    assert not (raw / "pred.txt").exists() and not (raw / "gold.txt").exists()
    server.files = dict(FILES)
    assert rung(climbed(recipe), "predictions")["problem"] is None


def test_half_a_download_is_resumed_by_the_next_call(
    recipe: Recipe, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CHUNK", 10)
    small_ladder.write(tmp_path, address(server))
    server.breaks_after = [20] * 6
    half = rung(climbed(recipe, code=1), "predictions")
    assert "run it again to resume from" in half["problem"] and half["bleu4"] is None
    assert not (tmp_path / "data" / "reviews-raw" / "pred.txt").exists()
    assert rung(climbed(recipe), "predictions")["bleu4"] is not None


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("pred.txt", small_ladder.lines(PREDICTED[:3]), "pred.txt: 3 predictions for 4 references; each needs one"),
        ("whole.jsonl", FILES["whole.jsonl"].splitlines()[0], "whole.jsonl: 1 predictions, but the whole test set of"),
        ("whole.jsonl", b'{"target": "a", "model": {}}\n' * len(TEST), "row 1 has no text field model.output"),
        ("whole.jsonl", b"{\n", "whole.jsonl:1: not a JSON row"),
        ("pred.txt", b"\xff\n" * 4, "pred.txt: not text in UTF-8"),
    ],
)
def test_files_that_do_not_hold_the_predictions_are_refused(
    recipe: Recipe, server: Server, tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    server.files[file] = content
    known = {"sha256": small_ladder.digest(content), "bytes": len(content)}
    small_ladder.write(tmp_path, address(server), **{file.replace(".", "__"): known})
    problems = [row["problem"] for row in climbed(recipe, code=1) if row["problem"]]
    assert problems and all(says in problem for problem in problems)


def test_the_ladder_in_a_table_and_below_a_studys_results(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    small_ladder.write(tmp_path, address(server), pred__txt={"sha256": None})
    planned = recipe("reproduce", "reviews", "--from", "predictions", "--dry-run")
    assert planned.returncode == 0 and "pred.txt, gold.txt" in planned.stdout and not (tmp_path / "data").exists()
    assert "The ladder" not in recipe("results", "--study", "reviews").stdout
    done = recipe("reproduce", "reviews", "--from", "predictions")
    assert done.returncode == 0 and done.stderr.endswith("next: recipe reproduce reviews\n")
    for text in ("scoring differs by", f"Not verified, as study.yaml lacks a checksum: {RECIPE}, predictions"):
        assert text in done.stdout
    shown = recipe("results", "--study", "reviews")
    assert "The ladder, from the published score down to our training: BLEU-4" in shown.stdout
    assert f"{RECIPE}, adapter: not evaluated yet; `recipe reproduce reviews --from adapter`" in shown.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reviews", "--rehearse"], "--rehearse: works only with --from adapter or training; it needs no model"),
        (["reviews", "--on", "slurm"], "--on slurm: works only with --from training"),
        (["reviews", "--only", "other"], "--from predictions: reviews's study.yaml names no predictions of other; it"),
        (["reviews", "--only", "nothing"], "--only nothing: no recipe of the study of that name"),
        (["peft-metamathqa"], "peft-metamathqa's study.yaml names no predictions of its authors"),
    ],
)
def test_a_wrong_request_fetches_nothing(
    recipe: Recipe, server: Server, tmp_path: Path, words: list[str], says: str
) -> None:
    small_ladder.write(tmp_path, address(server))
    done = recipe("reproduce", *words, "--from", "predictions")
    assert done.returncode == 2 and says in done.stderr
    assert not server.paths


@pytest.mark.skipif(not (SHARED / "haider2024").is_dir(), reason="the authors' files are not part of the project")
def test_the_first_studys_ladder(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    """The real files behind a server in place of the internet: Table II's score of Llama 3, and not its baseline's."""
    of_study = study.find("haider2024")
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
    small_ladder.write(tmp_path, address(server))
    (tmp_path / "recipes" / "reviews" / "study.yaml").write_text(yamlfiles.write_yaml(content))
    shutil.copy(paths.RECIPES / "haider2024" / "test-subset-1.json", tmp_path / "recipes" / "reviews")
    study._load.cache_clear()
    rows = climbed(recipe)
    shown = [(row["rung"], row["test_set"], row["bleu4"] and round(row["bleu4"], 2), row["bleu4_says"]) for row in rows]
    assert shown == [
        ("published", "test-subset-1", 5.27, None),
        ("predictions", "test-subset-1", 5.27, "scoring agrees"),
        ("published", "test-subset-1", 4.28, None),
        ("predictions", "test-subset-1", 5.47, "scoring differs by +1.19"),
        ("predictions", "test", 5.44, "no other score is on the whole test set"),
    ]


def ladder_of(place: Path, command: Path, *words: str | Path, code: int = 0, **env: str) -> Any:
    line = [str(word) for word in (command, "reproduce", "reviews", "--bertscore", "none", *words, "--json")]
    done = subprocess.run(line, cwd=place, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return orjson.loads(done.stdout)


@pytest.mark.parametrize("damaged", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_rehearsal_fetches_no_adapter_and_refuses_a_damaged_one(
    recipe: Recipe, server: Server, tmp_path: Path, tiny_profile: Path, damaged: str
) -> None:
    small_ladder.write(tmp_path, address(server))
    rehearse = ("--from", "adapter", "--profile", "rehearsal", "--profile", tiny_profile, "--bertscore", "none")
    done = recipe("reproduce", "reviews", *rehearse)
    fetch = f"`recipe data fetch reviews {' '.join(f'--only theirs/{name}' for name in ADAPTER)}`"
    assert done.returncode == 1 and not server.paths
    assert (
        f"{RECIPE}, adapter: {RECIPE}: a rehearsal fetches nothing, and the adapter is not here; {fetch}" in done.stdout
    )
    raw = tmp_path / "data" / "reviews-raw" / "theirs"
    raw.mkdir(parents=True)
    (raw / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": np.ones((2, 2))}, raw / "adapter_model.safetensors")
    (raw / damaged).write_bytes((raw / damaged).read_bytes()[:-5])
    done = recipe("reproduce", "reviews", *rehearse)
    assert (
        done.returncode == 1 and "theirs: not an adapter as PEFT saves it, or a damaged one; remove it" in done.stdout
    )


@pytest.mark.long
def test_a_published_adapter_is_evaluated_as_one_of_a_run_and_only_once(
    recipe: Recipe, server: Server, tmp_path: Path, tiny: Path, tiny_profile: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    small_ladder.write(tmp_path, address(server))
    theirs = tmp_path / "data" / "reviews-raw" / "theirs"
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(tiny), lora).save_pretrained(theirs)
    rehearse = ("--from", "adapter", "--profile", "rehearsal", "--profile", tiny_profile, "--bertscore", "none")
    done = recipe("reproduce", "reviews", *rehearse, "--json")
    assert done.returncode == 0, done.stdout
    (row,) = orjson.loads(done.stdout)
    assert (row["rung"], row["rows"], row["problem"]) == ("adapter", 12, None)
    made = tmp_path / "runs" / "ladder" / "reviews" / "mine" / "adapter-rehearsal"
    assert len(read_predictions(made)) == 12 and lookup.all_runs(tmp_path / "runs") == []
    again = recipe("reproduce", "reviews", *rehearse, "--json")
    assert orjson.loads(again.stdout) == [row] and "complete, made with the same adapter" in again.stderr
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    shutil.rmtree(theirs)
    other = LlamaForCausalLM(LlamaConfig(**SMALLER))
    get_peft_model(other, lora).save_pretrained(theirs)
    refused = recipe("reproduce", "reviews", *rehearse, "--json")
    assert refused.returncode == 1
    assert "theirs: cannot be used with reviews/mine's base model" in orjson.loads(refused.stdout)[0]["problem"]


@pytest.mark.long
def test_an_adapter_of_a_hub_makes_the_predictions_of_the_run_that_trained_it(
    stand_in: Path, tiny_profile: Path, server: Server, recipe: Recipe, tmp_path: Path
) -> None:
    small_ladder.write(tmp_path, address(server))
    rehearse = ("--only", "mine", "--profile", "rehearsal", "--profile", tiny_profile)
    assert "ladder" not in ladder_of(tmp_path, stand_in, *rehearse)
    (run,) = lookup.all_runs(tmp_path / "runs")
    server.files = {f"owner/theirs/resolve/{'c' * 40}/sub/{name}": (run.output / name).read_bytes() for name in ADAPTER}
    fetching = [str(stand_in), "data", "fetch", "reviews", *(f"--only=theirs/{name}" for name in ADAPTER)]
    online = {"HF_ENDPOINT": server.url.partition("/files")[0], "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(fetching, cwd=tmp_path, env=os.environ | online, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    adapter, training = ladder_of(tmp_path, stand_in, "--from", "adapter", *rehearse)
    assert (adapter["rung"], training["rung"], adapter["rows"]) == ("adapter", "training", 12)
    theirs = read_predictions(tmp_path / "runs" / "ladder" / "reviews" / "mine" / "adapter-rehearsal")
    ours = read_predictions(run.path)
    assert [row["prediction"] for row in theirs] == [row["prediction"] for row in ours]
    assert any(row["prediction"] for row in ours)
    assert training["bleu4_step"] == 0 and training["bleu4_says"] == "training agrees"
    assert adapter["bleu4_published"] is None and adapter["verified"] is False
    assert [folder.path for folder in lookup.all_runs(tmp_path / "runs")] == [run.path]
    shown = recipe("results", "--study", "reviews", "--rehearse").stdout
    assert "training agrees" in shown and f"lacks a checksum: {RECIPE}, adapter" in shown
    assert "The ladder" not in recipe("results", "--study", "reviews").stdout  # which no rehearsal is in


def test_data_is_fetched_without_what_authors_published_unless_that_is_given_or_named(
    recipe: Recipe, server: Server, tmp_path: Path
) -> None:
    small_ladder.write(tmp_path, address(server))
    mine = tmp_path / "mine"
    mine.mkdir()
    with zipfile.ZipFile(mine / "rows.zip", "w") as archive:
        for file in SAMPLE.glob("msg-*.jsonl"):
            archive.write(file, file.name)
    assert recipe("data", "fetch", "reviews", "--from", mine).returncode == 0
    raw = tmp_path / "data" / "reviews-raw"
    of_rows = {file.name for file in SAMPLE.glob("msg-*.jsonl")} | {"fetched.json", ".fetch.lock"}
    assert {file.name for file in raw.iterdir()} == of_rows and not server.paths
    (mine / "pred.txt").write_bytes(FILES["pred.txt"])
    assert recipe("data", "fetch", "reviews", "--from", mine / "pred.txt").returncode == 0
    assert recipe("data", "fetch", "reviews", "--only", "gold").returncode == 0
    assert {file.name for file in raw.iterdir()} == of_rows | {"pred.txt", "gold.txt"}


def test_without_a_gpu_an_adapter_says_so_and_fetches_nothing(recipe: Recipe, server: Server, tmp_path: Path) -> None:
    small_ladder.write(tmp_path, address(server))
    done = recipe("reproduce", "reviews", "--from", "adapter", "--json")
    assert done.returncode == 1
    rows = orjson.loads(done.stdout)
    assert rung(rows, "adapter")["problem"].startswith(
        "no NVIDIA GPU was found, and reviews/mine's base model generate"
    )
    assert rung(rows, "predictions")["bleu4"] is not None
    assert not any("theirs" in path for path in server.paths)
