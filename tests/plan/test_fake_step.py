"""A plan's memory against measured memory: published figures, and real Axolotl trainings on this CPU."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import compare_memory
import orjson
import pytest
import torch
from conftest import SMALL, config_with, recipe_config, train_many
from families import BUILT_IN, TINY
from memory_plugin import MEMORY, peak
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import write_rows
from qlora_recipes.base.yamlfiles import Config
from qlora_recipes.config import models
from qlora_recipes.plan import allocator, fake_step, step_plan
from qlora_recipes.plan import steps as steps_of
from qlora_recipes.plan.fake_step import trace
from qlora_recipes.plan.steps import Step

ALL_LINEAR = models.LINEAR_LAYERS


def usage(step: Step, shape: allocator.Shape = (2, 128)) -> allocator.Usage:
    return allocator.usage(trace(step, shape))


def parameters(step: Step) -> dict[str, int]:
    with fake_step._fake(step):
        counts = fake_step._count(fake_step._build(step, fake_step.Recorder())).values()
    return {kind: sum(count[kind] for count in counts) for kind in ("frozen", "trainable")}


QUERIES_AND_VALUES = ("q_proj", "v_proj")
# huggingface/peft@5d602fd, method_comparison/MetaMathQA/results: reserved bytes; test_published_log has the adapters'
PEFTS_RUNS = [
    ({"rank": 32, "targets": QUERIES_AND_VALUES}, 20_120_076_288),
    ({"rank": 64, "targets": QUERIES_AND_VALUES}, 20_369_637_376),
    ({"rank": 32, "targets": QUERIES_AND_VALUES, "dora": True}, 22_179_479_552),
    ({"rank": 10, "targets": ("gate_proj", "up_proj", "down_proj")}, 22_064_136_192),
]


def of_recipe(name: str) -> Step:
    config = recipe_config(name)
    return steps_of.step_of(config, models.architecture(config), (8, 0))[0]


def of_pefts_comparison(change: dict[str, Any]) -> Step:
    """The step of a run of PEFT's comparison: weights in bf16, a plain loop, an L40S."""
    kind: dict[str, Any] = {"weights": "bfloat16", "autocast": None, "dropout": 0.0, "optimizer": "adamw_torch"}
    kind |= {"axolotl": False, "padded": True, "accumulates": False, "capability": (8, 9)}
    return replace(of_recipe("peft-metamathqa/lora-rank32"), checkpointing=None, **kind, **change)


def on_the_head(model: str, rank: int) -> Step:
    architecture = json.dumps(models.architecture({"base_model": f"meta-llama/Llama-{model}"}))
    return replace(of_recipe("start/qlora"), model=architecture, rank=rank, targets=(*ALL_LINEAR, "lm_head"))


def of_family(config: Config) -> Step:
    return replace(of_recipe("start/qlora"), model=json.dumps(config), targets="all-linear")


TRAINED = {  # this project's own counts; the authors give none
    "dora-commonsense/llama-2-7b-lora": 56_098_816,
    "dora-commonsense/llama-2-7b-dora": 56_975_360,
    "dora-commonsense/llama-3-8b-lora": 56_623_104,
    "dora-commonsense/llama-3-8b-dora": 57_409_536,
    "loraga-metamathqa/llama-2-7b-lora": 19_988_480,
    "loraga-metamathqa/llama-2-7b-dora": 21_348_352,
    "pissa-metamathqa/llama-2-7b-lora": 319_815_680,
    "pissa-metamathqa/llama-2-7b-pissa": 319_815_680,
}
PARAMETERS = [
    *((of_recipe(name), "trainable", trained) for name, trained in TRAINED.items()),
    *((of_family(config), "frozen", frozen) for config, frozen in BUILT_IN.values()),
    # thinking-machines-lab/tinker-cookbook@ece68c2a, hyperparam_utils.py; two share a matrix between both ends
    (on_the_head("3.2-1B", 128), "trainable", 128 * 834_816),
    (on_the_head("3.2-3B", 64), "trainable", 64 * 1_650_944),
    (on_the_head("3.1-8B", 4), "trainable", 4 * 2_753_792),
]


@pytest.mark.parametrize(("step", "kind", "published"), PARAMETERS)
def test_parameters_are_the_published_ones(step, kind, published):
    assert parameters(step)[kind] == published


