import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, config_with, recipe_config, typed
from planned_memory import WEIGHTS, kept_by_rank

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import Request
from qlora_recipes.plan import plan, step_plan, steps, work

TURING, AMPERE = (7, 5), (8, 0)


def step_of(change: dict[str, Any]) -> Any:
    return steps.step_of(config_with(change), SMALL, TURING)[0]


def test_a_recipe_becomes_its_step():
    step, notes = steps.step_of(recipe_config("haider2024/llama-3-8b"), SMALL, TURING)
    assert step.adapter == "qlora"
    assert step.rank == 32
    assert step.dropout == 0.05
    assert step.weights == "float16"
    assert step.autocast == "float16"
    assert step.checkpointing == "non-reentrant"
    assert step.attention == "sdpa"
    assert step.optimizer == "adamw_bnb_8bit"
    assert step.padded is True
    assert step.packed is False
    assert step.accumulates is True
    assert step.double_quantization is True
    assert notes == []


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"bf16": True, "fp16": None}, "weights", "bfloat16"),
        ({"fp16": False}, "weights", "float32"),
        ({"fp16": None, "float16": True, "adapter": None, "load_in_4bit": None}, "weights", "float16"),  # no scaler
        ({"gradient_checkpointing": None}, "checkpointing", None),
        ({"lora_target_linear": True}, "targets", "all-linear"),
        ({"gradient_accumulation_steps": 1}, "accumulates", False),
        ({"micro_batch_size": 1}, "padded", False),
        ({"sample_packing": True}, "packed", True),
        ({"sample_packing": True, "attn_implementation": "flash_attention_2"}, "packed", False),
        ({"chunked_cross_entropy": True}, "chunked_loss", True),
        ({"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, "double_quantization", False),
        ({"adapter": None, "load_in_4bit": None}, "weights", "float32"),
        ({"optimizer": "lion_8bit"}, "optimizer", "adamw_torch_fused"),
        ({"peft_use_dora": True}, "dora", True),
        ({"peft_autocast_adapter_dtype": False}, "fp32_adapters", False),
    ],
)
def test_settings_that_memory_depends_on(change, field, value):
    assert getattr(step_of(change), field) == value


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"optimizer": "lion_8bit"}, "lion_8bit"),
        ({"liger_cross_entropy": True}, "liger_cross_entropy"),
        ({"sample_packing": True}, "varlen_attn"),
        (dict.fromkeys(steps._KERNELS), "LoRA kernels"),
        ({"unfrozen_parameters": ["norm"]}, "unfrozen_parameters"),
        ({"layer_offloading": True}, "layer_offloading"),
        ({"selective_checkpointing": True}, "selective_checkpointing"),
        ({"lora_target_linear": True, "lora_target_modules": ["lm_head"]}, "lora_target_modules"),
    ],
)
def test_what_is_not_traced_is_noted(change, names):
    assert any(names in note for note in steps.step_of(config_with(change), SMALL, AMPERE)[1])


@pytest.mark.parametrize(
    "change", [{"adapter": "llama-adapter"}, {"load_in_8bit": True, "adapter": "lora"}, {"rl": "dpo"}]
)
def test_what_cannot_be_planned_is_refused(change):
    with pytest.raises(UserError):
        step_of(change)


def test_a_model_that_cannot_be_traced_is_reported(small):
    (Path(small["base_model"]) / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(UserError, match="nobody_knows"):
        plan.plan(small)


def test_packed_documents_make_one_row_where_flash_attention_keeps_them_apart():
    for attention, flat in (("sdpa", False), ("flash_attention_2", True)):
        packed = config_with({"sample_packing": True, "attn_implementation": attention})
        step = steps.step_of(packed, SMALL, AMPERE)[0]
        assert step.flat == flat
        shape = step_plan.StepPlan(step, 2, 2048).shape
        assert shape == ((1, 4096) if flat else (2, 2048))


@pytest.fixture
def small(tmp_path: Path) -> yamlfiles.Config:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 128256, "max_position_embeddings": 8192}))
    change = {"base_model": str(folder), "revision_of_model": None}
    return {key: value for key, value in (recipe_config("haider2024/llama-3-8b") | change).items() if value is not None}


def test_a_plan_adds_up(small):
    planned, _ = plan.plan(small)
    memory = planned.memory
    assert sum(memory.parts.values()) == memory.allocated <= memory.reserved
    assert memory.needed == memory.reserved + step_plan.CONTEXT
    assert planned.frozen == sum(count["frozen"] for count in planned.parameters.values())
    in_16_bits, _ = plan.plan(small | {"peft_autocast_adapter_dtype": False})
    assert in_16_bits.memory.parts["adapters"] == memory.parts["adapters"] / 2
    for gpu, larger in pairwise(planned.gpus):
        assert gpu.fits == (memory.needed <= gpu.usable)
        assert gpu.free < larger.free


