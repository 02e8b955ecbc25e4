"""Tokens, losses and rewards of a preference training, against an own computation with plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train_runs
from datasets import Dataset
from scipy.stats import binomtest

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_rows, write_rows
from qlora_recipes.config import datafiles
from qlora_recipes.metrics import registry
from qlora_recipes.run.rundir import PLUGIN, RunDir, summarise
from qlora_recipes.training.rewards import scored_pairs
from qlora_recipes.training.run_record import EvalTokens
from qlora_recipes.training.tokens import Tokenizer

BETA = 0.1
ROWS = 20
PROMPT = "<s>[INST] {prompt} [/INST]"  # the tokenizer adds a BOS of its own


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    """Pairs whose answers have unequal lengths."""
    rows = []
    for number in range(first, first + count):
        chosen, rejected = f" It is {number}." * (1 + number % 3), f" I think {number}?" * (1 + number % 4)
        prompt = PROMPT.format(prompt=f"Which number follows {number - 1}?")
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def config(folder: Path, model: Path) -> yamlfiles.Config:
    """A DPO training on pairs in a folder."""
    write_rows(folder / "train.jsonl", pairs(8, first=ROWS))
    write_rows(folder / "test.jsonl", pairs(ROWS))
    return {
        "base_model": str(model),
        "rl": "dpo",
        "rl_beta": BETA,
        "datasets": [{"path": str(folder / "train.jsonl"), "type": "passthrough"}],
        "test_datasets": [{"path": str(folder / "test.jsonl"), "type": "passthrough", "split": "train"}],
        "special_tokens": {"pad_token": "<|finetune_right_pad_id|>"},
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "lora_mlp_kernel": False,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "eval_batch_size": 8,  # the last batch has four pairs
        "gradient_accumulation_steps": 2,
        "num_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "eval_strategy": "epoch",
        "save_steps": 2,
        "logging_steps": 1,
        "bf16": False,
        "seed": 1,
        "plugins": [PLUGIN],
    }


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> yamlfiles.Config:
    return config(tmp_path_factory.mktemp("pairs"), tiny)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, content: yamlfiles.Config) -> RunDir:
    return train_runs(tmp_path_factory.mktemp("dpo"), {"dpo": content})["dpo"]


def hash_of(rows: list[Any]) -> EvalTokens:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return scored_pairs(Dataset.from_dict(dict(zip(names, zip(*rows, strict=True), strict=True))))


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, :-1].double()
    labels = torch.tensor((prompt + answer)[1:])
    chosen = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return float(chosen[len(prompt) - 1 :].sum())


def own_rewards(run: RunDir, content: yamlfiles.Config) -> list[tuple[float, float]]:
    """Chosen and rejected rewards of the test pairs, by plain transformers and PEFT, one answer at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(content["base_model"])
    base = AutoModelForCausalLM.from_pretrained(content["base_model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.output))
    rewards = []
    for row in read_rows(Path(content["test_datasets"][0]["path"])):
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        both = []
        for name in ("chosen", "rejected"):
            answer = tokenizer(row[name] + "</s>", add_special_tokens=False)["input_ids"]
            policy = log_probabilities(model, ids, answer)
            with model.disable_adapter():
                both.append(BETA * (policy - log_probabilities(model, ids, answer)))
        rewards.append((both[0], both[1]))
    return rewards


def test_rewards_and_losses_are_those_of_plain_transformers(run, content):
    rewards = own_rewards(run, content)
    margins = [chosen - rejected for chosen, rejected in rewards]
    assert len(margins) == ROWS
    last = [record for record in run.read_metrics() if "eval_loss" in record][-1]
    loss = -torch.nn.functional.logsigmoid(torch.tensor(margins)).mean()
    assert last["eval_loss"] == pytest.approx(float(loss), rel=1e-3)
    assert last["eval_reward_margin"] == pytest.approx(sum(margins) / ROWS, rel=1e-3)
    assert last["eval_reward_chosen"] == pytest.approx(sum(chosen for chosen, _ in rewards) / ROWS, rel=1e-3)
    right = sum(margin > 0 for margin in margins)
    assert last["eval_reward_accuracy"] == right / ROWS
    summary = summarise(run.read_metrics())
    interval = binomtest(right, ROWS).proportion_ci(method="wilson")
    assert registry.REWARD_ACCURACY.interval(summary.eval_losses) == pytest.approx(
        (100 * interval.low, 100 * interval.high)
    )
    tokenizer, [dataset] = Tokenizer(content), datafiles.test_sets(content)
    tokenized = tokenizer.pairs(dataset, read_rows(Path(dataset.path)))
    assert summary.eval_pairs == hash_of([(pair.prompt, pair.chosen, pair.rejected) for pair in tokenized])


def test_the_first_step_of_a_training_has_no_rewards_yet(run):
    first = next(record for record in run.read_metrics() if "loss" in record)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert (first["reward_margin"], first["reward_accuracy"]) == (0, 0)


def test_tokens_count_the_policys_passes_only(run, content):
    tokenizer, [dataset] = Tokenizer(content), datafiles.training_sets(content)
    rows = [row for _, row in tokenizer.load(dataset)]
    total = sum(2 * len(ids.prompt) + len(ids.chosen) + len(ids.rejected) for ids in tokenizer.pairs(dataset, rows))
    assert sum(record.get("tokens", 0) for record in run.read_metrics()) == content["num_epochs"] * total


def test_pairs_begin_with_one_bos_and_end_with_eos(content):
    tokenizer, [dataset] = Tokenizer(content), datafiles.training_sets(content)
    pair = tokenizer.pairs(dataset, pairs(1))[0]
    ends = tokenizer.tokenizer.decode(pair.prompt), pair.chosen[-1], pair.rejected[-1]
    eos = tokenizer.tokenizer.eos_token_id
    assert ends == ("<s>[INST] Which number follows -1? [/INST]", eos, eos)


PAIR, OTHER, SHORT = ([1, 2], [3], [4, 5]), ([1, 2], [3, 4], [5]), ([1], [2], [3])


@pytest.mark.parametrize(
    ("rows", "is_same"),
    [([PAIR, OTHER], True), ([OTHER, PAIR], True), ([PAIR], False), ([PAIR, PAIR], False), ([PAIR, SHORT], False)],
)
def test_the_hash_of_pairs_depends_on_tokens_not_on_order(rows, is_same):
    assert (hash_of(rows) == hash_of([PAIR, OTHER])) == is_same


def test_the_output_has_the_adapter_without_base_weights(run):
    assert [file.name for file in run.output.glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.long
def test_a_resumed_training_ends_with_the_same_adapter(tmp_path, run, content):
    checkpoint = run.output / "checkpoint-2"
    resumed = train_runs(tmp_path, {"resumed": content | {"resume_from_checkpoint": str(checkpoint)}})["resumed"]
    steps = [record["step"] for record in resumed.read_metrics() if "loss" in record]
    assert steps == [3, 4]
    adapters = [(output / "adapter_model.safetensors").read_bytes() for output in (run.output, resumed.output)]
    assert adapters[0] == adapters[1]
    assert adapters[0] != (checkpoint / "adapter_model.safetensors").read_bytes()
