"""A small study of tests' own, declared in a study.yaml."""

from pathlib import Path
from typing import Any

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.configs.config import merge
from qlora_recipes.data import study

SUMS: dict[str, Any] = {
    "key": "sums",
    "name": "Sums",
    "source": "https://example.org/sums",
    "licence": "MIT",
    "sources": {
        "train.jsonl": {"url": "https://example.org/train.jsonl"},
        "test.csv": {"url": "https://example.org/test.csv"},
    },
    "row": {"input": "question ~ '?'", "output": "answer"},
    "carry": {"kind": "kind | default(none)"},
    "drop": {"no answer": "not output"},
    "splits": {
        "train": {"from": "train.jsonl"},
        "valid": {"out_of": "train", "draw": 4, "seed": 1},
        "test": {"from": "test.csv", "row": {"input": "sum", "output": "result"}, "drop": {}},
    },
}


def sums(folder: Path, changes: dict[str, Any] | None = None) -> study.Study:
    """The study in a folder, with some values of its data changed, by keys with > between them; None deletes one."""
    data = SUMS
    for keys, value in (changes or {}).items():
        data = merge(data, _below(keys.split(" > "), value))
    whole = yamlfiles.read_yaml(paths.RECIPES / "haider2024" / "study.yaml") | {"data": data, "baselines": []}
    for published in whole["published"].values():
        published.pop("predictions", None)  # which are among the files of that study's data
    (folder / "study.yaml").write_text(yamlfiles.write_yaml(whole))
    study._load.cache_clear()  # the file may be as old as one before it, in the time that a disk tells
    return study.load(folder)


def _below(keys: list[str], value: Any) -> dict[str, Any]:
    first, *rest = keys
    return {first: _below(rest, value) if rest else value}