def test_what_a_check_asks_for_is_the_plans_memory(small):
    small |= {"lora_r": 6}
    assert step_plan.required_gib(small) is None
    needed = step_plan.required_gib(small, trace=True)
    assert plan.plan(small)[0].memory.needed / step_plan.GIB == needed == step_plan.required_gib(small)


def test_what_fits_and_what_does_not(small):
    size = plan.plan(small)[0].memory.needed / step_plan.GIB / step_plan.USABLE
    fits, not_ = (plan.plan(small, gpus.Gpu("card", TURING, size * share))[0] for share in (1.001, 0.999))
    assert fits.gpus[0].fits is True
    assert fits.changes == []
    assert not not_.gpus[0].fits and not_.gpus[0].free < 0


def test_a_gpu_that_lacks_a_feature_does_not_fit(recipe, small, tmp_path, sample):
    small |= {"bf16": True, "fp16": False, "datasets": [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]}
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small))
    (planned,) = recipe.json("plan", "small.yaml", "--gpu", "T4")
    (fit,) = planned["gpus"]
    assert fit["fits"] is False
    assert fit["lacks"] == ["bf16"]
    assert fit["free"] > 0
    assert any(note.startswith("gpu-lacks:bf16: ") for note in planned["notes"])
    done = recipe.ok("plan", "small.yaml", "--gpu", "T4")
    assert "no: bf16" in done.stdout
    assert "recipe run" not in done.stderr
    table = recipe.ok("plan", "small.yaml", "--gpu", "T4", "--gpu", "4090").stdout.splitlines()
    assert ["no: bf16" in line for line in table[1:3]] == [True, False]
    for words in (["--set", "bf16=false", "--set", "fp16=true"], ["--force", "gpu-lacks:bf16"]):
        (planned,) = recipe.json("plan", "small.yaml", "--gpu", "T4", *words)
        assert planned["gpus"][0]["fits"] is True
        assert planned["gpus"][0]["lacks"] == []


def test_changes_are_the_mildest_that_do(small):
    size = plan.plan(small)[0].memory.needed / step_plan.GIB / step_plan.USABLE
    (*_, last) = plan.plan(small, gpus.Gpu("card", TURING, size * 0.7))[0].changes
    assert last.set == {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
    assert last.fits
    ampere = plan.plan(small, gpus.Gpu("card", AMPERE, size * 0.7))[0].changes
    assert ampere[0].set == {"chunked_cross_entropy": True}
    refused = small | {"liger_cross_entropy": True, "fsdp_config": {"reshard_after_forward": True}}
    tight = gpus.Gpu("card", AMPERE, size * 0.1)
    assert not {"chunked_cross_entropy", "optimizer"} & {
        key for c in plan.plan(refused, tight)[0].changes for key in c.set
    }
    zero = small | {"deepspeed": {"zero_optimization": {"stage": 3}}}
    (*_, last) = plan.plan(zero, gpus.Gpu("card", TURING, size * 0.7), gpus=4)[0].changes
    assert last.set == {"micro_batch_size": 1, "gradient_accumulation_steps": 32}
    assert last.needed == pytest.approx(plan.plan(zero | last.set, gpus=4)[0].per_gpu["ZeRO-3"], rel=1e-5)
    (*_, last) = plan.plan(small, gpus.Gpu("card", TURING, size * 0.3))[0].changes
    assert list(last.set) == ["sequence_len"]


def test_ranks_divide_what_their_engine_divides(small):
    one, more, most = (plan.plan(small, gpus=n)[0].per_gpu for n in (1, 4, 8))
    assert one == {}
    assert more["DDP"] > more["ZeRO-1"] > more["ZeRO-2"] > more["ZeRO-3"]
    assert most["FSDP"] < more["FSDP"]
    engines: dict[str, dict[str, Any]] = {
        "DDP": {},
        "ZeRO-3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
        "FSDP": {"fsdp_config": {"reshard_after_forward": True}},
    }
    for engine, change in engines.items():
        planned = plan.plan(small | change, gpus.find("T4"), gpus=4)[0]
        assert planned.gpus[0].free == pytest.approx(planned.gpus[0].usable - planned.per_gpu[engine])


FULL = {"adapter": None, "load_in_4bit": None, "optimizer": "adamw_torch_fused", "fp16": False, "bf16": True}
SAVED = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("change", "zero", "fsdp"),
    [
        # bytes of each trained weight: of weight and gradient, of fp32 copy and two states; and all of them in FSDP
        (FULL, (2, 4 + 8), 2 + 2 + 4),
        (FULL | {"bf16": False}, (4, 4 + 8), 4 + 4 + 8),
        (FULL | {"optimizer": "adamw_bnb_8bit"}, (2, 4 + 2 + 8 / 256), 8),
        (FULL | {"optimizer": "paged_adamw_32bit"}, (2, 4), 8),
        ({"optimizer": "adamw_torch"}, (2, 4 + 8), 16),
        ({"optimizer": "paged_adamw_32bit", "lora_r": 256}, (2, 4), 16),
        ({"optimizer": "adamw_torch", "lora_modules_to_save": SAVED}, (2, 4 + 8), 16),
    ],
)
def test_trained_weights_take_what_engines_were_seen_to_allocate(small, change, zero, fsdp):
    """The bytes are those of two real ranks, see test_shards."""
    config = {key: value for key, value in (small | change).items() if value is not None}
    step = step_plan.plan_step(config, gpus.Gpu("card", AMPERE, 80))[0]
    trained, parts = step.memory.total("trainable"), step.memory.usage.parts
    frozen = sum(parts.get(kind, 0) for kind in WEIGHTS) if step.step.adapter else 0
    upcast = parts["embeddings and head"] if step.step.adapter else 0
    found = kept_by_rank(step, 4)
    each, state = zero
    if "paged" in step.step.optimizer:
        state += parts["optimizer"] / trained  # of small tensors, which stays on the GPU
    assert found["ZeRO-1"] == pytest.approx(frozen + trained * (2 * each + state / 4), rel=1e-3)
    assert found["ZeRO-2"] == pytest.approx(frozen + trained * (each + (each + state) / 4), rel=1e-3)
    assert found["ZeRO-3"] == pytest.approx((frozen + trained * (2 * each + state)) / 4, rel=1e-3)
    assert found["FSDP"] == pytest.approx((frozen + upcast + trained * fsdp) / 4, rel=1e-3)


