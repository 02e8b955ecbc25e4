"""One case or more for each rule, and none for a recipe as it is."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import config_with, recipe_config

from qlora_recipes.base import disks, paths
from qlora_recipes.checks import rules
from qlora_recipes.checks.finding import Finding
from qlora_recipes.checks.rules import case, hardware
from qlora_recipes.configs import gpus
from qlora_recipes.data import hub

LLAMA_3 = "haider2024/llama-3-8b"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Path:
    """A folder with the data that recipes name, a token for the hub, and a network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(prepared)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "hollow").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "outputs" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    monkeypatch.setenv("HF_TOKEN", "for the test")
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(disks, "free", lambda _: 10**15)
    monkeypatch.setattr(hardware, "torch_cuda", lambda: "13.0")
    return tmp_path


def found(
    change: dict[str, Any], gpu: str | None = None, launching: bool = False, name: str = "haider2024/code-llama-7b"
) -> list[Finding]:
    cfg = config_with(change, name)
    return list(rules.findings(rules.Case(cfg, set(), gpus.find(gpu) if gpu else None, launching=launching)))


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
DATA = {"path": "data/codereviewer/train.jsonl", "type": "alpaca"}

CHATS = DATA | {"type": "chat_template"}
CHAT = {"datasets": [CHATS]}


def own(**formats: str) -> dict[str, Any]:
    """Data with a prompt of one's own."""
    return {"datasets": [DATA | {"type": formats}]}


