"""Names that a user gives in part: which they stand for, and that a command says so."""

import shutil
from pathlib import Path

import orjson
import pytest
from conftest import recipe_config

from qlora_recipes.base import paths

BASE = "haider2024/all-linear/code-llama-7b"
PART = "all-linear/code"


def test_a_part_of_a_recipes_name_is_enough_and_the_whole_is_said(recipe):
    whole = recipe("run", BASE, "--dry-run")
    part = recipe("run", PART, "--dry-run")
    assert part.returncode == 0
    assert part.stdout == whole.stdout
    assert f"recipe {BASE}\n" in part.stderr
    assert f"recipe {BASE}\n" not in whole.stderr
    assert recipe.json("show", "linear/code-llama")["recipe"] == BASE


def test_a_variant_is_found_by_its_name_and_parts_of_that(recipe, tmp_path):
    recipe.ok("new", "mine/wide-r64", "--from", PART, "--set", "lora_r=64")
    header = (tmp_path / "variants/mine/wide-r64.yaml").read_text()[:2000]
    assert f"mine/wide-r64: a variant of {BASE}" in header
    for name in ("mine/wide-r64", "wide-r64", "wide", "r64"):
        diff = recipe("diff", name, "--json")
        assert orjson.loads(diff.stdout) == [{"key": "lora_r", BASE: 32, "mine/wide-r64": 64}], name
        assert ("recipe mine/wide-r64" in diff.stderr) == (name != "mine/wide-r64")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "variants/wode.yaml"), " variants/wide.yaml?"),
        (("show", "wide.yaml"), " wide?"),
        (("run", BASE, "--profile", "tensorb", "--rehearse", "--dry-run"), "use_tensorboard: true"),
        (("results", "haider", "--json"), "haider2024/llama-3-8b"),
        (("data", "fetch", "code", "--only", "nowhere"), "--only nowhere: "),
    ],
)
def test_files_profiles_studies_and_data_sets_by_a_part(recipe, tmp_path, words, says):
    (tmp_path / "variants").mkdir()
    shutil.copy(paths.RECIPES / f"{BASE}.yaml", tmp_path / "variants" / "wide.yaml")
    done = recipe(*words)
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("chek", "mine"), "'chek'. Did you mean 'check'?"),
        (("data", "fecth"), "'fecth'. Did you mean 'fetch'?"),
        (("study", "nwe"), "'nwe'. Did you mean 'new'?"),
        (("run", "mine", "--reherse"), "Did you mean '--rehearse'?"),
        (("--rnus", "x", "list"), "Did you mean '--runs'?"),
    ],
)
def test_a_misspelt_verb_or_option_names_the_nearest(recipe, words, says):
    assert says in recipe.fails(*words).stderr


def test_a_study_of_one_recipe_keeps_its_name(recipe, runs):
    Path("recipes", "sums2030", "wide.yaml").unlink()
    done = recipe("show", "sums2030")
    assert done.returncode == 0
    assert done.stderr == ""


def test_list_shows_the_variants_of_the_working_folder_by_the_names_that_run_takes(recipe, tmp_path):
    shipped = recipe.json("list")
    assert {row["variant_of"] for row in shipped} == {None}
    recipe.ok("new", "wide", "--from", BASE, "--set", "lora_r=64")
    recipe.ok("new", "more/wider", "--from", "wide", "--set", "num_epochs=1")
    (tmp_path / "variants" / "broken.yaml").write_text("lora_r: [1\n")  # hides no other
    listed = recipe("list", "--json")
    rows = orjson.loads(listed.stdout)
    assert rows[: len(shipped)] == shipped and listed.stderr.startswith("variants/broken.yaml:")
    wider, wide = rows[len(shipped) :]
    assert wide["recipe"] == "wide"
    assert wide["variant_of"] == BASE
    assert wide["epochs"] == recipe_config(BASE)["num_epochs"]
    assert wider["recipe"] == "more/wider"
    assert wider["variant_of"] == "wide"
    assert wider["epochs"] == 1
    assert wide["published_bleu4"] is None  # which is the recipe's
    matching = {name: {row["recipe"] for row in rows if name in row["recipe"]} for name in ("wider", "loftq")}
    matching["more/w*r"] = matching["wider"]
    for name, recipes in matching.items():
        listed = recipe.json("list", name.upper())
        assert {row["recipe"] for row in listed} == recipes != set()
    done = recipe("list", "llama-3-8x")
    assert done.returncode == 2
    assert "llama-3-8b" in done.stderr
    recipe.fails("list", str(tmp_path / "variants" / "wide.yaml"))
