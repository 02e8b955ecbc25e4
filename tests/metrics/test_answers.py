"""The number that an answer ends in, and the word that it chooses."""

import pytest

from qlora_recipes.metrics import answers, registry
from qlora_recipes.metrics.metric import RowMetric


def right(reference: str, prediction: str, **parameters: object) -> bool:
    """True if a prediction counts as right."""
    column = registry.column("number", parameters)
    assert isinstance(column.metric, RowMetric)
    (score,) = column.metric.score_rows([(reference, prediction)], column.parameters)
    assert score in (0, 100)
    return score == 100


FOUND: list[tuple[str, str, float | str | None]] = [  # parser, prediction, the number in it
    ("loftq", "3 + 4 = 7. The final answer is:  7", 7),
    ("loftq", "The final answer is: 1,234 of 9", 1234),
    ("loftq", "The final answer is: 5. The final answer is: 6", 5),
    ("loftq", "The final answer is: so The final answer is: 6 of 9", 9),  # nothing up to the second marker
    ("loftq", "first 3, then 12 apples.", 12),  # no marker: the last of all
    ("loftq", "it was 8. The final answer is: none", 8),  # none behind the marker
    ("loftq", "no number at all", None),
    ("peft", "So it is 4. The answer is: 7", 7),
    ("peft", "The answer is: 5\nThe answer is: 6.50!\nand 3", 6.5),  # the last of the marker, and its first line
    ("peft", "#### 9 The answer is 7", 7),  # the marker that stands first in the list
    ("peft", "The final answer is: $12.", 12),
    ("peft", "The answer is: 3/4", 0.75),
    ("peft", "The answer is: 3/0", "3/0"),
    ("peft", "The answer is: 1,234", "1,234"),  # a comma stays; compared as text
    ("peft", "The answer is: NaN", "NaN"),
    ("peft", "it is 7", None),
    *(
        ("pissa", prediction, number)
        for prediction, number in {
            "The answer is: 7": 7,
            "The answer is: 7.": 7,
            "2 apples are left. The answer is: 7 of 9": 7,
            "The answer is: 5\nThe answer is: 6": 6,  # the last marker
            "The answer is: 5 The answer is: none": None,
            "The answer is: 1,234": 1234,
            "The answer is: $1,234,567": 1234,  # one separator only
            "The answer is: 1234567": 1234567,
            "The answer is: 3/4": 1,  # rounded
            "The answer is: 1/2": 0,  # half to even
            "The answer is: -3/2": -2,
            "The answer is: 3/0": 3,
            "The answer is: /4": None,
            "The answer is: 6.5": 6,
            "The answer is: 7.5%": 8,
            "The answer is: .9": 1,
            "The answer is: -12": -12,
            "The answer is: +12": 12,
            "The answer is 7": None,  # not the marker
            "#### 7": None,
            "The answer is: seven": None,
            "": None,
        }.items()
    ),
    *(
        ("loraga", prediction, number)
        for prediction, number in {
            "#### 7": 7,
            "7 apples\n#### 7 apples": 7,
            "####7": 7,
            "####\n7": 7,
            "#### 5\n#### 6": 5,  # the first
            "#### none\n#### 6": 6,
            "#### 1,234": 1,
            "#### 1,234,567": 1,
            "#### 1234": 1234,
            "#### 6.5": 6,
            "#### 3/4": 3,
            "#### -12": 0,
            "#### $12": 0,
            "The answer is: 7": 0,
            "7": 0,
            "": 0,
        }.items()
    ),
]


@pytest.mark.parametrize(("parser", "prediction", "number"), FOUND)
def test_a_number_is_found_as_each_evaluation_finds_it(parser, prediction, number):
    assert answers.number_of(prediction, answers.NumberParameters.model_validate({"parser": parser})) == number
    reference = "so #### 7" if parser in ("peft", "loraga") else "The final answer is:  7. The answer is: 7"
    assert right(reference, prediction, parser=parser) == (number == 7)


@pytest.mark.parametrize("digits", [4_301, 1_000_100])
@pytest.mark.parametrize("text", ["{} The answer is: {}/{} #### {}", "The answer is: 1/{}", "The answer is: {}.5"])
@pytest.mark.parametrize("parser", ["loftq", "peft", "pissa", "loraga"])
def test_a_number_of_any_length_can_be_compared(parser, text, digits):
    prediction = text.replace("{}", "9" * digits)
    reference = "The final answer is: 7. The answer is: 7 #### 7"
    assert not right(reference, prediction, parser=parser)


def test_what_has_no_number_is_never_right_and_noted_with_an_example():
    assert not right("A: 7", "A: 7", parser="peft")
    assert right("#### 8", "A: 8", parser="peft", markers=["A: ", "#### "])
    plain, told = (registry.column("number", {"parser": "peft"} | more) for more in ({}, {"markers": ["A: ", "#### "]}))
    assert isinstance(plain.metric, RowMetric)
    pairs = [("A: 7", "A: 7"), ("#### 8", "A: 8")]
    markers = " or ".join(map(repr, answers.PARSERS["peft"].markers))
    reason = f"have no number, so their rows score 0 (as in 'A: 7'; the markers are {markers})"
    assert plain.metric.notes(pairs, plain.parameters) == [
        f"1 of 2 references {reason}; other markers can be set with `markers`",
        f"2 of 2 predictions {reason}; other markers can be set with `markers`",
    ]
    assert plain.metric.notes(pairs, told.parameters) == []


CHOICES = {
    "words": [["true", "false"], ["solution1", "solution2"], [f"answer{i}" for i in range(1, 6)]],
    "behind": "### Response:",
}


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ("true", "the correct answer is true", True),
        ("true", "true", True),
        ("true", "untrue", True),  # a part of a word, too
        ("true", "True", False),
        ("true", "false, not true", False),  # the first one
        ("false", "answer1 solution1 false", True),  # words of other sets do not count
        ("false", "not true but false", False),
        ("false", "", False),
        ("false", "no", False),
        ("solution1", "solution1 solution2", True),
        ("solution1", "solution 1", False),
        ("solution2", "solution12", False),  # solution1 stands there
        ("answer5", "the correct answer is answer5", True),
        ("answer5", "the correct answer is answer6", False),
        ("answer1", "answer12", True),
        ("answer2", "answer1 ### Response: answer2", True),
        ("answer2", "answer2 ### Response: answer1", False),
        ("answer2", "answer1 ### Response: answer3 ### Response: answer2", True),
        ("answer2", "answer2 ### Response:", False),
        ("ending3", "ending1 or ending3", True),  # of no set: the reference alone
        ("ending3", "ending1", False),
    ],
)
def test_the_first_word_of_the_references_set_is_the_choice(reference, prediction, expected):
    column = registry.column("choice", CHOICES)
    assert isinstance(column.metric, RowMetric)
    assert column.metric.score_rows([(reference, prediction)], column.parameters) == [100.0 * expected]
    assert registry.column("choice", column.entry).same_scores(column)  # as scores.json has it


@pytest.mark.parametrize("parser", answers.PARSERS)
def test_a_reference_is_read_from_its_last_marker(parser):
    reference = "Job A: 2000 hours are billed, and 6400 more.\nA: 8400"
    markers = {"parser": parser, "markers": ["A: "]}
    assert right(reference, "A: 8400", **markers)
    assert not right(reference, "A: 2000", **markers)
