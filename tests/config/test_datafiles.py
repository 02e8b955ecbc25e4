from pathlib import Path

import pytest
from conftest import recipe_config

from qlora_recipes.base import processes, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import datafiles, merging

NAME = "haider2024/llama-2-7b"


@pytest.fixture
def place(place: Path) -> Path:
    (place / "data" / "more").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "more/c.jsonl"):
        (place / "data" / name).write_text(f'{{"output": "{name}"}}\n\n')
    return place


def with_data(override: str) -> yamlfiles.Config:
    change = merging.parse_override(override)
    return merging.override(merging.merge(recipe_config(NAME), {"test_datasets": None}), change.key, change.value)


@pytest.mark.parametrize(
    ("override", "files"),
    [
        ("datasets.0.path=data/a.jsonl", ["data/a.jsonl"]),
        ("datasets.0.path=data", ["data/a.jsonl", "data/b.jsonl", "data/more/c.jsonl"]),
        ("datasets.0={path: data, data_files: data/b*, type: alpaca}", ["data/b.jsonl"]),
        ("datasets.0={path: data, data_files: [data/a.jsonl, data/b.jsonl]}", ["data/a.jsonl", "data/b.jsonl"]),
        ("datasets.0={path: some/hub-dataset, data_files: train.jsonl}", []),
        ("datasets.0={path: some/hub-dataset}", []),
    ],
)
def test_every_local_file_is_recorded(place, override, files):
    assert [file.path for file in datafiles.record(with_data(override))] == files


@pytest.mark.parametrize(
    ("override", "file"),
    [
        ("datasets.0.path=data/no-such-folder", "data/no-such-folder"),
        ("datasets.0.path=gone.jsonl.gz", "gone.jsonl.gz"),
        ("datasets.0.path=/gone", "/gone"),
        ("datasets.0={path: data, data_files: [data/a.jsonl, gone.jsonl]}", "gone.jsonl"),
        ("datasets.0={path: gone.jsonl, data_files: data/a.jsonl}", "gone.jsonl"),
    ],
)
def test_missing_local_data_is_an_error(place, override, file):
    with pytest.raises(UserError) as refused:
        datafiles.record(with_data(override))
    assert str(refused.value) == f"datasets.0.path: {Path(file).absolute()} does not exist"


@pytest.mark.parametrize("files", ["", ", data_files: '**/**/**/*.txt'"])
def test_a_search_of_the_whole_disk_is_bounded(place, monkeypatch, files):
    monkeypatch.setattr(processes, "SECONDS", 0.01)
    monkeypatch.setattr(processes, "_exceeding", set())
    for i in range(3000):
        (place / "data" / f"{i}").mkdir()
    with pytest.raises(UserError) as refused:
        datafiles.record(with_data(f"datasets.0={{path: data{files}}}"))
    assert str(refused.value) == "data: takes more than 0.01 s or 256 MiB"


def test_training_steps(place):
    (place / "t.jsonl").write_text("{}\n" * 109 + "\n")
    base = with_data("datasets=[{path: t.jsonl}]") | {"num_epochs": 2}
    assert datafiles.training_steps(base) == 28  # 55 batches, 14 steps an epoch
    assert datafiles.training_steps(merging.override(base, "datasets.0.split", "train[:40]")) == 10
    assert datafiles.training_steps(base | {"num_epochs": 0.5}) == 7
    assert datafiles.training_steps(merging.override(base, "datasets.0.type", {"field_output": "a"})) == 28
    assert datafiles.training_steps(base | {"val_set_size": 0.1}) == 25  # 11 of 109 rows are held out
    assert datafiles.training_steps(base | {"num_epochs": 5}) == 69  # not five times an epoch's 14
    assert datafiles.training_steps(base, gpus=2) == 14
    assert datafiles.training_steps(base | {"max_steps": 50}) == 50  # Axolotl lets it win


@pytest.mark.parametrize(
    "change",
    [
        *({"sample_packing": True}, {"datasets": [{"path": "a/b"}]}),
        *(
            {"datasets": [{"path": "t.jsonl"} | odd]}
            for odd in ({"split": "train[5:9]"}, {"shards": 2}, {"weight": 3}, {"type": "completion"})
        ),
    ],
)
def test_training_steps_that_nobody_can_tell(place, change):
    (place / "t.jsonl").write_text("{}\n")
    assert datafiles.training_steps(with_data("datasets=[{path: t.jsonl}]") | change) is None
