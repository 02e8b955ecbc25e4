import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, config_with, recipe_config, typed
from planned_memory import WEIGHTS, kept_by_rank

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.hardware import GIB
from qlora_recipes.check import check
from qlora_recipes.commands.plan import _print_plan, _print_plans
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request
from qlora_recipes.plan import allocator, plan, step_plan, steps, work
from qlora_recipes.plan.plan import Checkpoints
from qlora_recipes.plan.steps import PairLoss
from qlora_recipes.plan.work import TokenCount, Work

TURING, AMPERE = (7, 5), (8, 0)


def step_of(change: dict[str, Any]) -> Any:
    return steps.step_of(config_with(change), SMALL, TURING)[0]


def test_a_recipe_becomes_its_step():
    step, notes = steps.step_of(recipe_config("haider2024/llama-3-8b"), SMALL, TURING)
    assert step == steps.Step(
        model=json.dumps(SMALL, sort_keys=True),
        adapter="qlora",
        weights="float16",
        autocast="float16",
        rank=32,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        saved_modules=(),
        dora=False,
        fp32_adapters=True,
        dropout=0.05,
        quantization="nf4",
        double_quantization=True,
        checkpointing="non-reentrant",
        attention="sdpa",
        padded=True,
        packed=False,
        flat=False,
        accumulates=True,
        optimizer="adamw_bnb_8bit",
        chunked_loss=False,
        axolotl=True,
        capability=TURING,
    )
    assert notes == []


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"bf16": True, "fp16": None}, "weights", "bfloat16"),
        ({"fp16": False}, "weights", "float32"),
        ({"fp16": None, "float16": True, "adapter": None, "load_in_4bit": None}, "weights", "float16"),  # no scaler
        ({"gradient_checkpointing": None}, "checkpointing", None),
        ({"lora_target_linear": True}, "targets", "all-linear"),
        ({"gradient_accumulation_steps": 1}, "accumulates", False),
        ({"micro_batch_size": 1}, "padded", False),
        ({"sample_packing": True}, "packed", True),
        ({"sample_packing": True, "attn_implementation": "flash_attention_2"}, "packed", False),
        ({"chunked_cross_entropy": True}, "chunked_loss", True),
        ({"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, "double_quantization", False),
        ({"adapter": None, "load_in_4bit": None}, "weights", "float32"),
        ({"optimizer": "lion_8bit"}, "optimizer", "adamw_torch_fused"),
        ({"peft_use_dora": True}, "dora", True),
        ({"peft_autocast_adapter_dtype": False}, "fp32_adapters", False),
        ({"rl": "dpo", "lora_dropout": 0.1}, "dropout", 0.0),
        ({"rl": "dpo", "micro_batch_size": 1}, "padded", True),  # a pair has two rows
    ],
)
def test_settings_that_memory_depends_on(change, field, value):
    assert getattr(step_of(change), field) == value


