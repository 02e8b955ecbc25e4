"""Metric of SQL answers: the results of queries on SQLite databases."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..base.errors import UserError, WorkFailed
from ..base.files import Row, reading
from ..base.terminal import warn_once
from .execution_worker import MEMORY, Query
from .metric import METRICS, Pair, Parameters, RowMetric

MOST_TEXT = 100_000
"""Largest number of characters of a prediction; longer ones are wrong."""
_WORKER = [sys.executable, "-P", "-m", f"{__package__}.execution_worker"]


class ExecutionParameters(Parameters):
    """Databases, and rules of the comparison.

    Attributes:
        databases: SQLite file, or a folder with NAME.sqlite or NAME/*.sqlite for the NAME in a row's field `database`.
            Not used for rows with a field `database_sql`, which has the statements that create the database.
        spider: True for the rules of Spider's evaluation (taoyds/test-suite-sql-eval): DISTINCT is ignored, the
            prediction ends at a tab, each `value` in it becomes 1, `> =` becomes `>=`, and the year is 2020.
        seconds: time for the queries of a row; a row that takes longer is wrong.
    """

    databases: str | None = None
    spider: bool = False
    seconds: Annotated[float, Field(gt=0, le=3600, strict=False)] = 30


@dataclass(frozen=True, kw_only=True)
class ExecutionMetric(RowMetric):
    """Share of rows whose predicted query has the results of the expected one.

    Attributes:
        plugs_values: True to also try each way to put the expected query's values into the predicted one.
    """

    plugs_values: bool = False

    def scores_of(self, rows: Sequence[Row], parameters: ExecutionParameters) -> list[float]:
        queries = [self._query(row, parameters) for row in rows]
        cores = len(os.sched_getaffinity(0))
        size = max(len(queries) // (4 * cores), 1)
        with ThreadPoolExecutor(cores) as pool:
            parts = list(pool.map(judged, batched(queries, size)))
        verdicts = [verdict for part in parts for verdict in part]
        failed = [verdict for verdict in verdicts if isinstance(verdict, str)]
        if failed:
            warn_once(
                f"warning: {self.name}: {len(failed)} of {len(rows)} expected queries fail, so their rows score 0 "
                f"({failed[0]}); correct the queries or `databases`"
            )
        if None in verdicts:
            limits = f"{_limits(parameters.seconds)} and score 0"
            warn_once(f"warning: {self.name}: {verdicts.count(None)} of {len(rows)} predicted queries exceed {limits}")
        return [100.0 if verdict is True else 0.0 for verdict in verdicts]

    def require(self, rows: Iterable[Row], parameters: ExecutionParameters) -> None:
        for row in rows:
            if not row.get("database_sql"):
                database_files(row, parameters)

    def _query(self, row: Row, parameters: ExecutionParameters) -> Query:
        statements = row.get("database_sql") or ""
        files = [] if statements else [str(file.resolve()) for file in database_files(row, parameters)]
        return Query(
            reference=row["reference"],
            prediction=row["prediction"],
            files=files,
            statements=statements,
            seconds=parameters.seconds,
            spider=parameters.spider,
            plugs_values=self.plugs_values,
        )


def database_files(row: Row, parameters: ExecutionParameters) -> list[Path]:
    """SQLite files of a row's database.

    Raises:
        UserError: there is no file.
    """
    if parameters.databases is None:
        remedy = "name a SQLite file or a folder of them, or give each row the field database_sql"
        raise UserError("execution: no databases", key="databases", remedy=remedy)
    place = Path(parameters.databases)
    if place.is_file():
        return [_complete(place)]
    name = str(row.get("database") or "")
    files = [place / f"{name}.sqlite"]
    if name and (place / name).is_dir():
        files = sorted((place / name).glob("*.sqlite"))
    # a row's text is not to lead out of the folder
    if Path(name).name == name and name not in ("", "..") and files and all(map(Path.is_file, files)):
        return [*map(_complete, files)]
    problem = f"no SQLite file of the database {name}"
    if not name:
        problem = "the row has no field database, which names one"
    remedy = f"expected {place}/NAME.sqlite or {place}/NAME/*.sqlite"
    raise UserError(problem, file=place, key="databases", remedy=remedy)


def _complete(file: Path) -> Path:
    """A SQLite file without changes in a log or journal beside it, because queries read only the file itself.

    Raises:
        UserError: there are such changes.
    """
    for ending in ("-wal", "-journal"):
        log = file.with_name(file.name + ending)
        if log.is_file() and any(_first_bytes(log)):  # zeros once the changes are finished
            remedy = f"close the program that uses it, then run `sqlite3 {file} 'PRAGMA journal_mode = DELETE'`"
            raise UserError(f"has unfinished changes in {log.name}", file=file, key="databases", remedy=remedy)
    return file


def _first_bytes(file: Path) -> bytes:
    with reading(file) as stream:
        return stream.read(8)


def judged(queries: Iterable[Query]) -> list[bool | str | None]:
    """Verdicts of `judge` in a worker process; after a query that ends it, the next one has a new process.

    None stands for a predicted query that ends it, by exceeding a limit; such an expected query has failed.
    """
    verdicts: list[bool | str | None] = []
    worker = _start()
    for query in queries:
        verdict: bool | str | None = False
        if query.prediction.strip() and len(query.prediction) <= MOST_TEXT:
            expected, *predicted = _ask(worker, query)
            verdict = json.loads(expected) if expected else f"exceeds {_limits(query.seconds)}"
            if predicted:
                verdict = json.loads(predicted[0]) if predicted[0] else None
            if not (expected and all(predicted)):
                _end(worker)
                worker = _start()
        verdicts.append(verdict)
    _end(worker)
    return verdicts


def _limits(seconds: float) -> str:
    return f"{seconds:g} s or {MEMORY >> 20} MiB"


def _start() -> "subprocess.Popen[bytes]":
    worker = subprocess.Popen(_WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert worker.stdout
    if not worker.stdout.readline():
        raise WorkFailed(f"execution: no process for queries: {worker.communicate()[1].decode().strip()[-200:]}")
    return worker


def _ask(worker: "subprocess.Popen[bytes]", query: Query) -> list[bytes]:
    """Lines of a worker's answer, see `judge`; the last one is empty if the worker has ended."""
    assert worker.stdin and worker.stdout
    worker.stdin.write(f"{json.dumps(asdict(query))}\n".encode())
    worker.stdin.flush()
    lines = [worker.stdout.readline()]
    if lines[0] == b"null\n":
        lines.append(worker.stdout.readline())
    return lines


def _end(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    worker.communicate()


def _by_pairs(_pairs: Sequence[Pair], _parameters: ExecutionParameters) -> list[float]:
    raise UserError("execution: needs rows with a database, not only pairs of texts")


for _name, _label, _plugs_values in (
    ("execution", "execution accuracy", False),
    ("execution_plug_value", "execution accuracy with the expected values (plug_value)", True),
):
    METRICS.include(
        ExecutionMetric(
            name=_name,
            label=_label,
            hub_type="accuracy",
            unit="%",
            source="results of queries, compared as in taoyds/test-suite-sql-eval, arXiv 2010.02840",
            score_rows=_by_pairs,
            all_or_nothing=True,
            parameters=ExecutionParameters,
            plugs_values=_plugs_values,
        )
    )
