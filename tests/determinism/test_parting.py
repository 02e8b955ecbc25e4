from collections.abc import Sequence
from typing import Any

import pytest

from qlora_recipes.determinism.parting import Parting, Training, parting
from qlora_recipes.determinism.trace import Step

ROWS = ["0000000000a1", "0000000000b2", "0000000000c3", "0000000000d4"]


def a_step(number: int, **changed: Any) -> Step:
    """A step of a made-up training: two epochs of the same four batches."""
    rows = ROWS[(number - 1) % 4]
    made = {"step": number, "epoch": (number - 1) // 4, "batch": rows[::-1], "rows": rows}
    return Step(**made | {"loss": 2.0 / number, "grad_norm": 0.5, "learning_rate": 1e-4} | changed)


def a_training(changed: dict[int, dict[str, Any]] | None = None, steps: Sequence[int] = range(1, 9), **more: Any):
    """A made-up training in which some steps differ, and all the losses after them."""
    changed = changed or {}
    made = [a_step(n, **changed.get(n, {"loss": 3.0 / n} if changed and n > min(changed) else {})) for n in steps]
    return Training(**{"complete": True, "settings": {}, "adapter": "x", "deterministic": False} | more, steps=made)


def found(a: Training, b: Training) -> Parting:
    made = parting(a, b)
    assert made
    return made


def test_equal_trainings() -> None:
    made = found(a_training(), a_training())
    assert (made.step, made.what, made.first, made.last, made.same_adapter) == (None, None, 1, 8, True)
    (said,) = made.sentences()
    assert said == "Bit-equal over the 8 steps that both have recorded, 1 to 8, and the adapters are equal."


def test_another_adapter_after_equal_steps_is_said() -> None:
    made = found(a_training(), a_training(adapter="y"))
    assert made.step is None and made.same_adapter is False
    assert "but the adapters differ" in made.sentences()[0]


@pytest.mark.parametrize(
    ("changed", "what", "values"),
    [
        ({"loss": 0.5 + 3e-6}, "loss", (0.5, 0.5 + 3e-6)),
        ({"loss": 0.5 + 3e-6, "grad_norm": 0.7, "learning_rate": 3e-4}, "loss", (0.5, 0.5 + 3e-6)),
        ({"grad_norm": 0.7, "learning_rate": 3e-4}, "gradient norm", (0.5, 0.7)),
        ({"learning_rate": 3e-4}, "learning rate", (1e-4, 3e-4)),
        ({"loss": None}, "loss", (0.5, None)),
        ({"batch": "f" * 12, "loss": 0.1}, "arrangement", None),
        ({"rows": "f" * 12, "batch": "f" * 12, "loss": 0.1}, "rows", None),
    ],
)
def test_what_differs_first_in_a_step(changed: dict[str, Any], what: str, values: Any) -> None:
    made = found(a_training(), a_training({4: changed}))
    assert (made.step, made.what, made.values) == (4, what, values)
    assert made.sentences()[0].startswith("Step 4: ")


def test_the_size_of_a_difference_is_said() -> None:
    (first, *_) = found(a_training(), a_training({4: {"loss": 0.5 + 3e-6}})).sentences()
    assert "the loss differs by 3e-06, 0.5 in a and 0.500003 in b; rows are the same" in first


def test_another_learning_rate_shows_in_later_losses() -> None:
    made = found(a_training(), a_training({4: {"learning_rate": 3e-4}}, settings={"learning_rate": 3e-4}))
    assert (made.step, made.loss_from) == (4, 5)
    assert made.differences == {"learning_rate": (None, 3e-4)}
    assert made.sentences()[1] == "The losses differ from step 5 on."


@pytest.mark.parametrize(
    ("steps", "complete", "what"),
    [
        (range(1, 9), True, "order"),
        (range(1, 6), False, "order"),  # in the second epoch, the first is complete
        (range(1, 4), False, "rows"),  # whether the missing ones are the same is not known
        (range(2, 9), True, "rows"),
    ],
)
def test_the_same_rows_in_another_order(steps: range, complete: bool, what: str) -> None:
    swapped = {2: {"rows": ROWS[2], "batch": ROWS[2]}, 3: {"rows": ROWS[1], "batch": ROWS[1]}}
    made = found(a_training(), a_training(swapped, steps, complete=complete))
    assert (made.step, made.what) == (2, what)


def test_a_shorter_training_and_one_that_was_resumed_before_there_were_traces() -> None:
    made = found(a_training(steps=range(1, 6), adapter=None), a_training(steps=range(3, 9)))
    assert (made.first, made.last, made.ends, made.same_adapter) == (3, 5, (5, 8), None)
    assert made.sentences() == [
        "Bit-equal over the 3 steps that both have recorded, 3 to 5. a ends with step 5, b with step 8."
    ]
    assert parting(a_training(steps=range(1, 3)), a_training(steps=range(3, 9))) is None
    assert parting(a_training(), a_training(steps=())) is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_where_nothing_recorded_differs_that_is_said(deterministic: bool) -> None:
    changed = {4: {"grad_norm": 0.6}}
    made = found(a_training(deterministic=deterministic), a_training(changed, deterministic=deterministic))
    assert ("--deterministic may prevent it" in made.sentences()[-1]) is not deterministic
    assert "are the same" in made.sentences()[-1]
