"""Output of rows as tables or JSON."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from shutil import get_terminal_size
from typing import Any

import click
import orjson

from .files import Row
from .secrets import without_secrets
from .terminal import broken, harmless
from .yamlfiles import write_flow


@dataclass(frozen=True)
class Table:
    """Rows with a title; for the other attributes see `print_table`."""

    rows: Sequence[Row]
    title: str | None = None
    below: Sequence[str] = ()


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?( ?%)?|nan|–")  # aligned right
_GAP = 2  # spaces between columns, and before cells below a row


def text_of(value: Any) -> str:
    """Text of a value: numbers rounded, pairs as intervals, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}".rstrip("0").rstrip(".")
        return text if float(text) or not value else f"{value:.2g}"
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, float) for item in value):
        return " to ".join(f"{item:.{2 if max(map(abs, value)) >= 1 else 4}f}" for item in value)
    if isinstance(value, bool | list | dict):
        return write_flow(value)
    return str(value)


def _cell(value: Any) -> str:
    """Text of a value on one line, safe for a terminal; fractions have four decimals."""
    is_fraction = isinstance(value, float) and 1e-4 <= abs(value) < 1
    text = f"{value:.4f}" if is_fraction else text_of(value)
    return harmless(text).replace("\n", " ")


def print_table(
    rows: Sequence[Row],
    title: str | None = None,
    below: Sequence[str] = (),
) -> None:
    """Print a table on stdout, with all columns that have a value; nothing without rows.

    Values are never cut; only long paths are broken. If the table is too wide for the terminal, the columns `below`
    move below their rows. Then a first column of long names moves above its rows, and the last columns are left out
    and listed.

    Args:
        below: columns of long texts.
    """
    from rich.cells import cell_len

    if not rows:
        return
    width = _width()
    found = dict.fromkeys(chain(*rows))
    columns = [column for column in found if any(row.get(column) is not None for row in rows)]
    texts = {column: [harmless(column), *(_cell(row.get(column)) for row in rows)] for column in columns}
    widths = {column: max(map(cell_len, texts[column])) for column in columns}
    numbers = {column for column in columns if all(map(_NUMBER.fullmatch, texts[column][1:]))}
    above, beside, under, left_out = _arranged(widths, width, below)
    if title:
        print_text(title)
    for i, row in enumerate([dict.fromkeys(columns), *rows]):  # the headings, then the rows
        for line in broken(texts[columns[0]][i], width) if above else ():
            click.secho(line, bold=not i or None)
        fills = {column: " " * (widths[column] - cell_len(texts[column][i])) for column in beside}
        cells = [fills[c] + texts[c][i] if c in numbers else texts[c][i] + fills[c] for c in beside]
        if cells:
            click.secho((" " * _GAP * above + (" " * _GAP).join(cells)).rstrip(), bold=not i or None)
        for column in under:
            if row.get(column) is not None:
                for line in broken(f"{column}: {texts[column][i]}".removeprefix(": "), width - 2 * _GAP):
                    click.echo(" " * _GAP + line)
    if left_out:
        print_text(f"columns left out: {', '.join(left_out)}; `| less -S` shows all", dim=True)
    if title:
        click.echo()


def print_text(text: str, dim: bool = False) -> None:
    """Print a paragraph on stdout, wrapped to the terminal's width."""
    for line in broken(text, _width()):
        click.secho(line, dim=dim or None)


def _width() -> int:
    return get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def _arranged(widths: dict[str, int], width: int, below: Sequence[str]) -> tuple[bool, list[str], list[str], list[str]]:
    """True if the first column goes above its rows; columns beside, below, left out."""
    first, *_ = beside = list(widths)
    above = False
    under: list[str] = []
    left_out: list[str] = []

    def fits() -> bool:
        return sum(widths[column] + _GAP for column in beside) - (0 if above else _GAP) <= width

    if not fits():
        under = [column for column in below if column in beside]
        beside = [column for column in beside if column not in below]
    if not fits() and widths[first] > width // 2:
        above = True
        beside.remove(first)
    while beside and not fits():
        left_out.insert(0, beside.pop())
    return above, beside, under, left_out


def print_json(value: Any) -> None:
    """Print JSON on stdout, without secrets."""
    print(orjson.dumps(without_secrets(value), option=orjson.OPT_INDENT_2).decode())


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
        about = f"{row['dataset']}, row {row['row']}: {row['length']} tokens, {row['learnt']} with loss"
        click.secho(f"{about}{', longer than sequence_len' if row['too_long'] else ''}", bold=True)
        print(harmless(row["text"]), end="\n\n")
