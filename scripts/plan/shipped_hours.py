"""Hours of the shipped recipes on one GPU, and their logs, written by tools/plans.py and read without planning."""

from typing import NamedTuple

from ..base import paths
from ..base.files import Row, read_json

FILE = paths.RECIPES / "hours.json"
PUBLISHED, PLANNED, AT_MOST = "published", "planned", "planned, at most"


class Hours(NamedTuple):
    """Hours of a training, and where they are from.

    Attributes:
        source: PUBLISHED, on the authors' GPU; PLANNED, for the GPU of `ShippedHours`; AT_MOST, planned with rows of
            full length.
    """

    hours: float
    source: str

    def __str__(self) -> str:
        digits = 1 if self.hours >= 1 else 2
        return f"{self.hours:.{digits}f}, {self.source}"


class ShippedHours(NamedTuple):
    """Content of the file.

    Attributes:
        gpu: GPU of the planned hours.
        cheapest: recipe with the fewest hours among those whose runs get a verdict.
        recipes: hours by recipe.
        logs: words for the figures that a plan and the published log have alike, by recipe.
    """

    gpu: str
    cheapest: str
    recipes: dict[str, Hours]
    logs: dict[str, str]

    @property
    def note(self) -> str:
        """The cheapest recipe in words."""
        hours = self.recipes[self.cheapest]
        return f"cheapest run with a verdict: {self.cheapest} ({hours}); planned hours are for one {self.gpu}"


def read() -> ShippedHours:
    """Read the file."""
    content: Row = read_json(FILE)
    recipes = {name: Hours(*hours) for name, hours in content["recipes"].items()}
    return ShippedHours(content["gpu"], content["cheapest"], recipes, content["logs"])
