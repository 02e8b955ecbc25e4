"""Models that Axolotl loads without a complaint, and that are not what their configs say."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_tokenizer
from conftest import config_with
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_json, write_json
from qlora_recipes.run.rundir import PLUGIN
from qlora_recipes.training import model_facts
from qlora_recipes.training.signals import Findings
from qlora_recipes.training.tokens import as_trained

WEIGHTS = "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEW = {"special_tokens": {"additional_special_tokens": ["<tool>", "</tool>"]}}
QLORA = {"adapter": "qlora", "load_in_4bit": True}
LINEAR = {"lora_target_linear": True}

Change = Callable[[Path], yamlfiles.Config]


def adapter(folder: Path, **settings: object) -> Path:
    """An adapter for the tiny model, with the settings of the config unless they are given."""
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ALL, "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.float32)
    get_peft_model(model, LoraConfig(**lora | settings)).save_pretrained(folder / "adapter")
    return folder / "adapter"


def starting_from(**settings: object) -> Change:
    return lambda folder: {"lora_model_dir": str(adapter(folder, **settings))}


def unmatched(folder: Path) -> yamlfiles.Config:
    """An adapter of a model that transformers wraps in another one."""
    file = adapter(folder, init_lora_weights=False) / WEIGHTS
    weights = {name.replace("model.layers", "model.language_model.layers"): w for name, w in load_file(file).items()}
    save_file(weights, file)
    return {"lora_model_dir": str(file.parent)}


def larger_tokenizer(folder: Path) -> yamlfiles.Config:
    words = AutoTokenizer.from_pretrained(folder / "tiny")
    words.add_tokens(["<one>", "<two>", "<three>"])
    words.save_pretrained(folder / "words")
    return {"tokenizer_config": str(folder / "words")}


def tied(folder: Path) -> yamlfiles.Config:
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "tiny")
    return {}


def of_another_model(folder: Path) -> yamlfiles.Config:
    """An adapter that loads without a complaint, because the models have the same sizes."""
    file = adapter(folder) / "adapter_config.json"
    write_json(file, read_json(file) | {"base_model_name_or_path": "somebody/else"})
    return {"lora_model_dir": str(file.parent), "base_model": f"{folder.name}/tiny"}


def in_4_bits(folder: Path) -> yamlfiles.Config:
    """The base model as it is published for QLoRA."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny", quantization_config=settings)
    model.save_pretrained(folder / "tiny")
    return {}


def problems(findings: Findings) -> dict[str, str]:
    return {finding["key"]: finding["problem"].removeprefix("in the loaded model, ") for finding in findings.values()}


