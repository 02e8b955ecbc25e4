"""Jobs that need a GPU, with figures that are made up in the place of their trainings': what they find."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from conftest import SMALL, recipe_config
from run_folders import a_run

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import append_line, write_json
from qlora_recipes.configs import gpus, models
from qlora_recipes.data.verified import judge
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.verifying import bench, jobs, memory, plugin, trainings
from qlora_recipes.verifying.bench import Bench, Figures
from qlora_recipes.verifying.lines import all_lines

GIB = 2**30
RECIPE = "haider2024/llama-3-8b"


@pytest.fixture
def at(tmp_path: Path) -> Bench:
    """A bench with two A100s, whose memory is mostly in use."""
    return Bench(tmp_path, gpu=gpus.find("A100"), gpus=2, free=15 * GIB, bf16=True)


def failing(at: Bench, job: str) -> set[str]:
    """The lines of a job that fail; each has a figure."""
    figures: Figures = jobs.measure(job, at)
    lines = [line for line in all_lines(at) if line.job == job]
    assert figures.keys() == {line.name for line in lines}
    return {
        line.name
        for line in lines
        if judge(figures[line.name].measured, figures[line.name].expected, line.bound) == "failed"
    }


def a_training(at: Bench, name: str, settings: dict[str, Any], losses: list[float], **more: Any) -> RunDir:
    """A run with losses, gradient norms and seconds of its steps."""
    folder = a_run(at.runs / name, RECIPE, "20260101-000000-aaaaaaa", bleu4=1.0)
    changed = recipe_config(RECIPE) | settings
    folder.config.write_text(yamlfiles.write_yaml({key: value for key, value in changed.items() if value is not None}))
    norms = more.get("norms", [1.0] * len(losses))
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        record = {"step": step, "loss": loss, "grad_norm": norm, "tokens": 100}
        seconds = 60.0 if step == 1 else 100 / more.get("rate", 100.0)
        append_line(folder.metrics, orjson.dumps(record | {"step_seconds": seconds}))
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all models be small."""
    small = SMALL | {"max_position_embeddings": 4096}
    monkeypatch.setattr(models, "architecture", lambda config, download=True: dict(small))
    monkeypatch.setattr(trainings, "free_memory", lambda: 15 * GIB)


SHAPE = f"shape:{RECIPE}"
OFF: list[tuple[dict[str, float], set[str]]] = [
    ({}, set()),
    ({"allocated": 1.03}, {"llama-3-8b: allocated"}),
    ({"allocated": 0.97}, {"llama-3-8b: allocated"}),
    ({"reserved": 1.2}, {"llama-3-8b: reserved"}),
    ({"used": 1.2}, {"llama-3-8b: in use, by the driver"}),
    ({"rate": 0.4}, {"llama-3-8b: tokens/s"}),
]


@pytest.mark.parametrize(("off", "expected"), OFF)
def test_a_shape_is_measured_beside_its_plan(
    at: Bench, small: None, monkeypatch: pytest.MonkeyPatch, off: dict[str, float], expected: set[str]
) -> None:
    def train(at: Bench, name: str, recipe: str, settings: dict[str, Any]) -> RunDir:
        assert (Path(settings["base_model"]) / "model.safetensors.index.json").is_file()
        folder = a_training(at, name, settings, [])
        config = yamlfiles.read_yaml(folder.config)
        plan = memory.planned(config, at)
        assumed = memory.speed(config, at, None).expected
        assert plan.reserved and plan.needed and assumed
        found = {
            "allocated": plan.allocated * off.get("allocated", 1),
            "reserved": plan.reserved * off.get("reserved", 1),
            "free": 15 * GIB - plan.needed * off.get("used", 1),
            "parts": plan.parts,
        }
        write_json(folder.path / bench.MEMORY, found)
        rate = assumed * off.get("rate", 1)
        for step, seconds in ((1, 1000.0), (2, 100 / rate)):  # the first step does not count
            append_line(folder.metrics, orjson.dumps({"step": step, "tokens": 100, "step_seconds": seconds}))
        return folder

    monkeypatch.setattr(trainings, "train", train)
    assert failing(at, SHAPE) == expected
    assert not list((at.folder / "models").iterdir())


