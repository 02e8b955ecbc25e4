"""The eval loss of the same weights on the same rows is the same however they are batched, packed or divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_config, train_runs
from datasets import Dataset

from qlora_recipes.base import yamlfiles
from qlora_recipes.config import datafiles, merging
from qlora_recipes.run.rundir import PLUGIN, RunDir
from qlora_recipes.training.losses import scored_tokens
from qlora_recipes.training.run_record import EvalTokens
from qlora_recipes.training.summary import summarise

ROWS = 7  # so that the last batch is not full
PACKED = {"sample_packing": True, "pad_to_sequence_len": True, "sequence_len": 1024}
EVALUATIONS = {
    "2": {"eval_batch_size": 2},
    "packed, 1": PACKED | {"eval_batch_size": 1},
    "packed, 8": PACKED | {"eval_batch_size": 8},
}
ON_INPUTS = "train on inputs"


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The tiny Llama with a head that makes its loss differ from token to token, as a trained model's does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("decided")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight.data *= 8
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny_profile: Path, decided: Path) -> yamlfiles.Config:
    """A short training in fp32 that evaluates the base model before its first step."""
    base = merging.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(tiny_profile))
    base |= {"base_model": str(decided), "bf16": False, "plugins": [PLUGIN], "save_strategy": "no", "num_epochs": 1}
    base["datasets"][0]["split"], base["test_datasets"][0]["split"] = "train[:16]", f"train[:{ROWS}]"
    return merging.merge(base, {"saves_per_epoch": None, "warmup_steps": None, "special_tokens": {"pad_token": "</s>"}})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, base: yamlfiles.Config) -> dict[str, RunDir]:
    configs = {name: base | change for name, change in EVALUATIONS.items()}
    configs[ON_INPUTS] = base | {"train_on_inputs": True}
    return train_runs(tmp_path_factory.mktemp("eval-loss"), configs)


ROW = [1, 5, 6, 7], [-100, -100, 6, 7]
PADDED = [1, 5, 6, 7, 0, 0], [-100, -100, 6, 7, -100, -100]
LONG = [1, 5, 8, 9, 9], [-100, -100, 8, 9, 9]
UNLABELLED = [1, 5, 6], [1, -100, -100]  # nothing predicts the first token


@pytest.mark.parametrize(
    ("rows", "count", "is_same"),
    [
        ([LONG, ROW], 5, True),
        ([PADDED, LONG, UNLABELLED], 5, True),
        ([ROW, ROW, LONG], 7, False),
        ([([1, 5, 6, 7], [1, 5, 6, 7]), LONG], 6, False),
        ([([1, 4, 6, 7], [-100, -100, 6, 7]), LONG], 5, False),  # another prompt
        ([ROW], 2, False),
    ],
)
def test_scored_tokens_depend_on_neither_order_nor_padding(rows, count, is_same):
    def tokens_of(rows: list[Any]) -> EvalTokens:
        return scored_tokens(
            Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [of for _, of in rows]})
        )

    tokens = tokens_of(rows)
    assert tokens["count"] == count
    assert (tokens["sha256"] == tokens_of([ROW, LONG])["sha256"]) == is_same


def before_training(run: RunDir) -> dict[str, float]:
    first = run.read_metrics()[0]
    assert first["step"] == 0
    return first


def expected_loss(base: yamlfiles.Config) -> float:
    """The loss a token of the quantized base model, one row at a time, by transformers alone."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_recipes.training.tokens import Tokenizer

    tokenizer, [dataset] = Tokenizer(base), datafiles.test_sets(base)
    tokenized = tokenizer.tokenize(dataset, [row for _, row in tokenizer.load(dataset)])
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base["base_model"], quantization_config=nf4, dtype=torch.float32)
    total = tokens = 0.0
    for row in tokenized:
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    assert len(tokenized) == ROWS
    return total / tokens


@pytest.mark.long  # four trainings
def test_however_rows_are_batched_and_packed(evaluated, base):
    losses = {name: before_training(run) for name, run in evaluated.items() if name != ON_INPUTS}
    axolotls = [loss["eval_loss"] for loss in losses.values() if "eval_loss" in loss]
    assert max(axolotls) - min(axolotls) > 5e-3  # Axolotl's differ
    assert len(axolotls) == len(losses) - 1  # and of rows that do not fill a packed batch it has none
    ours = [loss["eval_loss_per_token"] for loss in losses.values()]
    assert max(ours) - min(ours) < 1e-4
    assert ours[0] == pytest.approx(expected_loss(base), rel=1e-4)  # one row at a time
    first, *further = [summarise(evaluated[name].read_metrics()).eval_tokens for name in EVALUATIONS]
    assert first and further == [first, first]
    on_inputs = summarise(evaluated[ON_INPUTS].read_metrics()).eval_tokens
    assert on_inputs and on_inputs["count"] > first["count"] and on_inputs["sha256"] != first["sha256"]
