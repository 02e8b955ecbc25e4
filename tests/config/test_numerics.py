"""Precision, as Axolotl's own code makes it of the same settings; and profiles that suit a config and a card."""

import copy
import functools
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import config_with, typed

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.paths import recipe_names
from qlora_recipes.check import check
from qlora_recipes.config import compose, gpus, models
from qlora_recipes.config.compose import Composed, Request
from qlora_recipes.config.numerics import Precision, precision
from qlora_recipes.config.profiles import _LIGER, _LORA

pytestmark = pytest.mark.usefixtures("place")

UNSET = object()
VALUES = {
    "bf16": (UNSET, True, False, "auto"),
    "fp16": (UNSET, True, False),
    "bfloat16": (UNSET, True),
    "float16": (UNSET, True),
    "load_in_8bit": (UNSET, True),
}
SETTINGS: list[dict[str, Any]] = [
    {key: value for key, value in zip(VALUES, values, strict=True) if value is not UNSET}
    for values in product(*VALUES.values())
]


@pytest.fixture(scope="module")
def validated() -> list[Any]:
    """The settings in a config, after Axolotl's validation, whose classes are made once, not for each."""
    from axolotl.utils import config
    from axolotl.utils.dict import DictDefault

    of_recipe = config_with({"fp16": None, "bf16": None, "adapter": "lora", "load_in_4bit": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "merge_input_args", functools.cache(config.merge_input_args))
        return [config.validate_config(DictDefault(of_recipe | settings)) for settings in SETTINGS]


def of_axolotl(validated: Any, on_gpu: bool) -> Precision | None:
    """Precision by Axolotl's dtypes and its arguments for transformers; None if transformers refuses these."""
    from axolotl.core.builders.base import TrainerBuilderBase
    from axolotl.utils.config import resolve_dtype

    cfg = copy.deepcopy(validated)
    cfg.device = "cuda:0" if on_gpu else "cpu"
    resolve_dtype(cfg)
    arguments: dict[str, Any] = {}
    TrainerBuilderBase._configure_precision_settings(SimpleNamespace(cfg=cfg), arguments)
    if arguments["fp16"] and arguments["bf16"]:
        return None
    autocast = "bfloat16" if arguments["bf16"] else "float16" if arguments["fp16"] else None
    return Precision(str(cfg.torch_dtype).removeprefix("torch."), autocast)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_precision_is_what_axolotl_resolves(validated, on_gpu, monkeypatch):
    supported = on_gpu  # torch reports bf16 as supported on every NVIDIA GPU, because it counts emulation
    monkeypatch.setattr("axolotl.utils.config.is_torch_bf16_gpu_available", lambda: supported)
    for settings, cfg in zip(SETTINGS, validated, strict=True):
        resolved = of_axolotl(cfg, on_gpu)
        if resolved:
            assert precision(settings, on_gpu) == resolved, settings


LIGER = {*_LIGER} - {"plugins"}
KERNELS = {*_LORA}
NO_DROPOUT = "peft-metamathqa/qlora-rank32"


def laid(name: str, *profiles: str, gpu: str | None = "A100", overrides: tuple[str, ...] = ()) -> Composed:
    return compose.compose(Request(name, [*profiles], typed(*overrides)), gpus.find_gpu(gpu) if gpu else None)


def on(composed: Composed) -> set[str]:
    """The kernels that a config turns on."""
    return {key for key in LIGER | KERNELS if composed.config.get(key)}


def mine(*profiles: str, overrides: tuple[str, ...] = (), **change: Any) -> Composed:
    """The profile fast, and others behind it, over a recipe without dropout that has all layers as targets."""
    settings = {"lora_dropout": 0, "lora_target_modules": [*models.LINEAR_LAYERS]}
    Path("mine.yaml").write_text(yamlfiles.write_yaml(config_with(settings | change, NO_DROPOUT)))
    return laid("mine.yaml", "fast", *profiles, overrides=overrides)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("gpu", ["T4", "A100", "H100", None])
def test_lora_kernels_are_on_only_without_dropout_and_triton_only_where_it_runs(name, gpu):
    fast = laid(name, "fast", gpu=gpu)
    recipe = config_with({}, name)
    on_head = "lm_head" in recipe.get("lora_target_modules", ())  # which the fused loss would pass over
    liger = LIGER - ({"liger_fused_linear_cross_entropy"} if on_head else set())
    assert on(fast) & LIGER == (set() if gpu == "T4" else liger)
    assert ("plugins" in fast.config) == (gpu != "T4")
    if recipe["lora_dropout"]:
        assert not on(fast) & KERNELS
    if gpu == "T4":
        assert "lora_mlp_kernel" not in on(fast)
    changed = {change.key.partition(".")[0] for change in fast.differences if change.source.kind != "base"}
    assert changed <= {*LIGER, *KERNELS, "plugins", "pad_to_sequence_len", "pad_to_multiple_of"}  # nothing else


@pytest.mark.parametrize(
    ("change", "off"),
    [
        ({}, set()),
        ({"lora_dropout": 0.05}, KERNELS),
        ({"chunked_cross_entropy": True}, {"liger_fused_linear_cross_entropy"}),
        ({"lora_modules_to_save": ["lm_head"]}, {"liger_fused_linear_cross_entropy"}),
        ({"base_model": "google/gemma-2-2b", "revision_of_model": None}, {"lora_mlp_kernel"}),
    ],
)
def test_what_axolotl_refuses_or_would_compute_otherwise_stays_off(change, off, monkeypatch):
    if "gemma" in str(change.get("base_model")):
        gemma = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
        monkeypatch.setattr(models, "architecture", lambda config, download: gemma)
    composed = mine(**change)
    assert on(composed) == (LIGER | KERNELS) - off
    assert {key for keys in composed.incompatible.values() for key in keys} - {"plugins"} == off


@pytest.mark.parametrize(
    ("override", "off"),
    [
        ("lora_dropout=0.1", KERNELS),
        ("chunked_cross_entropy=true", {"liger_fused_linear_cross_entropy"}),
        ("lora_o_kernel=false", {"lora_o_kernel"}),
    ],
)
def test_a_profile_fits_what_is_laid_over_it(override, off):
    assert on(mine(overrides=(override,))) == (LIGER | KERNELS) - off
    key, _, value = override.partition("=")
    Path("own.yaml").write_text(f"{key}: {value}\n")
    assert on(mine("own.yaml")) == (LIGER | KERNELS) - off


def test_what_is_laid_over_a_recipe_lets_a_profile_do_more():
    name = "haider2024/all-linear/llama-2-7b"
    without_dropout = laid(name, "fast", overrides=("lora_dropout=0",))
    assert on(without_dropout) == LIGER | KERNELS
    assert without_dropout.incompatible == {}
    explicit = laid(name, "fast", overrides=("lora_mlp_kernel=true",))
    assert on(explicit) == LIGER | {"lora_mlp_kernel"}
    with pytest.raises(UserError) as refused:
        laid(name, "fast", overrides=("plugins.4=x",))
    assert str(refused.value) == "--set plugins.4: 4 is not a position in a list of 1, counted from 0"


@pytest.mark.parametrize("profiles", [("packed", "fast"), ("fast", "packed")])
def test_sequences_of_one_length_stay_that(profiles):
    both = laid(NO_DROPOUT, *profiles)
    assert both.config["pad_to_sequence_len"] is True
    assert both.config["pad_to_multiple_of"] == 8
    assert mine(pad_to_sequence_len=True).config["pad_to_sequence_len"] is True
    assert "pad_to_sequence_len" not in mine(pad_to_sequence_len=False).config


def test_plugins_join_those_of_the_config():
    plugins = mine(plugins=["axolotl.integrations.spectrum.SpectrumPlugin"]).config["plugins"]
    assert plugins == ["axolotl.integrations.spectrum.SpectrumPlugin", "axolotl.integrations.liger.LigerPlugin"]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *(("plugins", 3), ("lora_target_modules", [["q_proj"], 4])),
        *(("bnb_config_kwargs", ["nf4"]), ("base_model", 7), ("lora_dropout", "much")),
    ],
)
def test_wrong_values_are_left_for_check_to_find(key, wrong):
    mine(**{key: wrong})
    findings = check.check_request(Request("mine.yaml", profiles=["fast"]), gpus.find_gpu("T4")).findings
    assert [str(finding) for finding in findings if finding.rule == "unreadable"] == []


