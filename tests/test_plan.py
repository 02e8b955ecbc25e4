import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Recipe, config_with, recipe_config
from hypothesis import given
from hypothesis import strategies as st
from test_memory import SMALL

from qlora_recipes import config, gpus, models, paths, plan
from qlora_recipes.errors import UserError

TURING, AMPERE = (7, 5), (8, 0)


def step_of(change: dict[str, Any], capability: tuple[int, int] = TURING) -> Any:
    return plan.step_of(config_with(change), SMALL, capability)[0]


def test_a_recipe_becomes_its_step() -> None:
    step, notes = plan.step_of(recipe_config("haider2024/llama-3-8b"), SMALL, TURING)
    assert (step.adapter, step.rank, step.dropout) == ("qlora", 32, 0.05)
    assert (step.weights, step.autocast) == ("float16", "float16")
    assert (step.checkpointing, step.attention, step.optimizer) == ("non-reentrant", "sdpa", "adamw_bnb_8bit")
    assert (step.padded, step.packed, step.accumulates, step.double_quantization) == (True, False, True, True)
    assert notes == []


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"bf16": True, "fp16": None}, "weights", "bfloat16"),
        ({"bf16": "auto", "fp16": None}, "autocast", "bfloat16"),
        ({"fp16": False}, "autocast", None),
        ({"fp16": False}, "weights", "float32"),
        ({"gradient_checkpointing": None}, "checkpointing", None),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "checkpointing", "reentrant"),
        ({"lora_target_linear": True}, "targets", "all-linear"),
        ({"gradient_accumulation_steps": 1}, "accumulates", False),
        ({"micro_batch_size": 1}, "padded", False),
        ({"sample_packing": True}, "packed", True),
        ({"sample_packing": True, "attn_implementation": "flash_attention_2"}, "packed", False),
        ({"chunked_cross_entropy": True}, "chunked_loss", True),
        ({"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}}, "double_quantization", False),
        ({"attn_implementation": None, "flash_attention": True}, "attention", "flash_attention_2"),
        ({"adapter": None, "load_in_4bit": None}, "weights", "float32"),
        ({"optimizer": "lion_8bit"}, "optimizer", "adamw_torch_fused"),
    ],
)
def test_settings_that_memory_depends_on(change: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(step_of(change), field) == value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer": "lion_8bit"}, "optimizer lion_8bit: planned as adamw_torch_fused"),
        ({"attn_implementation": "flex_attention"}, "flex_attention: planned as flash_attention_2"),
        ({"liger_cross_entropy": True}, "liger_cross_entropy: not traced; it takes less"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel: not traced; it takes less"),
    ],
)
def test_what_is_not_traced_is_said(change: dict[str, Any], says: str) -> None:
    assert says in plan.step_of(config_with(change), SMALL, AMPERE)[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapter": "llama-adapter"}, "cannot be planned"),
        ({"load_in_8bit": True, "adapter": "lora"}, "8 bits"),
        ({"rl": "dpo"}, "preference training"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        step_of(change)


def test_a_model_that_cannot_be_traced_is_told(small: config.Config) -> None:
    (Path(small["base_model"]) / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(UserError, match=r"cannot be traced: .*nobody_knows"):
        plan.plan(small)


def test_packed_documents_make_one_row_where_flash_attention_keeps_them_apart() -> None:
    for attention, shape in (("sdpa", (2, 2048)), ("flash_attention_2", (1, 4096))):
        packed = config_with({"sample_packing": True, "attn_implementation": attention})
        assert plan.shape_of(packed, plan.step_of(packed, SMALL, AMPERE)[0]) == shape


@given(st.integers(0, 1000), st.integers(1, 300), st.sampled_from([1, 64]))
def test_largest_finds_the_last_that_fits(limit: int, most: int, unit: int) -> None:
    found = plan.largest(lambda n: n <= limit, most * unit, unit)
    assert found == min(limit // unit, most) * unit


@pytest.fixture
def small(tmp_path: Path) -> config.Config:
    """The recipe for Llama 3, of a small model with a large vocabulary."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 128256, "max_position_embeddings": 8192}))
    change = {"base_model": str(folder), "revision_of_model": None}
    return {key: value for key, value in (recipe_config("haider2024/llama-3-8b") | change).items() if value is not None}


def test_a_plan_adds_up(small: config.Config) -> None:
    planned = plan.plan(small)
    memory = planned["memory"]
    assert sum(memory["parts"].values()) == memory["allocated"] <= memory["reserved"]
    assert memory["needed"] == memory["reserved"] + plan.CONTEXT
    assert planned["frozen"] == sum(count["frozen"] for count in planned["parameters"].values())
    for card, larger in pairwise(planned["cards"]):
        assert card["fits"] == (memory["needed"] <= card["usable"])
        assert card["largest_micro_batch"] <= larger["largest_micro_batch"]
        assert card["longest_row"] <= larger["longest_row"] <= 8192
        assert card["longest_row"] % plan.ROUND == 0


def test_what_fits_and_what_does_not(small: config.Config) -> None:
    need = plan.plan(small)["memory"]["needed"] / plan.GIB / plan.USABLE
    fits, not_ = (plan.plan(small, gpus.Gpu("card", TURING, need * share)) for share in (1.001, 0.999))
    assert (fits["cards"][0]["fits"], fits["changes"]) == (True, [])
    assert not not_["cards"][0]["fits"] and not_["cards"][0]["free"] < 0
    assert not_["cards"][0]["longest_row"] == 2048 - plan.ROUND


def test_changes_are_the_mildest_that_do(small: config.Config) -> None:
    need = plan.plan(small)["memory"]["needed"] / plan.GIB / plan.USABLE
    (*_, last) = plan.plan(small, gpus.Gpu("card", TURING, need * 0.7))["changes"]
    assert last["set"] == {"micro_batch_size": 1, "gradient_accumulation_steps": 8}
    assert last["fits"]
    ampere = plan.plan(small, gpus.Gpu("card", AMPERE, need * 0.7))["changes"]
    assert ampere[0]["set"] == {"chunked_cross_entropy": True}
    (*_, last) = plan.plan(small, gpus.Gpu("card", TURING, need * 0.3))["changes"]
    assert list(last["set"]) == ["sequence_len"]


def test_ranks_divide_what_their_engine_divides(small: config.Config) -> None:
    one, more = (plan.plan(small, gpus=n)["per_gpu"] for n in (1, 4))
    assert one == {}
    sizes = list(more.values())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_methods_compare(small: config.Config, tmp_path: Path) -> None:
    from qlora_recipes.compose import Request

    file = tmp_path / "small.yaml"
    file.write_text(config.write_yaml(small))
    full, lora, qlora = plan.compare(Request(str(file)))
    assert full["trainable_share"] == 1
    assert lora["trainable"] == qlora["trainable"] < full["trainable"] / 10
    assert full["needed"] > lora["needed"] > qlora["needed"]


def test_the_operations_of_a_token() -> None:
    architecture = models.architecture({"base_model": "meta-llama/Llama-2-7b-hf"})
    counts = {
        "q_proj": {"frozen": 6_607_077_376, "trainable": 0},
        "embed_tokens": {"frozen": 131_072_000, "trainable": 0},
    }
    counts |= {"lm_head": {"frozen": 0, "trainable": 0}}
    attention = 4 * 4096 * 1024 * 32
    step = step_of({"gradient_checkpointing": None})
    assert plan.flops_of_token(architecture, counts, step, 2048) == 2 * (2 * 6_607_077_376 + attention)
    again = plan.flops_of_token(architecture, counts, step_of({}), 2048)
    assert again == 3 * (2 * 6_607_077_376 + attention)


def test_work_counts_the_rows_that_are_there(small: config.Config, sample: Path) -> None:
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    told = plan.work(small, "mine", gpus.find("T4"))
    assert (told["rows"], told["rows_are"]) == (109, "the config's data")
    assert told["tokens"] == 109 * 2048 * 2
    assert told["steps"] == 28
    assert told["hours"] == pytest.approx(told["flops"] / (65e12 * plan.UTILIZATION) / 3600)
    assert plan.work(small, "mine", gpus.find("T4"), tokens=1000, price=2.0)["tokens"] == 2000


def test_a_second_plan_comes_from_the_cache_without_torch(small: config.Config, tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(config.write_yaml(small))
    code = (
        "import sys; from qlora_recipes import cli\n"
        "sys.argv = ['recipe', 'plan', sys.argv[1], '--json', '--set', 'lora_r=7']\n"
        "try: cli.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    )
    runs = [subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True) for _ in range(2)]
    assert [run.stderr.splitlines()[-1] for run in runs] == ["True", "False"]
    assert runs[0].stdout == runs[1].stdout


def test_the_cache_knows_what_a_plan_depends_on(small: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    step = plan.step_of(small, SMALL, TURING)[0]
    keys = {plan.Planner(step, (2, 64))._key(), plan.Planner(step, (3, 64))._key()}
    keys.add(plan.Planner(plan.step_of(small | {"lora_r": 8}, SMALL, TURING)[0], (2, 64))._key())
    monkeypatch.setattr(plan, "_packages", lambda: {"torch": "3"})
    keys.add(plan.Planner(step, (2, 64))._key())
    assert len(keys) == 4


def test_plan_prints(recipe: Recipe, small: config.Config, tmp_path: Path, sample: Path) -> None:
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    (tmp_path / "small.yaml").write_text(config.write_yaml(small))
    done = recipe("plan", "small.yaml", "--gpu", "t4", "--gpus", "2", "--price", "1")
    assert done.returncode == 0, done.stderr
    for text in ("logits", "needed", "ZeRO-2", "longest row", "hours", "USD", "at most"):
        assert text in done.stdout
    as_json = orjson.loads(recipe("plan", "small.yaml", "--json").stdout)
    assert as_json[0]["recipe"] == "small.yaml" and as_json[0]["memory"]["needed"] > 0
    table = recipe("plan", "small.yaml", "--compare").stdout
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["full", "LoRA", "QLoRA"]


def test_the_longest_batch_of_the_data(recipe: Recipe, small: config.Config, tiny: Path, sample: Path) -> None:
    small |= {"base_model": str(tiny), "special_tokens": {"pad_token": "</s>"}}
    small["datasets"] = [{"path": str(sample / "train.jsonl"), "type": "alpaca"}]
    (sample.parent / "tiny.yaml").write_text(config.write_yaml(small))
    done = recipe("plan", sample.parent / "tiny.yaml", "--data", "--json")
    assert done.returncode == 0, done.stderr
    (planned,) = orjson.loads(done.stdout)
    assert 0 < planned["longest_batch"]["tokens"] < 2048
    assert planned["longest_batch"]["needed"] < planned["memory"]["needed"]
    assert planned["work"]["tokens_are"] == "counted"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["haider2024/llama-2-7b", "--gpu", "T5"], "no GPU of that name"),
        (["haider2024/llama-2-7b", "--set", "optimizer=adamwx"], "optimizer"),
        (
            ["haider2024/llama-2-7b", "--set", "base_model=nobody/nothing"],
            "config.json of nobody/nothing cannot be had",
        ),
        (["haider2024/llama-2-7b", "--data"], "the tokenizer of meta-llama/Llama-2-7b-hf is not on this machine"),
        (["--compare"], "name one recipe or file"),
    ],
)
def test_mistakes_are_told(recipe: Recipe, arguments: list[str], says: str) -> None:
    done = recipe("plan", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_every_recipe_of_the_study_fits_its_card() -> None:
    """Four of five are traced anew here in 8 s each; two share a step but for the context."""
    card = gpus.find("Quadro RTX 5000")
    for name in paths.recipe_names():
        planned = plan.plan(recipe_config(name), card)
        assert planned["cards"][0]["fits"], name
        assert planned["memory"]["needed"] <= 14.5 * plan.GIB
