"""What the measurements of a verification see in small things, sound and with an error planted in them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import orjson
import pytest
import torch
from conftest import SMALL
from peft import LoraConfig, get_peft_model
from run_folders import a_run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from qlora_recipes.base.files import append_line
from qlora_recipes.configs import gpus
from qlora_recipes.data.verified import judge
from qlora_recipes.planning.traces import at_peak
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.verifying import bench, generation, memory, numerics, shapes, trainings
from qlora_recipes.verifying.bench import Bench, CannotBeShown, Figure
from qlora_recipes.verifying.lines import all_lines

BOUNDS = {line.name: line.bound for line in all_lines(Bench(Path(), bf16=True))}
PROMPTS = [[5, 60, 70], [5, 61, 71, 81, 91], [9] * 12]


def passes(line: str, figure: Figure) -> bool:
    return judge(figure.measured, figure.expected, BOUNDS[line]) == "passed"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=2, pad_token_id=0, initializer_range=0.2)).eval()


@torch.inference_mode()
def answers(model: LlamaForCausalLM) -> list[list[int]]:
    """Twelve tokens after each prompt, written with a cache."""
    written = []
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        written.append(output[0, len(prompt) :].tolist())
    return written


def test_a_cache_that_differs_is_found(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes("answers", Figure(generation.shortfall(llama, PROMPTS, answers(llama))))
    update = DynamicLayer.update

    def forgetful(self: Any, *states: Any, **more: Any) -> Any:
        keys, values = update(self, *states, **more)
        return keys, values.clone().index_fill_(2, torch.tensor([0]), 0.0)  # the first token's are lost

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    assert not passes("answers", Figure(generation.shortfall(llama, PROMPTS, answers(llama))))


def test_weights_in_4_bits_are_what_their_format_defines() -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    weight = layer.weight
    assert torch.equal(numerics.dequantized(weight), bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    model = torch.nn.Sequential(layer)
    inputs = torch.randn(4, 256)
    before = model(inputs)
    numerics.plain_layers(model)
    assert type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(inputs), before)


@pytest.mark.parametrize(("alpha", "passed"), [(16, True), (32, False)])
def test_another_scale_of_an_adapter_is_found(llama: LlamaForCausalLM, alpha: int, passed: bool) -> None:
    lora = LoraConfig(r=32, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(llama.config), lora).double().eval()
    with torch.inference_mode():
        scale = numerics._scale(model, torch.tensor([[5, 60, 70, 80]]))
    assert passes("adapter scale, as saved", Figure(scale, 16 / 32)) == passed


def test_layers_of_different_scales_have_none_together(llama: LlamaForCausalLM) -> None:
    lora = LoraConfig(r=8, lora_alpha=4, alpha_pattern={"v_proj": 8}, init_lora_weights=False)
    lora.target_modules = {"q_proj", "v_proj"}
    model = get_peft_model(LlamaForCausalLM(llama.config), lora).double().eval()
    with torch.inference_mode():
        assert numerics._scale(model, torch.tensor([[5, 60, 70, 80]])) is None


def a_training(folder: Path, name: str, resumed_from: str | None = None, **changed: Any) -> RunDir:
    """A run of six steps with an adapter."""
    run = a_run(folder, "haider2024/code-llama-7b", name, bleu4=1.0)
    record = run.read()
    record.launches[-1].resumed_from = resumed_from
    run.write(record)
    losses = {step: 4.0 - step / 10 for step in range(1, 7)} | changed.get("losses", {})
    for step, loss in losses.items():
        append_line(run.metrics, orjson.dumps({"step": step, "loss": loss, "grad_norm": 1.0}))
    run.output.mkdir()
    weight = torch.ones(4, 8)
    weight[0, 0] = changed.get("weight", 1.0)
    save_file({"lora_A": weight} | changed.get("more", {}), run.output / trainings.ADAPTER)
    return run


@pytest.mark.parametrize(
    ("resumed_from", "changed", "failing"),
    [
        ("checkpoint-4", {}, set()),
        (None, {}, {"resumed after step"}),
        ("checkpoint-2", {}, {"resumed after step"}),
        ("checkpoint-4", {"losses": {5: 3.5000001}}, {"resumed losses"}),
        ("checkpoint-4", {"losses": {5: None}}, {"resumed losses"}),
        ("checkpoint-4", {"losses": {7: 3.0}}, {"resumed losses"}),
        ("checkpoint-4", {"weight": 1.0000001}, {"resumed adapter"}),
        ("checkpoint-4", {"more": {"lora_B": torch.ones(1)}}, {"resumed adapter"}),
    ],
)
def test_a_broken_resume_is_found(
    tmp_path: Path, resumed_from: str | None, changed: dict[str, Any], failing: set[str]
) -> None:
    undisturbed = a_training(tmp_path, "20260101-000000-aaaaaaa")
    figures = trainings.compared(undisturbed, a_training(tmp_path, "20260101-000001-bbbbbbb", resumed_from, **changed))
    assert {line for line, figure in figures.items() if not passes(line, figure)} == failing


def test_the_part_that_differs_most_from_its_plan_is_named_with_a_reason() -> None:
    parts = {"base weights": 400 * 2**20, "logits": 10 * 2**20, "activations": 90 * 2**20, "optimizer": 50 * 2**20}
    plan = memory.Planned(loaded=0, allocated=550 * 2**20, parts=parts, parameters=0)
    measured = {"base weights": 400 * 2**20, "activations": 101 * 2**20, "optimizer": 25 * 2**20}
    figure = memory.allocated(plan, {"allocated": 526 * 2**20, "parts": measured})
    assert not passes("step, allocated", figure)
    assert figure.note.startswith("differs most: optimizer, 50.00 planned, 25.00 MiB measured: its state")
    same = memory.allocated(
        plan, {"allocated": 550 * 2**20, "parts": parts | {"activations": 100 * 2**20, "logits": 0}}
    )
    assert (passes("step, allocated", same), same.note) == (True, "")
    assert memory.REASONS.keys() == {
        *("base weights", "quantization constants", "embeddings and head", "adapters"),
        *("gradients", "optimizer", "activations"),
    }


def test_the_parts_at_the_peak_are_those_that_live_then() -> None:
    events = [(1, 10), (2, 5), (2, -1), (3, 4), (1, -1), (4, 12)]
    parts = at_peak(events, {1: "a", 2: "b", 3: "b", 4: "a"})
    assert (parts.total(), +parts) == (16, {"b": 4, "a": 12})


def test_a_shape_that_the_free_memory_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    from conftest import recipe_config

    at = Bench(tmp_path, gpu=gpus.find("T4"), gpus=1, free=100 * 2**20)
    config = recipe_config("haider2024/code-llama-7b") | {"sequence_len": 64}
    with pytest.raises(CannotBeShown, match=r"needs 0\.\d GiB, and 0\.1 of the GPU's free memory may be used"):
        memory.require_room(config, SMALL, at)
    memory.require_room(config, SMALL, replace(at, free=2**31))


def test_random_weights_make_a_model_of_the_shape_that_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes.make(tmp_path / "model", SMALL | {"max_position_embeddings": 512})
    model, about = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert model.config.num_hidden_layers == SMALL["num_hidden_layers"]
    assert model.lm_head.weight.float().std().item() == pytest.approx(shapes.SPREAD, rel=0.01)
    assert torch.equal(model.model.norm.weight.float(), torch.ones(256))
    rows = tmp_path / "rows.jsonl"
    shapes.write_full_rows(rows, tmp_path / "model", 512, 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row in map(json.loads, rows.read_text().splitlines()):
        assert 0.7 * 512 < len(tokenizer("\n".join(row.values()))["input_ids"]) < 0.95 * 512
    monkeypatch.setattr(shapes.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**30}))
    with pytest.raises(CannotBeShown, match="GiB of disk; --work names a folder"):
        shapes.make(tmp_path / "other", SMALL)


def test_a_result_that_is_gone_is_no_result(tmp_path: Path) -> None:
    at = Bench(tmp_path)
    with pytest.raises(bench.WorkFailed, match="did not come to its end"):
        at.result("training")
    run = a_run(tmp_path, "haider2024/code-llama-7b", "20260101-000000-aaaaaaa", bleu4=1.0)
    at.note_result("training", run.path)
    assert at.result("training") == run.path
