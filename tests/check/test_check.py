"""`recipe check` as a user meets it, and whatever a file may hold."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import config_with, typed

from qlora_recipes import api
from qlora_recipes.base import hub, paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.check import check, settings_rules
from qlora_recipes.config import gpus
from qlora_recipes.config.compose import MIRROR, Composed, Request
from qlora_recipes.config.finding import Finding, refuse
from qlora_recipes.config.merging import Override
from qlora_recipes.plan import plan

NAME = "haider2024/code-llama-7b"


@pytest.fixture
def place(place: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path) -> Path:
    """A folder with the data that recipes name, a network, and the packages of all trackers."""
    (place / "data").symlink_to(prepared)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(settings_rules, "package_version", lambda _: "1.0")
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

    keys = [line.partition(":")[0] for line in (place / "mine.yaml").read_text().splitlines()]
    done = recipe.fails("check", "mine.yaml", "--profile", "more.yaml", "--set", "lora_dropout=2", "--gpu", "T4")
    errors = [line.split(": error: ") for line in done.stdout.splitlines()]
    assert {error.rpartition("[")[2].rstrip("]"): where for where, error in errors} == {
        "value:optimizer": f"mine.yaml:{keys.index('optimizer') + 1}",
        "unknown-key:weight_decai": f"mine.yaml:{keys.index('weight_decai') + 1}",
        "unknown-lora-target:lora_target_modules.2": f"mine.yaml:{keys.index('  - v_prj') + 1}",
        "gpu-lacks:bf16": "more.yaml:1",
        "two-precisions:fp16": f"mine.yaml:{keys.index('fp16') + 1}",
        "unknown-key:logging_step": "more.yaml:2",
        "value:lora_dropout": "--set lora_dropout=2",
    }


def test_json(place, recipe):
    (place / "mine.yaml").write_text(yamlfiles.write_yaml(config_with({"lora_rr": 1})))
    (place / "broken.yaml").write_text("a: [\n")
    mine, broken, nowhere = recipe.json("check", "mine.yaml", "broken.yaml", "nowhere", "--all-rows", code=2)
    assert mine["checked"] == "mine.yaml"
    (error,) = [finding for finding in mine["findings"] if finding["level"] == "error"]
    assert error == {
        "level": "error",
        "problem": "unknown to Axolotl; did you mean lora_r or lora_dropout?",
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
    assert [(finding["rule"], finding["where"]) for finding in nowhere["findings"]] == [("unreadable", "nowhere")]


@pytest.mark.parametrize("profile", [file.stem for file in paths.PROFILES.glob("*.yaml") if file.stem != MIRROR])
def test_profiles_over_a_recipe_are_clean(place, profile):
    report = check.check_request(Request(NAME, profiles=[profile]))
    assert [str(finding) for finding in report.findings if finding.level != "note"] == []


def test_force_overrides_a_named_finding_only(place, recipe):
    wrong = ("run", NAME, "--rehearse", "--dry-run", "--set", "lora_rr=1", "--set", "num_epochs=-1")
    epochs = "--set num_epochs=-1: error: num_epochs: -1 is less than or equal to the minimum of 0 [value:num_epochs]\n"
    assert recipe.fails(*wrong, "--force", "unknown-key:lora_rr").stderr == f"recipe: {epochs}"
    both = recipe.ok(*wrong, "--force", "unknown-key:lora_rr", "--force", "value:num_epochs")
    assert yaml.safe_load(both.stdout)["lora_rr"] == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("unknown-key:lora_r", "; did you mean unknown-key:lora_rr?"),
        ("everything", "; errors show their names in brackets"),
    ],
)
def test_a_name_of_no_error_is_refused(place, recipe, name, hint):
    done = recipe.fails("run", NAME, "--rehearse", "--dry-run", "--set", "lora_rr=1", "--force", name)
    assert done.stderr == f"recipe: --force {name}: this config has no such error{hint}\n"


def test_a_secret_cannot_be_forced():
    with pytest.raises(UserError) as raised:
        refuse([Finding("error", "secret", "hub_token", "x", where="mine.yaml")], ["secret:hub_token"])
    assert str(raised.value) == "mine.yaml: error: hub_token: x [secret:hub_token]"


def test_a_run_refuses_bad_rows(place, recipe):
    (place / "bad.jsonl").write_text('{"instruction": "a"}\n')
    done = recipe.fails("run", NAME, "--rehearse", "--set", "datasets.0.path=bad.jsonl")
    assert done.stdout == ""
    assert done.stderr == (
        "recipe: bad.jsonl:1: error: datasets.0.path: 1 row: the field output is missing; correct or drop these rows "
        "[bad-row:datasets.0.path]\n"
    )
    assert not (place / "runs").exists()


def test_a_check_without_a_tokenizer_reads_the_text_of_200_rows(place, recipe):
    good = '{"instruction": "a%d", "output": "b"}\n'
    (place / "bad.jsonl").write_text("".join(map(good.__mod__, range(400))) + '{"instruction": "a"}\n' * 3)
    done = recipe.fails("check", NAME, "--set", "datasets.0.path=bad.jsonl")
    assert done.stdout.splitlines()[0] == (
        "bad.jsonl:403: error: datasets.0.path: 1 row: the field output is missing; correct or drop these rows "
        "[bad-row:datasets.0.path]"
    )


def test_what_is_too_big_for_a_card_is_an_error(place, tiny):
    change = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": {"pad_token": "</s>"}}
    change["sequence_len"] = 1816  # of no other test, whose plan would be in the cache
    (place / "tiny.yaml").write_text(yamlfiles.write_yaml(config_with(change)))
    small, large = gpus.Gpu("small", (7, 5), 0.2), gpus.Gpu("large", (7, 5), 4)

    def findings_for(gpu: gpus.Gpu, trace: bool = False) -> list[Finding]:
        report = check.check_request(Request("tiny.yaml"), gpu)
        plan.add_memory_finding(report, gpu, trace=trace)
        return report.findings

    (unplanned,) = findings_for(small)
    assert unplanned.name == "not-checked:micro_batch_size"
    (finding,) = findings_for(small, trace=True)
    assert finding.name == "too-big:micro_batch_size"
    assert finding.level == "error"
    line = (place / "tiny.yaml").read_text().splitlines()[finding.line - 1]
    assert line.partition(":")[0] == "micro_batch_size"
    assert findings_for(small) == [finding]  # from the cache
    (report,) = api.reports([Request("tiny.yaml", force=[finding.name])], small, False, True)
    assert [warning.level for warning in report.findings] == ["warning"]
    assert findings_for(large) == []
    engine = {"deepspeed": "zero3_offload.json"}
    composed = Composed("x", place / "tiny.yaml", None, config_with(change | engine), [], {}, [], False)
    report = check.Report("x", composed)
    plan.add_memory_finding(report, small, 2)
    assert [note.name for note in report.findings] == ["not-checked:micro_batch_size"]


def test_a_missing_tokenizer_is_reported_with_a_command_for_the_same_rows(place):
    (place / "my rows.jsonl").write_text('{"instruction": "a", "input": "", "output": "b"}\n' * 30)
    (place / "my recipe.yaml").write_text((paths.RECIPES / f"{NAME}.yaml").read_text())
    path = Override("datasets.0.path", "my rows.jsonl")
    request = Request("my recipe.yaml", ["packed"], [path])
    report = check.check_request(request, data=True)
    check.tokenize_all(report, request)
    (finding,) = [finding for finding in report.findings if finding.name == "not-checked:base_model"]
    assert finding.problem == (
        "skipped tokenizing the rows: no tokenizer on this machine; `recipe check 'my recipe.yaml' --profile packed "
        "--set 'datasets.0.path=my rows.jsonl' --all-rows --rehearse --set 'datasets.0.split=train[:1000]'` takes a "
        "small model's"
    )


def checked(content: bytes) -> list[Finding]:
    file = Path("any.yaml")
    file.write_bytes(content)
    request = Request("any.yaml")
    report = check.check_request(request, data=True)
    check.tokenize_all(report, request)
    return report.findings


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param(
            b"a: !!python/object/apply:os.system ['touch hit']\n",
            "any.yaml:1: error: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system' (column 4) [unreadable]",
            id="code",
        ),
        pytest.param(b"\x00\xff\xfe", "any.yaml: error: not a text file in UTF-8 [unreadable]", id="bytes"),
        pytest.param(b"- a\n", "any.yaml: error: not a mapping of keys to values [unreadable]", id="list"),
        pytest.param(b"", "any.yaml: error: not a mapping of keys to values [unreadable]", id="empty"),
    ],
)
def test_a_file_that_is_no_config_is_one_finding(place, content, text):
    assert list(map(str, checked(content))) == [text]
    assert not (place / "hit").exists()


TAGGED = "haider2024/as-released/llama-3-8b"


def test_data_that_are_not_prepared_yet_are_one_warning_of_a_check(recipe):
    (report,) = recipe.json("check", TAGGED)
    by_name = {finding["name"]: finding for finding in report["findings"]}
    finding = by_name["not-prepared:datasets.0.path"]
    assert finding["level"] == "warning"
    assert finding["problem"] == "data/codereviewer-tagged/train.jsonl is not prepared yet"
    assert finding["remedy"] == "run `recipe data fetch codereviewer` and `recipe data prepare --study haider2024`"


def errors_of(output: str) -> list[str]:
    """Names of the errors in an output, which it has at the ends of lines, in brackets."""
    return [line.rpartition("[")[2].rstrip("]") for line in output.splitlines() if ": error: " in line]


def test_data_that_are_not_prepared_yet_are_an_error_of_a_run(recipe):
    run = ("run", TAGGED, "--set", "fp16=false")
    errors = ["not-prepared:datasets.0.path", "no-access:base_model"]
    assert errors_of(recipe.fails(*run).stderr) == [*errors, "no-gpu"]
    assert errors_of(recipe.fails(*run, "--force", "no-gpu").stderr) == errors


@pytest.mark.parametrize(("header", "level"), [("", "warning"), ('# /// recipe\n# name = "x"\n# ///\n', "error")])
def test_a_key_that_occurs_twice_is_an_error_only_in_a_recipe(place, header, level):
    (place / "theirs.yaml").write_text(f"{header}base_model: x\nlora_r: 8\nlora_r: 16\nlora_r: 16\n")
    report = check.check_request(Request("theirs.yaml"))
    (finding,) = (finding for finding in report.findings if finding.rule == "duplicate-key")
    line = header.count("\n") + 2
    assert (finding.level, finding.problem) == (
        level,
        f"keys occur twice, and Axolotl takes the last value: lora_r 8 (line {line}), then 16",
    )


def test_data_that_are_to_be_read_now_are_an_error(recipe):
    assert errors_of(recipe.fails("check", NAME, "--all-rows").stdout) == ["not-prepared:datasets.0.path"]


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
