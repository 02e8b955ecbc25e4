"""What a user sees of a mistake: exit code 2, one message, nothing left behind."""

from pathlib import Path

import pytest
from conftest import SAMPLE, recipe_config

from qlora_recipes.base import paths
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.config.merging import flatten

NAME = "haider2024/code-llama-7b"


def prepare_files(folder: Path) -> None:
    """The files that the mistakes below are made with."""
    recipe = (paths.RECIPES / f"{NAME}.yaml").read_text()
    (folder / "broken.yaml").write_text("base_model: x\nlora_r: [1, 2\nlora_alpha: 3\n")
    (folder / "twice.yaml").write_text("base_model: x\nlora_r: 1\nlora_r: 2\n")
    (folder / "typo.yaml").write_text(recipe.replace("weight_decay:", "weight_decai:"))
    (folder / "cycle.yaml").write_text("deepspeed: &a {b: *a}\n")
    for name in ("train.jsonl", "good-train.jsonl"):
        (folder / name).write_text('{"patch": "@@ -1 +1 @@\\n-a\\n+b", "msg": "a"}\n')
    (folder / "data").mkdir()
    (folder / "empty.jsonl").touch()
    (folder / "msg-train.jsonl").write_text('{"patch": "@@ -1 +1 @@", "msg": "a"}\n{"patch": "@@ -1 +1 @@"}\n')
    (folder / "pairs.jsonl").write_text('{"reference": "a", "prediction": "b"}\n{"reference": "a"}\n')


def files(folder: Path) -> set[Path]:
    """All files but locks."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


MISTAKES = [
    ("run haider2024/code-lama-7b", "haider2024/code-llama-7b"),
    ("check --gpu 32GB", "recipe plan"),
    ("check --gpu 6000", "Quadro RTX 6000, RTX 6000 Ada, RTX PRO 6000"),
    ("run broken.yaml", "broken.yaml:"),
    ("run twice.yaml", "twice.yaml:3:"),
    ("run typo.yaml --rehearse", "typo.yaml:67:"),
    (f"run {NAME} --rehearse --set lora_rr=8", " lora_r "),
    (f"run {NAME} --set lora_r", "--set lora_r:"),
    (f"run {NAME} --set output_dir=x", "output_dir"),
    (f"run {NAME} --rehearse --gpus 3", "gradient_accumulation_steps"),
    (f"run {NAME} --profile mirror", "codellama/CodeLlama-7b-hf"),
    (f"run {NAME} --rehearse --set datasets.0.path=good-trian.jsonl", "good-train.jsonl"),
    ("data prepare msg-train.jsonl --study haider2024", "msg-train.jsonl:2:"),
    ("run cycle.yaml", "cycle.yaml"),
    ("data prepare train.jsonl --study haider2024 --out .", "train.jsonl"),
    ("data prepare msg-train.jsonl --input-format taged --study haider2024", "--input-format taged"),
    ("data prepare msg-train.jsonl --study haider2024 --out pairs.jsonl", "pairs.jsonl"),
    ("data prepare", ", ".join(folder.name for folder in paths.studies())),
    ("results haidr", "haider2024"),
    ("score pairs.jsonl", "--prediction-field"),
    ("resume latest", "latest"),
    ("cancel nothing", "haider2024"),
    (f"run {NAME} --nodes 2", "--on slurm"),
    (f"run {NAME} --on slrum,time=1:00:00", "slurm,"),
    (f"run {NAME} --gpus 2", "--gpus 2"),
    (f"run {NAME} --rehearse --set optimizer=grokadamw", "[missing-package:optimizer]"),
    ("report", "latest"),
    ("report haider2024 -o report.pdf", ".html"),
    ("report haider2024", "--rehearse"),
    ("report start/qlora-packd", "start/qlora-packed"),
    ("results 3.2-3b", "haider2024/llama-3.2-3b"),
    ("report haider2024 --rehearse", "recipe reproduce haider2024"),
    ("reproduce other", "other: "),
    ("reproduce haider2024 --only lama-2", "--only lama-2: "),
    ("reproduce haider2024 --only llama-2", "haider2024/all-linear/llama-2-7b, haid"),
    ("reproduce haider2024 --only zz*", "haider2024/llama-2-7b, haid"),
    ("reproduce haider2024 --jobs 3", "--jobs 3: "),
    ("study new ../up", "../up"),
    ("study new haider2024", "haider2024"),
]


@pytest.mark.parametrize(("arguments", "value"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_ends_with_code_2_one_message_and_nothing_left(recipe, tmp_path, arguments, value):
    prepare_files(tmp_path)
    before = files(tmp_path)
    done = recipe(*arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert value in done.stderr
    assert done.stderr.startswith("recipe: ")
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == before


def test_list_show_and_diff_print_data(recipe):
    rows = recipe.json("list")
    assert [row["recipe"] for row in rows] == paths.recipe_names()
    shown = recipe("show", NAME)
    assert shown.stdout == (paths.RECIPES / f"{NAME}.yaml").read_text()
    keys = {row["key"] for row in recipe.json("diff", NAME, "haider2024/llama-3-8b")}
    assert keys - {"num_epochs"} == {"base_model", "revision_of_model", "special_tokens.pad_token", "optimizer"}
    assert recipe.json("results") == []


def test_data_prepare_and_a_dry_run(recipe, tmp_path):
    done = recipe.ok("data", "prepare", SAMPLE, "--study", "haider2024")
    _, train, *_, written = done.stdout.splitlines()
    assert train.split() == ["train.jsonl", "109", "109", "none", "differs"]
    assert written == "data/codereviewer/manifest.json"
    assert {file.name for file in files(tmp_path)} == {"manifest.json", "test.jsonl", "train.jsonl", "valid.jsonl"}
    dry = recipe(
        "run", "haider2024/llama-2-7b", "--profile", "mirror", "--set", "fp16=false", "--set", "lora_r=8", "--dry-run"
    )
    assert dry.returncode == 0
    assert "revision_of_model" not in dry.stdout
    assert "base_model: NousResearch/Llama-2-7b-hf" in dry.stdout and "lora_r: 8\n" in dry.stdout
    assert "fp16: true\n" in recipe("run", NAME, "--gpus", "2", "--dry-run").stdout  # this needs no GPU
    assert not (tmp_path / "runs").exists()


def test_a_rehearsal_lists_every_difference_and_keeps_the_rest(recipe):
    for name in paths.recipe_names():
        composed = compose(Request(name, rehearse=True))
        changed = {difference.key for difference in composed.differences}
        own = dict(flatten(recipe_config(name)))
        assert changed - {"bf16"} == {
            "base_model",
            *({"revision_of_model", "lora_model_dir"} & own.keys()),
            *({"special_tokens.pad_token"} & own.keys()),
            "datasets.0.path",
            "datasets.0.split",
            *({"test_datasets.0.path", "test_datasets.0.split"} if "test_datasets.0.path" in own else ()),
            *({"sequence_len"} if own["sequence_len"] > 256 else ()),
            *({"warmup_steps", "warmup_ratio"} if own.get("warmup_steps") else ()),
            *(key for key in ("fp16", "tf32", "chunked_cross_entropy") if own.get(key)),
            *(key for key in ("max_steps", "eval_steps", "save_steps", "logging_steps") if own.get(key, 1) != 1),
        }
        assert ("bf16" in changed) == (composed.config["bf16"] and not own.get("bf16"))
        assert not composed.config.get("warmup_steps")
        assert "max_steps" not in composed.config
