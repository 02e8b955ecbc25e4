"""Findings of a training about its own losses, gradients and warnings."""

import logging
import math

import pytest
from datasets import Dataset

from qlora_recipes.training.run_record import FORCED, STOP_AT
from qlora_recipes.training.signals import Findings, Signals, Warnings, compare_sets

FALLING = [3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3]


@pytest.mark.parametrize(
    ("losses", "norm", "wrong"),
    [
        (FALLING, 1.0, {}),
        (FALLING[:2], None, {}),
        ([2.5, 2.6] * 8, 1.0, {}),  # noise
        (FALLING[::-1], 1.0, {"loss": "0.6 higher in the last quarter of the steps than in the first"}),
        ([0.0, 1.0], 1.0, {"loss": "0 in the first step: no token is learnt"}),
        ([3.0, math.nan], 1.0, {"loss": "NaN or infinite, also in the log from here on"}),
        (FALLING, 0.0, {"grad_norm": "0: nothing is trained"}),
    ],
)
def test_losses_and_gradients_of_a_failing_training_are_found(losses, norm, wrong):
    findings = Findings()
    judge = Signals(findings, None)
    for loss in losses:
        judge.step(loss, norm, 100, 0)
    judge.end()
    assert {finding["key"]: finding["problem"] for finding in findings.values()} == wrong


def test_a_batch_without_labels_explains_its_loss_and_gradient():
    """transformers adds each loss to the last one that it has logged, so that a NaN stays (seen)."""
    findings = Findings()
    judge = Signals(findings, vocabulary=1024)
    judge.step(6.8, 1.0, 100, 0)
    judge.step(math.nan, 0.0, 0, 1)
    judge.step(math.nan, 1.0, 100, 0)
    assert [*findings] == ["training:labels"]


@pytest.mark.parametrize(
    ("evaluated", "names"),
    [([2.5, 2.4], []), ([2.5], []), ([2.5, 2.5], ["training:eval_loss"]), ([math.nan] * 2, ["training:eval_loss"])],
)
def test_an_eval_loss_that_is_undefined_or_stays_is_found(evaluated, names):
    findings = Findings()
    judge = Signals(findings, None)
    for loss in evaluated:
        judge.evaluation(loss)
    for loss in FALLING:
        judge.step(loss, 1.0, 100, 0)
    judge.end()
    assert [*findings] == names


@pytest.mark.parametrize(
    ("logger", "text", "name"),
    [
        ("axolotl.prompt_strategies.chat_template", "EOS token '<eos>' not in the template", "training:eot_tokens"),
        ("axolotl.utils.trainer", "Dropped 3 samples with no trainable tokens", "dropped-rows:datasets"),
        ("transformers.modeling_utils", "LlamaForCausalLM LOAD REPORT\nx | MISSING", "training:base_model"),
        ("transformers.modeling_utils", "LlamaForCausalLM LOAD REPORT\nlm_head.bias | UNEXPECTED", None),
    ],
)  # fmt: skip
def test_warnings_that_matter_are_found(caplog, logger, text, name):
    caplog.set_level(logging.WARNING, logger=logger)  # other tests silence transformers
    findings = Findings()
    handler = Warnings(findings)
    logging.getLogger(logger).warning(text)
    logging.getLogger(logger).removeHandler(handler)
    assert {key: finding["problem"] for key, finding in findings.items()} == ({name: text} if name else {})


@pytest.mark.parametrize(
    ("evaluated", "problems"),
    [
        (None, []),
        (Dataset.from_dict({"prompt": ["a"]}), []),
        (Dataset.from_dict({"input_ids": [[1, 2], [3]]}), []),
        (Dataset.from_dict({"input_ids": [[1, 2, 3], [3], [4, 5]]}),
         ["2 evaluation rows are trained on: the eval loss means little"]),
    ],
)  # fmt: skip
def test_evaluation_rows_that_are_trained_on_are_found(evaluated, problems):
    findings = Findings()
    compare_sets(findings, Dataset.from_dict({"input_ids": [[4, 5], [1, 2, 3]]}), evaluated)
    assert [finding["problem"] for finding in findings.values()] == problems


def test_only_findings_of_the_launcher_stop_a_training(monkeypatch):
    findings = Findings()
    findings.add("model", "lora_r", "r is 4, not 8", "")
    assert not findings.stop
    monkeypatch.setenv(STOP_AT, "first-loss,model")
    assert findings.stop
    monkeypatch.setenv(FORCED, "model:lora_r")
    assert not findings.stop
