"""A case or more for each rule, and none for a recipe as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from conftest import config_with, recipe_config
from huggingface_hub import try_to_load_from_cache
from safetensors.numpy import save_file

from qlora_recipes.base import hub, paths, processes
from qlora_recipes.base.files import write_json
from qlora_recipes.check import settings_rules
from qlora_recipes.check.rule import RULES, Case, rule_findings
from qlora_recipes.config import datafiles, gpus
from qlora_recipes.config.finding import Finding
from qlora_recipes.config.origin import header_of

LLAMA_3 = "haider2024/llama-3-8b"


@pytest.fixture(autouse=True)
def place(place: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Path:
    """A folder with the data that recipes name, a token for the hub, and a network."""
    (place / "data").symlink_to(prepared)
    (place / "empty.jsonl").touch()
    (place / "ds.json").write_text(json.dumps(OFFLOADED))
    (place / "nvme.json").write_text('{"zero_optimization": {"offload_param": {"nvme_path": "/home/u"}}}')
    (place / "pickled").mkdir()
    (place / "pickled" / "adapter_model.bin").touch()
    (place / "wrapped").mkdir()
    layers = ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj", "lm_head")
    weights = {f"base_model.model.{layer}.lora_A.weight": numpy.zeros(1) for layer in layers}
    save_file(weights, place / "wrapped" / "adapter_model.safetensors")
    monkeypatch.setenv("HF_TOKEN", "for the test")
    monkeypatch.setenv("HOME", str(place))  # without logins
    monkeypatch.setenv("COMET_API_KEY", "for the test")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(settings_rules, "torch_cuda", lambda: "13.0")
    return place


def findings_of(
    change: dict[str, Any], gpu: str | None = None, launching: bool = False, name: str = "haider2024/code-llama-7b"
) -> list[Finding]:
    cfg = config_with(change, name)
    return list(rule_findings(Case(cfg, cfg, set(), gpus.find_gpu(gpu) if gpu else None, launching=launching)))


def names(change: dict[str, Any], gpu: str | None = None, launching: bool = False) -> list[str]:
    return [f"{finding.level} {finding.name}" for finding in findings_of(change, gpu, launching)]


def of_rule(rule: str, change: dict[str, Any], gpu: str | None = None, launching: bool = False) -> list[str]:
    return [name for name in names(change, gpu, launching) if name.split()[1].startswith(f"{rule}:")]


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
DATA = {"path": "data/codereviewer/train.jsonl", "type": "alpaca"}
CHATS = DATA | {"type": "chat_template"}
CHAT = {"datasets": [CHATS]}
TEST = {"path": "data/codereviewer/valid.jsonl", "type": "chatml.intel", "split": "train"}
PAIRS = DATA | {"type": "chatml.intel"}
DPO = {"datasets": [PAIRS], "rl": "dpo", "rl_beta": 0.1, "test_datasets": [TEST], "lora_dropout": 0.0}
SIMPO = DPO | {"rl": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}
MISREAD = "error misread-test-rows:test_datasets.0.type"
PHI = {"base_model": "microsoft/Phi-3-mini-4k-instruct", "lora_target_modules": ["q_proj", "o_proj"]}
TIED = {"base_model": "meta-llama/Llama-3.2-3B", "special_tokens": {"pad_token": "<|end_of_text|>"}}
LIGER = "axolotl.integrations.liger.LigerPlugin"
FUSED_LOSS = {
    "plugins": [LIGER],
    "liger_fused_linear_cross_entropy": True,
    "lora_target_modules": ["q_proj", "lm_head"],
}
CCE = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


def formatted(**formats: str) -> dict[str, Any]:
    """Data with a prompt that the config describes."""
    return {"datasets": [DATA | {"type": formats}]}


def data(**change: Any) -> dict[str, Any]:
    return {"datasets": [DATA | change]}


MESSAGES = Path(__file__).with_name("messages_of_rules.txt")
# what is changed in a recipe, and the level and name of the one finding that it gives
CASES: list[tuple[dict[str, Any], str]] = [
    ({"lora_target_linear": True}, "warning overridden-targets:lora_target_linear"),
    ({"save_only_model": True}, "warning cannot-resume:save_only_model"),
    ({"saves_per_epoch": 5, "save_total_limit": None}, "note deleted-checkpoints:save_total_limit"),
    (DPO | {"rl_beta": 0.0}, "error no-preference:rl_beta"),
    (DPO | {"rl_beta": None}, "note no-preference:rl_beta"),
    (SIMPO | {"simpo_gamma": None}, "error simpo-terms:simpo_gamma"),
    (SIMPO | {"cpo_alpha": None}, "warning simpo-terms:cpo_alpha"),
    (SIMPO | {"excess_length_strategy": "truncate"}, "warning answers-cut-away:excess_length_strategy"),
    (DPO | {"lora_model_dir": "ds.json"}, "error ignored-adapter:lora_model_dir"),
    (DPO | {"lora_dropout": 0.05}, "warning dropout-without-effect:lora_dropout"),
    (DPO | {"learning_rate": 1e-6}, "warning rounded-steps:learning_rate"),
    (DPO | {"test_datasets": [TEST | {"type": {"prompt_format": "{prompt}"}}]}, MISREAD),
    (DPO | {"test_datasets": [TEST | {"field_messages": "prompt"}]}, MISREAD),
    (DPO | {"test_datasets": [TEST, TEST]}, "error misread-test-rows:test_datasets.1.type"),
    (
        {"special_tokens": {"additional_special_tokens": ["<tool>"]}},
        "warning missing-special-token:special_tokens.additional_special_tokens",
    ),
    (
        {"overrides_of_model_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
        "error rope-parameters:overrides_of_model_config.rope_scaling",
    ),
    (
        {"overrides_of_model_config": {"rope_theta": 1000000}},
        "warning rope-parameters:overrides_of_model_config.rope_theta",
    ),
    ({"datasets": None}, "error no-data:datasets"),
    ({"pretraining_dataset": [DATA]}, "error no-data:pretraining_dataset"),
    ({"test_datasets": None, "val_set_size": 2000}, "error no-data:val_set_size"),
    (data(path="owner/rows-on-a-hub") | {"test_datasets": None, "val_set_size": 1}, "error no-data:val_set_size"),
    ({"hub_model_id": "x", "wandb_api_key": "x"}, "error secret:wandb_api_key"),
    ({"wandb_name": "https://x.org/?id=1"}, "error url-parameter:wandb_name"),
    (data(path="gone.jsonl"), "warning missing-file:datasets.0.path"),
    (data(path="data/codereviewer/trian.jsonl"), "warning missing-file:datasets.0.path"),
    (data(path="data/codereviewer/test-subset-2.jsonl"), "warning not-prepared:datasets.0.path"),
    (data(path="empty.jsonl"), "error missing-file:datasets.0.path"),
    (data(path="data/codereviewer/t*.jsonl"), "warning missing-file:datasets.0.path"),
    (data(path="json", data_files="data/codereviewer/t*.jsonl"), "warning missing-file:datasets.0.path"),
    *(
        (
            {"datasets": [DATA | trained], "test_datasets": [DATA | tested], "val_set_size": None},
            "warning trained-test-rows:test_datasets.0.path",
        )
        for trained, tested in (
            ({"path": "owner/rows"}, {"path": "owner/rows", "split": "train"}),
            ({"path": "owner/rows", "revision": "v1"}, {"path": "owner/rows", "revision": "v1", "split": "train[:9]"}),
            ({"path": "owner/rows", "split": "all[9:]"}, {"path": "owner/rows", "split": "all"}),
            ({}, {}),  # a file
        )
    ),
    ({"deepspeed": "deepspeed_configs/zero2.json"}, "warning missing-file:deepspeed"),
    ({"deepspeed": "zero3_bf16_cpuoffload_all.json"}, "warning missing-file:deepspeed"),
    ({"micro_batch_size": None}, "error no-batch-size:micro_batch_size"),
    ({"lora_target_modules": None, "lora_target_linear": False}, "error no-lora-targets:adapter"),
    ({"lora_target_modules": ["q_proj", "v_prj"]}, "error unknown-lora-target:lora_target_modules.1"),
    (
        PHI | {"special_tokens": None, "chat_template": "tokenizer_default"},
        "error unknown-lora-target:lora_target_modules.0",
    ),
    ({"lora_modules_to_save": ["embd_tokens"]}, "error unknown-lora-target:lora_modules_to_save.0"),
    ({"lora_target_modules": "a{99999999999999999999}"}, "error unknown-lora-target:lora_target_modules"),
    ({"lora_r": None}, "error no-lora-rank:adapter"),
    ({"adapter": None, "load_in_4bit": None}, "warning no-adapter:adapter"),
    ({"base_model": "codelama/CodeLlama-7b-hf"}, "note unknown-model:base_model"),
    (CHAT | {"chat_template_jinja": "gone.jinja"}, "error chat-template:datasets.0.type"),
    (
        {"datasets": [CHATS | {"chat_template_jinja": "{{ messages }}"}]},
        "error chat-template:datasets.0.chat_template_jinja",
    ),
    (CHAT, "warning chat-template:datasets.0.type"),
    ({"datasets": [CHATS | {"type": "chat_template.argilla_chat"}]}, "warning chat-template:datasets.0.type"),
    (
        {"datasets": [CHATS | {"chat_template": "chatml", "field_tools": "functions"}]},
        "error unread-tools:datasets.0.field_tools",
    ),
    (formatted(format="Q: "), "error prompt-format:datasets.0.type.format"),
    ({"adapter": "lora"}, "warning not-quantized:adapter"),
    ({"adapter": "lora", "load_in_8bit": True}, "warning not-quantized:adapter"),
    ({"sequence_len": None}, "warning no-sequence-len:sequence_len"),
    ({"peft_init_lora_weights": "pissa_niter_16"}, "error changed-base:peft_init_lora_weights"),
    (FUSED_LOSS, "error head-without-lora:liger_fused_linear_cross_entropy"),
    ({"fp16": None, "float16": True, "bf16": "auto"}, "error two-precisions:float16"),
    ({"sample_packing": True, "attn_implementation": None}, "warning packing-leaks:sample_packing"),
    (
        {"lora_modules_to_save": ["lm_head"], "fsdp_config": {"offload_params": False}, "optimizer": "adamw_torch"},
        "error fsdp-saves:lora_modules_to_save",
    ),
    (
        {"optimizer": "adamw_bnb_8bit", "fsdp_config": {"offload_params": False}},
        "error optimizer-and-parallelism:optimizer",
    ),
    ({"deepspeed": {"bf16": {}}, "bnb_config_kwargs": None}, "error packed-weights-cast:bnb_config_kwargs"),
    ({"optimizer": "adamw_bnb_8bit", "deepspeed": OFFLOADED}, "error optimizer-and-parallelism:optimizer"),
    ({"optimizer": "adamw_bnb_8bit", "deepspeed": "ds.json"}, "error optimizer-and-parallelism:optimizer"),
    ({"lr_scheduler": "cosine_with_min_lr"}, "error scheduler-needs:lr_scheduler"),
    ({"test_datasets": None}, "warning never-evaluated:evals_per_epoch"),
    ({"test_datasets": None, "evals_per_epoch": None, "eval_steps": 4}, "warning never-evaluated:eval_steps"),
    (
        {"test_datasets": None, "evals_per_epoch": None, "eval_steps": 4, "val_set_size": 0},
        "error never-evaluated:eval_steps",
    ),
    ({"evals_per_epoch": None}, "warning never-evaluated:test_datasets"),
    ({"evals_per_epoch": 1, "num_epochs": 1}, "warning never-evaluated:evals_per_epoch"),
    ({"num_epochs": 2, "saves_per_epoch": None, "save_steps": 500}, "warning never-saved:save_steps"),
    ({"max_steps": 5}, "error long-warm-up:warmup_steps"),
    ({"sequence_len": 16385}, "warning beyond-context:sequence_len"),
    ({"sample_packing": True, "sequence_len": 32768}, "warning beyond-context:sequence_len"),
    ({"special_tokens": {"pad_token": "<pad>"}}, "warning missing-special-token:special_tokens.pad_token"),
    ({"special_tokens": {"eos_token": "<|im_end|>"}}, "error missing-special-token:special_tokens.eos_token"),
    (TIED | {"special_tokens": {"eos_token": "<|im_end|>"}}, "error missing-special-token:special_tokens.eos_token"),
    (
        TIED | {"lora_modules_to_save": ["model.embed_tokens"], "lora_target_modules": ["q_proj", "lm_head"]},
        "warning tied-embeddings:lora_modules_to_save",
    ),
    ({"trust_remote_code": True}, "error foreign-code:trust_remote_code"),
    ({"plugins": ["mine.Plugin"]}, "error foreign-code:plugins.0"),
    ({"lora_model_dir": "pickled"}, "error pickled-weights:lora_model_dir"),
    ({"lora_model_dir": "wrapped"}, "error unmatched-adapter:lora_model_dir"),
    ({"use_comet": True}, "warning missing-package:use_comet"),
    ({"wandb_project": "mine"}, "warning no-login:wandb_project"),
    (
        {"dynamic_checkpoint": {"enabled": True, "trigger_file_path": "/home/u/thesis.tex"}},
        "error without-consent:dynamic_checkpoint.trigger_file_path",
    ),
    ({"deepspeed": "nvme.json"}, "error without-consent:deepspeed.zero_optimization.offload_param.nvme_path"),
    ({"mlflow_tracking_uri": "HTTPS://theirs.org"}, "error without-consent:mlflow_tracking_uri"),
    (
        {"test_datasets": [DATA | {"path": "data/codereviewer/valid.jsonl", "chat_template_jinja": "ds.json"}]},
        "error without-consent:test_datasets.0.chat_template_jinja",
    ),
    ({"hub_model_id": "theirs/model"}, "note without-consent:hub_model_id"),
    ({"optimizer": "came_pytorch"}, "warning missing-package:optimizer"),
    ({"attn_implementation": "sage"}, "warning missing-package:attn_implementation"),
    ({"plugins": [CCE]}, "warning missing-package:plugins"),
    ({"batch_size": 8}, "error batch-size:batch_size"),
    ({"full_determinism": True, "cut_cross_entropy": True}, "warning does-not-repeat:full_determinism"),
    ({"base_model": "./models/llama"}, "warning no-access:base_model"),
]


@pytest.mark.parametrize(("change", "finding"), CASES, ids=[f"{finding} {change}" for change, finding in CASES])
def test_a_mistake_gives_one_finding(change, finding):
    assert names(change) == [finding]


def test_the_messages_are_those_of_the_table():
    """The table has the message of each case, in their order, but each message once."""
    messages: list[str] = []
    for change, _ in CASES:
        messages += (str(finding).removeprefix(": ") for finding in findings_of(change))
    assert [*dict.fromkeys(messages)] == MESSAGES.read_text().splitlines()


OTHERS = {"unpinned", "gpu-lacks", "no-gpu", "parallelism-needs-gpus"}  # which have tests of their own


def test_a_pattern_without_an_end_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    monkeypatch.setattr(processes, "_exceeding", set())
    pattern = r"((\w|\.)+)+X"
    (problem,) = findings_of({"lora_target_modules": pattern})
    assert str(problem).removeprefix(": ") == (
        f"error: lora_target_modules: {pattern} is not a usable regular expression: {pattern}: takes more than 0.2 s "
        "or 256 MiB; use a list of names [unknown-lora-target:lora_target_modules]"
    )


def test_of_many_unknown_targets_some_are_named():
    targets = [f"q_prj{i}" for i in range(300)]
    assert len(of_rule("unknown-lora-target", {"lora_target_modules": targets})) == 100


def test_every_rule_has_a_case():
    tested = {finding.split()[1].partition(":")[0] for _, finding in CASES} | OTHERS
    assert tested == {*RULES}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [(name, "H100") for name in paths.recipe_names()]
    + [(name, "T4") for name in paths.recipe_names() if not recipe_config(name).get("bf16")],
)
def test_a_recipe_gives_no_error_and_no_warning(name, gpu):
    base = header_of(paths.recipe_file(name)).base  # whose model stands for the merged one
    change = {"base_model": recipe_config(base)["base_model"]} if base else {}
    problems = [finding for finding in findings_of(change, gpu, name=name) if finding.level != "note"]
    assert [finding for finding in problems if finding.rule != "never-saved"] == []  # the rows here are few


# what is changed in a recipe, or for some GPU, and gives no finding
ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500000}}
RIGHT: list[tuple[dict[str, Any], str | None]] = [
    ({"lora_target_modules": None, "lora_target_linear": True}, None),
    ({"lora_target_modules": ["self_attn.q_proj", "lm_head", "model.layers.31.mlp.up_proj"]}, None),
    ({"lora_modules_to_save": ["model.embed_tokens", "q_norm"], "learning_rate": "2.e-4"}, None),
    ({"lora_target_modules": r".*layers\.(2[0-9]|3[01])\..*"}, None),
    ({"adapter": "lora", "load_in_4bit": None}, None),
    ({"peft_init_lora_weights": "pissa"}, None),
    ({"sample_packing": True, "attn_implementation": "kernels-community/flash-attn2@v1"}, None),
    ({"optimizer": "paged_adamw_8bit", "deepspeed": {"zero_optimization": {"stage": 2}}}, None),
    (
        {"deepspeed": {"bf16": {}}, "bnb_config_kwargs": {"bnb_4bit_quant_storage": "float16"}},
        None,
    ),
    ({"optimizer": "adamw_bnb_8bit", "deepspeed": OFFLOADED | {"zero_force_ds_cpu_optimizer": False}}, None),
    ({"use_comet": False, "plugins": [CCE], "cut_cross_entropy": False}, None),
    ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}}, None),
    ({"test_datasets": None, "evals_per_epoch": None}, None),
    ({"warmup_steps": 27}, None),
    ({"sequence_len": 32768, "overrides_of_model_config": ROPE}, None),
    ({"special_tokens": {"pad_token": "<unk>"}}, None),
    ({"special_tokens": {"eos_token": "<|im_end|>"}, "lora_modules_to_save": ["embed_tokens", "lm_head"]}, None),
    (TIED | {"lora_modules_to_save": ["embed_tokens", "lm_head"], "peft_ensure_weight_tying": True}, None),
    (TIED | {"lora_target_modules": ["q_proj", "lm_head"]}, None),
    ({"datasets": [{"path": "some/data-set", "type": "alpaca"}]}, None),
    (data(path="data", data_files="data/codereviewer/t*.jsonl"), None),
    (data(path="owner/rows") | {"test_datasets": [DATA | {"path": "owner/rows"}]}, None),  # splits train and test
    (data(split="train[:90%]") | {"test_datasets": [DATA | {"split": "train[90%:]"}]}, None),
    ({"plugins": [CCE], "cut_cross_entropy": False}, None),
    ({"fp16": False, "bf16": True, "tf32": True, "attn_implementation": "kernels-community/flash-attn3"}, "H100"),
    ({"fp16": True, "bf16": "auto"}, "T4"),  # Axolotl then leaves bf16 off
]


@pytest.mark.parametrize(("change", "gpu"), RIGHT, ids=str)
def test_what_is_right_gives_none(change, gpu):
    assert findings_of(change, gpu) == []


TRITON = {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True, "lora_mlp_kernel": True}


@pytest.mark.parametrize(
    ("gpu", "change", "keys"),
    [
        ("V100", {}, ["base_model"]),
        ("T4", {"fp16": None, "bf16": None}, ["bf16"]),
        ("T4", {"tf32": True}, ["tf32"]),
        ("T4", {"sample_packing": True}, ["sample_packing"]),
        ("T4", {"sample_packing": True, "base_model": "mistralai/Mistral-7B-v0.1"}, []),  # its window has a mask
        ("sm_75", {"attn_implementation": "flash_attention_2"}, ["attn_implementation"]),
        ("T4", {"attn_implementation": "sage"}, ["attn_implementation"]),
        ("T4", {"attn_implementation": None, "flash_attention": True}, ["flash_attention"]),
        ("T4", TRITON | {"liger_glu_activation": False}, ["liger_rope", "lora_mlp_kernel"]),
        ("A100", TRITON, []),
    ],
)
def test_what_a_gpu_lacks(gpu, change, keys):
    level = "warning" if "liger_rope" in keys else "error"
    assert sorted(of_rule("gpu-lacks", change, gpu)) == [f"{level} gpu-lacks:{key}" for key in keys]


@pytest.mark.parametrize(
    ("base_model", "remedy"),
    [
        ("mistralai/Mistral-7B-v0.1", "use `--set bf16=false --set fp16=true`"),
        (
            "google/gemma-3-1b-it",
            "activations of this model overflow in fp16: use `--set bf16=false` for fp32, or a GPU with bf16",
        ),
    ],
)
def test_only_some_models_are_advised_to_use_fp16(base_model, remedy):
    findings = findings_of({"base_model": base_model, "fp16": None, "bf16": None}, "T4")
    assert [finding.remedy for finding in findings if finding.name == "gpu-lacks:bf16"] == [remedy]


def test_torch_for_an_older_cuda_runs_on_older_gpus(monkeypatch):
    for cuda in ("12.6", None):
        monkeypatch.setattr(settings_rules, "torch_cuda", lambda cuda=cuda: cuda)
        assert findings_of({}, "V100") == []


FLASH = {"attn_implementation": "flash_attention_2"}


def test_packages_that_are_installed_or_missing(monkeypatch):
    change = {"fp16": False, "bf16": True, "attn_implementation": "sage", "use_comet": True}
    missing = ["error missing-package:attn_implementation", "error missing-package:use_comet"]
    assert sorted(names(change, "A100", launching=True)) == missing
    monkeypatch.setenv("WANDB_API_KEY", "for the test")
    installed = {"flash-attn": "1.0", "cut-cross-entropy": "1.0", "wandb": "1.0"}
    monkeypatch.setattr(settings_rules, "package_version", installed.get)
    assert findings_of(FLASH | {"plugins": [CCE], "use_wandb": True}) == []
    (only,) = findings_of(
        {"attn_implementation": "flash_attention_4"}
    )  # flash-attn is another package of the same name
    assert "flash-attn-4" in only.problem
    installed.clear()
    for attention in (FLASH, {"attn_implementation": "kernels-community/flash-attn3"}):
        assert names(attention) == ["warning missing-package:attn_implementation"]


def test_wandb_without_a_login_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(settings_rules, "package_version", lambda _: "1.0")
    (tmp_path / ".netrc").write_text("machine example.org login a password b\n")
    assert names({"wandb_project": "mine"}) == ["warning no-login:wandb_project"]
    monkeypatch.setenv("WANDB_API_KEY", "0")
    assert findings_of({"wandb_project": "mine"}) == []


def test_logins_in_files_and_trackers_of_this_machine_need_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(settings_rules, "package_version", lambda _: "1.0")
    assert names({"use_wandb": True}) == ["warning no-login:use_wandb"]
    assert findings_of({"use_wandb": True, "wandb_mode": "offline"}) == []
    assert findings_of({"comet_project_name": "a"}) == []
    assert findings_of({"use_mlflow": True, "use_trackio": True, "use_tensorboard": True}) == []
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0\n")
    assert findings_of({"use_wandb": True}) == []


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (FLASH, {"attn_implementation"}),
        ({"attn_implementation": "eager", "torch_compile": True}, {"torch_compile"}),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True}, {"plugins", "liger_rope"}),
        ({"lora_mlp_kernel": True}, {"lora_mlp_kernel"}),
    ],
)
def test_what_a_cpu_lacks_is_an_error_only_once_a_run_starts(change, keys):
    in_fp32 = change | {"fp16": False}
    assert of_rule("no-gpu", in_fp32) == of_rule("no-gpu", in_fp32, "A100", launching=True) == []
    assert {*of_rule("no-gpu", in_fp32, launching=True)} >= {f"error no-gpu:{key}" for key in keys}


def test_fp16_and_fsdp_need_gpus_only_once_a_run_starts():
    by_default = {"fp16": None, "bf16": "auto"}  # which becomes fp16 on a CPU
    assert names(by_default, launching=True) == ["error no-gpu:bf16"]
    assert findings_of(by_default | {"fp16": False}, launching=True) == []
    assert names({}, launching=True) == ["error no-gpu:fp16"]
    assert findings_of({}, "T4", launching=True) == []
    fsdp = {"optimizer": "adamw_torch", "fsdp_config": {"reshard_after_forward": True}, "fp16": False}
    assert names(fsdp) == []
    assert names(fsdp, launching=True) == ["error parallelism-needs-gpus:fsdp_config"]


PACKED = {"fp16": False, "bf16": True, "sample_packing": True}


@pytest.mark.parametrize(
    ("sizes", "change", "warns"),
    [
        ({}, {}, False),
        ({}, {"sdpa_varlen": False}, True),
        ({"head_dim": 512}, {}, True),
        ({"sliding_window": 4096}, {}, True),
        ({"sliding_window": 4096, "use_sliding_window": False}, {}, False),
        ({"query_pre_attn_scalar": 144}, {}, True),
        ({"attention_dropout": 0.1}, {}, True),
    ],
    ids=str,
)
def test_packed_rows_in_bf16_with_a_mask_before_hopper(tmp_path, sizes, change, warns):
    architecture = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(architecture | sizes))
    change = {"base_model": str(tmp_path), "sdpa_varlen": True} | PACKED | change
    assert of_rule("packing-leaks", change, "A100") == ["warning packing-leaks:sample_packing"] * warns
    assert of_rule("packing-leaks", change, "H100") == []


def test_a_gated_model_without_a_token(monkeypatch, place):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place / "token"))
    assert [(f.level, f.name) for f in findings_of({}, name=LLAMA_3)] == [("warning", "no-access:base_model")]
    assert [f.level for f in findings_of({}, "T4", launching=True, name=LLAMA_3)] == ["error"]
    assert findings_of({"base_model": "NousResearch/Meta-Llama-3-8B"}, name=LLAMA_3) == []
    tokenizer: dict[str, Any] = {"tokenizer_config": "meta-llama/Llama-3.2-3B"}
    assert names(tokenizer | {"revision_of_model": None}) == ["warning no-access:tokenizer_config"]
    (place / "token").write_text("x")
    assert findings_of({}, name=LLAMA_3) == []
    assert names(tokenizer) == ["error no-access:tokenizer_config"]  # revision_of_model is a commit of the model
    assert names(tokenizer | {"revision_of_model": "main"}) == names({"tokenizer_config": str(place)}) == []


def test_a_model_that_is_not_in_the_cache_when_offline(monkeypatch, place):
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    no_access = ["warning no-access:base_model"]
    assert names({}) == no_access
    revision = str(config_with({})["revision_of_model"])
    folder = place / "hub" / "models--codellama--CodeLlama-7b-hf" / "snapshots" / revision
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 16384, "model_type": "llama"}')
    assert names({}) == no_access  # the weights are not there
    (folder / "model.safetensors").touch()
    assert names({}) == []
    assert names({"revision_of_model": "main"}) == no_access


def test_a_commit_in_the_cache_is_the_one_to_pin(monkeypatch, place):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    commits = {"models--some--model": "a" * 40, "datasets--some--rows": "b" * 40}
    for name, commit in commits.items():
        (place / "hub" / name / "snapshots" / commit).mkdir(parents=True)
        (place / "hub" / name / "snapshots" / commit / "config.json").write_text("{}")
        (place / "hub" / name / "refs").mkdir()
        (place / "hub" / name / "refs" / "main").write_text(commit)
        kind, *parts = name.split("--")
        cached = try_to_load_from_cache("/".join(parts), "config.json", place / "hub", repo_type=kind.removesuffix("s"))
        assert Path(str(cached)).parent.name == commit
    data = {"path": "some/rows", "type": "alpaca"}
    unpinned: dict[str, Any] = {"base_model": "some/model", "revision_of_model": None, "datasets": [data]}
    problem = "not pinned to a commit; this machine has"
    assert [finding.text for finding in findings_of(unpinned) if finding.rule == "unpinned"] == [
        f"base_model: {problem} {'a' * 40}; set revision_of_model: {'a' * 40} [unpinned:base_model]",
        f"datasets.0.path: {problem} {'b' * 40}; set datasets.0.revision: {'b' * 40} [unpinned:datasets.0.path]",
    ]
    assert len(of_rule("unpinned", unpinned | {"revision_of_model": "main"})) == 2
    pinned = {"revision_of_model": "a" * 40, "datasets": [data | {"revision": "b" * 40}]}
    assert of_rule("unpinned", unpinned | pinned) == []
    cached_commits = [(source.key, source.commit) for source in datafiles.hub_commits(unpinned | pinned)]
    assert cached_commits == [("base_model", "a" * 40), ("datasets.0.path", "b" * 40)]
    (place / "some" / "rows").mkdir(parents=True)  # a folder comes before the hub
    (place / "some" / "model").mkdir()
    assert of_rule("unpinned", unpinned) == []


def test_chats_need_a_template_of_the_tokenizer_or_the_config(tiny, place):
    for model, count in (("Qwen/Qwen2.5-7B", 0), ("google/gemma-2-9b", 1)):
        assert len(of_rule("chat-template", CHAT | {"revision_of_model": None, "base_model": model})) == count
    local = {"base_model": str(tiny), "revision_of_model": None} | CHAT
    assert names(local) == ["error chat-template:datasets.0.type"]
    for name in ("chatml", "tokenizer_default_fallback_chatml"):
        assert findings_of(local | {"chat_template": name}) == []
    model = shutil.copytree(tiny, place / "model")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert findings_of(local | {"base_model": str(model)}) == []


def test_rows_beyond_a_table_of_positions_are_an_error(tiny, place):
    model = shutil.copytree(tiny, place / "model")
    write_json(model / "config.json", {"model_type": "gpt2", "n_positions": 1024})
    local = {"base_model": str(model), "revision_of_model": None}
    assert names(local | {"sequence_len": 1024}) == []
    assert names(local | {"sequence_len": 1025}) == ["error beyond-context:sequence_len"]


def test_a_local_model_is_judged_by_its_own_files(tiny):
    local = {"base_model": str(tiny), "revision_of_model": None}
    assert findings_of(local) == []
    assert names(local | {"sequence_len": 2049}) == ["warning beyond-context:sequence_len"]
    pad = {"special_tokens": {"pad_token": "<|im_end|>"}}
    assert names(local | pad) == ["warning missing-special-token:special_tokens.pad_token"]
