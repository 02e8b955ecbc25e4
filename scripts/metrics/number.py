"""Whether the number that an answer ends in is right, as two published evaluations find and compare it.

The two ways, ported from descriptions of the authors' code:

- `loftq`: test_gsm8k.py of yxli2123/LoftQ@ae33fd4 (arXiv 2310.08659). Commas are removed. The number is the first
  behind the first marker, up to a second one; where there is no marker, or no number there, the last of the whole
  text. Numbers are compared as floats.
- `peft`: utils.py of method_comparison/MetaMathQA in huggingface/peft@5d602fd. The number is what stands behind the
  last occurrence of the first marker that is found, up to the end of the line, without spaces and any of .!?$% around
  it. It is compared as a decimal, or as a fraction of two; a text without a marker has no number.
"""

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, DecimalException
from typing import Annotated, Literal

from pydantic import Field

from .metric import Metric, Pair, Parameters

MARKERS = {
    "loftq": ("The final answer is: ",),
    "peft": ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### "),
}
_NUMBER = re.compile(r"-?\d+\.?\d*")


class NumberParameters(Parameters):
    """How the number is found.

    Attributes:
        parser: by whose code, see above.
        markers: the words that the number stands behind, in the order in which they are looked for; by default that
            code's.
    """

    parser: Literal["loftq", "peft"] = "loftq"
    markers: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None

    @property
    def sought(self) -> tuple[str, ...]:
        """The markers that are looked for."""
        return self.markers or MARKERS[self.parser]


def _marker(text: str, markers: Sequence[str]) -> str | None:
    return next((marker for marker in markers if marker in text), None)


def _by_loftq(text: str, markers: Sequence[str]) -> float | None:
    text = text.replace(",", "")
    marker = _marker(text, markers)
    behind = _NUMBER.search(text.split(marker)[1]) if marker else None
    found = behind[0] if behind else next(reversed(_NUMBER.findall(text)), None)
    return float(found) if found else None


def _by_peft(text: str, markers: Sequence[str]) -> Decimal | None:
    marker = _marker(text, markers)
    if marker is None:
        return None
    line = text.rpartition(marker)[2].strip().partition("\n")[0].strip(" .!?$%")
    try:
        above, *below = [Decimal(part.strip()) for part in line.split("/")]
        if len(below) > 1 or not all(part.is_finite() for part in (above, *below)):
            return None
        return above / below[0] if below else above
    except DecimalException:  # no number, or a division by zero
        return None


def number_of(text: str, parameters: NumberParameters) -> float | Decimal | None:
    """The number of an answer; None where there is none."""
    find = {"loftq": _by_loftq, "peft": _by_peft}[parameters.parser]
    return find(text, parameters.sought)


def number(pairs: Sequence[Pair], parameters: NumberParameters) -> list[float]:
    """100 for each prediction whose number is that of its reference, otherwise 0."""
    numbers = ([number_of(text, parameters) for text in pair] for pair in pairs)
    return [100.0 * (wanted is not None and wanted == given) for wanted, given in numbers]


def _notes(pairs: Sequence[Pair], parameters: NumberParameters) -> Iterator[str]:
    """Where a number is not found: that can be for want of the right marker."""
    remedy = "; `markers` names others" if parameters.markers is None else ""
    for side, name in enumerate(("references", "predictions")):
        unread = [pair[side] for pair in pairs if number_of(pair[side], parameters) is None]
        if unread:
            marked = sum(_marker(text, parameters.sought) is not None for text in unread)
            why = f"{marked} have one of {', '.join(map(repr, parameters.sought))}; as in {unread[0].rstrip()[-30:]!r}"
            yield f"{len(unread)} of {len(pairs)} {name} have no number ({why}), and no such row is right{remedy}"


METRIC = Metric(
    name="number",
    label="right numbers",
    hub_type="accuracy",
    low=0,
    high=100,
    unit="%",
    source="LoftQ's test_gsm8k.py, or PEFT's method comparison",
    of_rows=number,
    all_or_nothing=True,
    parameters=NumberParameters,
    notes=_notes,
)
