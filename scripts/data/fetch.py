"""Fetches a data set's files from where they are published, verifies them, and puts them in place together."""

import re
import shutil
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .. import __version__
from ..base.errors import UserError
from ..base.files import DAMAGED_ZIP, naming, read_json, sha256, write_json
from ..base.machine import now
from ..base.processes import held
from ..base.progress import say
from .declaration import Data, Source, SourceFile
from .download import check_space, download, hub_file, public, version_file, write_dataset

RECORD = "fetched.json"
FileRow = dict[str, Any]


class Rejected(Exception):
    """A file's content is not what the study says."""


def fetch(data: Data, out: Path, given: str | None = None, only: Collection[str] | None = None) -> list[FileRow]:
    """Put the data set's files into a folder, unless they are there, and record in fetched.json what they are.

    An interrupted download stays as <file>.part, from which the next call resumes; downloads from the hub stay in its
    cache. A file that is not as the study says becomes <file>.rejected. No file is replaced before all are verified.

    Args:
        data: the study's data; its sources say where everything is.
        out: the folder to write to.
        given: another place of a source: an address, the path of a copy of it, or a folder with several, under the
            names of the sources. Copies are only read.
        only: the wanted sources; by default all.

    Returns:
        A row for each file: `file`, `bytes`, `sha256`, and `verified`, which is None if the study has no checksum.

    Raises:
        UserError: there is no such source, too little space, or a file is damaged or another one.
        WorkFailed: a server cannot be reached, fails, or breaks off too often.
        OSError: the disk is full.
    """
    wanted = [name for name in data.sources if only is None or name in only]
    places = _given(data, given, wanted)
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".fetch.lock", "another fetch is running"), naming(out):
        there = _present(data, out, wanted)
        missing = [name for name in wanted if name not in there]
        if missing:
            for left in out.glob(".fetching-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=out, prefix=".fetching-") as staging:
                fetching = _Fetching(data, out, Path(staging))
                there |= {name: fetching.source(name, places.get(name)) for name in missing}
                fetching.finish(there)
        else:
            say(f"{out}: all files are there, as recorded in {RECORD}; nothing is fetched")
        return [row for name in wanted for row in there[name]]


def _given(data: Data, given: str | None, wanted: list[str]) -> dict[str, str | Path]:
    """The addresses and copies that a user names, by source."""
    if given is None:
        return {}
    path = Path(given)
    if given and path.is_dir():
        copies = {name: copy for name, source in data.sources.items() if (copy := _copy_in(path, name, source))}
        if not copies:
            raise UserError(f"{given}: holds none of {', '.join(data.sources)}")
        return dict(copies)
    is_address = re.match("https?://", given, re.IGNORECASE)
    if not is_address and not path.is_file():
        raise UserError(f"{public(given)}: no such file, nor an address that begins with http:// or https://")
    name = PurePath(public(given)).name
    named = wanted if len(wanted) == 1 else [source for source in wanted if PurePath(source).name == name]
    if not named:
        raise UserError(
            f"{public(given)}: no source of that name; there are {', '.join(data.sources)}; name it by --only"
        )
    return {named[0]: given if is_address else path}


def _copy_in(folder: Path, name: str, source: Source) -> Path | None:
    """The copy of a source in a folder: the file of its name, or a copy of a hub's repository."""
    if (folder / name).is_file():
        return folder / name
    repository = folder / str(source.hub).rpartition("/")[2]
    return repository if source.hub and source.kind == "dataset" and repository.is_dir() else None


def _present(data: Data, out: Path, wanted: list[str]) -> dict[str, list[FileRow]]:
    """The rows of the sources whose files are all there, as fetched.json records and the study wants them; reports
    wanted files that are otherwise."""
    recorded = {was["file"]: was for was in read_json(out / RECORD).get("files", [])}
    present = {}
    for source_name, source in data.sources.items():
        files = source.files or {source_name: source}
        rows = [
            {"file": name, "bytes": was["bytes"], "sha256": was["sha256"], "verified": True if known.sha256 else None}
            for name, known in files.items()
            if (was := recorded.get(name)) and known.sha256 in (None, was["sha256"]) and _is_as(out / name, was)
        ]
        if len(rows) == len(files):
            present[source_name] = rows
        elif source_name in wanted and (there := [name for name in files if name in recorded or (out / name).exists()]):
            say(f"{out}: not as recorded in {RECORD}, and fetched again: {', '.join(there)}")
    return present


def _is_as(file: Path, was: dict[str, Any]) -> bool:
    """Whether a file is as fetched.json recorded it; its content is only read where its time differs."""
    if not file.is_file() or file.stat().st_size != was["bytes"]:
        return False
    return file.stat().st_mtime_ns == was["mtime_ns"] or sha256(file) == was["sha256"]


def _verified(name: str, file: Path, known: SourceFile) -> FileRow:
    """The row of a file.

    Raises:
        Rejected: it is not the study's.
    """
    size, digest = file.stat().st_size, sha256(file)
    for key, expected, found in (("bytes", known.bytes, size), ("sha256", known.sha256, digest)):
        if expected not in (None, found):
            raise Rejected(f"{name} is not the study's: {key} {expected} expected, {found} found")
    return {"file": name, "bytes": size, "sha256": digest, "verified": True if known.sha256 else None}


@dataclass
class _Fetching:
    """Files that are fetched together; they take their places at the end."""

    data: Data
    out: Path
    staging: Path
    places: dict[str, Path] = field(default_factory=dict)  # verified files, by the name that they will have
    record: dict[str, Any] = field(default_factory=dict)

    def source(self, name: str, given: str | Path | None) -> list[FileRow]:
        """Fetch and verify a source; the rows of its files."""
        source = self.data.sources[name]
        place = given or source.url or str(source.hub)
        origin = str(place.resolve()) if isinstance(place, Path) else public(place)
        self.record[name] = {"from": origin, "revision": None if given else source.revision, "time": now()}
        by_hand = (
            f"download {public(source.url or str(source.hub))} (page: {self.data.source}) on another machine, copy it "
            f"here, and run `recipe data fetch {self.data.key} --only {name} --from FILE`"
        )
        part = self.out / f"{name}.part"
        file = part
        try:
            if isinstance(given, Path) and given.is_file():
                file = given
            elif url := given if isinstance(given, str) else source.url:
                download(url, part, source.bytes or 0, by_hand)
            elif source.kind == "model":
                file = hub_file(source, source.file or name, by_hand)
            else:
                file = self._dataset(name, source, Path(given) if given else None, by_hand)
            if source.files:
                return self._extracted(file, source)
            self.places[name] = file if file == part else self._copied(name, file)
            return [_verified(name, file, source)]
        except (Rejected, RuntimeError, *DAMAGED_ZIP) as error:  # RuntimeError: encrypted, or packed by another method
            aside = ""
            if file == part and part.exists():
                aside = f"; it is now {part.replace(part.with_suffix('.rejected'))}; the next fetch starts over"
                version_file(part).unlink()
            raise UserError(f"{file}: {error}{aside}") from None

    def _dataset(self, name: str, source: Source, copy: Path | None, by_hand: str) -> Path:
        """A data set of a hub, or a copy of it, as JSON lines."""
        file = self.staging / name
        file.parent.mkdir(parents=True, exist_ok=True)
        count = write_dataset(source, copy, file, by_hand)
        if source.rows not in (None, count):
            raise Rejected(f"{name} is not the study's: rows {source.rows} expected, {count} found")
        return file

    def _copied(self, name: str, file: Path) -> Path:
        copy = self.staging / name
        if file != copy:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        return copy

    def _extracted(self, file: Path, source: Source) -> list[FileRow]:
        """The rows of the wanted files of a zip, which are extracted by their names alone."""
        files = source.files or {}
        _verified(file.name, file, SourceFile(sha256=source.sha256))
        with zipfile.ZipFile(file) as archive:
            members = {name: [m for m in archive.infolist() if PurePath(m.filename).name == name] for name in files}
            if wrong := [name for name, found in members.items() if len(found) != 1]:
                raise Rejected(f"{', '.join(wrong)}: not in it, or twice")
            check_space(self.out, sum(found[0].file_size for found in members.values()), "extracting")
            for name, (member,) in members.items():
                self.places[name] = self.staging / name
                with archive.open(member) as stream, self.places[name].open("wb") as copy:
                    shutil.copyfileobj(stream, copy)
        return [_verified(name, self.places[name], known) for name, known in files.items()]

    def finish(self, there: dict[str, list[FileRow]]) -> None:
        """Put all files in place, record them, and remove downloads that are not needed any more."""
        for name, file in self.places.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(self.out / name)
        files = [
            row | {"mtime_ns": (self.out / row["file"]).stat().st_mtime_ns} for rows in there.values() for row in rows
        ]
        former = read_json(self.out / RECORD).get("sources", {})
        record = {"made_by": f"qlora-recipes {__version__}", "sources": former | self.record, "files": files}
        write_json(self.out / RECORD, record)
        for name in self.record:
            for left in (self.out / f"{name}.part", version_file(self.out / f"{name}.part")):
                left.unlink(missing_ok=True)