# what is changed in a recipe, and the level, name and some words of the one finding that it gives
CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"hub_model_id": "x", "wandb_api_key": "x"}, "error", "secret:wandb_api_key", "environment variable"),
    ({"datasets": None}, "error", "no-data:datasets", "no data"),
    ({"datasets": [DATA | {"path": "gone.jsonl"}]}, "error", "missing-file:datasets.0.path", "does not exist"),
    (
        {"datasets": [DATA | {"path": "data/codereviewer/test-subset-2.jsonl"}]},
        "error",
        "not-prepared:datasets.0.path",
        "test-subset-2.jsonl is not prepared yet; run `recipe data fetch codereviewer` and `recipe data prep",
    ),
    ({"datasets": [DATA | {"path": "./hollow"}]}, "error", "missing-file:datasets.0.path", "is empty"),
    ({"datasets": [DATA | {"path": "pipe.jsonl"}]}, "error", "missing-file:datasets.0.path", "is no regular file"),
    ({"datasets": [DATA | {"path": "empty.jsonl"}]}, "error", "missing-file:datasets.0.path", "is empty"),
    ({"datasets": [{"type": "alpaca"}]}, "error", "missing-file:datasets.0.path", "names no data"),
    ({"deepspeed": "zero3.json"}, "error", "missing-file:deepspeed", "does not exist"),
    ({"learning_rate": 2}, "note", "unusual:learning_rate", "2 is high"),
    ({"lora_alpha": 1600}, "note", "unusual:lora_alpha", "1600 beside lora_r 32"),
    ({"learning_rate": "0,0002"}, "error", "no-number:learning_rate", "2e-4"),
    ({"micro_batch_size": None}, "error", "no-batch-size:micro_batch_size", "Axolotl would take 1"),
    ({"datasets": []}, "error", "no-data:datasets", "no data"),
    ({"warmup_ratio": 0.1}, "error", "excluding-keys:warmup_steps", "beside warmup_ratio"),
    ({"val_set_size": 0.1}, "error", "excluding-keys:test_datasets", "beside val_set_size"),
    ({"eval_strategy": "epoch"}, "error", "excluding-keys:eval_strategy", "beside evals_per_epoch"),
    ({"dataset_processes": 4}, "warning", "deprecated:dataset_processes", "dataset_num_proc"),
    ({"s2_attention": True}, "error", "deprecated:s2_attention", "no longer supported"),
    ({"lora_target_modules": None}, "error", "no-lora-targets:adapter", "set lora_target_modules"),
    ({"lora_target_modules": []}, "error", "no-lora-targets:adapter", "set lora_target_modules"),
    (
        {"lora_target_modules": None, "lora_target_linear": False},
        "error",
        "no-lora-targets:adapter",
        "lora_target_linear: true",
    ),
    (
        {"lora_target_modules": ["q_proj", "v_prj"]},
        "error",
        "unknown-lora-target:lora_target_modules.1",
        "did you mean v_proj",
    ),
    (
        {"base_model": "microsoft/Phi-3-mini-4k-instruct", "lora_target_modules": ["q_proj", "o_proj"]}
        | {"special_tokens": None, "chat_template": "tokenizer_default"},
        "error",
        "unknown-lora-target:lora_target_modules.0",
        "did you mean qkv_proj",
    ),
    ({"lora_target_modules": ".*_projj"}, "error", "unknown-lora-target:lora_target_modules", "matches no layer"),
    ({"lora_target_modules": "(q"}, "error", "unknown-lora-target:lora_target_modules", "not a regular"),
    ({"lora_r": None}, "error", "no-lora-rank:adapter", "lora_r is not set"),
    (
        {"base_model": "codelama/CodeLlama-7b-hf"},
        "note",
        "unknown-model:base_model",
        "did you mean codellama/CodeLlama-7b-hf",
    ),
    (CHAT | {"chat_template": "tokenizer_default_fallback_chatlm"}, "error", "chat-template:chat_template", "chatml"),
    ({"datasets": [CHATS | {"chat_template": "lama3"}]}, "error", "chat-template:datasets.0.chat_template", "llama3"),
    (CHAT | {"chat_template": "jinja"}, "error", "chat-template:chat_template", "chat_template_jinja is not set"),
    (
        CHAT | {"chat_template_jinja": "gone.jinja"},
        "error",
        "chat-template:datasets.0.type",
        "gone.jinja is neither a file nor a template",
    ),
    (CHAT | {"chat_template_jinja": "{% for %}"}, "error", "chat-template:datasets.0.type", "line 1 is no Jinja"),
    (
        {"datasets": [CHATS | {"chat_template_jinja": "{{ messages }}"}]},
        "error",
        "chat-template:datasets.0.chat_template_jinja",
        "set chat_template: jinja",
    ),
    (CHAT, "warning", "chat-template:datasets.0.type", "no chat model, may have no chat template"),
    (
        {"datasets": [CHATS | {"chat_template": "chatml", "field_tools": "functions"}]},
        "error",
        "unread-tools:datasets.0.field_tools",
        "Axolotl ignores this key",
    ),
    (own(format="{instrution}{instruction}"), "error", "prompt-format:datasets.0.type.format", "did you mean"),
    (own(format="Q: "), "error", "prompt-format:datasets.0.type.format", "{instruction} is not in it"),
    (own(no_input_format="{instruction} }"), "error", "prompt-format:datasets.0.type.no_input_format", "Single"),
    ({"adapter": "lora"}, "error", "not-quantized:adapter", "set adapter: qlora"),
    ({"load_in_4bit": None}, "error", "not-quantized:adapter", "needs load_in_4bit"),
    ({"adapter": None}, "error", "not-quantized:load_in_4bit", "without an adapter"),
    (
        {"adapter": None, "load_in_4bit": None, "load_in_8bit": True},
        "error",
        "not-quantized:load_in_8bit",
        "without an adapter",
    ),
    ({"bf16": True}, "error", "two-precisions:fp16", "both true"),
    ({"bfloat16": True}, "error", "two-precisions:fp16", "would load the model in bfloat16"),
    ({"fp16": None, "float16": True, "bf16": "auto"}, "error", "two-precisions:float16", "bf16 is auto, the default"),
    ({"sample_packing": True, "attn_implementation": None}, "error", "packing-leaks:sample_packing", "see each other"),
    (
        {"optimizer": "paged_adamw_32bit", "fsdp_config": {"offload_params": False}},
        "error",
        "optimizer-and-engine:optimizer",
        "does not work with FSDP2",
    ),
    (
        {"optimizer": "adamw_bnb_8bit", "fsdp_config": {"offload_params": False}},
        "error",
        "optimizer-and-engine:optimizer",
        "does not work with FSDP2",
    ),
    ({"deepspeed": {"a": 1}, "bnb_config_kwargs": None}, "error", "packed-weights-cast:bnb_config_kwargs", "uint8"),
    (
        {"optimizer": "adamw_torch_fused", "fsdp_config": {"offload_params": False}, "fp16": False, "bf16": True}
        | {"bnb_config_kwargs": {"bnb_4bit_quant_storage": "float16"}},
        "error",
        "packed-weights-cast:bnb_config_kwargs",
        "uint8",
    ),
    ({"bnb_config_kwargs": None}, "note", "packed-weights-cast:bnb_config_kwargs", "uint8"),
    ({"optimizer": "muon", "deepspeed": {"a": 1}}, "error", "optimizer-and-engine:optimizer", "DeepSpeed"),
    (
        {"optimizer": "adamw_bnb_8bit", "deepspeed": OFFLOADED},
        "error",
        "optimizer-and-engine:optimizer",
        "Adam without AdamW's weight decay takes the place of adamw_bnb_8bit",
    ),
    ({"lr_scheduler": "cosine_with_min_lr"}, "error", "scheduler-needs:lr_scheduler", "min_lr or min_lr_rate"),
    (
        {"chunked_cross_entropy": True, "cut_cross_entropy": True},
        "error",
        "two-cross-entropies:chunked_cross_entropy",
        "beside cut_cross_entropy",
    ),
    (
        {
            "plugins": ["axolotl.integrations.liger:LigerPlugin", "qlora_recipes.x.CutCrossEntropyPlugin"],
            "liger_cross_entropy": True,
        }
        | {"cut_cross_entropy": False, "chunked_cross_entropy": True},
        "error",
        "two-cross-entropies:liger_cross_entropy",
        "beside chunked_cross_entropy",
    ),
    ({"test_datasets": None}, "error", "never-evaluated:evals_per_epoch", "no evaluation data"),
    ({"test_datasets": None, "val_set_size": 0}, "error", "never-evaluated:evals_per_epoch", "no evaluation data"),
    ({"evals_per_epoch": None}, "warning", "never-evaluated:test_datasets", "never happens"),
    ({"evals_per_epoch": 1, "num_epochs": 1}, "warning", "never-evaluated:evals_per_epoch", "one in all"),
    (
        {"num_epochs": 2, "evals_per_epoch": None, "eval_steps": 500},
        "warning",
        "never-evaluated:eval_steps",
        "has 28 steps",
    ),
    (
        {"num_epochs": 2, "saves_per_epoch": None, "save_steps": 500},
        "warning",
        "never-saved:save_steps",
        "has 28 steps",
    ),
    ({"save_strategy": "best"}, "error", "never-saved:save_strategy", "nothing says what the best is"),
    ({"max_steps": 1000}, "note", "no-watchdog:loss_watchdog_threshold", "even if the training diverges"),
    ({"max_steps": 5}, "error", "long-warm-up:warmup_steps", "whole training of 5 steps"),
    (
        {"num_epochs": 2, "sample_packing": True, "warmup_steps": 28},
        "error",
        "long-warm-up:warmup_steps",
        "of at most 28 steps",
    ),
    ({"num_epochs": 2, "warmup_steps": 28}, "error", "long-warm-up:warmup_steps", "whole training of 28 steps"),
    ({"sequence_len": 16385}, "error", "beyond-context:sequence_len", "made for 16384"),
    ({"special_tokens": {"pad_token": "<pad>"}}, "warning", "missing-special-token:special_tokens.pad_token", "<pad>"),
    ({"special_tokens": {"eos_token": "<|im_end|>"}}, "error", "missing-special-token:special_tokens.eos_token", "no"),
    ({"datasets": [DATA | {"type": "chatml.intel"}]}, "error", "prompt-strategy:datasets.0.type", "set rl"),
    ({"trust_remote_code": True}, "error", "remote-code:trust_remote_code", "that comes with it"),
    ({"plugins": ["mine.Plugin"]}, "error", "foreign-code:plugins.0", "the code of mine.Plugin"),
    ({"lora_model_dir": "pickled"}, "error", "pickled-weights:lora_model_dir", "adapter_model.bin is pickled"),
    ({"use_comet": True}, "warning", "missing-package:use_comet", "comet-ml is not installed; install it"),
    (
        {"attn_implementation": "sage"},
        "warning",
        "missing-package:attn_implementation",
        "sage needs the package sageattention, which is not installed; install it from github.com/thu-ml",
    ),
    (
        {"attn_implementation": "flash_attention_2"},
        "note",
        "missing-package:attn_implementation",
        "flash-attn is not installed, so that transformers takes the kernel kernels-community/flash-attn2 from the hub",
    ),
    (
        {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]},
        "warning",
        "missing-package:plugins",
        "Axolotl's fork, or drop the plugin",
    ),
    (
        {"batch_size": 7, "gradient_accumulation_steps": None},
        "error",
        "does-not-divide:batch_size",
        "not a multiple of micro_batch_size",
    ),
    (
        {"full_determinism": True, "cut_cross_entropy": True},
        "warning",
        "does-not-repeat:full_determinism",
        "in no fixed order",
    ),
    ({"output_dir": "outputs"}, "warning", "output-in-use:output_dir", "another run's checkpoints"),
    ({"base_model": "./models/llama"}, "error", "no-access:base_model", "does not exist"),
]


