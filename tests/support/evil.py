"""A pickle that shows that it was loaded."""

from pathlib import Path
from typing import Any


class Evil:
    """An object whose unpickling writes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")
