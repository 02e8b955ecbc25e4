"""The number of an answer, as two published evaluations find it."""

import pytest

from qlora_recipes.metrics import registry, text


def right(reference: str, prediction: str, **parameters: object) -> bool:
    """Whether a prediction counts as right."""
    column = registry.column("number", parameters)
    assert column.metric.of_rows
    (score,) = column.metric.of_rows([(reference, prediction)], column.parameters)
    assert score in (0, 100)
    return score == 100


FOUND: list[tuple[str, str, float | None]] = [  # parser, prediction, the number in it
    ("loftq", "3 + 4 = 7. The final answer is:  7", 7),
    ("loftq", "The final answer is: 1,234 of 9", 1234),
    ("loftq", "The final answer is: -2.50", -2.5),
    ("loftq", "The final answer is: 5. The final answer is: 6", 5),
    ("loftq", "The final answer is: so The final answer is: 6 of 9", 9),  # nothing up to the second marker
    ("loftq", "first 3, then 12 apples.", 12),  # no marker: the last of all
    ("loftq", "it was 8. The final answer is: none", 8),  # none behind the marker
    ("loftq", "The final answer is 3, of 4", 4),  # not the marker
    ("loftq", "no number at all", None),
    ("loftq", "", None),
    ("peft", "So it is 4. The answer is: 7", 7),
    ("peft", "The answer is: 5\nThe answer is: 6.50!\nand 3", 6.5),  # the last of the marker, and its first line
    ("peft", "#### 9 The answer is 7", 7),  # the marker that stands first in the list
    ("peft", "The final answer is: $12.", 12),
    ("peft", "#### 50%", 50),
    ("peft", "The answer is: 3/4", 0.75),
    ("peft", "The answer is: 3/0", None),
    ("peft", "The answer is: 1/2/3", None),
    ("peft", "The answer is: 1,234", None),  # a comma stays, and this is then no decimal
    ("peft", "The answer is: seven", None),
    ("peft", "The answer is: NaN", None),
    ("peft", "it is 7", None),
]


@pytest.mark.parametrize(("parser", "prediction", "found"), FOUND)
def test_a_number_is_found_as_each_evaluation_finds_it(parser: str, prediction: str, found: float | None) -> None:
    assert text.number_of(prediction, text.NumberParameters.model_validate({"parser": parser})) == found
    reference = {"loftq": "The final answer is:  7", "peft": "so #### 7"}[parser]
    assert right(reference, prediction, parser=parser) == (found == 7)


def test_what_has_no_number_is_never_right_and_noted_with_an_example() -> None:
    assert not right("A: 7", "A: 7", parser="peft")
    assert right("#### 8", "A: 8", parser="peft", markers=["A: ", "#### "])
    plain, told = (registry.column("number", {"parser": "peft"} | more) for more in ({}, {"markers": ["A: ", "#### "]}))
    assert plain.metric.notes
    pairs = [("A: 7", "A: 7"), ("#### 8", "A: 8")]
    references, predictions = plain.metric.notes(pairs, plain.parameters)
    assert references.startswith("1 of 2 references ") and "'A: 7'" in references
    assert predictions.startswith("2 of 2 predictions ") and "`markers`" in predictions
    assert list(plain.metric.notes(pairs, told.parameters)) == []
