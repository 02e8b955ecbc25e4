import pytest
from conftest import recipe_config

from qlora_recipes.base import yamlfiles
from qlora_recipes.check import schema
from qlora_recipes.data import studies


def test_the_committed_schemas_are_those_of_the_installed_axolotl_and_of_the_code():
    import schemas

    assert schema.FILE.read_text(encoding="utf-8") == schemas.axolotl_schema()
    assert studies.SCHEMA.read_text(encoding="utf-8") == schemas.study_schema()


BASE = recipe_config("haider2024/llama-2-7b")


def findings_of(change: yamlfiles.Config) -> list[str]:
    """Findings of the schema in a recipe with some keys changed."""
    return list(map(str, schema.findings(BASE | change)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"lora_rr": 8},
            "error: lora_rr: unknown to Axolotl; did you mean lora_r or lora_dropout? [unknown-key:lora_rr]",
        ),
        (
            {"per_device_train_batch_size": 8},
            "warning: per_device_train_batch_size: no release of Axolotl reads it; it is micro_batch_size here; "
            "correct or delete the key [unknown-key:per_device_train_batch_size]",
        ),
        (
            {"fsdp": ["full_shard"]},
            "error: fsdp: Axolotl 0.18.0 is the last release that reads it; correct or delete the key "
            "[unknown-key:fsdp]",
        ),
        (
            {"fsdp": False},
            "warning: fsdp: Axolotl 0.18.0 is the last release that reads it; correct or delete the key "
            "[unknown-key:fsdp]",
        ),
        (
            {"landmark_attention": True},
            "warning: landmark_attention: Axolotl 0.3.0 is the last release that reads it; correct or delete the key "
            "[unknown-key:landmark_attention]",
        ),
        (
            {"fsdp_config": {"fsdp_use_orig_params": True}},
            "warning: fsdp_config.fsdp_use_orig_params: Axolotl 0.18.0 is the last release that reads it; correct or "
            "delete the key [unknown-key:fsdp_config.fsdp_use_orig_params]",
        ),
        (
            {"some_flag": 1},
            "warning: some_flag: no release of Axolotl reads it; correct or delete the key [unknown-key:some_flag]",
        ),
        (
            {"datasets": [{"path": "x", "type": "stepwise_supervised", "step_separator": "+"}]},
            "warning: datasets.0.step_separator: no release of Axolotl reads it; correct or delete the key "
            "[unknown-key:datasets.0.step_separator]",
        ),
        (
            {"datasets": [{"path": "x", "typ": "alpaca"}]},
            "error: datasets.0.typ: unknown to Axolotl; did you mean type or ds_type? [unknown-key:datasets.0.typ]",
        ),
        (
            {"bnb_config_kwargs": {"quant_type": "nf4"}},
            "warning: bnb_config_kwargs.quant_type: no release of Axolotl reads it; it is bnb_4bit_quant_type here; "
            "correct or delete the key [unknown-key:bnb_config_kwargs.quant_type]",
        ),
        (
            {"liger_rope": True},
            "warning: liger_rope: ignored unless plugins lists axolotl.integrations.liger.LigerPlugin; add it, or "
            "delete the key [plugin-key:liger_rope]",
        ),
        (
            {"optimizer": "adamwx"},
            "error: optimizer: adamwx is not an allowed value; did you mean adamc or ademamix or grokadamw? "
            "[value:optimizer]",
        ),
        (
            {"attn_implementation": "flash"},
            "error: attn_implementation: flash is not an allowed value; choose eager, flash_attention_2, "
            "flash_attention_3, flash_attention_4, flash_attention_torch, flex_attention, fp8, sage, sdpa, "
            "varlen, xformers [value:attn_implementation]",
        ),
        (
            {"datasets": [{"path": "x", "type": "alpacca"}]},
            "error: datasets.0.type: alpacca is not an allowed value; did you mean alpaca or alpaca:phi or "
            "alpaca_chat? [value:datasets.0.type]",
        ),
        (
            {"datasets": ["x"]},
            "error: datasets.0: x is not a mapping of keys [value:datasets.0]",
        ),
        (
            {"chat_template": "tokenizer_default_fallback_chatlm"},
            "error: chat_template: tokenizer_default_fallback_chatlm is not an allowed value; did you mean "
            "tokenizer_default_fallback_chatml or tokenizer_default_fallback_jamba or "
            "tokenizer_default_fallback_aya? [value:chat_template]",
        ),
        (
            {"datasets": [{"path": "x", "chat_template": "lama3"}]},
            "error: datasets.0.chat_template: lama3 is not an allowed value; did you mean llama3 or llama4 or "
            "llava? [value:datasets.0.chat_template]",
        ),
        (
            {"num_epochs": "2"},
            "error: num_epochs: '2' is not a number; write it without quotes [value:num_epochs]",
        ),
        (
            {"lora_r": -1},
            "error: lora_r: -1 is less than the minimum of 1 [value:lora_r]",
        ),
        (
            {"bf16": "full"},
            "error: bf16: full is not an allowed value; choose auto, true, false [value:bf16]",
        ),
        (
            {"gradient_checkpointing": "unslth"},
            "error: gradient_checkpointing: unslth is not an allowed value; choose offload, offload_disk, true, "
            "false [value:gradient_checkpointing]",
        ),
        (
            {"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}},
            "error: bnb_config_kwargs.bnb_4bit_quant_type: nf5 is not an allowed value; did you mean nf4? "
            "[value:bnb_config_kwargs.bnb_4bit_quant_type]",
        ),
        (
            {"fsdp": None},
            "warning: fsdp: Axolotl 0.18.0 is the last release that reads it; delete the empty key [unknown-key:fsdp]",
        ),
        (
            {"plugins": ["other.Plugin"], "other_key": 1},
            "warning: other_key: unknown to Axolotl; does it belong to other.Plugin? [foreign-key:other_key]",
        ),
    ],
)
def test_what_breaks_the_schema_is_found(change, text):
    assert findings_of(change) == [f": {text}"]


def test_of_many_unknown_keys_some_are_named():
    content = BASE | {f"lora_targt_{i}": 1 for i in range(300)}
    assert len([*schema.findings(content)]) == 100


def test_a_missing_key_is_found():
    content = {key: value for key, value in BASE.items() if key not in ("base_model", "learning_rate")}
    assert {finding.name for finding in schema.findings(content)} == {
        "missing-key:base_model",
        "missing-key:learning_rate",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"bnb_config_kwargs": {"bnb_4bit_quant_storage": "uint8"}},
        {"model_revision": "x", "revision_of_model": "x"},  # two names for one key
        {"liger_rope": True, "plugins": ["axolotl.integrations.liger.LigerPlugin"]},
        {"fsdp_config": {"fsdp_offload_params": True}},  # the old prefix
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"datasets": [{"path": "x", "type": "my_package.my_strategy"}]},
        {"datasets": [{"path": "x", "type": {"field_output": "msg"}}]},
        {"rl": "dpo", "datasets": [{"path": "x", "type": "chatml.intel"}]},
        {"rl": "orpo", "datasets": [{"path": "x", "type": "chat_template.argilla"}]},
        {"learning_rate": "1e-4"},
        {"deepspeed": None, "wandb_project": None},  # keys left empty
    ],
)
def test_what_axolotl_takes_is_no_finding(change):
    assert findings_of(change) == []
