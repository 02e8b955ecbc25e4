"""Choice of rows by a limit, and states of files with evaluated rows."""

import hashlib
from heapq import nsmallest
from pathlib import Path

import orjson

from ..base.errors import UserError
from ..base.files import read_rows
from ..runs.records import FileState


def taken(total: int, limit: int | None) -> list[int]:
    """Positions that a limit takes from some rows, ascending.

    Their order is pseudo-random and fixed: a larger limit takes the rows of a smaller one, and further rows.
    """
    if limit is None or limit >= total:
        return [*range(total)]
    return sorted(nsmallest(limit, range(total), key=_rank))


def _rank(position: int) -> bytes:
    return hashlib.sha256(f"qlora-recipes {position}".encode()).digest()


class RowsState(FileState):
    """State of a file with evaluated rows.

    Attributes:
        path: absolute path.
        first: number of rows from the start of the file that belong to the data; None for all.
        rows_sha256: hash of these rows.
    """

    path: str
    first: int | None
    rows_sha256: str

    @classmethod
    def of_rows(cls, file: Path, first: int | None) -> "RowsState":
        """State of a file, of which all or the first rows belong to the data."""
        return cls(path=str(file.resolve()), first=first, rows_sha256=_digest(file, first), **vars(FileState.of(file)))

    @property
    def changed(self) -> bool:
        """True if the file has other rows now."""
        return self.differs(Path(self.path)) and _digest(Path(self.path), self.first) != self.rows_sha256


def _digest(file: Path, first: int | None) -> str:
    """Hash of a JSONL file's rows; empty if they are not JSON."""
    try:
        return hashlib.sha256(orjson.dumps(read_rows(file, ())[:first])).hexdigest()
    except UserError:
        return ""
