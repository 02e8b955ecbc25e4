"""A small study of tests' own, declared in a study.yaml."""

from pathlib import Path
from typing import Any

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.config.merging import merge
from qlora_recipes.data import studies

SUMS: dict[str, Any] = {
    "key": "sums",
    "name": "Sums",
    "source": "https://example.org/sums",
    "licence": "MIT",
    "sources": {
        "train.jsonl": {"url": "https://example.org/train.jsonl"},
        "test.csv": {"url": "https://example.org/test.csv"},
    },
    "fields": {"input": "question ~ '?'", "output": "answer"},
    "extra_fields": {"kind": "kind | default(none)"},
    "filters": {"no answer": "not output"},
    "splits": {
        "train": {"from": "train.jsonl"},
        "valid": {"sample_from": "train", "sample": 4, "seed": 1},
        "test": {"from": "test.csv", "fields": {"input": "sum", "output": "result"}, "filters": {}},
    },
}


def sums(folder: Path, changes: dict[str, Any] | None = None) -> studies.Study:
    """The study in a folder, with some values changed, by keys of study.yaml with > between them; None deletes one."""
    content = yamlfiles.read_yaml(paths.RECIPES / "haider2024" / "study.yaml") | {"data": SUMS, "baselines": []}
    for published in content["published"].values():
        published.pop("predictions", None)  # which are among the files of that study's data
    for variant in content["ablations"].values():
        variant.pop("log", None)  # whose learning rates are in another file
    for keys, value in (changes or {}).items():
        content = merge(content, _below(keys.split(" > "), value))
    (folder / "study.yaml").write_text(yamlfiles.write_yaml(content))
    studies._load.cache_clear()  # the file may be as old as one before it, in the time that a disk tells
    return studies.load(folder)


def _below(keys: list[str], value: Any) -> dict[str, Any]:
    first, *rest = keys
    return {first: _below(rest, value) if rest else value}
