"""A study.yaml that is wrong says where and what to do; what a study declares is what it has."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from declared import sums
from run_folders import a_run

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.data import studies
from qlora_recipes.data.published import PublishedScore
from qlora_recipes.data.studies import Study

RECIPE = "haider2024/llama-2-7b"


def loaded(folder: Path, change: dict[str, Any]) -> Study:
    """The first study with some keys changed; None deletes one."""
    shutil.copytree(paths.RECIPES / "haider2024", folder, dirs_exist_ok=True)
    content = yamlfiles.read_yaml(folder / "study.yaml") | change
    values = {key: value for key, value in content.items() if value is not None}
    (folder / "study.yaml").write_text(yamlfiles.write_yaml(values))
    return studies.load(folder)


def test_what_a_study_declares(tmp_path):
    curve = tmp_path / "a.csv"
    curve.write_text("step,train_loss\n1,2.5\n")
    scores = {"accuracy": {"value": 67.4, "spread": 1.0}, "perplexity": 3}
    changes: dict[str, Any] = dict.fromkeys(("shown", "ablations", "tolerances", "baselines", "unreported"))
    changes["metrics"] = {"accuracy": {"metric": "number", "label": "GSM8K"}, "perplexity": None}
    changes["published"] = {RECIPE: {"scores": scores, "curve": "a.csv"}}
    study = loaded(tmp_path, changes | {"decodings": {"greedy": {"max_new_tokens": 9}}})
    assert study.first.name == "accuracy"
    assert study.first.label == "GSM8K, %"
    assert list(study.table) == list(study.columns) == ["accuracy", "perplexity"]
    published = study.published[RECIPE].scores
    assert published == {"accuracy": PublishedScore(value=67.4, spread=1.0), "perplexity": PublishedScore(value=3)}
    assert [str(score) for score in published.values()] == ["67.4 ± 1.0", "3"]
    assert study.decodings["greedy"].top_k == 0
    assert study.ablations == {}
    assert study.baselines == []


def test_repeats_of_a_recipe_stand_for_the_others_of_its_study(tmp_path):
    other, variant = "haider2024/llama-3-8b", "haider2024/all-linear/llama-2-7b"
    published = {RECIPE: {"repeats": {"bleu4": [5.0, 5.2]}}, other: {}}
    changed = loaded(tmp_path, {"published": published, "ablations": {variant: {"parent": RECIPE, "reproduces": True}}})
    assert [changed.repeats(name, "bleu4") for name in (RECIPE, variant, other)] == [[5.0, 5.2]] * 3
    assert changed.repeats(RECIPE, "rouge_l") == []
    assert studies.load(paths.RECIPES / "haider2024").repeats(RECIPE, "bleu4") == []
    with pytest.raises(UserError, match="published: "):
        loaded(tmp_path / "none", {"published": {}, "ablations": None})


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["check", "haider2024/code-llama-7b"], 0),
        (["results"], 0),
        (["run", "broken/mine", "--rehearse", "--dry-run"], 2),
        (["study", "check", "broken"], 2),
    ],
    ids=str,
)
def test_a_malformed_study_is_an_error_for_itself_alone(place, recipe, words, code):
    folder = place / "recipes" / "broken"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("titel: x\n")
    (folder / "mine.yaml").write_text((paths.RECIPES / "haider2024" / "code-llama-7b.yaml").read_text())
    a_run(place / "runs", "broken/mine", "one", 5.0)
    done = recipe(*words)
    assert done.returncode == code
    assert "recipes/broken/study.yaml:1" in done.stderr + done.stdout
    assert code or "warning: " in done.stderr


def test_how_many_rows_a_split_will_have_is_known_where_nothing_is_left_out(tmp_path):
    rows = {"data > sources > train.jsonl > rows": 100}
    assert sums(tmp_path, rows).data.rows_of("train") is None  # some may have no answer
    data = sums(tmp_path, rows | {"data > filters": None}).data
    assert [data.rows_of(split) for split in ("train", "valid", "test")] == [96, 4, None]
    assert sums(tmp_path, rows | {"data > splits > train > first": 30}).data.rows_of("train") == 30
    assert sums(tmp_path, rows | {"data > splits > train > rows": 90}).data.rows_of("train") == 90


AUTHORS = {  # the first words of comments on settings that the authors of a study report
    "axolotl-alpaca2k": ("example", "card", "v0.4.0"),
    "birbal": ("nips_02.yml", "fork"),
    "dbgpt-spider": ("train_sft.sh", "data_utils.py", "model_args.py"),
    "dora-commonsense": ("README.md", "finetune.py", "llama2_7B_DoRA.sh", "llama3_8B_DoRA.sh"),
    "evolcodellama": ("card", "v0.4.0"),
    "haider2024": ("paper",),
    "litgpt-alpaca2k": ("config", "lora.py", "data/base.py", "alpaca_2k.py", "tokenizer.py"),
    "loftq-gsm8k": ("train_gsm8k", "quantize_save", "the authors' README"),
    "loraga-metamathqa": ("conf/", "data.py", "utils.py", "run_exp.py"),
    "neuralhermes-dpo": ("notebook",),
    "peft-metamathqa": ("defaults", "experiment", "run.py", "data.py", "utils.py"),
    "pissa-metamathqa": ("run_lora.sh", "run_qlora.sh", "run_pissa.sh", "train.py"),
    "qlora-guanaco": ("finetune_guanaco_7b", "finetune_llama2_guanaco_7b", "qlora.py"),
    "tinker-tulu3": (
        *("sft_sweep.md", "chat_datasets.py", "role_colon.py", "chat_sl/train.py", "supervised/", "sweep/cli.py"),
        *("weights/README.md", "sdk.md"),
    ),
    "zephyr": ("config", "handbook"),
}


def test_comments_and_study_yaml_agree_on_what_the_authors_report():
    for folder in paths.studies():
        study = studies.load(folder)
        for recipe in study.published:
            comments = yamlfiles.sources(paths.recipe_file(recipe))
            commented = {key for key, comment in comments.items() if comment.startswith(AUTHORS[folder.name])}
            reported = study.reported_settings(recipe) & yamlfiles.read_yaml(paths.recipe_file(recipe)).keys()
            assert (recipe, reported) == (recipe, commented)
