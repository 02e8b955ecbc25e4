"""Substitutions in a rehearsal: missing rows, and features that a CPU lacks."""

from pathlib import Path
from typing import Any

import pytest
from conftest import typed

from qlora_recipes.base import yamlfiles
from qlora_recipes.base.files import read_rows, write_rows
from qlora_recipes.config import compose
from qlora_recipes.config.compose import Composed, Request
from qlora_recipes.config.merging import Source

OWN: dict[str, Any] = {
    "base_model": "some/llama",
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_target_modules": ["q_proj"],
    "datasets": [{"path": "chats.jsonl", "type": "chat_template", "field_messages": "turns"}],
    "sequence_len": 4096,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "lora_qkv_kernel": False,
}
ROWS = {"path": "rows.jsonl", "type": "completion"}


@pytest.fixture(autouse=True)
def place(place: Path) -> Path:
    write_rows(Path("chats.jsonl"), ({"turns": [{"role": "user", "content": str(i)}]} for i in range(50)))
    write_rows(Path("rows.jsonl"), ({"text": str(i)} for i in range(6)))
    Path("folder").mkdir()
    write_rows(Path("folder", "train.jsonl"), [{"text": "a"}])
    Path("saved").mkdir()
    Path("saved", "state.json").write_text("{}")
    return place


def rehearsed(change: dict[str, Any] | None = None, *overrides: str, profiles: tuple[str, ...] = ()) -> Composed:
    """The rehearsal of a recipe of one's composed."""
    content = {key: value for key, value in (OWN | (change or {})).items() if value is not None}
    Path("mine.yaml").write_text(yamlfiles.write_yaml(content))
    return compose.compose(Request("mine.yaml", profiles=[*profiles], overrides=typed(*overrides), rehearse=True))


def source(composed: Composed, key: str) -> Source:
    return next(difference.source for difference in composed.differences if difference.key == key)


def splits(composed: Composed, section: str = "datasets") -> list[str | None]:
    return [dataset.get("split") for dataset in composed.config[section]]


def test_a_rehearsal_takes_the_first_of_its_own_rows_and_says_so():
    composed = rehearsed()
    assert composed.config["datasets"] == [OWN["datasets"][0] | {"split": "train[:32]"}]
    assert composed.config["sequence_len"] == 4096
    assert source(composed, "datasets.0.split") == Source(
        "rehearsal", detail="the first rows of the config's data, at most 32"
    )
    assert not {"test_datasets", "val_set_size"} & composed.config.keys()  # no evaluation was asked for


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, "train[:32]"),
        ("train[:1000]", "train[:32]"),
        ("train[100:]", "train[100:132]"),
        ("train[90%:]", "train[90%:]"),
        (f"train[:{'9' * 5000}]", f"train[:{'9' * 5000}]"),  # which `datasets` refuses
    ],
)
def test_a_split_is_cut_to_its_first_rows(split, expected):
    data = OWN["datasets"][0] | ({"split": split} if split else {})
    assert splits(rehearsed({"datasets": [data]})) == [expected]


def test_several_data_sets_share_the_rows_and_those_elsewhere_are_left_out():
    hub = {"path": "some/data-set", "type": "alpaca"}
    composed = rehearsed({"datasets": [ROWS, hub, OWN["datasets"][0]]})
    assert [dataset["path"] for dataset in composed.config["datasets"]] == ["rows.jsonl", "chats.jsonl"]
    assert splits(composed) == ["train[:16]", "train[:16]"]
    overridden = rehearsed({"datasets": [hub, ROWS, OWN["datasets"][0]]}, "datasets.2.split=train[:40]")
    assert splits(overridden) == ["train[:16]", "train[:40]"]


@pytest.mark.parametrize("path", ["some/data-set", "s3://bucket/rows.jsonl", "saved"])
def test_the_sample_takes_the_place_of_rows_that_are_not_there(path):
    composed = rehearsed({"datasets": [{"path": path, "type": "completion"}]})
    (dataset,) = composed.config["datasets"]
    assert Path(dataset["path"]).is_file()
    assert dataset["type"] == "alpaca"
    assert composed.config["sequence_len"] == 512
    reason = f"rows of the built-in sample, because {path} cannot be loaded in part on this machine"
    assert source(composed, "datasets.0.path") == Source("rehearsal", detail=reason)
    assert "test_datasets" not in composed.config
    more = rehearsed({"datasets": [{"path": path, "type": "completion"}]}, "datasets.0.split=train[:48]")
    assert splits(more) == ["train[:48]"]


