"""The trace of a deep model from shallow ones is the one that running the deep model gives."""

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import SMALL, recipe_config
from families import SHIPPED

from qlora_recipes.base import paths
from qlora_recipes.configs import models
from qlora_recipes.planning import layers, memory, planner
from qlora_recipes.planning import steps as steps_of
from qlora_recipes.planning.traces import Events, MemoryTrace, Shape, Step, ordered

DEEP = {**SMALL, "num_hidden_layers": 7}
SHAPES = [(2, 64), (2, 128)]
SLIDING = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
PLAIN: dict[str, Any] = {"axolotl": False, "checkpointing": None, "adapter": "lora", "optimizer": "adamw_torch"}


def renumbered(trace: MemoryTrace, shape: Shape) -> list[tuple[int, int, str]]:
    """All events with the storages numbered as they are made, and what each holds."""
    events: Events = []
    kinds: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for storage, size in trace.loaded + trace.steps[shape]:
        if size >= 0:
            numbers[storage] = len(kinds) + 1
            kinds[numbers[storage]] = trace.kinds[storage]
        events.append((numbers[storage], size))
    return [(storage, size, kinds[storage]) for storage, size in ordered(events)]


def assert_same(one: MemoryTrace, other: MemoryTrace) -> None:
    assert one.steps.keys() == other.steps.keys()
    for shape in one.steps:
        assert renumbered(one, shape) == renumbered(other, shape)
    for each in (one, other):
        each.loaded, each.steps, each.kinds = [], {}, {}
    assert one == other


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"autocast": "float16", "padded": True, "optimizer": "paged_adamw_32bit"}, marks=pytest.mark.long),
        {"dropout": 0.05, "accumulates": True, "targets": "all-linear", "optimizer": "adamw_bnb_8bit"},
        {**PLAIN, "dora": True, "targets": ("q_proj", "v_proj"), "capability": (8, 9)},
        pytest.param(
            {"adapter": None, "weights": "float32", "checkpointing": "reentrant", "capability": None},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"model": json.dumps({**DEEP, "model_type": "qwen3", "tie_word_embeddings": True}), "packed": True},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"model": json.dumps({**DEEP, **SLIDING, "layer_types": ["sliding_attention"] * 7}), "capability": (8, 0)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_deep_trace_follows_from_shallow_ones(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    step = replace(Step(model=json.dumps(DEEP), rank=8), **change)
    whole = memory.trace(step, SHAPES)
    deepest = []
    trace = memory.trace

    def seen(step: Step, shapes: list[Shape]) -> MemoryTrace:
        deepest.append(json.loads(step.model)["num_hidden_layers"])
        return trace(step, shapes)

    monkeypatch.setattr(memory, "trace", seen)
    assert_same(layers.trace(step, SHAPES), whole)
    assert deepest in ([3, 4], [3, 4, 5])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {"targets": r"model\.layers\.\d\.self_attn\.q_proj", "model": json.dumps(DEEP | {"num_hidden_layers": 12})},
            marks=pytest.mark.long,
        ),
        {"model": json.dumps({**DEEP, "model_type": "gemma2", "num_hidden_layers": 7})},
    ],
)
def test_layers_that_differ_are_traced_one_by_one(change: dict[str, Any]) -> None:
    step = replace(Step(model=json.dumps(DEEP), rank=8), **change)
    assert_same(layers.trace(step, SHAPES[:1]), memory.trace(step, SHAPES[:1]))


@pytest.mark.long
def test_shapes_that_allocate_otherwise_are_traced_as_they_are() -> None:
    """A row that is as long as the window needs a mask."""
    model = json.dumps({**DEEP, "model_type": "mistral", "sliding_window": 128})
    step, shapes = Step(model=model, capability=(8, 0)), [(1, 64), (1, 192)]
    assert_same(layers.trace(step, shapes), memory.trace(step, shapes))


@pytest.mark.parametrize(
    "deeper",
    [
        [(1, 8), (2, 16), (3, 16), (4, 24)],  # a size that comes once and is in no other place
        [(1, 8), (2, 16), (2, -1), (1, -1)],  # frees another one
    ],
)
def test_what_does_not_come_once_for_each_layer_is_irregular(deeper: Events) -> None:
    with pytest.raises(layers.Irregular):
        layers._growth([(1, 8), (2, 16), (1, -1), (2, -1)], deeper, 3)


@pytest.mark.long
def test_the_trace_of_every_shipped_recipe_and_family_is_the_whole_one() -> None:
    steps: dict[Step, Shape] = {}
    for name in paths.recipe_names():
        config = recipe_config(name)
        step, _ = steps_of.step_of(config, models.architecture(config), (8, 0))
        steps[step] = planner.Planner(step, steps_of.rows_of(config), steps_of.length_of(config))._shapes()[0]
    for architecture, _ in SHIPPED.values():
        steps[Step(model=json.dumps(architecture), autocast="float16", padded=True)] = (1, 128)
    alike = [step for step in steps if layers._alike(step) > layers.SHALLOW[-1]]
    assert len(alike) >= len(steps) - 4  # Gemma 2 and 3 have two kinds of layers
    for number, step in enumerate(sorted(alike, key=layers._alike)):
        # the first one in its whole depth, the others in six layers, as each further layer has the same events
        shape, some = steps[step], layers._with_layers(step, 6) if number else step
        assert_same(layers.trace(some, [shape]), memory.trace(some, [shape]))
