import hashlib
import io
import random
import socket
import stat
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from file_server import Server, data_of, fetch_all, serving

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.data import fetch as fetching
from qlora_recipes.data.declaration import Data

FILES = {f"msg-{split}.jsonl": random.Random(split).randbytes(400_000) for split in ("train", "valid", "test")}
ARCHIVE_NAME = "Comment_Generation.zip"
UNKNOWN = "msg-train.jsonl"  # whose checksum the study does not know


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def packed(files: dict[str, bytes] = FILES, *more: zipfile.ZipInfo | str) -> bytes:
    """A zip as the published one is, with further members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as stream:
        stream.writestr("Comment_Generation/", b"")
        for name, content in files.items():
            stream.writestr(f"Comment_Generation/{name}", content)
            stream.writestr(f"__MACOSX/Comment_Generation/._{name}", b"x")
        for member in more:
            stream.writestr(member, b"x")
    return buffer.getvalue()


ARCHIVE = packed()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as orders:
        orders.content = ARCHIVE
        yield orders


def data(url: str, **changed: str | None) -> Data:
    """A zip with small files; `changed` are other checksums, by split."""
    files: dict[str, dict[str, Any]] = {}
    for name, content in FILES.items():
        checksum = changed.get(name.removeprefix("msg-").removesuffix(".jsonl"), digest(content))
        files[name] = {"rows": 1, "bytes": len(content), "sha256": checksum}
    files[UNKNOWN] = {"rows": 1}
    source = {"url": url or "https://127.0.0.1:9/none", "bytes": 847_000_000, "files": files}
    return data_of({ARCHIVE_NAME: source})


def message(kind: type[Exception], declared: Data, out: Path) -> str:
    """Message of a fetch that fails."""
    with pytest.raises(kind) as failed:
        fetch_all(declared, out)
    return str(failed.value)


def by_hand(out: Path) -> str:
    """End of a message about a server, for `data_of`."""
    command = f"recipe data fetch codereviewer --only {ARCHIVE_NAME}"
    return f"; or run `{command}` on another machine and copy the folder to {out}"


def wanted(out: Path) -> dict[str, bytes]:
    """The wanted files that are there. None may be there in part."""
    assert not list(out.glob(".*.part"))
    return {file.name: file.read_bytes() for file in out.glob("msg-*")}


def test_the_files_are_put_in_place_and_verified(tmp_path, server):
    out = tmp_path / "data" / "raw"
    rows = fetch_all(data(server.url), out)
    assert wanted(out) == FILES
    assert [(row["file"], row["bytes"], row["verified"]) for row in rows] == [
        ("msg-train.jsonl", 400_000, None),
        ("msg-valid.jsonl", 400_000, True),
        ("msg-test.jsonl", 400_000, True),
    ]
    assert [row["sha256"] for row in rows] == [digest(content) for content in FILES.values()]
    assert not list(out.glob("Comment_Generation*"))


def test_a_connection_that_breaks_off_is_resumed(tmp_path, server):
    server.breaks_after = [300_000, 200_000]
    fetch_all(data(server.url), tmp_path)
    assert wanted(tmp_path) == FILES
    assert server.asked_for() == [None, "bytes=300000-", "bytes=500000-"]
    assert server.sent == len(ARCHIVE)


def test_one_that_breaks_off_too_often_says_what_is_there_and_resumes_next_time(tmp_path, server):
    server.breaks_after = [50_000] * 6
    problem = f"the connection failed: IncompleteRead(50000 bytes read, {len(ARCHIVE) - 300_000} more expected)"
    assert message(WorkFailed, data(server.url), tmp_path) == (
        f"{server.url}: {problem}; repeat the command to resume from 300,000 bytes{by_hand(tmp_path)}"
    )
    assert wanted(tmp_path) == {}
    fetch_all(data(server.url), tmp_path)
    assert server.asked_for()[-1] == "bytes=300000-"
    assert server.sent == len(ARCHIVE)


def test_a_server_that_cannot_send_the_rest_sends_all(tmp_path, server):
    server.ranges = False
    server.breaks_after = [300_000]
    fetch_all(data(server.url), tmp_path)
    assert wanted(tmp_path) == FILES
    assert server.sent == 300_000 + len(ARCHIVE)


@pytest.mark.parametrize(
    ("source", "ranges"),
    [
        pytest.param({"sha256": digest(ARCHIVE)}, [None, "bytes=50000-", "bytes=100000-"], id="with a checksum"),
        pytest.param({}, [None] * 3, id="without"),
    ],
)
def test_only_a_file_with_a_checksum_is_resumed(tmp_path, server, source, ranges):
    server.breaks_after = [50_000] * 2
    fetch_all(data_of({"a.jsonl": {"url": server.url} | source}), tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == ARCHIVE
    assert server.asked_for() == ranges


def test_a_file_without_a_checksum_that_breaks_off_too_often_is_not_resumed_next_time(tmp_path, server):
    server.breaks_after = [50_000] * 6
    declared = data_of({"a.jsonl": {"url": server.url}})
    assert message(WorkFailed, declared, tmp_path) == (
        f"{server.url}: the connection failed: IncompleteRead(50000 bytes read, {len(ARCHIVE) - 50_000} more expected)"
        f"; or run `recipe data fetch codereviewer --only a.jsonl` on another machine and copy the folder to {tmp_path}"
    )
    fetch_all(declared, tmp_path)
    assert server.asked_for()[-1] is None
    assert [file.name for file in tmp_path.glob("a.*")] == ["a.jsonl"]


@pytest.mark.parametrize("size", [len(ARCHIVE), 100_000])
def test_a_file_that_changes_on_the_server_in_between_is_found_by_its_checksum(tmp_path, server, size):
    part, aside = tmp_path / f"{ARCHIVE_NAME}.part", tmp_path / f"{ARCHIVE_NAME}.rejected"
    part.write_bytes(bytes(200_000))
    server.content = ARCHIVE[:size]
    assert f"moved to {aside}; the next fetch starts over" in message(UserError, data(server.url), tmp_path)
    server.content = ARCHIVE
    fetch_all(data(server.url), tmp_path)
    assert wanted(tmp_path) == FILES
    assert server.asked_for() == ["bytes=200000-", None]


@pytest.mark.parametrize(("status", "reason"), [(500, "Internal Server Error"), (429, "Too Many Requests")])
def test_a_server_in_trouble_is_asked_again(tmp_path, server, status, reason):
    server.answers = [status] * 6
    assert message(WorkFailed, data(server.url), tmp_path) == (
        f"{server.url}: the server answers {status} {reason}{by_hand(tmp_path)}"
    )
    assert wanted(tmp_path) == {}
    server.answers = [status]
    fetch_all(data(server.url), tmp_path)
    assert wanted(tmp_path) == FILES
    assert len(server.seen) == 8


def test_a_server_that_refuses_is_not_asked_again(tmp_path, server):
    server.answers = [404]
    assert message(UserError, data(server.url), tmp_path) == f"{server.url}: 404 Not Found{by_hand(tmp_path)}"
    assert len(server.seen) == 1


def test_without_a_network_the_way_by_hand_is_shown(tmp_path, server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.zip"
        assert message(WorkFailed, data(url), tmp_path) == (
            f"{url}: the connection failed: Connection refused{by_hand(tmp_path)}"
        )
    assert wanted(tmp_path) == {}


def test_a_complete_source_is_not_fetched_again(tmp_path, server):
    rows = fetch_all(data(server.url), tmp_path)
    assert fetch_all(data(server.url), tmp_path) == rows
    assert len(server.seen) == 1
    (copied,) = fetch_all(data_of({UNKNOWN: {"sha256": digest(b"other")}}), tmp_path)
    assert copied["verified"] is False


def test_a_missing_file_is_fetched_without_replacing_the_others(tmp_path, server):
    (tmp_path / UNKNOWN).write_text("mine")
    (tmp_path / "msg-valid.jsonl").write_bytes(FILES["msg-valid.jsonl"])
    fetch_all(data(server.url), tmp_path)
    assert wanted(tmp_path) == FILES | {UNKNOWN: b"mine"}
    assert len(server.seen) == 1


def test_a_file_that_differs_from_the_study_is_refused(tmp_path, server):
    fetch_all(data(server.url), tmp_path)
    file = tmp_path / "msg-valid.jsonl"
    file.write_text("mine")
    refusal = f"{file}: differs from study.yaml; move it away, and fetch again"
    assert message(UserError, data(server.url), tmp_path) == refusal
    assert file.read_text() == "mine"
    assert len(server.seen) == 1


def test_a_wrong_checksum_is_reported_and_puts_the_download_aside(tmp_path, server):
    aside = tmp_path / f"{ARCHIVE_NAME}.rejected"
    assert message(UserError, data(server.url, test=digest(b"")), tmp_path) == (
        f"{tmp_path / ARCHIVE_NAME}.part: msg-test.jsonl differs from study.yaml: sha256 {digest(b'')} expected, "
        f"{digest(FILES['msg-test.jsonl'])} found; moved to {aside}; the next fetch starts over"
    )
    assert wanted(tmp_path) == {}
    assert aside.read_bytes() == ARCHIVE
    fetch_all(data(server.url), tmp_path)
    assert server.asked_for() == [None, None]


TEST = FILES["msg-test.jsonl"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(ARCHIVE[:-1000], "File is not a zip file", id="cut"),
        pytest.param(b"<html>", "File is not a zip file", id="a page"),
        pytest.param(
            ARCHIVE.replace(TEST[-9:], b"x" * 9),
            "Bad CRC-32 for file 'Comment_Generation/msg-test.jsonl'",
            id="damaged",
        ),
        pytest.param(
            packed({"msg-test.jsonl": TEST}),
            "msg-train.jsonl, msg-valid.jsonl: missing from the zip, or present twice",
            id="files missing",
        ),
        pytest.param(
            packed(FILES, "b/msg-test.jsonl"),
            "msg-test.jsonl: missing from the zip, or present twice",
            id="file present twice",
        ),
    ],
)
def test_a_mistake_in_an_archive_is_reported(tmp_path, server, content, problem):
    server.content = content
    archive = tmp_path / ARCHIVE_NAME
    assert message(UserError, data(server.url), tmp_path) == (
        f"{archive}.part: {problem}; moved to {archive}.rejected; the next fetch starts over"
    )
    assert wanted(tmp_path) == {}


@pytest.mark.parametrize("declared", [3 * len(TEST), None], ids=["declared", "undeclared"])
def test_a_zip_bomb_is_refused_before_it_is_extracted(tmp_path, server, declared):
    """A file of zeros, a thousand times as large as its zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("rows.jsonl", bytes(4 * len(TEST)))
    server.content = buffer.getvalue()
    size = {"bytes": declared} if declared else {}
    limit = declared or 100 * len(server.content)
    declared_zip = data_of({"rows.zip": {"url": server.url, "files": {"rows.jsonl": size}}})
    assert message(UserError, declared_zip, tmp_path) == (
        f"{tmp_path}/rows.zip.part: rows.jsonl is larger than {limit:,} bytes; if that is right, declare its `bytes` "
        f"in study.yaml; moved to {tmp_path}/rows.zip.rejected; the next fetch starts over"
    )
    assert {file.name for file in tmp_path.iterdir()} == {".fetch.lock", "rows.zip.rejected"}


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(("source", "limit"), [({"bytes": 450_000}, 900_000), ({}, 2_000_000)])
def test_a_body_without_an_end_is_cut_off(tmp_path, monkeypatch, chunked, source, limit):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "MOST_BYTES", 2_000_000)
    body = b"Content-Length: 999999999999\r\n\r\n" + bytes(4_500_000)
    if chunked:
        body = b"Transfer-Encoding: chunked\r\n\r\n" + 9 * (b"7a120\r\n" + bytes(500_000) + b"\r\n")
    too_large = pytest.raises(UserError, match=f"a.jsonl is larger than {limit:,} bytes")
    with answering(b"HTTP/1.1 200 OK\r\n" + body) as (url, _), too_large:
        fetch_all(data_of({"a.jsonl": {"url": url} | source}), tmp_path)
    (aside,) = tmp_path.glob("a.*")
    assert limit < aside.stat().st_size <= limit + fetching.CHUNK


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_after_a_kill_while_files_move_into_place_the_same_command_finishes(tmp_path, server, monkeypatch, moved):
    replace, names = Path.replace, iter([*FILES][:moved])

    def killed(path: Path, file: Path) -> None:
        if path.parent.name.startswith(".fetching-") and next(names, None) is None:
            raise KeyboardInterrupt
        replace(path, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        fetch_all(data(server.url), tmp_path)
    assert len([*tmp_path.glob("msg-*")]) == moved
    fetch_all(data(server.url), tmp_path)
    assert wanted(tmp_path) == FILES
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, ".fetch.lock"}
    assert server.asked_for() == [None, f"bytes={len(ARCHIVE)}-"]


