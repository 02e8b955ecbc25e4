"""Figures for --figure, drawn by Matplotlib, which needs no browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..base.files import replacing


@contextmanager
def drawing(file: Path, inches: tuple[float, float], panels: int = 1) -> Iterator[Any]:
    """Axes to draw on, which are written to a file when the block ends; a single panel has its legend beside it.

    Args:
        file: where to, as .png or .svg.
        inches: width and height.
        panels: how many axes there are in each row and column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    yield figure.subplots(panels, panels)
    if panels == 1:
        figure.legend(loc="outside right upper", fontsize="small")
    with replacing(file) as stream:
        figure.savefig(stream, format=file.suffix.removeprefix(".") or None)
