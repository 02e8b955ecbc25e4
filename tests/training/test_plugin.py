import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from conftest import config_with, recipe_config, train_runs
from run_folders import a_run, shell_for_axolotl
from transformers import AutoTokenizer

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import WorkFailed
from qlora_recipes.base.files import tensor_shapes
from qlora_recipes.base.terminal import TrainingProgress
from qlora_recipes.config import merging
from qlora_recipes.run import launch
from qlora_recipes.run.rundir import PLUGIN, RunDir
from qlora_recipes.training import run_record
from qlora_recipes.training.run_plugin import RunCallback, RunPlugin
from qlora_recipes.training.signals import Findings, Signals
from qlora_recipes.training.summary import summarise

USE_CPU = "test_plugin.UseCpuOnly"
TRAINER = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[]))
STOPPING = SimpleNamespace(should_training_stop=True)


def state_at(step: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=8, epoch=0.1, log_history=[], **more)


class UseCpuOnly(RunPlugin):
    """The plugin of a run without its cure."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Do nothing."""


def steps(run: RunDir) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in run.read_metrics() if "loss" in record]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_profile: Path) -> dict[str, RunDir]:
    """The same training with and without evaluation, and with evaluation but without the cure."""
    base = merging.merge(recipe_config("haider2024/llama-2-7b"), yamlfiles.read_yaml(tiny_profile))
    # an evaluation's data loader draws from the generator that dropout draws from, so dropout is off
    base |= {"save_strategy": "no", "saves_per_epoch": None, "num_epochs": 1, "lora_dropout": 0.0}
    without = {"evals_per_epoch": None, "test_datasets": None}
    configs = {
        "evaluated": base | {"plugins": [PLUGIN]},
        "not evaluated": merging.merge(base | {"plugins": [PLUGIN]}, without),
        "uncured": base | {"plugins": [USE_CPU]},
    }
    return train_runs(tmp_path_factory.mktemp("plugin"), configs, plugins=__file__)


@pytest.mark.long
def test_evaluating_during_training_does_not_change_the_training_which_it_would_without_the_cure(runs):
    from bitsandbytes.functional import has_avx512bf16

    assert len(steps(runs["evaluated"])) == 8
    assert steps(runs["evaluated"]) == steps(runs["not evaluated"])
    if has_avx512bf16():  # else bitsandbytes does not repack weights
        assert steps(runs["uncured"]) != steps(runs["not evaluated"])


def test_a_record_after_a_torn_line_is_kept(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_bytes(b'{"step":4,"max_steps":8,"loss":3.0}\n{"step":5,"max_st')  # of a killed process
    progress = TrainingProgress(run.metrics)
    callback = RunCallback(run.metrics, None, None)
    for step in (5, 6):
        callback._append(state_at(step), {"loss": 2.0})
        progress.read()
        assert progress.task.completed == step
    assert [record["step"] for record in run.read_metrics()] == [4, 5, 6]


def test_rows_that_are_prepared_are_not_written_again(tiny, sample, tmp_path):
    """Another run may be training on them."""
    from axolotl.cli.preprocess import do_preprocess

    from qlora_recipes.training.tokens import Tokenizer

    data = {"datasets": [{"path": str(sample / "train.jsonl"), "type": "alpaca"}], "test_datasets": None}
    folders = {"dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "run" / "output")}
    (tmp_path / "run").mkdir()
    model = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None, "evals_per_epoch": None}
    cfg = Tokenizer(config_with(model | data | folders | {"plugins": [PLUGIN]})).cfg
    written = []
    for _ in range(2):
        cfg.is_preprocess = True  # as Axolotl's command sets it
        do_preprocess(cfg, SimpleNamespace(iterable=False, download=False))
        written.append({file: file.stat().st_mtime_ns for file in tmp_path.glob("prepared/*/*.arrow")})
    assert written[0] == written[1] != {}


def test_a_mirror_is_collated_as_its_original(tiny, tmp_path):
    from axolotl.utils.collators import DataCollatorForSeq2Seq

    rows = [{"input_ids": [1, *range(5, end)], "labels": [-100, *range(5, end)]} for end in (9, 20)]
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])

    def collated(side: str, base_model: str) -> dict[str, list[list[int]]]:
        tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side=side, pad_token="</s>")
        trainer = SimpleNamespace(processing_class=tokenizer, _save_checkpoint=None, evaluation_loop=None)
        cfg = SimpleNamespace(base_model=base_model, output_dir=str(tmp_path), rl=None)
        RunPlugin().post_trainer_create(cfg, trainer)
        batch = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])
        return {name: tensor.tolist() for name, tensor in batch.items()}

    original = collated("right", "meta-llama/Llama-3.2-3B")
    assert collated("left", "unsloth/Llama-3.2-3B") == original
    assert collated("left", "somebody/else") != original


