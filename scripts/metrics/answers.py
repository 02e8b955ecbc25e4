"""Metrics of a final answer: a number, or a choice among words.

Numbers are found and compared by one of four methods, reimplemented from descriptions of the authors' code:

- `loftq`: test_gsm8k.py of yxli2123/LoftQ@ae33fd4 (arXiv 2310.08659). Commas are removed. The number is the first one
  after the first marker, before any second marker. Without a marker, or without such a number, it is the last number in
  the text. Numbers are compared as floats.
- `peft`: utils.py of method_comparison/MetaMathQA in huggingface/peft@5d602fd. The markers are tried in order, and
  the first one found in the text counts. The number is the rest of the line after the marker's last occurrence, without
  surrounding spaces and .!?$%. It is a decimal number or a fraction of two decimal numbers; anything else, such as
  1,234, is compared as text. A text without a marker has no number.
- `pissa`: utils/test_acc.py of GraphPKU/PiSSA@87f4db6 (arXiv 2404.02948). The number is the first one after the last
  marker. It consists of digits with at most one of .,/ among them: 1,234,567 gives 1234. Numbers and fractions are
  rounded; 3/0 gives 3. A text without a marker has no number.
- `loraga`: reproduce/eval_gsm8k.py of Outsider565/LoRA-GA@89af7de (arXiv 2407.05000). The first marker followed by
  digits counts; only white space may stand between. The number consists of these digits: decimals and digits after a
  comma are lost. If no marker is followed by digits, as in "#### -12", the number is 0.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from statistics import fmean, pvariance
from typing import Annotated

from pydantic import Field, field_validator

from ..base.registry import Registry
from .metric import (
    FEWEST,
    METRICS,
    NORMAL,
    Bounds,
    Column,
    Metric,
    Pair,
    Parameters,
    RowMetric,
    ScoreRecord,
    ScoringInput,
)

Number = float | Decimal | str | None  # a text is compared as it is


@dataclass(frozen=True)
class Parser:
    """Method to find the number in an answer.

    Attributes:
        find: finds the number in a text, with markers in order of search.
        markers: the authors' markers.
    """

    find: Callable[[str, Sequence[str]], Number]
    markers: tuple[str, ...]


PARSERS = Registry[Parser]("parser")


def parser[F: Callable[[str, Sequence[str]], Number]](name: str, *markers: str) -> Callable[[F], F]:
    """Decorator that adds a function to the parsers."""

    def add(find: F) -> F:
        PARSERS.add(name, Parser(find, markers))
        return find

    return add


_NUMBER = re.compile(r"-?\d+\.?\d*")
_SIGNED = re.compile(r"[-+]?\d*[.,/]?\d+")


class NumberParameters(Parameters):
    """Method to find the number in an answer.

    Attributes:
        parser: method, see the module.
        markers: texts that precede the number, in order of search; by default the authors' markers.
    """

    parser: str = "loftq"
    markers: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None

    @field_validator("parser")
    @classmethod
    def _require_parser(cls, name: str) -> str:
        if name not in PARSERS:
            raise ValueError(PARSERS.unknown(name))
        return name

    @property
    def sought(self) -> tuple[str, ...]:
        """Markers in order of search."""
        return self.markers or PARSERS[self.parser].markers


def _marker(text: str, markers: Sequence[str]) -> str | None:
    return next((marker for marker in markers if marker in text), None)


@parser("loftq", "The final answer is: ")
def _by_loftq(text: str, markers: Sequence[str]) -> float | None:
    text = text.replace(",", "")
    marker = _marker(text, markers)
    if marker:
        behind = _NUMBER.search(text.split(marker)[1])
        if behind:
            return float(behind[0])
    numbers = _NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


@parser("peft", "The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
def _by_peft(text: str, markers: Sequence[str]) -> Decimal | str | None:
    marker = _marker(text, markers)
    if marker is None:
        return None
    line = text.rpartition(marker)[2].strip().partition("\n")[0].strip(" .!?$%")
    with suppress(DecimalException):  # not a number, or a division by zero
        parts = [Decimal(part.strip()) for part in line.split("/")]
        if len(parts) > 2 or not all(part.is_finite() for part in parts):
            return line
        if len(parts) == 2:
            return parts[0] / parts[1]
        return parts[0]
    return line


@parser("pissa", "The answer is: ")
def _by_pissa(text: str, markers: Sequence[str]) -> int | None:
    marker = _marker(text, markers)
    number = _SIGNED.search(text.rpartition(marker)[2]) if marker else None
    if number is None:
        return None
    above, _, below = number[0].replace(",", "").partition("/")
    if not above.strip("+-"):
        return None
    with suppress(DecimalException):  # a million digits are too many to divide
        divisor = Decimal(below or 1)
        return round(Decimal(above) / (divisor or 1))
    return None


@parser("loraga", "####")
def _by_loraga(text: str, markers: Sequence[str]) -> Decimal:
    number = re.search(rf"(?:{'|'.join(map(re.escape, markers))})\s*(\d+)", text)
    return Decimal(number[1]) if number else Decimal()


def number_of(text: str, parameters: NumberParameters) -> Number:
    """Number in an answer, or a text that is compared instead; None without either."""
    return PARSERS[parameters.parser].find(text, parameters.sought)


def number_of_reference(text: str, parameters: NumberParameters) -> Number:
    """Number behind the last marker of a reference.

    A reference ends with its answer, so an earlier marker is part of its explanation. This holds for all parsers; the
    authors' rules for the first marker are for predictions.
    """
    last = max(text.rfind(marker) for marker in parameters.sought)
    return number_of(text[max(last, 0) :], parameters)


def number(pairs: Sequence[Pair], parameters: NumberParameters) -> list[float]:
    """Score 100 for each prediction with the reference's number, otherwise 0."""
    scores = []
    for reference, prediction in pairs:
        expected = number_of_reference(reference, parameters)
        is_right = expected is not None and expected == number_of(prediction, parameters)
        scores.append(100.0 if is_right else 0.0)
    return scores


