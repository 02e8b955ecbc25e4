"""Runs on machines that share no files with this one: their folders are kept in a bucket, or wherever fsspec reaches.

Below its URL each file has its absolute path. A run's folder, and what it reads, are put there before its job starts.
On the machine this module is the program that fetches them to the same paths, carries out a command of `recipe`, and
keeps the bucket up to date meanwhile, so that a job that is begun again on another machine goes on from the last whole
checkpoint. What is there of a run is gathered when its state is asked for.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path, PurePosixPath

from ..base import paths, yamlfiles
from ..base.errors import UserError
from ..base.processes import start_child, stop_requests
from ..base.progress import say
from ..runs.rundir import RunDir
from ..runs.tasks import Command
from ..scores import evaluations
from ..scores.evaluations import PREDICTIONS, SCORES

URL = "QLORA_RECIPES_BUCKET"
"""The variable of the environment that has the bucket's URL in a job."""
FILES = "QLORA_RECIPES_FILES"
"""The one with what its commands read beside their runs' folders, quoted as for a shell."""
INTERVAL = 60
"""Seconds between two copies to the bucket: what a machine that is taken away may lose."""
SETTLED = 5
"""Seconds after which a checkpoint's file counts as written; before, it may be half of one."""
_ATTEMPTS = 5  # at the first and the last copy, without which what was trained is lost
_SMALL = 1_000_000  # bytes that are rather copied again
_RECORD = "run.json"
_MADE_ANEW = (PREDICTIONS, SCORES)  # what `evaluate` may have made here while a job of the run went on
_PATHS = ("deepspeed", "lora_model_dir", "chat_template_jinja")  # keys that may name a file or folder
_JOBS = "jobs.json"  # written only where jobs are handed over

type Versions = dict[Path, tuple[float, int]]
"""The time of the last change, in seconds, and the size in bytes of each file."""


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
        return self._root.rstrip("/") + paths.unlinked(path).as_posix()

    def versions(self, path: Path) -> Versions:
        """What there is of a file or folder: where each file belongs, and when it came to the bucket."""
        top = PurePosixPath(self._name(path))
        self._files.invalidate_cache()
        found = self._files.find(str(top), detail=True)
        names = {name: PurePosixPath(name).relative_to(top) for name in found}
        return {
            path / below: (self._files.modified(name).timestamp(), found[name]["size"])
            for name, below in names.items()
            if ".." not in below.parts and below.name != _JOBS
        }

    def download(
        self, path: Path, wanted: Callable[[PurePosixPath], bool] = lambda _: True, stay: Container[str] = ()
    ) -> bool:
        """Fetch a file, or a folder's files, as far as they differ from those here; whether there are any.

        Args:
            path: where it is on the machines, and comes to be here.
            wanted: whether a file is fetched, by its path in the folder.
            stay: the names of files that stay as they are here where they are newer.
        """
        found = self.versions(path)
        here = versions(path)
        for file, version in sorted(found.items(), key=_last_the_record):
            stays = file.name in stay and file in here and here[file][0] > version[0]
            if here.get(file) == version or stays or not wanted(PurePosixPath(file.relative_to(path))):
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.{os.getpid()}.part")
            self._files.get_file(self._name(file), str(part))
            os.utime(part, (version[0], version[0]))
            part.replace(file)
        return bool(found)

    def has(self, path: Path) -> Versions:
        """Those files of a folder here, or the one file, that need not be copied: large ones that the bucket has of the
        same size, and no older."""
        there = self.versions(path)
        return {
            file: version
            for file, version in versions(path).items()
            if version[1] > _SMALL and file in there and there[file][1] == version[1] and there[file][0] >= version[0]
        }

    def upload(self, path: Path, kept: Versions, last: bool = True) -> None:
        """Copy what changed of a file, or of a folder's files, to the bucket; what is gone is removed there.

        Args:
            path: what is copied.
            kept: what the bucket has of it, which is brought up to date.
            last: whether to copy, too, what may just be written.
        """
        found = versions(path)
        unsettled = [
            file
            for file, (changed, _) in found.items()
            if not last and _is_written_at_once(file, path) and time.time() - changed < SETTLED
        ]
        for file, version in sorted(found.items(), key=_last_the_record):
            if kept.get(file) == version or file in unsettled:
                continue
            try:
                self._files.put_file(str(file), self._name(file))
            except FileNotFoundError:
                if file.exists():  # then it is the bucket that is not there
                    raise
            else:
                kept[file] = version
        for file in kept.keys() - found.keys() if not unsettled else ():  # a checkpoint only once there is the next one
            with suppress(FileNotFoundError):
                self._files.rm_file(self._name(file))
            del kept[file]


def _is_written_at_once(file: Path, folder: Path) -> bool:
    """Whether a file of a run is written once: part of a checkpoint or adapter, or the record that says it is there."""
    return file == folder / _RECORD or (file.is_relative_to(folder / "output") and file.suffix != ".log")


def _last_the_record(item: tuple[Path, tuple[float, int]]) -> tuple[bool, Path]:
    """The order in which files are copied: what a record says is there is there before it."""
    return item[0].name == _RECORD, item[0]


