"""A study's sample stands for its data in rehearsals, in the form that its recipes read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import typed
from declared import sums

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.files import sha256, write_rows
from qlora_recipes.config.compose import Composed, Request, compose
from qlora_recipes.data import prepare, studies

ROWS = [{"question": f"{i} + 1", "answer": f"It is {i + 1}."} for i in range(12)]
OWN: dict[str, Any] = {"field_instruction": "input", "field_output": "output", "format": "Q: {instruction}\nA:"}
CHAT = {"type": "chat_template", "field_messages": "messages"}


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of recipes with the first study and another one, which has a sample."""
    folder = tmp_path / "recipes"
    (folder / "sums" / "few").mkdir(parents=True)
    for name in ("haider2024", "axolotl.schema.json"):
        (folder / name).symlink_to(paths.RECIPES / name)
    write_rows(folder / "sums" / "few" / "train.jsonl", ROWS)
    sums(folder / "sums", {"data > sample": "few"})
    monkeypatch.setattr(paths, "RECIPES", folder)
    yield folder
    studies._load.cache_clear()


def rehearsed(recipes: Path, *overrides: str, **changes: Any) -> Composed:
    """A recipe of the study, composed for a rehearsal."""
    first = yamlfiles.read_yaml(recipes / "haider2024" / "llama-2-7b.yaml")
    train = {"path": "data/sums/train.jsonl", "type": OWN} | changes.pop("entry", {})
    valid = train | {"path": "data/sums/valid.jsonl"}
    content = first | {"datasets": [train], "test_datasets": [valid]} | changes
    (recipes / "sums" / "one.yaml").write_text(yamlfiles.write_yaml(content))
    return compose(Request("sums/one", rehearse=True, overrides=typed(*overrides)))


@pytest.mark.parametrize("entry", [{"type": OWN}, CHAT, {"type": None, "ds_type": "json"}], ids=str)
def test_a_recipes_data_sets_keep_their_types(recipes, entry):
    config = rehearsed(recipes, entry=entry).config
    folder = prepare.rehearsal_data(studies.find("sums"), "default")
    train = {"path": str(folder / "train.jsonl"), "type": OWN, "split": "train[:32]"} | entry
    assert config["datasets"] == [train]
    assert config["test_datasets"] == [train | {"path": str(folder / "valid.jsonl"), "split": "train[:8]"}]
    rows = [orjson.loads(line) for line in (folder / "train.jsonl").read_bytes().splitlines()]
    assert rows[0] == {"input": "0 + 1?", "output": "It is 1."}
    assert len(rows) == 9  # a quarter of the few, not 4 of them, is drawn for validation


def test_a_recipe_is_no_longer_than_the_samples_rows_need_or_than_it_was(recipes):
    assert rehearsed(recipes, sequence_len=2048).config["sequence_len"] == 256
    assert rehearsed(recipes, sequence_len=128).config["sequence_len"] == 128
    assert rehearsed(recipes, "sequence_len=300", sequence_len=128).config["sequence_len"] == 300


def test_rows_that_are_no_studys_are_exchanged_for_those_of_the_first(recipes):
    [entry] = rehearsed(recipes, entry={"path": "owner/name"}).config["datasets"]
    first = prepare.rehearsal_data(studies.find("haider2024"), "diff")
    assert entry == {"path": str(first / "train.jsonl"), "split": "train[:32]", "type": "alpaca"}


def test_the_first_studys_sample_is_prepared_to_known_bytes():
    for form, expected in (
        ("diff", {"train": "60be135a4dfa", "valid": "82a4b0d94ede", "test": "249c6444e337"}),
        ("tagged", {"train": "d20733cbee9a", "valid": "6d98a8fd841f", "test": "5116465649d0"}),
    ):
        folder = prepare.rehearsal_data(studies.find("haider2024"), form)
        assert {split: sha256(folder / f"{split}.jsonl")[:12] for split in expected} == expected


def test_the_rows_of_a_users_study_are_prepared(recipes, recipe, tmp_path):
    assert recipe.fails("data", "prepare", "--study", "sums").stderr == (
        "recipe: data/sums-raw/train.jsonl: no such file; run `recipe data fetch sums`, or give its folder to `recipe "
        "data prepare --study STUDY`\n"
    )
    (recipes / "sums" / "one.yaml").write_text("pretraining_dataset: []\n")
    sums(recipes / "sums", {"data > sample": "few", "published > sums/one": {"trainer": "Axolotl"}})
    done = recipe.ok("data", "prepare", recipes / "sums" / "few", "--study", "sums")
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:3]] == [["train.jsonl", "8"], ["valid.jsonl", "4"]]
    assert "data/sums/manifest.json" in done.stdout
    commands = studies.prepare_commands("data/sums/test.jsonl")
    assert commands == "`recipe data fetch sums` and `recipe data prepare --study sums`"


def test_fetched_files_and_manifests_as_json(recipes, recipe, tmp_path):
    (recipes / "sums" / "one.yaml").write_text("pretraining_dataset: []\n")
    sums(recipes / "sums", {"data > sample": "few", "published > sums/one": {"trainer": "Axolotl"}})
    raw = tmp_path / "data" / "sums-raw" / "train.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_bytes((recipes / "sums" / "few" / "train.jsonl").read_bytes())
    row = {"file": "train.jsonl", "bytes": raw.stat().st_size, "sha256": sha256(raw), "verified": None}
    assert recipe.json("data", "fetch", "sums", "--only", "train") == [row]
    manifests = recipe.json("data", "prepare", raw.parent, "--study", "sums")
    assert manifests == {"data/sums": orjson.loads((tmp_path / "data/sums/manifest.json").read_bytes())}
    assert manifests["data/sums"]["splits"]["train"]["rows"] == 8


def test_what_a_recipe_starts_from_is_fetched_and_not_in_a_rehearsal(recipes, recipe):
    model = {"hub": "owner/adapter", "kind": "model", "revision": "main", "file": "init/adapter_config.json"}
    sums(recipes / "sums", {"data > sample": "few", "data > sources > init/adapter_config.json": model})
    studies._load.cache_clear()
    init = {"lora_model_dir": "data/sums-raw/init"}
    assert rehearsed(recipes, **init).config.get("lora_model_dir") is None
    checked = recipe("check", "sums/one")
    assert "lora_model_dir: data/sums-raw/init " in checked.stdout
    assert "`recipe data fetch sums`" in checked.stdout
    wrong = recipe.fails("data", "fetch", "sums", "--only", "test.csvv")
    assert wrong.stderr == "recipe: --only test.csvv: no source of that name; did you mean test.csv?\n"