LESS = "not traced; training needs less memory"
MORE = "not traced; training needs more memory"
OFFLOADED = {"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}
NOTES = [
    ({"adapter": None, "load_in_4bit": None}, "weights in fp32: the gradient scaler refuses gradients in fp16"),
    ({"optimizer": "lion_8bit"}, "optimizer lion_8bit: planned as adamw_torch_fused"),
    ({"attn_implementation": "flex_attention"}, "flex_attention: planned as flash_attention_2"),
    ({"liger_cross_entropy": True}, f"liger_cross_entropy: {LESS}"),
    ({"layer_offloading": True}, f"layer_offloading: {LESS}"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size: not planned; counted as 1"),
    (dict.fromkeys(steps._KERNELS), f"LoRA kernels, which Axolotl turns on by default: {LESS}"),
    ({"unfrozen_parameters": ["norm"]}, f"unfrozen_parameters: {MORE}"),
    ({"selective_checkpointing": True}, f"selective_checkpointing: {MORE}"),
    (
        {"lora_target_linear": True, "lora_target_modules": ["lm_head"]},
        "lora_target_modules: planned only with the linear layers; training needs more memory",
    ),
    ({"sample_packing": True}, "varlen_attn: planned as sdpa with a mask over packed rows; training needs less memory"),
    ({"gradient_checkpointing": "offload"}, f"gradient_checkpointing: offloading is {LESS}"),
    (
        {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True},
        "load_in_8bit: traced without outliers; training needs a little more memory",
    ),
    (OFFLOADED, "weights or optimizer state in main memory: not planned; training needs less GPU memory"),
    ({"do_causal_lm_eval": True}, f"do_causal_lm_eval: {MORE}"),
    ({"dpo_use_liger_kernel": True}, f"dpo_use_liger_kernel: {LESS}"),
    ({"dpo_use_weighting": True}, f"dpo_use_weighting: {MORE}"),
]


@pytest.mark.parametrize(("change", "note"), NOTES)
def test_untraced_settings_are_noted(change, note):
    assert steps.step_of(config_with(change), SMALL, AMPERE)[1] == [note]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": "llama-adapter"},
            "adapter: llama-adapter cannot be planned; plans support lora, qlora or no adapter",
        ),
        ({"rl": "kto"}, "rl: kto cannot be planned; plans support dpo, ipo, simpo and orpo"),
    ],
)
def test_settings_that_plans_do_not_support_are_refused(change, message):
    with pytest.raises(UserError) as refused:
        step_of(change)
    assert str(refused.value) == message


def test_a_model_that_cannot_be_traced_is_reported(small):
    (Path(small["base_model"]) / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(UserError) as refused:
        plan.plan(small)
    problem, transformers_words = str(refused.value).split(": ", 1)
    assert problem == "this model and adapter cannot be planned"
    assert transformers_words.startswith("ValueError: Unrecognized model identifier: nobody_knows.")


@pytest.mark.parametrize(("attention", "shape"), [("sdpa", (2, 2048)), ("flash_attention_2", (1, 4096))])
def test_packed_documents_make_one_row_where_flash_attention_keeps_them_apart(attention, shape):
    packed = config_with({"sample_packing": True, "attn_implementation": attention})
    assert step_plan.StepPlan(steps.step_of(packed, SMALL, AMPERE)[0], 2, 2048).shape == shape


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ({}, None),
        ({"rl": "dpo"}, PairLoss("dpo")),
        ({"rl": "ipo", "precompute_ref_log_probs": True}, PairLoss("dpo", is_precomputed=True)),
        ({"rl": "dpo", "adapter": None}, PairLoss("dpo", has_second_model=True)),
        ({"rl": "simpo", "cpo_alpha": 0}, PairLoss("simpo")),
        ({"rl": "simpo"}, PairLoss("simpo", learns_chosen=True)),  # TRL's default of cpo_alpha is 1
        ({"rl": "orpo", "adapter": None}, PairLoss("orpo")),
    ],
)
def test_the_loss_on_pairs(change, loss):
    assert PairLoss.of(config_with(change)) == loss


@pytest.fixture
def small(tmp_path: Path) -> yamlfiles.Config:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 128256, "max_position_embeddings": 8192}))
    change = {"base_model": str(folder), "revision_of_model": None}
    return {key: value for key, value in (recipe_config("haider2024/llama-3-8b") | change).items() if value is not None}


def test_a_plan_adds_up(small):
    planned, _ = plan.plan(small)
    memory = planned.memory
    assert sum(memory.parts.values()) == memory.allocated <= memory.reserved
    assert memory.needed == memory.reserved + step_plan.CONTEXT
    assert planned.frozen == sum(count["frozen"] for count in planned.parameters.values())
    in_16_bits, _ = plan.plan(small | {"peft_autocast_adapter_dtype": False})
    assert in_16_bits.memory.parts["adapters"] == memory.parts["adapters"] / 2
    for gpu, larger in pairwise(planned.gpus):
        assert gpu.fits == (memory.needed <= gpu.usable)
        assert gpu.free < larger.free


def test_what_a_check_asks_for_is_the_plans_memory(small):
    small |= {"lora_r": 6}
    assert step_plan.required_gib(small) is None
    needed = step_plan.required_gib(small, trace=True)
    assert plan.plan(small)[0].memory.needed / GIB == needed == step_plan.required_gib(small)


