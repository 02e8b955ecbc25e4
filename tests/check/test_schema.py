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


def found(change: yamlfiles.Config) -> dict[str, str]:
    """What the schema finds wrong with a recipe that is changed in some keys, by name."""
    return {finding.name: str(finding) for finding in schema.findings(BASE | change)}


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({"lora_rr": 8}, "unknown-key:lora_rr", "lora_r"),
        ({"datasets": [{"path": "x", "typ": "alpaca"}]}, "unknown-key:datasets.0.typ", "type"),
        ({"bnb_config_kwargs": {"quant_type": "nf4"}}, "unknown-key:bnb_config_kwargs.quant_type", "bnb_4bit_quant"),
        ({"liger_rope": True}, "plugin-key:liger_rope", "axolotl.integrations.liger"),
        ({"optimizer": "adamwx"}, "value:optimizer", "adamw"),
        ({"attn_implementation": "flash"}, "value:attn_implementation", "flash_attention_2"),
        ({"datasets": [{"path": "x", "type": "alpacca"}]}, "value:datasets.0.type", "alpaca"),
        ({"datasets": ["x"]}, "value:datasets.0", "mapping"),
        ({"chat_template": "tokenizer_default_fallback_chatlm"}, "value:chat_template", "fallback_chatml"),
        ({"datasets": [{"path": "x", "chat_template": "lama3"}]}, "value:datasets.0.chat_template", "llama3"),
        ({"num_epochs": "2"}, "value:num_epochs", "quotes"),
        ({"lora_r": -1}, "value:lora_r", "-1"),
        ({"bf16": "full"}, "value:bf16", "auto, true, false"),
        ({"gradient_checkpointing": "unslth"}, "value:gradient_checkpointing", "offload_disk, true, false"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}}, "value:bnb_config_kwargs.bnb_4bit_quant_type", "nf4"),
    ],
)
def test_what_breaks_the_schema_is_found(change, name, says):
    ((only, text),) = found(change).items()
    assert only == name
    assert says in text


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
        {"learning_rate": "1e-4"},
        {"deepspeed": None, "wandb_project": None},  # keys left empty
    ],
)
def test_what_axolotl_takes_is_no_finding(change):
    assert found(change) == {}


def test_an_unknown_key_that_has_no_value_or_may_be_a_plugins_is_a_warning():
    assert "warning" in found({"fsdp": None})["unknown-key:fsdp"]
    assert "warning" in found({"plugins": ["other.Plugin"], "other_key": 1})["unknown-key:other_key"]
