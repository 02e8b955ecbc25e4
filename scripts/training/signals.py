"""Findings of a training about itself: warnings of Axolotl and transformers, losses and gradients."""

import logging
import math
import os
import re
from collections.abc import Iterator
from statistics import fmean, variance
from typing import Any

from datasets import Dataset

from ..config.finding import FIRST_LOSS, LEAKED, SIGNALS, Finding
from . import losses
from .run_record import FORCED, STOP_AT, TrainingFinding

_DROP_LEAKED = "drop them from the evaluation data; for val_set_size, set dataset_exact_deduplication: true"


class Findings(dict[str, TrainingFinding]):
    """Findings of a training so far, by name; the first of a name stays."""

    def add(self, rule: str, key: str, problem: str, remedy: str) -> None:
        """Add a finding."""
        finding: TrainingFinding = {"rule": rule, "key": key, "problem": problem, "remedy": remedy}
        self.setdefault(Finding("warning", **finding).name, finding)

    @property
    def stop(self) -> bool:
        """True if a finding stops the training, see `STOP_AT`."""
        rules, forced = (os.environ.get(name, "").split(",") for name in (STOP_AT, FORCED))
        return any(finding["rule"] in rules and name not in forced for name, finding in self.items())


def compare_sets(findings: Findings, trained: Any, evaluated: Any) -> None:
    """Find evaluation rows with the tokens of a training row, after Axolotl has loaded, divided and cut them all."""
    rows = [*_row_tokens(evaluated)]
    shared = set(rows).intersection(_row_tokens(trained)) if rows else set()
    if shared:
        problem = f"{sum(row in shared for row in rows)} evaluation rows are trained on: the eval loss means little"
        findings.add(LEAKED, "datasets", problem, _DROP_LEAKED)


def _row_tokens(rows: Any) -> Iterator[int]:
    """Hash of the tokens of each row of a data set; none for preference pairs, and for rows that are streamed."""
    if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
        for batch in rows.select_columns("input_ids").with_format("numpy").iter(1000):
            for ids in batch["input_ids"]:
                yield hash(ids.astype("int64").tobytes())


class Warnings(logging.Handler):
    """Log handler that turns warnings into findings; only their texts tell them apart."""

    def __init__(self, findings: Findings):
        super().__init__(logging.WARNING)
        self.findings = findings
        for logger in _WARNINGS:
            logging.getLogger(logger).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Add a finding for a warning of the table."""
        pattern, rule, key, remedy = _WARNINGS[record.name]
        text = record.getMessage()
        if re.match(pattern, text, re.DOTALL):
            self.findings.add(rule, key, text, remedy)


_WARNINGS = {  # logger: beginning of the message; rule, key and remedy of the finding
    "axolotl.prompt_strategies.chat_template": (
        "EO[ST] token",
        SIGNALS,
        "eot_tokens",
        "set it to the tokens that end a turn in the chat template",
    ),
    "axolotl.utils.trainer": (
        "Dropped .* no trainable tokens",
        "dropped-rows",
        "datasets",
        "`recipe check --all-rows` shows the rows; raise sequence_len, or correct roles and masks",
    ),
    "transformers.modeling_utils": (
        ".*LOAD REPORT.*(MISSING|MISMATCH)",
        SIGNALS,
        "base_model",
        "name a model with all weights: the missing ones are random",
    ),
}


class Signals:
    """Judges losses and gradients as the trainer logs them.

    Args:
        findings: the findings, to which it adds.
        vocabulary: vocabulary size, if the loss is that of next-token prediction.
    """

    def __init__(self, findings: Findings, vocabulary: int | None):
        self.findings = findings
        self.vocabulary = vocabulary
        self.losses: list[float] = []
        self.eval_losses: list[float] = []

    def step(self, loss: float, grad_norm: float | None, tokens: int, empty: int) -> None:
        """Judge a logged step.

        Args:
            loss: mean loss since the last logged step.
            grad_norm: norm of the last gradient; None if unknown.
            tokens: number of tokens with a label.
            empty: number of batches without a label.
        """
        self.losses.append(loss)
        if len(self.losses) == 1:
            self._first_loss(loss, tokens)
        if empty and self.vocabulary:
            problem = f"{empty} batches without a token to learn: the loss is undefined, also in the log from here on"
            self._add("labels", problem, "`recipe check --all-rows` shows such rows; delete them")
        elif grad_norm == 0:
            self._add("grad_norm", "0: nothing is trained", "check labels, frozen parameters and the loss")
        elif not (math.isfinite(loss) or f"{SIGNALS}:labels" in self.findings):
            remedy = "`recipe cancel` the run; lower learning_rate, or train in bf16 or fp32 instead of fp16"
            self._add("loss", "NaN or infinite, also in the log from here on", remedy)

    def _first_loss(self, loss: float, tokens: int) -> None:
        if loss == 0:
            self._add("loss", "0 in the first step: no token is learnt", "look at them: `recipe check --show-tokens 1`")
        if not (self.vocabulary and tokens):
            return
        guessing = math.log(self.vocabulary)
        if loss > losses.highest_first_loss(guessing, tokens):
            problem = f"the first training loss is {loss:.4g} over {tokens:,} tokens, but guessing gives {guessing:.4g}"
            remedy = "the base model is damaged, or its precision, quantization or tokenizer is wrong: correct it"
            self.findings.add(FIRST_LOSS, "", problem, remedy)

    def evaluation(self, loss: float) -> None:
        """Judge an eval loss."""
        self.eval_losses.append(loss)
        if not math.isfinite(loss):
            problem = "NaN or infinite: no evaluation row has a token to learn, or the model is damaged"
            self._add("eval_loss", problem, "correct roles and masks of the evaluation rows, or base_model")

    def end(self) -> None:
        """Judge the losses of a complete training: the last quarter's mean must not be higher than the first's.

        It is higher if it exceeds the first quarter's by three standard errors of their difference. Eval losses must
        differ, if only in their last digits.
        """
        quarter = len(self.losses) // 4
        if quarter < 2 or not all(map(math.isfinite, self.losses)):
            return
        if len(self.eval_losses) > 1 and len(set(self.eval_losses)) == 1:
            problem = f"{self.eval_losses[0]} before and after training: the steps change nothing"
            self._add("eval_loss", problem, "raise learning_rate and max_grad_norm")
        first, last = self.losses[:quarter], self.losses[-quarter:]
        rise, error = fmean(last) - fmean(first), math.sqrt((variance(first) + variance(last)) / quarter)
        if rise > 3 * error:
            problem = f"{rise:.4g} higher in the last quarter of the steps than in the first"
            self._add("loss", problem, "lower learning_rate, or add warm-up")

    def _add(self, key: str, problem: str, remedy: str) -> None:
        self.findings.add(SIGNALS, key, problem, remedy)
