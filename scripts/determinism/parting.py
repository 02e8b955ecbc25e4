"""Where two trainings part, and what differed first: rows, loss, gradient or learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .trace import Step

What = Literal["rows", "order", "arrangement", "loss", "gradient norm", "learning rate"]
"""What differed first. The order that rows have in an epoch, or the arrangement of the same rows within a step: their
order and padding there; else in rows, the rows are others, or their epoch is not complete in both."""
_COMPUTED = {"loss": "loss", "gradient norm": "grad_norm", "learning rate": "learning_rate"}  # in this order


@dataclass(frozen=True)
class Training:
    """A training as its run recorded it.

    Attributes:
        steps: its trace.
        complete: whether it was trained to its end, so that its last epoch is whole.
        settings: what its steps may depend on, by name.
        adapter: the SHA-256 of the adapter's file; None where there is none yet.
        deterministic: whether it was made to repeat bit for bit.
    """

    steps: Sequence[Step]
    complete: bool
    settings: dict[str, Any]
    adapter: str | None
    deterministic: bool


@dataclass(frozen=True)
class Parting:
    """How far two trainings, a and b, are the same.

    Attributes:
        first, last: the steps that both have recorded, and that were compared.
        ends: the last step of each.
        step: the first that differs; None where all are equal, to the last bit of their numbers.
        what: what differed first in it.
        values: the two losses, norms or rates, where one of these differed first.
        loss_from: the first step whose losses differ.
        same_adapter: whether the files are equal; None where not both are there.
        differences: the settings in which they differ, with the values of a and b.
        deterministic: whether both were made to repeat bit for bit.
    """

    first: int
    last: int
    ends: tuple[int, int]
    step: int | None
    what: What | None
    values: tuple[float | None, float | None] | None
    loss_from: int | None
    same_adapter: bool | None
    differences: dict[str, tuple[Any, Any]]
    deterministic: bool

    def sentences(self) -> list[str]:
        """It in words."""
        said = [self._parted() if self.step else self._equal()]
        if self.step and self.loss_from and self.loss_from > self.step:
            said.append(f"The losses differ from step {self.loss_from} on.")
        elif self.step and not self.loss_from:
            said.append("No loss differs.")
        if self.differences:
            said.append("What differs between them, by their records:")
        elif self.step and self.what not in ("order", "rows"):
            said.append(
                "By their records, config, data, packages and machine are the same: "
                + ("what made them part is not recorded." if self.deterministic else "--deterministic may prevent it.")
            )
        return said

    def _equal(self) -> str:
        steps = f"the {self.last - self.first + 1} steps that both have recorded, {self.first} to {self.last}"
        adapters = {None: "", True: ", and the adapters are equal", False: ", but the adapters differ"}
        text = f"Bit-equal over {steps}{adapters[self.same_adapter]}."
        if self.ends[0] != self.ends[1]:
            text += f" a ends with step {self.ends[0]}, b with step {self.ends[1]}."
        return text

    def _parted(self) -> str:
        if self.values is None:
            how = {
                "order": "the rows are in another order; over the epoch they are the same",
                "arrangement": "the same rows are in another order within the step, or padded otherwise",
                "rows": "the rows differ",
            }[str(self.what)]
        else:
            a, b = self.values
            by = f" by {abs(a - b):.2g}" if a is not None and b is not None else ""
            same = {"loss": "rows", "gradient norm": "rows and loss", "learning rate": "rows, loss and gradient norm"}
            why = {
                "loss": "so the weights differ that it was computed with, or how it was computed",
                "gradient norm": "so the backward passes differ, or how the norm is summed",
                "learning rate": "so its update differs",
            }[str(self.what)]
            how = f"the {self.what} differs{by}, {a} in a and {b} in b; {same[str(self.what)]} are the same, {why}"
        return f"Step {self.step}: {how}."


def parting(a: Training, b: Training) -> Parting | None:
    """Where two trainings part; None if no step is recorded of both."""
    of_a, of_b = ({step.step: step for step in training.steps} for training in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        return None
    found = ((n, _first_difference(a, b, of_a[n], of_b[n])) for n in common)
    step, what = next((pair for pair in found if pair[1]), (None, None))
    field = _COMPUTED.get(str(what))
    values = (getattr(of_a[step], field), getattr(of_b[step], field)) if step and field else None
    keys = [key for key in a.settings | b.settings if a.settings.get(key) != b.settings.get(key)]
    return Parting(
        first=common[0],
        last=common[-1],
        ends=(max(of_a), max(of_b)),
        step=step,
        what=what,
        values=values,
        loss_from=next((n for n in common if of_a[n].loss != of_b[n].loss), None),
        same_adapter=a.adapter == b.adapter if a.adapter and b.adapter else None,
        differences={key: (a.settings.get(key), b.settings.get(key)) for key in keys},
        deterministic=a.deterministic and b.deterministic,
    )


def _first_difference(a: Training, b: Training, of_a: Step, of_b: Step) -> What | None:
    """What differs first in a step, in the order in which a step computes it; None if nothing does."""
    if of_a.rows != of_b.rows:
        epochs = [_epoch(training, step.epoch) for training, step in ((a, of_a), (b, of_b))]
        return "order" if epochs[0] is not None and epochs[0] == epochs[1] else "rows"
    if of_a.batch != of_b.batch:
        return "arrangement"
    names: list[What] = ["loss", "gradient norm", "learning rate"]
    return next((name for name in names if getattr(of_a, _COMPUTED[name]) != getattr(of_b, _COMPUTED[name])), None)


def _epoch(training: Training, number: int) -> int | None:
    """The sum of the hashes of an epoch's rows, the same in any order; None if it was not traced as a whole."""
    first, last = training.steps[0], training.steps[-1]
    if (first.step > 1 and first.epoch == number) or (last.epoch == number and not training.complete):
        return None
    return sum(int(step.rows, 16) for step in training.steps if step.epoch == number) % 256**6