def test_what_fits_and_what_does_not(small):
    size = plan.plan(small)[0].memory.needed / GIB / step_plan.USABLE
    roomy, tight = (plan.plan(small, gpus.Gpu("card", TURING, size * share))[0] for share in (1.001, 0.999))
    assert roomy.gpus[0].fits is True
    assert roomy.changes == []
    assert tight.gpus[0].fits is False
    assert tight.gpus[0].free < 0


def test_a_gpu_that_lacks_a_feature_does_not_fit(recipe, small, tmp_path, sample):
    small |= {"bf16": True, "fp16": False, "datasets": [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]}
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small))
    (planned,) = recipe.json("plan", "small.yaml", "--gpu", "T4")
    (fit,) = planned["gpus"]
    assert fit["fits"] is False
    assert fit["lacks"] == ["bf16"]
    assert fit["free"] > 0
    [note] = [note for note in planned["notes"] if note.startswith("gpu-lacks")]
    assert note == (
        "gpu-lacks:bf16: T4 (sm_75) only emulates bf16, slowly; the default, auto, turns it on; use `--set bf16=false "
        "--set fp16=true`"
    )
    assert "next:" not in recipe.ok("plan", "small.yaml", "--gpu", "T4").stderr
    for words in (["--set", "bf16=false", "--set", "fp16=true"], ["--force", "gpu-lacks:bf16"]):
        (planned,) = recipe.json("plan", "small.yaml", "--gpu", "T4", *words)
        assert planned["gpus"][0]["fits"] is True
        assert planned["gpus"][0]["lacks"] == []


def test_changes_are_the_mildest_that_do(small):
    size = plan.plan(small)[0].memory.needed / GIB / step_plan.USABLE
    (*_, last) = plan.plan(small, gpus.Gpu("card", TURING, size * 0.7))[0].changes
    assert last.set == {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
    assert last.fits
    ampere = plan.plan(small, gpus.Gpu("card", AMPERE, size * 0.7))[0].changes
    assert ampere[0].set == {"chunked_cross_entropy": True}
    refused = small | {"liger_cross_entropy": True, "fsdp_config": {"reshard_after_forward": True}}
    tight = gpus.Gpu("card", AMPERE, size * 0.1)
    assert not {"chunked_cross_entropy", "optimizer"} & {
        key for c in plan.plan(refused, tight)[0].changes for key in c.set
    }
    zero = small | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    (*_, last) = plan.plan(zero, gpus.Gpu("card", TURING, size * 0.7), gpus=4)[0].changes
    assert last.set == {"micro_batch_size": 1, "gradient_accumulation_steps": 32}
    assert last.needed == pytest.approx(plan.plan(zero | last.set, gpus=4)[0].per_gpu["ZeRO-3"], rel=1e-5)
    (*_, last) = plan.plan(small, gpus.Gpu("card", TURING, size * 0.3))[0].changes
    assert list(last.set) == ["sequence_len"]


@pytest.mark.parametrize(
    ("change", "most", "least"),
    [
        ({"num_epochs": 3}, 3, 3),
        ({"num_epochs": 8}, 5, 5),  # four, and the one that is being saved
        ({"num_epochs": 8, "save_total_limit": 2}, 3, 3),
        ({"num_epochs": 3, "max_steps": 10}, 5, 1),
        ({"saves_per_epoch": 2, "num_epochs": 1}, 2, 2),
        ({"save_steps": 0.5}, 2, 2),
        ({"save_steps": 4, "max_steps": 10}, 3, 3),
        ({"save_steps": 4}, 5, 1),  # of rows that nobody counted
        ({"save_strategy": "no"}, 0, 0),
        ({"save_strategy": "best"}, 5, 1),
    ],
)
def test_checkpoints_on_the_disk(small, change, most, least):
    unset = dict.fromkeys(("saves_per_epoch", "save_steps", "save_strategy", "save_total_limit", "max_steps"))
    memory = step_plan.Memory(allocator.Usage(0, 0, {"adapters": 4, "optimizer": 8}), 16, {}, {})
    assert plan.checkpoints(small | unset | change, memory) == Checkpoints(28, most, least)
    assert plan.checkpoints(small | unset | change | {"save_only_model": True}, memory).size == 4


@pytest.mark.parametrize(
    ("starts", "least", "free", "level"),
    [
        (True, 2, 2 * GIB, None),
        (True, 2, 2 * GIB - 1, "error"),
        (False, 2, 2 * GIB - 1, "warning"),
        (True, 1, GIB, "warning"),  # perhaps one is all that it saves
        (True, 1, GIB - 1, "error"),
    ],
)
def test_checkpoints_that_do_not_fit_on_the_disk(monkeypatch, starts, least, free, level):
    monkeypatch.setattr(plan, "free_bytes", lambda _: free)
    findings = [*plan._disk_findings(Checkpoints(GIB, 2, least), starts)]
    assert [finding.level for finding in findings] == [level] * bool(level)
    assert [finding.text for finding in findings] == [
        f"save_total_limit: the training has up to 2 checkpoints of 1.00 GiB on the disk; {free / GIB:.2f} GiB are "
        "free in runs; free some space, lower it, or name another folder with --runs [full-disk:save_total_limit]"
    ] * bool(level)


def test_a_run_is_refused_without_space_for_its_checkpoints(small, tmp_path, sample, monkeypatch):
    small |= {"datasets": [{"path": str(sample / "train.jsonl"), "type": "alpaca"}], "test_datasets": None}
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small | {"evals_per_epoch": None}))
    Path(small["base_model"], "model.safetensors").touch()
    Path(small["base_model"], "tokenizer.json").write_text("{}")
    monkeypatch.setattr(plan, "free_bytes", lambda _: 0)
    for trace, level in ((True, "error"), (False, "warning")):
        report = check.check_request(Request(str(tmp_path / "small.yaml")), gpus.find_gpu("T4"))
        plan.add_memory_finding(report, gpus.find_gpu("T4"), trace=trace)
        names = {(finding.level, finding.name) for finding in report.findings}
        assert (level, "full-disk:save_total_limit") in names
    planned = plan.plan_request(Request(str(tmp_path / "small.yaml")), gpus.find_gpu("T4"))
    assert any("[full-disk:save_total_limit]" in note for note in planned.notes)


