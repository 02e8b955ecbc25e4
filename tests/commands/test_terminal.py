"""Tables as one sees them, in terminals of any width."""

import io
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_recipes.base import tables


def test_a_number_a_text_like_it_and_what_a_terminal_would_obey(capsys):
    tables.print_table([{"a": 0.05}, {"a": "0.05", "b": "\x1b[31mred\n"}])
    assert capsys.readouterr().out == "     a  b\n0.0500  –\n  0.05   [31mred\n"


NAMES = st.text("abcdefg/-_", min_size=1, max_size=60)
VALUES = st.none() | st.text("xyz /", min_size=1, max_size=60) | st.floats(-1e4, 1e4) | st.integers(0, 10**6)


@given(
    columns=st.lists(st.text("KLMNOPQRST", min_size=1, max_size=12), min_size=1, max_size=9, unique=True),
    data=st.data(),
    width=st.integers(64, 160),
)
def test_any_table_fits_and_shows_or_names_every_column(columns, data, width):
    rows: list[dict[str, Any]] = [
        {columns[0]: data.draw(NAMES)} | {column: data.draw(VALUES) for column in columns[1:]} for _ in range(3)
    ]
    names = st.lists(st.sampled_from(columns[1:]), unique=True) if columns[1:] else st.just([])
    below = data.draw(names)
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(said, "isatty", lambda: True)
        patch.setattr(sys, "stdout", said)
        patch.setenv("COLUMNS", str(width))
        tables.print_table(rows, below=below)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).splitlines()
    assert [line for line in lines if len(line) > width] == []
    shown = "".join(lines)
    for column in columns:
        assert column in shown or all(row[column] is None for row in rows)
    for row in rows:
        assert any(line.startswith(row[columns[0]]) for line in lines)
