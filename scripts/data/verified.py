"""Records of `recipe verify`: what was shown of this project on one machine, by which figures, and what was not."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..base import paths
from ..base.errors import UserError

Verdict = Literal["passed", "failed", "unverified"]
FOLDER = paths.RECIPES / "verified"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Outcome(_Strict):
    """One line of a record: a statement about this project, and whether a measurement bears it out.

    Attributes:
        line: its name.
        what: what is compared with what.
        measured: the figure; None where nothing was measured, or not a number.
        expected: what it has to be near to; None where it only has to be small.
        unit: of both.
        bound: the largest share of the expected figure that the measured one may be away from it; the largest measured
            figure where nothing is expected.
        note: why it is unverified, or what else was seen.
        means: what a failure means for a user.
    """

    line: str
    what: str
    measured: float | None = None
    expected: float | None = None
    unit: str = ""
    bound: float
    verdict: Verdict
    note: str = ""
    means: str

    @property
    def difference(self) -> float | None:
        """See `difference`."""
        return difference(self.measured, self.expected)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """A verdict that its figures do not bear out was not made by this project."""
        if self.verdict != "unverified" and self.verdict != judge(self.measured, self.expected, self.bound):
            raise ValueError(f"{self.line}: its figures do not make it {self.verdict}")
        if self.verdict == "unverified" and not self.note:
            raise ValueError(f"{self.line}: it does not say why it is unverified")
        return self


def difference(measured: float | None, expected: float | None) -> float | None:
    """How far a figure is from the expected one, as a share of that; the figure itself where nothing is expected."""
    if measured is None or expected is None:
        return measured
    return abs(measured - expected) / abs(expected) if expected else abs(measured)


def judge(measured: float | None, expected: float | None, bound: float) -> Verdict:
    """The verdict on a figure; see `Outcome`. One that was not measured, or is not a number, fails."""
    off = difference(measured, expected)
    return "passed" if off is not None and off <= bound else "failed"


class Card(_Strict):
    """A GPU; memory in GiB, as its driver reports it."""

    name: str
    memory_gib: float
    compute_capability: str
    driver: str


class Hardware(_Strict):
    """A machine; its main memory in GiB."""

    gpus: list[Card]
    cpu: str
    cores: int
    memory_gib: float


class Record(_Strict):
    """What `recipe verify` found on a machine.

    Attributes:
        made: the day, in UTC.
        quick: whether it was made with --quick.
        seconds: how long its measurements took.
        packages: their versions, and Python's.
        revision: the project's commit, with a + where files had been changed; None outside of a checkout.
    """

    version: Literal[1] = 1
    made: str
    quick: bool
    seconds: float
    hardware: Hardware
    packages: dict[str, str | None]
    revision: str | None
    lines: list[Outcome]

    def count(self, verdict: Verdict) -> int:
        """How many lines have a verdict."""
        return sum(line.verdict == verdict for line in self.lines)

    def row(self) -> dict[str, Any]:
        """The record in a table of records."""
        gpus = self.hardware.gpus
        machine = f"{len(gpus)} x {gpus[0].name}" if len(gpus) > 1 else gpus[0].name if gpus else self.hardware.cpu
        counts = {verdict: self.count(verdict) for verdict in ("passed", "failed", "unverified")}
        about = {"machine": machine, "made": self.made, "axolotl": self.packages.get("axolotl"), "quick": self.quick}
        return about | counts


def read(file: Path) -> Record:
    """The record in a file.

    Raises:
        UserError: it holds none, or one whose verdicts are not those of its figures.
    """
    try:
        return Record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: not a record of `recipe verify`: {where}: {first['msg']}") from None


def table(folder: Path | None = None) -> list[dict[str, Any]]:
    """A row for each record in a folder, by default the shipped ones, with its file's name, oldest first.

    Raises:
        UserError: see `read`.
    """
    rows = [{"file": file.name} | read(file).row() for file in sorted((folder or FOLDER).glob("*.json"))]
    return sorted(rows, key=lambda row: row["made"])