UNTRAINED = "the embedding of the tokens from 1024 is frozen, not trained"
BOTH = {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
Q_4_BITS = "model.layers.*.self_attn.q_proj"
WRAPPED = "base_model.model.model.language_model.layers.*.mlp"
UNMATCHED = [
    f"{WRAPPED}.{name}.weight is missing" for name in ("down_proj.lora_A", "down_proj.lora_B", "gate_proj.lora_A")
]
LAYER = "base_model.model.model.layers.*.self_attn"
FROZEN = [f"{LAYER}.{name}.default.weight is frozen" for name in ("q_proj.lora_A", "q_proj.lora_B", "k_proj.lora_A")]
MISSING = "{} is missing, not in the model"
IN_4_BITS = [f"{Q_4_BITS.replace('q_proj', name)} is Linear4bit" for name in ("q_proj", "k_proj", "v_proj")]
NAMES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        pytest.param(lambda _: {}, {}, id="intact"),
        pytest.param(starting_from(), {}, id="intact, from an adapter"),
        pytest.param(lambda _: QLORA, {}, id="intact, 4 bits"),
        pytest.param(lambda _: {"peft_use_rslora": True, "peft_use_dora": True}, {}, id="intact, DoRA with rsLoRA"),
        pytest.param(lambda _: {"lora_rank_pattern": {"q_proj": 4}}, {}, id="intact, another rank of a layer"),
        pytest.param(lambda _: {"peft_layers_to_transform": [1]}, {}, id="intact, one layer"),
        pytest.param(lambda _: {"lora_target_modules": r".*\.1\..*\.[qv]_proj"}, {}, id="intact, a pattern"),
        pytest.param(lambda _: {"lora_target_modules": None} | LINEAR, {}, id="intact, all linear"),
        pytest.param(lambda _: {"lora_target_modules": ["lm_head"]} | LINEAR, {}, id="intact, all linear and the head"),
        pytest.param(lambda _: BOTH | NEW, {}, id="intact, new tokens"),
        pytest.param(lambda folder: tied(folder) | BOTH | {"peft_ensure_weight_tying": True}, {}, id="intact, tied"),
        pytest.param(lambda _: {"lora_target_modules": ["q_proj"]} | LINEAR, {}, id="all layers beside a list"),
        # known from issues of other projects
        pytest.param(lambda _: NEW, {"special_tokens": UNTRAINED}, id="untrained rows"),
        pytest.param(
            lambda folder: tied(folder) | BOTH,
            {"lora_modules_to_save": "tying of embedding and head is False, not True"},
            id="tied, trained apart",
        ),
        pytest.param(
            unmatched, {"lora_model_dir": ", not loaded; ".join([*UNMATCHED, "and 25 more"])}, id="unmatched names"
        ),
        pytest.param(
            starting_from(r=4, lora_alpha=8),
            {"lora_r": "r is 4, not 8", "lora_alpha": "lora_alpha is 8, not 16"},
            id="another rank",
        ),
        # inventions of the tests, which no rule names
        pytest.param(larger_tokenizer, {"special_tokens": UNTRAINED}, id="a larger tokenizer"),
        pytest.param(
            lambda _: {"unfrozen_parameters": ["lm_head"]},
            {"adapter": ", not trained; ".join([*FROZEN, "and 11 more"])},
            id="frozen adapter",
        ),
        pytest.param(
            starting_from(target_modules=["q_proj"]),
            {"lora_target_modules": f"target_modules is q_proj, not {NAMES}"},
            id="adapter of fewer layers",
        ),
        pytest.param(
            starting_from(use_rslora=True),
            {"peft_use_rslora": "use_rslora is True, not None"},
            id="adapter of another scale",
        ),
        pytest.param(
            starting_from(lora_dropout=0.0, use_dora=True),
            {
                "lora_dropout": "lora_dropout is None, not 0.05",
                "peft_use_dora": "use_dora is True, not None",
            },
            id="adapter of another kind",
        ),
        pytest.param(
            lambda _: QLORA | {"bnb_config_kwargs": {"llm_int8_skip_modules": ["q_proj", "lm_head"]}},
            {
                "load_in_4bit": f"{Q_4_BITS} is Linear, not Linear4bit",
                "bf16": f"{Q_4_BITS} is torch.float32, not torch.bfloat16",
            },
            id="layers that are not quantized",
        ),
        pytest.param(
            of_another_model,
            {"lora_model_dir": "the adapter's base model is somebody/else, not FOLDER/tiny"},
            id="adapter of another model",
        ),
        pytest.param(
            in_4_bits,
            {"load_in_4bit": ", not 16 bits; ".join([*IN_4_BITS, "and 4 more"])},
            id="a base model that is quantized already",
        ),
        *(
            pytest.param(lambda _, change=change: change, {key: MISSING.format(name)}, id=f"{key} without effect")
            for key, name, change in (
                ("lora_target_modules", "query_key_value", {"lora_target_modules": [*ALL, "query_key_value"]}),
                ("lora_modules_to_save", "final_norm", {"lora_modules_to_save": ["norm", "final_norm"]}),
                ("lora_rank_pattern", "q_porj", {"lora_rank_pattern": {"q_porj": 4, ".*v_proj": 2}}),
                ("peft_layers_to_transform", "99", {"peft_layers_to_transform": [0, 99]}),
            )
        ),
    ],
)
def test_a_model_that_differs_from_its_config_is_found(tmp_path, monkeypatch, tiny, change, wrong):
    monkeypatch.chdir(tmp_path.parent)
    shutil.copytree(tiny, tmp_path / "tiny")
    settings = {"base_model": str(tmp_path / "tiny"), "adapter": "lora", "lora_r": 8, "lora_alpha": 16}
    settings |= {"lora_dropout": 0.05, "lora_target_modules": ALL, "fp16": False, "bf16": True, "plugins": [PLUGIN]}
    unset = ("load_in_4bit", "bnb_config_kwargs", "lora_target_linear", "revision_of_model", "special_tokens")
    config = config_with(settings | dict.fromkeys(unset) | {"output_dir": str(tmp_path)} | change(tmp_path))
    PluginManager._instance = None
    cfg = as_trained(config)
    model, words, *_ = setup_model_and_tokenizer(cfg)
    rows = PluginManager.get_instance().plugins[PLUGIN].rows
    findings = Findings()
    model_facts.add_differences(findings, model_facts.facts(cfg, model, words, rows))
    assert problems(findings) == {key: text.replace("FOLDER", tmp_path.name) for key, text in wrong.items()}


def test_a_parameter_without_an_update_is_found(tiny):
    """For example, a fused loss reads the base weight of lm_head only."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "lm_head"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.arange(5, 50)[None]
    hidden = model.get_base_model().model(ids)[0]
    (hidden @ model.get_base_model().lm_head.base_layer.weight.T).sum().backward()
    findings = Findings()
    model_facts.add_differences(findings, model_facts.updates(model, torch.optim.SGD(trained, lr=0.1)))
    head = "base_model.model.lm_head.lora"
    parts = [f"{name}.default.weight is without an update, not updated" for name in (f"{head}_A", f"{head}_B")]
    assert problems(findings) == {"adapter": "; ".join(parts)}