EMBEDDING = 128256 * 256 * 2
LORA = {"adapter": "lora", "load_in_4bit": False}
ZERO3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
EFFICIENT = {"fsdp_config": {"cpu_ram_efficient_loading": True}}


@pytest.mark.parametrize(
    ("change", "tensors", "processes"),
    [
        ({}, 1, 2),  # quantized one after another
        (LORA, 4, 2),
        (ZERO3, None, 2),
        (LORA | {"fsdp_config": {"reshard_after_forward": True}}, None, 2),
        ({"fsdp_config": {"reshard_after_forward": True}}, 1, 2),
        (EFFICIENT, None, 1),
    ],
)
def test_main_memory_to_load_the_model(small, change, tensors, processes):
    """None stands for all weights."""
    planned = step_plan.plan_step(small | change, gpus.find_gpu("T4"))[0]
    weights = sum(planned.memory.usage.parts.get(kind, 0) for kind in WEIGHTS)
    size = tensors * EMBEDDING if tensors else weights
    assert step_plan.loading(planned, small | change, 2) == step_plan.Loading(size, processes)


EVALUATED = {"test_datasets": [{"path": "test.jsonl", "type": "alpaca"}], "eval_batch_size": 8}


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (8, 2048)),
        ({"eval_batch_size": None, "eval_sequence_len": 4000}, (2, 4032)),
        ({"eval_batch_size": 2, "eval_sequence_len": 1024}, None),  # at most the tokens of a micro batch
        ({"eval_sequence_len": 1024}, (8, 1024)),
        ({"eval_sequence_len": 4000, "pad_to_sequence_len": True}, (8, 4096)),
        ({"test_datasets": None, "val_set_size": 0.1, "eval_sequence_len": 4096}, (8, 2048)),
        ({"test_datasets": None}, None),
        ({"eval_strategy": "no"}, None),
    ],
)
def test_evaluation_is_planned_where_it_is_larger_than_training(small, change, shape):
    assert step_plan.plan_step(small | EVALUATED | change, None)[0].evaluation == shape


