"""An eval loss has a verdict only if it covers the tokens of the recipe."""

from pathlib import Path
from typing import Any

import pytest
from conftest import typed
from run_folders import a_run, configure

from qlora_recipes.base.errors import UserError
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.config.merging import Difference, Source
from qlora_recipes.data import studies
from qlora_recipes.results import export_records, listing, study_tables, verdict
from qlora_recipes.results.run_result import RunResult, other_settings
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.training.run_record import Summary

STUDY = studies.find("tinker-tulu3")
RECIPE = "tinker-tulu3/llama-3.2-1b-lora"
OWN = {"count": 300, "sha256": "a" * 64}
OTHER = {"count": 900, "sha256": "b" * 64}


def a_loss(
    runs: Path, name: str, tokens: dict[str, Any] | None, sets: tuple[str, ...] = (), profile: tuple[str, ...] = ()
) -> RunDir:
    """A finished run with the differences that composition finds, and an eval loss over some tokens."""
    summary = Summary(eval_loss_per_token=0.78, eval_tokens=tokens)
    folder = a_run(runs, RECIPE, name, 0, scores={"rows": 0}, summary=summary)
    (folder.path / "scores.json").unlink()
    run = folder.read()
    run.differences = compose(Request(RECIPE, overrides=typed(*sets), profiles=[*profile])).differences
    folder.write(run)
    return folder


def difference(folder: RunDir) -> float | None:
    result = RunResult(folder, folder.read())
    assert result.score(result.columns["nll"]) == 0.78
    return result.scores["nll"].difference


HARMFUL = ["train_on_inputs=true", "sequence_len=512", "eval_sequence_len=512", "excess_length_strategy=drop",
           "test_datasets.0.type=alpaca", "min_sample_len=20", "eot_tokens=[x]", "special_tokens.pad_token=x",
           "tokenizer_config=other/model", "dataset_exact_deduplication=true", "chat_template=chatml",
           "test_datasets.0.split=train[:9]", "val_set_size=0.05", "some_key_of_the_future=1"]  # fmt: skip
HARMLESS = ["lora_r=4", "learning_rate=1e-4", "optimizer=adamw_torch_fused", "micro_batch_size=2", "bf16=false",
            "use_wandb=true", "sample_packing=true", "seed=7", "gradient_accumulation_steps=8"]  # fmt: skip


@pytest.mark.parametrize("change", HARMFUL)
def test_a_setting_that_may_change_the_tokens_leaves_no_verdict(tmp_path, change):
    folder = a_loss(tmp_path, "1", OWN, (change,))
    assert difference(folder) is None
    (row,) = [row for row in verdict.rows(STUDY, tmp_path, False) if row.recipe == RECIPE]
    assert row.scores["nll"].value == 0.78
    assert row.scores["nll"].verdict is None
    reason = f"the eval loss may cover other tokens than the recipe's, by {change.partition('=')[0]}"
    note = f"{RECIPE} is not compared with the published eval loss: {reason}."
    assert note in list(study_tables.notes(STUDY, [row]))


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_settings_keep_the_verdict(tmp_path, change):
    assert difference(a_loss(tmp_path, "1", OWN, (change,))) == pytest.approx(0.78 - 0.7763)


HELD_OUT: dict[str, Any] = {"val_set_size": 0.1, "test_datasets": None}


@pytest.mark.parametrize(
    ("changes", "is_compared"),
    [
        pytest.param(HELD_OUT, True, id="the last rows"),
        pytest.param(HELD_OUT | {"shuffle_merged_datasets": None}, False, id="shuffled by default"),
        pytest.param(HELD_OUT | {"shuffle_before_merging_datasets": True}, False, id="shuffled one by one"),
        pytest.param({"test_datasets": [{"path": "rows.jsonl", "shards": 4}]}, False, id="a shard"),
        pytest.param({"test_datasets": [{"path": "rows.jsonl", "weight": 0.5}]}, False, id="a share"),
        pytest.param({"datasets": [{"path": "rows.jsonl", "weight": 0.5}]}, True, id="a share of the training rows"),
    ],
)
def test_another_seed_may_hold_out_other_rows(tmp_path, changes, is_compared):
    folder = a_loss(tmp_path, "1", OWN, ("seed=7",))
    configure(folder, **changes)
    assert (difference(folder) is not None) == is_compared


def test_a_seed_beside_a_recipe_without_one_is_a_setting(tmp_path):
    run = a_loss(tmp_path, "1", OWN).read()
    default, other = Source("default"), Source("override", "seed", "7")
    run.differences = [Difference(key="seed", run=42, source=default)]
    assert other_settings(run) == {}
    run.differences = [Difference(key="seed", run=7, source=other)]
    assert other_settings(run) == {"seed": 7}


