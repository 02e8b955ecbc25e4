"""Trials and name of a sweep, from its file and from --set."""

from pathlib import Path
from typing import Any

import pytest
from conftest import recipe_config

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.study.sweep import Grid, Trial


def grid_of(folder: Path, text: str) -> Grid:
    (folder / "s.yaml").write_text(text)
    return Grid.from_file(folder / "s.yaml")


def as_texts(content: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((key, str(value)) for key, value in content.items())


def test_trials_are_those_of_axolotl(tmp_path):
    """In another order, since Axolotl's is by chance."""
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    content = {"_": [{"lora_r": 8, "lora_alpha": 4}, {"lora_r": 16, "lora_alpha": 8}], "learning_rate": [1e-4, 2e-4]}
    base = recipe_config("haider2024/code-llama-7b")
    theirs = generate_sweep_configs(base, content)
    ours = [base | trial.settings for trial in grid_of(tmp_path, yamlfiles.write_yaml(content)).trials()]
    assert sorted(map(as_texts, ours)) == sorted(map(as_texts, theirs))


def test_values_come_from_the_command_line_too():
    grid = Grid.from_overrides(["lora_target_modules=[q_proj], [q_proj, v_proj]", "num_epochs=1"])
    assert grid.name == "lora_target_modules=-q_proj-,-q_proj,-v_proj-+num_epochs=1"
    assert grid.trials() == [
        Trial(name="lora_target_modules=[q_proj]", settings={"lora_target_modules": ["q_proj"], "num_epochs": 1}),
        Trial(
            name="lora_target_modules=[q_proj, v_proj]",
            settings={"lora_target_modules": ["q_proj", "v_proj"], "num_epochs": 1},
        ),
    ]
    assert grid.keys() == ["lora_target_modules"]


def test_values_from_the_command_line_replace_those_of_the_file(tmp_path):
    grid = grid_of(tmp_path, "lora_r: [8, 16]\nseed: [1]").merged(Grid.from_overrides(["lora_r=32"]))
    assert grid.name == "s+lora_r=32"
    assert grid.trials() == [Trial(name="as it is", settings={"lora_r": 32, "seed": 1})]


def test_long_names_of_different_sweeps_differ():
    first, second = (Grid.from_overrides([f"seed={','.join(map(str, range(count)))}"]) for count in (100, 101))
    assert len(first.name) == 200
    assert first.name != second.name


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("lora_r: 16", ":1: lora_r: expected a list of values", id="no list"),
        pytest.param("a: [1]\nlora_r: []", ":2: lora_r: expected a list of values", id="no value"),
        pytest.param("_: [1]", ": _: expected a list of mappings, as in `- {name: Wide, lora_r: 64}`", id="no mapping"),
        pytest.param(
            "_:\n- {name: a, lora_r: 1}\n- {name: a, lora_r: 2}",
            ": two trials are called a; give each entry of _ a different name",
            id="same name",
        ),
        pytest.param("a", ": not a mapping of keys to values", id="no settings"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, problem):
    with pytest.raises(UserError) as refused:
        grid_of(tmp_path, text).trials()
    assert str(refused.value) == f"{tmp_path}/s.yaml{problem}"


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        pytest.param([], "no values to try; give a sweep file, or values as in --set lora_r=16,32", id="none"),
        pytest.param(
            ["lora_r=8,8"],
            "--set: two trials are called lora_r=8; give each entry of _ a different name",
            id="same value",
        ),
        pytest.param(
            ["lora_r=8", "lora_r=16"],
            "--set: lora_r is given twice; give all values at once, as in --set lora_r=1,2",
            id="same key",
        ),
    ],
)
def test_options_without_a_sweep_are_refused(texts, problem):
    with pytest.raises(UserError) as refused:
        Grid.from_overrides(texts).trials()
    assert str(refused.value) == problem
