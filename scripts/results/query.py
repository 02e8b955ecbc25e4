"""Runs as rows of named columns, filtered and sorted by SQLite."""

import re
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from csv import DictWriter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base import paths
from ..base.errors import UserError, did_you_mean
from ..base.files import Row, read_json
from ..base.secrets import without_secrets
from ..base.tables import print_table
from ..base.terminal import say
from ..base.yamlfiles import write_flow
from ..metrics.metric import METRICS, Column
from ..metrics.registry import EVAL_LOSS
from ..run import backends
from ..run.rundir import RunDir, all_runs, readable
from . import listing
from .run_result import RunResult

_LEADING = ["run", "state", EVAL_LOSS.name]
_TRAILING = ["changed", "recipe", "seed", "start", "duration_seconds", "peak_memory_gib", "gpu", "rehearsal"]
_EXAMPLE = """write it as in --where 'state == "finished" and lora_r >= 16'"""
_WORDS = {
    *("and", "or", "not", "in", "is", "null", "like", "glob", "between", "true", "false"),
    *("abs", "coalesce", "length", "lower", "round", "upper"),
}
"""Operators and functions of --where."""
_TOKEN = re.compile(
    r"""(?P<text>'[^']*'|"[^"]*")|(?P<name>[^\W\d]\w*(\.\w+)*)|(?P<other>[\d.]+(e[-+]?\d+)?|[-+*/%<>=!(),\s]|(?P<wrong>.))"""
)
"""A word of --where; no other ones reach SQLite."""


@dataclass(frozen=True)
class Query:
    """Runs and columns to show.

    Attributes:
        where: condition on columns in SQLite's language, with texts in quotes; empty for all runs.
        sort: columns to sort by, each with `-` in front for descending order.
        columns: columns to show, in this order; by default the usual ones, metrics, and those that the query names.
        limit: maximum number of runs; None for all.
        full: True for all fields of each run, as in JSON, instead of columns.
    """

    where: str = ""
    sort: Sequence[str] = ()
    columns: Sequence[str] = ()
    limit: int | None = None
    full: bool = False

    @cached_property
    def condition(self) -> "_Condition":
        return _Condition.of(self.where)

    @property
    def sorted_by(self) -> list[str]:
        """Names of the columns to sort by."""
        return [name.removeprefix("-") for name in self.sort]

    @property
    def named(self) -> list[str]:
        """Columns that the query names."""
        return list(dict.fromkeys([*self.columns, *self.sorted_by, *self.condition.names]))

    @property
    def order(self) -> str:
        """SQL for the order of the runs: rehearsals last, missing values last, and else the oldest first."""
        terms = ["rehearsal"]
        for name in self.sort:
            column = f"s{self.sorted_by.index(name.removeprefix('-'))}"
            terms += [f"{column} IS NULL", f"{column} {'DESC' if name.startswith('-') else 'ASC'}"]
        return ", ".join([*terms, "place"])


@dataclass(frozen=True)
class _Condition:
    """Condition of --where as SQL, in which columns are c0, c1 and so on."""

    sql: str
    names: list[str]

    @classmethod
    def of(cls, text: str) -> "_Condition":
        """Translate a condition. Only columns, values and `_WORDS` can occur in it.

        Raises:
            UserError: the text has something else.
        """
        names: list[str] = []
        parts = []
        for token in _TOKEN.finditer(text):
            word = token[0]
            if token["wrong"]:
                raise UserError(f"{word} is unknown here", key=f"--where {text}", remedy=_EXAMPLE)
            if token["text"]:
                quoted = word[1:-1].replace("'", "''")
                parts.append(f"'{quoted}'")
            elif token["name"] and word.lower() not in _WORDS:
                if text[token.end() :].lstrip().startswith("("):
                    remedy = f"there are {', '.join(sorted(_WORDS))}"
                    raise UserError(f"no function or operator is called {word}", key=f"--where {text}", remedy=remedy)
                names += [] if word in names else [word]
                parts.append(f"c{names.index(word)}")
            else:
                parts.append(word)
        return cls("".join(parts) or "1", names)


ALL = Query()


def table(names: Sequence[str] = (), query: Query = ALL) -> list[Row]:
    """Rows of runs by column: fields of `listing.FIELDS`, metrics, and settings by dotted key.

    Memory grows with the shown rows only, time with the number of runs.

    Args:
        names: runs, recipes, studies, sweeps or patterns; by default, all runs.
        query: which runs and columns, and in which order.

    Raises:
        UserError: a name matches nothing, or the query is malformed or names an unknown column.
    """
    return [row for _, row in _Selection(query).rows(folders_of(names))]


def folders_of(names: Sequence[str]) -> list[RunDir]:
    """Folders of the runs that names stand for, each once; by default, of all runs.

    Raises:
        UserError: a name matches nothing, or several things.
    """
    if not names:
        return all_runs(paths.runs())
    from ..study.sweep import find_runs

    folders: dict[Path, RunDir] = {}
    for name in names:
        folders |= {folder.path: folder for folder in find_runs(name)}
    return [*folders.values()]