@pytest.mark.parametrize(("change", "level", "name", "says"), CASES, ids=[f"{c[2]} {c[0]}" for c in CASES])
def test_a_mistake_gives_one_finding(change: dict[str, Any], level: str, name: str, says: str) -> None:
    (only,) = found(change)
    assert (only.level, only.name) == (level, name)
    assert says in str(only)


def test_fsdp_is_not_started_on_one_gpu() -> None:
    change = {"optimizer": "adamw_torch", "fsdp_config": {"reshard_after_forward": True}, "fp16": False}
    assert [one.name for one in found(change, launching=True)] == ["engine-needs-gpus:fsdp_config"]
    assert found(change) == []


OTHERS = {"gpu-lacks", "no-gpu", "chat-model", "engine-needs-gpus", "no-room"}  # which have tests of their own


def test_every_rule_has_a_case() -> None:
    tested = {case[2].partition(":")[0] for case in CASES} | OTHERS
    assert tested == {rule.__name__.replace("_", "-") for rule in case.RULES}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [(name, "H100") for name in paths.recipe_names()]
    + [(name, "T4") for name in paths.recipe_names() if not recipe_config(name).get("bf16")],
)
def test_a_recipe_gives_no_error_and_no_warning(name: str, gpu: str) -> None:
    assert [finding for finding in found({}, gpu, name=name) if finding.level != "note"] == []


