"""Full disks: who says so, and where."""

import errno
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_recipes.base import files


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ("OSError: [Errno 28] No space left on device: '/data/a b'\n", "/data/a b"),
        ("OSError: [Errno 122] Disk quota exceeded: '/home/me/x'", "/home/me/x"),
        ("SafetensorError: I/O error: No space left on device (os error 28)\nsee 'this'", ""),
        ("RuntimeError: [enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file", ""),
        ("No space left on device while it said: 'hello world'", ""),
        ("KeyError: 'No space'", None),
    ],
)
def test_a_log_tells_of_a_full_disk(tmp_path: Path, said: str, where: str | None) -> None:
    found = files.where_full(said, [tmp_path])
    assert found == (None if where is None else Path(where or tmp_path))


def test_errors_of_a_full_disk_get_the_name_of_the_file_and_no_others_do(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device (os error 28)")):
        with pytest.raises(OSError) as full, files.naming(tmp_path / "f"):
            raise error
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "f"))
    with pytest.raises(ConnectionError) as other, files.naming(tmp_path / "f"):
        raise ConnectionError("refused")
    assert (str(other.value), other.value.filename) == ("refused", None)


def held_without_a_name() -> int:
    """The bytes of the files that this process has open and that are in no folder."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            of_file = descriptor.stat()
            found += of_file.st_size if stat.S_ISREG(of_file.st_mode) and not of_file.st_nlink else 0
    return found


def test_room_is_kept_until_the_block_ends_and_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    before = held_without_a_name()
    with files.reserved(tmp_path):
        assert not any(tmp_path.iterdir())  # which whoever is killed here would leave
        assert held_without_a_name() == before + files.RESERVED_BYTES
    assert held_without_a_name() == before
    assert files.free_bytes(tmp_path / "not" / "yet") == pytest.approx(files.free_bytes(tmp_path), abs=1 << 30)
