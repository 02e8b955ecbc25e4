"""A case or more for each rule, and none for a recipe as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import config_with, recipe_config

from qlora_recipes.base import hub, paths, processes
from qlora_recipes.check import settings_rules
from qlora_recipes.check.rule import RULES, Case, rule_findings
from qlora_recipes.config import gpus
from qlora_recipes.config.finding import Finding

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


# what is changed in a recipe, and the one finding that it gives
CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"lora_target_linear": True},
        "error: lora_target_linear: adapts all linear layers, not onl"
        "y those of lora_target_modules; delete one of the two keys [overridden-targets:lora_target"
        "_linear]",
    ),
    (
        {"save_only_model": True},
        "warning: save_only_model: checkpoints have no optimizer stat"
        "e: a resumed run restarts optimizer and schedule; delete it [cannot-resume:save_only_model"
        "]",
    ),
    (
        {"saves_per_epoch": 5, "save_total_limit": None},
        "note: save_total_limit: not set: of 10 checkpoints, only the"
        " last 4 are kept; set it to the number that you need [deleted-checkpoints:save_total_limit"
        "]",
    ),
    (
        {"rl": "dpo", "rl_beta": 0.0},
        "error: rl_beta: 0: preferences have no effect, and nothing i"
        "s trained; set it, for example to 0.1 [no-preference:rl_beta]",
    ),
    (
        {"special_tokens": {"additional_special_tokens": ["<tool>"]}},
        "error: special_tokens.additional_special_tokens: <tool> is n"
        "ot a special token of this model: Axolotl adds it with a new embedding row; LoRA does not "
        "train that row, and loading the adapter requires adding it to the base model; use one of the mo"
        "del's tokens, or set lora_modules_to_save: [embed_tokens, lm_head] [missing-special-token:speci"
        "al_tokens.additional_special_tokens]",
    ),
    (
        {"datasets": None},
        "error: datasets: the config has no training data; list a data set with path and type [no-data:datasets]",
    ),
    (
        {"pretraining_dataset": [DATA]},
        "error: pretraining_dataset: its rows are streamed, so that they can be neither checked nor counted nor "
        "recorded; list the data under datasets, with type: completion [no-data:pretraining_dataset]",
    ),
    (
        {"test_datasets": None, "val_set_size": 2000},
        "error: val_set_size: 2000 leaves no rows for training; set a share below 1, or a lower number above 1 "
        "[no-data:val_set_size]",
    ),
    (
        data(path="owner/rows-on-a-hub") | {"test_datasets": None, "val_set_size": 1},
        "error: val_set_size: 1 leaves no rows for training; set a share below 1, or a lower number above 1 "
        "[no-data:val_set_size]",
    ),
    (
        {"hub_model_id": "x", "wandb_api_key": "x"},
        "error: wandb_api_key: this secret would be stored in the run's folder; use an environment variable "
        "instead [secret:wandb_api_key]",
    ),
    (
        {"wandb_name": "https://x.org/?id=1"},
        "error: wandb_name: a parameter of this URL can be a secret, and would be stored in the "
        "run's folder; download the file, and name its path [url-parameter:wandb_name]",
    ),
    (
        data(path="gone.jsonl"),
        "error: datasets.0.path: gone.jsonl does not exist; correct the path; only data_files of a folder can be "
        "a pattern [missing-file:datasets.0.path]",
    ),
    (
        data(path="data/codereviewer/trian.jsonl"),
        "error: datasets.0.path: data/codereviewer/trian.jsonl does not exist; did you mean "
        "data/codereviewer/train.jsonl?; correct the path; only data_files of a folder can be a pattern "
        "[missing-file:datasets.0.path]",
    ),
    (
        data(path="data/codereviewer/test-subset-2.jsonl"),
        "error: datasets.0.path: data/codereviewer/test-subset-2.jsonl is not prepared yet; run `recipe data "
        "fetch codereviewer` and `recipe data prepare --study haider2024` [not-prepared:datasets.0.path]",
    ),
    (
        data(path="empty.jsonl"),
        "error: datasets.0.path: empty.jsonl is empty; write rows to it, or name another file "
        "[missing-file:datasets.0.path]",
    ),
    (
        data(path="data/codereviewer/t*.jsonl"),
        "error: datasets.0.path: data/codereviewer/t*.jsonl does not exist; did you mean "
        "data/codereviewer/test.jsonl?; correct the path; only data_files of a folder can be a pattern "
        "[missing-file:datasets.0.path]",
    ),
    (
        data(path="json", data_files="data/codereviewer/t*.jsonl"),
        "error: datasets.0.path: json does not exist; correct the path; only data_files of a folder can be a "
        "pattern [missing-file:datasets.0.path]",
    ),
    *(
        (
            {"datasets": [DATA | trained], "test_datasets": [DATA | tested], "val_set_size": None},
            "warning: test_datasets.0.path: has rows of datasets.0, which are trained on: scores mean little; name "
            "other rows, or delete it and set val_set_size [trained-test-rows:test_datasets.0.path]",
        )
        for trained, tested in (
            ({"path": "owner/rows"}, {"path": "owner/rows", "split": "train"}),
            ({"path": "owner/rows", "revision": "v1"}, {"path": "owner/rows", "revision": "v1", "split": "train[:9]"}),
            ({"path": "owner/rows", "split": "all[9:]"}, {"path": "owner/rows", "split": "all"}),
            ({}, {}),  # a file
        )
    ),
    (
        {"deepspeed": "deepspeed_configs/zero2.json"},
        "error: deepspeed: deepspeed_configs/zero2.json does not exist; correct the path, or delete the key and add "
        "--profile zero2 [missing-file:deepspeed]",
    ),
    (
        {"deepspeed": "zero3_bf16_cpuoffload_all.json"},
        "error: deepspeed: zero3_bf16_cpuoffload_all.json does not exist; correct the path, or delete the key and add "
        "--profile zero3-offload [missing-file:deepspeed]",
    ),
    (
        {"micro_batch_size": None},
        "error: micro_batch_size: not set: Axolotl would use 1; set it [no-batch-size:micro_batch_size]",
    ),
    (
        {"lora_target_modules": None, "lora_target_linear": False},
        "error: adapter: LoRA has no target layers; set lora_target_modules or lora_target_linear: true "
        "[no-lora-targets:adapter]",
    ),
    (
        {"lora_target_modules": ["q_proj", "v_prj"]},
        "error: lora_target_modules.1: no layer of this model is called v_prj; did you mean v_proj? "
        "[unknown-lora-target:lora_target_modules.1]",
    ),
    (
        PHI | {"special_tokens": None, "chat_template": "tokenizer_default"},
        "error: lora_target_modules.0: no layer of this model is called q_proj; did you mean qkv_proj or o_proj "
        "or down_proj? [unknown-lora-target:lora_target_modules.0]",
    ),
    (
        {"lora_modules_to_save": ["embd_tokens"]},
        "error: lora_modules_to_save.0: no module of this model is called embd_tokens; did you mean "
        "embed_tokens? [unknown-lora-target:lora_modules_to_save.0]",
    ),
    (
        {"lora_target_modules": "a{99999999999999999999}"},
        "error: lora_target_modules: a{99999999999999999999} is not a usable regular expression: the repetition "
        "number is too large; use a list of names [unknown-lora-target:lora_target_modules]",
    ),
    (
        {"lora_r": None},
        "error: adapter: lora_r is not set; set lora_r [no-lora-rank:adapter]",
    ),
    (
        {"adapter": None, "load_in_4bit": None},
        "error: adapter: not set: Axolotl would train all weights; set lora or qlora, or use Axolotl itself "
        "[no-adapter:adapter]",
    ),
    (
        {"base_model": "codelama/CodeLlama-7b-hf"},
        "note: base_model: did you mean codellama/CodeLlama-7b-hf or meta-llama/Llama-2-7b-hf or "
        "huggyllama/llama-7b? codelama/CodeLlama-7b-hf is not on this machine: its layers, context and special "
        "tokens are not checked; to check them, run `hf download codelama/CodeLlama-7b-hf --include config.json "
        "--include 'tokenizer*'` [unknown-model:base_model]",
    ),
    (
        CHAT | {"chat_template_jinja": "gone.jinja"},
        "error: datasets.0.type: chat_template_jinja: gone.jinja is neither a file nor a template "
        "[chat-template:datasets.0.type]",
    ),
    (
        {"datasets": [CHATS | {"chat_template_jinja": "{{ messages }}"}]},
        "error: datasets.0.chat_template_jinja: Axolotl ignores this key if the data set has no chat_template; "
        "also set chat_template: jinja [chat-template:datasets.0.chat_template_jinja]",
    ),
    (
        CHAT,
        "warning: datasets.0.type: not a chat model: its tokenizer may lack a chat template; set chat_template, "
        "for example to chatml [chat-template:datasets.0.type]",
    ),
    (
        {"datasets": [CHATS | {"chat_template": "chatml", "field_tools": "functions"}]},
        "error: datasets.0.field_tools: Axolotl ignores this key and reads the field `tools`; rename the field "
        "of the rows to `tools` [unread-tools:datasets.0.field_tools]",
    ),
    (
        formatted(format="Q: "),
        "error: datasets.0.type.format: {instruction} is missing: prompts lack the rows' text; add it "
        "[prompt-format:datasets.0.type.format]",
    ),
    (
        {"adapter": "lora"},
        "error: adapter: lora ignores load_in_4bit: the base stays in 16 bits; set adapter: qlora "
        "[not-quantized:adapter]",
    ),
    (
        {"peft_init_lora_weights": "pissa_niter_16"},
        "error: peft_init_lora_weights: pissa_niter_16 splits the base weights at random; loading the adapter "
        "splits them differently; set base_model to a published residual model, and lora_model_dir to its "
        "initial adapter, as in pissa-metamathqa/llama-2-7b-pissa [changed-base:peft_init_lora_weights]",
    ),
    (
        FUSED_LOSS,
        "error: liger_fused_linear_cross_entropy: computes the loss without LoRA on lm_head, so that lm_head is "
        "not trained; set chunked_cross_entropy: true instead "
        "[head-without-lora:liger_fused_linear_cross_entropy]",
    ),
    (
        {"fp16": None, "float16": True, "bf16": "auto"},
        "error: float16: float16 is true, but Axolotl would load the model in bfloat16: bf16 (by default auto) "
        "or bfloat16 is on; set float16, or bf16 and bfloat16, to false [two-precisions:float16]",
    ),
    (
        {"sample_packing": True, "attn_implementation": None},
        "error: sample_packing: with no attn_implementation, packed rows attend to each other; set "
        "attn_implementation: flash_attention_2 [packing-leaks:sample_packing]",
    ),
    (
        {"lora_modules_to_save": ["lm_head"], "fsdp_config": {"offload_params": False}, "optimizer": "adamw_torch"},
        "error: lora_modules_to_save: FSDP2 would train these modules, then fail while saving the adapter; "
        "delete the key, or use DeepSpeed, as with --profile zero2 [fsdp-saves:lora_modules_to_save]",
    ),
    (
        {"optimizer": "adamw_bnb_8bit", "fsdp_config": {"offload_params": False}},
        "error: optimizer: adamw_bnb_8bit does not work with FSDP2; set adamw_torch_8bit or adamw_torch_fused "
        "[optimizer-and-parallelism:optimizer]",
    ),
    (
        {"deepspeed": {"bf16": {}}, "bnb_config_kwargs": None},
        "error: bnb_config_kwargs: the engine casts the 4-bit weights, stored as bfloat16, to float16 and "
        "destroys them; add bnb_4bit_quant_storage: uint8, which nothing casts "
        "[packed-weights-cast:bnb_config_kwargs]",
    ),
    (
        {"optimizer": "adamw_bnb_8bit", "deepspeed": OFFLOADED},
        "error: optimizer: offload_optimizer replaces adamw_bnb_8bit by Adam without AdamW's weight decay; set "
        "adamw_torch, or use the profile zero3-offload [optimizer-and-parallelism:optimizer]",
    ),
    (
        {"optimizer": "adamw_bnb_8bit", "deepspeed": "ds.json"},
        "error: optimizer: offload_optimizer replaces adamw_bnb_8bit by Adam without AdamW's weight decay; set "
        "adamw_torch, or use the profile zero3-offload [optimizer-and-parallelism:optimizer]",
    ),
    (
        {"lr_scheduler": "cosine_with_min_lr"},
        "error: lr_scheduler: cosine_with_min_lr needs min_lr or min_lr_rate; set it under lr_scheduler_kwargs "
        "[scheduler-needs:lr_scheduler]",
    ),
    (
        {"test_datasets": None},
        "error: evals_per_epoch: no evaluation data; set test_datasets or val_set_size, or delete the key "
        "[never-evaluated:evals_per_epoch]",
    ),
    (
        {"evals_per_epoch": None},
        "warning: test_datasets: never used: no key says when to evaluate; set evals_per_epoch "
        "[never-evaluated:test_datasets]",
    ),
    (
        {"evals_per_epoch": 1, "num_epochs": 1},
        "warning: evals_per_epoch: one evaluation, which Axolotl skips; use eval_strategy: epoch instead "
        "[never-evaluated:evals_per_epoch]",
    ),
    (
        {"num_epochs": 2, "saves_per_epoch": None, "save_steps": 500},
        "warning: save_steps: no checkpoint: training has at most 28 steps; lower it [never-saved:save_steps]",
    ),
    (
        {"max_steps": 5},
        "error: warmup_steps: warm-up never ends: training has at most 5 steps; lower it [long-warm-up:warmup_steps]",
    ),
    (
        {"sequence_len": 16385},
        "error: sequence_len: 16385 exceeds the model's context of 16384 tokens; lower it "
        "[beyond-context:sequence_len]",
    ),
    (
        {"special_tokens": {"pad_token": "<pad>"}},
        "warning: special_tokens.pad_token: <pad> is not a special token of this model: Axolotl adds it with a "
        "new embedding row; LoRA does not train that row, and loading the adapter requires adding it to the base "
        "model; use one of the model's tokens, or set lora_modules_to_save: [embed_tokens, lm_head] "
        "[missing-special-token:special_tokens.pad_token]",
    ),
    (
        {"special_tokens": {"eos_token": "<|im_end|>"}},
        "error: special_tokens.eos_token: <|im_end|> is not a special token of this model: Axolotl adds it with "
        "a new embedding row; LoRA does not train that row, and loading the adapter requires adding it to the "
        "base model; use one of the model's tokens, or set lora_modules_to_save: [embed_tokens, lm_head] "
        "[missing-special-token:special_tokens.eos_token]",
    ),
    (
        TIED | {"special_tokens": {"eos_token": "<|im_end|>"}},
        "error: special_tokens.eos_token: <|im_end|> is not a special token of this model: Axolotl adds it with "
        "a new embedding row; LoRA does not train that row, and loading the adapter requires adding it to the "
        "base model; use one of the model's tokens, or set lora_modules_to_save: [embed_tokens, lm_head] and "
        "peft_ensure_weight_tying: true [missing-special-token:special_tokens.eos_token]",
    ),
    (
        TIED | {"lora_modules_to_save": ["model.embed_tokens"], "lora_target_modules": ["q_proj", "lm_head"]},
        "error: lora_modules_to_save: lm_head is tied to embed_tokens in this model: trained apart, only embed_tokens "
        "outlives a merge; set peft_ensure_weight_tying: true [tied-embeddings:lora_modules_to_save]",
    ),
    (
        {"trust_remote_code": True},
        "error: trust_remote_code: may run foreign code: True is not on the list of what is harmless; read the "
        "code; to run it, pass the name in brackets to --force [foreign-code:trust_remote_code]",
    ),
    (
        {"plugins": ["mine.Plugin"]},
        "error: plugins.0: may run foreign code: mine.Plugin is not on the list of what is harmless; read the "
        "code; to run it, pass the name in brackets to --force [foreign-code:plugins.0]",
    ),
    (
        {"lora_model_dir": "pickled"},
        "error: lora_model_dir: would load adapter_model.bin, which is not a safetensors file: loading it can "
        "run code; use a safetensors copy; to load it, pass the name in brackets to --force "
        "[pickled-weights:lora_model_dir]",
    ),
    (
        {"use_comet": True},
        "warning: use_comet: the package comet-ml is not installed; install it, or delete use_comet "
        "[missing-package:use_comet]",
    ),
    (
        {"wandb_project": "mine"},
        "warning: wandb_project: wandb has no login on this machine: a run would stop after loading the model; "
        "run `wandb login`, or delete wandb_project [no-login:wandb_project]",
    ),
    (
        {"dynamic_checkpoint": {"enabled": True, "trigger_file_path": "/home/u/thesis.tex"}},
        "error: dynamic_checkpoint.trigger_file_path: a training would delete /home/u/thesis.tex; delete the key, or "
        "pass the name in brackets to --force [without-consent:dynamic_checkpoint.trigger_file_path]",
    ),
    (
        {"deepspeed": "nvme.json"},
        "error: deepspeed.zero_optimization.offload_param.nvme_path: a training would write and delete folders in "
        "/home/u; delete the key, or pass the name in brackets to --force "
        "[without-consent:deepspeed.zero_optimization.offload_param.nvme_path]",
    ),
    (
        {"mlflow_tracking_uri": "HTTPS://theirs.org"},
        "error: mlflow_tracking_uri: a training would write metrics, perhaps with your token, to HTTPS://theirs.org; "
        "delete the key, or pass the name in brackets to --force [without-consent:mlflow_tracking_uri]",
    ),
    (
        {"test_datasets": [DATA | {"path": "data/codereviewer/valid.jsonl", "chat_template_jinja": "ds.json"}]},
        "error: test_datasets.0.chat_template_jinja: a training would use, as a chat template, the text of ds.json; "
        "delete the key, or pass the name in brackets to --force "
        "[without-consent:test_datasets.0.chat_template_jinja]",
    ),
    (
        {"hub_model_id": "theirs/model"},
        "note: hub_model_id: a training would upload the model, if your login may, to theirs/model; delete the key if "
        "this account is not yours [without-consent:hub_model_id]",
    ),
    (
        {"optimizer": "came_pytorch"},
        "warning: optimizer: the package came-pytorch is not installed; install it, or delete optimizer "
        "[missing-package:optimizer]",
    ),
    (
        {"attn_implementation": "sage"},
        "warning: attn_implementation: the package sageattention is not installed; install it from "
        "github.com/thu-ml/SageAttention, or delete attn_implementation [missing-package:attn_implementation]",
    ),
    (
        {"plugins": [CCE]},
        "warning: plugins: the package cut-cross-entropy is not installed; install it from "
        "git+https://github.com/axolotl-ai-cloud/ml-cross-entropy.git@v0.1.1, Axolotl's fork, or delete plugins "
        "[missing-package:plugins]",
    ),
    (
        {"batch_size": 8},
        "error: batch_size: Axolotl counts steps by it, but does not accumulate by it, and so trains a part of the "
        "rows; set gradient_accumulation_steps to batch_size / micro_batch_size instead [batch-size:batch_size]",
    ),
    (
        {"full_determinism": True, "cut_cross_entropy": True},
        "warning: full_determinism: cut cross entropy adds gradients in no fixed order: runs differ in their "
        "last bits; set cut_cross_entropy: false [does-not-repeat:full_determinism]",
    ),
    (
        {"base_model": "./models/llama"},
        "error: base_model: ./models/llama does not exist; give a folder, or a model on the hub as owner/name "
        "[no-access:base_model]",
    ),
]


def name_of(text: str) -> str:
    """Name of a finding, which its text has at the end, in brackets."""
    return text.rpartition("[")[2].removesuffix("]")


@pytest.mark.parametrize(("change", "text"), CASES, ids=[f"{name_of(text)} {change}" for change, text in CASES])
def test_a_mistake_gives_one_finding(change, text):
    assert list(map(str, findings_of(change))) == [f": {text}"]


OTHERS = {"gpu-lacks", "no-gpu", "parallelism-needs-gpus"}  # which have tests of their own


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
    tested = {name_of(text).partition(":")[0] for _, text in CASES} | OTHERS
    assert tested == {*RULES}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [(name, "H100") for name in paths.recipe_names()]
    + [(name, "T4") for name in paths.recipe_names() if not recipe_config(name).get("bf16")],
)
def test_a_recipe_gives_no_error_and_no_warning(name, gpu):
    assert [finding for finding in findings_of({}, gpu, name=name) if finding.level != "note"] == []


# what is changed in a recipe, or for some GPU, and gives no finding
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
    ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}}, None),
    ({"test_datasets": None, "evals_per_epoch": None}, None),
    ({"warmup_steps": 27}, None),
    ({"sequence_len": 32768, "overrides_of_model_config": {"rope_scaling": {"type": "linear", "factor": 2}}}, None),
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


def test_a_local_model_is_judged_by_its_own_files(tiny):
    local = {"base_model": str(tiny), "revision_of_model": None}
    assert findings_of(local) == []
    assert names(local | {"sequence_len": 2049}) == ["error beyond-context:sequence_len"]
    pad = {"special_tokens": {"pad_token": "<|im_end|>"}}
    assert names(local | pad) == ["warning missing-special-token:special_tokens.pad_token"]