@pytest.mark.parametrize(
    ("losses", "norms", "expected"),
    [
        ({}, [1.0, 1.0, 1.0], set()),
        ({"in-fp16": [4.0, 3.9, 3.3]}, [1.0, 1.0, 1.0], {"fp16 losses"}),
        ({"in-bf16": [4.0, 3.9, None]}, [1.0, 1.0, 1.0], {"bf16 losses"}),
        ({"in-fp16": [4.0, 3.9]}, [1.0, 1.0], {"fp16 losses"}),
        ({}, [None, None, 1.0], set()),
        ({}, [None, None, None], {"fp16 steps that overflow"}),
    ],
)
def test_half_precision_is_measured_beside_fp32(
    at: Bench,
    monkeypatch: pytest.MonkeyPatch,
    losses: dict[str, list[float]],
    norms: list[float],
    expected: set[str],
) -> None:
    def train(at: Bench, name: str, recipe: str, settings: dict[str, Any]) -> RunDir:
        assert (settings["fp16"], settings["bf16"]) == (name == "in-fp16", name == "in-bf16")
        of_name = losses.get(name, [4.0, 3.9, 3.8])
        return a_training(at, name, settings, of_name, norms=norms if name == "in-fp16" else [1.0] * len(of_name))

    monkeypatch.setattr(trainings, "train", train)
    monkeypatch.setattr(trainings, "of_stand_in", lambda at, **changes: changes)
    assert failing(at, "precision") == expected


@pytest.mark.parametrize(("last", "expected"), [(3.801, set()), (3.9, {"zero3 losses"})])
def test_an_engine_is_measured_beside_one_gpu(
    at: Bench, monkeypatch: pytest.MonkeyPatch, last: float, expected: set[str]
) -> None:
    trained: list[tuple[str, str]] = []

    def train(at: Bench, name: str, recipe: str, settings: dict[str, Any], engine: str = "") -> RunDir:
        trained.append((name, engine))
        return a_training(at, name, settings, [4.0, 3.9, last if engine == "zero3" else 3.8])

    monkeypatch.setattr(trainings, "train", train)
    monkeypatch.setattr(trainings, "of_stand_in", lambda at, **changes: changes)
    assert failing(at, "engine:ddp") == set()
    assert failing(at, "engine:zero3") == expected
    assert trained == [("alone", ""), ("under-ddp", "ddp"), ("under-zero3", "zero3")]  # the one GPU's only once


@pytest.mark.parametrize(
    ("last", "rate", "expected"),
    [
        (3.801, 150.0, set()),
        (3.801, 96.0, set()),
        (3.801, 80.0, {"fast, tokens/s"}),
        (3.9, 150.0, {"fast, losses"}),
        (None, 150.0, {"fast, losses"}),
    ],
)
def test_fast_is_measured_beside_the_recipe(
    at: Bench, small: None, monkeypatch: pytest.MonkeyPatch, last: float | None, rate: float, expected: set[str]
) -> None:
    trained: dict[str, str] = {}

    def train(at: Bench, name: str, recipe: str, settings: dict[str, Any], profile: str = "") -> RunDir:
        trained[name] = profile
        assert (settings["lora_dropout"], settings["lora_target_linear"]) == (0.0, True)
        losses = [4.0, 3.9, *([] if profile and last is None else [last if profile else 3.8])]
        return a_training(at, name, settings, losses, rate=rate if profile else 100.0)

    monkeypatch.setattr(trainings, "train", train)
    monkeypatch.setattr(trainings, "of_stand_in", lambda at, **changes: changes)
    assert failing(at, "fast") == expected
    assert list(trained.values()) == ["", "fast", "", "fast"]
    assert not list((at.folder / "models").iterdir())


