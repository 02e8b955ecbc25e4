"""Sources of every kind: plain files, several at once, data sets and single files of a hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
from file_server import Server, as_hub, data_of, fetch_all, serving
from pyarrow import parquet
from test_fetch import digest, packed

from qlora_recipes.base.errors import UserError, WorkFailed
from qlora_recipes.data.declaration import Data
from qlora_recipes.data.fetch import fetch

TRAIN = b'{"a": "b"}\n' * 30_000
COMMIT = "c" * 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as orders:
        orders.content = TRAIN
        yield orders


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with as_hub(server, tmp_path / "hub", monkeypatch):
        yield server


def plain(url: str, content: bytes = TRAIN, **more: Any) -> dict[str, Any]:
    return {"url": url, "bytes": len(content), "sha256": digest(content)} | more


def test_a_plain_file_is_kept_as_it_is_and_verified(tmp_path, server):
    rows = fetch_all(data_of({"train.jsonl": plain(server.url)}), tmp_path)
    assert (tmp_path / "train.jsonl").read_bytes() == TRAIN
    assert rows == [{"file": "train.jsonl", "bytes": len(TRAIN), "sha256": digest(TRAIN), "verified": True}]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".fetch.lock", "train.jsonl"]


def test_a_file_put_in_place_by_hand_is_verified_and_not_fetched(tmp_path):
    wanted = data_of({"train.jsonl": plain("https://127.0.0.1:9/none")})
    with pytest.raises(WorkFailed, match=rf"on another machine .* {tmp_path}$"):
        fetch_all(wanted, tmp_path)
    (tmp_path / "train.jsonl").write_bytes(TRAIN)
    assert [row["verified"] for row in fetch_all(wanted, tmp_path)] == [True]
    assert [row["verified"] for row in fetch_all(data_of({"train.jsonl": {}}), tmp_path)] == [None]


def several(url: str) -> Data:
    folder = url.rpartition("/")[0]
    files = {"train.jsonl": {"rows": 1, "sha256": digest(b"{}")}}
    return data_of(
        {
            "rows.zip": {"url": f"{folder}/rows.zip", "files": files},
            "more/test.jsonl": plain(f"{folder}/test.jsonl", b"test"),
        }
    )


def test_a_source_that_is_rejected_leaves_those_before_it_in_place(tmp_path, server):
    server.files = {"rows.zip": packed({"train.jsonl": b"{}"}), "test.jsonl": b"tset"}
    with pytest.raises(UserError, match=r"more/test\.jsonl"):
        fetch_all(several(server.url), tmp_path)
    assert {file.name for file in tmp_path.glob("*.jsonl")} == {"train.jsonl"}
    assert not list(tmp_path.glob("more/*.jsonl"))
    server.files["test.jsonl"] = b"test"
    rows = fetch_all(several(server.url), tmp_path)
    assert [row["file"] for row in rows] == ["train.jsonl", "more/test.jsonl"]
    assert (tmp_path / "more" / "test.jsonl").read_bytes() == b"test"
    assert len([path for path in server.paths if "rows.zip" in path]) == 1  # it is there


MATHS = [{"query": f"{i}+1?", "response": str(i + 1), "parts": [i]} for i in range(2500)]


def of_hub(**more: Any) -> Data:
    return data_of({"train.jsonl": {"hub": "owner/Maths", "revision": COMMIT, "rows": 2500} | more})


def copy_of_hub(folder: Path) -> Path:
    """A copy of a hub's repository with a data set of two configurations, in parquet."""
    repository = folder / "Maths"
    for config, rows in (("main", MATHS), ("other", MATHS[:3])):
        (repository / config).mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, repository / config / "train-00000-of-00001.parquet")
    configs = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*"
        for name in ("main", "other")
    )
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    return repository


def test_a_data_set_of_a_hub_becomes_json_lines(tmp_path, monkeypatch):
    import datasets

    load, asked, repository = datasets.load_dataset, [], str(copy_of_hub(tmp_path))

    def load_copy(name: str, config: str | None, split: str, revision: str) -> Any:
        asked.append((name, config, split, revision))
        return load(repository, config, split=split)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", load_copy)
    [row] = fetch_all(of_hub(config="main"), tmp_path / "out")
    assert asked == [("owner/Maths", "main", "train", COMMIT)]
    assert [orjson.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_bytes().splitlines()] == MATHS
    assert row["verified"] is None
    [again] = fetch_all(of_hub(config="main", sha256=row["sha256"]), tmp_path / "out2")
    assert again == row | {"verified": True}
    for wrong, says in (
        ({"config": "other"}, r"train\.jsonl .*rows 2500 .*3 "),
        ({}, "owner/Maths: .*main"),
        ({"config": "main", "split": "tset"}, "owner/Maths: .*tset"),
    ):
        with pytest.raises(UserError, match=says):
            fetch_all(of_hub(**wrong), tmp_path / "out3")
    assert not list((tmp_path / "out3").glob("*.jsonl"))


def test_without_the_hub_the_way_by_hand_is_shown(tmp_path):
    with pytest.raises(WorkFailed, match=r"owner/Maths: .*`recipe data fetch .*`"):
        fetch_all(of_hub(), tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


ADAPTER = bytes(range(256)) * 2000


def of_model(content: bytes = ADAPTER) -> Data:
    file = "loftq_init/adapter_model.safetensors"
    model = {"hub": "owner/adapter", "kind": "model", "revision": COMMIT, "file": file}
    model |= {"bytes": len(content), "sha256": digest(content)}
    return data_of({"train.jsonl": {"url": "https://127.0.0.1:9/train.jsonl"}, "init/adapter.safetensors": model})


def test_a_file_of_a_hubs_repository_is_verified(tmp_path, hub):
    hub.files = {"loftq_init/adapter_model.safetensors": ADAPTER}
    rows = fetch(of_model(), tmp_path / "out", ["init/adapter.safetensors"])
    assert [row["file"] for row in rows] == ["init/adapter.safetensors"]
    assert (tmp_path / "out" / "init" / "adapter.safetensors").read_bytes() == ADAPTER
    assert f"/owner/adapter/resolve/{COMMIT}/loftq_init/adapter_model.safetensors" in hub.paths


def test_files_are_named_in_the_command_for_another_machine(tmp_path):
    sources = {"train.jsonl": {"url": "https://127.0.0.1:9/t"}, "my scores.txt": {"url": "https://127.0.0.1:9/scores"}}
    with pytest.raises(WorkFailed) as failed:
        fetch(data_of(sources), tmp_path, ["my scores.txt", "train.jsonl"])
    assert str(failed.value) == (
        "https://127.0.0.1:9/scores: the connection failed: Connection refused; or run `recipe data fetch codereviewer "
        f"--only 'my scores.txt' --only train.jsonl` on another machine and copy the folder to {tmp_path}"
    )


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(404, "EntryNotFound", UserError), (403, "GatedRepo", UserError), (503, "", WorkFailed)],
)
def test_a_hub_that_refuses_is_named_with_the_repository(tmp_path, hub, monkeypatch, status, code, kind):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # before it asks again
    hub.answers = [status] * 99
    hub.error_code = code
    with pytest.raises(kind, match=f"^owner/adapter: .*{status if status < 500 else 'on another machine'}"):
        fetch(of_model(), tmp_path / "out", ["init/adapter.safetensors"])
