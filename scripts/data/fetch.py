"""Fetches a data set's files from where they are published, verifies them, and puts them in place together."""

import errno
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..base.errors import UserError, WorkFailed
from ..base.files import DAMAGED_ZIP, Output, read_json, sha256, write_json
from ..base.locks import held
from ..base.machine import now
from ..base.progress import say
from .archive import FileRow, Rejected, extract, row_of
from .declaration import Data, Source
from .download import CHUNK, Part, check_space, download, public

RECORD = "fetched.json"


def fetch(data: Data, out: Path, given: str | None = None, only: Collection[str] | None = None) -> list[FileRow]:
    """Put the data set's files into a folder, unless they are there, and record in fetched.json what they are.

    An interrupted download stays as <file>.part, from which the next call resumes; what is of a hub stays in its cache
    or in .hub. What is not as the study says becomes <file>.rejected. No file is replaced before all are verified.

    Args:
        data: the study's data; its sources say where everything is.
        out: the folder to write to.
        given: another place of a source: its address at a mirror, the path of a copy of it, or a folder (or an address
            that ends in /) with several, under the names of the sources. Copies are only read.
        only: the sources that are wanted; by default all.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if the study has no checksum.

    Raises:
        UserError: there is no such source, too little space, or a file is damaged or another one.
        WorkFailed: a server cannot be reached, fails, or breaks off too often, or the disk is full.
    """
    places = _places(data, given, only)
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is running"), _disk_errors(out):
        wanted = [name for name in data.sources if only is None or name in only]
        there = _present(data, out, wanted)
        if there.keys() >= set(wanted):
            say(f"{out}: all files are there, as recorded in {RECORD}; nothing is fetched")
        else:
            with ExitStack() as stack:
                fetching = _Fetching(data, out, stack)
                for name in wanted:
                    if name not in there:
                        there[name] = fetching.source(name, places[name])
                stack.close()  # puts the files in place
            fetching.finish(there)
        return [row for name in wanted for row in there[name]]


def _places(data: Data, given: str | None, only: Collection[str] | None) -> dict[str, str | Path | None]:
    """For each source the address to download it from, or the path of a copy; None for one of a hub."""
    usual: dict[str, str | Path | None] = {name: source.url for name, source in data.sources.items()}
    if given is None:
        return usual
    if re.match("https?://", given, re.IGNORECASE):
        if re.search("[^/:]/$", given):
            return usual | {name: f"{given}{name}" for name, source in data.sources.items() if source.url}
        return usual | {_meant(data, public(given).rpartition("/")[2], public(given), only): given}
    path = Path(given)
    if given and path.is_dir():
        copies = {name: copy for name, source in data.sources.items() if (copy := _copy_in(path, name, source))}
        if copies:
            return usual | copies
        raise UserError(f"{given}: holds none of {', '.join(data.sources)}")
    if not path.is_file():
        raise UserError(f"{public(given)}: no such file, nor an address that begins with http:// or https://")
    return usual | {_meant(data, path.name, given, only): path}


def _copy_in(folder: Path, name: str, source: Source) -> Path | None:
    """The copy of a source in a folder: the file of its name, or a copy of a hub's repository."""
    if (folder / name).is_file():
        return folder / name
    repository = folder / str(source.hub).rpartition("/")[2]
    return repository if source.hub and source.kind == "dataset" and repository.is_dir() else None


def _meant(data: Data, name: str, given: str, only: Collection[str] | None) -> str:
    """The source that a copy is of: the only one, or that of its name, one that is wanted before others."""
    if len(data.sources) == 1:
        return next(iter(data.sources))
    of_name = [source for source in data.sources if Path(source).name == name]
    if found := [source for source in of_name if source in (only or ())] or of_name:
        return found[0]
    raise UserError(f"{given}: none of the sources has that name; there are {', '.join(data.sources)}")


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Name the folder in a disk error that names no file, as one from a write to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise WorkFailed(
            f"{out}: {error.strerror or error}; what is downloaded stays; run it again to resume"
        ) from None


def _present(data: Data, out: Path, wanted: Collection[str]) -> dict[str, list[FileRow]]:
    """The rows of the sources whose files are all there, as fetched.json records and the study wants them; says which
    files of those that are wanted are otherwise."""
    recorded = {was["file"]: was for was in read_json(out / RECORD).get("files", [])}
    present = {}
    for source_name, source in data.sources.items():
        rows = []
        files = source.files or {source_name: source}
        for name, known in files.items():
            file = out / name
            was = recorded.get(name)
            if (
                was
                and known.sha256 in (None, was["sha256"])
                and file.is_file()
                and file.stat().st_size == was["bytes"]
                and (file.stat().st_mtime_ns == was["mtime_ns"] or sha256(file) == was["sha256"])
            ):
                verified = True if known.sha256 else None
                rows.append({"file": name, "bytes": was["bytes"], "sha256": was["sha256"], "verified": verified})
            elif source_name in wanted and (was or file.exists()):
                say(f"{file}: not as recorded in {RECORD}; it is fetched again")
        if len(rows) == len(files):
            present[source_name] = rows
    return present


