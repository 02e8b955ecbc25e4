"""Public records of a faked run, read by huggingface_hub and by Every Eval Ever's validator, and a proposal to a small
hub of this machine's."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import run_folders
import yaml
from file_server import as_hub, serving
from huggingface_hub import constants, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.numpy import save_file

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.base.files import sha256
from qlora_recipes.evaluate import scores_file
from qlora_recipes.metrics.metric import Benchmark, ScoreRecord
from qlora_recipes.results import card, public_records, publish
from qlora_recipes.results.card import Card
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import Summary

MODEL = "someone/Adapter-7B"
MOMENT = "2026-01-01T11:00:00+00:00"
NOTES = "lm-evaluation-harness 0.4.9, gsm8k version 3, 5-shot, exact_match with strict-match"
LOSS_ROWS = "data/codereviewer/valid.jsonl, split train"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An evaluated run with a BLEU-4, a loss without an upper bound, and two benchmarks of which the hub has one."""
    scores: dict[str, Any] = {"rows": 5000, "bleu4": 5.125, "intervals": {"bleu4": [4.9, 5.3]}, "eval_loss": 1.25}
    folder = run_folders.a_run(tmp_path, "haider2024/llama-3-8b", "run", 5.125, scores=scores)
    folder.output.mkdir()
    save_file({"lora_A": np.ones((8, 4), np.float32)}, folder.adapter)
    add_scores(folder, gsm8k=a_benchmark("gsm8k"), hellaswag=a_benchmark("hellaswag"))
    return folder


def a_benchmark(task: str, rows: int = 1319) -> ScoreRecord:
    benchmark = Benchmark(
        value=61.234567, stderr=1.3, task=task, result="exact_match", version="3", shots=5, filter="strict-match",
        rows=rows, total_rows=1319, limit=None, ends=[2], harness="0.4.9",
    )  # fmt: skip
    declaration = {"metric": "benchmark", "task": task}
    return ScoreRecord(value=61.234567, interval=benchmark.interval, declaration=declaration, benchmark=benchmark)


def add_scores(run: RunDir, **scores: ScoreRecord) -> None:
    evaluation = scores_file.read_scores(run.path)
    assert evaluation
    text = evaluation.model_copy(update={"scores": evaluation.scores | scores}).model_dump_json()
    (run.path / scores_file.SCORES).write_text(text)


def card_of(run: RunDir, repository: str = MODEL, merged: bool = False) -> Card:
    return Card(RunResult(run, run.read()), merged, repository)


def record_of(run: RunDir) -> tuple[Path, dict[str, Any]]:
    name = public_records.write(card_of(run), run.output)[0]
    return run.output / name, orjson.loads((run.output / name).read_bytes())


def test_a_registered_benchmark_is_in_eval_results_and_other_scores_in_the_model_index(run):
    record, text = public_records.write(card_of(run), run.output)
    assert text == ".eval_results/qlora-recipes.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load((run.output / text).read_text()))
    assert vars(entry) == {
        "dataset_id": "openai/gsm8k",
        "task_id": "gsm8k",
        "value": 61.2346,
        "date": MOMENT,
        "source_url": f"https://huggingface.co/{MODEL}/blob/main/{record}",
        "notes": NOTES,
        **dict.fromkeys(("dataset_revision", "verify_token", "source_name", "source_user", "source_org")),
    }
    front = yaml.safe_load(card_of(run).front_matter)
    _, results = model_index_to_eval_results(front["model-index"])
    values = {(result.dataset_name, result.metric_value) for result in results}
    assert values == {("hellaswag", 61.2346), (card_of(run).scored_on, 5.125), (LOSS_ROWS, 1.25)}


def test_scores_of_some_rows_or_of_a_rehearsal_are_no_entry(run):
    add_scores(run, gsm8k=a_benchmark("gsm8k", rows=100))
    assert public_records.hub_entries(card_of(run)) == ""
    add_scores(run, gsm8k=a_benchmark("gsm8k"))
    assert NOTES in public_records.hub_entries(card_of(run)).replace("\n  ", "")
    run.write(run.read().model_copy(update={"rehearsal": True}))
    evaluation = scores_file.read_scores(run.path)
    text = evaluation.model_copy(update={"rehearsal": True}).model_dump_json()
    (run.path / scores_file.SCORES).write_text(text)
    assert public_records.write(card_of(run, "."), run.output) == []


