"""Fetches a data set of a hub, as JSON lines, and a single file of a repository."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson

from ..base.errors import UserError, WorkFailed
from ..base.files import Output
from ..base.progress import Bar
from ..base.quiet import limit_waiting
from .archive import FileRow, Rejected, row_of
from .declaration import Source

_BATCH = 1000  # rows that are in memory at once


def write_dataset(stack: ExitStack, name: str, source: Source, out: Path, copy: Path | None, by_hand: str) -> FileRow:
    """Write a split of a data set as JSON lines, which take their place when the stack is left without an error.

    What is downloaded stays in the hub's own cache, from which an interrupted download is resumed.

    Args:
        copy: a folder with a copy of the repository, to read instead of the hub.

    Raises:
        UserError: the hub has no such data set, or refuses it.
        WorkFailed: the hub cannot be reached.
        Rejected: it has another number of rows, or another checksum.
    """
    output = Output(stack, out / name)
    count = 0
    for line in _asked(source, by_hand, lambda: _lines(name, source, copy)):
        output.write(line)
        count += 1
    output.stream.flush()
    if source.rows not in (None, count):
        raise Rejected(f"{name} is not the study's: rows {source.rows} expected, {count} found")
    return row_of(name, output.bytes, output.sha256(), source)


def _lines(name: str, source: Source, copy: Path | None) -> Iterator[bytes]:
    import datasets

    datasets.disable_progress_bars()
    where = str(copy) if copy else source.hub
    revision = None if copy else source.revision
    rows = datasets.load_dataset(where, source.config, split=source.split, revision=revision)
    with Bar(f"{name}, rows", len(rows)) as bar:
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for values in zip(*batch.values(), strict=True):
                yield orjson.dumps(dict(zip(batch, values, strict=True)), default=str) + b"\n"
            bar.update(min(start + _BATCH, len(rows)))


def download_file(name: str, source: Source, staging: Path, by_hand: str) -> Path:
    """A file of a repository, in a folder that is not its place yet; an interrupted download is resumed there.

    Raises:
        UserError: the hub has no such file, or refuses it.
        WorkFailed: the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    file = source.file or name

    def load() -> Iterator[str]:
        yield hf_hub_download(str(source.hub), file, revision=source.revision, local_dir=staging)

    return Path(next(iter(_asked(source, by_hand, load))))


def _asked[T](source: Source, by_hand: str, ask: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What a hub's client yields, its errors in this project's words."""
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError
    from huggingface_hub import errors

    limit_waiting()
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    try:
        yield from ask()
    except errors.GatedRepoError as error:
        remedy = "ask for access on its page, then `hf auth login`"
        raise UserError(f"{source.hub}: {_first_line(error)}; {remedy}") from None
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise WorkFailed(f"{source.hub}: the hub cannot be reached: {_first_line(error)}; {by_hand}") from None
    except (*absent, DatasetsError, ValueError) as error:  # a ValueError of datasets, of a name that it has not
        raise UserError(f"{source.hub}: {_first_line(error)}; {by_hand}") from None
    except RecursionError:  # of JSON in an answer
        raise WorkFailed(f"{source.hub}: the hub's answer is nested too deeply; {by_hand}") from None
    except HTTPError as error:  # of which the hub's other ones are
        raise WorkFailed(f"{source.hub}: {_first_line(error)}; run it again, or {by_hand}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
