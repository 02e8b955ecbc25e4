"""Configs of older releases of Axolotl, brought in by `recipe new --from` and `recipe study new --from`."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import chat_models
import old_configs
import pytest
from a_card import CARD
from jinja2.sandbox import ImmutableSandboxedEnvironment
from packaging.version import Version

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import sha256
from qlora_recipes.base.yamlfiles import Config
from qlora_recipes.check import schema
from qlora_recipes.config import datafiles
from qlora_recipes.training.losses import MASKED
from qlora_recipes.training.tokens import Tokenizer
from qlora_recipes.writing import migrate, own_rows
from qlora_recipes.writing.migrate import OldConfig

CHATML = migrate.tables()["conversations"]["chatml"]["template"]
LLAMA3 = migrate.tables()["conversations"]["llama3"]["template"]
CHAT = {
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human", "user"], "assistant": ["gpt", "assistant"], "system": ["system"]},
    "type": "chat_template",
    "chat_template": "jinja",
    "chat_template_jinja": CHATML,
}
MEAN = "a step's loss was the mean over micro batches; in 0.21 it is the mean over all tokens of the step"
STEPS = (
    "an epoch had no step for its last rows: of 45 rows, 10 epochs in steps of 16 were 20 steps, in 0.21 29; "
    "max_steps: 20 would train as long"
)
OF_2023 = """\
base_model: models/llama
base_model_config: models/llama
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
lora_fan_in_fan_out:
datasets:
  - {path: rows.jsonl, type: alpaca}
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
sequence_len: 512
max_packed_sequence_len: 256
wandb_project: theirs
wandb_run_id:
output_dir: ./qlora-out
micro_batch_size: 2
num_epochs: 1
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: true
gradient_checkpointing: true
xformers_attention: true
flash_attention:
gptq_groupsize:
special_tokens: {pad_token: </s>}
"""


UNREAD = ("data_seed", "lora_rr", "max_seq_length")


def changed(text: str, release: str) -> Config:
    """Settings that a migration changes; None for removed ones."""
    migration = migrate.migrate(OldConfig(Path("old.yml"), text, release=release))
    return {key: migration.config.get(key) for key in migration.reasons()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("debug:", {"debug": None}, id="empty"),
        pytest.param("base_model: x\nbase_model_config: x", {"base_model_config": None}, id="config-of-the-model"),
        pytest.param("base_model: x\nbase_model_config: y", {}, id="config-of-another-model"),
        pytest.param("strict: false\ndeepspeed: false", {"strict": None, "deepspeed": None}, id="off"),
        pytest.param("is_llama_derived_model: true", {"is_llama_derived_model": None}, id="without-effect"),
        pytest.param(
            "flash_attention: true", {"flash_attention": None, "attn_implementation": "flash_attention_2"}, id="flash"
        ),
        pytest.param("sdp_attention: true", {"sdp_attention": None, "attn_implementation": "sdpa"}, id="sdpa"),
        pytest.param(
            "flash_attention: true\nattn_implementation: eager", {"flash_attention": None}, id="new-key-decides"
        ),
        pytest.param(
            "evaluation_strategy: epoch\nval_set_size: 1",
            {"evaluation_strategy": None, "eval_strategy": "epoch"},
            id="renamed",
        ),
        pytest.param(
            "max_packed_sequence_len: 256\nsequence_len: 512",
            {"max_packed_sequence_len": None, "sample_packing": True, "sequence_len": 256},
            id="packed",
        ),
        pytest.param(
            "relora_steps: 150\nrelora: true",
            {"relora_steps": None, "jagged_restart_steps": 150},
            id="relora",
        ),
        pytest.param(
            "rope_scaling: {type: linear, factor: 2.0}",
            {"rope_scaling": None, "overrides_of_model_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
            id="nested",
        ),
        pytest.param("data_seed: 1\nlora_rr: 1\nmax_seq_length: 8", dict.fromkeys(UNREAD), id="unread"),
        pytest.param("liger_rope: true", {"liger_rope": None}, id="without-its-plugin"),
        pytest.param("plugins: [other.Plugin]\nother_key: 1", {}, id="perhaps-read-by-a-plugin"),
        pytest.param(
            "datasets: [{path: x, train_on_split: train}]", {"datasets": [{"path": "x"}]}, id="unread-of-a-data-set"
        ),
        pytest.param("train_on_split: train", {"train_on_split": None}, id="never-read"),
        pytest.param(
            "fsdp_version: 2\nfsdp_config: {offload_params: true, use_orig_params: true}",
            {"fsdp_config": {"offload_params": True}},
            id="fsdp1-beside-fsdp2",
        ),
        pytest.param(
            "fsdp_version: 2\nfsdp_config: {sharding_strategy: SHARD_GRAD_OP}",
            {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}},
            id="sharding-beside-fsdp2",
        ),
        pytest.param("optimizer: adamw_hf", {"optimizer": "adamw_torch"}, id="value"),
        pytest.param("optimizer: adamw_bnb_8bit", {}, id="value-that-stays"),
        pytest.param("tokens: <|im_start|>", {"tokens": ["<|im_start|>"]}, id="one-token"),
        pytest.param("tokens: {a: , b: }", {"tokens": ["a", "b"]}, id="mapping-of-tokens"),
        pytest.param("wandb_project: x\nhub_model_id: y", {"wandb_project": None, "hub_model_id": None}, id="account"),
        pytest.param("dataset_prepared_path: x", {"dataset_prepared_path": None}, id="path"),
        pytest.param("deepspeed: deepspeed/zero2.json", {"deepspeed": None}, id="deepspeed"),
        pytest.param("evals_per_epoch: 4\nval_set_size: 0", {"evals_per_epoch": None}, id="nothing-to-evaluate"),
        pytest.param(
            "fsdp: [full_shard, auto_wrap, offload]\n"
            "fsdp_config: {fsdp_use_orig_params: false, fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer}",
            {
                "fsdp": None,
                "fsdp_version": 2,
                "fsdp_config": {
                    "reshard_after_forward": True,
                    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "offload_params": True,
                    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                },
            },
            id="fsdp",
        ),
        pytest.param(
            "fsdp: true",
            {"fsdp": None, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}},
            id="fsdp-true",
        ),
        pytest.param(
            "fsdp_config: {version: 2, reshard_after_forward: false}",
            {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}},
            id="version-of-fsdp",
        ),
        pytest.param("fsdp_version: 2\nfsdp_config: {offload_params: true}", {}, id="fsdp2"),
        pytest.param(
            "datasets: [{path: x, message_field_role: from, message_field_content: value}]",
            {"datasets": [{"path": "x", "message_property_mappings": {"role": "from", "content": "value"}}]},
            id="fields-of-messages",
        ),
        pytest.param(
            "datasets: [{path: x, type: sharegpt, conversation: chatml, strict: false}]",
            {"datasets": [{"path": "x"} | CHAT]},
            id="sharegpt",
        ),
        pytest.param(
            "chat_template: chatml\ndatasets: [{path: x, type: sharegpt_simple}]",
            {"datasets": [{"path": "x"} | CHAT]},
            id="sharegpt-by-the-template",
        ),
        pytest.param(
            "datasets: [{path: x, type: sharegpt.load_guanaco, conversation: chatml, field_human: me}]",
            {
                "datasets": [
                    {"path": "x"}
                    | CHAT
                    | {
                        "message_property_mappings": {"role": "role", "content": "text"},
                        "roles": {"user": ["me"], "assistant": ["assistant"], "system": ["system"]},
                    }
                ]
            },
            id="sharegpt-with-roles",
        ),
        pytest.param("rl: dpo\nsample_packing: true", {"sample_packing": None}, id="packed-pairs"),
        pytest.param("rl: dpo\nval_set_size: 9\neval_steps: 5", {}, id="held-out-pairs"),
    ],
)
def test_a_setting_is_renamed_or_removed(text, expected):
    assert changed(text, "0.21.0") == expected


@pytest.mark.parametrize(
    ("release", "text", "expected"),
    [
        pytest.param("0.10.1", "datasets: [{path: x}]", {"shuffle_merged_datasets": False}, id="split"),
        pytest.param("0.11.0", "datasets: [{path: x}]", {}, id="split-after-a-shuffle"),
        pytest.param("0.11.0.dev0", "datasets: [{path: x}]", {"shuffle_merged_datasets": False}, id="split-dev"),
        pytest.param("0.10.1", "datasets: [{path: x}, {path: y}]", {}, id="two-data-sets"),
        pytest.param("0.10.1", "datasets: [{path: x}]\nshuffle_merged_datasets: true", {}, id="split-stated"),
        pytest.param("0.9.2", "val_set_size: 9", {"eval_strategy": "epoch"}, id="evaluation"),
        pytest.param("0.9.2", "val_set_size: 9\neval_steps: 5", {}, id="evaluation-in-steps"),
        pytest.param("0.10.0", "val_set_size: 9", {}, id="no-evaluation"),
        pytest.param(
            "0.11.0",
            "relora_steps: 150",
            {"relora_steps": None, "jagged_restart_steps": 150, "relora": True},
            id="relora",
        ),
        pytest.param(
            "0.4.0",
            "val_set_size: 9\nsave_steps: 4\neval_steps: 2\nchat_template: x",
            {"load_best_model_at_end": True},
            id="best-checkpoint",
        ),
        pytest.param("0.4.0", "val_set_size: 9\nsave_steps: 4\neval_strategy: epoch", {}, id="no-best-checkpoint"),
        pytest.param(
            "0.12.0",
            "adapter: lora\nload_in_4bit: true",
            {
                "adapter": "qlora",
                "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            },
            id="fp4",
        ),
        pytest.param("0.12.0", "adapter: qlora\nload_in_4bit: true", {}, id="nf4"),
        pytest.param("0.13.0", "adapter: lora\nload_in_4bit: true", {}, id="no-longer-4-bit"),
        pytest.param("0.9.0", "adapter: qlora", {"lora_mlp_kernel": False}, id="kernels"),
        pytest.param("0.9.1", "adapter: qlora", {}, id="kernels-on"),
        pytest.param(
            "0.15.0", "adapter: qlora\nlora_dropout: 0.1", {"lora_mlp_kernel": False}, id="kernels-and-dropout"
        ),
        pytest.param(
            "0.4.1",
            "batch_size: 8\nmicro_batch_size: 2",
            {"batch_size": None, "gradient_accumulation_steps": 4},
            id="batch",
        ),
        pytest.param("0.5.0", "batch_size: 8\nmicro_batch_size: 2", {}, id="batch-without-effect"),
        pytest.param(
            "0.8.1",
            "rl: dpo\nval_set_size: 9\neval_steps: 5",
            {"val_set_size": None, "eval_steps": None},
            id="pairs-not-held-out",
        ),
        pytest.param(
            "0.4.1",
            "adapter: lora\nlora_mlp_kernel: true",
            {"peft_autocast_adapter_dtype": False},
            id="adapter-in-bf16",
        ),
        pytest.param("0.4.1", "adapter: lora\nlora_mlp_kernel: true\nload_in_8bit: true", {}, id="adapter-in-fp32"),
        pytest.param("0.4.1", "tokens: [a]", {"mean_resizing_embeddings": False}, id="new-tokens"),
        pytest.param(
            "0.4.0",
            "relora: true\nrelora_steps: 150",
            {"relora_steps": None, "jagged_restart_steps": 150, "relora_prune_method": "reset"},
            id="relora-reset",
        ),
    ],
)
def test_an_old_default_is_stated(release, text, expected):
    settings = "optimizer: sgd\ntf32: false\nbf16: true\n"
    assert changed(settings + text, release) == expected


@pytest.mark.parametrize(
    ("text", "model", "expected"),
    [
        pytest.param(
            "rope_scaling: {type: linear, factor: 2.0}",
            {"rope_theta": 5e5},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            id="key",
        ),
        pytest.param(
            "model_config: {rope_scaling: {type: dynamic, factor: 4}}",
            {},
            {"rope_type": "dynamic", "factor": 4, "rope_theta": 1e4},
            id="in-model_config",
        ),
        pytest.param(
            "overrides_of_model_config: {rope_scaling: {rope_type: yarn, factor: 4}, rope_theta: 1000000}",
            {"rope_theta": 5e5},
            {"rope_type": "yarn", "factor": 4, "rope_theta": 1000000},
            id="with-theta",
        ),
        pytest.param(
            "overrides_of_model_config: {rope_theta: 1000000}",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000000},
            id="theta-alone",
        ),
    ],
)
def test_rope_is_overridden_as_a_whole(place, text, model, expected):
    (place / "model").mkdir()
    (place / "model/config.json").write_text(json.dumps({"model_type": "llama"} | model))
    config = migrate.migrate(OldConfig(Path("old.yml"), f"base_model: model\n{text}", release="0.3.0")).config
    parameters = dict(config["overrides_of_model_config"]["rope_parameters"])
    parameters.pop("type", None)
    assert config["overrides_of_model_config"].keys() == {"rope_parameters"}
    assert parameters == expected


def test_rope_of_a_model_that_is_not_here_stays_for_the_check(place):
    overrides = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert changed("rope_scaling: {type: linear, factor: 2.0}", "0.21.0")["overrides_of_model_config"] == overrides


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        pytest.param({"role": "user", "content": "a"}, {"role": "role", "content": "content"}, id="role-and-content"),
        pytest.param({"from": "human", "text": "a", "content": ""}, {"role": "from", "content": "text"}, id="text"),
        pytest.param({"from": "human", "value": "a"}, {"role": "from", "content": "value"}, id="from-and-value"),
    ],
)
def test_the_first_message_of_sharegpt_names_the_keys(place, message, keys):
    (place / "rows.jsonl").write_text(json.dumps({"messages": [message]}) + "\nnot read\n")
    text = "datasets: [{path: rows.jsonl, type: sharegpt, field_messages: messages}]"
    assert changed(text, "0.21.0")["datasets"][0]["message_property_mappings"] == keys


def test_defaults_of_optimizer_and_precision_are_stated():
    assert changed("lora_r: 8", "0.4.0") == {"optimizer": "adamw_torch", "tf32": False, "bf16": False}


def test_an_unread_key_has_its_reason():
    text = "data_seed: 1\nlora_rr: 1\nmax_seq_length: 8\npush_to_hub_model_id: x\nliger_rope: true\n"
    text += "datasets: [{path: x, train_on_split: train, foo: 1}]"
    assert migrate.migrate(OldConfig(Path("old.yml"), text, release="0.21.0")).reasons() == {
        "data_seed": "no release of Axolotl reads it; it is seed here",
        "lora_rr": "unknown to Axolotl; did you mean lora_r or lora_dropout?",
        "max_seq_length": "no release of Axolotl reads it; it is sequence_len here",
        "push_to_hub_model_id": "Axolotl 0.4.0 is the last release that reads it",
        "liger_rope": "ignored unless plugins lists axolotl.integrations.liger.LigerPlugin",
        "datasets": "train_on_split: no release of Axolotl reads it; it is split of the data set here; "
        "foo: no release of Axolotl reads it",
    }


PACKED = "sequence_len: 8\nsample_packing: true\n"
SDPA = {"attn_implementation": "sdpa", "multipack_real_batches": False}


@pytest.mark.parametrize(
    ("text", "release", "expected"),
    [
        pytest.param(f"{PACKED}base_model: org/TinyLlama", "0.4.1", SDPA, id="llama"),
        pytest.param(f"{PACKED}base_model: org/x\nis_llama_derived_model: true", "", SDPA, id="guessed-release"),
        pytest.param(f"{PACKED}base_model: org/x\nmodel_type: MistralForCausalLM", "0.4.1", {}, id="not-masked"),
        pytest.param(f"{PACKED}base_model: org/TinyLlama", "0.5.0", {}, id="no-longer-masked"),
        pytest.param(
            f"{PACKED}base_model: org/TinyLlama\nflash_attention: true",
            "0.4.1",
            {"attn_implementation": "flash_attention_2"},
            id="flash-attention",
        ),
        pytest.param(f"{PACKED}base_model: org/x\nsdp_attention: true", "0.4.1", SDPA, id="stated-sdpa"),
        pytest.param(
            f"{PACKED}base_model: org/llama\nsdp_attention: true\nmultipack_real_batches: true",
            "",
            SDPA | {"multipack_real_batches": True},
            id="stated-batches",
        ),
        pytest.param(
            "base_model: org/llama\nmax_packed_sequence_len: 8",
            "0.3.0",
            {"attn_implementation": "sdpa"},
            id="packed-before-batches",
        ),
    ],
)
def test_packed_rows_stay_apart_as_in_the_configs_release(text, release, expected):
    config = migrate.migrate(OldConfig(Path("old.yml"), text, release=release)).config
    assert {key: config[key] for key in SDPA if key in config} == expected


@pytest.mark.parametrize(
    ("text", "sign", "release"),
    [
        pytest.param(
            "is_llama_derived_model: true\nflash_attention: true", "is_llama_derived_model", "0.4.1", id="oldest"
        ),
        pytest.param("datasets: [{path: x, type: sharegpt}]", "datasets.0.type", "0.4.1", id="sharegpt"),
        pytest.param("flash_attention: true", "flash_attention", "0.16.0", id="newest"),
        pytest.param("flash_attention: true\nstrict: false", "strict", "0.8.0", id="off"),
        pytest.param("flash_attention: true\nmax_packed_sequence_len:", "flash_attention", "0.16.0", id="empty"),
        pytest.param("strict: false\nqat:", "strict", "0.10.0", id="left-over"),
    ],
)
def test_the_release_is_guessed_from_the_keys(text, sign, release):
    migration = migrate.migrate(OldConfig(Path("old.yml"), text))
    assert (migration.sign, migration.release) == (sign, Version(release))


@pytest.mark.parametrize(
    ("text", "release", "sign"),
    [
        pytest.param("eval_strategy: epoch\nliger_rope: true", "0.6.0", "eval_strategy", id="key"),
        pytest.param("datasets: [{path: x, train_on_eot: turn}]", "0.9.0", "datasets.train_on_eot", id="of-a-data-set"),
        pytest.param("datasets: [{path: x, type: input_output}]", "0.4.1", "datasets.type: input_output", id="type"),
        pytest.param("chat_template: chatml\noptimizer: muon", "0.8.0", "optimizer: muon", id="value"),
        pytest.param("lora_r: 8", "0", "", id="none"),
    ],
)
def test_the_first_possible_release_follows_from_keys_and_values(text, release, sign):
    assert migrate.added(yamlfiles.parse(text)) == (Version(release), sign)


def test_a_comment_of_an_old_files_author_does_not_hide_its_age(place):
    (place / "old.yml").write_text("# note: trained in 2023\nflash_attention: true\n")
    assert migrate.of_file("old.yml", None).is_current is False


def test_a_meaning_that_no_key_restores_is_told():
    migration = migrate.migrate(OldConfig(Path("old.yml"), "gradient_accumulation_steps: 4", release="0.4.1"))
    assert migration.meanings() == [f"since 0.4.1: {STEPS}", f"since 0.4.1: {MEAN}"]


CHAT_ROWS = "datasets: [{path: x, type: chat_template}]"


@pytest.mark.parametrize(
    ("text", "release", "changes"),
    [
        pytest.param("datasets: [{path: x, type: completion}]", "0.3.0", ["a row of type completion ended"], id="cut"),
        pytest.param("datasets: [{path: x, type: completion}]", "0.4.0", [], id="in-parts"),
        pytest.param("datasets: [{path: x, type: alpaca:chat}]", "0.3.0", ["0.3.0 wrote `### System:`"], id="alpaca"),
        pytest.param("datasets: [{path: x, type: alpaca_instruct.load_no_prompt}]", "0.3.0", [], id="no-prompt"),
        pytest.param("rl: dpo\nmicro_batch_size: 2\ngradient_accumulation_steps: 2", "0.5.1", [], id="pairs"),
        pytest.param("rl: dpo", "0.5.0", ["pairs over sequence_len were shortened"], id="long-pairs"),
        pytest.param(CHAT_ROWS, "0.4.1", ["type: chat_template read conversations"], id="chat-of-0.4"),
        pytest.param(CHAT_ROWS, "0.6.0", ["without roles_to_train"], id="chat-of-0.6"),
        pytest.param(CHAT_ROWS, "0.7.0", [], id="chat-of-0.7"),
        pytest.param(
            f"{CHAT_ROWS}\ntokenizer_type: LlamaTokenizer", "0.13.0", ["text after a special token"], id="legacy"
        ),
        pytest.param(f"{CHAT_ROWS}\nchat_template: mistral_v7_tekken", "0.9.2", ["chat_template: mis"], id="template"),
        pytest.param("warmup_steps: 0", "0.9.2", [], id="warmup-of-0.9"),
        pytest.param("warmup_steps: 0", "0.12.0", ["releases 0.10 to 0.12 took"], id="warmup-of-0.12"),
        pytest.param("warmup_ratio: 0.0", "0.12.0", ["releases 0.10 to 0.12 took"], id="warmup-ratio"),
        pytest.param("warmup_ratio: 0.0", "0.13.0", [], id="warmup-of-0.13"),
    ],
)
def test_a_changed_meaning_is_told_for_the_releases_that_had_the_former(text, release, changes):
    migration = migrate.migrate(OldConfig(Path("old.yml"), f"max_steps: 9\n{text}", release=release))
    begin = f"since {release}: "
    assert len(migration.meanings()) == len(changes)
    for meaning, change in zip(migration.meanings(), changes, strict=True):
        assert meaning.startswith(begin + change)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        pytest.param("sdp_attention: true", ["0.5.0: MEAN", "0.10.0: EPOCH", "0.16.0: TF32"], id="no-lower-bound"),
        pytest.param("sdp_attention: true\nlora_mlp_kernel: true", ["0.10.0: EPOCH", "0.16.0: TF32"], id="newer-key"),
        pytest.param("eot_tokens: [a]", ["0.10.0: EPOCH", "0.16.0: TF32"], id="no-upper-bound"),
        pytest.param("tf32: true\nstreaming: true\neval_strategy: epoch", [], id="stated"),
    ],
)
def test_each_change_within_the_range_of_a_guess_is_told(text, changes):
    settings = "gradient_accumulation_steps: 4\ntest_datasets: [{path: x}]\nbf16: true\noptimizer: sgd\nmax_steps: 9\n"
    texts = {"MEAN": MEAN, "EPOCH": "held-out rows were scored after each epoch (eval_strategy: epoch)"}
    texts["TF32"] = "tf32 was off (tf32: false)"
    old = OldConfig(Path("old.yml"), settings + text, is_current="sdp" not in text, sign="no key of an older release")
    expected = []
    for change in changes:
        before, name = change.split(": ")
        expected.append(f"if it was written before {before}: {texts[name]}")
    assert migrate.migrate(old).meanings() == expected


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
CHATS = {
    "system": ["system: s", "user: a", "assistant: b", "user: c", "assistant: d"],
    "without a system": ["user: a", "assistant: b"],
    "not alternating": ["user: a", "user: b", "assistant: c", "assistant: d"],
    "answer first": ["system: s", "assistant: a", "user: b", "assistant: c"],
    "system inside": ["user: a", "system: s", "user: b", "assistant: c"],
}


@pytest.mark.parametrize(
    ("kind", "count"),
    [("chat_template", 1), ("sharegpt", 0), ("chatml.intel", 0)],
)
def test_a_meaning_of_a_type_is_told_of_that_type_only(kind, count):
    text = f"chat_template: chatml\ndatasets: [{{path: x, type: {kind}}}]"
    meanings = migrate.migrate(OldConfig(Path("old.yml"), text, release="0.6.0")).meanings()
    assert sum("trained on the last turn only" in meaning for meaning in meanings) == count


@pytest.mark.parametrize(
    ("name", "chat", "expected"),
    [
        ("chatml", "without a system", "<s>[system]You are a helpful assistant.[/][user]a[/][assistant]b[/]</s>"),
        ("chatml", "system", "<s>[system]s[/][user]a[/][assistant]b[/]</s>[user]c[/][assistant]d[/]</s>"),
        ("chatml", "answer first", "<s>[system]s[/][assistant]a[/]</s>[user]b[/][assistant]c[/]</s>"),
        (
            "chatml",
            "system inside",
            "<s>[system]You are a helpful assistant.[/][user]a[/][user]b[/][assistant]c[/]</s>",
        ),
        ("vicuna_v1.1", "system", "<s>s USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>"),
        ("vicuna_v1.1", "without a system", f"<s>{VICUNA}USER: a ASSISTANT: b</s>"),
        ("vicuna_v1.1", "not alternating", f"<s>{VICUNA}USER: a USER: b</s>ASSISTANT: c </s>ASSISTANT: d</s>"),
        ("vicuna_v1.1", "answer first", "<s>s ASSISTANT: a </s>USER: b</s>ASSISTANT: c </s>"),
        ("vicuna_v1.1", "system inside", f"<s>{VICUNA}USER: a USER: b ASSISTANT: c</s>"),
        (
            "alpaca",
            "system",
            "<s>s\n\n### Instruction: a\n\n### Response: b</s>### Instruction: c\n\n### Response: d</s>",
        ),
        ("alpaca", "answer first", "<s>s\n\n### Response: a\n\n</s>### Instruction: b</s>### Response: c\n\n</s>"),
        ("zephyr", "without a system", "<s><|system|>\n</s>\n<|user|>\na</s>\n<|assistant|>\nb</s>\n</s>"),
        (
            "zephyr",
            "system inside",
            "<s><|system|>\n</s>\n<|user|>\na</s>\n<|user|>\nb</s>\n<|assistant|>\nc</s>\n</s>",
        ),
        ("llama-2", "system", "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na[/INST] b</s><s> [INST] c[/INST] d</s>"),
        ("llama-2", "without a system", "<s> [INST] a[/INST] b</s>"),
        ("llama-2", "not alternating", "<s> [INST] a[INST] b<s> [/INST] c</s>[/INST] d</s>"),
        ("llama-2", "answer first", "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\n[/INST] a</s><s> [INST] b[/INST] c</s>"),
        ("mistral", "system", "<s>[INST]  s\na[/INST] b</s>[INST] c[/INST] d</s>"),
        ("mistral", "without a system", "<s>[INST] a[/INST] b</s>"),
        ("mistral", "not alternating", "<s>[INST] a[INST] b[/INST] c</s>[/INST] d</s>"),
        ("mistral", "answer first", "<s>[INST] s\n[/INST] a</s>[INST] b[/INST] c</s>"),
        ("llama3", "without a system", "<s>{system}You are a helpful assistant.{/}{user}a{/}{assistant}b{/}</s>"),
        ("llama3", "system", "<s>{system}s{/}{user}a{/}{assistant}b{/}</s>{user}c{/}{assistant}d{/}</s>"),
    ],
)
def test_a_conversation_has_the_text_of_its_release(name, chat, expected):
    """The old code wrote the expected texts: Axolotl 0.4.1 (ef22351) with FastChat (27a05b0), BOS <s> and EOS </s>."""
    expected = re.sub(r"\[(system|user|assistant)\]", r"<|im_start|>\1\n", expected).replace("[/]", "<|im_end|>\n")
    expected = re.sub(r"\{(\w+)\}", r"<|start_header_id|>\1<|end_header_id|>\n\n", expected).replace(
        "{/}", "<|eot_id|>"
    )
    turns = [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in CHATS[chat]]
    template = migrate.tables()["conversations"][name]["template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(template).render(messages=turns, bos_token="<s>", eos_token="</s>") == expected


def test_chat_template_inst_has_the_text_of_its_release():
    config = changed("chat_template: inst", "0.4.0")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template_jinja"])
    messages = [{"role": role, "content": role[0]} for role in ("user", "assistant") * 2]
    expected = "<s>[INST] u [/INST]a</s>[INST] u [/INST]a</s>"  # written by the code of 0.4.0
    assert template.render(messages=messages, bos_token="<s>", eos_token="</s>") == expected
    assert config["chat_template"] == "jinja"


@pytest.mark.parametrize(
    ("family", "text", "trained"),
    [
        pytest.param(
            "chatml",
            "datasets: [{path: x, type: sharegpt, conversation: chatml}]\ntokens: [<|im_end|>]",
            ["4<|im_end|>", "</s>"],
            id="chatml",
        ),
        pytest.param(
            "chatml",
            "datasets: [{path: x, type: sharegpt}]\nchat_template: chatml\nspecial_tokens: {eos_token: <|im_end|>}",
            ["4<|im_end|>"],
            id="chatml-as-EOS",
        ),
        pytest.param(
            "llama3",
            "datasets: [{path: x, type: sharegpt, conversation: llama3}]\nspecial_tokens: {eos_token: </s>}",
            ["4<|eot_id|></s>"],
            id="llama3",
        ),
        pytest.param(
            "chatml",
            "datasets: [{path: x, type: sharegpt, conversation: llama3}]",
            ["4"],
            id="llama3-without-its-tokens",
        ),
        pytest.param("chatml", "datasets: [{path: x, type: sharegpt}]", ["4</s>"], id="vicuna"),
        pytest.param(
            "chatml",
            "datasets: [{path: x, type: sharegpt}]\ntrain_on_inputs: true",
            ["2 + 2", "4</s>"],
            id="vicuna-and-inputs",
        ),
    ],
)
def test_the_ends_of_answers_stay_in_the_loss(place, family, text, trained):
    model = chat_models.save(place / "model", family)
    settings = f"base_model: {model}\nsequence_len: 512\nmicro_batch_size: 1\nlearning_rate: 0.1\n"
    config = migrate.migrate(OldConfig(Path("old.yml"), settings + text, release="0.4.1")).config
    row = {"conversations": [{"from": "human", "value": "2 + 2"}, {"from": "gpt", "value": "4"}]}
    tokenizer = Tokenizer(config)
    tokens = tokenizer.tokenize(next(iter(datafiles.datasets(config))), [row])[0]
    parts = groupby(zip(tokens.ids, tokens.labels, strict=True), lambda token: token[1] != MASKED)
    texts = [tokenizer.tokenizer.decode([token for token, _ in part]) for has_loss, part in parts if has_loss]
    assert [text.strip() for text in texts] == trained


def conversation_of(text: str) -> tuple[str, Any, str]:
    """Template, eot_tokens and reason of a data set of type sharegpt."""
    migration = migrate.migrate(OldConfig(Path("old.yml"), text, release="0.4.1"))
    reason = migration.reasons()["datasets"]
    return migration.config["datasets"][0]["chat_template_jinja"], migration.config.get("eot_tokens"), reason


def test_the_system_prompt_of_the_config_is_in_the_template():
    text = 'default_system_message: You are "S"ü.\ndatasets: [{path: x, type: sharegpt, conversation: llama3}]\n'
    template, ends, _ = conversation_of(text + "chat_template: llama3")
    assert 'else "You are \\"S\\"ü." %}' in template
    assert ends == ["<|eot_id|>"]
    assert changed(text + "chat_template: llama3", "0.4.1")["default_system_message"] is None
    assert conversation_of(text + "chat_template: chatml")[0] == LLAMA3


def test_the_reason_says_what_no_longer_counts():
    chatml = "type sharegpt is gone; the text of FastChat's conversation chatml, tokenized at once and with BOS first"
    text = "datasets: [{path: x, type: sharegpt, conversation: chatml}]\n"
    lost = f"{chatml}; no longer in the loss:"
    end = "and <|im_end|> and what follows it; --set tokens=[<|im_end|>] keeps the end in the loss"
    assert conversation_of(text)[2] == f"{lost} line breaks around an answer, {end}"
    assert conversation_of(text + "tokens: [<|im_end|>]")[2] == f"{lost} line breaks around an answer"
    assert conversation_of(text + "base_model: Qwen/Qwen2.5-7B")[1:] == (
        ["<|im_end|>"],
        f"{lost} line breaks around an answer",
    )
    assert conversation_of(text + "train_on_inputs: true\ntokens: [<|im_end|>]")[2] == (
        f"{lost} all but messages and their ends"
    )


@pytest.mark.parametrize(
    ("entry", "template"),
    [
        pytest.param("type: sharegpt", "chatml", id="plain"),
        pytest.param("type: sharegpt.load_role", "vicuna_v1.1", id="with a loader"),
    ],
)
def test_only_plain_sharegpt_follows_the_chat_template(entry, template):
    text = f"chat_template: chatml\ndatasets: [{{path: x, {entry}}}]"
    assert conversation_of(text)[0] == migrate.tables()["conversations"][template]["template"]


def write_rows(place: Path, count: int = 40) -> None:
    rows = [f'{{"instruction": "Add {i} and 1.", "input": "", "output": "{i + 1}"}}' for i in range(count)]
    (place / "rows.jsonl").write_text("\n".join(rows) + "\n")


def test_a_config_of_2023_becomes_a_variant_that_passes_the_check(place, recipe):
    write_rows(place)
    (place / "old.yml").write_text(OF_2023)
    done = recipe.ok("new", "mine", "--from", "old.yml")
    assert done.stderr.splitlines()[0] == (
        "written for Axolotl 0.3.0 or earlier (base_model_config), a guess by its keys; if you know the release, "
        "pass --axolotl"
    )
    header = "# Axolotl   written for 0.3.0 or earlier, migrated to 0.21.0 by `recipe new --from`\n"
    assert header in (place / "variants/mine.yaml").read_text()
    config = yamlfiles.read_yaml(place / "variants/mine.yaml")
    former = yamlfiles.read_yaml(place / "old.yml")
    assert {key: config.get(key) for key in former | config if config.get(key) != former.get(key)} == {
        "base_model_config": None,
        "dataset_prepared_path": None,
        "sequence_len": 256,
        "max_packed_sequence_len": None,
        "sample_packing": True,
        "wandb_project": None,
        "output_dir": "outputs/mine",
        "xformers_attention": None,
        "attn_implementation": "xformers",
        "shuffle_merged_datasets": False,
        "eval_strategy": "epoch",
        "lora_mlp_kernel": False,
        "tf32": False,
    }
    assert {finding["level"] for finding in recipe.json("check", "mine")[0]["findings"]} == {"warning", "note"}
    assert yamlfiles.sources(place / "variants/mine.yaml")["eval_strategy"] == (
        "variant, was not set; held-out rows were scored after each epoch (default before 0.10.0)"
    )


def test_a_config_of_this_release_loses_accounts_hosts_and_evaluation_of_no_rows(place, recipe):
    write_rows(place)
    config = {
        "base_model": "models/llama",
        "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
        "wandb_project": "p",
    }
    config |= {
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "micro_batch_size": 1,
        "learning_rate": 0.1,
    }
    theirs = {"hub_model_id": "theirs/model", "mlflow_tracking_uri": "https://theirs.org", "wandb_entity": "theirs"}
    nested = {"trl": {"beta": 0.1, "vllm_server_host": "theirs.org"}}
    (place / "new.yml").write_text(yamlfiles.write_yaml(config | theirs | nested | {"eval_steps": 5}))
    done = recipe.ok("new", "mine", "--from", "new.yml", "--set", "wandb_entity=mine", "--set", "num_epochs=2")
    assert yamlfiles.read_yaml(place / "variants/mine.yaml") == config | {
        "trl": {"beta": 0.1},
        "wandb_entity": "mine",
        "num_epochs": 2,
    }
    rows = [line.replace("'", "").split()[:3] for line in done.stdout.splitlines() if "removed" in line]
    removed = [*theirs.items(), ("trl.vllm_server_host", "theirs.org"), ("eval_steps", "5")]
    assert rows == [[key, value, "removed"] for key, value in removed]
    assert "written for" not in (place / "variants/mine.yaml").read_text()


def test_the_users_settings_win(place, recipe):
    write_rows(place)
    (place / "old.yml").write_text(OF_2023 + "s2_attention: true\n")
    recipe.ok(
        "new", "mine", "--from", "old.yml", "--set", "s2_attention=null", "--set", "tf32=true", "--set", "lora_r=4"
    )
    config = yamlfiles.read_yaml(place / "variants/mine.yaml")
    assert (config.get("s2_attention"), config["tf32"], config["lora_r"]) == (None, True, 4)


def test_own_rows_replace_those_of_an_old_config(place, recipe):
    write_rows(place)
    (place / "old.yml").write_text(OF_2023.replace("alpaca", "sharegpt").replace("val_set_size: 0.1", "eval_steps: 5"))
    recipe.ok("new", "mine", "--from", "old.yml", "--data", "rows.jsonl", "--type", "plain")
    config = yamlfiles.read_yaml(place / "variants/mine.yaml")
    assert config["datasets"] == [{"path": "rows.jsonl", "type": "alpaca"}]
    assert (config["eval_steps"], config["val_set_size"]) == (5, own_rows.HELD_OUT_OF_FEW)
    assert "shuffle_merged_datasets" not in config


def test_a_card_becomes_a_variant_and_a_profile(place, recipe):
    write_rows(place)
    (place / "README.md").write_text(CARD)
    done = recipe.ok("new", "mine", "--from", "README.md")
    assert done.stderr.splitlines()[-1] == "next: recipe check mine --profile zero2"
    assert (place / "variants/mine.yaml").read_text().splitlines()[1:10] == [
        "# /// recipe",
        '# name = "mine"',
        '# parent = "README.md"',
        f'# parent_sha256 = "{sha256(Path("README.md"))}"',
        '# axolotl = "0.21.0"',
        "# ///",
        "#",
        "# Changes   recipe diff mine lists them; changed lines state the former value",
        "# Axolotl   written for 0.4.0, migrated to 0.21.0 by `recipe new --from`",
    ]


def test_a_card_is_shown_checked_and_compared_like_a_config(place, recipe):
    write_rows(place)
    (place / "README.md").write_text(CARD)
    assert recipe.ok("show", "README.md").stdout.splitlines()[0] == "base_model: models/llama"
    checked = recipe("check", "README.md", "--quick")
    assert checked.stderr.splitlines()[0] == (
        "README.md: written for an older Axolotl; `recipe new NAME --from README.md` migrates it"
    )
    assert checked.stdout.startswith("README.md:30: warning: deepspeed: deepspeed_configs/zero2.json does not exist; ")
    recipe.ok("new", "mine", "--from", "README.md")
    assert {row["key"] for row in recipe.json("diff", "mine")} == {
        *("strict", "flash_attention", "deepspeed", "attn_implementation", "shuffle_merged_datasets", "lora_mlp_kernel")
    }


def test_a_card_of_this_release_is_not_called_old(place, recipe):
    write_rows(place)
    (place / "README.md").write_text(CARD.replace("0.4.0", str(migrate.supported())))
    assert "older" not in recipe("check", "README.md", "--quick").stderr


JINJA = "{% if a %}{{ b }}{# c #}{% endraw %}"


def test_a_card_becomes_a_study_with_its_last_eval_loss(place, recipe):
    write_rows(place)
    card = CARD.replace("lora_r: 32\n", f"lora_r: 32  # {JINJA}\n")
    (place / "README.md").write_text(f"{card}\n| a | b | c | d |\n|--|--|--|--|\n| 1 | 2 | 3 | 4 |\n")
    recipe.ok("study", "new", "theirs", "--from", "README.md")
    study = yamlfiles.read_yaml(place / "recipes/theirs/study.yaml")
    assert study["published"] == {"theirs/as-published": {"scores": {"eval_loss": 1.2124}}}
    assert study["differences"][0] == "the card's run used Axolotl 0.4.0"
    config = yamlfiles.read_yaml(place / "recipes/theirs/as-published.yaml")
    assert (config["shuffle_merged_datasets"], config["output_dir"]) == (False, "outputs/theirs/as-published")
    assert yamlfiles.sources(place / "recipes/theirs/as-published.yaml")["lora_r"] == JINJA
    assert recipe.ok("study", "check", "theirs").stderr.splitlines()[1] == "theirs: errors: 0, warnings: 0"


@pytest.mark.parametrize(
    ("loss", "step"),
    [("nan", "48"), ("1.5}, other/run: {scores: {eval_loss: 3", "48"), ("1e999", "48"), ("1" * 400, "48"),
     ("0x10", "48"), ("1.2124", "48}")],
)  # fmt: skip
def test_a_card_without_a_final_number_is_refused(place, recipe, loss, step):
    write_rows(place)
    card = CARD.replace("1.2124          |\n", f"1.2124 |\n| 1.2 | 4.0 | {step} | {loss} |\n")
    (place / "README.md").write_text(card)
    assert recipe.fails("study", "new", "theirs", "--from", "README.md").stderr == (
        f"recipe: README.md: no number to reproduce: the last Validation Loss is {loss:.20}, at step {step}; "
        "`recipe new NAME --from CARD` takes its config alone\n"
    )
    assert not (place / "recipes").exists()


def test_a_card_s_name_adds_no_keys_to_its_study(place, recipe):
    write_rows(place)
    name = "a: [b, 'c' # {{ 7*7 }}.md"
    (place / name).write_text(CARD.replace("\n- PEFT", "\n- PEFT\n| 1.2 | 4.0 | 48 | 3.0 |\n"))
    recipe.ok("study", "new", "theirs", "--from", name)
    study = yamlfiles.read_yaml(place / "recipes/theirs/study.yaml")
    assert study["published"] == {"theirs/as-published": {"scores": {"eval_loss": 1.2124}}}
    assert study["title"] == f"The run of the model card {name}"
    assert recipe.ok("study", "check", "theirs").stderr.splitlines()[1] == "theirs: errors: 0, warnings: 0"


def on_devices(devices: int, rows: int) -> str:
    figures = f"- Loss: 1.2124\n\n- num_devices: {devices}\n- total_train_batch_size: {rows}\n"
    return CARD.replace("\n- PEFT", f"\n{figures}\n- PEFT")


@pytest.mark.parametrize("file", ["recipes/mine/as-published", "variants/mine"])
def test_the_devices_of_a_card_become_accumulation(place, recipe, file):
    write_rows(place)
    words = ["study", "new"] if file.startswith("recipes") else ["new"]
    (place / "README.md").write_text(on_devices(8, 64))
    recipe.ok(*words, "mine", "--from", "README.md")
    assert yamlfiles.read_yaml(place / f"{file}.yaml")["gradient_accumulation_steps"] == 32
    assert yamlfiles.sources(place / f"{file}.yaml")["gradient_accumulation_steps"] == (
        "variant, was 4; the card's 8 devices; `--gpus 8` divides it among as many"
    )


def test_the_check_of_an_old_file_names_the_command_that_migrates_it(place, recipe):
    write_rows(place)
    (place / "old.yml").write_text(OF_2023)
    assert recipe("check", "old.yml", "--quick").stderr.splitlines()[0] == (
        "old.yml: written for an older Axolotl; `recipe new NAME --from old.yml` migrates it"
    )


@pytest.mark.parametrize(
    ("file", "text", "arguments", "message"),
    [
        pytest.param(
            "old.yml",
            OF_2023 + "s2_attention: true\nload_4bit: true\n",
            [],
            "old.yml:29: s2_attention: Axolotl no longer has this feature; delete the key; use "
            "attn_implementation: flash_attention_2; the results will differ\n"
            "old.yml:30: load_4bit: Axolotl no longer has this feature; delete the key; use load_in_4bit and adapter: "
            "qlora",
            id="gone",
        ),
        pytest.param(
            "old.yml",
            OF_2023.replace("type: alpaca", "type: sharegpt, conversation: phoenix"),
            [],
            "old.yml:10: datasets.0.type: no counterpart of sharegpt with the conversation phoenix and these roles; "
            "use type: chat_template with a template of your own",
            id="unknown-conversation",
        ),
        pytest.param(
            "old.yml",
            OF_2023 + "fsdp: [hybrid_shard, auto_wrap]\nfsdp_config: {}\n",
            [],
            "old.yml:30: fsdp_config: FSDP2 has no counterpart of hybrid_shard; delete fsdp and fsdp_config, and use "
            "--profile fsdp2 or zero2",
            id="unknown-sharding",
        ),
        pytest.param(
            "old.yml",
            OF_2023 + "early_stopping_patience: 3\n",
            [],
            "old.yml:29: error: early_stopping_patience: `early_stopping_patience` requires save_steps and eval_steps "
            "to be set. eval_steps should evenly divide save_steps. [axolotl:early_stopping_patience]",
            id="never-valid",
        ),
        pytest.param(
            "README.md",
            CARD.replace("lora_r: 32\n", "lora_r: 32\nseed: 1x\n"),
            [],
            "README.md:19: error: seed: 1x is not an integer [value:seed]",
            id="line-of-a-card",
        ),
        pytest.param(
            "README.md",
            "# A model\n",
            [],
            "README.md: no Axolotl config in this model card, as a block ```yaml with base_model; copy the config into "
            "a YAML file, and give that",
            id="card-without-config",
        ),
        pytest.param(
            "old.yml",
            OF_2023,
            ["--axolotl", "old"],
            "--axolotl: not a version: old; give one, as in 0.4.0",
            id="not-a-version",
        ),
        pytest.param(
            "README.md",
            CARD.replace("axolotl version: `0.4.0`", f"axolotl version: `0.{'4' * 5000}`"),
            [],
            f"--axolotl: not a version: 0.{'4' * 38}; give one, as in 0.4.0",
            id="digits",
        ),
        pytest.param("old.yml", "- a\n", [], "old.yml: not a mapping of keys to values", id="a-list"),
        pytest.param("old.md", None, [], "old.md: does not exist", id="missing-card"),
    ],
)
def test_what_the_user_has_to_decide_is_refused_with_its_line(place, recipe, file, text, arguments, message):
    write_rows(place)
    if text is not None:
        (place / file).write_text(text)
    assert recipe.fails("new", "mine", "--from", file, *arguments).stderr == f"recipe: {message}\n"
    assert not (place / "variants").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["study", "new", "theirs", "--from", "bare.md"],
            "bare.md: no table of training results with the columns Step and Validation Loss; `recipe new NAME --from "
            "CARD` takes its config alone",
            id="card-without-results",
        ),
        pytest.param(
            ["study", "new", "theirs", "--from", "no-data.md"],
            "no-data.md: datasets: no data set; add it to the card's config",
            id="card-without-data",
        ),
        pytest.param(
            ["study", "new", "theirs", "--from", "steps.md"],
            "steps.md: total_train_batch_size is 64, but config and num_devices give 16; find out which is right, and "
            "correct the other in the card",
            id="other-rows-per-step",
        ),
        pytest.param(
            ["study", "new", "theirs", "--from", "loss.md"],
            "loss.md: Loss is 1.4903, but the table ends with 1.2124; find out which is right, and correct the other "
            "in the card",
            id="other-loss",
        ),
    ],
)
def test_a_wrong_request_is_refused(place, recipe, arguments, message):
    (place / "bare.md").write_text(CARD.partition("| Training")[0])
    no_data = CARD.replace("datasets:\n  - path: rows.jsonl\n    type: alpaca\n", "")
    (place / "no-data.md").write_text(no_data)
    (place / "steps.md").write_text(on_devices(2, 64))
    (place / "loss.md").write_text(on_devices(8, 64).replace("Loss: 1.2124", "Loss: 1.4903"))
    assert recipe.fails(*arguments).stderr == f"recipe: {message}\n"
    assert not (place / "recipes").exists()


def test_tables_name_keys_that_axolotl_has():
    keys: dict[str, Any] = schema.load()["properties"]
    new = [change["to"].partition(".")[0] for change in migrate.tables()["keys"].values() if "to" in change]
    new += [default["key"] for default in migrate.tables()["defaults"]]
    assert [key for key in new if key not in keys] == []


def test_the_page_has_the_present_tables():
    page = Path("docs/how/migrated-keys.md").read_text(encoding="utf-8")
    assert old_configs.page(page) == page


def test_a_file_without_old_keys_counts_as_current_which_is_said(place, recipe):
    write_rows(place)
    old_keys = {"base_model_config", "max_packed_sequence_len", "xformers_attention", "gptq_groupsize"}
    lines = [line for line in OF_2023.splitlines() if line.partition(":")[0] not in old_keys]
    (place / "mine.yml").write_text("\n".join(lines))
    done = recipe.ok("new", "mine", "--from", "mine.yml")
    assert done.stderr.splitlines()[0] == (
        f"written for Axolotl {migrate.supported()} or earlier (no key of an older release), a guess by its keys; "
        "if you know the release, pass --axolotl"
    )
