"""Tokens, losses and rewards of a preference training, against an own computation with plain transformers."""

from itertools import batched
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import finish, start, train_runs, wait_until
from datasets import Dataset
from scipy.stats import binomtest

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_rows, write_rows
from qlora_recipes.config import datafiles
from qlora_recipes.metrics import registry
from qlora_recipes.run.rundir import PLUGIN, RunDir, all_runs
from qlora_recipes.training.rewards import scored_pairs
from qlora_recipes.training.run_record import EvalTokens
from qlora_recipes.training.summary import summarise
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
        "num_epochs": 4,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "eval_strategy": "epoch",
        "save_steps": 3,
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


@pytest.mark.long
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


@pytest.mark.long
def test_the_first_step_of_a_training_has_no_rewards_yet(run):
    first = next(record for record in run.read_metrics() if "loss" in record)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert (first["reward_margin"], first["reward_accuracy"]) == (0, 0)


@pytest.mark.long
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


@pytest.mark.long
def test_the_output_has_the_adapter_without_base_weights(run):
    assert [file.name for file in run.output.glob("*.safetensors")] == ["adapter_model.safetensors"]


def other_config(folder: Path, model: Path, rl: str) -> yamlfiles.Config:
    """A training by another method than DPO, on the same rows."""
    folder.mkdir()
    content = config(folder, model) | {"rl": rl}
    if rl == "simpo":
        content |= {"simpo_gamma": GAMMA, "cpo_alpha": 0}
    if rl in ("orpo", "kto"):  # no type: rows as they are
        for section in ("datasets", "test_datasets"):
            content[section][0].pop("type")
    if rl == "kto":
        content["remove_unused_columns"] = False
        for file in folder.iterdir():
            write_rows(file, unpaired(read_rows(file)))
    return content


def unpaired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One answer of each pair, with a label; two of three are desirable."""
    answers = []
    for number, row in enumerate(rows):
        is_chosen = number % 3 > 0
        completion = row["chosen" if is_chosen else "rejected"]
        answers.append({"prompt": row["prompt"], "completion": completion, "label": is_chosen})
    return answers


GAMMA = 0.5
OTHERS = ("ipo", "simpo", "orpo", "kto")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, RunDir]:
    folder = tmp_path_factory.mktemp("others")
    return train_runs(folder, {rl: other_config(folder / f"{rl}-rows", tiny, rl) for rl in OTHERS})


class Scorer:
    """Log-probabilities of answers under a run's adapter and its base model, by plain transformers and PEFT."""

    def __init__(self, run: RunDir):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = run.config["base_model"]
        rows = read_rows(Path(run.config["test_datasets"][0]["path"]))
        # Axolotl shuffles test rows, too: batches matter to the losses of ORPO and KTO
        self.rows = list(Dataset.from_list(rows).shuffle(seed=run.config["seed"]))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, str(run.output))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def policy(self, prompt: str, answer: str) -> float:
        return log_probabilities(self.model, self.ids(prompt), self.ids(answer + "</s>"))

    def mean(self, prompt: str, answer: str) -> float:
        return self.policy(prompt, answer) / len(self.ids(answer + "</s>"))

    def ratio(self, prompt: str, answer: str) -> float:
        with self.model.disable_adapter():
            reference = self.policy(prompt, answer)
        return self.policy(prompt, answer) - reference


def ipo_loss(scorer: Scorer, rows: list[Any]) -> float:
    losses = []
    for row in rows:
        means = []
        for name in ("chosen", "rejected"):
            means.append(scorer.ratio(row["prompt"], row[name]) / len(scorer.ids(row[name] + "</s>")))
        losses.append((means[0] - means[1] - 1 / (2 * BETA)) ** 2)
    return sum(losses) / len(losses)


def simpo_loss(scorer: Scorer, rows: list[Any]) -> float:
    margins = [scorer.mean(row["prompt"], row["chosen"]) - scorer.mean(row["prompt"], row["rejected"]) for row in rows]
    return float(-torch.nn.functional.logsigmoid(BETA * torch.tensor(margins) - GAMMA).mean())


def orpo_loss(scorer: Scorer, rows: list[Any]) -> float:
    """Mean loss of the tokens of prompt and chosen answer, and the logarithm of the odds ratio."""
    total, tokens, odds = 0.0, 0, []
    for row in rows:
        sequence = scorer.ids(row["prompt"]) + scorer.ids(row["chosen"] + "</s>")
        total -= log_probabilities(scorer.model, sequence[:1], sequence[1:])
        tokens += len(sequence) - 1
        means = torch.tensor([scorer.mean(row["prompt"], row[name]) for name in ("chosen", "rejected")])
        logits = means - torch.log1p(-means.exp())
        odds.append(logits[0] - logits[1])
    return total / tokens - BETA * float(torch.nn.functional.logsigmoid(torch.stack(odds)).mean())