@dataclass
class _Fetching:
    """What is fetched in one go; the files take their places when the stack is closed, and at the end."""

    data: Data
    out: Path
    stack: ExitStack
    parts: list[Part] = field(default_factory=list)
    moves: dict[Path, Path] = field(default_factory=dict)  # files that are whole, and their places
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def staging(self) -> Path:
        return self.out / ".hub"

    def source(self, name: str, place: str | Path | None) -> list[FileRow]:
        """Fetch and verify a source; the rows of its files."""
        source = self.data.sources[name]
        way = f"download {public(source.url)}" if source.url else f"download {source.hub} of the hub"
        by_hand = (
            f"{way} (the data's page: {self.data.source}) on another machine, copy it here, and run "
            f"`recipe data fetch {self.data.key} --from FILE{f' --only {name}' if len(self.data.sources) > 1 else ''}`"
        )
        self.record[name] = {
            "from": str(place.resolve()) if isinstance(place, Path) else public(place or source.hub or "")
        }
        self.record[name] |= {"revision": source.revision} if place is None else {}
        self.record[name]["time"] = now()
        if isinstance(place, str):
            part = download(place, self.out / name, source.bytes or 0, by_hand)
            self.parts.append(part)
            with _content_errors(part.file, part):
                return self._files(name, source, part.file, part)
        if isinstance(place, Path):
            with _content_errors(place, None):
                return self._files(name, source, place, None, by_hand)
        with _content_errors(self.out / name, None):
            return [self._of_hub(name, source, by_hand)]

    def _files(self, name: str, source: Source, file: Path, part: Part | None, by_hand: str = "") -> list[FileRow]:
        """The files of a source that is on this machine: downloaded, if it is a part, else the user's own."""
        if source.files:
            digest = sha256(file)
            row_of(name, file.stat().st_size, digest, source, exact=False)
            self.record[name] |= {"bytes": file.stat().st_size, "sha256": digest}
            return extract(self.stack, file, source.files, self.out)
        if part:
            self.moves[file] = self.out / name
            return [row_of(name, file.stat().st_size, sha256(file), source)]
        if file.is_dir():
            from .hubdata import write_dataset

            return [write_dataset(self.stack, name, source, self.out, file, by_hand)]
        check_space(self.out, file.stat().st_size, "copying")
        output = Output(self.stack, self.out / name)
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                output.write(chunk)
        output.stream.flush()
        return [row_of(name, output.bytes, output.sha256(), source)]

    def _of_hub(self, name: str, source: Source, by_hand: str) -> FileRow:
        from .hubdata import download_file, write_dataset

        if source.kind == "dataset":
            return write_dataset(self.stack, name, source, self.out, None, by_hand)
        file = download_file(name, source, self.staging / name.replace("/", "--"), by_hand)
        self.moves[file] = self.out / name
        try:
            return row_of(name, file.stat().st_size, sha256(file), source)
        except Rejected:
            shutil.rmtree(self.staging)
            raise

    def finish(self, there: dict[str, list[FileRow]]) -> None:
        """Put what is whole in place, record it, and remove what is not needed any more."""
        for file, place in self.moves.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        files = [
            row | {"mtime_ns": (self.out / str(row["file"])).stat().st_mtime_ns}
            for rows in there.values()
            for row in rows
        ]
        former = read_json(self.out / RECORD).get("sources", {})
        record = {"made_by": f"qlora-recipes {__version__}", "sources": former | self.record, "files": files}
        write_json(self.out / RECORD, record)
        for part in self.parts:
            part.remove()
        shutil.rmtree(self.staging, ignore_errors=True)


@contextmanager
def _content_errors(file: Path, part: Part | None) -> Iterator[None]:
    """Report what is wrong with a source; what was downloaded is removed or, if it can be read, set aside."""
    try:
        yield
    except DAMAGED_ZIP as error:
        if part:
            part.remove()
        remedy = "it is removed; fetch it again" if part else "download it again"
        raise UserError(f"{file}: not a zip, or a damaged one ({error}); {remedy}") from None
    except (Rejected, RuntimeError) as error:  # zipfile's for what is encrypted, or packed by another method
        remedy = ""
        if part:
            remedy = f"; it is now {part.file.replace(part.file.with_suffix('.rejected'))}; the next fetch starts over"
            part.remove()
        raise UserError(f"{file}: {error}{remedy}") from None
