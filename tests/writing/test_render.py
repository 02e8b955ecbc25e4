import re
import shutil
from pathlib import Path

import pytest
import recorded_runs
import run_folders
import yaml

from qlora_recipes.base import paths, processes
from qlora_recipes.base.errors import UserError
from qlora_recipes.data import studies
from qlora_recipes.results import score_records
from qlora_recipes.writing import render


def test_the_recipes_are_those_of_the_templates():
    recipes = render.rendered()
    assert render.drift(recipes) == ""
    assert render.orphans(recipes) == []


def test_the_row_of_a_recipe_shows_what_was_recorded(place, monkeypatch):
    study = studies.find("haider2024")
    for name, bleu4 in (("a", 5.0), ("b", 5.1)):
        run = recorded_runs.completed(run_folders.a_run(Path("runs"), "haider2024/llama-2-7b", name, bleu4))
        recorded_runs.recorded(run)
    here, built_in = score_records.records(study), score_records.built_in_records(study)
    assert len(here) == 2 + len(built_in)  # they are not beside the study's recipes
    with monkeypatch.context() as patch:  # as if they were
        patch.setattr(score_records, "built_in_records", lambda of: here if of.folder == study.folder else [])
        readme = render.rendered()[render.README]
    (line,) = [line for line in readme.splitlines() if line.startswith("| [haider2024/llama-2-7b]")]
    assert line.split(" | ")[5:] == ["5.02", "5.05", "retrained on RTX 4090, seed 42 and RTX 4090, seed 42 |"]


def test_one_study_is_rendered_without_the_readme_and_other_studies():
    recipes = render.rendered(only=["peft-metamathqa"])
    assert {paths.study_name(name) for name in recipes} == {"peft-metamathqa"}


def test_drift_shows_what_differs():
    recipes = render.rendered()
    name = "haider2024/llama-2-7b.yaml"
    recipes[name] = recipes[name].replace("adapter: qlora", "adapter: lora")
    drift = render.drift(recipes)
    assert "-adapter: qlora  # paper" in drift
    assert "+adapter: lora  # paper" in drift


def without_source(text: str) -> list[str]:
    """The settings of a recipe beside which no source stands."""
    body = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line for line in body if "  # " not in line and not re.match(r" +- \w+_proj$", line)]


@pytest.mark.parametrize("name", paths.recipe_names())
def test_every_setting_names_its_source(name):
    assert without_source((paths.RECIPES / f"{name}.yaml").read_text()) == []


def test_the_gains_of_table_ii_follow_from_its_scores():
    study = studies.study_of("haider2024/llama-2-7b")
    assert study
    assert set(study.published) <= set(paths.recipe_names())
    printed = study.baselines[0].scores
    gains = {  # in percent, as the paper prints them
        "llama-2-7b": {"bleu4": 17.29, "bertscore_f1": 0.59},
        "code-llama-7b": {"bleu4": 30.37, "bertscore_f1": 1.58},
        "llama-3-8b": {"bleu4": 23.13, "bertscore_f1": 1.53},
        "llama-3.1-8b": {"bleu4": 25.7, "bertscore_f1": 1.62},
        "llama-3.2-3b": {"bleu4": 6.07, "bertscore_f1": 0.28},
    }
    assert {f"haider2024/{name}" for name in gains} == set(study.published)
    for name, of_recipe in gains.items():
        scores = study.published[f"haider2024/{name}"].scores
        computed = {metric: 100 * float(scores[metric].value / printed[metric].value - 1) for metric in of_recipe}
        assert computed == pytest.approx(of_recipe, abs=0.02)


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    return Path(shutil.copytree(paths.TEMPLATES, tmp_path / "templates"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            '{% extends "haider2024/_base.yaml.j2" %}',
            "haider2024/_base.yaml.j2:5: 'base_model' is undefined",
            id="undefined-variable",
        ),
        pytest.param(
            "a: 1\nb: {{ name\n",
            "haider2024/other.yaml.j2:2: unexpected end of template, expected 'end of print statement'.",
            id="syntax",
        ),
        pytest.param(
            '{% extends "_recipe.yaml.j2" %}',
            "_recipe.yaml.j2:14: Required block 'header' not found",
            id="missing-block",
        ),
    ],
)
def test_a_broken_template_is_an_error_with_its_place(templates, text, message):
    (templates / "haider2024" / "other.yaml.j2").write_text(text)
    with pytest.raises(UserError) as refused:
        render.rendered(templates)
    assert str(refused.value) == f"{templates}/{message}"


@pytest.mark.parametrize(
    "text", ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}"]
)
def test_an_endless_template_is_an_error(templates, monkeypatch, text):
    monkeypatch.setattr(processes, "SECONDS", 0.3)
    (templates / "haider2024" / "_base.yaml.j2").write_text(text)
    (templates / "haider2024" / "other.yaml.j2").write_text('{% extends "haider2024/_base.yaml.j2" %}')
    with pytest.raises(UserError) as refused:
        render.rendered(templates)
    assert refused.value.problem == "takes more than 0.3 s or 256 MiB"


def test_no_study_repeats_what_all_recipes_share():
    parent = (paths.TEMPLATES / "_recipe.yaml.j2").read_text().partition("-#}\n")[2]
    shared = {line for line in parent.splitlines() if line and not line.startswith("{%")}
    assert len(shared) > 15
    for base in sorted(paths.TEMPLATES.glob("*/_base.yaml.j2")):
        lines = base.read_text().splitlines()
        assert lines[0] == '{% extends "_recipe.yaml.j2" %}', base
        assert shared.intersection(lines) == set(), base


PHI = "microsoft/Phi-3-mini-4k-instruct"


def template_for(templates: Path, model: str) -> str:
    """Text that a template like the study's renders for a model that the paper did not train."""
    lines = [
        '{% extends "haider2024/_base.yaml.j2" %}',
        f'{{% set base_model, base_model_source = "{model}", "this project: to compare" %}}',
        '{% set num_epochs, num_epochs_source = 2, "this project: as for the 7B models" %}',
        '{% set optimizer, optimizer_source = "adamw_bnb_8bit", "this project: as for Llama 3" %}',
        "{% set port = none %}",
    ]
    (templates / "haider2024" / "other.yaml.j2").write_text("\n".join(lines) + "\n")
    return render.rendered(templates)["haider2024/other.yaml"]


def test_a_template_for_a_model_of_another_family_says_what_is_true_of_that(templates):
    text = template_for(templates, PHI)
    settings = yaml.safe_load(text)
    assert settings["lora_target_modules"] == ["qkv_proj", "o_proj"]
    assert "special_tokens" not in settings
    assert "\n# special_tokens is not set: the tokenizer has a padding token, <|endoftext|>\n" in text
    assert "\n# Model     licence mit, not gated\n# Not known special tokens\n" in text
    assert re.findall("Table II|Unsloth|not one of the paper's runs", text) == ["not one of the paper's runs"]
    assert without_source(text) == []
    assert "| [haider2024/other](haider2024/other.yaml) |" in render.rendered(templates)[render.README]