@dataclass
class _Selection:
    """Runs that a query selects, read one after the other.

    Attributes:
        metrics: metrics of the runs, in the order in which they occur.
        last: the last run, whose settings are suggested.
        unknown: columns that the query names, and that no run has had so far.
    """

    query: Query
    metrics: dict[str, Column] = field(default_factory=dict)
    last: RunResult | None = None
    unknown: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.unknown |= {*self.query.named} - listing.FIELDS.keys()

    def rows(self, folders: Sequence[RunDir]) -> list[tuple[bool, Row]]:
        """Rows of the selected runs, in order, each with whether it is a rehearsal; see `table`."""
        rows: dict[int, Row] = {}
        with closing(sqlite3.connect(":memory:")) as database:
            condition, insertion = _statements(database, self.query)
            for place, (folder, run) in enumerate(readable(folders, backends.read)):
                try:
                    self.last = result = RunResult(folder, run)
                    if database.execute(condition, self._stored(result, self.query.condition.names)).fetchone():
                        order = self._stored(result, self.query.sorted_by)
                        database.execute(insertion, [place, run.rehearsal, *order])
                        rows[place] = self._row(result)
                except UserError as error:
                    say(str(error))
            self._refuse_unknown()
            limit = -1 if self.query.limit is None else self.query.limit
            places = database.execute(f"SELECT rehearsal, place FROM runs ORDER BY {self.query.order} LIMIT ?", [limit])
            ordered = [(bool(rehearsal), rows[place]) for rehearsal, place in places]
        if self.query.full:
            return ordered
        columns = self.query.columns or [*_LEADING, *self.metrics, *self.query.named, *_TRAILING]
        return [(rehearsal, {name: row.get(name) for name in columns}) for rehearsal, row in ordered]

    def _stored(self, result: RunResult, names: Sequence[str]) -> list[Any]:
        """Values of columns as SQLite compares them."""
        return [_stored(self._value(result, name)) for name in names]

    def _row(self, result: RunResult) -> Row:
        """Columns of a run that are shown."""
        if self.query.full:
            return listing.record(result)
        names = self.query.columns
        if not names:
            self.metrics |= result.columns
            names = [*_LEADING, *result.columns, *self.query.named, *_TRAILING]
        return {name: without_secrets(self._value(result, name), name) for name in names}

    def _value(self, result: RunResult, name: str) -> Any:
        """Value of a column; None if the run has none."""
        if name in result.columns:
            self.unknown.discard(name)
            return result.scores[name].value
        if name in listing.FIELDS:
            return listing.FIELDS[name](result)
        value = result.setting(name)
        if value is not None:
            self.unknown.discard(name)
        return value

    def _refuse_unknown(self) -> None:
        """Raise UserError if no run has a column that the query names, unless it is a metric or a key of Axolotl's."""
        if not self.unknown:
            return
        keys = read_json(paths.RECIPES / "axolotl.schema.json")["properties"]
        known = {*listing.FIELDS, *METRICS, *keys, *self.metrics}
        if self.last:
            known |= self.last.config_values.keys()
        for name in sorted(self.unknown - known):
            hint = did_you_mean(name, known) or "; columns are fields, metrics, and settings by dotted key"
            raise UserError(f"no run has a column of that name{hint}", key=name)


def _statements(database: sqlite3.Connection, query: Query) -> tuple[str, str]:
    """Create the table of runs; return the statements that test a run and insert it.

    Raises:
        UserError: the condition is malformed.
    """
    given = [f"? AS c{number}" for number, _ in enumerate(query.condition.names)]
    condition = f"SELECT 1 FROM (SELECT {', '.join(['1', *given])}) WHERE {query.condition.sql}"
    try:
        database.execute(condition, [None] * len(given))
    except sqlite3.Error as error:
        raise UserError(str(error), key=f"--where {query.where}", remedy=_EXAMPLE) from None
    columns = ["place", "rehearsal", *(f"s{number}" for number, _ in enumerate(query.sort))]
    database.execute(f"CREATE TABLE runs ({', '.join(columns)})")
    return condition, f"INSERT INTO runs VALUES ({', '.join('?' for _ in columns)})"


def _stored(value: Any) -> Any:
    """Value as SQLite compares it: a number, a text or None; a list is YAML on one line."""
    if isinstance(value, int) and value.bit_length() > 63:
        return float(value)
    if value is None or isinstance(value, int | float | str):
        return value
    return write_flow(value)


def show(names: Sequence[str], query: Query, csv: bool) -> None:
    """Print the selected runs as a table, with another one for rehearsals, or as CSV."""
    rows = _Selection(query).rows(folders_of(names))
    if csv:
        print_csv([row for _, row in rows], query.columns)
        return
    kinds = {"Runs": [row for rehearsal, row in rows if not rehearsal]}
    kinds[listing.REHEARSALS] = [row for rehearsal, row in rows if rehearsal]
    for title, kind in kinds.items():
        cells = [listing.texts(row) for row in kind]
        for row in cells:
            row.pop("rehearsal", None)
            if "run" in row:
                row["run"] = Path(row["run"]).name
        print_table(cells, title, keep=[*query.named, EVAL_LOSS.name])
    if not rows:
        say("no run meets the condition")


def print_csv(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print rows as CSV on stdout; without rows, only the names of columns."""
    writer = DictWriter(sys.stdout, [*rows[0]] if rows else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(listing.texts, rows))
