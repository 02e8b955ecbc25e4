"""Mistakes of users: exit code 2, one message, nothing left behind."""

from pathlib import Path

import pytest
import yaml
from conftest import SAMPLE, recipe_config

from qlora_recipes.base import hardware, paths
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.config.merging import flatten

STORAGE = "bnb_config_kwargs.bnb_4bit_quant_storage"
NAME = "haider2024/code-llama-7b"


def prepare_files(folder: Path) -> None:
    """The files that the mistakes below are made with."""
    text = (paths.RECIPES / f"{NAME}.yaml").read_text()
    (folder / "broken.yaml").write_text("base_model: x\nlora_r: [1, 2\nlora_alpha: 3\n")
    (folder / "twice.yaml").write_text("base_model: x\nlora_r: 1\nlora_r: 2\n")
    (folder / "typo.yaml").write_text(text.replace("weight_decay:", "weight_decai:"))
    (folder / "cycle.yaml").write_text("deepspeed: &a {b: *a}\n")
    (folder / "good-train.jsonl").write_text('{"patch": "@@ -1 +1 @@\\n-a\\n+b", "msg": "a"}\n')
    (folder / "data").mkdir()
    (folder / "empty.jsonl").touch()
    (folder / "msg-train.jsonl").write_text('{"patch": "@@ -1 +1 @@", "msg": "a"}\n{"patch": "@@ -1 +1 @@"}\n')
    (folder / "pairs.jsonl").write_text('{"reference": "a", "prediction": "b"}\n{"reference": "a"}\n')


