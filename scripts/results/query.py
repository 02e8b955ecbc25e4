"""Runs as rows of named columns, filtered and sorted by SQLite."""

import re
import sqlite3
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from csv import DictWriter
from dataclasses import dataclass, field
from glob import has_magic
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..base import paths
from ..base.errors import UserError, did_you_mean
from ..base.files import Row, read_json
from ..base.secrets import without_secrets
from ..base.tables import print_table
from ..base.terminal import say, warn_once
from ..base.yamlfiles import write_flow
from ..metrics.metric import METRICS
from ..metrics.registry import EVAL_LOSS
from ..run import backends
from ..run.rundir import RunDir, all_runs, readable
from . import listing
from .run_result import RunResult

_LEADING = ["run", "state", EVAL_LOSS.name]
_TRAILING = ["changed", "recipe", "seed", "start", "duration_seconds", "peak_memory_gib", "gpu", "rehearsal"]
_EXAMPLE = """write it as in --where 'state == "finished" and lora_r >= 16'"""
WORDS = {
    *("and", "or", "not", "in", "is", "null", "like", "glob", "between", "true", "false"),
    *("abs", "coalesce", "length", "lower", "round", "upper"),
}
"""Operators and functions of --where."""
_TOKEN = re.compile(
    r"""(?P<text>'[^']*'|"[^"]*")|(?P<name>[^\W\d]\w*(\.\w+)*)(?P<call>\s*\()?|[\d.]+(e[-+]?\d+)?|[-+*/%<>=!(),\s]|(?P<wrong>.)"""
)
"""A word of --where; no other ones reach SQLite."""


@dataclass(frozen=True)
class Query:
    """Runs and columns to show.

    Attributes:
        where: condition on columns in SQLite's language, with texts in quotes; empty for all runs.
        sort: columns to sort by, each with `-` in front for descending order.
        columns: columns to show; by default the usual ones, all metrics, and those that the query names.
        limit: maximum number of runs; -1 for all.
    """

    where: str = ""
    sort: Sequence[str] = ()
    columns: Sequence[str] = ()
    limit: int = -1


ALL = Query()


def table(names: Sequence[str] = (), query: Query = ALL) -> list[Row]:
    """Rows of runs by column: fields of `listing.FIELDS`, metrics, and settings by dotted key.

    Rehearsals come last. Memory grows with the shown rows only.

    Args:
        names: runs, recipes, studies, sweeps or patterns; by default, all runs.
        query: which runs and columns, and in which order.

    Raises:
        UserError: a name matches nothing, or the query is malformed or names an unknown column.
    """
    return _Reader(query).rows(folders_of(names))


def folders_of(names: Sequence[str]) -> list[RunDir]:
    """Folders of the runs that names stand for, oldest first; by default, of all runs.

    Raises:
        UserError: a name matches nothing, or several things.
    """
    folders = [] if names else all_runs(paths.runs())
    for name in names:
        folders += _matching(name) if has_magic(name) else _named(name)
    return sorted({folder.path: folder for folder in folders}.values(), key=attrgetter("path.name"))


def _matching(pattern: str) -> list[RunDir]:
    """Runs whose recipe or path below the folder of all runs matches a pattern."""
    by_path = {folder.path.relative_to(paths.runs()).as_posix(): folder for folder in all_runs(paths.runs())}
    recipes = paths.matching(pattern, {path.rpartition("/")[0] for path in by_path})
    selected = paths.matching(pattern, by_path)
    folders = [folder for path, folder in by_path.items() if path in selected or path.rpartition("/")[0] in recipes]
    if not folders:
        raise UserError("no run matches", key=pattern, remedy="`recipe results` lists them")
    return folders


def _named(name: str) -> list[RunDir]:
    """Runs of a recipe, study or sweep; or a single run."""
    from ..study.sweep import Sweep, find_run_sweep_or_study, runs_of_sweep

    thing = find_run_sweep_or_study(name)
    if isinstance(thing, Sweep):
        return runs_of_sweep(thing)
    if not isinstance(thing, RunDir):
        study = thing.folder.name
        return [folder for folder, run in readable(all_runs(paths.runs())) if paths.study_name(run.origin) == study]
    recipe, run = thing.path.parent, thing.path.name
    if f"/{recipe}".endswith(f"/{name}"):
        return all_runs(recipe)
    is_one = name == "latest" or name in run or run in name
    return [thing] if is_one else all_runs(recipe)