def kto_loss(scorer: Scorer, rows: list[Any]) -> float:
    """KTO's loss; its divergence is that of prompts with the answers of their neighbours in a micro batch of two."""
    divergences, losses = [], []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        divergences.append(scorer.ratio(first["prompt"], second["completion"]))
        divergences.append(scorer.ratio(second["prompt"], first["completion"]))
    divergence = max(sum(divergences) / len(divergences), 0)
    for row in rows:
        sign = 1 if row["label"] else -1
        distance = scorer.ratio(row["prompt"], row["completion"]) - divergence
        losses.append(1 - torch.sigmoid(torch.tensor(BETA * sign * distance)))
    return float(torch.stack(losses).mean())


LOSSES = {"ipo": ipo_loss, "simpo": simpo_loss, "orpo": orpo_loss, "kto": kto_loss}


@pytest.mark.long
@pytest.mark.parametrize("rl", OTHERS)
def test_losses_of_other_methods_are_those_of_plain_transformers(runs, rl):
    scorer = Scorer(runs[rl])
    total = 0.0
    for batch in batched(scorer.rows, 8):
        total += len(batch) * LOSSES[rl](scorer, [*batch])
    last = [record for record in runs[rl].read_metrics() if "eval_loss" in record][-1]
    assert last["eval_loss"] == pytest.approx(total / ROWS, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("rl", ["ipo", "simpo", "orpo"])
def test_rewards_of_other_methods_are_those_of_plain_transformers(runs, rl):
    scorer = Scorer(runs[rl])
    score = scorer.ratio if rl == "ipo" else scorer.mean
    margins = []
    for row in scorer.rows:
        margins.append(BETA * (score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"])))
    last = [record for record in runs[rl].read_metrics() if "eval_loss" in record][-1]
    assert last["eval_reward_margin"] == pytest.approx(sum(margins) / ROWS, rel=1e-3)
    assert last["eval_reward_accuracy"] == sum(margin > 0 for margin in margins) / ROWS
    assert summarise(runs[rl].read_metrics()).eval_pairs["count"] == ROWS


@pytest.mark.long
@pytest.mark.parametrize("rl", ["ipo", "simpo", "orpo"])
def test_both_answers_of_a_pair_are_counted_as_tokens(runs, rl):
    scorer = Scorer(runs[rl])
    total = 0
    for row in read_rows(Path(runs[rl].config["datasets"][0]["path"])):
        answers = scorer.ids(row["chosen"] + "</s>") + scorer.ids(row["rejected"] + "</s>")
        total += 2 * len(scorer.ids(row["prompt"])) + len(answers)
    assert sum(record.get("tokens", 0) for record in runs[rl].read_metrics()) == runs[rl].config["num_epochs"] * total


@pytest.mark.long
def test_a_killed_training_goes_on_to_the_same_adapter(tmp_path, run, content):
    """Killed after step 4, while it evaluates or takes the next steps; its checkpoints are of steps 3 and 6."""
    (tmp_path / "pairs.yaml").write_text(yamlfiles.write_yaml(content))
    process = start(tmp_path, "run", "pairs.yaml")
    try:
        wait_until(lambda: steps(all_runs(tmp_path / "runs"))[-1:] >= [4], process)
        [killed] = all_runs(tmp_path / "runs")
        (training,) = psutil.Process(process.pid).children()
        training.kill()
        process.kill()
        process.communicate()
    finally:
        process.kill()
    wait_until(lambda: killed.read().state == "interrupted")
    assert killed.last_checkpoint() == killed.output / "checkpoint-3"
    finish(start(tmp_path, "resume", "latest"))
    assert [launch.resumed_from for launch in killed.read().launches] == [None, "checkpoint-3"]
    assert steps([killed]) == steps([run]) == [*range(1, 9)]
    adapters = [(output / "adapter_model.safetensors").read_bytes() for output in (run.output, killed.output)]
    assert adapters[0] == adapters[1]
    assert adapters[0] != (killed.output / "checkpoint-3" / "adapter_model.safetensors").read_bytes()


def steps(runs: list[RunDir]) -> list[int]:
    """Steps with a loss in the metrics of runs."""
    return [record["step"] for run in runs for record in run.read_metrics() if "loss" in record]
