import errno
import os
from pathlib import Path

import pytest

from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import append_line, json_rows, opened, replacing, write_rows
from qlora_recipes.base.processes import held, is_held


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_rows(pipe, [{"a": 1}])
    assert pipe.is_fifo() and os.read(reader, 100) == b'{"a":1}\n'
    os.close(reader)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as full, replacing(tmp_path / "f"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "f") and not any(tmp_path.iterdir())
    with pytest.raises(OSError) as full:
        write_rows(Path("/dev/full"), [{"a": 1}])
    assert full.value.filename == "/dev/full" and Path("/dev/full").is_char_device()


def test_a_row_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (row,) = json_rows([b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}"], "rows.jsonl", ())
    with pytest.raises(UserError, match=r"new\.jsonl: "):
        write_rows(tmp_path / "new.jsonl", [row])
    assert not any(tmp_path.iterdir())


def test_no_link_is_followed(tmp_path: Path) -> None:
    (mine := tmp_path / "mine").write_text("mine")
    (link := tmp_path / "link").symlink_to(mine)
    for touch in (
        lambda: opened(link, "ab"),
        lambda: append_line(link, b"line"),
        lambda: held(link, "is held").__enter__(),
        lambda: is_held(link),
    ):
        with pytest.raises(UserError, match="link: "):
            touch()
    assert mine.read_text() == "mine"
    with replacing(link) as stream:
        stream.write(b"new")
    assert mine.read_text() == "mine" and not link.is_symlink()


def test_a_lock_does_not_truncate_its_file(tmp_path: Path) -> None:
    (file := tmp_path / ".lock").write_text("kept")
    with held(file, "is held"):
        assert is_held(file)
    assert file.read_text() == "kept"