@pytest.mark.parametrize(
    "change",
    [
        {"lora_target_modules": None, "lora_target_linear": True},
        {"lora_target_modules": r".*\.self_attn\.[qv]_proj"},
        {"lora_target_modules": "all-linear"},
        {"lora_target_modules": ["self_attn.q_proj", "lm_head", "model.layers.31.mlp.up_proj"]},
        {"lora_target_modules": r".*layers\.(2[0-9]|3[01])\..*"},
        {"max_steps": 500, "warmup_steps": 50},
        {"lora_model_dir": None, "deepspeed": None, "wandb_project": ""},
        {"adapter": "lora", "load_in_4bit": None},
        {"adapter": None, "load_in_4bit": None, "learning_rate": 1e-5},
        {"sample_packing": True},
        {"sample_packing": True, "attn_implementation": None, "flash_attention": False, "flex_attention": False}
        | {"attn_implementation": "kernels-community/flash-attn2@v1"},
        {"optimizer": "adamw_torch_8bit", "fsdp_config": {"offload_params": False}},
        {"optimizer": "adamw_torch_fused", "fsdp_config": {"offload_params": False}},
        {"optimizer": "muon_8bit", "fsdp_config": {"offload_params": False}},
        {"optimizer": "paged_adamw_8bit", "deepspeed": {"zero_optimization": {"stage": 2}}},
        {"optimizer": "paged_adamw_32bit", "deepspeed": OFFLOADED},
        {"deepspeed": {"a": 1}, "bnb_config_kwargs": {"bnb_4bit_quant_storage": "float16"}},
        {"deepspeed": {"a": 1}, "bnb_config_kwargs": None, "fp16": False, "bf16": True},
        {"deepspeed": {"a": 1}, "bnb_config_kwargs": None, "fp16": False},
        {"optimizer": "adamw_bnb_8bit", "deepspeed": OFFLOADED | {"zero_force_ds_cpu_optimizer": False}},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"test_datasets": None, "val_set_size": 0.05},
        {"test_datasets": None, "evals_per_epoch": None},
        {"evals_per_epoch": None, "eval_strategy": "no"},
        {"evals_per_epoch": None, "eval_strategy": "epoch"},
        {"warmup_steps": 27},
        {"sequence_len": 16384},
        {"sequence_len": 32768, "overrides_of_model_config": {"rope_scaling": {"type": "linear", "factor": 2}}},
        {"special_tokens": {"pad_token": "<unk>"}},
        {"special_tokens": {"eos_token": "<|im_end|>"}, "lora_modules_to_save": ["embed_tokens", "lm_head"]},
        {"datasets": [DATA | {"type": "chatml.intel"}], "rl": "dpo"},
        {"datasets": [{"path": "some/data-set", "type": "alpaca"}]},
        {"datasets": [{"path": "s3://bucket/rows.jsonl", "type": "alpaca"}]},
        {"datasets": [DATA | {"path": "json", "data_files": "data/codereviewer/t*.jsonl"}]},
        {"batch_size": 8, "gradient_accumulation_steps": None},
        {"flash_attention": False},  # an old key that is off
        {"output_dir": "elsewhere"},
        {"output_dir": "outputs", "auto_resume_from_checkpoints": True},
    ],
)
def test_what_is_right_gives_none(change: dict[str, Any]) -> None:
    assert found(change) == []


