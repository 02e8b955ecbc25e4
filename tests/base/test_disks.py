"""Full disks: who says so, and where."""

import errno
from pathlib import Path

import pytest

from qlora_recipes.base import disks


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ("OSError: [Errno 28] No space left on device: '/data/a b'\n", "/data/a b"),
        ("OSError: [Errno 122] Disk quota exceeded: '/home/me/x'", "/home/me/x"),
        ("SafetensorError: I/O error: No space left on device (os error 28)\nsee 'this'", ""),
        ("RuntimeError: [enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file", ""),
        ("KeyError: 'No space'", None),
    ],
)
def test_a_log_tells_of_a_full_disk(tmp_path: Path, said: str, where: str | None) -> None:
    found = disks.where_full(said, [tmp_path])
    assert found == (None if where is None else Path(where or tmp_path))


def test_errors_of_a_full_disk_get_the_name_of_the_file_and_no_others_do(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device (os error 28)")):
        with pytest.raises(OSError) as full, disks.naming(tmp_path / "f"):
            raise error
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path / "f"))
    with pytest.raises(ConnectionError) as other, disks.naming(tmp_path / "f"):
        raise ConnectionError("refused")
    assert (str(other.value), other.value.filename) == ("refused", None)


def test_room_is_kept_until_the_block_ends_and_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    with disks.reserved(tmp_path):
        assert (tmp_path / ".reserve").stat().st_size == disks.RESERVE
    assert not any(tmp_path.iterdir())
    assert disks.free(tmp_path / "not" / "yet") == pytest.approx(disks.free(tmp_path), abs=1 << 30)