def test_a_larger_evaluation_decides_what_fits(small):
    larger = small | EVALUATED
    training, planned = plan.plan(small)[0].memory, plan.plan(larger)[0].memory
    assert planned.reserved == training.reserved
    assert planned.needed == planned.evaluation + step_plan.CONTEXT > training.needed
    gpu = gpus.Gpu("card", TURING, 1.001 * training.needed / GIB / step_plan.USABLE)
    [change] = plan.plan(larger, gpu)[0].changes
    assert (change.set, change.fits) == ({"eval_batch_size": 2}, True)
    [finding] = plan._memory_findings(step_plan.plan_step(larger, gpu)[0], larger, gpu, 1)
    assert (finding.level, finding.name) == ("warning", "too-big:eval_batch_size")
    assert finding.problem == (
        f"training fits, but a full batch of evaluation needs {planned.needed / GIB:.1f} GiB; "
        f"{plan.usable_gib(gpu):.1f} GiB of card (sm_75) are usable"
    )


@pytest.mark.parametrize("change", [{}, {"gradient_checkpointing": False}, {"chunked_cross_entropy": True}])
def test_a_batch_of_the_same_shape_needs_no_more_memory_in_evaluation(small, change):
    training = step_plan.plan_step(small | change, None)[0]
    assert replace(training, evaluation=training.shape).more_in_evaluation == 0


def test_ranks_divide_what_their_engine_divides(small):
    one, more, most = (plan.plan(small, gpus=n)[0].per_gpu for n in (1, 4, 8))
    assert one == {}
    assert more["DDP"] > more["ZeRO-1"] > more["ZeRO-2"] > more["ZeRO-3"]
    assert most["FSDP"] < more["FSDP"]
    sizes: dict[str, dict[str, Any]] = {
        "DDP": {},
        "ZeRO-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
        "FSDP": {"fsdp_config": {"reshard_after_forward": True}},
    }
    for parallelism, change in sizes.items():
        planned = plan.plan(small | change, gpus.find_gpu("T4"), gpus=4)[0]
        assert planned.gpus[0].free == pytest.approx(planned.gpus[0].usable - planned.per_gpu[parallelism])


def test_a_base_model_in_8_bits_has_a_byte_a_weight(small):
    lora = small | {"adapter": "lora", "load_in_4bit": False, "bf16": True, "fp16": False}
    half, eight = (
        step_plan.plan_step(lora | {"load_in_8bit": bits}, gpus.find_gpu("A100"))[0].memory for bits in (0, 1)
    )
    linear = sum(count["frozen"] for kind, count in half.parameters.items() if kind.endswith("_proj"))
    parts = eight.usage.parts
    assert half.parameters == eight.parameters
    assert half.usage.parts["base weights"] - parts["base weights"] == pytest.approx(linear, rel=0.01)
    heads = SMALL["num_attention_heads"] + 2 * SMALL["num_key_value_heads"]
    rows = heads * 64 + 2 * SMALL["hidden_size"] + 2 * SMALL["intermediate_size"]
    assert parts["quantization constants"] == 4 * rows * SMALL["num_hidden_layers"]  # one in fp32 for each row