@pytest.mark.parametrize(
    ("gpu", "change", "says"),
    [
        ("V100", {}, "torch for CUDA 13 does not run on V100 (sm_70)"),
        ("T4", {"fp16": False, "bf16": True}, "T4 (sm_75) emulates bf16"),
        ("T4", {"fp16": None, "bf16": "auto"}, "auto, the default, turns it on"),
        ("T4", {"fp16": None, "bf16": None}, "auto, the default, turns it on"),
        ("T4", {"tf32": True}, "has no tf32"),
        ("T4", {"sample_packing": True}, "torch's varlen_attn, which does not run on T4"),
        ("sm_75", {"attn_implementation": "flash_attention_2"}, "flash_attention_2 does not run on sm_75"),
        ("7.5", {"attn_implementation": None, "flash_attention": True}, "flash_attention_2 does not run"),
        ("A100", {"attn_implementation": "flash_attention_3"}, "flash_attention_3 does not run on A100"),
        ("rtx 4090", {"fp8": True}, "fp8 from 9.0 on"),
        ("T4", {"fp16": None, "bf16": False, "bfloat16": True}, "emulates bf16"),
        ("T4", {"attn_implementation": "sage"}, "sage does not run on T4"),
    ],
)
def test_what_a_gpu_lacks_is_an_error(gpu: str, change: dict[str, Any], says: str) -> None:
    errors = [str(finding) for finding in found(change, gpu) if finding.level == "error"]
    assert [says in error and "[gpu-lacks:" in error for error in errors] == [True]


def test_torch_for_an_older_cuda_runs_on_older_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found({}, "V100") != []
    for cuda in ("12.6", None):
        monkeypatch.setattr(hardware, "torch_cuda", lambda cuda=cuda: cuda)
        assert found({}, "V100") == []


@pytest.mark.parametrize(
    ("gpu", "change"),
    [
        (
            "H100",
            {"fp16": False, "bf16": True, "tf32": True, "fp8": True}
            | {"attn_implementation": "kernels-community/flash-attn3"},
        ),
        ("A100", {"fp16": None, "bf16": None, "attn_implementation": "kernels-community/flash-attn2"}),
        ("T4", {"fp16": True, "bf16": "auto"}),  # Axolotl then leaves bf16 off
    ],
)
def test_what_a_gpu_has_is_no_finding(gpu: str, change: dict[str, Any]) -> None:
    assert found(change, gpu) == []


FLASH = {"attn_implementation": "flash_attention_2"}


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(rules.Case, "is_installed", lambda _, package: package in packages)


def test_a_missing_package_is_an_error_once_a_run_starts() -> None:
    change = {"fp16": False, "bf16": True, "attn_implementation": "sage", "use_comet": True}
    levels = {f.name: f.level for f in found(change, "A100", launching=True)}
    assert levels == {"missing-package:attn_implementation": "error", "missing-package:use_comet": "error"}


def test_a_package_that_is_installed_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "flash-attn", "cut-cross-entropy", "wandb")
    plugins = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    assert found(FLASH | {"plugins": plugins, "use_wandb": True}) == []
    assert found({"plugins": plugins, "cut_cross_entropy": False}) == []
    (only,) = found({"attn_implementation": "flash_attention_4"})  # flash-attn is another package of the same name
    assert "needs the package flash-attn-4" in only.problem


def test_cut_cross_entropy_is_on_once_its_plugin_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "cut-cross-entropy")
    change = {
        "plugins": ["axolotl.integrations.cut_cross_entropy:CutCrossEntropyPlugin"],
        "chunked_cross_entropy": True,
    }
    assert [f.name for f in found(change)] == ["two-cross-entropies:chunked_cross_entropy"]
    assert found(change | {"cut_cross_entropy": False}) == []


