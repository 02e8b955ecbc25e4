"""`recipe new --model`: a recipe rewritten for another base model, with comments that are true of that."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe, recipe_config

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.config import models

BASE = "haider2024/llama-3.2-3b"
PHI = {"model_type": "phi3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PHI |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 4096}


def write_model(folder: Path, sizes: dict[str, Any], tokenizer_config: dict[str, Any] | None, **files: Any) -> Path:
    folder.mkdir(parents=True)
    contents = {"config": sizes, "tokenizer_config": tokenizer_config} | files
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_bytes(orjson.dumps(content))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


NEXT = "next: recipe check mine\n"


def written(recipe: Recipe, tmp_path: Path, model: str | Path, *options: str, base: str = BASE) -> tuple[str, str]:
    """The text of a new variant, and what the command said."""
    done = recipe.ok("new", "mine", "--from", base, "--model", model, *options)
    assert done.stderr.endswith(NEXT)
    assert done.stdout == "variants/mine.yaml\n"
    return (tmp_path / "variants/mine.yaml").read_text(), done.stderr.removesuffix(NEXT)


def wrong(recipe: Recipe) -> list[str]:
    """Findings of `recipe check` in the new variant, except on data and a hub that are not here."""
    (report,) = recipe.json("check", "mine")
    names = [finding["name"] for finding in report["findings"] if finding["level"] != "note"]
    return [name for name in names if not name.startswith(("not-prepared", "no-access"))]


def about_the_model(text: str, base: str) -> str:
    """The head of a variant and the comments on its model, without the settings that stay as they were."""
    before = (paths.RECIPES / f"{base}.yaml").read_text().splitlines()
    return "\n".join(line for line in text.splitlines() if line not in before)


@pytest.mark.parametrize(
    "base", ["haider2024/llama-3.2-3b", "haider2024/code-llama-7b", "haider2024/as-released/llama-3-8b"]
)
def test_a_known_model_takes_the_place_of_another_with_true_comments(tmp_path, recipe, base):
    text, said = written(recipe, tmp_path, "Qwen/Qwen2.5-Coder-7B", base=base)
    assert said == ""
    pinned = models.catalogue()["Qwen/Qwen2.5-Coder-7B"]["revision"]
    before = yamlfiles.read_yaml(paths.RECIPES / f"{base}.yaml")
    changed = {"base_model": "Qwen/Qwen2.5-Coder-7B", "revision_of_model": pinned, "output_dir": "outputs/mine"}
    expected = before | changed
    del expected["special_tokens"]
    assert yamlfiles.parse(text, "") == expected
    assert f"\nbase_model: Qwen/Qwen2.5-Coder-7B  # variant, was {before['base_model']}; chosen by --model\n" in text
    assert f"\nrevision_of_model: {pinned}  # variant, was {before['revision_of_model']}; this project: " in text
    removed = f"special_tokens: {yamlfiles.write_flow(before['special_tokens'])}"
    assert f"\n# variant, removed: {removed}; the tokenizer has a padding token, <|endoftext|>\n" in text
    assert "\n# Model     Qwen2.5 Coder 7B: licence apache-2.0, not gated\n" in text
    assert "\nlora_r: 32  # paper\n" in text
    comments = re.sub(r"variant, was .*?;|a variant of .*", "", about_the_model(text, base))
    of_paper = r"paper\b(?! names none)|Table II|Llama[ -][23]|Code Llama|no padding token|Unsloth|Not known"
    assert not re.search(of_paper, comments)
    assert wrong(recipe) == []


def test_what_is_changed_is_all_that_list_and_diff_name(tmp_path, recipe):
    written(recipe, tmp_path, "microsoft/Phi-3-mini-4k-instruct", "--set", "lora_r=8")
    keys = ["base_model", "revision_of_model", "special_tokens.pad_token", "lora_r", "lora_target_modules"]
    rows = {row["recipe"]: row for row in recipe.json("list")}
    changed = {row["key"]: row["mine"] for row in recipe.json("diff", "mine")}
    assert rows["mine"]["variant_of"] == BASE
    assert sorted(changed) == sorted(keys)
    assert changed["lora_target_modules"] == ["qkv_proj", "o_proj"]
    assert recipe("show", "mine").stdout.startswith("# yaml-language-server")
    assert wrong(recipe) == []


ALL_FACTS = (
    "licence, whether it is gated, revision, padding token, special tokens, type and sizes, context, linear layers"
)


def test_a_model_that_nothing_is_known_of_is_taken_with_its_missing_facts_named(tmp_path, recipe):
    text, notes = written(recipe, tmp_path, "Qwen/Qwen4-4B")  # near to names of known models
    assert notes == (
        f"not known about Qwen/Qwen4-4B: {ALL_FACTS}; for more facts run `hf download Qwen/Qwen4-4B --include "
        "'*.json'` and try again\n"
    )
    assert f"\n# Not known {ALL_FACTS}\n" in text


ADDED = [{"id": i, "content": token, "special": True} for i, token in enumerate(("<s>", "</s>", "<unused>"))]


@pytest.mark.parametrize(
    ("tokenizer", "pad_token", "reason"),
    [
        ({"tokenizer_class": "Qwen2TokenizerFast"}, None, "the tokenizer has a padding token, <|endoftext|>"),
        ({"pad_token": {"content": "<unused>"}}, None, "the tokenizer has a padding token, <unused>"),
        ({"pad_token": None, "eos_token": "</s>"}, "</s>", "EOS, Axolotl's fallback"),
        *((unknown, None, "not known whether the tokenizer names a padding token") for unknown in ({}, None)),
    ],
)
def test_facts_of_a_folder_are_read_and_a_padding_token_set_only_where_it_is_known_to_name_none(
    tmp_path, recipe, tokenizer, pad_token, reason
):
    folder = write_model(tmp_path / "phi", PHI, tokenizer, tokenizer={"added_tokens": ADDED})
    text, said = written(recipe, tmp_path, folder)
    tokens = {"pad_token": pad_token} if pad_token else None
    assert yamlfiles.parse(text, "").get("special_tokens") == tokens
    (line,) = [line for line in text.splitlines() if "special_tokens" in line]
    assert reason in line
    assert ("the tokenizer names no padding token" in line) == bool(pad_token)
    assert ("padding token" in said) == reason.startswith("not known")
    assert re.search(r"\n# variant, removed: revision_of_model: \w+; a folder has none\n", text)
    assert "a folder on this machine" in text
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<s>"}')
    assert models.find({"base_model": str(folder)}).pad_token == "<s>"
    assert wrong(recipe) == []


def test_facts_of_a_model_in_the_hubs_cache_alone_are_read_there(tmp_path, recipe, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    repository = hub / "models--nobody--tiny-phi"
    write_model(repository / "snapshots" / "abc", PHI, {"pad_token": "<unused>"}, tokenizer={"added_tokens": ADDED})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    text, said = written(recipe, tmp_path, "nobody/tiny-phi")
    assert re.search("nobody/tiny-phi: licence, .*gated, revision\n", said)
    assert yamlfiles.parse(text, "")["lora_target_modules"] == ["qkv_proj", "o_proj"]
    assert "the tokenizer has a padding token, <unused>" in text


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], ["qkv_proj"]),
        (["gate_proj", "down_proj", "up_proj"], ["gate_up_proj", "down_proj"]),
        (["qkv_proj"], ["qkv_proj"]),
    ],
)
def test_layers_get_the_names_of_the_family(targets, expected):
    assert models.renamed(targets, models.LAYERS["phi3"]) == expected
    assert set(models.renamed(expected, models.LINEAR_LAYERS)) <= set(models.LINEAR_LAYERS)


def test_set_has_the_last_word_beside_a_model(tmp_path, recipe):
    options = ["--set", "revision_of_model=v1", "--set", "special_tokens.pad_token=<|endoftext|>"]
    text, _ = written(recipe, tmp_path, "Qwen/Qwen3-8B", *options, "--set", "num_epochs=1")
    assert f"\nnum_epochs: 1  # variant, was {recipe_config(BASE)['num_epochs']}; paper\n" in text
    assert re.search(r"\nrevision_of_model: v1  # variant, was \w+; chosen by --set\n", text)
    assert re.search(r"\nspecial_tokens: {pad_token: <\|endoftext\|>}  # variant, was .*; chosen by --set\n", text)
    assert "padding token" not in text


def test_keys_about_the_model_before_go_and_its_chat_template_gives_way(tmp_path, recipe):
    keys = {"tokenizer_type": "LlamaTokenizer", "is_llama_derived_model": "true", "tokenizer_config": "x/y"}
    keys["lora_model_dir"] = "an/adapter"
    chat = keys | {"chat_template": "llama3", "datasets.0.type": "chat_template", "revision_of_model": "null"}
    words = [word for key, value in chat.items() for word in ("--set", f"{key}={value}")]
    recipe.ok("new", "chat", "--from", BASE, *words)
    text, _ = written(recipe, tmp_path, "Qwen/Qwen3-8B", base="chat")
    assert not keys.keys() & yamlfiles.parse(text, "").keys()
    assert "chat_template: tokenizer_default  # variant, was llama3; the model's template" in text
    done = recipe("new", "other", "--from", "chat", "--model", "mistralai/Mistral-7B-v0.3")
    _, note, _ = done.stderr.splitlines()
    assert note == "chat_template stays llama3: check that it suits the model"