FULL = {"adapter": None, "load_in_4bit": None, "optimizer": "adamw_torch_fused", "fp16": False, "bf16": True}
SAVED = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("change", "zero", "fsdp"),
    [
        # bytes of each trained weight: of weight and gradient, of fp32 copy and two states; and all of them in FSDP
        (FULL, (2, 4 + 8), 2 + 2 + 4),
        (FULL | {"bf16": False}, (4, 4 + 8), 4 + 4 + 8),
        (FULL | {"optimizer": "adamw_bnb_8bit"}, (2, 4 + 2 + 8 / 256), 8),
        (FULL | {"optimizer": "paged_adamw_32bit"}, (2, 4), 8),
        ({"optimizer": "adamw_torch"}, (2, 4 + 8), 16),
        ({"optimizer": "paged_adamw_32bit", "lora_r": 256}, (2, 4), 16),
        ({"optimizer": "adamw_torch", "lora_modules_to_save": SAVED}, (2, 4 + 8), 16),
    ],
)
def test_trained_weights_take_what_engines_were_seen_to_allocate(small, change, zero, fsdp):
    """The bytes are those of two real ranks, see test_shards."""
    config = {key: value for key, value in (small | change).items() if value is not None}
    step = step_plan.plan_step(config, gpus.Gpu("card", AMPERE, 80))[0]
    trained, parts = step.memory.total("trainable"), step.memory.usage.parts
    frozen = sum(parts.get(kind, 0) for kind in WEIGHTS) if step.step.adapter else 0
    upcast = parts["embeddings and head"] if step.step.adapter else 0
    bytes_by_parallelism = kept_by_rank(step, 4)
    copy, state = zero
    if "paged" in step.step.optimizer:
        state += parts["optimizer"] / trained  # of small tensors, which stays on the GPU
    assert bytes_by_parallelism["ZeRO-1"] == pytest.approx(frozen + trained * (2 * copy + state / 4), rel=1e-3)
    assert bytes_by_parallelism["ZeRO-2"] == pytest.approx(frozen + trained * (copy + (copy + state) / 4), rel=1e-3)
    assert bytes_by_parallelism["ZeRO-3"] == pytest.approx((frozen + trained * (2 * copy + state)) / 4, rel=1e-3)
    assert bytes_by_parallelism["FSDP"] == pytest.approx((frozen + upcast + trained * fsdp) / 4, rel=1e-3)


def test_embeddings_have_32_bit_state_with_8_bit_optimizers(small):
    small |= {"lora_modules_to_save": SAVED, "optimizer": "adamw_bnb_8bit"}
    embedding, lora = 128256 * 256, 114688
    state = plan.plan(small)[0].memory.parts["optimizer"]
    assert state == pytest.approx(8 * embedding + (2 + 8 / 256) * (embedding + lora), rel=1e-3)
    paged = plan.plan(small | {"optimizer": "paged_adamw_8bit"})[0].memory
    assert paged.paged == (8 + 2) * embedding