def test_a_plugin_that_is_listed_and_off_needs_no_package() -> None:
    plugins = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    assert found({"plugins": plugins, "cut_cross_entropy": False}) == []


def test_without_flash_attn_a_kernel_of_the_hub_has_to_be_within_reach(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    from_hub = {"attn_implementation": "kernels-community/flash-attn3@v1"}
    assert (found(FLASH)[0].level, found(from_hub)) == ("note", [])
    monkeypatch.setattr(hub, "is_offline", lambda: True)

    def levels(change: dict[str, Any]) -> list[str]:
        return [f.level for f in found(change, launching=True, gpu="H100") if f.name.startswith("missing-package")]

    assert (levels(FLASH), levels(from_hub)) == (["error"], ["error"])
    (place / "hub" / "kernels--kernels-community--flash-attn2").mkdir(parents=True)
    assert (levels(FLASH), levels(from_hub)) == (["note"], ["error"])
    installed(monkeypatch)  # the package kernels is missing too
    assert levels(FLASH) == ["error"]
    assert "needs the package kernels" in found(from_hub)[0].problem


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "eager", "torch_compile": True},
        {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True},
        {"lora_mlp_kernel": True},
    ],
)
def test_what_a_cpu_lacks_is_an_error_only_once_a_run_starts(change: dict[str, Any]) -> None:
    in_fp32 = change | {"fp16": False}

    def errors(launching: bool, gpu: str | None) -> list[str]:
        return [str(f) for f in found(in_fp32, gpu, launching) if f.name.startswith("no-gpu:")]

    assert errors(launching=False, gpu=None) == errors(launching=True, gpu="A100") == []
    assert all("--rehearse does without it" in error for error in errors(launching=True, gpu=None))
    assert {
        error.rpartition("no-gpu:")[2].rstrip("]") for error in errors(launching=True, gpu=None)
    } >= change.keys() - {"attn_implementation" if "eager" in change.values() else ""}


def test_packing_with_sdpa_and_bf16_before_hopper_is_a_warning() -> None:
    change = {"fp16": False, "bf16": True, "sample_packing": True}
    by_default = {"fp16": None, "bf16": "auto", "sample_packing": True}
    slides = {"base_model": "mistralai/Mistral-7B-v0.1"}
    wanted = [("warning", "packing-leaks:sample_packing")]

    def warned(change: dict[str, Any], gpu: str) -> list[tuple[str, str]]:
        return [(f.level, f.name) for f in found(change, gpu) if f.name.startswith("packing")]

    for in_bf16 in (change, by_default):
        for masked in ({"sdpa_varlen": False}, slides):
            assert warned(in_bf16 | masked, "A100") == wanted
            assert warned(in_bf16 | masked, "H100") == []
        assert found(in_bf16, "A100") == []  # varlen_attn has no mask


def test_kernels_in_triton_are_a_warning_before_ampere() -> None:
    plugins = ["axolotl.integrations.liger.LigerPlugin"]
    change = {"plugins": plugins, "liger_rope": True, "lora_mlp_kernel": True, "liger_glu_activation": False}
    names = [("warning", "gpu-lacks:liger_rope"), ("warning", "gpu-lacks:lora_mlp_kernel")]
    assert sorted((f.level, f.name) for f in found(change, "T4") if f.rule == "gpu-lacks") == names
    assert not [f for f in found(change, "A100") if f.rule == "gpu-lacks"]


def test_a_window_that_keeps_varlen_attn_off_lets_packed_rows_run_on_turing() -> None:
    slides = {"sample_packing": True, "base_model": "mistralai/Mistral-7B-v0.1"}
    assert not [f for f in found(slides, "T4") if f.rule == "gpu-lacks"]


@pytest.mark.parametrize(
    ("sizes", "warns"),
    [
        ({}, False),
        ({"head_dim": 512}, True),
        ({"sliding_window": 4096}, True),
        ({"sliding_window": 4096, "use_sliding_window": False}, False),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, False),
        ({"query_pre_attn_scalar": 144}, True),
        ({"attention_multiplier": 0.0078125}, True),
        ({"attention_dropout": 0.1}, True),
    ],
    ids=str,
)
def test_without_a_mask_packed_rows_in_bf16_are_no_warning(tmp_path: Path, sizes: dict[str, Any], warns: bool) -> None:
    own = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(own | sizes))
    change = {"base_model": str(tmp_path), "fp16": False, "bf16": True, "sample_packing": True, "sdpa_varlen": True}
    assert ("packing-leaks:sample_packing" in {finding.name for finding in found(change, "A100")}) == warns