def test_a_plan_does_not_depend_on_what_the_process_quantized_before(monkeypatch):
    step = replace(of_recipe("start/qlora"), model=json.dumps(SMALL))
    fresh = usage(step)
    monkeypatch.setitem(bnb.functional.name2qmap, "dynamic", torch.zeros(256))  # as by a quantization
    assert usage(step) == fresh


@pytest.mark.long
def test_one_length_of_rows_explains_the_memory_of_all_of_pefts_runs():
    """They publish the 99th percentile of what steps reserved, but not how long the rows of that step were."""
    shape = (4, 576)
    planned = [usage(of_pefts_comparison(change), shape).reserved for change, _ in PEFTS_RUNS]
    ratios = [plan / reserved for plan, (_, reserved) in zip(planned, PEFTS_RUNS, strict=True)]
    print(f"planned at {shape} over measured: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    assert max(ratios) - min(ratios) <= 0.005
    assert ratios == pytest.approx([1.0] * len(ratios), abs=0.02)


@pytest.mark.long
def test_published_figures_of_the_plain_loop_are_met():
    """Of each model the longest rows; `make compare-memory` takes all."""
    loops = (figure for figure in compare_memory.figures() if figure["framework"] == "plain loop")
    figures = {figure["model"]: figure for figure in loops}.values()
    errors = [abs(compare_memory.planned(figure) / float(figure["mib"]) - 1) for figure in figures]
    assert len(errors) == 6
    assert sum(errors) / len(errors) <= 0.005
    assert max(errors) <= 0.015


def measured(folder: Path, changes: dict[Any, Config]) -> dict[Any, dict[str, Any]]:
    """Records of the plugin in real trainings of two steps and, if they evaluate, of an evaluation, by name."""
    files = {}
    for i, (name, change) in enumerate(changes.items()):
        output = folder / str(i)
        output.mkdir()
        common = {
            "revision_of_model": None,
            "special_tokens": None,
            "eval_steps": 2,
            "evals_per_epoch": None,
            "saves_per_epoch": None,
            "save_strategy": "no",
            "excess_length_strategy": "truncate",
            "pad_to_sequence_len": True,
            "fp16": False,
            "max_steps": 2,
            "warmup_steps": 1,
            "output_dir": str(output / "output"),
            "dataset_prepared_path": str(folder / "prepared"),
            "plugins": ["qlora_recipes.plugin.RunPlugin", "memory_plugin.MemoryPlugin"],
        }
        files[name] = output / "config.yaml"
        files[name].write_text(yamlfiles.write_yaml(config_with(common | change)))
    train_many(*files.values())
    return {name: orjson.loads(file.with_name(MEMORY).read_bytes()) for name, file in files.items()}


def change_of(family: str, attention: str, bf16: bool, turn: int, tiny: Path, data: Path, folder: Path) -> Config:
    """The change of a recipe to a training of a small model of a family, each turn with other settings."""
    folder.mkdir()
    for file in tiny.glob("*token*"):
        shutil.copy(file, folder)
    sizes = TINY.get(family, SMALL | {"tie_word_embeddings": True})
    dtype = torch.bfloat16 if bf16 else torch.float32
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=dtype).save_pretrained(folder)
    return {
        "base_model": str(folder),
        "special_tokens": {"pad_token": "</s>"},
        "datasets": [{"path": str(data), "type": "alpaca", "split": "train[:16]"}],
        "test_datasets": [{"path": str(data), "type": "alpaca", "split": f"train[:{ROWS}]"}],
        "eval_batch_size": ROWS,
        "eval_sequence_len": LENGTHS[turn % 2] - 64,
        "sequence_len": 320,  # most rows are shorter
        "bf16": bf16,
        "attn_implementation": attention,
        "lora_target_modules": None,
        "lora_target_linear": True,
        "gradient_checkpointing": turn % 2 == 0,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if turn % 2 == 0 else None,
        "gradient_accumulation_steps": 1 + turn % 3,
        "optimizer": ("paged_adamw_32bit", "adamw_torch", "adamw_bnb_8bit")[turn // 2 % 3],
    }


ROWS, LENGTHS = 12, (320, 640)
"""Rows of an evaluation batch, so many that it needs more memory than a training step, and their padded tokens."""


@pytest.mark.long
def test_real_trainings_of_axolotls_allocate_what_is_planned(tmp_path, tiny, sample):
    attention = {"gemma2": "eager"}  # which alone caps its scores
    by_family = [(family, attention.get(family, "sdpa"), False) for family in TINY]
    kinds = [("llama", "sdpa", True), ("llama", "sdpa", False), *by_family]
    data = sample / "train.jsonl"
    changes = {turn: change_of(*kind, turn, tiny, data, tmp_path / f"model-{turn}") for turn, kind in enumerate(kinds)}
    (tmp_path / "runs").mkdir()
    for turn, real in measured(tmp_path / "runs", changes).items():
        config = config_with(changes[turn] | {"fp16": False, "pad_to_sequence_len": True})
        step, notes = steps_of.step_of(config, models.architecture(config), (8, 0))
        evaluation = step_plan.plan_step(config, None)[0].evaluation
        assert evaluation == (ROWS, LENGTHS[turn % 2])
        fake = trace(replace(step, capability=None), (2, 320), evaluation)
        left = dict(fake.loaded)  # a size of -1 where freed again
        loaded = sum(size for i, size in left.items() if size > 0 and fake.kinds[i] != "optimizer")
        planned, allocated = peak(fake.loaded + fake.step), real["allocated"]
        print(f"{kinds[turn]}: planned {planned:,}, measured {allocated:,} bytes, {allocated / planned - 1:+.2%}")
        assert planned == pytest.approx(allocated, rel=0.01 if kinds[turn][2] else 0.001), kinds[turn]
        in_evaluation, allocated = peak(fake.loaded + fake.evaluation), real["evaluation"]["allocated"]
        print(f"  evaluation: {in_evaluation:,}, measured {allocated:,} bytes, {allocated / in_evaluation - 1:+.2%}")
        assert in_evaluation == pytest.approx(allocated, rel=0.001), kinds[turn]
        assert loaded == pytest.approx(real["loaded"], rel=0.005), kinds[turn]
        assert notes == []


PAIRS = {  # changes of a training on pairs
    "adapter off": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "adapters in fp32": {"adapter": "lora", "load_in_4bit": None},
    "SimPO": {"rl": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0},
    "ORPO": {"rl": "orpo"},
    "second model": {"adapter": None, "load_in_4bit": None, "optimizer": "adamw_torch"},
}


@pytest.mark.long
def test_real_trainings_on_pairs_allocate_what_is_planned(tmp_path, tiny):
    pairs, model = tmp_path / "pairs.jsonl", tmp_path / "model"
    chosen = " so" * 317  # 320 tokens with prompt, BOS and EOS
    write_rows(pairs, [{"prompt": "a", "chosen": chosen, "rejected": " not" * 9}] * 13)
    base = change_of("llama", "sdpa", False, 1, tiny, pairs, model)
    base |= {"rl": "dpo", "rl_beta": 0.1, "eval_sequence_len": None, "gradient_accumulation_steps": 1}
    base |= {"excess_length_strategy": "drop"}
    for section in ("datasets", "test_datasets"):
        base[section] = [{"path": str(pairs), "type": "passthrough", "split": "train"}]
    changes = {name: base | change for name, change in PAIRS.items()}
    as_they_are = [{"path": str(pairs), "split": "train"}]  # no type: ORPO's types need chats
    changes["ORPO"] |= {"datasets": as_they_are, "test_datasets": as_they_are}
    (tmp_path / "runs").mkdir()
    for name, real in measured(tmp_path / "runs", changes).items():
        config = config_with(changes[name] | {"fp16": False})
        plan, notes = step_plan.plan_step(config, None)
        assert (plan.shape, plan.evaluation, notes) == ((4, 320), (2 * ROWS, 320), [])
        fake = trace(replace(plan.step, capability=None), plan.shape, plan.evaluation, plan.pair_loss)
        left = dict(fake.loaded)
        loaded = sum(size for i, size in left.items() if size > 0 and fake.kinds[i] != "optimizer")
        for part, planned, allocated, within in (
            ("loaded", loaded, real["loaded"], 0.001),
            ("step", peak(fake.loaded + fake.step), real["allocated"], 0.01),
            ("evaluation", peak(fake.loaded + fake.evaluation), real["evaluation"]["allocated"], 0.01),
        ):
            print(f"{name}, {part}: planned {planned:,}, measured {allocated:,} bytes, {allocated / planned - 1:+.2%}")
            assert planned == pytest.approx(allocated, rel=within), (name, part)