def test_a_merged_model_has_scores_of_its_adapter(run):
    (entry,) = yaml.safe_load(public_records.hub_entries(card_of(run, merged=True)))
    assert entry["notes"] == f"{NOTES}, adapter before merging"


def test_a_record_has_intervals_rows_decoding_verdict_and_config(run, tmp_path):
    file, record = record_of(run)
    assert file.parent == run.output / "data" / "qlora-recipes" / MODEL
    assert record_of(run)[0] == file  # the same scores are the same record
    assert record["model_info"]["id"] == MODEL
    assert record["source_metadata"]["evaluator_relationship"] == "first_party"
    details = record["model_info"]["additional_details"]
    assert details["adapter_sha256"] == sha256(run.adapter)
    assert yaml.safe_load(details["config"])["base_model"] == "meta-llama/Meta-Llama-3-8B"
    assert str(tmp_path) not in file.read_text()
    results = {result["metric_config"]["metric_id"]: result for result in record["evaluation_results"]}
    assert list(results) == ["bleu4", "eval_loss", "gsm8k", "hellaswag"]
    interval = {"lower": 4.9, "upper": 5.3, "confidence_level": 0.95}
    uncertainty = {"num_samples": 5000, "confidence_interval": interval}
    details = {"published": "5.27", "verdict": "within the interval"}
    assert results["bleu4"]["score_details"] == {"score": 5.125, "uncertainty": uncertainty, "details": details}
    assert results["bleu4"]["generation_config"] == {
        "generation_args": {"temperature": 0.0, "max_tokens": run_folders.STUDY.decoding.max_new_tokens},
        "additional_details": {"num_beams": str(run_folders.STUDY.decoding.num_beams), "dtype": "float16"},
    }
    assert results["eval_loss"]["metric_config"]["max_score"] == "Infinity"
    assert results["eval_loss"]["metric_config"]["lower_is_better"]
    assert results["eval_loss"]["score_details"]["uncertainty"] == {}  # tokens are no rows
    uncertainty = results["gsm8k"]["score_details"]["uncertainty"]
    assert (uncertainty["num_samples"], uncertainty["standard_error"]) == (1319, {"value": 1.3})
    assert results["gsm8k"]["score_details"]["details"] == {"conditions": NOTES}


def test_a_training_of_pairs_without_an_evaluation_has_a_record(tmp_path):
    pairs = {"eval_loss": 0.6, "eval_reward_accuracy": 0.75, "eval_pairs": {"count": 61, "sha256": "a" * 64}}
    run = run_folders.a_run(tmp_path, "start/dpo-qlora", "run", 5.0, summary=Summary(**pairs))
    (run.path / scores_file.SCORES).unlink()
    run.output.mkdir()
    save_file({"lora_A": np.ones((8, 4), np.float32)}, run.adapter)
    _, record = record_of(run)
    results = {result["metric_config"]["metric_id"]: result for result in record["evaluation_results"]}
    accuracy = results["reward_accuracy"]
    assert accuracy["source_data"]["dataset_name"].endswith(", 61 pairs")
    assert accuracy["score_details"]["score"] == 75
    assert accuracy["score_details"]["uncertainty"]["num_samples"] == 61
    assert accuracy["score_details"]["details"]["weighting"] == "mean over pairs"
    assert "generation_config" not in accuracy


def verdict_on_first(file: Path) -> str | None:
    return public_records.read(file, run_folders.STUDY)[0]["verdict"]


