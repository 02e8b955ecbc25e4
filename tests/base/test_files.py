import errno
import os
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import config_with

from qlora_recipes.base import files, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import append_line, opened, replacing, write_rows
from qlora_recipes.base.processes import held, is_held


def test_a_device_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_rows(pipe, [{"a": 1}])
    assert pipe.is_fifo()
    assert os.read(reader, 100) == b'{"a":1}\n'
    os.close(reader)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_one_and_what_is_written_now_stays(tmp_path):
    file, other = tmp_path / "[a].json", tmp_path / ".b.json.0123456789abcdef.part"
    (tmp_path / ".[a].json.0123456789abcdef.part").write_text("half")
    other.touch()
    with replacing(file) as first:
        first.write(b"first")
        with replacing(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first"
    assert {*tmp_path.iterdir()} == {file, other}


def test_a_file_that_another_process_removed_before_its_lock_is_created_again(tmp_path, monkeypatch):
    flock, calls = files.fcntl.flock, []

    def removed(stream: Any, how: int) -> None:
        calls.append(stream)
        if len(calls) == 1:
            Path(stream.name).unlink()
        flock(stream, how)

    monkeypatch.setattr(files.fcntl, "flock", removed)
    write_rows(tmp_path / "a", [{"a": 1}])
    assert len(calls) == 2
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_a_full_disk_is_reported_with_the_file_and_other_errors_as_they_are(tmp_path):
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device (os error 28)")):
        for naming in (files.naming, replacing):
            with pytest.raises(OSError) as full, naming(tmp_path / "f"):
                raise error
            assert full.value.errno == errno.ENOSPC
            assert full.value.filename == str(tmp_path / "f")
    with pytest.raises(ConnectionError) as other, files.naming(tmp_path / "f"):
        raise ConnectionError("refused")
    assert str(other.value) == "refused"
    assert other.value.filename is None
    assert not any(tmp_path.iterdir())
    with pytest.raises(OSError) as full:
        write_rows(Path("/dev/full"), [{"a": 1}])
    assert full.value.filename == "/dev/full"
    assert Path("/dev/full").is_char_device()


def test_no_link_is_followed(tmp_path):
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.write_text("mine")
    link.symlink_to(mine)
    for touch in (
        lambda: opened(link, "ab"),
        lambda: append_line(link, b"line"),
        lambda: held(link, "is held").__enter__(),
        lambda: is_held(link),
    ):
        with pytest.raises(UserError) as refused:
            touch()
        assert str(refused.value) == f"{link}: symbolic links are not followed; replace it with a file"
    assert mine.read_text() == "mine"
    with replacing(link) as stream:
        stream.write(b"new")
    assert mine.read_text() == "mine"
    assert not link.is_symlink()


def test_a_lock_is_held_as_long_as_its_block(tmp_path):
    file = tmp_path / ".lock"
    with held(file, "is held"):
        assert is_held(file)
    assert not is_held(file)


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
def test_a_log_tells_of_a_full_disk(tmp_path, said, where):
    place = files.where_full(said, [tmp_path])
    assert place == (None if where is None else Path(where or tmp_path))


DEEP = [b"[" * levels + b"1" + b"]" * levels for levels in (101, 400, 1023, 5000)]


@pytest.mark.parametrize("value", [*DEEP, *(b'{"a":' * 400 + b"1" + b"}" * 400,)], ids=len)
def test_deep_json_is_refused_where_it_is_read(tmp_path, recipe, value):
    deep = tmp_path / "deep.jsonl"
    deep.write_bytes(
        b'{"reference": "a", "prediction": "b"}\n{"reference": "a", "prediction": "b", "x": ' + value + b"}\n"
    )
    for options in ((), ("--out", "scored.jsonl"), ("--json",)):
        done = recipe.fails("score", "deep.jsonl", *options)
        assert done.stderr.startswith("recipe: deep.jsonl:2: not JSON: ")
    assert [file.name for file in tmp_path.iterdir()] == ["deep.jsonl"]
    assert files.read_json(deep) == {}
    (tmp_path / "mine.yaml").write_text(yamlfiles.write_yaml(config_with(DEEP_ROWS)))
    assert "deep.jsonl:2" in recipe("check", "mine.yaml", "--all-rows").stdout


DEEP_ROWS = {"datasets": [{"path": "deep.jsonl", "ds_type": "json", "type": "alpaca"}], "test_datasets": None}


def test_json_of_a_usual_depth_is_read():
    text = b"[" * 100 + b"]" * 100
    assert files.parse_json(text) == orjson.loads(text)
    assert files.parse_json(b"\xef\xbb\xbf[]") == []


def test_a_file_that_cannot_be_written_is_named_without_its_temporary_file(tmp_path):
    file = tmp_path / ("x" * 250)  # the temporary file's name is too long
    with pytest.raises(OSError, match="File name too long") as refused:
        files.write_atomically(file, "")
    assert refused.value.filename == str(file)
