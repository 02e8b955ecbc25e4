"""Plans that ship with the recipes, and what makes them stale."""

import json
from dataclasses import asdict

import plans
import pytest
from conftest import SMALL, config_with

from qlora_recipes.base import paths
from qlora_recipes.config import gpus, merging
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.plan import step_plan, steps
from qlora_recipes.plan.step_plan import Memory, StepPlan

PARTS = 4  # of the traces, so that several processes share them
REMEDY = "run `.venv/bin/python tools/plans.py`, and with --all if only figures differ"


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test fail that traces a step."""

    def traced(self: StepPlan) -> Memory:
        raise AssertionError(f"traced: {self.step}")

    monkeypatch.setattr(StepPlan, "traced", traced)


@pytest.fixture
def llama() -> StepPlan:
    return step_plan.plan_step(compose(Request("haider2024/llama-3-8b")).config, gpus.find_gpu("T4"))[0]


def test_the_file_has_the_steps_of_the_built_in_recipes_and_no_others():
    assert json.loads(step_plan.BUILT_IN.read_bytes())["versions"] == step_plan.packages(), REMEDY
    assert step_plan.built_in().keys() == plans.step_plans().keys(), REMEDY


def test_a_study_that_fits_is_planned_without_a_trace(recipe, untraced):
    planned = recipe.json("plan", "haider2024", "--gpu", "Quadro RTX 5000")
    assert [row["recipe"] for row in planned] == [name for name in paths.recipe_names() if "haider2024/" in name]
    assert [row["gpus"][0]["fits"] for row in planned] == [True] * 8


def test_other_versions_of_the_packages_need_a_trace(llama, monkeypatch):
    assert llama.stored
    monkeypatch.setattr(step_plan, "packages", lambda: {"torch": "3"})
    assert StepPlan(llama.step, llama.rows, llama.length).stored is None


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_file_needs_a_trace(llama, content, tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    file.write_text(content)
    monkeypatch.setattr(step_plan, "BUILT_IN", file)
    step_plan.built_in.cache_clear()
    try:
        assert llama.stored is None
    finally:
        step_plan.built_in.cache_clear()


@pytest.mark.parametrize(
    ("capability", "alike"),
    [
        ((7, 0), (7, 5)),
        ((7, 5), (7, 5)),
        ((8, 0), (8, 0)),
        ((8, 9), (8, 0)),
        ((9, 0), (9, 0)),
        ((10, 0), (8, 0)),
        ((12, 0), (8, 0)),
    ],
)
def test_gpus_with_the_same_kernels_share_a_plan(capability, alike):
    assert steps.step_of(config_with({}), SMALL, capability)[0].capability == alike


def kind(plan: StepPlan) -> str:
    """The settings of a step that a trace depends on, apart from sizes and the generation of GPUs."""
    step = asdict(plan.step)
    for name in ("model", "rank", "targets", "dropout", "capability"):
        step.pop(name)
    return json.dumps([step, plan.pair_loss and asdict(plan.pair_loss)], sort_keys=True)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_built_in_figures_are_those_of_a_new_trace(part):
    """One step of each kind, of a recipe and a generation of GPUs that the order of the keys chooses."""
    by_kind = {kind(step): (key, step) for key, step in sorted(plans.step_plans().items(), reverse=True)}
    chosen = dict(sorted(by_kind.values())[part::PARTS])
    assert len(by_kind) >= 30
    traced = dict(merging.flatten({key: asdict(step.traced()) for key, step in chosen.items()}))
    built_in = dict(merging.flatten({key: step_plan.built_in()[key] for key in chosen}))
    changed = {key: value for key, value in traced.items() if value != built_in.get(key)}
    assert changed == {key: built_in.get(key) for key in changed}, REMEDY
    assert traced.keys() == built_in.keys(), REMEDY