@pytest.mark.parametrize(("rate", "expected"), [(150.0, set()), (80.0, {"packed, tokens/s"})])
def test_padding_at_the_end_of_packed_sequences_is_no_speed(
    at: Bench, small: None, monkeypatch: pytest.MonkeyPatch, rate: float, expected: set[str]
) -> None:
    def train(at: Bench, name: str, recipe: str, settings: dict[str, Any], profile: str = "") -> RunDir:
        steps = 5 if profile else 4  # a fifth of what is counted is padding
        return a_training(at, name, settings, [4.0] * steps, rate=rate / 0.8 if profile else 100.0)

    monkeypatch.setattr(trainings, "train", train)
    noted: list[str] = []
    slower = trainings._slower
    monkeypatch.setattr(trainings, "_slower", lambda *rates: noted.append(slower(*rates).note) or slower(*rates))
    assert failing(at, "packed") == expected
    assert noted == [f"{rate / 100:.2f} times as many tokens a second"]


def test_a_profile_is_laid_over_what_a_verification_trains(
    at: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def begin(request: Any, *_: Any) -> None:
        asked.append(request.profiles)

    monkeypatch.setattr(trainings.run, "start", begin)
    trainings.train(at, "a", RECIPE, {}, profile="fast")
    trainings.train(at, "b", RECIPE, {}, engine="zero1")
    assert [profiles[1:] for profiles in asked] == [["fast"], ["zero1"]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Answers in the place of CUDA's, and what it was asked for."""
    asked: list[Any] = []
    answers = {
        "is_available": lambda: True,
        "mem_get_info": lambda device=0: (6 * GIB, 16 * GIB),
        "set_per_process_memory_fraction": lambda *words: asked.append(words),
        "reset_peak_memory_stats": lambda: asked.append("reset"),
        "max_memory_allocated": lambda: 3000,
        "max_memory_reserved": lambda: 4096,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    yield asked


def test_a_training_takes_no_more_than_a_share_of_the_free_memory(
    cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    plugin.VerifyPlugin().pre_model_load(SimpleNamespace())
    assert cuda == [(pytest.approx(0.9 * 6 / 16), 1)]


def test_the_second_step_is_measured_on_a_gpu(cuda: list[Any], tmp_path: Path) -> None:
    model = torch.nn.Linear(16, 16, bias=False)
    optimizer = SimpleNamespace(state={model.weight: {"exp_avg": torch.zeros(16, 16)}})
    measure = plugin.Measure(SimpleNamespace(model=model, optimizer=optimizer), tmp_path / "verify.json")
    for step in range(3):
        state = SimpleNamespace(global_step=step)
        measure.on_step_begin(None, state, None)
        model(torch.ones(2, 16)).sum().backward()
        measure.on_pre_optimizer_step(None, state, None)
        model.zero_grad()
        state.global_step += 1
        measure.on_step_end(None, state, None)
    assert cuda == ["reset"]
    found = orjson.loads((tmp_path / "verify.json").read_bytes())
    assert (found["allocated"], found["reserved"], found["free"], found["loaded"]) == (3000, 4096, 6 * GIB, 1024)
    parts = {"adapters": 1024, "quantization constants": 0, "optimizer": 0, "gradients": 1024, "activations": 952}
    assert found["parts"] == parts  # a state that is not on the GPU is not its memory


def test_a_quick_verification_takes_few_layers(at: Bench, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        trainings.shapes, "make", lambda folder, architecture: made.append(architecture["num_hidden_layers"])
    )
    monkeypatch.setattr(trainings.shapes, "write_full_rows", lambda *_: None)
    monkeypatch.setattr(trainings, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainings.shape(replace(at, quick=True), RECIPE)
    assert made == [trainings.LAYERS]