def versions(path: Path) -> Versions:
    """A folder's files, but for its jobs and what is hidden, as locks and parts are; or the one file."""
    found: Versions = {}
    for file in [path] if path.is_file() else path.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        with suppress(FileNotFoundError):  # gone meanwhile
            if file.is_file() and not hidden and file.name != _JOBS:
                stat = file.stat()
                found[file] = stat.st_mtime, stat.st_size
    return found


def read_by(commands: Sequence[Command]) -> list[Path]:
    """What commands read beside their runs' folders, as far as it is here: files, folders of the user's own studies."""
    found: set[Path] = set()
    for command in commands:
        record, config = command.folder.read(), yamlfiles.read_yaml(command.folder.config)
        cwd = Path(record.cwd)
        named = [*(file.path for file in record.data), record.recipe_file, *(config.get(key) for key in _PATHS)]
        found |= {cwd / name for name in named if isinstance(name, str) and 0 < len(name) < 256}  # longer: a template
        if cwd.resolve() != paths.LOCK.parent:
            found |= {cwd / "recipes", cwd / "templates"}
        options = {key: Path.cwd() / word for key, word in pairwise(command.words) if key in ("--data", "--adapter")}
        found |= {*options.values()}
        tests = [cwd / record.test_data] if record.test_data else []
        for test in (*tests, *(file for key, file in options.items() if key == "--data")):
            manifest = test.with_name("manifest.json")
            found |= {test, manifest}
            if manifest.is_file():  # of rows that were prepared, of which an evaluation may take others
                found |= {*manifest.parent.glob("*.jsonl")}
    return sorted({paths.unlinked(path) for path in found if path.exists()})


def put(url: str, commands: Sequence[Command]) -> None:
    """Put the folders of runs, and what commands read, into a bucket, as far as it does not have them.

    Raises:
        UserError: it cannot be written to.
    """
    bucket = Bucket(url)
    try:
        for path in (*read_by(commands), *sorted({command.folder.path for command in commands})):
            bucket.upload(path, bucket.has(path))
    except Exception as error:  # each kind of bucket raises its own
        raise UserError(f"bucket {url}: cannot be written to: {_reason(error)}") from None


def gather(url: str, folder: RunDir, ended: bool) -> bool:
    """Fetch what the bucket has of a run: its records, and what it wrote once it has ended; the checkpoints, too, where
    it can be resumed. It is asked once a minute.

    Returns:
        Whether that went well; what did not is said.
    """
    return _gathered(url, folder.path, ended, int(time.monotonic() / 60))


@lru_cache(maxsize=64)
def _gathered(url: str, path: Path, ended: bool, minute: int) -> bool:
    folder = RunDir(path)
    try:
        bucket = Bucket(url)
        if not bucket.download(path, lambda file: file.parts[0] != "output", stay=_MADE_ANEW):
            raise FileNotFoundError("it has nothing of it")
        if ended:
            if not (finished := folder.read().state == "finished"):
                say(f"{path}: fetching its checkpoints, if there are any")
            bucket.download(path, lambda file: not (finished and "checkpoint-" in str(file)))
        evaluations.check_again(path)  # files have other times here
    except Exception as error:  # each kind of bucket raises its own
        say(f"{path}: what its bucket has of it cannot be fetched: {_reason(error)}")
        return False
    return True


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def main(log: Path, *words: str) -> int:
    """Carry out a command of `recipe` for a run on a machine that has nothing of it yet; its exit code. A job's signals
    reach each of its processes.

    Args:
        log: the file in the run's folder that takes what the command says.
        words: the command's arguments.
    """
    bucket, folder = Bucket(os.environ[URL]), RunDir(log.parent)
    if not (folder.path / _RECORD).is_file():
        for path in (*map(Path, shlex.split(os.environ[FILES])), folder.path):
            _again_and_again(partial(bucket.download, path))
    record = folder.read()
    kept = bucket.has(folder.path)
    if words[0] == "resume" and record.state == "finished":  # its machine was lost after that
        return 0 if _copied(bucket, folder, kept, last=True) else 1
    # agreed to where the run was made, whose seal means nothing here
    forced = [word for name in record.forced for word in ("--force", name)]
    with stop_requests(), log.open("ab") as stream:
        command = [str(Path(sys.executable).with_name("recipe")), *words, *forced]
        child = start_child(command, stdout=stream, stderr=subprocess.STDOUT)
        due = time.monotonic() + INTERVAL
        while child.poll() is None:
            time.sleep(0.5)
            if time.monotonic() >= due:
                _copied(bucket, folder, kept, last=False)
                due = time.monotonic() + INTERVAL
        return child.returncode if _copied(bucket, folder, kept, last=True) else child.returncode or 1


def _copied(bucket: Bucket, folder: RunDir, kept: Versions, last: bool) -> bool:
    """Copy a run's folder, the last time again where it fails; whether that went well, as no training ends for it."""
    try:
        _again_and_again(partial(bucket.upload, folder.path, kept, last), _ATTEMPTS if last else 1)
    except Exception as error:  # each kind of bucket raises its own
        say(f"{folder.path}: not copied to its bucket this time: {_reason(error)}")
        return False
    return True


def _again_and_again(do: Callable[[], object], attempts: int = _ATTEMPTS) -> None:
    """Do something, and where it fails again, after 1, 2, 4 s and so on."""
    for attempt in range(attempts):
        try:
            do()
            return
        except Exception:  # each kind of bucket raises its own
            if attempt == attempts - 1:
                raise
            time.sleep(2**attempt)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