def test_the_operations_of_a_token(small):
    """By hand, for the small model: matrices, LoRA's, scores and values, each as often as they are gone through."""
    step = step_plan.plan_step(small, None)[0]
    matrices = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    head, lora = 128256 * 256, sum(count["trainable"] for count in step.memory.parameters.values())
    attention = 4 * 256 * 1024 * 2
    operations = work.flops_of_token(step, 2048)
    assert operations == 2 * (matrices + head) * 3 + 2 * lora * 4 + attention * 4
    full = step_plan.plan_step({k: v for k, v in small.items() if k not in ("adapter", "load_in_4bit")}, None)[0]
    assert work.flops_of_token(full, 2048) == 2 * (matrices + head) * 4 + attention * 4
    saved = step_plan.plan_step(small | {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, None)[0]
    assert work.flops_of_token(saved, 2048) == operations + 2 * head


def test_work_counts_the_rows_that_are_there(small, sample, tmp_path):
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    file = tmp_path / "mine.yaml"
    file.write_text(yamlfiles.write_yaml(small))
    estimate = plan.plan_request(Request(str(file)), gpus.find_gpu("T4")).work
    assert estimate
    assert estimate.rows == 109
    assert estimate.steps == 28
    tokens = 109 * 2048 * 2
    assert estimate.tokens == tokens
    assert estimate.hours == pytest.approx(tokens * estimate.flops_per_token / (65e12 * work.UTILIZATION) / 3600)
    few = plan.plan_request(Request(str(file), overrides=typed("max_steps=3"))).work
    assert few
    assert few.steps == 3
    assert few.tokens == 3 * 8 * 2048


@pytest.mark.long
def test_a_second_plan_comes_from_the_cache_without_torch(small, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yamlfiles.write_yaml(small))
    code = (
        "import sys; from qlora_recipes import cli\n"
        "assert cli.main(['plan', sys.argv[1], '--json', '--set', 'lora_r=7']) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    runs = [subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True) for _ in range(2)]
    assert [run.stderr.splitlines()[-1] for run in runs] == ["True", "False"]
    assert runs[0].stdout == runs[1].stdout


def test_the_cache_knows_what_a_plan_depends_on(small, monkeypatch):
    step = steps.step_of(small, SMALL, TURING)[0]
    lower = steps.step_of(small | {"lora_r": 8}, SMALL, TURING)[0]
    files = {step_plan.StepPlan(*asked).file for asked in ((step, 2, 64), (step, 3, 64), (lower, 2, 64))}
    monkeypatch.setattr(step_plan, "packages", lambda: {"torch": "3"})
    files.add(step_plan.StepPlan(step, 2, 64).file)
    monkeypatch.setattr(step_plan, "VERSION", 0)
    files.add(step_plan.StepPlan(step, 2, 64).file)
    assert len(files) == 5


@pytest.mark.parametrize("content", ["{", '{"usage": {}, "paged": 1}'])
def test_a_damaged_cache_is_planned_anew(small, content):
    sound = plan.plan(small)[0]
    cached = step_plan.plan_step(small, None)[0]
    assert cached.file.is_file()
    cached.file.write_text(content)
    assert plan.plan(small)[0] == sound


def test_a_full_fine_tuning_that_does_not_fit_gets_an_adapter(small):
    full = {key: value for key, value in small.items() if not key.startswith(("adapter", "lora_", "load_in"))}
    changes = [change.set for change in plan.plan(full, gpus.Gpu("card", AMPERE, 0.9))[0].changes]
    lora = {"lora_target_linear": True, "lora_r": 16, "lora_alpha": 32}
    assert {"adapter": "qlora", "load_in_4bit": True} | lora in changes
    assert plan.plan(full, gpus.Gpu("card", AMPERE, 0.1))[0].changes[-1].fits is False
    dora = small | {"adapter": "lora", "load_in_4bit": False, "peft_use_dora": True}
    keys = {key for change in plan.plan(dora, gpus.Gpu("card", AMPERE, 0.1))[0].changes for key in change.set}
    assert "adapter" not in keys


def planned_example(fits: bool, work: Work | None = None) -> plan.Plan:
    memory = plan.PeakMemory(
        allocated=3 * GIB,
        reserved=4 * GIB,
        parts={"logits": GIB, "base weights": 2 * GIB},
        paged=GIB // 2,
        context=GIB // 4,
        needed=4.25 * GIB,
    )
    return plan.Plan(
        model="a/b",
        adapter="qlora",
        checkpoints=Checkpoints(GIB // 2, 5, 5),
        loading=step_plan.Loading(GIB, 2),
        micro_batch=plan.MicroBatch(2, 2048, 4.25 * GIB),
        parameters={"q_proj": {"frozen": 3000, "trainable": 1000}},
        frozen=3000,
        trainable=1000,
        trainable_share=0.25,
        memory=memory,
        gpus=[plan.Fit("T4", 14.5 * GIB, fits, 10.25 * GIB, () if fits else ("bf16",))],
        per_gpu={"DDP": 5 * GIB},
        notes=["a note"],
        changes=[] if fits else [plan.PlannedChange({"sequence_len": 1024}, "longer rows are lost", 3 * GIB, True)],
        work=work,
    )


PRINTED = """\
a/b, qlora, 2 x 2048 tokens per micro batch

parameters  frozen  trainable
q_proj       3,000      1,000
all          3,000      1,000
25.000% trainable

memory                                GiB
base weights                         2.00
logits                               1.00
allocated at the peak                3.00
reserved but unused                  1.00
CUDA context                         0.25
needed                               4.25
paged optimizer state, not included  0.50
needed on each GPU with DDP          5.00

GPU  usable GiB  fits      free GiB
T4        14.50  no: bf16     10.25
then it fits, 3.00 GiB: --set sequence_len=1024 (longer rows are lost)

work
row lengths           unknown; tokens and hours assume full rows; if the rows are local, --all-rows measures lengths
rows                  109 (the config's data)
tokens in all epochs  up to 446,464 (every row counted at full length)
optimizer steps       28
operations per token  1.5e+10
tokens per second     1,300
hours                 about 0.10 (speed: 30% of the GPU's peak; tokens: every row counted at full length)
checkpoints           0.50 GiB each, up to 5 at a time: 2.50 GiB
main memory           1.00 GiB in each of 2 processes to load the model, beside the libraries
note: a note
"""
PRINTED_TOGETHER = """\
recipe  trainable  micro batch  needed GiB  GPU  fits      free GiB  hours  smallest GPU
one         1,000  2 x 2048           4.25  T4   yes          10.25   0.10  –
two         1,000  2 x 2048           4.25  T4   no: bf16     10.25      –  –
three       1,000  2 x 2048           4.25  –    –                –      –  12 GB
note: one: a note
note: two: a note
note: three: a note
"""


def test_a_plan_is_printed_as_tables(capsys):
    work = Work(109, "the config's data", 446_464, TokenCount.UPPER_BOUND, 28, 1.5e10, 1300, 0.0954)
    _print_plan(planned_example(False, work))
    assert capsys.readouterr().out == PRINTED


def test_rows_that_are_not_counted_are_unknown(capsys):
    _print_plan(planned_example(False, Work(None, "", None, TokenCount.UNKNOWN, None, 1.5e10, None, None)))
    assert capsys.readouterr().out.splitlines()[-6:-3] == [
        "work",
        "rows                  unknown; only complete rows in local JSONL files are counted",
        "operations per token  1.5e+10",
    ]


def test_several_plans_are_printed_as_one_table(capsys):
    work = Work(109, "the study's data", 446_464, TokenCount.DECLARED, 28, 1.5e10, 1300, 0.0954)
    any_gpu = planned_example(True)
    any_gpu.gpus = [plan.Fit("8 GB", 7.25 * GIB, False, -GIB), plan.Fit("12 GB", 10.9 * GIB, True, GIB)]
    _print_plans([("one", planned_example(True, work)), ("two", planned_example(False)), ("three", any_gpu)])
    assert capsys.readouterr().out == PRINTED_TOGETHER


def test_the_tokens_of_the_data_are_counted(recipe, small, tiny, sample):
    small |= {"base_model": str(tiny), "special_tokens": {"pad_token": "</s>"}}
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    (sample.parent / "tiny.yaml").write_text(yamlfiles.write_yaml(small))
    (planned,) = recipe.json("plan", sample.parent / "tiny.yaml", "--all-rows")
    assert 0 < planned["work"]["tokens"] < planned["work"]["rows"] * 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--set optimizer=adamwx",
            "--set optimizer=adamwx: error: optimizer: adamwx is not an allowed value; did you mean adamc or ademamix "
            "or grokadamw? [value:optimizer]",
        ),
        (
            "--set base_model=null",
            "--set base_model=null: error: base_model: missing; set it [missing-key:base_model]",
        ),
        ("--all-rows", "--all-rows: datasets.0: its rows are not on this machine; leave --all-rows out"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(recipe, arguments, message):
    refused = recipe.fails("plan", "haider2024/llama-2-7b", *arguments.split())
    assert refused.stderr == f"planning haider2024/llama-2-7b\nrecipe: {message}\n"


def test_an_unknown_gpu_is_refused_with_the_known_ones(recipe):
    refused = recipe.fails("plan", "haider2024/llama-2-7b", "--gpu", "nanGB")
    names = ", ".join(gpus.catalogue())
    hint = f"choose {names}, or a compute capability such as sm_86"
    assert refused.stderr == f"recipe: --gpu nanGB: no GPU of that name; {hint}\n"


@pytest.mark.parametrize("name", [name for name in paths.recipe_names() if name.startswith("haider2024/")])
def test_recipes_of_the_first_study_fit_its_card(name):
    needed = step_plan.required_gib(recipe_config(name), gpus.find_gpu("Quadro RTX 5000"))
    assert needed
    assert needed <= step_plan.USABLE * 16
