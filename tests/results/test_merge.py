import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import finish, start, wait_until
from run_folders import ADAPTER, a_run
from safetensors import numpy as arrays

from qlora_recipes.config import models
from qlora_recipes.results import publish
from qlora_recipes.run.rundir import RunDir

NAME = "haider2024/code-llama-7b"
STOPS = [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        pytest.param({}, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, id="untied, saved"),
        pytest.param({}, {"lora_target_modules": ["q_proj", "lm_head"]}, id="untied, LoRA on the head"),
        pytest.param({}, {"lora_target_modules": ["q_proj", "embed_tokens"]}, id="LoRA on the embedding"),
        pytest.param(TIED, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, id="tied, trained apart"),
        pytest.param(TIED, {"lora_modules_to_save": ["lm_head"]}, id="tied, only the head"),
        pytest.param(TIED, {"lora_target_modules": ["q_proj", "lm_head"]}, id="tied, LoRA on the head"),
        pytest.param(
            TIED,
            {"lora_modules_to_save": ["embed_tokens", "lm_head"], "peft_ensure_weight_tying": True},
            id="tied, trained as one",
        ),
    ],
)
def test_axolotls_merge_loses_what_is_refused(tmp_path, tiny, sizes, config):
    """Real merges, because another release of Axolotl may merge more."""
    import torch
    from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path / "base"
    architecture = AutoConfig.from_pretrained(tiny, **sizes)
    AutoModelForCausalLM.from_config(architecture, dtype=torch.float32).save_pretrained(base)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=config.get("lora_target_modules", ["q_proj"]),
        modules_to_save=config.get("lora_modules_to_save"),
        ensure_weight_tying=config.get("peft_ensure_weight_tying", False),
        init_lora_weights=False,
    )
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for weight in {weight for weight in trained.parameters() if weight.requires_grad}:
        weight.data += 0.1 * torch.randn(weight.shape)
    trained.save_pretrained(tmp_path / "adapter")
    merge_lora_sharded_efficient(base, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(5, 50)[None]
    with torch.inference_mode():
        difference = float((merged(ids).logits - trained.eval()(ids).logits).abs().max())
    assert (difference > 1e-3) == bool(models.lost_in_merge(config, architecture.to_dict()))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was merged, and has trained on since."""
    folder = a_run(tmp_path / "runs", NAME, "one", 10.0)
    (folder.output / "merged").mkdir(parents=True)
    (folder.output / "merged" / "model.safetensors").write_bytes(b"former")
    arrays.save_file({"lora_A": np.ones((8, 4), np.float32)}, folder.output / ADAPTER)
    (folder.output / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model", "r": 8}')
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("by", "code"), STOPS)
def test_a_merge_that_is_stopped_leaves_no_process_and_no_half_a_model(tmp_path, fake_axolotl, run, by, code):
    merged = run.output / "merged" / "model.safetensors"
    words = ("publish", run.path, "--merge")
    process = start(tmp_path, *words, command=fake_axolotl, FAKE_GO=str(tmp_path / "go"))
    try:
        wait_until(lambda: [*run.output.glob(".merged.part/merged/*.safetensors")], process)  # half of a model
        child = psutil.Process(process.pid).children()
        process.send_signal(by)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert psutil.wait_procs(child, timeout=30)[1] == []
    assert not merged.exists() and (by == signal.SIGKILL or not (run.output / ".merged.part").exists())
    finish(start(tmp_path, *words, command=fake_axolotl))
    assert merged.read_bytes() == b"halfother half"
    assert {path.name for path in merged.parent.iterdir()} == {merged.name, publish.MADE_FROM, publish.CARD}
    assert not (run.output / ".merged.part").exists()
