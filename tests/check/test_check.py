"""`recipe check` as a user meets it, and whatever a file may hold."""

from pathlib import Path
from typing import Any

import pytest
from conftest import config_with, typed

from qlora_recipes.base import hub, paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.check import check
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import MIRROR, Composed, Request
from qlora_recipes.config.finding import Case, Finding, refuse
from qlora_recipes.plan import plan
from qlora_recipes.verbs import check as verb

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def place(place: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Path:
    """A folder with the data that recipes name, a network, and the packages of all trackers."""
    (place / "data").symlink_to(prepared)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(Case, "is_installed", lambda *_: True)
    monkeypatch.setenv("HF_TOKEN", "for the test")
    return place


def test_every_finding_is_told_at_once_with_its_place(place, recipe):
    text = (paths.RECIPES / f"{NAME}.yaml").read_text()
    (place / "mine.yaml").write_text(
        text.replace("weight_decay: 0.01", "weight_decai: 0.01")
        .replace("optimizer: paged_adamw_32bit", "optimizer: adamwx")
        .replace("  - v_proj", "  - v_prj")
    )
    (place / "more.yaml").write_text("bf16: true\nlogging_step: 1\n")

    def at(start: str) -> str:
        lines = (place / "mine.yaml").read_text().splitlines()
        return f"mine.yaml:{next(i for i, line in enumerate(lines, 1) if line.startswith(start))}: error: "

    done = recipe.fails("check", "mine.yaml", "--profile", "more.yaml", "--set", "lora_dropout=2", "--gpu", "T4")
    lines = done.stdout.splitlines()
    for start, name in (
        (at("optimizer"), "value:optimizer"),
        (at("weight_decai"), "unknown-key:weight_decai"),
        (at("  - v_prj"), "unknown-lora-target:lora_target_modules.2"),
        ("more.yaml:1: error: ", "gpu-lacks:bf16"),
        (at("fp16"), "two-precisions:fp16"),
        ("more.yaml:2: error: ", "unknown-key:logging_step"),
        ("--set lora_dropout=2: error: ", "value:lora_dropout"),
    ):
        assert any(line.startswith(start) and line.endswith(f"[{name}]") for line in lines), (start, done.stdout)
    assert sum(": error: " in line for line in lines) == 7


def test_json(place, recipe):
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"lora_rr": 1})))
    (place / "broken.yaml").write_text("a: [\n")
    mine, broken, nowhere = recipe.json("check", "mine.yaml", "broken.yaml", "nowhere", "--data", code=2)
    assert mine["checked"] == "mine.yaml"
    (error,) = [finding for finding in mine["findings"] if finding["level"] == "error"]
    assert "lora_r" in error.pop("problem")
    assert error == {
        "level": "error",
        "rule": "unknown-key",
        "name": "unknown-key:lora_rr",
        "key": "lora_rr",
        "remedy": "",
        "where": "mine.yaml",
        "line": (place / "mine.yaml").read_text().splitlines().index("lora_rr: 1") + 1,
    }
    assert [read["rows"] for read in mine["data"]] == [109, 27]
    assert broken["findings"][0]["where"] == "broken.yaml"
    assert broken["findings"][0]["line"] == 2
    assert [finding["rule"] for finding in nowhere["findings"]] == ["unreadable"]


@pytest.mark.parametrize("profile", [file.stem for file in paths.PROFILES.glob("*.yaml") if file.stem != MIRROR])
def test_profiles_over_a_recipe_are_clean(place, profile):
    report = check.check_request(Request(NAME, profiles=[profile]))
    assert [str(finding) for finding in report.findings if finding.level != "note"] == []


def test_force_overrides_a_named_finding_only(place, recipe):
    wrong = ("run", NAME, "--rehearse", "--dry-run", "--set", "lora_rr=1", "--set", "num_epochs=-1")
    assert "[unknown-key:lora_rr]" in recipe(*wrong).stderr
    one = recipe(*wrong, "--force", "unknown-key:lora_rr")
    assert one.returncode == 2
    assert "lora_rr" not in one.stderr
    assert "num_epochs" in one.stderr
    both = recipe(*wrong, "--force", "unknown-key:lora_rr", "--force", "value:num_epochs")
    assert both.returncode == 0
    assert "lora_rr: 1\n" in both.stdout
    for name in ("unknown-key:lora_r", "everything"):
        other = recipe(*wrong, "--force", name)
        assert other.returncode == 2
        assert f"--force {name}: " in other.stderr


def test_a_secret_cannot_be_forced():
    with pytest.raises(UserError, match="secret:hub_token"):
        refuse([Finding("error", "secret", "hub_token", "x")], ["secret:hub_token"])


