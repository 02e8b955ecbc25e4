"""Queries of runs: conditions, order, columns, and the names of runs."""

import csv
import io
from pathlib import Path

import pytest
from run_folders import a_run

from qlora_recipes.base import paths
from qlora_recipes.base.files import read_json, write_rows
from qlora_recipes.results import listing, query
from qlora_recipes.results.query import Query
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.study.sweep import Sweep, Trial
from qlora_recipes.training.run_record import Summary

LLAMA, CODE, START = "haider2024/llama-2-7b", "haider2024/code-llama-7b", "start/lora"

WORDS = f"there are {', '.join(sorted(query.WORDS))}"


@pytest.fixture(autouse=True)
def runs(place: Path) -> Path:
    """Four runs: one of each state, of another recipe, and a rehearsal; settings are missing or of several types."""
    runs = Path("runs")
    a_run(runs, LLAMA, "1", 5.25, summary=Summary(eval_loss_per_token=1.5), set={"lora_r": 64}, digest="a")
    failed = a_run(runs, LLAMA, "2", 5.4, state="failed", digest="b")
    write_rows(failed.metrics, [{"step": 1, "eval_loss_per_token": 1.4}])
    a_run(runs, CODE, "3", 5.0, set={"lora_r": "auto", "learning_rate": None}, provenance={"host": "node-7"})
    a_run(runs, START, "4", 9.0, summary=Summary(eval_loss_per_token=0.1), rehearsal=True)
    Sweep(
        name="ranks", recipe=LLAMA, rehearsal=False, keys=[], trials=[Trial(name="t", settings={}, digest="b")]
    ).write(runs)
    return runs


def selected(*names: str, **asked: object) -> list[str]:
    return [row["run"][-1] for row in query.table(names, Query(**asked))]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "1234"),
        ([LLAMA], "12"),
        (["llama-2-7b"], "12"),
        (["code-llama"], "3"),
        (["haider2024"], "123"),
        (["ranks"], "2"),
        (["*llama*"], "123"),
        (["*/lora/*"], "4"),
        (["latest"], "4"),
        (["runs/haider2024/llama-2-7b/1", "lora", "ranks"], "124"),
    ],
    ids=" ".join,
)
def test_a_name_stands_for_all_its_runs(names, expected):
    assert selected(*names) == [*expected]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ('state == "finished" and lora_r >= 16', "134"),
        ("state = 'failed' or rehearsal", "24"),
        ("eval_loss < 1.45 and not rehearsal", "2"),
        ("eval_loss is null", "3"),
        ("bleu4 between 5.1 and 5.3", "1"),
        ("learning_rate is null", "3"),
        ("lora_target_modules like '%q_proj%'", "1234"),
        ("datasets.0.path like '%gsm8k%'", "4"),
        ('machine == "node-7"', "3"),
        ("recipe == \"run\" or lower(state) == 'FAILED'", ""),
        ("load_in_4bit == true and round(lora_dropout, 2) = 0.05", "123"),
        ('state == "it\'s"', ""),
    ],
)
def test_a_condition_selects_runs_over_mixed_and_missing_values(where, expected):
    assert selected(where=where) == [*expected]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"sort": ["eval_loss"]}, "2134"),
        ({"sort": ["-eval_loss"]}, "1234"),
        ({"sort": ["state", "-bleu4"]}, "2134"),
        ({"sort": ["-bleu4"], "limit": 2}, "21"),
    ],
)
def test_missing_values_and_rehearsals_come_last(asked, expected):
    assert selected(**asked) == [*expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sort", "lora_rank"], "lora_rank: no run has a column of that name; did you mean lora_r?"),
        (
            ["--columns", "datasets.0.pth"],
            "datasets.0.pth: no run has a column of that name; "
            "did you mean datasets.0.path or datasets.0.type or datasets?",
        ),
        (["--where", "sate == 'x'"], "sate: no run has a column of that name; did you mean state or step or steps?"),
        (["--where", "state =="], f"--where state ==: malformed; {query._EXAMPLE}"),
        (["--where", "state; drop"], f"--where state; drop: ; is unknown here; {query._EXAMPLE}"),
        (["--where", "[readfile]('x')"], f"--where [readfile]('x'): [ is unknown here; {query._EXAMPLE}"),
        (
            ["--where", "load_extension('x')"],
            "--where load_extension('x'): no function or operator is called load_extension; " + WORDS,
        ),
        (
            ["--where", "1) union select (1"],
            "--where 1) union select (1: no function or operator is called select; " + WORDS,
        ),
        (["x*"], "x*: no run matches; `recipe results` lists them"),
        (["--json", "--csv"], "--json, --csv and --raw-csv: give only one of them"),
    ],
)
def test_a_mistaken_query_names_the_nearest_and_touches_no_file(recipe, words, message):
    assert recipe.fails("results", *words).stderr == f"recipe: {message}\n"