def test_what_was_published_is_read_back(run, recipe):
    file, record = record_of(run)
    entries, page = run.output / public_records.EVAL_RESULTS, run.output / "README.md"
    page.write_text(card.card(card_of(run).result, False, MODEL))
    shown = recipe.json("results", "haider2024", file, entries, page)
    name, on = "haider2024/llama-3-8b", card_of(run).scored_on
    fields = ("file", "model", "metric", "on", "score", "recipe", "published", "verdict")
    assert [tuple(row[field] for field in fields) for row in shown] == [
        (str(file), MODEL, "bleu4", on, 5.125, name, "5.27", "within the interval"),
        (str(file), MODEL, "eval_loss", LOSS_ROWS, 1.25, name, None, None),
        (str(file), MODEL, "gsm8k", "gsm8k", 61.234567, name, None, None),
        (str(file), MODEL, "hellaswag", "hellaswag", 61.234567, name, None, None),
        (str(entries), None, "gsm8k", "openai/gsm8k", 61.2346, None, None, None),
        (str(page), None, "bleu", on, 5.125, None, None, None),
        (str(page), None, "loss", LOSS_ROWS, 1.25, None, None, None),
        (str(page), None, "accuracy", "hellaswag", 61.2346, None, None, None),
    ]
    results = record["evaluation_results"]
    nothing = [None] * 4
    assert [row["uncertainty"] for row in shown] == [row["score_details"]["uncertainty"] for row in results] + nothing
    decoding = results[0]["generation_config"]
    conditions = [decoding, None, NOTES, NOTES.replace("gsm8k", "hellaswag"), NOTES, None, None, None]
    assert [row["conditions"] for row in shown] == conditions


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        (("model_info", "additional_details", "recipe"), "haider2024/llama-2-7b"),  # has another published score
        (("evaluation_results", 0, "generation_config"), {}),  # without conditions
        (("evaluation_results", 0, "score_details", "details"), {}),  # not compared by its author
    ],
)
def test_a_record_without_conditions_or_recipe_has_no_verdict(run, changed, value):
    file, record = record_of(run)
    assert verdict_on_first(file) == "within the interval"
    *keys, last = changed
    place = record
    for key in keys:
        place = place[key]
    place[last] = value
    file.write_bytes(orjson.dumps(record))
    assert verdict_on_first(file) is None


def test_a_score_is_judged_by_its_interval_whatever_verdict_its_record_states(run):
    file, record = record_of(run)
    record["evaluation_results"][0]["score_details"]["score"] = 4.0
    record["evaluation_results"][0]["score_details"]["uncertainty"]["confidence_interval"] |= {"lower": 3, "upper": 4.5}
    file.write_bytes(orjson.dumps(record))
    assert verdict_on_first(file) == "off"


def record_text(uncertainty: dict[str, Any]) -> str:
    """Record of a score with a published one."""
    model = {"id": MODEL, "additional_details": {"recipe": "haider2024/llama-3-8b"}}
    details = {"conditions": "any", "published": "5.27"}
    result = {
        "evaluation_name": "bleu4",
        "source_data": {"dataset_name": "d"},
        "score_details": {"score": 5.1, "uncertainty": uncertainty, "details": details},
    }
    return json.dumps({"model_info": model, "evaluation_results": [result]})