def test_embeddings_have_32_bit_state_with_8_bit_optimizers(small):
    small |= {"lora_modules_to_save": SAVED, "optimizer": "adamw_bnb_8bit"}
    embedding, lora = 128256 * 256, 114688
    state = plan.plan(small)[0].memory.parts["optimizer"]
    assert state == pytest.approx(8 * embedding + (2 + 8 / 256) * (embedding + lora), rel=1e-3)
    paged = plan.plan(small | {"optimizer": "paged_adamw_8bit"})[0].memory
    assert paged.paged == (8 + 2) * embedding


def test_the_operations_of_a_token(small):
    """By hand, for the small model: matrices, LoRA's, scores and values, each as often as they are gone through."""
    step = step_plan.plan_step(small, None)[0]
    matrices = 2 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512)
    head, lora = 128256 * 256, sum(count["trainable"] for count in step.memory.parameters.values())
    attention = 4 * 256 * 1024 * 2
    operations = work.flops_of_token(step, 2048)
    assert operations == 2 * (matrices + head) * 3 + 2 * lora * 4 + attention * 4
    whole = step_plan.plan_step({k: v for k, v in small.items() if k not in ("adapter", "load_in_4bit")}, None)[0]
    assert work.flops_of_token(whole, 2048) == 2 * (matrices + head) * 4 + attention * 4
    saved = step_plan.plan_step(small | {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, None)[0]
    assert work.flops_of_token(saved, 2048) == operations + 2 * head


def test_work_counts_the_rows_that_are_there(small, sample, tmp_path):
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    file = tmp_path / "mine.yaml"
    file.write_text(yamlfiles.write_yaml(small))
    found = plan.plan_request(Request(str(file)), gpus.find("T4")).work
    assert found and (found.rows, found.tokens, found.steps) == (109, 109 * 2048 * 2, 28)
    assert found.hours == pytest.approx(found.tokens * found.flops_per_token / (65e12 * work.UTILIZATION) / 3600)
    few = plan.plan_request(Request(str(file), overrides=typed("max_steps=3"))).work
    assert few and (few.steps, few.tokens) == (3, 3 * 8 * 2048)


@pytest.mark.long
def test_a_second_plan_comes_from_the_cache_without_torch(small, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yamlfiles.write_yaml(small))
    code = (
        "import sys; from qlora_recipes import cli\n"
        "assert cli.main(['plan', sys.argv[1], '--json', '--set', 'lora_r=7']) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    runs = [subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True) for _ in range(2)]
    assert [run.stderr.splitlines()[-1] for run in runs] == ["True", "False"]
    assert runs[0].stdout == runs[1].stdout


def test_the_cache_knows_what_a_plan_depends_on(small, monkeypatch):
    step = steps.step_of(small, SMALL, TURING)[0]
    lower = steps.step_of(small | {"lora_r": 8}, SMALL, TURING)[0]
    files = {step_plan.StepPlan(*asked).file for asked in ((step, 2, 64), (step, 3, 64), (lower, 2, 64))}
    monkeypatch.setattr(step_plan, "packages", lambda: {"torch": "3"})
    files.add(step_plan.StepPlan(step, 2, 64).file)
    monkeypatch.setattr(step_plan, "VERSION", 0)
    files.add(step_plan.StepPlan(step, 2, 64).file)
    assert len(files) == 5


@pytest.mark.parametrize("content", ["{", '{"usage": {}, "paged": 1}'])
def test_a_damaged_cache_is_planned_anew(small, content):
    sound = plan.plan(small)[0]
    cached = step_plan.plan_step(small, None)[0]
    assert cached.file.is_file()
    cached.file.write_text(content)
    assert plan.plan(small)[0] == sound


def test_a_full_fine_tuning_that_does_not_fit_gets_an_adapter(small):
    full = {key: value for key, value in small.items() if not key.startswith(("adapter", "lora_", "load_in"))}
    changes = [change.set for change in plan.plan(full, gpus.Gpu("card", AMPERE, 0.9))[0].changes]
    (qlora,) = [change for change in changes if "adapter" in change]
    lora = {"lora_target_linear": True, "lora_r": 16, "lora_alpha": 32}
    assert qlora == {"adapter": "qlora", "load_in_4bit": True} | lora
    assert plan.plan(full, gpus.Gpu("card", AMPERE, 0.1))[0].changes[-1].fits is False
    dora = small | {"adapter": "lora", "load_in_4bit": False, "peft_use_dora": True}
    assert not any("adapter" in change.set for change in plan.plan(dora, gpus.Gpu("card", AMPERE, 0.1))[0].changes)


def test_plan_prints(recipe, small, tmp_path, sample):
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small))
    done = recipe.ok("plan", "small.yaml", "--gpu", "t4", "--gpus", "2")
    for text in ("logits", "needed", "ZeRO-2", "hours"):
        assert text in done.stdout
    table = [line.split() for line in recipe("plan", "small.yaml", "--gpu", "t4", "--gpu", "80GB").stdout.splitlines()]
    assert table[0][-4:] == ["fits", "free", "GiB", "hours"] and [row[0] for row in table[1:3]] == ["small.yaml"] * 2
    assert table[1][-3:-1] == ["up", "to"] and table[2][-1] == "–"  # no speed is known of a size alone
    assert recipe("plan", "small.yaml", "--gpu", "t4", "--gpu", "sm_86").returncode == 0  # of different columns
    as_json = recipe.json("plan", "small.yaml")
    assert as_json[0]["recipe"] == "small.yaml" and as_json[0]["memory"]["needed"] > 0


def test_the_tokens_of_the_data_are_counted(recipe, small, tiny, sample):
    small |= {"base_model": str(tiny), "special_tokens": {"pad_token": "</s>"}}
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    (sample.parent / "tiny.yaml").write_text(yamlfiles.write_yaml(small))
    (planned,) = recipe.json("plan", sample.parent / "tiny.yaml", "--data")
    assert 0 < planned["work"]["tokens"] < planned["work"]["rows"] * 2048


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["haider2024/llama-2-7b", "--set", "optimizer=adamwx"], "optimizer"),
        (["haider2024/llama-2-7b", "--set", "base_model=null"], "missing-key:base_model"),
        (["haider2024/llama-2-7b", "--data"], "datasets.0"),
        (["haider2024/llama-2-7b", "--gpu", "nanGB"], "--gpu"),
    ],
)
def test_mistakes_are_reported(recipe, arguments, names):
    done = recipe.fails("plan", *arguments)
    assert names in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name in paths.recipe_names() if name.startswith("haider2024/")])
def test_recipes_of_the_first_study_fit_its_card(name):
    needed = step_plan.required_gib(recipe_config(name), gpus.find("Quadro RTX 5000"))
    assert needed and needed <= step_plan.USABLE * 16
