"""Output of rows as tables or JSON."""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any

import click
import orjson

from .files import Row
from .secrets import without_secrets
from .terminal import broken, columns, harmless
from .yamlfiles import write_flow


@dataclass(frozen=True)
class Table:
    """Rows with a title; for the other attributes see `print_table`."""

    rows: Sequence[Row]
    title: str | None = None
    below: Sequence[str] = ()
    keep: Sequence[str] = ()
    legend: Mapping[str, str] = MappingProxyType({})


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?( ?%)?|nan|–")  # aligned right
_DECIMALS = 4  # at most, of numbers from 1 to 100
_GAP = 2  # spaces between columns, and before cells below a row


def text_of(value: Any) -> str:
    """Text of a value: numbers rounded, pairs as intervals, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return _rounded(value)
    if isinstance(value, list) and list(map(type, value)) == [float, float]:
        digits = 2 if max(map(abs, value)) >= 1 else 4
        return " to ".join(f"{bound:.{digits}f}" for bound in value)
    if isinstance(value, bool | list | dict):
        return write_flow(value)
    return str(value)


def _rounded(number: float) -> str:
    """Number with two decimals; below 1 with at most four, or with two digits."""
    text = f"{number:.2f}"
    if abs(number) < 1:
        text = f"{number:.4f}".rstrip("0").rstrip(".")
    if float(text) == 0 != number:
        return f"{number:.2g}"
    return text


def _cells(values: Sequence[Any]) -> list[str]:
    """Texts of a column's values on one line, safe for a terminal; fractions have at least four decimals.

    Numbers from 1 to 100 have more decimals if these tell them apart.
    """
    texts = [_cell(value) for value in values]
    numbers = {value for value in values if isinstance(value, float)}
    decimals = 2
    while decimals < _DECIMALS and _repeated(numbers, decimals):
        decimals += 1
    if decimals == 2:
        return texts
    for place, value in enumerate(values):
        if isinstance(value, float) and 1 <= abs(value) < 100:
            texts[place] = f"{value:.{decimals}f}"
    return texts


def _repeated(numbers: Iterable[float], decimals: int) -> bool:
    """True if different numbers from 1 to 100 have the same text with some decimals."""
    texts = [f"{number:.{decimals}f}" for number in numbers if 1 <= abs(number) < 100]
    return len(set(texts)) < len(texts)


def _cell(value: Any) -> str:
    """Text of a value on one line, safe for a terminal; fractions have four decimals."""
    is_fraction = isinstance(value, float) and 1e-4 <= abs(value) < 1
    text = f"{value:.4f}" if is_fraction else text_of(value)
    return harmless(text).replace("\n", " ")


def hours(value: float, full_rows: bool = False) -> str:
    """Text of an estimate in hours, marked if it counts every row as full."""
    digits = 1 if value >= 1 else 2
    text = "under 0.01" if value < 0.01 else f"{value:,.{digits}f}"
    return f"{text}, full rows" if full_rows else text


@dataclass(eq=False)
class _Column:
    """Column of a printed table: its values, and the texts of its heading and cells."""

    name: str
    values: Sequence[Any]
    texts: Sequence[str]

    @cached_property
    def width(self) -> int:
        """Width of the longest text, in cells of the terminal."""
        from rich.cells import cell_len

        return max(map(cell_len, self.texts))

    @cached_property
    def is_numeric(self) -> bool:
        """True if all cells are numbers or empty."""
        return all(map(_NUMBER.fullmatch, self.texts[1:]))

    def padded(self, place: int) -> str:
        """Text with spaces up to the width of the column; numbers are aligned right."""
        from rich.cells import cell_len

        text = self.texts[place]
        spaces = " " * (self.width - cell_len(text))
        if self.is_numeric:
            return spaces + text
        return text + spaces


def _columns(rows: Sequence[Row]) -> list[_Column]:
    """Columns of rows, without those that have no value."""
    columns = []
    for name in dict.fromkeys(chain(*rows)):
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            columns.append(_Column(name, values, [harmless(name), *_cells(values)]))
    return columns


@dataclass
class _Layout:
    """Arrangement of columns in a width of cells.

    Attributes:
        beside: columns beside each other.
        below: columns whose cells go below their rows.
        left_out: columns that do not fit.
    """

    width: int
    beside: list[_Column] = field(default_factory=list)
    below: list[_Column] = field(default_factory=list)
    left_out: list[_Column] = field(default_factory=list)

    def fits(self, columns: Sequence[_Column]) -> bool:
        """True if columns beside each other fit the width."""
        return sum(column.width + _GAP for column in columns) - _GAP <= self.width

    def line(self, place: int) -> str:
        """Line of the headings (place 0) or of a row, without cells below it."""
        return (" " * _GAP).join(column.padded(place) for column in self.beside).rstrip()

    def lines_below(self, place: int) -> Iterator[str]:
        """Lines of the cells below a row."""
        for column in self.below:
            if column.values[place - 1] is not None:
                text = f"{column.name}: {column.texts[place]}".removeprefix(": ")  # a name can be empty
                for line in broken(text, self.width - 2 * _GAP):
                    yield " " * _GAP + line


def _layout(columns: Sequence[_Column], width: int, below: Sequence[str], keep: Sequence[str]) -> _Layout:
    """Arrangement of columns in a width; for `below` and `keep` see `print_table`."""
    layout = _Layout(width)
    if layout.fits(columns):
        layout.beside = [*columns]
        return layout
    by_name = {column.name: column for column in columns}
    layout.below = [by_name[name] for name in below if name in by_name]
    first, *rest = [column for column in columns if column.name not in below]
    important = [by_name[name] for name in keep if by_name.get(name) in rest]
    fitting = [first]
    for column in [*important, *rest]:
        if column not in fitting and layout.fits([*fitting, column]):
            fitting.append(column)
    layout.beside = [column for column in [first, *rest] if column in fitting]
    layout.left_out = [column for column in rest if column not in fitting]
    return layout


def print_table(
    rows: Sequence[Row],
    title: str | None = None,
    below: Sequence[str] = (),
    keep: Sequence[str] = (),
    legend: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print a table on stdout, with all columns that have a value; nothing without rows.

    Values are never cut; only long paths are broken. If the table is too wide for the terminal, the columns `below`
    move below their rows. Then columns are left out and listed.

    Args:
        below: columns of long texts.
        keep: columns that stay if others do not fit, the most important first; the first column of all stays anyway.
        legend: explanations of columns, printed below the table if it shows them.
    """
    if not rows:
        return
    layout = _layout(_columns(rows), _width(), below, keep)
    if title:
        print_text(title)
    click.secho(layout.line(0), bold=True)
    for place in range(1, len(rows) + 1):
        click.echo(layout.line(place))
        for line in layout.lines_below(place):
            click.echo(line)
    if layout.left_out:
        names = ", ".join(column.name for column in layout.left_out)
        print_text(f"columns left out: {names}; `| less -S` shows all")
    for column in layout.beside:
        if column.name in legend:
            print_text(legend[column.name])
    if title:
        click.echo()


def print_text(text: str) -> None:
    """Print a paragraph on stdout, wrapped to the terminal's width."""
    for line in broken(text, _width()):
        click.echo(line)


def _width() -> int:
    return columns() if sys.stdout.isatty() else sys.maxsize


def print_json(value: Any) -> None:
    """Print JSON on stdout, without secrets."""
    # orjson refuses subclasses of float, such as Written
    print(orjson.dumps(without_secrets(value), default=float, option=orjson.OPT_INDENT_2).decode())


def show(json: bool, records: Any, tables: Iterable[Table], notes: Iterable[str] = ()) -> None:
    """Print records as JSON, or as tables with notes below."""
    if json:
        print_json(records)
        return
    for table in tables:
        print_table(**vars(table))
    for line in notes:
        print_text(line)


def print_tokens(rows: Sequence[Row]) -> None:
    """Print tokenized rows on stdout."""
    for row in rows:
        answer = f", {row['answer']}" if "answer" in row else ""
        about = f"{row['dataset']}, row {row['row']}{answer}: {row['length']} tokens, {row['learnt']} with loss"
        click.secho(f"{about}{', longer than sequence_len' if row['too_long'] else ''}", bold=True)
        print(harmless(row["text"]), end="\n\n")
