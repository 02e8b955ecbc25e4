"""Work of a training: the tokens that a plan counts, their source, and the operations per token."""

from pathlib import Path
from typing import Any

import pytest
from conftest import config_with, typed

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.hub import importing_axolotl
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.plan import plan, work

PUBLISHED = "peft-metamathqa/lora-rank32"


@pytest.fixture
def recipe_file(tiny: Path, sample: Path, tmp_path: Path) -> Path:
    data = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": {"pad_token": "</s>"}}
    file = tmp_path / "mine.yaml"
    config = config_with(change | {"datasets": data, "test_datasets": None, "evals_per_epoch": None})
    file.write_text(yamlfiles.write_yaml(config))
    return file


def counted(file: Path | str, *overrides: str) -> work.Lengths:
    return work.counted(compose(Request(str(file), overrides=typed(*overrides))))


def evaluation_rows(file: Path, override: str) -> list[int]:
    """Lengths of the rows that Axolotl holds out."""
    config = compose(Request(str(file), overrides=typed(override))).config
    with importing_axolotl():
        from qlora_recipes.training.tokens import Tokenizer

        tokenizer = Tokenizer(config | {"dataset_prepared_path": str(file.with_name("prepared"))})
        held_out = tokenizer.held_out()
        return [len(tokenizer.tokenize(dataset, [row])[0].ids) for dataset, row in held_out]


def published(**change: Any) -> work.Lengths | None:
    return work.published(compose(Request(PUBLISHED, **change)))


def test_rows_are_counted_as_they_are_trained_on(recipe_file):
    all_rows = counted(recipe_file)
    assert all_rows.rows == 109
    assert all_rows.tokens < all_rows.padded < 1.5 * all_rows.tokens
    assert counted(recipe_file, "val_set_size=0.5").rows == 54
    assert counted(recipe_file, "sequence_len=300").rows < 109  # the others are dropped
    assert counted(recipe_file, "datasets.0.split=train[50:]", "datasets.0.weight=0.5").rows == 29
    assert counted(recipe_file, "datasets.0.type=completion", "datasets.0.field=output", "sequence_len=16").rows > 109


def test_tokens_are_those_of_the_rows_left_for_training(recipe_file, sample, tmp_path):
    """Held-out rows are longer or shorter than others, so a share of all tokens would be wrong."""
    rows = (sample / "train.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(rows * 2)
    all_rows = counted(recipe_file)
    trained = counted(recipe_file, "val_set_size=20")
    held_out = evaluation_rows(recipe_file, "val_set_size=20")
    assert len(held_out) == 20
    assert trained.rows == all_rows.rows - 20
    assert trained.tokens == all_rows.tokens - sum(held_out)
    assert trained.tokens != round(all_rows.tokens * 89 / 109)
    once = counted(recipe_file, f"datasets.0.path={tmp_path / 'twice.jsonl'}", "dataset_exact_deduplication=true")
    assert once.rows == all_rows.rows
    assert once.tokens == all_rows.tokens


def test_hours_count_padding(recipe_file):
    planned = plan.plan_request(Request(str(recipe_file)), gpus.find_gpu("T4"), data=True)
    lengths, estimate, config = counted(recipe_file), planned.work, yamlfiles.read_yaml(recipe_file)
    per_token = work.flops_of_token(plan.plan(config)[1], round(lengths.padded / lengths.rows))
    hours = lengths.padded * config["num_epochs"] * per_token / (65e12 * work.UTILIZATION) / 3600
    assert estimate
    assert estimate.hours == pytest.approx(hours, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({}, 4198051),
        (
            {"overrides": typed("micro_batch_size=2", "gradient_accumulation_steps=2")},
            4198051,
        ),  # padding aside
        ({"profiles": ["packed"]}, 4198051),
        ({"profiles": ["mirror"]}, 4198051),
        *(
            ({"overrides": typed(change)}, None)
            for change in (
                *("sequence_len=512", "base_model=meta-llama/Llama-2-7b-hf"),
                *("val_set_size=0.5", "datasets.0.path=mine.jsonl", "datasets.0.split=train[:100]"),
                "special_tokens.bos_token=<s>",
            )
        ),
    ],
)
def test_a_studys_own_count_is_taken_for_its_own_rows_and_tokenizer(change, tokens):
    lengths = published(**change)
    assert (lengths.tokens if lengths else None) == tokens


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "datasets.0.path=none.jsonl",
            "--all-rows: datasets.0: its rows are not on this machine; leave --all-rows out",
        ),
        (
            "datasets=[{path: broken.jsonl, type: alpaca}, {path: tatsu-lab/alpaca, type: alpaca}]",
            "--all-rows: datasets.1: its rows are not on this machine; leave --all-rows out",
        ),
        (
            "datasets.0.path=rows.parquet",
            "--set datasets.0.path=rows.parquet: error: datasets.0.path: rows.parquet is empty; write rows to it, or "
            "name another file [missing-file:datasets.0.path]",
        ),
        (
            "datasets.0.path=broken.jsonl",
            "broken.jsonl:2: error: datasets.0.path: 1 row: not JSON in UTF-8 (unexpected end of data); correct or "
            "drop these rows [bad-row:datasets.0.path]",
        ),
        ("sequence_len=8", "--all-rows: sequence_len and val_set_size leave no training rows; leave --all-rows out"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(recipe_file, place, override, message):
    (place / "rows.parquet").touch()
    (place / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    with pytest.raises(UserError) as refused:
        counted(recipe_file, override)
    assert str(refused.value) == message


def test_steps_of_packed_rows_are_of_full_sequences(recipe_file):
    config = yamlfiles.read_yaml(recipe_file)
    step = config["micro_batch_size"] * config["gradient_accumulation_steps"] * config["sequence_len"]
    estimate = plan.plan_request(Request(str(recipe_file), overrides=typed("max_steps=3", "sample_packing=true"))).work
    assert estimate
    assert estimate.tokens == 3 * step


@pytest.mark.long
def test_hours_are_near_those_of_published_runs():
    """PEFT's run of a rank of 32 trained for 585.2 s on an L40S; with every row as a full one it would be 1,880 s."""
    planned = plan.plan_request(Request("peft-metamathqa/lora-rank32"), gpus.find_gpu("L40S"))
    assert planned.work and planned.work.hours
    assert planned.work.hours * 3600 == pytest.approx(585.2, rel=0.2)
