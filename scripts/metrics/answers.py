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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, DecimalException
from statistics import fmean, pvariance
from typing import Annotated, Literal

from pydantic import Field

from .metric import FEWEST, NORMAL, Metric, Pair, Parameters, wilson

MARKERS = {
    "loftq": ("The final answer is: ",),
    "peft": ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### "),
    "pissa": ("The answer is: ",),
    "loraga": ("####",),
}
_NUMBER = re.compile(r"-?\d+\.?\d*")
_SIGNED = re.compile(r"[-+]?\d*[.,/]?\d+")


class NumberParameters(Parameters):
    """Method to find the number in an answer.

    Attributes:
        parser: method, see the module.
        markers: texts that precede the number, in order of search; by default the authors' markers.
    """

    parser: Literal["loftq", "peft", "pissa", "loraga"] = "loftq"
    markers: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None

    @property
    def sought(self) -> tuple[str, ...]:
        """Markers in order of search."""
        return self.markers or MARKERS[self.parser]


def _marker(text: str, markers: Sequence[str]) -> str | None:
    return next((marker for marker in markers if marker in text), None)


def _by_loftq(text: str, markers: Sequence[str]) -> float | None:
    text = text.replace(",", "")
    marker = _marker(text, markers)
    behind = _NUMBER.search(text.split(marker)[1]) if marker else None
    found = behind[0] if behind else next(reversed(_NUMBER.findall(text)), None)
    return float(found) if found else None


def _by_peft(text: str, markers: Sequence[str]) -> Decimal | str | None:
    marker = _marker(text, markers)
    if marker is None:
        return None
    line = text.rpartition(marker)[2].strip().partition("\n")[0].strip(" .!?$%")
    with suppress(DecimalException):  # not a number, or a division by zero
        above, *below = [Decimal(part.strip()) for part in line.split("/")]
        if len(below) < 2 and all(part.is_finite() for part in (above, *below)):
            return above / below[0] if below else above
    return line


def _by_pissa(text: str, markers: Sequence[str]) -> int | None:
    marker = _marker(text, markers)
    found = _SIGNED.search(text.rpartition(marker)[2]) if marker else None
    above, _, below = found[0].replace(",", "").partition("/") if found else ("", "", "")
    if not above.strip("+-"):
        return None
    with suppress(DecimalException):  # a million digits are too many to divide
        return round(Decimal(above) / (Decimal(below or 1) or 1))
    return None


def _by_loraga(text: str, markers: Sequence[str]) -> Decimal:
    found = re.search(rf"(?:{'|'.join(map(re.escape, markers))})\s*(\d+)", text)
    return Decimal(found[1]) if found else Decimal()


_PARSERS: dict[str, Callable[[str, Sequence[str]], float | Decimal | str | None]] = {
    "loftq": _by_loftq,
    "peft": _by_peft,
    "pissa": _by_pissa,
    "loraga": _by_loraga,
}


def number_of(text: str, parameters: NumberParameters) -> float | Decimal | str | None:
    """Number in an answer, or a text that is compared instead; None without either."""
    return _PARSERS[parameters.parser](text, parameters.sought)


def number_of_reference(text: str, parameters: NumberParameters) -> float | Decimal | str | None:
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
        wanted = number_of_reference(reference, parameters)
        is_right = wanted is not None and wanted == number_of(prediction, parameters)
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
        scores.append(100.0 * (first is not None and first[0] == reference))
    return scores


def _notes(pairs: Sequence[Pair], parameters: NumberParameters) -> Iterator[str]:
    """Notes on texts without a number; a marker may be missing."""
    remedy = "; other markers can be set with `markers`" if parameters.markers is None else ""
    references, predictions = ([pair[side] for pair in pairs] for side in (0, 1))
    sides = (("references", references, number_of_reference), ("predictions", predictions, number_of))
    for name, texts, read in sides:
        unread = [text for text in texts if read(text, parameters) is None]
        if unread:
            example = f"as in {unread[0].rstrip()[-30:]!r}; the markers are {' or '.join(map(repr, parameters.sought))}"
            yield f"{len(unread)} of {len(pairs)} {name} have no number, so their rows score 0 ({example}){remedy}"


class GroupParameters(Parameters):
    """Column and groups to average.

    Attributes:
        of: name of the column whose row scores are averaged.
        group: group of rows to average; by default all groups, with equal weight.
    """

    of: str
    group: str | None = None


def mean_of_groups(
    groups: Mapping[str, Sequence[float]], parameters: GroupParameters, averaged: Metric
) -> tuple[float, list[float] | None] | None:
    """Unweighted mean over group means; None without rows.

    It has a 95 % interval if each group has at least `FEWEST` rows, and scores that are not shares are not all equal.
    """
    chosen = [scores for name, scores in groups.items() if parameters.group in (None, name)]
    if not chosen:
        return None
    mean = fmean(map(fmean, chosen))
    if min(map(len, chosen)) < FEWEST:
        return mean, None
    if averaged.all_or_nothing and len(chosen) == 1:
        return mean, wilson(mean, len(chosen[0]))
    # two right and two wrong rows more, as in Agresti and Coull 1998: at 0 and 100 %, shares show no spread
    added = (0, 0, 100, 100) if averaged.all_or_nothing else ()
    variance = sum(pvariance([*scores, *added]) / (len(scores) + len(added)) for scores in chosen)
    half = NORMAL * variance**0.5 / len(chosen)
    return mean, [max(mean - half, averaged.low), min(mean + half, averaged.high or math.inf)] if half else None


METRICS = (
    Metric(
        name="number",
        label="right numbers",
        hub_type="accuracy",
        low=0,
        high=100,
        unit="%",
        source="the code of LoftQ, PEFT's method comparison, PiSSA or LoRA-GA",
        of_rows=number,
        all_or_nothing=True,
        parameters=NumberParameters,
        notes=_notes,
    ),
    Metric(
        name="choice",
        label="right choices",
        hub_type="accuracy",
        low=0,
        high=100,
        unit="%",
        source="this project",
        of_rows=choice,
        all_or_nothing=True,
        parameters=ChoiceParameters,
    ),
    Metric(
        name="mean_of_groups",
        label="mean of groups",
        hub_type="accuracy",
        low=0,
        high=100,
        unit="%",
        source="this project",
        of_groups=mean_of_groups,
        parameters=GroupParameters,
    ),
)
