"""Results of queries: the rules of the comparison, and queries that attack it."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.metrics import registry
from qlora_recipes.metrics.execution import ExecutionMetric
from qlora_recipes.metrics.execution_worker import equal

TABLES = """
CREATE TABLE book (id INTEGER, title TEXT, year INTEGER, pages INTEGER);
INSERT INTO book VALUES (1, 'Emma', 1815, 400), (2, 'Dune', 1965, 400), (3, 'Ulysses', 1922, 700);
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """SQLite file with three books."""
    return write(tmp_path / "shop.sqlite", TABLES)


def write(file: Path, statements: str) -> Path:
    """Write a SQLite file."""
    with closing(sqlite3.connect(file)) as database:
        database.executescript(statements)
    return file


def scores(rows: list[dict[str, str]], name: str = "execution", **parameters: object) -> list[float]:
    """Scores of rows."""
    column = registry.column(name, parameters)
    assert isinstance(column.metric, ExecutionMetric)
    return column.metric.scores_of(rows, column.parameters)


def score(reference: str, prediction: str, name: str = "execution", **parameters: object) -> float:
    """Score of a row whose database is made of the statements above, unless the parameters name files."""
    row = {"reference": reference, "prediction": prediction}
    if "databases" not in parameters:
        row["database_sql"] = TABLES
    return scores([row], name, **parameters)[0]


TITLES = "SELECT title FROM book"


def test_the_results_count_not_the_text():
    assert scores(
        [
            {"reference": reference, "prediction": prediction, "database_sql": TABLES}
            for reference, prediction in (
                (TITLES, TITLES),
                (TITLES, "select B.title from book as B order by year"),  # any order, because the reference has none
                ("SELECT id, year FROM book", "SELECT year, id FROM book"),  # any order of columns
                (f"{TITLES} ORDER BY id", f"{TITLES} ORDER BY year"),  # in order
                (f"{TITLES} ORDER\nBY id", f"{TITLES} ORDER BY year"),
                (f"{TITLES} WHERE title <> 'order by'", f"{TITLES} ORDER BY year"),  # no order
                ("SELECT id FROM book WHERE id > 9", "SELECT title, year FROM book WHERE year > 2000"),  # both empty
                ("SELECT pages FROM book", "SELECT DISTINCT pages FROM book"),
                (TITLES, f"{TITLES} WHERE id < 3"),
                (TITLES, "SELECT title, id FROM book"),
                (TITLES, "SELECT name FROM book"),
                (TITLES, ""),
                (f"{TITLES} WHERE id > 9", "-- only a comment"),
                (TITLES, f"{TITLES}; {TITLES}"),
            )
        ]
    ) == [100, 100, 100, 0, 0, 100, 100, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("expected", "result", "ordered", "is_equal"),
    [
        ([(1, 2), (3, 4)], [(4, 3), (2, 1)], False, True),
        ([(1, 2), (3, 4)], [(4, 3), (2, 1)], True, False),
        ([(1, 2), (2, 1)], [(1, 1), (2, 2)], False, False),  # the same values in each column, but not in each row
        ([(1, 1), (1, 1), (2, 2)], [(1, 1), (2, 2), (2, 2)], False, False),
        ([(1,)], [(1.0,)], False, True),
        ([(1,)], [("1",)], False, False),
        ([(None, 1)], [(1, None)], False, True),
        ([tuple(range(30))], [tuple(range(29, -1, -1))], False, True),
    ],
)
def test_rows_are_compared_for_any_order_of_columns(expected, result, ordered, is_equal):
    assert equal(expected, result, ordered) is is_equal


@pytest.mark.parametrize(
    ("reference", "prediction"),
    [
        ("SELECT DISTINCT pages FROM book", "SELECT pages FROM book"),
        ("SELECT id FROM book WHERE id >= 1", "SELECT id FROM book WHERE id > = value"),
        (TITLES, f"{TITLES}\tan explanation"),
        (TITLES, "SELECT title\nFROM book;"),
        (TITLES, f"{TITLES} WHERE year < YEAR(CURDATE())"),
    ],
)
def test_spiders_rules_apply_on_request(reference, prediction):
    assert score(reference, prediction, spider=True) == 100
    if "\n" not in prediction:
        assert score(reference, prediction) == 0


def test_only_plug_value_takes_values_from_the_expected_query():
    reference, prediction = f"{TITLES} WHERE title = 'Emma' OR id = 3", f"{TITLES} WHERE id = 7 OR title = 'Nemo'"
    assert score(reference, prediction) == 0
    assert score(reference, prediction, "execution_plug_value") == 100
    assert score(reference, f"{TITLES} WHERE id > 7 OR title = 'Nemo'", "execution_plug_value") == 0
    assert "plug_value" in registry.column("execution_plug_value").label


