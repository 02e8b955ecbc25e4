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
from qlora_recipes.results import public_records, publish
from qlora_recipes.results.card import Card
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir

MODEL = "someone/Adapter-7B"
MOMENT = "2026-01-01T11:00:00+00:00"
NOTES = "lm-evaluation-harness 0.4.9, gsm8k version 3, 5-shot, exact_match with strict-match"


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
    assert values == {("hellaswag", 61.2346), (card_of(run).scored_on, 5.125), (card_of(run).scored_on, 1.25)}


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
    uncertainty = results["gsm8k"]["score_details"]["uncertainty"]
    assert (uncertainty["num_samples"], uncertainty["standard_error"]) == (1319, {"value": 1.3})
    assert results["gsm8k"]["score_details"]["details"] == {"conditions": NOTES}


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