def test_csv_has_the_named_columns_and_changes_with_values(recipe):
    done = recipe.ok("results", "haider2024", "--where", "state == 'finished'", "--sort", "eval_loss", "--csv")
    first, second = csv.DictReader(done.stdout.splitlines())
    assert [first["run"], first["eval_loss"], first["bleu4"]] == ["runs/haider2024/llama-2-7b/1", "1.5", "5.25"]
    assert [first["changed"], first["seed"], first["rehearsal"]] == ["lora_r=64", "42", "false"]
    assert [second["eval_loss"], second["changed"]] == ["", "lora_r=auto, learning_rate=null"]
    done = recipe.ok("results", "--columns", "run,lora_target_modules", "--limit", "1", "--csv")
    assert done.stdout == 'run,lora_target_modules\nruns/haider2024/llama-2-7b/1,"[q_proj, k_proj, v_proj, o_proj]"\n'


@pytest.mark.parametrize(("option", "mark"), [("--csv", "'"), ("--raw-csv", "")])
def test_csv_marks_texts_that_a_spreadsheet_would_compute(recipe, option, mark):
    for number, text in enumerate(("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "x=1"), start=10):
        a_run(Path("runs"), LLAMA, str(number), 5.0, set={"wandb_name": text, "lora_r": -number})
    where = ["--where", "wandb_name is not null", "--columns", "wandb_name,lora_r"]
    rows = [*csv.DictReader(io.StringIO(recipe.ok("results", *where, option).stdout, newline=""))]
    expected = [*(mark + text for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1")), "x=1"]
    assert [row["wandb_name"] for row in rows] == expected
    assert [row["lora_r"] for row in rows] == ["-10", "-11", "-12", "-13", "-14", "-15", "-16"]


def test_json_has_settings_times_and_machine_of_a_run(recipe):
    (row,) = recipe.json("results", CODE)
    assert row["settings"]["lora_r"] == "auto"
    assert [row["start"], row["end"]] == ["2026-01-01T00:00:00+00:00", "2026-01-01T10:00:00+00:00"]
    assert [row["duration_seconds"], row["machine"], row["seed"], row["verdict"]] == [36000.0, "node-7", 42, "off"]
    (row,) = recipe.json("results", "1")
    assert row["verdict"] == "off"
    assert recipe.json("results", "1", "--columns", "lora_r,verdict") == [{"lora_r": 64, "verdict": "off"}]


def test_settings_that_follow_from_the_recipe_are_those_of_the_config():
    for folder in query.folders_of([]):
        result = RunResult(folder, folder.read())
        assert {key: result.setting(key) for key in result.config_values} == result.config_values


def test_a_score_has_the_ends_of_its_interval(recipe):
    done = recipe.ok("results", "1", "--csv", "--columns", "bleu4_low,bleu4_high")
    bounds = done.stdout.splitlines()[1].split(",")
    assert [*map(float, bounds)] == pytest.approx([5.15, 5.35])


def test_the_loss_of_pairs_is_not_that_of_tokens():
    summary = Summary(eval_loss=0.6, eval_pairs={"count": 9, "sha256": "a" * 64})
    a_run(Path("runs"), "start/dpo-qlora", "5", 5.0, summary=summary)
    assert selected(where="eval_loss < 0.7") == ["4"]


def test_no_field_hides_a_setting_of_another_meaning():
    keys = read_json(paths.RECIPES / "axolotl.schema.json")["properties"]
    assert listing.FIELDS.keys() & keys.keys() == {"seed"}


def test_no_run_is_named_that_stands_for_others(recipe):
    assert recipe.ok("results", LLAMA).stderr == "next: recipe resume 2\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["*llama*"],
        ["--where", "bleu4 > 5", "--sort", "eval_loss"],
        ["haider2024"],
        ["haider2024", "--rehearse"],
        ["ranks"],
        ["runs/haider2024/llama-2-7b/1", "runs/haider2024/llama-2-7b/2"],
    ],
    ids=" ".join,
)
def test_json_agrees_with_its_schema(recipe, words):
    if len(words) == 2 and Path(words[1]).is_dir():
        for word in words:
            Path(word, "scores.json").unlink()
            write_rows(Path(word, "metrics.jsonl"), [{"step": 1, "loss": float(word[-1])}])
    recipe.json("results", *words)


def test_the_schema_has_all_fields_of_a_run():
    import outputs

    (folder,) = query.folders_of(["1"])
    result = RunResult(folder, folder.read())
    scores = {field for name, score in result.scores.items() for field in score.as_json(name)}
    scores |= {f"{name}_{part}" for name in result.scores for part in ("low", "high", "interval_method")}
    assert listing.record(result).keys() - scores | {"eval_loss"} == outputs.Run.__annotations__.keys()