def test_a_run_refuses_bad_rows(place, recipe):
    (place / "bad.jsonl").write_text('{"instruction": "a"}\n')
    done = recipe("run", NAME, "--rehearse", "--set", "datasets.0.path=bad.jsonl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "bad.jsonl:1: error: datasets.0.path: " in done.stderr and "[bad-row:" in done.stderr
    assert not (place / "runs").exists()


def test_what_is_too_big_for_a_card_is_an_error(place, tiny):
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": {"pad_token": "</s>"}}
    change["sequence_len"] = 1816  # of no other test, whose plan would be in the cache
    (place / "tiny.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    small, large = gpus.Gpu("small", (7, 5), 0.2), gpus.Gpu("large", (7, 5), 4)

    def found(gpu: gpus.Gpu, trace: bool = False) -> list[Finding]:
        report = check.check_request(Request("tiny.yaml"), gpu)
        plan.add_memory_finding(report, gpu, trace=trace)
        return report.findings

    (unplanned,) = found(small)
    assert unplanned.name == "not-checked:micro_batch_size"
    (finding,) = found(small, trace=True)
    assert finding.name == "too-big:micro_batch_size"
    assert finding.level == "error"
    assert (place / "tiny.yaml").read_text().splitlines()[finding.line - 1].startswith("micro_batch_size")
    assert found(small) == [finding]  # from the cache
    (report,) = verb._checked([Request("tiny.yaml", force=[finding.name])], small, False, True)
    assert [each.level for each in report.findings] == ["warning"]
    assert not found(large)
    engine = {"deepspeed": "zero3_offload.json"}
    composed = Composed("x", place / "tiny.yaml", None, config_with(change | engine), [], {}, [], False)
    report = check.Report("x", composed)
    plan.add_memory_finding(report, small, 2)
    assert [each.name for each in report.findings] == ["not-checked:micro_batch_size"]


def checked(content: bytes) -> list[Finding]:
    file = Path("any.yaml")
    file.write_bytes(content)
    report = check.check_request(Request("any.yaml"), data=True)
    check.tokenize_all(report)
    return report.findings


@pytest.mark.parametrize(
    "content",
    [
        b"a: !!python/object/apply:os.system ['touch hit']\n",
        b"\x00\xff\xfe",
        b"- a\n",
        b"",
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_is_one_finding(place, content):
    (only,) = checked(content)
    assert only.level == "error"
    assert only.rule == "unreadable"
    assert only.where == "any.yaml"
    assert not (place / "hit").exists()


def test_data_that_are_not_prepared_yet_are_one_warning_of_a_check_and_an_error_of_a_run(recipe):
    tagged = "haider2024/as-released/llama-3-8b"
    done = recipe.ok("check", tagged)
    (said,) = [line for line in done.stdout.splitlines() if "not-prepared" in line]
    assert "data/codereviewer-tagged/train.jsonl" in said
    prepare, fetch = (
        "`recipe data prepare --study haider2024 --input-format tagged`",
        "`recipe data fetch codereviewer`",
    )
    assert prepare in said and fetch in said
    ran = recipe("run", tagged, "--set", "fp16=false")
    assert ran.returncode == 2
    assert "error: datasets.0.path: data/codereviewer-tagged" in ran.stderr
    assert "[no-gpu]" in ran.stderr
    assert "[no-gpu]" not in recipe("run", tagged, "--set", "fp16=false", "--force", "no-gpu").stderr


def test_what_is_not_written_by_preparing_data_or_is_to_be_read_now_is_an_error(recipe):
    own = recipe.fails("check", NAME, "--set", "datasets.0.path=data/codereviewer/train_mine.jsonl")
    assert "[missing-file:datasets.0.path]" in own.stdout
    read = recipe.fails("check", NAME, "--data")
    assert "error: datasets.0.path: data/codereviewer/train.jsonl" in read.stdout


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["num_epochs=1"], "num_epochs"),
        (["datasets.0.split=train[:100]"], "datasets.0.split"),
        (["gradient_accumulation_steps=64"], "the number of rows per step"),
        (["max_steps=100"], "max_steps"),
    ],
)
def test_a_warm_up_in_steps_is_noted_where_an_override_changes_their_number(place, overrides, changed):
    [note] = warm_up_notes(overrides=overrides)
    assert note.problem == f"still 10 steps, although {changed} changes the number of steps"
    assert len(warm_up_notes(overrides=overrides, gpus=2)) == 1
    assert warm_up_notes(overrides=overrides, rehearse=True) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora_r=8", "micro_batch_size=4", "gradient_accumulation_steps=2"],
        ["num_epochs=1", "warmup_steps=5"],
        ["num_epochs=1", "warmup_steps=null", "warmup_ratio=0.03"],
        ["micro_batch_size={a: 1}"],
    ],
)
def test_no_warm_up_is_noted_where_steps_stay_or_it_is_set(place, overrides):
    assert warm_up_notes(overrides=overrides) == []


def warm_up_notes(overrides: list[str], **settings: Any) -> list[Finding]:
    report = check.check_request(Request(NAME, overrides=typed(*overrides), **settings))
    return [finding for finding in report.findings if finding.rule == "fixed-warm-up"]
