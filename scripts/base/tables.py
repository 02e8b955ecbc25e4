"""Prints rows as table, Markdown, CSV or JSON."""

import csv
import sys
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import orjson

Row = dict[str, Any]


def text_of(value: Any) -> str:
    """A value as a table shows it; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return " to ".join(map(text_of, value))
    return str(value)


def print_table(rows: Sequence[Row], title: str | None = None, empty: bool = False) -> None:
    """A table on stdout, as wide as it needs if stdout is not a terminal.

    Args:
        empty: whether to show columns without values too.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = [column for column in rows[0] if empty or any(row.get(column) is not None for row in rows)]
    for column in columns:
        numbers = any(isinstance(row[column], int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        table.add_row(*(Text(text_of(row[column])) for column in columns))
    Console(width=None if sys.stdout.isatty() else 250).print(table)


def print_markdown(rows: Sequence[Row], title: str | None = None) -> None:
    """A Markdown table on stdout."""
    if title:
        print(f"**{title}**\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(text_of(value).replace("|", "\\|") for value in row.values()) + " |")
    print()


def print_csv(rows: Sequence[Row]) -> None:
    """CSV with a header on stdout; numbers in full."""
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def write(rows: Sequence[Row], form: str, title: str | None = None, empty: bool = False) -> None:
    """Rows on stdout as `table`, `md`, `csv` or `json`; `empty` as in `print_table`."""
    match form:
        case "json":
            print_json(rows)
        case "csv":
            print_csv(rows)
        case "md":
            print_markdown(rows, title)
        case _:
            print_table(rows, title, empty)


def print_tokens(rows: Sequence[Row]) -> None:
    """Tokenized rows on stdout: those tokens that carry loss between marks, and in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 250, highlight=False)
    loss = "bold green"
    console.print(f"[{loss}]⟪green⟫[/] carries loss, [dim]dim[/] does not, [reverse]reversed[/] is a special token")
    for row in rows:
        about = f"{row['dataset']}, row {row['row']}: {row['length']} tokens, {row['learnt']} with loss"
        console.print(f"\n[bold]{about}{', longer than sequence_len' if row['too_long'] else ''}[/]")
        text = Text()
        for learnt, tokens in groupby(row["tokens"], itemgetter("loss")):
            text.append("⟪" if learnt else "", loss)
            for token in tokens:
                text.append(token["text"], f"{loss if learnt else 'dim'} {'reverse' if token['special'] else ''}")
            text.append("⟫" if learnt else "", loss)
        console.print(text)
