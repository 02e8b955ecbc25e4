"""Parameters of LoRA as PEFT counts them, and bitsandbytes' formats against a computation of them in numpy."""

import itertools
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from conftest import SMALL, Recipe
from families import SHIPPED, TINY
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from scipy.stats import norm
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import models, substitution
from qlora_recipes.planning import analysis
from qlora_recipes.planning.analysis import Format

SETS = {"Phi-3-mini-128k-instruct": ["qkv_proj", "o_proj"], "gemma-3-4b-it": [*models.ATTENTION, "out_proj"]}


@pytest.mark.parametrize("name", SHIPPED)
def test_counts_are_those_of_peft_and_of_the_published_weights(name: str) -> None:
    architecture, published = SHIPPED[name]
    assert analysis.counted_parameters(architecture)["total"] == published
    counted = {(row["layers"], row["rank"]): row for row in analysis.lora({"m": architecture})}
    first = "qkv_proj" if name.startswith("Phi") else "q, v"
    assert {layers for layers, _ in counted} == {first, "attention", "all linear"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    for label, targets in (("attention", SETS.get(name, models.ATTENTION)), ("all linear", "all-linear")):
        adapted = get_peft_model(model, LoraConfig(r=32, target_modules=targets))
        trainable, every = adapted.get_nb_trainable_parameters()
        adapted.unload()
        assert every == published + trainable
        assert (counted[label, 32]["trainable"], counted[label, 32]["share"]) == (trainable, trainable / every)


def test_the_recipes_models_have_their_published_sizes() -> None:
    """As the safetensors on the hub have them; trained, as shared/paper.md and the notebook count them."""
    for name, every, trained in (
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 79_953_920),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, 83_886_080),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, 48_627_712),  # with tied embeddings
    ):
        rows = analysis.lora({name: models.architecture({"base_model": name})})
        (row,) = [row for row in rows if (row["layers"], row["rank"]) == ("all linear", 32)]
        assert (row["trainable"], row["share"]) == (trained, trained / (every + trained))


def test_a_model_that_transformers_cannot_build_is_refused() -> None:
    with pytest.raises(UserError, match="nobody_knows"):
        analysis.counted_parameters({"model_type": "nobody_knows"})


def nf4_levels() -> np.ndarray:
    """QLoRA (arXiv 2305.14314, appendix E): quantiles of a normal distribution, eight below zero's and nine above."""
    offset = 0.9677083
    positive, negative = norm.ppf(np.linspace(offset, 0.5, 9)[:-1]), -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0], negative]))
    return values / values.max()


def dynamic_map() -> np.ndarray:
    """bitsandbytes' signed 8-bit data type (arXiv 1511.04561, 2110.02861): 2^i fractions a decade."""
    values = [0.0, 1.0]
    for i in range(7):
        borders = np.linspace(0.1, 1, 2**i + 1)
        values += [sign * 10.0 ** (i - 6) * mean for mean in (borders[1:] + borders[:-1]) / 2 for sign in (1, -1)]
    return np.sort(values)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[np.abs(values[..., None] - table).argmin(-1)]


def in_blocks(values: np.ndarray, block: int, table: np.ndarray, constants: np.ndarray | None = None) -> np.ndarray:
    """Values as multiples of their block's largest, or of given constants, rounded to a table's."""
    blocks = values.reshape(-1, block)
    exact = np.abs(blocks).max(1, keepdims=True)
    scale = exact if constants is None else constants.reshape(-1, 1)
    return (nearest(blocks / exact, table) * scale).reshape(values.shape)


def weight(size: int = 64 * 512) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal(size) * 0.1).astype(np.float32)


def stored(values: np.ndarray, how: Format) -> np.ndarray:
    return analysis.stored(torch.from_numpy(values), how)[0].numpy()


@pytest.mark.parametrize("block", [64, 256, pytest.param(4096, marks=pytest.mark.long)])
def test_nf4(block: int) -> None:
    expected = in_blocks(weight(), block, nf4_levels())
    assert np.allclose(stored(weight(), Format("nf4", block)), expected, atol=1e-6)


