"""A run folder from elsewhere: it is resumed only with --trust, and its record cannot consent to code of its config."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from evil import Evil
from run_folders import a_run, configure

from qlora_recipes.base import paths
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import write_atomically, write_rows
from qlora_recipes.base.signature import signature
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run import launch, run, trust
from qlora_recipes.run.backends.local import Local
from qlora_recipes.run.rundir import RunDir, all_runs

NAME = "haider2024/code-llama-7b"
PLUGIN = "foreign-code:plugins.0"


def theirs(runs: Path, **record: Any) -> RunDir:
    """A run that was made elsewhere, whose plugin its record says was agreed to."""
    record = {"state": "interrupted", "set": {"plugins": ["mine.Plugin"]}, "forced": [PLUGIN]} | record
    return a_run(runs, NAME, "20260101-000000-abcdef0", 5.0, **record)


def sign(folder: RunDir) -> None:
    record = folder.read()
    record.hmac = signature(folder.hashed(record))
    folder.write(record)


def refused(folder: RunDir, *force: str) -> set[str]:
    try:
        trust.refuse_code(folder, folder.read(), force, str(folder.output))
    except UserError as error:
        return {line.rpartition("[")[2].rstrip("]") for line in str(error).splitlines()}
    return set()


def test_consent_to_code_counts_in_a_run_of_ones_own_alone(tmp_path):
    folder = theirs(tmp_path, hmac="0" * 64)
    assert refused(folder) == {PLUGIN}
    assert refused(folder, PLUGIN) == set()
    sign(folder)
    assert refused(folder) == set()
    configure(folder, trust_remote_code=True)
    assert refused(folder) == {PLUGIN, "foreign-code:trust_remote_code"}


def test_a_strangers_chat_template_is_no_private_file(tmp_path):
    file = tmp_path / "credentials.json"
    file.write_text('{"token": "{{ x }}"}')
    folder = theirs(tmp_path)
    configure(folder, plugins=None, chat_template_jinja=str(file), otel_metrics_host="0.0.0.0")
    name = "without-consent:chat_template_jinja"
    assert refused(folder) == {name}
    assert refused(folder, name) == set()
    sign(folder)
    assert refused(folder) == set()


def test_rows_from_elsewhere_are_copied_from_a_run_of_ones_own_alone(tmp_path_factory, place):
    """run.json names the rows, and the folder that they are relative to."""
    private = tmp_path_factory.mktemp("private") / "rows.jsonl"
    write_rows(private, [{"instruction": "1 + 1?", "output": "the secret"}])
    here = Path("mine.jsonl").absolute()
    here.write_bytes(private.read_bytes())
    folder = theirs(place / "runs", hmac="0" * 64)
    configure(folder, plugins=None)
    with pytest.raises(UserError) as refused:
        trust.refuse_rows(folder, folder.read(), [here, private], ())
    assert str(refused.value) == (
        f"{paths.shown(folder.config_file)}: error: rows: would copy rows of {private}; name rows with --data, or pass "
        "the name in brackets to --force [without-consent:rows]"
    )
    trust.refuse_rows(folder, folder.read(), [private], ["without-consent:rows"])
    trust.refuse_rows(folder, folder.read(), [here], ())
    sign(folder)
    trust.refuse_rows(folder, folder.read(), [private], ())


def test_a_strangers_record_shows_no_text_of_a_file_that_it_names(tmp_path, place):
    secret = tmp_path / "secrets" / "config.yaml"
    write_atomically(secret, "lora_r: 4  # the secret\n")
    folder = theirs(place / "runs", hmac="0" * 64)
    changes = {"recipe": "mine", "recipe_file": str(secret), "cwd": str(secret.parent)}
    folder.write(folder.read().model_copy(update=changes))
    run = folder.read()
    assert folder.recipe_file(run) is None
    assert (
        RunResult(folder, run).recipe_note
        == f"{secret} is missing or has changed since the run began; the run keeps its own config"
    )
    sign(folder)
    assert folder.recipe_file(folder.read()) == secret
    variant = Path("variants", "mine.yaml")
    write_atomically(variant, "lora_r: 4\n")
    run.recipe_file, run.cwd = str(variant), str(Path.cwd())
    assert folder.recipe_file(run) == variant.absolute()


def test_what_the_user_set_needs_no_consent_again_when_the_job_starts(tmp_path):
    hosts = {"mlflow_tracking_uri": "https://mine.org"}
    folder = a_run(tmp_path, NAME, "20260101-000000-abcdef0", 5.0, set=hosts)
    configure(folder, otel_metrics_host="0.0.0.0")
    findings = [finding.name for finding in run._findings(folder, folder.read()) if finding.level == "error"]
    assert [name for name in findings if "consent" in name] == ["without-consent:otel_metrics_host"]


@pytest.mark.parametrize("words", [("evaluate",), ("publish", "--merge")])
def test_no_verb_loads_a_strangers_model_unseen(tmp_path, recipe, words):
    folder = theirs(tmp_path / "runs", state="finished")
    folder.output.mkdir()
    (folder.output / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    done = recipe.fails(words[0], str(folder.path), *words[1:])
    assert f"[{PLUGIN}]" in done.stderr


@pytest.fixture
def strangers(tmp_path: Path, tiny: Path) -> tuple[RunDir, Path]:
    """A stranger's finished run, and the file that its pickles write once they are loaded."""
    mark = tmp_path / "ran"
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Evil(mark)))
    rows = {"path": "rows.pkl", "ds_type": "pandas", "type": "alpaca"}
    changes = {"base_model": str(tiny), "revision_of_model": None, "plugins": None, "test_datasets": [rows]}
    folder = theirs(tmp_path / "runs", state="finished", set=changes, forced=["foreign-code:test_datasets.0.ds_type"])
    record = folder.read()
    record.cwd = str(tmp_path)
    folder.write(record)
    shutil.copytree(tiny, folder.output, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder.output / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return folder, mark


@pytest.mark.parametrize("command", ["evaluate", "publish --merge", "publish", "report", "results", "resume", "show"])
def test_no_verb_unpickles_a_strangers_rows(strangers, recipe, command):
    folder, mark = strangers
    words = ["resume", "--force", "foreign-code:plugins.0"] if command == "resume" else command.split()
    done = recipe(words[0], str(folder.config_file if command == "show" else folder.path), *words[1:])
    if command in ("evaluate", "publish --merge"):
        assert done.returncode == 2
        assert "[foreign-code:test_datasets.0.ds_type]" in done.stderr
    assert not mark.exists()


def test_a_strangers_files_are_looked_for_where_the_run_ran(strangers, tmp_path, monkeypatch):
    folder, _ = strangers
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    configure(folder, base_model="./model", test_datasets=None)
    monkeypatch.chdir("/")
    assert refused(folder) == {"pickled-weights:base_model"}


def test_a_value_that_breaks_the_schema_does_not_hide_code(strangers):
    folder, _ = strangers
    configure(
        folder,
        trust_remote_code=1,
        plugins="mine.Plugin",
        test_datasets={"path": "rows.pkl", "ds_type": "sql"},
    )
    names = {"trust_remote_code", "plugins", "test_datasets.ds_type"}
    assert refused(folder) == {f"foreign-code:{name}" for name in names}


def test_a_strangers_adapter_imports_nothing(strangers):
    folder, _ = strangers
    configure(folder, test_datasets=None)
    assert refused(folder) == set()
    (folder.output / "adapter_config.json").write_text('{"peft_type": "LORA", "megatron_core": "mine"}')
    assert refused(folder) == {"foreign-code:adapter_config.megatron_core"}


def test_a_run_that_ends_meanwhile_stays_finished(tmp_path, monkeypatch):
    folder = theirs(tmp_path)
    ended = folder.read().model_copy(update={"state": "finished"})
    monkeypatch.setattr(RunDir, "is_own", lambda folder, _: folder.write(ended) or True)
    with pytest.raises(UserError):
        run.resume(str(folder.path), Local(rehearsal=False), force=[PLUGIN])
    assert folder.read().state == "finished"
    assert folder.read().forced == [PLUGIN, PLUGIN]


def test_a_name_that_is_no_error_is_not_recorded(tmp_path, recipe):
    folder = theirs(tmp_path / "runs")
    sign(folder)
    done = recipe.fails("resume", str(folder.path), "--force", "tpyo")
    assert done.stderr == "recipe: --force tpyo: this config has no such error; errors show their names in brackets\n"
    assert folder.read().state == "interrupted"
    assert folder.read().forced == [PLUGIN]


@pytest.mark.parametrize("options", [[], ["--trust"], ["--trust", "--force", PLUGIN]])
def test_a_run_whose_config_was_deleted_is_not_resumed(tmp_path, recipe, options):
    folder = theirs(tmp_path / "runs")
    sign(folder)
    folder.config_file.unlink()
    record = folder.read()
    problem = f"missing; restore it, or start a new run with `recipe run {NAME}`"
    assert recipe.fails("resume", folder.path, *options).stderr == f"recipe: {folder.config_file}: {problem}\n"
    assert folder.read() == record


def test_a_job_that_starts_before_its_record_resumes(tmp_path, monkeypatch):
    folder = theirs(tmp_path, set={"output_dir": str(RunDir(tmp_path / NAME / "20260101-000000-abcdef0").output)})
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setattr(launch, "preprocess", lambda *_: None)
    run.resume(str(folder.path), Local(rehearsal=False), prepare_only=True, trusted=True)


def test_a_run_from_elsewhere_is_resumed_only_with_trust(tmp_path, with_fake_axolotl, tiny_profile):
    with_fake_axolotl.ok("run", NAME, "--profile", tiny_profile)
    (folder,) = all_runs(tmp_path / "runs")
    record = folder.read()
    record.state, record.hmac, record.recipe_file = "interrupted", "0" * 64, "/home/me/checkout/variants/wide.yaml"
    folder.write(record)
    folder.config_file.write_text(folder.config_file.read_text() + "gc_steps: 4\n")  # a finding with a line
    for words in ((), ("--prepare",), ("--force", "too-big")):
        with_fake_axolotl.fails("resume", folder.path, *words)
        assert folder.read().state == "interrupted"
        assert len(folder.read().launches) == 1
    with_fake_axolotl.ok("resume", folder.path, "--trust")
    assert folder.read().state == "finished"
    assert folder.is_own(folder.read())
