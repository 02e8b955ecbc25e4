"""`recipe new` and `recipe diff`, and files edited by hand."""

import re
from typing import Any

import pytest
from conftest import config_with, typed
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import sha256
from qlora_recipes.check import check
from qlora_recipes.config import compose, merging
from qlora_recipes.config.compose import Request
from qlora_recipes.config.merging import Override, Source
from qlora_recipes.config.origin import recipe_diff
from qlora_recipes.results import listing
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run import run
from qlora_recipes.run.rundir import RunDir
from qlora_recipes.writing import new

BASE = "haider2024/code-llama-7b"
MINE = "x", "--from", BASE, "--set"
TEXT = (paths.RECIPES / f"{BASE}.yaml").read_text()
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "lora_r": st.integers(1, 256),
    "lora_alpha": st.integers(1, 256),
    "lora_dropout": st.floats(0, 0.5),
    "lora_target_modules": st.lists(st.sampled_from(LAYERS), min_size=1, unique=True),
    "lora_target_modules.2": st.just("up_proj"),
    "learning_rate": st.floats(1e-6, 1e-2),
    "weight_decay": st.floats(0, 0.1) | st.none(),
    "num_epochs": st.integers(1, 9),
    "optimizer": st.sampled_from(["adamw_torch", "adamw_8bit"]),
    "lr_scheduler": st.sampled_from(["linear", "constant"]) | st.none(),
    "datasets.0.path": st.sampled_from(["mine.jsonl", "data/é, [x] # y.jsonl"]),
    "special_tokens": st.none() | st.just({"pad_token": "<unk>"}),
    "special_tokens.pad_token": st.sampled_from(["<unk>", "# no comment", "a: 'b'"]),
    "gradient_checkpointing_kwargs": st.none(),
    "bnb_config_kwargs.bnb_4bit_quant_storage": st.just("uint8"),
    "save_total_limit": st.integers(1, 9) | st.none(),
    "early_stopping_patience": st.integers(1, 9),
    "eval_sample_packing": st.booleans(),
}
OVERRIDES = st.lists(st.sampled_from(sorted(VALUES)), unique=True, max_size=8).flatmap(
    lambda keys: st.tuples(*(st.tuples(st.just(key), VALUES[key]) for key in keys))
)


def comments(text: str, changed: set[str]) -> list[str]:
    """The comments of a YAML text that has no # elsewhere, but for its header and for lines inside changed keys."""
    texts = []
    key = ""
    for line in text.partition("\n\n")[2].splitlines():
        inside = line.startswith(" ") and key in changed
        key = line.partition(":")[0] if re.match(r"\w", line) else key
        comment = re.search(r"(?:^|\s)#+ ?(.*)", line)
        if comment and not inside:
            texts.append(comment[1].strip())
    return texts


@settings(max_examples=25)  # each composes and checks a variant
@given(OVERRIDES)
def test_a_variant_keeps_comments_on_settings_and_differs_in_just_what_was_changed(tmp_path_factory, overrides):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("variant"))
        base = expected = yamlfiles.parse(TEXT, "")
        changes = [Override(key, value) for key, value in overrides]
        try:
            for key, value in overrides:
                expected = merging.override(expected, key, value)
        except UserError:  # an earlier one took the list away that a later one reaches into
            with pytest.raises(UserError):
                new.write("mine", BASE, changes)
            return
        file = new.write("mine", BASE, changes)
        text = file.read_text()
        tops = {key.partition(".")[0] for key, _ in overrides}
        assert [comment for comment in comments(TEXT, tops) if comment not in text] == []
        differing = set(merging.differences(base, expected))
        assert {row["key"] for row in recipe_diff(BASE, "mine")} == differing
        composed = compose.compose(Request("mine"))
        assert composed.config == expected
        assert composed.differences == []
        assert {difference.key for difference in composed.of_variant} == differing
        assert {difference.source for difference in composed.of_variant} <= {Source("recipe", "variants/mine.yaml")}
        errors = {finding.rule for finding in check.check_config(composed).findings if finding.level == "error"}
        assert errors <= {"not-prepared", "missing-file"}
        for line in set(text.splitlines()) - set(TEXT.splitlines()):
            assert line.startswith(("#", "  ")) or "  # variant, " in line


def test_two_changes_below_a_key_state_the_former_value_once(place, recipe):
    recipe.ok("new", "mine", "--set", "datasets.0.split=train[:9]", "--set", "datasets.0.shards=2")
    assert yamlfiles.sources(place / "variants/mine.yaml")["datasets"] == (
        "variant, was [{path: data/gsm8k/train.jsonl, type: chat_template}]; this project: an example"
    )
    lines = (place / "variants/mine.yaml").read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("datasets:"))
    assert lines[first + 1 : first + 5] == [
        "  - path: data/gsm8k/train.jsonl",
        "    type: chat_template",
        "    split: train[:9]",
        "    shards: 2",
    ]