def files(folder: Path) -> set[Path]:
    """All files but locks."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


STUDIES = ", ".join(folder.name for folder in paths.studies())
MISTAKES = [
    ("check --gpu 32GB", "--gpu 32GB: a memory size, which only `recipe plan` accepts; name a GPU"),
    ("check --gpu 6000", "--gpu 6000: matches Quadro RTX 6000, RTX 6000 Ada, RTX PRO 6000; give more of the name"),
    (
        "run haider2024/code-lama-7b",
        "haider2024/code-lama-7b: no recipe of that name; did you mean haider2024/code-llama-7b or "
        "haider2024/llama-2-7b or haider2024/all-linear/code-llama-7b?",
    ),
    ("run broken.yaml", "broken.yaml:3: not valid YAML: did not find expected ',' or ']' (column 11)"),
    (
        f"run {NAME} --profile twice.yaml",
        "twice.yaml:3: not valid YAML: the key lora_r occurs twice; delete one (column 1)",
    ),
    (
        "run typo.yaml --rehearse",
        "typo.yaml:71: error: weight_decai: unknown to Axolotl; did you mean weight_decay? [unknown-key:weight_decai]",
    ),
    (
        f"run {NAME} --rehearse --set lora_rr=8",
        "--set lora_rr=8: error: lora_rr: unknown to Axolotl; did you mean lora_r or lora_dropout? "
        "[unknown-key:lora_rr]",
    ),
    (
        f"run {NAME} --rehearse --set cutoff_len=8",
        "--set cutoff_len=8: error: cutoff_len: no release of Axolotl reads it; it is sequence_len here; correct or "
        "delete the key [unknown-key:cutoff_len]",
    ),
    (f"run {NAME} --set lora_r", "--set lora_r: expected key=value, as in --set num_epochs=3"),
    (
        f"run {NAME} --set output_dir=x",
        "--set output_dir=x: `recipe run` sets output_dir; --runs selects the folder of runs, and `recipe "
        "resume` continues a run",
    ),
    (
        f"run {NAME} --rehearse --gpus 3",
        "--gpus 3: gradient_accumulation_steps is 4, not a multiple of 3; use --set to choose a multiple, "
        "and perhaps a smaller micro_batch_size",
    ),
    (
        f"run {NAME} --profile mirror",
        f"profile mirror: {paths.TEMPLATES}/models.yaml lists no mirror for codellama/CodeLlama-7b-hf",
    ),
    (
        f"run {NAME} --rehearse --set datasets.0.path=good-trian.jsonl",
        "--set datasets.0.path=good-trian.jsonl: error: datasets.0.path: good-trian.jsonl does not exist; "
        "did you mean good-train.jsonl?; correct the path, put the file there, or pass other rows with `recipe "
        "new --data FILE`; only data_files of a folder can be a pattern [missing-file:datasets.0.path]",
    ),
    (
        f"run {NAME} --rehearse --set adapter=null --set load_in_4bit=null --force no-adapter:adapter",
        "--set adapter=null: error: adapter: not set: Axolotl would train all weights, and `recipe run` trains only "
        "adapters; set lora or qlora, or train with Axolotl itself [no-adapter:adapter]",
    ),
    ("run cycle.yaml", "cycle.yaml: too large or nested too deeply for a config; remove values or aliases (*name)"),
    (f"run {NAME} --nodes 2", "--nodes 2: add --on slurm, which starts the run on each node"),
    (f"run {NAME} --on slrum,time=1:00:00", "--on slrum: no backend is called slrum; did you mean slurm?"),
    (f"run {NAME} --gpus 2", "--gpus 2: too many; 0 available on this machine"),
    (
        f"run {NAME} --rehearse --set optimizer=grokadamw",
        "--set optimizer=grokadamw: error: optimizer: the package grokadamw is not installed; install it, or "
        "delete optimizer [missing-package:optimizer]",
    ),
    (
        "data prepare msg-train.jsonl --study haider2024",
        "msg-train.jsonl:2: output (msg): 'msg' is undefined; the row's fields: patch",
    ),
    ("resume latest", "latest: no run of that name below runs/; `recipe run` starts one"),
    ("cancel", "nothing is named; give a run, a study or a sweep, as in `recipe cancel latest`"),
    ("cancel nothing", f"nothing: no run, sweep, study or recipe of that name below runs/; there are {STUDIES}"),
    ("sweep haider2024/llama-2-7b --gpu T4 --set lora_r=1,2", "--gpu: works only with --dry-run"),
    ("reproduce other", f"other: no study of that name; there are {STUDIES}"),
    (
        "reproduce haider2024 --only lama-2",
        "--only lama-2: no recipe of the study of that name; did you mean llama-2-7b or llama-3.2-3b or llama-3-8b?",
    ),
    (
        "reproduce haider2024 --only llama-2",
        "--only llama-2: matches haider2024/all-linear/llama-2-7b, haider2024/llama-2-7b; give more of the name",
    ),
    (
        "reproduce haider2024 --only zz*",
        "--only zz*: no recipe of the study of that name; there are haider2024/llama-2-7b, "
        "haider2024/code-llama-7b, haider2024/llama-3-8b, haider2024/llama-3.1-8b, haider2024/llama-3.2-3b, "
        "haider2024/all-linear/llama-2-7b, haider2024/all-linear/code-llama-7b, "
        "haider2024/as-released/llama-3-8b",
    ),
    ("reproduce haider2024 --jobs 3", "--jobs 3: each job needs its own GPU; 0 available on this machine"),
    ("reproduce haider2024 --stage adapter --seeds 2", "--seeds: works only with a later stage than --stage adapter"),
    (
        "reproduce haider2024 --stage predictions --set lora_r=2",
        "--set: works only with a later stage than --stage predictions",
    ),
    ("evaluate latest --adapter none --base", "--adapter and --base: give only one of them"),
    ("evaluate latest --served-model x", "--served-model: works only with --engine URL"),
    ("publish latest --private", "--private: works only with --push"),
    ("publish latest --pr a/b --merge", "--merge and --pr: give only one of them"),
    (
        "score pairs.jsonl",
        "pairs.jsonl: row 2 lacks the text field prediction; its fields: reference; name another field with "
        "--prediction-field",
    ),
    ("results haidr", "haidr: no run, sweep, study or recipe of that name; did you mean haider2024?"),
    (
        "results 3.2-3b",
        "3.2-3b: matches haider2024/llama-3.2-3b, tinker-tulu3/llama-3.2-3b-lora, "
        "tinker-tulu3/llama-3.2-3b-qlora; give more of the name",
    ),
    ("results --export x --rehearse", "--rehearse: works only with a study"),
    ("results haider2024/llama-2-7b --metric bleu4", "--metric: works only with two or more runs"),
    ("report", "latest: no run of that name below runs/; `recipe run` starts one"),
    ("report haider2024 -o report.pdf", "-o report.pdf: name an .html file"),
    (
        "report haider2024",
        "haider2024: no runs; start them with `recipe reproduce haider2024`, or show rehearsals: --rehearse",
    ),
    (
        "report start/qlora-packd",
        "start/qlora-packd: no run, sweep, study or recipe of that name; did you mean start/qlora-packed or "
        "start/qlora or start/lora?",
    ),
    (
        "report haider2024 --rehearse",
        "haider2024: no rehearsals; start them with `recipe reproduce haider2024 --rehearse`",
    ),
    ("study new ../up", "../up: not a name for a study; use a-z, digits, -, _ and ., as in first-author-2026"),
    ("study new haider2024", f"{paths.RECIPES}/haider2024: exists already; choose another name, or move it away"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_ends_with_code_2_one_message_and_nothing_left(recipe, tmp_path, arguments, message):
    prepare_files(tmp_path)
    before = files(tmp_path)
    done = recipe(*arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"recipe: {message}\n"
    assert files(tmp_path) == before


def test_list_show_and_diff_print_data(recipe):
    rows = recipe.json("list")
    assert [row["recipe"] for row in rows] == paths.recipe_names()
    shown = recipe("show", NAME)
    assert shown.stdout == (paths.RECIPES / f"{NAME}.yaml").read_text()
    keys = {row["key"] for row in recipe.json("diff", NAME, "haider2024/llama-3-8b")}
    assert keys - {"num_epochs"} == {"base_model", "revision_of_model", "special_tokens.pad_token", "optimizer"}
    assert recipe.json("results") == []


def test_quiet_hides_notes_and_keeps_results_and_problems(recipe):
    quiet, loud = recipe.ok("-q", "list", "start"), recipe.ok("list", "start")
    assert quiet.stdout == loud.stdout
    assert (quiet.stderr, loud.stderr) == ("", "next: recipe run start/dpo-qlora --rehearse\n")
    assert recipe.fails("-q", "show", "none").stderr == recipe.fails("show", "none").stderr != ""


def test_list_shows_published_scores_with_all_their_digits(recipe):
    _, _, *rows = recipe.ok("list", "axolotl-alpaca2k").stdout.splitlines()
    scores = {row.split()[0]: row.split()[-2] for row in rows if row}
    assert scores["axolotl-alpaca2k/openllama-3b-qlora"] == "1.1110"
    assert scores["axolotl-alpaca2k/tinyllama-qlora"] == "1.2355"
    (row,) = recipe.json("list", "axolotl-alpaca2k/tinyllama-qlora")
    assert row["published_trainer_loss"] == 1.2355


def test_data_prepare_and_a_dry_run(recipe, tmp_path):
    done = recipe.ok("data", "prepare", SAMPLE, "--study", "haider2024")
    _, train, *_ = lines = done.stdout.splitlines()
    assert train.split() == ["train.jsonl", "109", "109", "none", "differs"]
    written = [line for line in lines if line.endswith("manifest.json")]
    assert written == ["data/codereviewer/manifest.json", "data/codereviewer-tagged/manifest.json"]
    assert {file.name for file in files(tmp_path)} == {"manifest.json", "test.jsonl", "train.jsonl", "valid.jsonl"}
    dry = recipe(
        "run", "haider2024/llama-2-7b", "--profile", "mirror", "--set", "fp16=false", "--set", "lora_r=8", "--dry-run"
    )
    assert dry.returncode == 0
    config = yaml.safe_load(dry.stdout)
    assert "revision_of_model" not in config
    assert config["base_model"] == "NousResearch/Llama-2-7b-hf"
    assert config["lora_r"] == 8
    differences = [line.strip() for line in dry.stderr.splitlines() if line.startswith("  ")]
    assert "fp16: True -> False  (--set fp16=false)" in differences
    assert "lora_r: 32 -> 8  (--set lora_r=8)" in differences
    assert recipe("run", NAME, "--gpus", "2", "--dry-run").returncode == 0  # this needs no GPU
    assert not (tmp_path / "runs").exists()


PAIRS_OF_THE_HUB = {"datasets.0.type", "datasets.0.field_messages", "datasets.0.revision"}


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_rehearsal_lists_every_difference_and_keeps_the_rest(recipe, monkeypatch, has_bf16):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has_bf16)
    for name in paths.recipe_names():
        composed = compose(Request(name, rehearse=True))
        changed = {difference.key for difference in composed.differences}
        settings = dict(flatten(recipe_config(name)))
        packs = settings.get("eval_sample_packing")
        assert changed - {"bf16"} == {
            "base_model",
            "dataloader_num_workers",
            *({"revision_of_model", "lora_model_dir"} & settings.keys()),
            *(key for key in settings if key.startswith("special_tokens.")),
            "datasets.0.path",
            "datasets.0.split",
            *({"test_datasets.0.path", "test_datasets.0.split"} if "test_datasets.0.path" in settings else ()),
            # litgpt's rows have their text twice, so that the sample's bound on tokens is the recipe's length
            *({"sequence_len"} if settings["sequence_len"] > 256 and "litgpt" not in name else ()),
            *({"dataloader_drop_last"} if packs is False else ()),
            *({"eval_batch_size"} if packs and settings.get("eval_batch_size") != 1 else ()),
            *({"warmup_steps", "warmup_ratio"} if settings.get("warmup_steps") else ()),
            *({STORAGE} if settings.get("load_in_4bit") and settings.get(STORAGE) != "uint8" else ()),
            *(PAIRS_OF_THE_HUB if name == "start/dpo-qlora" else ()),
            *({"fp16"} if settings.get("fp16") is not False else ()),
            *(key for key in ("tf32", "chunked_cross_entropy") if settings.get(key)),
            *(key for key in ("max_steps", "eval_steps", "save_steps", "logging_steps") if settings.get(key, 1) > 1),
        }
        assert composed.config["bf16"] is has_bf16
        assert ("bf16" in changed) == (settings.get("bf16", False) is not has_bf16)
        assert not composed.config.get("warmup_steps")
        assert "max_steps" not in composed.config