def link() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("Comment_Generation/link")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member", ["../evil", "C:\\evil", "..\\msg-test.jsonl", link()], ids=lambda member: str(member)[:12]
)
def test_only_wanted_files_of_an_archive_are_extracted(tmp_path, server, member):
    server.content = packed(FILES, member)
    fetch_all(data(server.url), tmp_path / "raw")
    assert wanted(tmp_path / "raw") == FILES
    assert [file.name for file in tmp_path.iterdir()] == ["raw"]
    assert {file.name for file in (tmp_path / "raw").iterdir()} == {*FILES, ".fetch.lock"}


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives every request the same bytes, and closes; yields its URL and the requests."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asked: list[bytes] = []

        def serve() -> None:
            with suppress(OSError):  # closed at the end
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        asked.append(connection.recv(10_000))
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/a.jsonl", asked
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


MALFORMED = [
    *((f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n0123456789", length[:4])
      for length in ("abc", "1e3", "10, 10", "")),
    ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", "InvalidHeader|Content-Length"),
    ("HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n", "malformed"),
    ("HTTP/1.1 302 Found\r\nLocation: http://" + "a" * 70 + ".org/\r\n\r\n", "malformed|not https"),
    *((f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n", f"to {target}, which is not https")
      for target in ("file:///etc/passwd", "http://127.0.0.1:9/", "HTTP://169.254.169.254/latest/", "//127.0.0.2/a")),
    ("HTTP/1.1 204 No Content\r\n\r\n", "204 No Content"),
    ("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-2/3\r\n\r\nabc", "206 Partial Content instead"),
    ("HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", "205 Reset Content"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "says"), MALFORMED, ids=[answer[9:60] for answer, _ in MALFORMED])
def test_a_malformed_answer_is_refused_at_once(tmp_path, monkeypatch, answer, says):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "PAUSES", (0,) * 5)
    with answering(answer.encode()) as (url, asked), pytest.raises(UserError, match=f"{url}: .*({says})"):
        fetch_all(data_of({"a.jsonl": {"url": url}}), tmp_path)
    assert len(asked) == 1
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("target", ["/b", "?b", "//a.org/b", "https://cdn.org/b", "HTTPS://cdn.org/b"])
def test_a_redirect_stays_on_the_server_or_leads_to_https(target):
    response = requests.Response()
    response.url, response.status_code, response.headers["Location"] = "http://a.org/a", 302, target
    assert fetching._Session().get_redirect_target(response) == target


@pytest.mark.parametrize(
    "answer",
    [
        f"HTTP/1.1 200 OK\r\nContent-Length: {10**30}\r\n\r\n0123456789",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
        "",
        "x\r\n",
    ],
)
def test_a_server_that_never_sends_the_file_is_left_after_the_last_try(tmp_path, monkeypatch, answer):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "PAUSES", (0,) * 5)
    with answering(answer.encode()) as (url, asked), pytest.raises(WorkFailed, match=url):
        fetch_all(data_of({"a.jsonl": {"url": url}}), tmp_path)
    assert 1 <= len(asked) <= 6


def test_a_signed_url_is_used_but_neither_stored_nor_shown(tmp_path, server, capsys):
    server.answers = [500]
    server.breaks_after = [1000]
    signed = f"{server.url}?download=1&X-Amz-Signature=planted"
    fetch_all(data(signed), tmp_path)
    assert server.paths[-1].endswith("?download=1&X-Amz-Signature=planted")
    assert "planted" not in capsys.readouterr().err
    assert not [file for file in tmp_path.iterdir() if b"planted" in file.read_bytes()]
