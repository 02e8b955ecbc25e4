"""Weights, gradients and optimizer state on each of two real ranks, compared with a plan."""

import orjson
import pytest
from conftest import config_with, train_many
from planned_memory import kept_by_rank
from shard_plugin import SHARDS

from qlora_recipes.base import yamlfiles
from qlora_recipes.config import gpus
from qlora_recipes.config.gpus import parallelism_of
from qlora_recipes.plan import step_plan

pytestmark = pytest.mark.long

FULL = {key: None for key in ("adapter", "load_in_4bit", "bnb_config_kwargs", "lora_target_modules")}
SAVED = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("profile", "change"),
    [
        ("zero2", FULL | {"optimizer": "adamw_bnb_8bit"}),  # its embedding too has 8-bit state
        ("zero2", FULL | {"bf16": False}),
        ("zero3", FULL),
        ("zero3", SAVED),
        ("fsdp2", FULL),
        ("fsdp2", {}),
    ],
    ids=["zero2 8-bit", "zero2 fp32", "zero3 full", "zero3 saved modules", "fsdp2 full", "fsdp2 qlora"],
)
def test_two_ranks_keep_what_is_planned(tmp_path, tiny, sample, profile, change):
    from qlora_recipes.config.compose import Request, compose

    common = {
        "base_model": str(tiny),
        "revision_of_model": None,
        "special_tokens": {"pad_token": "</s>"},
        "datasets": [{"path": str(sample / "train.jsonl"), "type": "alpaca", "split": "train[:16]"}],
        **dict.fromkeys(("test_datasets", "evals_per_epoch", "saves_per_epoch", "warmup_ratio")),
        **{"save_strategy": "no", "sequence_len": 128, "excess_length_strategy": "truncate", "num_epochs": 1},
        **{"max_steps": 1, "fp16": False, "bf16": True, "micro_batch_size": 1, "gradient_accumulation_steps": 4},
        **{"optimizer": "adamw_torch_fused", "output_dir": str(tmp_path / "output")},
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "plugins": ["qlora_recipes.plugin.RunPlugin", "shard_plugin.ShardPlugin"],
    }
    file = tmp_path / "config.yaml"
    file.write_text(yamlfiles.write_yaml(config_with(common | change)))
    config = compose(Request(str(file), [profile], gpus=2)).config
    config = {key: value for key, value in config.items() if value is not None} | {
        key: common[key] for key in ("output_dir", "dataset_prepared_path", "plugins")
    }
    file.write_text(yamlfiles.write_yaml(config))
    train_many(file, ranks=2)
    shards = orjson.loads((tmp_path / SHARDS).read_bytes())
    step, _ = step_plan.plan_step(config, gpus.Gpu("card", (8, 0), 80))
    constants = step.memory.usage.parts.get("quantization constants", 0)  # no parameters, so the plugin misses them
    planned = kept_by_rank(step, 2)[parallelism_of(config)] - constants / 2
    print(f"{profile}: planned {planned:,.0f}, measured {sum(shards.values()):,} bytes: {shards}")
    assert sum(shards.values()) == pytest.approx(planned, rel=0.02)