class ChoiceParameters(Parameters):
    """Words to choose from.

    Attributes:
        words: sets of words. A row uses the set that contains its reference, or else the reference alone. A word is
            also found within a longer word, as in the code of DoRA's authors.
        behind: text before the choice; the search starts after its last occurrence.
    """

    words: Annotated[tuple[Annotated[tuple[str, ...], Field(strict=False)], ...], Field(strict=False)] = ()
    behind: Annotated[str, Field(min_length=1)] | None = None


def choice(pairs: Sequence[Pair], parameters: ChoiceParameters) -> list[float]:
    """Score 100 for each prediction whose first choice is the reference, otherwise 0."""
    scores = []
    for reference, prediction in pairs:
        words_of_row = next((words for words in parameters.words if reference in words), (reference,))
        text = prediction.rpartition(parameters.behind)[2] if parameters.behind else prediction
        first = re.search("|".join(map(re.escape, words_of_row)), text)
        is_right = first is not None and first[0] == reference
        scores.append(100.0 if is_right else 0.0)
    return scores


def notes_on_numbers(pairs: Sequence[Pair], parameters: NumberParameters) -> list[str]:
    """Notes on texts without a number; a marker may be missing."""
    markers = " or ".join(map(repr, parameters.sought))
    notes = []
    for position, side, find in ((0, "references", number_of_reference), (1, "predictions", number_of)):
        texts = [pair[position] for pair in pairs if find(pair[position], parameters) is None]
        if texts:
            example = f"as in {texts[0].rstrip()[-30:]!r}; the markers are {markers}"
            reason = f"{len(texts)} of {len(pairs)} {side} have no number, so their rows score 0 ({example})"
            notes.append(f"{reason}; other markers can be set with `markers`")
    return notes


class GroupParameters(Parameters):
    """Column and groups to average.

    Attributes:
        of: name of the column whose row scores are averaged.
        group: group of rows to average; by default all groups, with equal weight.
    """

    of: str
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class GroupMetric(Metric):
    """Unweighted mean over groups of another column's mean row scores."""

    def measure(self, column: Column, data: ScoringInput) -> ScoreRecord:
        parameters = column.parameters
        assert isinstance(parameters, GroupParameters)
        averaged = data.columns[parameters.of].metric
        assert isinstance(averaged, RowMetric)
        groups: dict[str, list[float]] = {}
        for row in data.rows:
            groups.setdefault(str(row.get("group")), []).append(row[parameters.of])
        required = {*data.groups} if parameters.group is None else {parameters.group}
        missing = sorted(required - groups.keys())
        if missing:
            note = f"no mean, because no row of {', '.join(missing)} was scored"
            return ScoreRecord(value=None, declaration=column.entry, notes=[note])
        scores = [scores for name, scores in groups.items() if parameters.group in (None, name)]
        value, interval = mean_of_groups(scores, averaged)
        return ScoreRecord(value=value, interval=interval, declaration=column.entry)


def mean_of_groups(groups: Sequence[Sequence[float]], averaged: RowMetric) -> tuple[float, Bounds | None]:
    """Unweighted mean over group means, and its 95 % interval.

    The interval is None if a group has fewer than `FEWEST` rows, or if scores that are not shares are all equal.

    Args:
        groups: row scores of each group, at least one.
        averaged: metric of the row scores.
    """
    mean = fmean(map(fmean, groups))
    if min(map(len, groups)) < FEWEST:
        return mean, None
    if len(groups) == 1:
        return mean, averaged.interval(groups[0])
    # shares of 0 and 100 % show no spread, so two right and two wrong rows are added (Agresti and Coull 1998)
    added = (0, 0, 100, 100) if averaged.all_or_nothing else ()
    variance = sum(pvariance([*scores, *added]) / (len(scores) + len(added)) for scores in groups)
    half = NORMAL * variance**0.5 / len(groups)
    if half == 0:
        return mean, None
    high = math.inf if averaged.high is None else averaged.high
    return mean, (max(mean - half, averaged.low), min(mean + half, high))


METRICS.include(
    RowMetric(
        name="number",
        label="right numbers",
        hub_type="accuracy",
        unit="%",
        source="the code of LoftQ, PEFT's method comparison, PiSSA or LoRA-GA",
        score_rows=number,
        all_or_nothing=True,
        parameters=NumberParameters,
        notes=notes_on_numbers,
    )
)
METRICS.include(
    RowMetric(
        name="choice",
        label="right choices",
        hub_type="accuracy",
        unit="%",
        source="this project",
        score_rows=choice,
        all_or_nothing=True,
        parameters=ChoiceParameters,
    )
)
METRICS.include(
    GroupMetric(
        name="mean_of_groups",
        label="mean of groups",
        hub_type="accuracy",
        unit="%",
        source="this project",
        parameters=GroupParameters,
    )
)
