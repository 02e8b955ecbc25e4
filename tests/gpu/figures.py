"""Measured figures with their bounds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured figure; a bound is relative where a value is expected."""

    what: str
    measured: float | None
    expected: float | None = None
    bound: float = 0.0
    unit: str = ""

    @property
    def passed(self) -> bool:
        """True if the figure keeps its bound; NaN does not."""
        if self.measured is None:
            return False
        if self.expected is None:
            return self.measured <= self.bound
        return abs(self.measured - self.expected) <= self.bound * abs(self.expected)

    @property
    def limit(self) -> str:
        if self.expected is None:
            return f"at most {self.bound:g}"
        return f"{self.expected:,.7g}{f' ±{self.bound:.4g} of it' if self.bound else ''}"