def test_fp4() -> None:
    magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12  # of its eight codes
    values = weight()
    expected = in_blocks(values, 64, np.unique(np.concatenate([magnitudes, -magnitudes])))
    off = ~np.isclose(stored(values, Format("fp4", 64)), expected, rtol=1e-3, atol=1e-4)
    assert off.mean() < 0.01  # bitsandbytes rounds at borders of its own, not half-way


def test_double_quantization() -> None:
    values = weight()
    constants = np.abs(values.reshape(-1, 64)).max(1)
    offset = constants.mean(dtype=np.float32)
    rounded = in_blocks(constants - offset, 256, dynamic_map()) + offset
    expected = in_blocks(values, 64, nf4_levels(), rounded)
    assert np.allclose(stored(values, Format("nf4", 64, True)), expected, atol=1e-6)


def test_int8() -> None:
    values = weight()
    found, expected = stored(values, Format("int8", 256)), in_blocks(values, 256, dynamic_map())
    other_code = ~np.isclose(found, expected, rtol=1e-5, atol=1e-7)
    assert other_code.mean() < 0.002  # half-way between two codes either is as near
    assert (np.abs(found - values) - np.abs(expected - values)).max() < 1e-5


@pytest.mark.parametrize(("how", "bits"), [(Format("nf4", 64, True), 4.127), (Format("int8", 256), 8.125)])
def test_bits_count_the_constants(how: Format, bits: float) -> None:
    tensor = torch.randn(1024, 1024)
    assert analysis.stored(tensor, how)[1] / tensor.numel() == pytest.approx(bits, abs=1e-3)


def test_rows_that_are_no_multiple_of_the_block() -> None:
    """bitsandbytes' kernel for the CPU reads such a matrix back wrongly; `stored` goes round that."""
    matrix = torch.randn(64, 576)
    errors = [((analysis.stored(matrix, Format("nf4", block))[0] - matrix) ** 2).mean() for block in (64, 128, 512)]
    assert errors == sorted(errors) and errors[-1] < 2 * errors[0]


@pytest.mark.long
def test_larger_blocks_lose_more() -> None:
    rows = analysis.measure(analysis.weights_of(substitution.model_folder(), 1))
    of_all = {(r["format"], r["block"], r["double"]): r["snr_db"] for r in rows if r["layer"] == "all"}
    nf4 = [of_all["nf4", block, False] for block in analysis.BLOCKS]
    assert all(smaller > larger for smaller, larger in itertools.pairwise(nf4))
    assert of_all["nf4", 64, False] > of_all["fp4", 64, False]
    assert of_all["nf4", 64, False] - of_all["nf4", 64, True] < 0.1
    assert {row["layer"] for row in rows} == {*models.LINEAR_LAYERS, "all"}


def test_layers_are_spread_over_the_depth_by_the_names_of_their_family(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**TINY["phi3"] | {"num_hidden_layers": 5})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = [kind for kind, _ in analysis.weights_of(tmp_path, 3)]
    assert sorted(names) == sorted(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] * 3)
    assert len(analysis.weights_of(tmp_path, 0)) == 5 * 4
    with pytest.raises(UserError, match="nowhere"):
        analysis.weights_of(Path("nowhere"), 3)


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"junk" * 10)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        analysis.weights_of(tmp_path, 0)
    for weight in (torch.zeros(8, 8), torch.full((8, 8), torch.nan), torch.ones(8, 8, dtype=torch.uint8)):
        save_file({"model.layers.0.self_attn.q_proj.weight": weight}, file)
        with pytest.raises(UserError, match="q_proj"):
            analysis.weights_of(tmp_path, 0)


def test_the_commands(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(orjson.dumps(SMALL))
    (tmp_path / "mine.yaml").write_text(f"base_model: {tmp_path}\n")
    counted = orjson.loads(recipe("analyze", "lora", "mine.yaml", "--json").stdout)["parameters"]
    assert {row["model"] for row in counted} == {str(tmp_path)}
    assert "all linear" in recipe("analyze", "lora", "mine.yaml").stdout
    done = recipe("analyze", "quantization", "--synthetic", "--json")
    assert done.returncode == 0, done.stderr
    assert {row["format"] for row in orjson.loads(done.stdout)} == {"nf4", "fp4", "int8"}