def test_pairs_that_are_not_there_are_replaced_by_pairs_of_the_sample():
    composed = rehearsed({"rl": "dpo", "datasets": [{"path": "some/pairs", "type": "chat_template"}]})
    (dataset,) = composed.config["datasets"]
    assert (dataset["type"], dataset["split"]) == ("passthrough", "train[:32]")
    pairs = read_rows(Path(dataset["path"]))
    assert {pair["chosen"] for pair in pairs} == {pair["rejected"] for pair in pairs}
    assert all(pair["prompt"].strip() and pair["chosen"] != pair["rejected"] for pair in pairs)


def test_a_rehearsal_uploads_and_serves_nothing():
    uploads = {"hub_model_id": "mine/model", "push_dataset_to_hub": "mine/rows", "use_otel_metrics": True}
    composed = rehearsed(uploads)
    assert uploads.keys() & composed.config.keys() == set()
    assert source(composed, "hub_model_id") == Source("profile", "rehearsal")


def test_rows_to_evaluate_on_are_its_own_too():
    composed = rehearsed({"test_datasets": [ROWS]})
    assert composed.config["test_datasets"] == [ROWS | {"split": "train[:8]"}]
    folder = rehearsed({"test_datasets": [{"path": "folder", "type": "completion"}]})
    assert splits(folder, "test_datasets") == ["test[:8]"]
    hub = rehearsed({"test_datasets": [{"path": "some/data-set", "type": "completion"}]})
    assert hub.config["test_datasets"][0]["path"].endswith("valid.jsonl")


def test_nothing_is_laid_beside_a_share_that_is_held_out(recipe, place):
    gone = {"test_datasets": [{"path": "gone.jsonl", "type": "completion"}], "val_set_size": 0.1}
    assert rehearsed(gone).config["test_datasets"] == gone["test_datasets"]
    checked = recipe("check", "mine.yaml", "--rehearse")  # the file itself is wrong, with and without a rehearsal
    (line,) = (line for line in checked.stdout.splitlines() if "[missing-file:test_datasets.0.path]" in line)
    assert line.startswith("mine.yaml:")


@pytest.mark.parametrize(
    ("asked", "rows", "expected"),
    [(0.05, "chats", 0.05), (2000, "chats", 0.25), (3, "chats", 3), (100, "rows", 0.25), (0, "rows", 0)],
)
def test_a_share_that_is_held_out_stays(asked, rows, expected):
    data = {"datasets": [{"path": f"{rows}.jsonl", "type": "completion"}]}
    for composed in (rehearsed(data | {"val_set_size": asked}), rehearsed(data, f"val_set_size={asked}")):
        assert composed.config["val_set_size"] == expected
        assert "test_datasets" not in composed.config


def test_what_is_set_wins_over_the_profile(place):
    overridden = rehearsed(
        None, "datasets.0.split=train[:48]", "sequence_len=16384", "bf16=false", "base_model=some/other"
    )
    assert splits(overridden) == ["train[:48]"]
    assert overridden.config["sequence_len"] == 16384
    assert overridden.config["bf16"] is False
    data = [ROWS | {"split": "train[:40]"}]
    Path("later.yaml").write_text(yamlfiles.write_yaml({"datasets": data, "sequence_len": 100}))
    later = rehearsed(None, profiles=("rehearsal", "later.yaml"))
    assert splits(later) == ["train[:40]"]
    assert later.config["sequence_len"] == 100
    earlier = rehearsed(None, profiles=("later.yaml",))
    assert splits(earlier) == ["train[:32]"]
    assert earlier.config["sequence_len"] == 100


