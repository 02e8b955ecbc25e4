import pytest
from conftest import recipe_config

from qlora_recipes import paths, schema


def test_the_committed_schema_is_that_of_the_installed_axolotl() -> None:
    assert schema.FILE.read_text(encoding="utf-8") == schema.generate()


@pytest.mark.parametrize("name", paths.recipe_names())
def test_recipes_have_no_unknown_key(name: str) -> None:
    assert list(schema.unknown_keys(recipe_config(name))) == []


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        ({"lora_rr": 8}, "lora_rr", "lora_r"),
        ({"learning_rte": 1}, "learning_rte", "learning_rate"),
        ({"datasets": [{"path": "x", "typ": "alpaca"}]}, "datasets.0.typ", "type"),
        ({"special_tokens": {"pad_tokn": "x"}}, "special_tokens.pad_tokn", "pad_token"),
        ({"fsdp_config": {"offload_param": True}}, "fsdp_config.offload_param", "offload_params"),
    ],
)
def test_misspelt_keys_are_found_with_the_right_one(change: dict[str, object], key: str, near: str) -> None:
    ((found, hint),) = schema.unknown_keys(recipe_config("haider2024/llama-2-7b") | change)
    assert found == key
    assert near in hint


def test_mappings_that_axolotl_hands_on_may_hold_anything() -> None:
    free = {
        "bnb_config_kwargs": {"anything": 1},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "model_revision": "x",
    }
    assert list(schema.unknown_keys(free)) == []


def test_the_keys_of_a_plugin_count_where_the_plugin_is_listed() -> None:
    keys = {"liger_rope": True}
    assert [key for key, _ in schema.unknown_keys(keys)] == ["liger_rope"]
    assert list(schema.unknown_keys(keys | {"plugins": ["axolotl.integrations.liger.LigerPlugin"]})) == []