def test_a_folder_has_databases_by_name_and_all_files_of_one_must_agree(tmp_path):
    (tmp_path / "suite").mkdir()
    write(tmp_path / "suite/suite.sqlite", TABLES)
    write(tmp_path / "suite/other.sqlite", f"{TABLES} UPDATE book SET pages = id;")
    write(tmp_path / "one.sqlite", TABLES)
    row = {"reference": "SELECT id FROM book WHERE pages = 700", "prediction": "SELECT max(id) FROM book"}
    rows = [row | {"database": "one"}, row | {"database": "suite"}]
    assert scores(rows, databases=str(tmp_path)) == [100, 0]
    messages = []
    for name in ("two", "../shop", "..", ""):
        with pytest.raises(UserError) as error:
            scores([row | {"database": name}], databases=str(tmp_path))
        messages.append(error.value.problem)
    assert messages == [
        "no SQLite file of the database two",
        "no SQLite file of the database ../shop",
        "no SQLite file of the database ..",
        "the row has no field database, which names one",
    ]
    with pytest.raises(UserError, match="no databases"):
        scores([row])


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"
ATTACKS = {
    "writes": "INSERT INTO book VALUES (9, 'Nine', 1999, 9)",
    "drops": "DROP TABLE book",
    "attaches": "ATTACH 'attached.sqlite' AS other",
    "vacuums": "VACUUM INTO 'vacuumed.sqlite'",
    "loads": "SELECT load_extension('libc.so.6')",
    "pragma": "PRAGMA writable_schema = 1",
    "recursion": f"{ENDLESS} count(*) FROM n",
    "many rows": "SELECT a.id FROM " + ", ".join(f"book {name}" for name in "abcdefghijklmnopqrstu"),
    "memory": f"{ENDLESS} group_concat(hex(randomblob(1000000)), '') FROM n",
    "rows in memory": f"{ENDLESS} i, randomblob(100000) FROM n ORDER BY 2",
    "value": "SELECT printf('%.*c', 200000000, 'x')",
    "long": f"{TITLES} {' ' * 200_000_000}",
    "nested": f"SELECT {'(' * 40_000}1{')' * 40_000}",
    "null": "SELECT '\0'",
    "surrogate": "SELECT '\ud800'",
}


@pytest.mark.parametrize("metric", ["execution", "execution_plug_value"])
def test_attacks_are_wrong_answers_that_change_nothing(shop, tmp_path, monkeypatch, metric):
    """Takes seconds, because three attacks use the whole time of a row."""
    monkeypatch.chdir(tmp_path)
    before = shop.read_bytes()
    rows = [{"reference": TITLES, "prediction": attack} for attack in [*ATTACKS.values(), TITLES]]
    start = time.monotonic()
    verdicts = dict(zip([*ATTACKS, "right"], scores(rows, metric, databases=str(shop), seconds=1), strict=True))
    assert verdicts == dict.fromkeys(ATTACKS, 0.0) | {"right": 100.0}
    assert time.monotonic() - start < 60
    assert shop.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["shop.sqlite"]


def test_statements_that_create_a_database_reach_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"reference": "SELECT 1", "prediction": "SELECT 1"}
    for statements in ("ATTACH 'a.sqlite' AS a; CREATE TABLE a.t (i);", "CREATE TABLE t (i); VACUUM INTO 'v.sqlite';"):
        assert scores([row | {"database_sql": statements}]) == [0]
    assert not list(tmp_path.iterdir())


def test_a_locked_file_is_read_and_a_damaged_one_is_reported(shop, tmp_path, capsys):
    with closing(sqlite3.connect(shop, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        assert score(TITLES, TITLES, databases=str(shop)) == 100
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(shop.read_bytes()[:100] + b"x" * 8000)
    assert score(TITLES, TITLES, databases=str(damaged)) == 0
    assert capsys.readouterr().err == (
        "warning: execution: 1 of 1 expected queries fail, so their rows score 0 (DatabaseError: database disk image "
        "is malformed); correct the queries or `databases`\n"
    )


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_file_with_unfinished_changes_beside_it_is_refused(shop, tmp_path, mode):
    """A copy made during a transaction, as after a crash: the log or journal is hot."""
    copy = tmp_path / "copy.sqlite"
    with closing(sqlite3.connect(shop, isolation_level=None)) as writer:
        writer.execute(f"PRAGMA journal_mode = {mode}")
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN")
        writer.execute("INSERT INTO book SELECT 4, hex(randomblob(9999)), id, id FROM book")
        writer.execute("COMMIT" if mode == "WAL" else "SELECT 1")
        for file in list(tmp_path.glob("shop.sqlite*")):
            (tmp_path / file.name.replace("shop", "copy")).write_bytes(file.read_bytes())
    log = "copy.sqlite-wal" if mode == "WAL" else "copy.sqlite-journal"
    with pytest.raises(UserError) as error:
        score(TITLES, TITLES, databases=str(copy))
    assert error.value.problem == f"has unfinished changes in {log}"
    with closing(sqlite3.connect(copy)) as database:  # the remedy
        database.execute("PRAGMA journal_mode = DELETE")
        number = len(database.execute(TITLES).fetchall())
    assert number == (6 if mode == "WAL" else 3)
    assert score("SELECT count(*) FROM book", f"SELECT {number}", databases=str(copy)) == 100


def test_queries_beyond_a_limit_are_counted(capsys):
    endless = f"{ENDLESS} count(*) FROM n"
    rows = [{"reference": endless, "prediction": TITLES}, {"reference": TITLES, "prediction": endless}]
    rows.append({"reference": TITLES, "prediction": TITLES})
    assert scores([row | {"database_sql": TABLES} for row in rows], seconds=0.3) == [0, 0, 100]
    assert capsys.readouterr().err == (
        "warning: execution: 1 of 3 expected queries fail, so their rows score 0 (exceeds 0.3 s or 1024 MiB); correct "
        "the queries or `databases`\n"
        "warning: execution: 1 of 3 predicted queries exceed 0.3 s or 1024 MiB and score 0\n"
    )


def test_undecodable_text_is_compared_without_its_wrong_bytes(tmp_path):
    file = write(tmp_path / "latin.sqlite", "CREATE TABLE t (a TEXT); INSERT INTO t VALUES (CAST(x'61e962' AS TEXT));")
    assert score("SELECT a FROM t", "SELECT 'ab'", databases=str(file)) == 100
