"""A model card as Axolotl 0.4.0 wrote it, with its config and training results."""

CARD = """\
---
library_name: peft
---
<details><summary>See axolotl config</summary>

axolotl version: `0.4.0`
```yaml
base_model: models/llama
load_in_8bit: true
strict: false
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
sequence_len: 512
output_dir: ./lora-out
adapter: lora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
bf16: auto
tf32: false
flash_attention: true
evals_per_epoch: 4
deepspeed: deepspeed_configs/zero2.json
```
</details>

| Training Loss | Epoch | Step | Validation Loss |
|:-------------:|:-----:|:----:|:---------------:|
| 1.46          | 0.08  | 1    | 1.4903          |
| 1.15          | 4.0   | 48   | 1.2124          |

- PEFT 0.7.1
"""