def test_the_eval_loss_is_that_of_the_checkpoint_that_was_kept(tmp_path):
    run = RunDir(tmp_path)
    callback = RunCallback(run.metrics, TRAINER, None)
    arguments = SimpleNamespace(report_to=[], device="cpu", output_dir=str(run.output), load_best_model_at_end=True)
    for step, loss in ((2, 4.2), (4, 4.1), (6, 7.1)):
        callback.on_log(arguments, state_at(step), STOPPING, logs={"eval_loss": loss, "eval_loss_per_token": loss + 1})
    assert summarise(run.read_metrics()).eval_loss == 7.1
    state = state_at(6, best_model_checkpoint=str(run.output / "checkpoint-4"))
    callback.on_train_end(arguments, state, STOPPING)
    summary = summarise(run.read_metrics())
    assert summary.step == 6
    assert summary.kept_step == 4
    assert summary.eval_loss == 4.1
    assert summary.eval_loss_per_token == 5.1


@pytest.mark.parametrize(
    ("loss", "labels", "is_high"),
    [
        (10.9, 4000, False),
        (15.69, 32, False),  # of labels and EOS tokens (seen)
        (15.69, 4000, True),
        (21.29, 4000, True),  # of damaged 4-bit weights (seen)
        (21.29, 0, False),  # rows without labels
    ],
)
@pytest.mark.parametrize("accepted", [False, True])
def test_a_first_loss_that_no_intact_model_has_ends_the_training(
    tmp_path, monkeypatch, loss, labels, is_high, accepted
):
    monkeypatch.setenv(run_record.STOP_AT, "first-loss")
    monkeypatch.setenv(run_record.FORCED, "first-loss" * accepted)
    judge = Signals(Findings(), vocabulary=49_152)
    callback = RunCallback(tmp_path / "metrics.jsonl", TRAINER, None, judge=judge)
    callback.labels = torch.tensor(labels)
    control = SimpleNamespace(should_training_stop=False)
    callback.on_log(SimpleNamespace(report_to=[], device="cpu"), state_at(1), control, logs={"loss": loss})
    callback.on_log(SimpleNamespace(report_to=[], device="cpu"), state_at(2), control, logs={"loss": 99.0})
    summary = summarise(RunDir(tmp_path).read_metrics())
    assert [finding["rule"] for finding in summary.findings] == ["first-loss"] * is_high
    if is_high:
        measured = f"the first training loss is {loss:.4g} over 4,000 tokens, but guessing gives 10.8"
        remedy = "the base model is damaged, or its precision, quantization or tokenizer is wrong: correct it"
        assert summary.trouble == f"{measured}; {remedy} [first-loss]"
    assert control.should_training_stop == (is_high and not accepted)
    if control.should_training_stop:
        assert callback._how_it_ended(state_at(1), control) == "finding"


def test_labels_and_batches_without_them_are_counted_until_a_loss(tmp_path):
    judge = Signals(Findings(), vocabulary=49_152)
    callback = RunCallback(tmp_path / "metrics.jsonl", TRAINER, None, judge=judge)
    model = SimpleNamespace(training=True)
    inputs = {"input_ids": torch.zeros(2, 4), "labels": torch.tensor([[7, -100, 8, 9], [-100, -100, -100, 5]])}
    callback._count(model, None, inputs)
    assert callback.labels == 3  # nothing predicts the first token of a row
    assert callback.empty == 0
    control = SimpleNamespace(should_training_stop=False)
    callback.on_log(SimpleNamespace(report_to=[], device="cpu"), state_at(1), control, logs={"loss": 2.0})
    callback._count(model, None, inputs | {"labels": torch.full((2, 4), -100)})
    assert (callback.labels, callback.empty) == (0, 1)
    callback.on_log(SimpleNamespace(report_to=[], device="cpu"), state_at(2), control, logs={"loss": 2.0})
    assert [*judge.findings] == ["training:labels"]