CARD = """---
model-index:
- name: x
  results:
  - task: {type: t}
    dataset: {type: d, name: n}
    metrics: [{type: a, value: 1}]
    source: {}
---
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("record.json", "[]"),
        ("record.json", '{"model_info": {"id": "m"}}'),
        ("record.json", "{"),
        ("record.json", record_text({"confidence_interval": {"lower": 4.9}})),
        ("record.json", record_text({"confidence_interval": {"lower": "4.9", "upper": "5.3"}})),
        ("README.md", "# A model"),
        ("README.md", "---\nlicense: mit\n---\n"),
        ("README.md", "---\nmodel-index: 5\n---\n"),
        ("README.md", "---\nmodel-index: [{name: x, results: [{task: 5}]}]\n---\n"),
        ("README.md", CARD.replace("source: {}", "source: 5")),
        ("record.json", record_text({}).replace("bleu4", "x" * 301)),
        ("record.json", record_text({}).replace(MODEL, "x" * 301)),
        ("record.json", record_text({"confidence_interval": ["x" * 10_000]})),
        ("scores.yaml", "- value: 1"),
        ("scores.yaml", "1"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        public_records.read(file, run_folders.STUDY)
    problem = "neither an Every Eval Ever record, a model card with `model-index`, nor a file of `.eval_results`"
    assert str(raised.value) == f"{file}: {problem}"


def test_a_card_without_results_has_no_scores_and_a_record_at_most_a_thousand(tmp_path):
    card_file, record = tmp_path / "README.md", tmp_path / "record.json"
    card_file.write_text("---\nmodel-index: []\n---\n")
    assert public_records.read(card_file, run_folders.STUDY) == []
    content = json.loads(record_text({}))
    for number, problem in ((1000, None), (1001, "more than 1,000 scores")):
        record.write_text(json.dumps(content | {"evaluation_results": content["evaluation_results"] * number}))
        try:
            assert len(public_records.read(record, run_folders.STUDY)) == number
            assert problem is None
        except UserError as error:
            assert error.problem == problem


def test_every_eval_evers_validator_accepts_a_record(run):
    validator = shutil.which("every_eval_ever")
    if validator is None:
        pytest.skip("`uv tool install every-eval-ever==0.3.0` installs what this needs")
    done = subprocess.run([validator, "validate", record_of(run)[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout  # 2 stands for warnings


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that opens pull requests."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    with serving(monkeypatch) as server, as_hub(server, tmp_path / "cache", monkeypatch):
        mode = {"path": public_records.EVAL_RESULTS, "uploadMode": "regular", "shouldIgnore": False}
        page = f"{constants.ENDPOINT}/{MODEL}"
        commit = {"commitUrl": f"{page}/commit/1", "commitOid": "1", "pullRequestUrl": f"{page}/discussions/7"}
        server.files["preupload/main?create_pr=1"] = orjson.dumps({"files": [mode]})
        server.files["commit/main?create_pr=1"] = orjson.dumps(commit)
        yield server


def not_trained_here(run: RunDir) -> None:
    run.write(run.read().model_copy(update={"published_adapter": f"{MODEL}@{'c' * 40}"}))


def test_scores_of_somebody_elses_adapter_are_proposed_in_a_pull_request(run, hub, capsys):
    not_trained_here(run)
    assert publish.propose(run, MODEL) == f"{constants.ENDPOINT}/{MODEL}/discussions/7"
    entries = public_records.hub_entries(card_of(run))
    assert capsys.readouterr().err == f"pull request to {MODEL}:\n{entries}\n"
    assert ["Bearer hf_of_the_user" in headers.values() for headers in hub.seen[-2:]] == [True, True]
    assert list(hub.posted) == [f"/api/models/{MODEL}/{part}/main?create_pr=1" for part in ("preupload", "commit")]
    header, file = (json.loads(line)["value"] for line in hub.posted[list(hub.posted)[1]].splitlines())
    assert file["path"] == public_records.EVAL_RESULTS
    assert base64.b64decode(file["content"]).decode() == entries
    assert "source" not in yaml.safe_load(entries)[0]  # the hub links to the pull request
    assert header["summary"] == "Add scores by qlora-recipes"
    record = json.loads(header["description"].removeprefix("```json\n").removesuffix("```"))
    assert record["source_metadata"]["evaluator_relationship"] == "third_party"
    assert record["model_info"]["id"] == MODEL


def test_only_scores_of_the_named_adapter_are_proposed(run, hub):
    other = "name the adapter of `recipe evaluate RECIPE --adapter OWNER/NAME`"
    with pytest.raises(UserError) as raised:
        publish.propose(run, MODEL)
    assert str(raised.value) == f"--pr {MODEL}: the run scored an adapter that was trained here; {other}"
    not_trained_here(run)
    with pytest.raises(UserError) as raised:
        publish.propose(run, "someone/other")
    assert str(raised.value) == f"--pr someone/other: the run scored {MODEL}@{'c' * 40}; {other}"
    add_scores(run, gsm8k=a_benchmark("gsm8k", rows=100))
    with pytest.raises(UserError) as raised:
        publish.propose(run, MODEL)
    assert str(raised.value) == (
        f"{run.path}: no score of a benchmark that the hub registers; run `recipe evaluate {run.quoted} --metric "
        "benchmark:gsm8k`"
    )
    assert hub.posted == {}


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (403, UserError, "--pr: no write access to {}; give a token with access by `hf auth login` or HF_TOKEN"),
        (400, WorkFailed, "{}: not uploaded: Bad request for commit endpoint: no; repeat the command"),
    ],
)
def test_a_refused_proposal(run, hub, status, error, message):
    not_trained_here(run)
    hub.refusals["commit/main?create_pr=1"] = status, "", "no"
    with pytest.raises(error) as raised:
        publish.propose(run, MODEL)
    assert str(raised.value) == message.format(MODEL)