def test_packed_rows_are_kept_apart_by_a_mask_on_turing():
    name = "haider2024/llama-2-7b"
    varlen = [laid(name, "packed", gpu=gpu).config["sdpa_varlen"] for gpu in ("T4", "A100", "H100")]
    assert varlen == [False, True, True]
    Path("mine.yaml").write_text(yamlfiles.write_yaml(config_with({"sample_packing": True})))
    for gpu, names in (("T4", ["gpu-lacks:sample_packing"]), ("A100", [])):
        findings = check.check_request(Request("mine.yaml"), gpus.find_gpu(gpu)).findings
        assert [finding.name for finding in findings if finding.rule == "gpu-lacks"] == names


def test_check_notes_what_a_profile_leaves_once_a_reason(recipe):
    (report,) = recipe.json("check", "haider2024/llama-2-7b", "--profile", "fast", "--gpu", "T4")
    liger = "plugins, liger_rms_norm, liger_glu_activation, liger_rope, liger_fused_linear_cross_entropy"
    assert [finding["problem"] for finding in report["findings"] if finding["rule"] == "unfit"] == [
        f"the profile leaves out or changes {liger}, lora_mlp_kernel, because these kernels need Triton, which does "
        "not support T4 (sm_75)",
        "the profile leaves out or changes lora_qkv_kernel, lora_o_kernel, because with lora_dropout 0.05, the kernels "
        "drop other values than PEFT",
    ]
