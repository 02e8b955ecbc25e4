"""Runs on machines that share no files with this one: their folders are kept in a bucket, or wherever fsspec reaches.

Below its URL each file has its absolute path. A run's folder, and what it reads, are put there before its job starts.
On the machine this module is the program that fetches them to the same paths, carries out a command of `recipe`, and
keeps the bucket up to date meanwhile, so that a job that is begun again on another machine goes on from the last whole
checkpoint. What is there of a run is gathered whenever its state is asked for.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ..base import paths
from ..base.errors import UserError
from ..base.processes import start_child, stop_requests
from ..base.progress import say
from ..runs.rundir import Run, RunDir
from ..runs.tasks import Command

URL = "QLORA_RECIPES_BUCKET"
"""The variable of the environment that has the bucket's URL in a job."""
INTERVAL = 60
"""Seconds between two copies to the bucket: what a machine that is taken away may lose."""
SETTLED = 5
"""Seconds after which a file below output/ counts as written; before, it may be half of one."""
_ATTEMPTS = 5  # at the last copy, without which what was trained is lost
JOBS = "jobs.json"
"""A run's jobs, which are noted only where they are handed over."""

type Versions = dict[Path, tuple[int, int]]
"""The time of the last change, in ns, and the size in bytes of each file."""


class Bucket:
    """A bucket's files, each at the absolute path that it has on the machines.

    Raises:
        UserError: fsspec does not know the kind of the URL, or its library is not there.
    """

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        try:
            self._files, self._root = url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file:") else {}))
        except (ImportError, ValueError) as error:
            raise UserError(f"bucket {url}: {error}") from None

    def _name(self, path: Path) -> str:
        return self._root.rstrip("/") + path.absolute().as_posix()

    def download(self, path: Path, wanted: Callable[[PurePosixPath], bool] = lambda _: True) -> None:
        """Fetch a file, or a folder's files, as far as they differ from those here.

        Args:
            path: where it is on the machines, and comes to be here.
            wanted: whether a file is fetched, by its path in the folder.
        """
        top = PurePosixPath(self._name(path))
        self._files.invalidate_cache()
        for name, facts in self._files.find(str(top), detail=True).items():
            part_of = PurePosixPath(name).relative_to(top)
            if ".." in part_of.parts or part_of.name == JOBS or not wanted(part_of):
                continue
            file, changed = path / part_of, self._files.modified(name).timestamp()
            if file.is_file() and (file.stat().st_size, file.stat().st_mtime) == (facts["size"], changed):
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            self._files.get_file(name, str(part))
            os.utime(part, (changed, changed))
            part.replace(file)

    def upload(self, path: Path, former: Versions | None = None, last: bool = True) -> Versions:
        """Copy a file, or a folder's files, to the bucket.

        Args:
            path: what is copied.
            former: what the bucket has; of these, only what changed is copied, and what is gone is removed there.
            last: whether to copy, too, what may just be written.

        Returns:
            What the bucket has now.
        """
        found, kept = versions(path), former or {}
        copied: Versions = {}
        for file, version in found.items():
            if not last and "output" in file.parts and time.time() - version[0] / 1e9 < SETTLED:
                copied |= {file: kept[file]} if file in kept else {}
                continue
            try:
                if kept.get(file) != version:
                    self._files.put_file(str(file), self._name(file))
            except FileNotFoundError:
                if file.exists():  # then it is the bucket that is not there
                    raise
            else:
                copied[file] = version
        for file in kept.keys() - found.keys():
            self._files.rm_file(self._name(file))
        return copied