def test_a_variant_from_the_command_line_to_its_config(place, recipe):
    done = recipe.ok("new", "ideas/wide", "--from", BASE, "--set", "lora_r=64", "--set", "weight_decay=null")
    assert done.stdout == "variants/ideas/wide.yaml\n"
    text = (place / "variants/ideas/wide.yaml").read_text()
    assert "\nlora_r: 64  # variant, was 32; paper\n" in text
    assert "\n# variant, removed: weight_decay: 0.01; paper\n" in text
    assert "\noutput_dir: outputs/ideas/wide  # variant, was outputs/haider2024/code-llama-7b; this project\n" in text
    assert text.partition("\n\n")[0].splitlines()[1:] == [
        "# /// recipe",
        '# name = "ideas/wide"',
        f'# parent = "{BASE}"',
        f'# parent_sha256 = "{sha256(paths.recipe_file(BASE))}"',
        '# axolotl = "0.21.0"',
        "# ///",
        "#",
        "# Changes   recipe diff ideas/wide lists them; changed lines state the former value",
    ]
    recipe.ok("new", "wider", "--from", "ideas/wide", "--set", "lora_r=128")
    assert "lora_r: 128  # variant, was 64; variant, was 32; paper" in (place / "variants/wider.yaml").read_text()
    assert recipe.json("diff", "wider") == [{"key": "lora_r", "ideas/wide": 64, "wider": 128}]
    config = yamlfiles.parse(recipe("run", "wider", "--dry-run").stdout, "")
    assert config["output_dir"] == "outputs/wider"
    assert config["lora_r"] == 128
    assert "weight_decay" not in config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["x", "--from", "haider2024/code-lama-7b"],
            "haider2024/code-lama-7b: no recipe of that name; did you mean haider2024/code-llama-7b or "
            "haider2024/llama-2-7b or haider2024/all-linear/code-llama-7b?",
            id="unknown-base",
        ),
        pytest.param(
            ["../x", "--from", BASE],
            "../x: not a name for a variant; use letters, digits, -, _ and folders, as in my-ideas/wide",
            id="name-outside-variants",
        ),
        pytest.param([BASE, "--from", BASE], f"{BASE}: a recipe has this name; choose another", id="name-of-a-recipe"),
        pytest.param(
            [*MINE, "lora_rr=3"],
            "--set lora_rr=3: error: lora_rr: unknown to Axolotl; did you mean lora_r or lora_dropout? "
            "[unknown-key:lora_rr]",
            id="unknown-key",
        ),
        pytest.param(
            [*MINE, "lora_target_modules.9=q_proj"],
            "--set lora_target_modules.9: 9 is not a position in a list of 4, counted from 0",
            id="missing-position",
        ),
        pytest.param(
            [*MINE, "output_dir=x"],
            "--set output_dir=x: `recipe run` sets output_dir; --runs selects the folder of runs, and `recipe resume` "
            "continues a run",
            id="key-of-the-run",
        ),
        pytest.param(
            [*MINE, "base_model=x/y", "--model", "Qwen/Qwen3-4B"],
            "--set base_model: --model sets the model already; give only one",
            id="two-models",
        ),
        pytest.param(
            ["x", "--from", BASE, "--model", "./nowhere"],
            "--model ./nowhere: no such folder; give a folder, or a model on the hub as owner/name",
            id="missing-folder",
        ),
        pytest.param(
            ["x", "--from", BASE, "--model", "Llama 3.2 1B"],
            "--model Llama 3.2 1B: no such folder; give a folder, or a model on the hub as owner/name",
            id="not-a-name-on-the-hub",
        ),
        pytest.param(
            ["x", "--from", BASE, "--model", "codellama/CodeLlama-7b-hf"],
            f"--model codellama/CodeLlama-7b-hf: {BASE} has this model already; name another model",
            id="same-model",
        ),
        pytest.param(["x", "--data", "gone.jsonl"], "--data gone.jsonl: does not exist", id="missing-rows"),
    ],
)
def test_a_refused_variant_is_not_written(place, recipe, arguments, message):
    assert recipe.fails("new", *arguments).stderr == f"recipe: {message}\n"
    assert list(place.iterdir()) == []


def test_force_writes_a_variant_with_the_named_error(place, recipe):
    forced = "--force", "unknown-key:lora_rr"
    written = recipe.ok("new", *MINE, "lora_rr=3", *forced)
    assert written.stderr.splitlines()[-1] == f"next: recipe check {MINE[0]} {' '.join(forced)}"
    assert yamlfiles.read_yaml(place / f"variants/{MINE[0]}.yaml")["lora_rr"] == 3
    refused = recipe.fails("new", "other", *MINE[1:], "lora_rr=3", "--force", "unknown-key:lora_r")
    assert refused.stderr == (
        "recipe: --force unknown-key:lora_r: this config has no such error; did you mean unknown-key:lora_rr?\n"
    )


