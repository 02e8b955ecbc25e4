"""The memory of a deep model from traces of shallow ones is what running the deep model gives."""

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import SMALL, recipe_config
from families import SHIPPED

from qlora_recipes.base import paths
from qlora_recipes.configs import models
from qlora_recipes.planning import layers, memory, planner, traces
from qlora_recipes.planning import steps as steps_of
from qlora_recipes.planning.steps import Step
from qlora_recipes.planning.traces import MemoryTrace, Shape

DEEP = {**SMALL, "num_hidden_layers": 6}
SHAPE = (2, 64)
PLAIN: dict[str, Any] = {"axolotl": False, "checkpointing": None, "adapter": "lora", "optimizer": "adamw_torch"}


def assert_same(one: MemoryTrace, other: MemoryTrace) -> None:
    assert traces.usage(one) == traces.usage(other)
    assert (one.parameters, one.sizes, one.paged) == (other.parameters, other.sizes, other.paged)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"autocast": "float16", "padded": True, "optimizer": "paged_adamw_32bit"}, marks=pytest.mark.long),
        {"dropout": 0.05, "accumulates": True, "targets": "all-linear", "optimizer": "adamw_bnb_8bit"},
        pytest.param(
            {**PLAIN, "dora": True, "targets": ("q_proj", "v_proj"), "capability": (8, 9)}, marks=pytest.mark.long
        ),
        pytest.param(
            {"model": json.dumps({**DEEP, "model_type": "qwen3", "tie_word_embeddings": True}), "packed": True},
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_deep_trace_follows_from_shallow_ones(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step = replace(Step(model=json.dumps(DEEP), rank=8), **change)
    whole = memory.trace(step, SHAPE)
    traced = []
    trace = memory.trace

    def seen(step: Step, shape: Shape) -> MemoryTrace:
        traced.append(json.loads(step.model)["num_hidden_layers"])
        return trace(step, shape)

    monkeypatch.setattr(memory, "trace", seen)
    assert_same(layers.trace(step, SHAPE), whole)
    assert traced == [layers.SHALLOW, layers.SHALLOW + 1]


@pytest.mark.long
def test_what_does_not_follow_is_traced_whole() -> None:
    step = Step(model=json.dumps(DEEP), rank=8, checkpointing="reentrant")  # frees in an order of its own
    assert_same(layers.trace(step, SHAPE), memory.trace(step, SHAPE))
    assert layers._alike(step) and not layers._alike(replace(step, model=json.dumps({**DEEP, "model_type": "gemma2"})))


def test_what_does_not_come_once_for_each_layer_is_irregular() -> None:
    made = [(1, 512), (2, 1024), (1, -1), (2, -1)]
    tokens = layers._tokens([(1, 512), (2, 1024), (3, 1024), (4, 1536)])  # a size that is in no other place
    with pytest.raises(layers.Irregular):
        layers._sections(layers._tokens(made), tokens)


@pytest.mark.long
def test_the_memory_of_every_kind_of_shipped_recipe_and_family_is_the_whole_one() -> None:
    steps: dict[Step, Shape] = {}
    for name in paths.recipe_names():
        config = recipe_config(name)
        step, _ = steps_of.step_of(config, models.architecture(config), (8, 0))
        steps[step] = planner.Planner(step, steps_of.rows_of(config), steps_of.length_of(config)).shape
    for architecture, _ in SHIPPED.values():
        steps[Step(model=json.dumps(architecture), autocast="float16", padded=True)] = (1, 128)
    alike = [step for step in steps if layers._alike(step) > layers.SHALLOW + 1]
    assert len(alike) >= len(steps) - 4  # Gemma 2 and 3 have two kinds of layers
    first = min(alike, key=layers._alike)
    kinds = {replace(step, model=json.loads(step.model)["model_type"], rank=0): step for step in alike}  # sizes aside
    for step in (first, *kinds.values()):
        # the first one in its whole depth, the others in six layers, as each further layer has the same events
        some = step if step is first else layers._with_layers(step, layers.SHALLOW + 2)
        assert_same(layers.trace(some, steps[step]), memory.trace(some, steps[step]))