def test_fp16_needs_a_gpu_only_once_a_run_starts() -> None:
    assert found({}) == []
    by_default = {"fp16": None, "bf16": "auto"}  # which becomes fp16 on a CPU
    assert [finding.name for finding in found(by_default, launching=True)] == ["no-gpu:bf16"]
    assert found(by_default | {"fp16": False}, launching=True) == []
    assert [finding.name for finding in found({}, launching=True)] == ["no-gpu:fp16"]
    assert found({}, "T4", launching=True) == []


def test_a_chat_model_with_a_base_models_prompt_is_a_note() -> None:
    (only,) = found({}, name="haider2024/llama-3.2-3b")
    assert (only.level, only.name) == ("note", "chat-model:datasets.0.type")
    assert found({"chat_template": "llama3"}, name="haider2024/llama-3.2-3b") == []


def test_a_gated_model_without_a_token(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place / "token"))
    assert [(f.level, f.name) for f in found({}, name=LLAMA_3)] == [("warning", "no-access:base_model")]
    assert [f.level for f in found({}, "T4", launching=True, name=LLAMA_3)] == ["error"]
    assert found({"base_model": "NousResearch/Meta-Llama-3-8B"}, name=LLAMA_3) == []
    (place / "token").write_text("x")
    assert found({}, name=LLAMA_3) == []


def test_a_model_that_is_not_in_the_cache_when_offline(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    assert [(f.level, f.name) for f in found({})] == [("warning", "no-access:base_model")]
    revision = str(config_with({})["revision_of_model"])
    folder = place / "hub" / "models--codellama--CodeLlama-7b-hf" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 16384, "model_type": "llama"}')
    assert [f.name for f in found({})] == ["no-access:base_model"]  # the weights are not there
    (folder / "model.safetensors").touch()
    assert found({}) == []
    assert [f.name for f in found({"revision_of_model": "main"})] == ["no-access:base_model"]


def test_base_models_that_have_a_chat_template_are_not_warned_of() -> None:
    change = CHAT | {"revision_of_model": None}
    for model, names in (("Qwen/Qwen2.5-7B", []), ("google/gemma-2-9b", ["chat-template"])):
        assert [f.rule for f in found(change | {"base_model": model}) if f.rule == "chat-template"] == names


def test_chats_need_a_template_of_the_tokenizer_or_the_config(tiny: Path, place: Path) -> None:
    local = {"base_model": str(tiny), "revision_of_model": None} | CHAT
    (only,) = found(local)
    assert (only.level, only.name) == ("error", "chat-template:datasets.0.type")
    assert only.remedy == "set chat_template, as chatml"
    for name in ("chatml", "tokenizer_default_fallback_chatml"):
        assert found(local | {"chat_template": name}) == []
    model = place / "model"
    shutil.copytree(tiny, model)
    named = [{"name": "default", "template": "{{ messages }}"}]
    for template in ("{{ messages }}", named):
        settings = json.loads((tiny / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        assert found(local | {"base_model": str(model)}) == []
    shutil.copy(tiny / "tokenizer_config.json", model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert found(local | {"base_model": str(model)}) == []


def test_a_local_model_is_judged_by_its_own_files(tiny: Path) -> None:
    local = {"base_model": str(tiny), "revision_of_model": None}
    assert found(local) == []
    assert [f.name for f in found(local | {"sequence_len": 2049})] == ["beyond-context:sequence_len"]
    pad = {"special_tokens": {"pad_token": "<|im_end|>"}}
    (adds,) = found(local | pad)
    assert adds.name == "missing-special-token:special_tokens.pad_token"
    assert "a row to an embedding that has no spare one" in adds.problem


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"model_type": ["llama"], "max_position_embeddings": "x", "num_hidden_layers": null}'),
        ("config.json", "[]"),
        ("tokenizer.json", '{"added_tokens": null}'),
        ("tokenizer.json", '{"added_tokens": [1, {"special": true}, {"special": true, "content": 5}]}'),
    ],
)
def test_odd_files_of_a_local_model_do_no_harm(place: Path, file: str, content: str) -> None:
    (place / "model").mkdir()
    (place / "model" / file).write_text(content)
    assert [f.name for f in found({"base_model": "model"})][-1] == "no-access:base_model"  # no weights
