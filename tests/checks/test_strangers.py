"""A run folder from elsewhere: its code, arguments and links need consent, and no record of its own can give that."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Recipe
from run_folders import a_run

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.checks import strangers
from qlora_recipes.runs import launch
from qlora_recipes.runs.lookup import all_runs
from qlora_recipes.runs.rundir import RunDir

NAME = "haider2024/code-llama-7b"
PLUGIN = "foreign-code:plugins.0"


def theirs(runs: Path, **record: Any) -> RunDir:
    """A run that was made elsewhere, whose plugin its record says was agreed to."""
    record = {"state": "interrupted", "set": {"plugins": ["mine.Plugin"]}, "forced": [PLUGIN]} | record
    return a_run(runs, NAME, "20260101-000000-abcdef0", 5.0, **record)


def unseen(folder: RunDir, *force: str) -> set[str]:
    try:
        strangers.refuse_unseen(folder, folder.read(), yamlfiles.read_yaml(folder.config), force)
    except UserError as error:
        return {line.rpartition("[")[2].rstrip("]") for line in str(error).splitlines()}
    return set()


def test_what_a_strangers_record_says_was_agreed_to_does_not_count(tmp_path: Path) -> None:
    folder = theirs(tmp_path, seal="0" * 64)
    assert unseen(folder) == {PLUGIN}
    assert unseen(folder, PLUGIN) == set()


def test_arguments_and_links_to_elsewhere_need_consent(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    folder = theirs(tmp_path / "runs", set={}, axolotl_arguments=["--debug"])
    (folder.path / "inside").symlink_to("config.yaml")
    assert unseen(folder) == {"foreign-arguments"}
    folder.output.symlink_to(tmp_path / "precious")
    assert unseen(folder) == {"foreign-arguments", "foreign-links"}


def test_a_run_of_ones_own_is_known_until_something_is_changed_in_it(tmp_path: Path) -> None:
    folder = theirs(tmp_path)
    record = folder.read()
    record.seal = strangers.seal(folder, record)
    folder.write(record)
    assert unseen(folder) == set()
    changed = yamlfiles.read_yaml(folder.config) | {"trust_remote_code": True}
    folder.config.write_text(yamlfiles.write_yaml(changed))
    assert unseen(folder) == {PLUGIN, "remote-code:trust_remote_code"}


def test_a_harmless_run_from_elsewhere_needs_nothing(tmp_path: Path) -> None:
    assert unseen(theirs(tmp_path, set={}, forced=[])) == set()


def test_no_key_no_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    folder = theirs(tmp_path / "runs")
    assert strangers.seal(folder, folder.read()) is None
    assert unseen(folder) == {PLUGIN}


def test_a_run_stays_ones_own_when_the_cache_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "kept"))
    paths.cache().mkdir(parents=True)
    strangers._make_key(paths.cache() / "seal")  # as earlier versions did
    key = (paths.cache() / "seal" / "key").read_bytes()
    folder = theirs(tmp_path / "runs")
    record = folder.read()
    record.seal = strangers.seal(folder, record)
    folder.write(record)
    shutil.rmtree(paths.cache())
    assert unseen(folder) == set()
    assert (paths.kept() / "seal" / "key").read_bytes() == key


@pytest.mark.parametrize("words", [("resume",), ("resume", "--prepare"), ("evaluate",)])
def test_no_verb_starts_a_strangers_run_unseen(tmp_path: Path, recipe: Recipe, words: tuple[str, ...]) -> None:
    folder = theirs(tmp_path / "runs")
    done = recipe(words[0], str(folder.path), *words[1:])
    assert done.returncode == 2
    assert "plugins.0: runs the code of mine.Plugin" in done.stderr
    assert not folder.log.exists()


def test_a_run_from_another_machine_resumes_without_its_recipes_file(
    tmp_path: Path, recipe: Recipe, stand_in: Path, tiny_profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "AXOLOTL", stand_in.with_name("axolotl"))
    assert recipe("run", NAME, "--profile", tiny_profile).returncode == 0
    (folder,) = all_runs(tmp_path / "runs")
    record = folder.read()
    record.state, record.seal, record.recipe_file = "interrupted", "0" * 64, "/home/me/checkout/variants/wide.yaml"
    folder.write(record)
    folder.config.write_text(folder.config.read_text() + "gc_steps: 4\n")  # a finding with a line
    done = recipe("resume", folder.path)
    assert (done.returncode, folder.read().state) == (0, "finished"), done.stderr
