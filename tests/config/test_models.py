from pathlib import Path

import orjson
import pytest

from qlora_recipes.config import models

NAME = "meta-llama/Llama-2-7b-hf"
PINNED = models.catalogue()[NAME]["revision"]
OTHER = "0" * 40


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one revision of a model, which has one layer there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--{NAME.replace('/', '--')}" / "snapshots" / OTHER
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(orjson.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    return folder


@pytest.mark.parametrize("key", ["revision_of_model", "model_revision"])
def test_facts_are_those_of_the_revision_that_a_config_names(snapshot, key):
    for revision, layers in ((OTHER, 1), (PINNED, 32), (None, 32), ("1" * 40, 32)):  # the last is not there
        config = {"base_model": NAME, key: revision}
        assert models.architecture(config, download=False)["num_hidden_layers"] == layers
        assert models.find(config).layers == layers


def test_a_mirror_has_its_models_facts_but_for_the_revision():
    entry = models.entry_of("unsloth/Llama-3.2-3B-Instruct")
    assert entry["title"] == "Llama 3.2 3B Instruct"
    assert entry["gated"] is False
    assert not {"revision", "mirror"} & set(entry)


# In billions, as the makers give them: arXiv 2412.15115 and the models' cards (Qwen2.5), 2505.09388 (Qwen3), the hub's
# count (Mistral), 2408.00118 (Gemma 2), 2503.19786 (Gemma 3), 2404.14219 (Phi-3)
PARAMETERS = {
    "Qwen/Qwen2.5": {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.61, "14B": 14.7, "32B": 32.5, "72B": 72.7},
    "Qwen/Qwen3": {"0.6B": 0.6, "1.7B": 1.7, "4B": 4.0, "8B": 8.2, "14B": 14.8, "32B": 32.8},
    "mistralai/Mistral-7B": {"v0.1": 7.24, "v0.3": 7.25},
    "google/gemma-2": {"2b": 2.61, "9b": 9.24, "27b": 27.2},
    "google/gemma-3": {"1b-it": 1.0},
    "microsoft/Phi-3-mini": {"4k-instruct": 3.8},
}


@pytest.mark.long
def test_the_listed_sizes_make_models_of_the_published_size():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    published = {f"{family}-{size}": n for family, sizes in PARAMETERS.items() for size, n in sizes.items()}
    for name, billions in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**models.catalogue()[name]["config"]))
        model.tie_weights()
        assert model.num_parameters() == pytest.approx(billions * 1e9, rel=0.015), name


def test_entries_of_a_family_share_sizes_and_never_a_revision():
    listed = models.catalogue()
    revisions = [entry["revision"] for entry in listed.values() if "revision" in entry]
    assert len(revisions) == len(set(revisions))
    assert {"Qwen/Qwen2.5-Coder-7B-Instruct", "Qwen/Qwen3-8B-Base", "google/gemma-2-27b-it"} < set(listed)
    for name, entry in listed.items():
        assert {"title", "licence"} <= entry.keys(), name
        assert "config" not in entry or set(entry["config"]) >= models.NEEDED, name
        assert "config" not in entry or models.find({"base_model": name}).linear, name
        assert not {"own_pad_token", "pad_token"} <= set(entry), name


@pytest.mark.parametrize("kind", models.LAYERS)
def test_the_layers_of_each_family_are_those_that_transformers_builds(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    tiny = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, vocab_size=128, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny)
    built = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    parts = {layer: "mlp" if layer in models.MLP else "self_attn" for layer in models.LAYERS[kind]}
    assert built == {f"model.layers.0.{part}.{layer}" for layer, part in parts.items()}


def test_the_tokens_that_no_file_names_are_the_defaults_of_transformers():
    import inspect

    import transformers

    for kind, tokens in models.DEFAULT_TOKENS.items():
        defaults = inspect.signature(getattr(transformers, kind).__init__).parameters
        assert {name: defaults[name].default for name in tokens} == tokens


@pytest.mark.parametrize(
    ("architecture", "trained", "lost"),
    [
        pytest.param({"model_type": "llama"}, {"saved": ["embed_tokens", "lm_head"]}, [], id="untied"),
        pytest.param({"model_type": "llama"}, {"lora": ["q_proj", "lm_head"]}, [], id="LoRA on an untied head"),
        pytest.param({"model_type": "llama"}, {"lora": ["q_proj", "embed_tokens"]}, ["embed_tokens"], id="embedding"),
        pytest.param({"model_type": "gemma2"}, {"saved": ["model.lm_head"]}, ["model.lm_head"], id="tied by default"),
        pytest.param({"model_type": "gemma2"}, {"saved": ["lm_head"], "ties": True}, [], id="trained as one"),
        pytest.param(
            {"tie_word_embeddings": True},
            {"saved": ["embed_tokens"], "lora": ["q_proj", "lm_head"], "ties": True},
            ["lm_head"],
            id="LoRA on a tied head",
        ),
    ],
)
def test_modules_that_a_merge_loses_are_named(architecture, trained, lost):
    config = {
        "lora_target_modules": trained.get("lora"),
        "lora_modules_to_save": trained.get("saved"),
        "peft_ensure_weight_tying": trained.get("ties"),
    }
    assert models.lost_in_merge(config, architecture) == lost
