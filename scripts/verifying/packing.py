"""The loss of each token of rows that share a sequence, beside its loss where each row is by itself. Imports torch."""

from collections.abc import Sequence
from typing import Any

import orjson
import torch
from axolotl.monkeypatch.attention.sdpa_varlen import patch_sdpa_varlen
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.trainer import add_position_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..configs import standin
from ..configs.compatibility import AMPERE
from ..data.sample import usual_sample
from ..runs.eval_loss import MASKED
from .bench import Bench, Figure, Figures

ROWS = 5
LENGTHS = (17, 120, 64, 33, 5)  # tokens of the rows: they start and end anywhere
Row = dict[str, list[int]]


def packing(bench: Bench) -> Figures:
    """How far losses of tokens are from those of the rows alone, in the mean; on a GPU in half precision, with the
    attention that Axolotl takes there (loaders/patch_manager.py)."""
    half = torch.bfloat16 if bench.bf16 else torch.float16
    folder, device = standin.model_folder(), "cuda" if bench.gpu else "cpu"
    if bench.gpu and bench.gpu.capability >= AMPERE:
        patch_sdpa_varlen()
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(
        folder, dtype=half if bench.gpu else torch.float32, device_map=device, attn_implementation="sdpa"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = _rows(tokenizer)
    return {
        "packed rows, losses": Figure(
            apart(losses(model, alone(tokenizer, rows)), losses(model, packed(tokenizer, rows)))
        )
    }


def _rows(tokenizer: Any) -> list[Row]:
    """Rows of the sample, cut to several lengths; as after a prompt, the first token carries no loss."""
    texts = map(orjson.loads, (usual_sample() / "train.jsonl").read_bytes().splitlines()[:ROWS])
    rows = []
    for row, length in zip(texts, LENGTHS, strict=True):
        ids = tokenizer(f"{row['input']}\n{row['output']}")["input_ids"][:length]
        rows.append({"input_ids": ids, "labels": [MASKED, *ids[1:]], "attention_mask": [1] * len(ids)})
    return rows


def alone(tokenizer: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch as Axolotl makes it without packing: a row each, padded."""
    batch: dict[str, torch.Tensor] = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
    return batch


def packed(tokenizer: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch as Axolotl makes it with packing and sdpa (core/trainers/base.py): one sequence, without a mask, with
    positions from 0 in each row."""
    counted = [add_position_ids({"input_ids": row["input_ids"], "labels": row["labels"]}) for row in rows]
    length = -(-sum(LENGTHS) // 64) * 64
    batch: dict[str, torch.Tensor] = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=length)(
        [counted]
    )
    batch.pop("attention_mask", None)
    return batch


@torch.inference_mode()
def losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of each token that carries one, row by row."""
    given = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = given.pop("labels")[:, 1:].flatten()
    logits = model(**given, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits[labels != MASKED], labels[labels != MASKED], reduction="none").cpu()


def apart(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The mean difference of losses; None where they are not of the same tokens."""
    return float((one - other).abs().mean()) if one.shape == other.shape else None