def test_rows_are_truncated_at_the_context_of_the_small_model():
    assert rehearsed({"sequence_len": 32768}).config["sequence_len"] == 8192
    assert rehearsed({"sequence_len": 32768}, "base_model=./other").config["sequence_len"] == 32768


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"attn_implementation": "kernels-community/flash-attn3"}, {"attn_implementation": "sdpa"}),
        ({"xformers_attention": True}, {"xformers_attention": None, "attn_implementation": "sdpa"}),
        (
            {"plugins": ["axolotl.integrations.liger.LigerPlugin", "mine.Plugin"], "liger_rope": True},
            {"plugins": ["mine.Plugin"], "liger_rope": None},
        ),
        *[({"attn_implementation": name}, {"attn_implementation": name}) for name in ("sdpa", "eager", None)],
        ({"lora_mlp_kernel": True}, {"lora_mlp_kernel": False}),
        ({"fp16": True, "bf16": False}, {"fp16": False}),
        ({"torch_compile": True, "torch_compile_mode": "default"}, {"torch_compile": None, "torch_compile_mode": None}),
        ({"activation_offloading": "legacy"}, {"activation_offloading": "legacy"}),  # a CPU has that
        ({"gradient_checkpointing": "offload_disk"}, {"gradient_checkpointing": True}),
    ],
)
def test_what_a_cpu_lacks_is_exchanged_and_listed(change, expected):
    as_recipe = rehearsed(change)
    overrides = [f"{key}={yamlfiles.write_flow(value)}" for key, value in change.items()]
    for composed in (as_recipe, rehearsed(None, *overrides)):
        assert {key: composed.config.get(key) for key in expected} == expected
    for key in expected.keys() & change.keys():
        if expected[key] != change[key] and key != "plugins":
            of_key = source(as_recipe, key)
            assert of_key == Source("profile", "rehearsal") or of_key.kind == "rehearsal"


def test_ends_of_turns_stay_and_the_small_model_gets_those_that_it_lacks():
    ends = ["<|im_end|>", "<|eot_id|>"]
    composed = rehearsed({"eot_tokens": ends})
    assert composed.config["eot_tokens"] == ends
    assert composed.config["added_tokens_overrides"] == {"3": "<|eot_id|>"}


def test_only_packed_rows_are_padded_to_the_length():
    padded = {"pad_to_sequence_len": True}
    assert rehearsed(padded).config["pad_to_sequence_len"] is False
    for composed in (rehearsed(padded | {"sample_packing": True}), rehearsed(None, "pad_to_sequence_len=true")):
        assert composed.config["pad_to_sequence_len"] is True


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ({"sample_packing": True, "eval_sample_packing": False}, False),
        ({"sample_packing": True, "eval_sample_packing": False, "dataloader_drop_last": True}, True),
        ({"sample_packing": True}, None),
        ({"sample_packing": False, "eval_sample_packing": False}, None),
    ],
)
def test_a_batch_that_the_held_out_rows_do_not_fill_is_evaluated(packing, expected):
    assert rehearsed(packing).config.get("dataloader_drop_last") is expected


@pytest.mark.parametrize(("mib", "is_kept"), [(1, True), (1025, False)])
def test_a_small_model_that_is_here_is_kept_with_what_belongs_to_it(mib, is_kept):
    Path("own").mkdir()
    Path("own", "config.json").write_text('{"model_type": "llama"}')
    with Path("own", "model.safetensors").open("wb") as stream:
        stream.truncate(mib * 2**20)
    of_model = {"special_tokens": {"pad_token": "<pad>"}, "type_of_model": "LlamaForCausalLM"}
    of_model |= {"base_model": "./own", "tokenizer_config": "./own"}
    content = rehearsed(of_model).config
    assert {key for key in of_model if content.get(key) == of_model[key]} == (of_model.keys() if is_kept else set())


def test_layers_that_the_small_model_has_apart_are_named_apart():
    fused = {"lora_target_modules": ["qkv_proj", "o_proj", "gate_up_prj"]}
    assert rehearsed(fused).config["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_prj"]
    assert rehearsed(fused, "base_model=./phi").config["lora_target_modules"] == fused["lora_target_modules"]


def test_a_rehearsal_makes_as_many_steps_as_its_rows():
    composed = rehearsed({"max_steps": 5000, "warmup_steps": 100, "eval_steps": 200, "save_steps": 0.1}).config
    assert not {"max_steps", "warmup_steps"} & composed.keys()
    assert composed["warmup_ratio"] == 0.1
    assert composed["eval_steps"] == 0.5
    assert composed["save_steps"] == 0.1
    assert rehearsed({"max_steps": 5000}, "max_steps=3").config["max_steps"] == 3
    assert rehearsed({"save_steps": 200}, "save_steps=1").config["save_steps"] == 1


def test_data_that_is_set_and_wrong_is_left_to_the_check():
    for wrong in ("datasets.0.path=gone.jsonl", "datasets.0={path: gone.jsonl, typ: x}", "datasets=null"):
        assert "sample" not in str(rehearsed(None, wrong).config.get("datasets"))
    (of_hub,) = rehearsed(None, "datasets.0.path=some/data-set").config["datasets"]
    assert of_hub["path"].endswith("train.jsonl")  # a rehearsal asks no hub