@pytest.mark.parametrize(("step", "ended"), [(0, "no batch"), (3, "callback"), (8, "complete")])
def test_a_training_without_a_step_had_no_batch(tmp_path, step, ended):
    assert RunCallback(tmp_path, TRAINER, None)._how_it_ended(state_at(step), STOPPING) == ended


def test_the_gpus_of_the_ranks_are_recorded(tmp_path, monkeypatch):
    folder = a_run(tmp_path / "runs", "haider2024/code-llama-7b", "one", 5.0, state="failed")
    shell_for_axolotl(tmp_path, monkeypatch, "exit 1")
    visible = {"2": {"name": "NVIDIA A100"}, "3": {"name": "Tesla T4"}}
    monkeypatch.setattr(run_record, "visible_gpus", lambda: visible)
    record = folder.read()
    record.launches = []
    with pytest.raises(WorkFailed), folder.held() as lock:
        launch.train(folder, record, lock)
    assert folder.read().provenance["gpus"] == [{"name": "NVIDIA A100"}]


def test_tokens_are_counted_without_padding_in_training_only(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> None:
            pass

    model = Model()
    callback = RunCallback(tmp_path / "metrics.jsonl", SimpleNamespace(model=model, train_dataset=range(131)), None)
    arguments = SimpleNamespace(report_to=[], device="cpu", eval_on_start=True, full_determinism=False)
    handler = signal.getsignal(signal.SIGTERM)
    callback.on_train_begin(arguments, state_at(0), None)
    signal.signal(signal.SIGTERM, handler)
    ids = torch.zeros(2, 5, dtype=torch.long)
    model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 2, 2, 2]]))  # the second row is packed
    model(input_ids=ids)
    model.eval()(input_ids=ids)
    callback.step_seconds = 2.0
    callback.on_log(arguments, state_at(1), STOPPING, logs={"loss": 2.0})
    record = RunDir(tmp_path).read_metrics()[-1]
    assert record["tokens"] == 8 + 10
    assert record["tokens_per_second"] == 9.0
    model.train()(input_ids=ids)
    callback.step_seconds = 0.5  # of a step that the trainer does not log
    callback.on_train_end(
        SimpleNamespace(**vars(arguments), load_best_model_at_end=False, output_dir=str(tmp_path / "output")),
        state_at(8),
        STOPPING,
    )
    summary = summarise(RunDir(tmp_path).read_metrics())
    assert summary.train_seconds == 2.5
    assert summary.tokens_per_second == 28 / 2.5
    assert summary.training_rows == 131


@pytest.mark.long
def test_the_parameters_are_counted(runs, tiny):
    run = runs["evaluated"]
    summary = summarise(run.read_metrics())
    adapter = tensor_shapes(run.output / "adapter_model.safetensors").values()
    assert summary.trainable_parameters == sum(map(math.prod, adapter)) > 0
    base_model = sum(map(math.prod, (tensor_shapes(tiny / "model.safetensors") or {}).values()))
    parameters = next(record["parameters"] for record in run.read_metrics() if "parameters" in record)
    assert parameters == base_model + summary.trainable_parameters
    assert summary.training_rows == 64  # of the file's 109


@pytest.mark.long
def test_the_first_row_is_recorded_as_it_is_trained_on(runs):
    row = next(record["first_row"] for record in runs["evaluated"].read_metrics() if "first_row" in record)
    assert [piece["learnt"] for piece in row] == [False, True]
    assert row[0]["text"].endswith("### Response:\n")
    assert row[1]["text"].endswith("</s>")


@pytest.mark.long
def test_the_metrics_record_phases_steps_and_evaluations(runs):
    def phases(name: str) -> list[str]:
        records = map(orjson.loads, runs[name].metrics.read_bytes().splitlines())
        return [record["phase"] for record in records if "phase" in record]

    evaluated = ["evaluating", "training", "evaluating", "training"]
    begin = ["reading and tokenizing rows", "loading the model"]
    assert phases("evaluated") == [*begin, "first evaluation", "training", *evaluated, "saving the model"]
    assert phases("not evaluated") == [*begin, "training", "saving the model"]
    records = runs["evaluated"].read_metrics()
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 4, 8]
    training = [record for record in records if "loss" in record]
    assert [(record["step"], record["max_steps"]) for record in training] == [(step, 8) for step in range(1, 9)]
    positive = ("tokens", "step_seconds", "rss_peak_gib", "cpu_percent")
    assert all(record[key] > 0 for record in training for key in positive)
    assert all(record["learning_rate"] <= 2e-4 for record in training)
