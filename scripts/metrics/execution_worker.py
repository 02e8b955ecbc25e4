"""Run SQL queries and compare their results, under limits of time, memory and files.

Models' queries run only in this process. Each line of stdin is a `Query` as JSON; `judge` yields the lines of stdout.
A limit can end the process, so it must start fast.
"""

import json
import re
import resource
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes
MOST_ROWS = 1_000_000  # of an expected result
MOST_BYTES = 10_000_000  # of a value in a result
_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
_NUMBER = re.compile(r"[-+]?\d*\.\d+|[-+]?\d+")
_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)
_FAILURES = (sqlite3.Error, ValueError, MemoryError, RecursionError)  # ValueError: text that is not Unicode

Result = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Query:
    """Expected and predicted query.

    Attributes:
        files: SQLite files; the results must be equal in each of them.
        statements: SQL that creates the database in memory; empty if there are files.
        seconds: maximum time for all queries together.
        spider: True for the rules of Spider's evaluation, see `ExecutionParameters`.
        plugs_values: True if values of the expected query may replace the predicted ones.
    """

    reference: str
    prediction: str
    files: list[str]
    statements: str
    seconds: float
    spider: bool
    plugs_values: bool


def main() -> None:
    """Answer queries until stdin ends; SIGALRM ends the process when a query takes too long."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        query = Query(**json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, query.seconds)
        for verdict in judge(query):
            print(json.dumps(verdict), flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def judge(query: Query) -> Iterator[bool | str | None]:
    """Yield the error of the expected query; or None, then True if the results are equal in each database."""
    reference, prediction = query.reference, query.prediction
    if query.spider:
        reference = _by_spiders_rules(reference)
        prediction = _by_spiders_rules(_first_field(prediction).replace("value", "1"))
    try:
        databases = [_opened(file) for file in query.files] or [_created(query.statements)]
        expected = [_result(database, reference, MOST_ROWS) for database in databases]
    except _FAILURES as error:
        yield f"{type(error).__name__}: {error}"
        return
    yield None
    if query.spider:  # as there: text in a string or a name counts, too, and a line end between the words does not
        ordered = "order by" in reference.lower()
    else:
        ordered = any(text.lower().split() == ["order", "by"] for _, text in _tokens(reference))
    predictions: Iterator[str] = iter([prediction])
    if query.plugs_values:
        predictions = chain(predictions, _with_values(reference, prediction))
    yield any(_agrees(databases, expected, text, ordered) for text in predictions)


def _agrees(databases: Sequence[sqlite3.Connection], expected: Sequence[Result], query: str, ordered: bool) -> bool:
    """True if a query has the expected result in each database."""
    for database, result in zip(databases, expected, strict=True):
        try:
            if not equal(result, _result(database, query, len(result)), ordered):
                return False
        except _FAILURES:
            return False
    return True


def _opened(file: str) -> sqlite3.Connection:
    """Database of a file, which nothing changes: without locks, journals and temporary files."""
    return _limited(sqlite3.connect(f"{Path(file).as_uri()}?mode=ro&immutable=1", uri=True))


def _created(statements: str) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:")
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.executescript(statements)
    return _limited(database)


def _limited(database: sqlite3.Connection) -> sqlite3.Connection:
    """Database that permits only to read it."""
    database.text_factory = lambda text: text.decode(errors="ignore")
    database.execute("PRAGMA temp_store=MEMORY")
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
    database.set_authorizer(_permission)
    return database


def _permission(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def _result(database: sqlite3.Connection, query: str, most: int) -> Result:
    """Rows of a query.

    Raises:
        sqlite3.Error: the query fails, is not one query, or has more than `most` rows.
    """
    cursor = database.execute(query)
    if cursor.description is None:
        raise sqlite3.ProgrammingError("not a query")
    rows = cursor.fetchmany(most + 1)
    if len(rows) > most:
        raise sqlite3.DataError(f"more than {most:,} rows")
    return rows


def equal(expected: Result, result: Result, ordered: bool) -> bool:
    """True if the rows are equal for some order of the columns.

    Rows are compared as multisets, or in order. Without rows, the number of columns does not count.
    """
    if len(expected) != len(result):
        return False
    if not expected:
        return True
    if len(expected[0]) != len(result[0]):
        return False
    return _has_order(list(zip(*expected, strict=True)), list(zip(*result, strict=True)), (), ordered)


def _has_order(expected: Sequence[Any], columns: Sequence[Any], chosen: Sequence[Any], ordered: bool) -> bool:
    """True if an order of columns that begins with the chosen ones gives the expected rows."""
    first = list(zip(*expected[: len(chosen)], strict=True))
    rows = list(zip(*chosen, strict=True))
    if ordered and first != rows:
        return False
    if Counter(first) != Counter(rows):
        return False
    for place, column in enumerate(columns):
        rest = (*columns[:place], *columns[place + 1 :])
        if _has_order(expected, rest, (*chosen, column), ordered):
            return True
    return not columns


def _tokens(query: str) -> Iterator[tuple[Any, str]]:
    """Kind and text of each token of the first statement."""
    from sqlparse.lexer import Lexer  # slow; `execution` only needs the class above

    lexer: Any = Lexer  # the package has no types
    for kind, text in lexer.get_default_instance().get_tokens(query):
        yield kind, text
        if text == ";":
            return


def _first_field(prediction: str) -> str:
    """Text of the first line's first field, as prediction files have one line a row and tabs between fields."""
    return prediction.replace("\n", " ").strip().partition("\t")[0]


def _by_spiders_rules(query: str) -> str:
    """Query with joined operators and without DISTINCT; the current year is 2020."""
    query = re.sub("([<>!]) =", r"\1=", query)
    query = "".join(text for _, text in _tokens(query) if text.lower() != "distinct")
    return _YEAR.sub("2020", query)


def _slots(query: str) -> list[tuple[bool, str]]:
    """Tokens of a query, each with whether it is a value: a quoted text or a number."""
    from sqlparse.tokens import String, Whitespace

    slots = []
    for kind, text in _tokens(query.replace(";", "").replace("\t", "")):
        if kind is not Whitespace:
            is_value = kind in (String.Single, String.Symbol) or _NUMBER.fullmatch(text) is not None
            slots.append((is_value, text))
    return slots


def _with_values(reference: str, prediction: str) -> Iterator[str]:
    """Each way to put values of the expected query into the predicted one."""
    values = sorted({text for is_value, text in _slots(reference) if is_value})
    slots = _slots(prediction)
    for combination in product(*(values if is_value else [text] for is_value, text in slots)):
        yield " ".join(combination)


if __name__ == "__main__":
    main()