def versions(path: Path) -> Versions:
    """A folder's files but for its jobs and hidden ones, as locks and parts are; or the one file."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("[!.]*")) if file.name != JOBS]
    found: Versions = {}
    for file in filter(Path.is_file, files):
        with suppress(FileNotFoundError):  # gone meanwhile
            stat = file.stat()
            found[file] = stat.st_mtime_ns, stat.st_size
    return found


def read_by(record: Run, words: Sequence[str]) -> Iterator[Path]:
    """What a command reads beside its run's folder, as far as it is there: files, folders of the user's own studies.

    Args:
        record: the run's.
        words: the command's arguments: what to do, the run's folder, options, and where the runs are.
    """
    cwd = Path(record.cwd)
    named = [*(file.path for file in record.data), record.test_data, record.recipe_file, *words[2:-2]]
    yield from (cwd / name for name in named if name and not name.startswith("-"))
    if cwd.resolve() != paths.LOCK.parent:
        yield from (cwd / "recipes", cwd / "templates")


def put(url: str, commands: Sequence[Command]) -> None:
    """Put the folders of runs, and what commands read, into a bucket.

    Raises:
        UserError: it cannot be written to.
    """
    bucket = Bucket(url)
    inputs = {path for command in commands for path in read_by(command.folder.read(), command.words)}
    folders = {command.folder.path for command in commands}
    try:
        for path in sorted(path for path in inputs if path.exists()):
            bucket.upload(path)
        for path in folders:
            bucket.upload(path)
            bucket.upload(path / JOBS)
    except Exception as error:  # each kind of bucket raises its own
        raise UserError(f"bucket {url}: cannot be written to: {_reason(error)}") from None


def gather(url: str, folder: RunDir, ended: bool) -> bool:
    """Fetch what the bucket has of a run: its records, and what it wrote once it has ended; the checkpoints, too, where
    it is to be resumed. It is asked once a minute.

    Returns:
        Whether that went well; what did not is said.
    """
    return _gathered(url, folder.path.absolute(), ended, int(time.monotonic() / 60))


@lru_cache(maxsize=64)
def _gathered(url: str, path: Path, ended: bool, minute: int) -> bool:
    folder = RunDir(path)
    try:
        bucket = Bucket(url)
        bucket.download(path, lambda file: file.parts[0] != "output")
        if ended:
            finished = folder.read().state == "finished"
            bucket.download(path, lambda file: not (finished and "checkpoint-" in str(file)))
    except Exception as error:  # each kind of bucket raises its own
        say(f"{path}: what its bucket has of it cannot be fetched: {_reason(error)}")
        return False
    return True


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def main(log: Path, *words: str) -> int:
    """Carry out a command of `recipe` for a run on a machine that has nothing of it yet; its exit code.

    Args:
        log: the file in the run's folder that takes what the command says.
        words: the command's arguments.
    """
    bucket, folder = Bucket(os.environ[URL]), RunDir(log.parent)
    if not (folder.path / "run.json").is_file():
        bucket.download(folder.path)
        for path in read_by(folder.read(), words):
            bucket.download(path)
    record = folder.read()
    # agreed to where the run was made, whose seal means nothing here
    agreed = [*record.forced, *(["foreign-arguments"] if record.axolotl_arguments else [])]
    forced = [word for name in agreed for word in ("--force", name)]
    copied = versions(folder.path)
    with stop_requests() as stops, log.open("ab") as stream:
        command = [str(Path(sys.executable).with_name("recipe")), *words, *forced]
        child = start_child(command, stdout=stream, stderr=subprocess.STDOUT)
        passed_on, due = 0, time.monotonic() + INTERVAL
        while child.poll() is None:
            time.sleep(0.5)
            for number in stops[passed_on:]:
                child.send_signal(number)
            passed_on = len(stops)
            if time.monotonic() >= due:
                copied = _copied(bucket, folder, copied, last=False) or copied
                due = time.monotonic() + INTERVAL
        for attempt in range(_ATTEMPTS):
            if _copied(bucket, folder, copied, last=True):
                return child.returncode
            time.sleep(2**attempt)
    say(f"{folder.path}: could not be copied to its bucket")
    return child.returncode or 1


def _copied(bucket: Bucket, folder: RunDir, former: Versions, last: bool) -> Versions | None:
    """What the bucket has once a run's folder is copied; None where that failed, which must not end a training."""
    try:
        return bucket.upload(folder.path, former, last)
    except Exception as error:  # each kind of bucket raises its own
        say(f"{folder.path}: not copied to its bucket this time: {_reason(error)}")
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
