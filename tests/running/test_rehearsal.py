"""A rehearsal of one's own recipe with real Axolotl: rows of chats, for a GPU that is not there."""

from pathlib import Path

import pytest
from conftest import Recipe

from qlora_recipes.base.files import write_rows
from qlora_recipes.runs.rundir import RunDir

RECIPE = """
base_model: some/llama
adapter: qlora
load_in_4bit: true
lora_r: 4
lora_alpha: 8
lora_target_linear: true
chat_template: chatml
datasets:
  - path: chats.jsonl
    type: chat_template
val_set_size: 200
sequence_len: 1024
sample_packing: true
attn_implementation: flash_attention_2
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rms_norm: true
liger_fused_linear_cross_entropy: true
num_epochs: 2
micro_batch_size: 1
gradient_accumulation_steps: 1
optimizer: adamw_bnb_8bit
learning_rate: 0.01
evals_per_epoch: 1
warmup_steps: 100
"""


def chat(number: int) -> dict[str, list[dict[str, str]]]:
    """A chat of two turns about a number, of some hundred tokens."""
    turns = [f"What comes after {number}?", f"After {number} comes {number + 1}.", "And then?", f"Then {number + 2}."]
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


@pytest.mark.long
def test_chats_for_flash_attention_train_on_a_cpu(recipe: Recipe, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    write_rows(tmp_path / "chats.jsonl", map(chat, range(0, 900, 3)))
    refused = recipe("run", "mine.yaml")
    assert refused.returncode == 2
    assert "[no-gpu" in refused.stderr and "flash_attention_2" in refused.stderr
    checked = recipe("check", "mine.yaml", "--rehearse")
    assert checked.returncode == 0, checked.stdout
    done = recipe("run", "mine.yaml", "--rehearse", "--set", f"base_model={tiny}", "--set", "bf16=false")
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / done.stdout.strip())
    record = run.read()
    changed = {difference.key: (difference.file, difference.run) for difference in record.differences}
    assert changed["attn_implementation"] == ("flash_attention_2", "sdpa")
    assert changed["datasets.0.split"] == (None, "train[:32]")
    assert (record.state, record.rehearsal, [file.path for file in record.data]) == ("finished", True, ["chats.jsonl"])
    metrics = run.read_metrics()
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert len(losses) > 2 and losses[-1] < losses[0]
    evaluated = [record for record in metrics if "eval_loss" in record]
    for one in evaluated:  # packed, and each row alone: none attends to another
        assert one["eval_loss"] == pytest.approx(one["eval_loss_per_token"], abs=1e-4)
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
