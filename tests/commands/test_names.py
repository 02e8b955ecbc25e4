"""Names that a user gives in part: which they stand for, and that a command says so."""

import shlex
import shutil
from pathlib import Path

import orjson
import pytest
from conftest import recipe_config

from qlora_recipes.base import paths

BASE = "haider2024/all-linear/code-llama-7b"
PART = "all-linear/code"


def test_a_part_of_a_recipes_name_is_enough_and_the_whole_is_said(recipe):
    full_name = recipe("run", BASE, "--dry-run")
    part = recipe("run", PART, "--dry-run")
    assert part.returncode == 0
    assert part.stdout == full_name.stdout
    assert part.stderr == f"recipe {BASE}\n{full_name.stderr}"
    assert recipe.json("show", "linear/code-llama")["recipe"] == BASE


def test_a_variant_is_found_by_its_name_and_parts_of_that(recipe, tmp_path):
    recipe.ok("new", "mine/wide-r64", "--from", PART, "--set", "lora_r=64")
    header = (tmp_path / "variants/mine/wide-r64.yaml").read_text()[:2000]
    assert f'# parent = "{BASE}"' in header
    for name in ("mine/wide-r64", "wide-r64", "wide", "r64"):
        diff = recipe("diff", name, "--json")
        assert orjson.loads(diff.stdout) == [{"key": "lora_r", BASE: 32, "mine/wide-r64": 64}]
        assert diff.stderr == ("" if name == "mine/wide-r64" else "recipe mine/wide-r64\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("show variants/wode.yaml", "variants/wode.yaml: does not exist; did you mean variants/wide.yaml?"),
        ("show wide.yaml", "wide.yaml: does not exist; did you mean wide?"),
        (
            "data fetch code --only nowhere",
            "--only nowhere: no source of that name; there are Comment_Generation.zip, msg-5000-pred.txt, "
            "msg-5000-gold.txt",
        ),
        (
            "list llama-3-8x",
            "llama-3-8x: no recipe of that name; did you mean llama-3-8b or llama-3.1-8b or llama-3.2-3b?",
        ),
        (
            "list variants/wide.yaml",
            "variants/wide.yaml: a file, not a name; `recipe show variants/wide.yaml` prints its settings",
        ),
        (
            "list 'variants/a; rm b.yaml'",
            "variants/a; rm b.yaml: a file, not a name; `recipe show 'variants/a; rm b.yaml'` prints its settings",
        ),
    ],
)
def test_a_name_of_nothing_is_refused_with_similar_names(recipe, tmp_path, words, message):
    (tmp_path / "variants").mkdir()
    for name in ("wide.yaml", "a; rm b.yaml"):
        shutil.copy(paths.RECIPES / f"{BASE}.yaml", tmp_path / "variants" / name)
    assert recipe.fails(*shlex.split(words)).stderr == f"recipe: {message}\n"


def test_profiles_and_studies_are_named_by_a_part(recipe):
    dry_run = recipe.ok("run", BASE, "--profile", "tensorb", "--rehearse", "--dry-run")
    assert "use_tensorboard: true" in dry_run.stdout.splitlines()
    rows = recipe.json("results", "haider")
    assert "haider2024/llama-3-8b" in [row["recipe"] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chek mine", "No such command 'chek'. Did you mean 'check'?"),
        ("data fecth", "No such command 'fecth'. Did you mean 'fetch'?"),
        ("study nwe", "No such command 'nwe'. Did you mean 'new'?"),
        ("run mine --reherse", "No such option '--reherse'. Did you mean '--rehearse'?"),
        ("--rnus x list", "No such option '--rnus'. Did you mean '--runs'?"),
    ],
)
def test_a_misspelt_verb_or_option_names_the_nearest(recipe, words, message):
    assert recipe.fails(*words.split()).stderr.splitlines()[-1] == f"Error: {message}"


def test_a_study_of_one_recipe_stands_for_it_where_a_recipe_is_named(recipe, runs):
    Path("recipes", "sums2030", "wide.yaml").unlink()
    assert recipe.ok("show", "sums2030").stderr == "recipe sums2030/plain\n"
    assert "recipe sums2030/plain" not in recipe("check", "sums2030", "--quick").stderr.splitlines()


def test_list_shows_the_variants_of_the_working_folder_by_the_names_that_run_takes(recipe, tmp_path):
    built_in = recipe.json("list")
    assert {row["variant_of"] for row in built_in} == {None}
    recipe.ok("new", "wide", "--from", BASE, "--set", "lora_r=64")
    recipe.ok("new", "more/wider", "--from", "wide", "--set", "num_epochs=1")
    (tmp_path / "variants" / "broken.yaml").write_text("lora_r: [1\n")  # hides no other
    listed = recipe("list", "--json")
    rows = orjson.loads(listed.stdout)
    assert rows[: len(built_in)] == built_in
    assert listed.stderr == "variants/broken.yaml:2: not valid YAML: did not find expected ',' or ']' (column 1)\n"
    wider, wide = rows[len(built_in) :]
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


@pytest.mark.parametrize("pattern", ["llama-3*", "haider2024/llama-*", "w*r"])
def test_list_takes_a_pattern_for_the_same_recipes_as_check(recipe, pattern):
    recipe.ok("new", "more/wider", "--from", BASE, "--set", "num_epochs=1")
    listed = {row["recipe"] for row in recipe.json("list", pattern)}
    checked = {report["checked"] for report in recipe.json("check", pattern, "--quick")}
    assert listed == checked != set()