@dataclass
class _Reader:
    """Reads runs one after the other, and keeps the selected ones.

    Attributes:
        seen: columns for which a run has had a value.
        metrics: metrics of the selected runs.
    """

    query: Query
    seen: set[str] = field(default_factory=set)
    metrics: dict[str, Any] = field(default_factory=dict)
    result: RunResult | None = None

    def rows(self, folders: Sequence[RunDir]) -> list[Row]:
        """Rows of the selected runs, in order; see `table`."""
        rows: list[Row] = []
        sort = self.query.sort
        sorted_by = [name.removeprefix("-") for name in sort]
        condition, compared = _condition(self.query.where)
        selection = f"SELECT ?, value('rehearsal') {', value(?)' * len(sort)} WHERE {condition}"
        terms = [f"{place} {'DESC' if name[:1] == '-' else 'ASC'} NULLS LAST" for place, name in enumerate(sort, 3)]
        with closing(sqlite3.connect(":memory:")) as database:
            database.create_function("value", 1, self._stored)
            try:
                database.execute(f"CREATE TABLE runs AS {selection} LIMIT 0", [0, *sorted_by])
            except sqlite3.Error:
                raise UserError("malformed", key=f"--where {self.query.where}", remedy=_EXAMPLE) from None
            for folder, run in readable(folders, backends.read):
                self.result = RunResult(folder, run)
                if database.execute(f"INSERT INTO runs {selection}", [len(rows), *sorted_by]).rowcount:
                    rows.append(self._row([*sorted_by, *compared]))
            ordered = f"SELECT * FROM runs ORDER BY {', '.join(['2', *terms, '1'])} LIMIT {self.query.limit}"
            places = [place for place, *_ in database.execute(ordered)]
        self._refuse_unknown([*self.query.columns, *sorted_by, *compared])
        names = self.query.columns or dict.fromkeys([*_LEADING, *self.metrics, *sorted_by, *compared, *_TRAILING])
        return [{name: rows[place].get(name) for name in names} for place in places]

    def _row(self, further: Sequence[str]) -> Row:
        """Shown columns of the present run."""
        names = self.query.columns
        if not names and self.result:
            self.metrics |= self.result.columns
            names = [*_LEADING, *self.result.columns, *further, *_TRAILING]
        return {name: without_secrets(self._value(name), name) for name in names}

    def _value(self, name: str) -> Any:
        """Value of a column in the present run; None if it has none."""
        result = self.result
        if result is None:
            return None
        try:
            metric, _, bound = name.rpartition("_")
            if metric in result.columns and bound in ("low", "high"):
                value = getattr(listing.interval_of(result, metric), bound, None)
            elif name in result.columns and not (name in listing.FIELDS and result.summary.eval_pairs):
                value = result.scores[name].value  # the loss of pairs is another quantity than that of tokens
            elif name in listing.FIELDS:
                value = listing.FIELDS[name](result)
            else:
                value = result.setting(name)
        except UserError as error:
            warn_once(str(error))
            return None
        if value is not None:
            self.seen.add(name)
        return value

    def _stored(self, name: str) -> Any:
        """Value of a column as SQLite compares it: a list is YAML on one line."""
        value = self._value(name)
        if isinstance(value, int) and value.bit_length() > 63:
            return float(value)
        return write_flow(value) if isinstance(value, list | dict) else value

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        """Raise UserError for a name that is neither a field, nor a metric, nor a setting."""
        unknown = {*names} - self.seen - listing.FIELDS.keys()
        if not unknown:
            return
        keys = read_json(paths.RECIPES / "axolotl.schema.json")["properties"]
        columns = {*listing.FIELDS, *METRICS, *keys, *self.seen}
        if self.result:
            columns |= self.result.columns.keys() | self.result.config_values.keys()
            columns |= {f"{name}_{bound}" for name in self.result.columns for bound in ("low", "high")}
        for name in sorted(unknown - columns):
            hint = did_you_mean(name, columns) or "; columns are fields, metrics, and settings by dotted key"
            raise UserError(f"no run has a column of that name{hint}", key=name)


def _condition(text: str) -> tuple[str, list[str]]:
    """Translate --where to SQL, with the names of its columns. It can contain only columns, values and `WORDS`.

    Raises:
        UserError: the text has something else.
    """
    parts, names = [], []
    for token in _TOKEN.finditer(text):
        part = token[0]
        name = token["name"]
        if token["wrong"]:
            raise UserError(f"{part} is unknown here", key=f"--where {text}", remedy=_EXAMPLE)
        if token["text"]:
            quoted = part[1:-1].replace("'", "''")
            part = f"'{quoted}'"
        elif name and name.lower() not in WORDS:
            if token["call"]:
                remedy = f"there are {', '.join(sorted(WORDS))}"
                raise UserError(f"no function or operator is called {name}", key=f"--where {text}", remedy=remedy)
            names.append(name)
            part = f"value('{name}')"
        parts.append(part)
    return "".join(parts) or "1", names


def print_csv(names: Sequence[str], query: Query, raw: bool) -> None:
    """Print the selected runs as CSV.

    Args:
        names: names of runs.
        query: the runs and columns.
        raw: True to leave texts unchanged that a spreadsheet would take for formulas; else they begin with '.
    """
    rows = [listing.texts(row) for row in table(names, query)]
    if not raw:
        rows = [{name: _without_formula(cell) for name, cell in row.items()} for row in rows]
    writer = DictWriter(sys.stdout, [*rows[0]] if rows else query.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _without_formula(cell: Any) -> Any:
    """A cell, as text if a spreadsheet would take it for a formula; see OWASP, CSV injection."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def show(names: Sequence[str], query: Query) -> None:
    """Print the selected runs as a table."""
    rows = [listing.texts(row) for row in table(names, query)]
    for row in rows:
        if "run" in row:
            row["run"] = Path(row["run"]).name
    print_table(rows, keep=[*query.columns, EVAL_LOSS.name])
    if not rows:
        say("no run meets the condition")
