from dataclasses import replace
from pathlib import Path

import pytest
from conftest import typed

from qlora_recipes.base.errors import UserError
from qlora_recipes.config import compose, datafiles
from qlora_recipes.config.compose import Request
from qlora_recipes.config.merging import Source
from qlora_recipes.config.training_settings import TrainingSettings
from qlora_recipes.run import run
from qlora_recipes.run.rundir import RunDir

NAME = "haider2024/llama-2-7b"
OF_TRAINING = ["learning_rate", "lora_r", "adapter", "liger_rope", "optimizer", "eval_steps", "wandb_name", "bf16"]
OF_ROWS = ["seed", "excess_length_strategy", "min_sample_len", "eval_sequence_len", "eval_sample_packing", "a_new_key"]


@pytest.fixture
def place(place: Path) -> Path:
    (place / "data").mkdir()
    for name in ("a", "b"):
        (place / "data" / f"{name}.jsonl").write_text('{"output": "a"}\n\n')
    return place


def test_rows_are_prepared_anew_after_a_change_of_data_or_of_a_setting_that_may_affect_them(place):
    def prepared(*more: str) -> str:
        overrides = ["datasets.0.path=data/a.jsonl", "test_datasets=null", *more]
        composed = compose.compose(Request(NAME, overrides=typed(*overrides)))
        composed.data = datafiles.record(composed.config)
        return str(run.launch_config(composed, RunDir(Path("runs", NAME, "now")))["dataset_prepared_path"])

    before = prepared()
    assert {prepared(f"{key}=7") for key in OF_TRAINING} == {before}
    assert len({prepared(f"{key}=7") for key in OF_ROWS} - {before}) == len(OF_ROWS)
    (place / "data" / "a.jsonl").write_text('{"output": "other"}\n')
    assert prepared() != before


@pytest.mark.parametrize(
    ("key", "file"),
    [("chat_template_jinja", "t.jinja"), ("deepspeed", "ds.json"), ("base_model", "model/tokenizer.json")],
)
def test_another_content_of_a_file_that_a_config_names_is_another_config(place, key, file):
    request = Request(NAME, overrides=typed(f"{key}={file.partition('/')[0]}"))
    composed = compose.compose(request)
    (place / file).parent.mkdir(exist_ok=True)
    (place / file).write_text("{}")
    before, record = {composed.digest, composed.rows_digest}, run.record_of(composed, request)
    assert {composed.digest, composed.rows_digest} == before
    assert record.changed_data is None
    (place / file).write_text("{ }")
    assert not {composed.digest, composed.rows_digest} & before
    assert record.changed_data == place / file


def test_a_config_without_a_seed_gets_axolotls_own(place):
    (place / "own.yaml").write_text("base_model: m\nadapter: lora\n")
    composed = compose.compose(Request("own.yaml"))
    assert composed.config["seed"] == 42
    assert [difference.key for difference in composed.differences] == ["seed"]


def test_a_mirror_is_a_difference(place):
    changes = {d.key: (d.run, d.source.text) for d in compose.compose(Request(NAME, ["mirror"])).differences}
    assert changes["base_model"] == ("NousResearch/Llama-2-7b-hf", "profile mirror")
    (place / "own.yaml").write_text("base_model: meta-llama/Llama-2-7b-hf\ntokenizer_config: meta-llama/Llama-3.2-3B\n")
    assert compose.compose(Request("own.yaml", ["mirror"])).config["tokenizer_config"] == "unsloth/Llama-3.2-3B"
    assert changes["revision_of_model"] == (None, "profile mirror")


def test_a_rehearsal_in_one_process_drops_parallelism():
    request = Request(NAME, profiles=["zero2"], rehearse=True)
    composed = compose.compose(request)
    assert "deepspeed" not in composed.config
    assert compose.compose(replace(request, gpus=2)).config["deepspeed"]["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "override",
    [
        "sample_packing=true",
        "datasets=[{path: data, type: alpaca}]",
        "datasets.0={path: data/a.jsonl, split: 'train[:9%]'}",
    ],
)
def test_a_rehearsal_shortens_a_warm_up_also_where_its_steps_are_not_known(place, override):
    composed = compose.compose(Request(NAME, overrides=typed(override), rehearse=True))
    assert datafiles.training_steps(composed.config) is None
    changed = {d.key: (d.recipe, d.run) for d in composed.differences if d.key.startswith("warmup_")}
    assert changed == {"warmup_steps": (10, None), "warmup_ratio": (None, 0.1)}


@pytest.mark.parametrize(
    ("gpus", "change", "key", "expected"),
    [
        (2, [], "gradient_accumulation_steps", 2),
        (4, [], "gradient_accumulation_steps", 1),
        (8, ["micro_batch_size=1", "gradient_accumulation_steps=8"], "gradient_accumulation_steps", 1),
    ],
)
def test_steps_keep_their_rows_on_several_gpus(gpus, change, key, expected):
    composed = compose.compose(Request(NAME, overrides=typed(*change), gpus=gpus))
    assert composed.config[key] == expected
    assert TrainingSettings.of(composed.config).rows_per_step * gpus == 8
    (difference,) = (one for one in composed.differences if one.key == key)
    assert difference.source == Source("gpus", f"--gpus {gpus}", "keeps the number of rows per step")


@pytest.mark.parametrize(
    ("gpus", "change", "problem"),
    [
        pytest.param(3, [], "gradient_accumulation_steps is 4, not a multiple of 3", id="3-gpus"),
        pytest.param(8, [], "gradient_accumulation_steps is 4, not a multiple of 8", id="8-gpus"),
    ],
)
def test_a_step_whose_rows_cannot_be_divided_is_refused(gpus, change, problem):
    with pytest.raises(UserError) as refused:
        compose.compose(Request(NAME, overrides=typed(*change), gpus=gpus))
    remedy = "use --set to choose a multiple, and perhaps a smaller micro_batch_size"
    assert str(refused.value) == f"--gpus {gpus}: {problem}; {remedy}"


@pytest.mark.parametrize(
    ("changes", "bf16", "fp16"),
    [([], False, True), (["bf16=true", "fp16=false"], True, False), (["fp16=false"], False, False)],
)
def test_deepspeed_gets_the_configs_precision(changes, bf16, fp16):
    """ZeRO-3 reads "auto" as off, and then keeps an unquantized model in fp32."""
    composed = compose.compose(Request("haider2024/llama-3-8b", ["zero3"], typed(*changes)))
    assert composed.config["deepspeed"]["bf16"] == {"enabled": bf16}
    assert composed.config["deepspeed"]["fp16"] == {"enabled": fp16}
    in_bf16 = typed("bf16=true")
    on_a_cpu = compose.compose(Request("haider2024/llama-3-8b", ["zero3"], in_bf16, rehearse=True, gpus=2))
    assert on_a_cpu.config["deepspeed"]["bf16"] == {"enabled": True}