THEIRS = """\
base_model: x/y
micro_batch_size: 1
num_epochs: 1
learning_rate: 0.1
datasets:
  - {path: gone.jsonl, type: alpaca}
micro_batch_size: 2  # rows
num_epochs: 1
"""


def test_full_fine_tuning_with_a_key_twice_and_missing_rows_becomes_a_variant(place, recipe):
    (place / "theirs.yaml").write_text(THEIRS)
    done = recipe.ok("new", "mine", "--from", "theirs.yaml")
    assert [line for line in done.stderr.splitlines() if "warning: " in line][:2] == [
        "theirs.yaml:6: warning: datasets.0.path: gone.jsonl does not exist; correct the path, put the file there, or "
        "pass other rows with `recipe new --data FILE`; only data_files of a folder can be a pattern "
        "[missing-file:datasets.0.path]",
        "theirs.yaml:1: warning: keys occur twice, and Axolotl takes the last value: micro_batch_size 1 (line 2), then "
        "2; delete the others [duplicate-key]",
    ]
    text = (place / "variants/mine.yaml").read_text()
    assert text.endswith(
        "base_model: x/y\nlearning_rate: 0.1\ndatasets:\n  - {path: gone.jsonl, type: alpaca}\n"
        "micro_batch_size: 2  # rows\nnum_epochs: 1\n"
    )
    (finding,) = (one for one in recipe.json("check", "mine", "--quick")[0]["findings"] if one["rule"] == "no-adapter")
    assert finding["level"] == "warning"


def test_a_variant_that_is_there_is_not_overwritten(place, recipe):
    recipe("new", "mine", "--from", BASE)
    (place / "variants/mine.yaml").write_text("mine: 1\n")
    recipe.fails("new", "mine", "--from", BASE)
    assert (place / "variants/mine.yaml").read_text() == "mine: 1\n"


def test_a_copy_edited_by_hand_is_known_by_the_recipe_in_its_header(place):
    (place / "copy.yaml").write_text(TEXT.replace("lora_r: 32", "lora_r: 8"))
    composed = compose.compose(Request("copy.yaml", overrides=typed("lora_alpha=8")))
    assert composed.origin == BASE
    (of_variant,), (difference,) = composed.of_variant, composed.differences
    assert of_variant.key == "lora_r"
    assert of_variant.recipe == 32
    assert of_variant.run == 8
    assert of_variant.source == Source("recipe", "copy.yaml")
    assert difference.key == "lora_alpha"
    assert difference.source == Source("override", "lora_alpha", "8")
    (place / "own.yaml").write_text(yamlfiles.write_yaml(yamlfiles.parse(TEXT, "")))
    assert compose.compose(Request("own.yaml")).origin == "own"
    assert compose.compose(Request("own.yaml")).differences == []


@pytest.mark.parametrize(
    "comment",
    [f"{BASE}: I looked up the learning rate there", f"mine: a variant of {BASE}, more or less", f"{BASE}: a copy"],
)
def test_a_comment_on_a_recipe_makes_no_variant_of_it(place, recipe, comment):
    (place / "variants").mkdir()
    (place / "variants/own.yaml").write_text(f"# {comment}\n{yamlfiles.write_yaml(yamlfiles.parse(TEXT, ''))}")
    composed = compose.compose(Request("own"))
    row = listing.record(RunResult(RunDir(place / "r"), run.record_of(composed, Request("own"))))
    assert (composed.origin, composed.of_variant, row["study"], row["variant_of"]) == ("own", [], None, None)
    assert recipe.fails("diff", "own").stderr == "recipe: own: not a variant of another recipe; give a second recipe\n"


def test_a_run_of_a_variant_lists_its_differences_from_that(place):
    new.write("mine", BASE, typed("base_model=Qwen/Qwen3-0.6B", "lora_r=8"))
    request = Request("mine", overrides=typed("lora_r=16", "lora_alpha=8"))
    record = run.record_of(compose.compose(request), request)
    assert [(d.key, d.recipe, d.run) for d in record.differences] == [("lora_r", 8, 16), ("lora_alpha", 16, 8)]
    assert {d.key: (d.recipe, d.run) for d in record.from_origin} == {
        "base_model": (yamlfiles.parse(TEXT, "")["base_model"], "Qwen/Qwen3-0.6B"),
        "lora_r": (32, 16),
        "lora_alpha": (16, 8),
    }
    row = listing.record(RunResult(RunDir(place / "r"), record))
    assert row["variant_of"] == BASE
    assert row["changed"] == {"lora_r": 16, "lora_alpha": 8}
    assert row["other_base_model"] == "Qwen/Qwen3-0.6B"  # of the study's


def test_the_former_value_of_a_secret_is_masked(place, recipe):
    (place / "theirs.yaml").write_text(yamlfiles.write_yaml(config_with({"hub_token": "hf_" + "a" * 34})))
    recipe.ok("new", "mine", "--from", "theirs.yaml", "--set", "hub_token=null")
    assert "hf_a" not in (place / "variants/mine.yaml").read_text()
