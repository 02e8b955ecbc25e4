"""Real merges by Axolotl, beside the adapter on its base model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.base.files import write_json
from qlora_recipes.evaluate import merge_check

TIED = {"tie_word_embeddings": True}
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


def merged(folder: Path, tiny: Path, sizes: dict[str, object], lora: dict[str, object], scale: float = 0.02) -> Path:
    """Merge a random adapter in bf16; its saved modules have moved by `scale`."""
    torch.manual_seed(0)
    architecture = AutoConfig.from_pretrained(tiny, **sizes)
    AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    trained = get_peft_model(base, LoraConfig(**settings | lora))
    for name, weight in trained.named_parameters():
        if "modules_to_save" in name:
            weight.data += scale * torch.randn(weight.shape)
        elif weight.requires_grad:
            weight.data *= 0.3
    trained.save_pretrained(folder / "adapter")
    merge_lora_sharded_efficient(folder / "base", folder / "adapter", folder / "merged", device="cpu")
    return folder / "merged"


@pytest.mark.parametrize(
    ("sizes", "lora", "is_lost"),
    [
        pytest.param({}, {}, False, id="untied"),
        pytest.param(TIED, {}, False, id="tied"),
        pytest.param({}, {"use_dora": True}, False, id="DoRA"),
        pytest.param(TIED, {"use_rslora": True}, False, id="rsLoRA"),
        pytest.param({}, BOTH, False, id="untied, saved modules"),
        pytest.param(TIED, BOTH | {"ensure_weight_tying": True}, False, id="tied, trained as one"),
        pytest.param(TIED, BOTH, True, id="tied, trained apart"),
        pytest.param({}, {"target_modules": ["q_proj", "embed_tokens"]}, True, id="LoRA on the embedding"),
    ],
)
def test_a_merge_that_loses_weights_differs_by_more_than_rounding(tmp_path, tiny, sizes, lora, is_lost):
    config = {"base_model": str(tmp_path / "base"), "adapter": "lora"}
    folder = merged(tmp_path, tiny, sizes, lora)
    by_merge, by_rounding = merge_check.distances(config, tmp_path / "adapter", folder)
    assert (by_merge > 100 * by_rounding) == is_lost
    assert (by_merge > 1.2 * by_rounding) == is_lost
    if is_lost:
        with pytest.raises(WorkFailed, match="Axolotl's merge of this adapter is wrong: its logits differ by 0"):
            merge_check.require_equal(config, tmp_path / "adapter", folder)
    else:
        merge_check.require_equal(config, tmp_path / "adapter", folder)


def test_without_memory_only_what_a_merge_is_known_to_lose_is_refused(tmp_path, monkeypatch, capsys):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(merge_check.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    config = {"base_model": "base", "adapter": "lora", "lora_target_modules": ["q_proj"]}
    merge_check.require_equal(config, tmp_path, tmp_path)
    assert "not compared with the trained model: this needs 0.0 GB of memory" in capsys.readouterr().err
    with pytest.raises(WorkFailed) as raised:
        merge_check.require_equal(config | {"lora_target_modules": ["embed_tokens"]}, tmp_path, tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: Axolotl's merge loses the trained embed_tokens; publish the adapter, without --merge and --gguf"
    )