@pytest.mark.parametrize("profile", ["mirror", "mlflow"])
def test_a_profile_that_leaves_the_settings_keeps_the_verdict(tmp_path, profile):
    assert difference(a_loss(tmp_path, "1", OWN, profile=(profile,))) == pytest.approx(0.78 - 0.7763)


def test_a_run_whose_loss_is_not_compared_has_no_record(tmp_path):
    folder = a_loss(tmp_path, "1", OWN, ("train_on_inputs=true",))
    reason = "the eval loss may cover other tokens than the recipe's, by train_on_inputs"
    assert listing.record(RunResult(folder, folder.read()))["incomparable_loss"] == reason
    with pytest.raises(UserError) as raised:
        export_records.export_run(folder)
    assert str(raised.value) == f"{folder.path}: not exported: {reason}"


def test_a_rehearsal_has_no_loss_to_compare(tmp_path):
    rehearsal = a_loss(tmp_path, "1", OTHER, ("sequence_len=512",)).read().model_copy(update={"rehearsal": True})
    assert RunResult(RunDir(tmp_path), rehearsal).incomparable_loss is None


def test_an_eval_loss_that_is_no_mean_over_tokens_says_so(tmp_path):
    folder = a_loss(tmp_path, "1", None)
    run = folder.read()
    run.summary = Summary(eval_loss=0.8)
    folder.write(run)
    assert RunResult(folder, run).incomparable_loss == (
        "the scored tokens are unknown under tensor or context parallelism, and for streamed rows"
    )


TRAINERS = "evolcodellama/codellama-7b-qlora"


def a_trainers_loss(runs: Path, loss: float, *sets: str) -> RunResult:
    """A finished run with other losses per token and of the Trainer."""
    summary = Summary(eval_loss=loss, eval_loss_per_token=0.9, eval_tokens=OWN)
    folder = a_run(runs, TRAINERS, "1", 0, scores={"rows": 0}, summary=summary)
    (folder.path / "scores.json").unlink()
    run = folder.read()
    run.differences = compose(Request(TRAINERS, overrides=typed(*sets))).differences
    folder.write(run)
    return RunResult(folder, run)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        pytest.param("lora_r=8", None, id="the adapter"),
        pytest.param("micro_batch_size=1", None, id="a batch in training, because eval_batch_size is set"),
        pytest.param("eval_batch_size=1", "eval_batch_size", id="a batch"),
        pytest.param("eval_sample_packing=false", "eval_sample_packing", id="packing"),
        pytest.param("multipack_real_batches=true", "multipack_real_batches", id="packs of a batch"),
        pytest.param("seed=7", None, id="a seed, because the rows keep their order"),
    ],
)
def test_the_trainers_loss_needs_the_recipes_batches(tmp_path, change, key):
    result = a_trainers_loss(tmp_path, 0.3797, change)
    assert result.score(result.columns["trainer_loss"]) == 0.3797
    if key is None:
        assert result.incomparable_loss is None
        assert result.scores["trainer_loss"].difference == pytest.approx(0.0001)
    else:
        reason = f"the Trainer's eval loss is a mean over batches, which differ from the recipe's by {key}"
        assert result.incomparable_loss == reason
        assert result.scores["trainer_loss"].difference is None


def test_a_seed_that_orders_the_rows_puts_others_into_a_batch(tmp_path):
    result = a_trainers_loss(tmp_path, 0.3797, "seed=7")
    shuffled = {"val_set_size": None, "test_datasets": [{"path": "rows.jsonl"}], "shuffle_merged_datasets": True}
    configure(result.folder, **shuffled)
    assert result.incomparable_loss == (
        "the Trainer's eval loss is a mean over batches, which differ from the recipe's by seed"
    )


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        pytest.param(0.3798, verdict.WITHIN, id="near the repeats"),
        pytest.param(0.3840, verdict.ACCEPTABLE, id="within the tolerance"),
        pytest.param(0.3860, verdict.OFF, id="off"),
    ],
)
def test_published_repeats_give_the_verdict_an_interval(tmp_path, loss, words):
    a_trainers_loss(tmp_path, loss)
    (row,) = [row for row in verdict.rows(studies.find("evolcodellama"), tmp_path, False) if row.chosen]
    score = row.scores["trainer_loss"]
    assert score.verdict == words
    assert score.interval is not None
    assert (
        score.interval.method
        == "a run-to-run standard deviation of 5.8e-05 from 3 published repeats, 0.3796 to 0.3797 (Student's t)"
    )
