"""A study that a user adds to an empty folder, without Python: its skeleton, and one of another kind to the end."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from pydantic import ValidationError

from qlora_recipes.base import paths
from qlora_recipes.data import studies
from qlora_recipes.evaluate import benchmarks
from qlora_recipes.results import export_records
from qlora_recipes.results.run_result import RunResult
from qlora_recipes.run.rundir import RunDir

STUDY = """\
title: Capitals of countries
paper: {title: A quiz, authors: Somebody}
data:
  key: capitals
  name: countries and capitals
  source: https://example.org/capitals
  licence: CC0-1.0
  sources:
    learn.csv: {url: https://example.org/learn.csv, rows: 7}
    asked.csv: {url: https://example.org/asked.csv, rows: 4}
  fields:
    question: '"What is the capital of " ~ country ~ "?"'
    answer: capital | trim
  filters: {no capital: not (capital | trim)}
  splits:
    train: {from: learn.csv}
    test: {from: asked.csv}
  sample: sample
decoding: {max_new_tokens: 8}
metrics:
  accuracy: {metric: exact_match, label: accuracy}
published:
  capitals/first: {scores: {accuracy: {value: 75.0, spread: 5.0}}}
unreported: [seed]
differences: [The authors counted answers by hand.]
"""

TEMPLATE = """\
# {{ name }}: capitals
base_model: meta-llama/Llama-3.2-3B  # paper
adapter: qlora  # paper
load_in_4bit: true  # paper
lora_r: 8  # paper
lora_alpha: 16  # paper
lora_target_modules: [q_proj, v_proj]  # paper
lora_mlp_kernel: false  # this project
datasets:  # paper
  - path: data/capitals/train.jsonl  # paper
    type: {field_instruction: question, field_output: answer, no_input_format: "Q: {instruction} A: "}  # paper
sequence_len: 256  # paper
num_epochs: 1  # paper
micro_batch_size: 2  # paper
gradient_accumulation_steps: 1  # paper
optimizer: adamw_torch  # paper
learning_rate: 0.0002  # paper
bf16: true  # paper
seed: 1  # this project
output_dir: outputs/{{ name }}  # this project
"""

CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi"}
PAIRS = [",".join(pair) for pair in CAPITALS.items()]


def write_capitals(folder: Path) -> Path:
    """Write the study; the path of its study.yaml."""
    recipes = folder / "recipes" / "capitals"
    (recipes / "sample").mkdir(parents=True)
    (recipes / "study.yaml").write_text(STUDY)
    templates = folder / "templates" / "capitals"
    templates.mkdir(parents=True)
    (templates / "first.yaml.j2").write_text(TEMPLATE)
    for name, pairs in {"learn.csv": [*PAIRS, "Norway, "], "asked.csv": PAIRS[:4]}.items():
        (recipes / "sample" / name).write_text("\n".join(["country,capital", *pairs]) + "\n")
    return recipes / "study.yaml"


def test_the_skeleton_of_a_study_passes_every_check(recipe, tmp_path):
    done = recipe.ok("study", "new", "mine")
    assert [file for file in done.stdout.split() if not (tmp_path / file).is_file()] == []
    rendered = recipe.ok("render", "--check")
    assert rendered.stderr == f"rendering {paths.TEMPLATES}\nrendering templates\n"
    written = (tmp_path / "recipes" / "mine" / "llama-3.2-3b-mine.yaml").read_text()
    assert "\n# Run       recipe run mine/llama-3.2-3b-mine\n" in written  # from the project's parent of all templates
    schema = re.match(r"# yaml-language-server: \$schema=(\S+)\n", written)
    assert schema
    assert (tmp_path / "recipes" / "mine" / schema[1]).samefile(paths.RECIPES / "axolotl.schema.json")
    checked = recipe.ok("study", "check", "mine")
    assert {"error:", "warning:"} & {*checked.stdout.split()} == set()
    assert checked.stderr.startswith("checking mine: recipes, data, and Axolotl's validation\n")
    recipe.ok("check", "mine/llama-3.2-3b-mine", "--rehearse")
    assert "haider2024" in recipe("show", "llama-3.2-3b").stdout  # a built-in recipe's short name stays its own
    again = recipe.fails("study", "new", "mine")
    assert "recipes/mine: " in again.stderr
    template, orphan = "templates/mine/llama-3.2-3b-mine.yaml.j2", "recipes/mine/llama-3.2-3b-mine.yaml"
    (tmp_path / template).rename(tmp_path / template.replace("3b", "1b"))
    study = tmp_path / "recipes" / "mine" / "study.yaml"
    study.write_text(study.read_text().replace("3b-mine", "1b-mine"))
    assert "published." not in recipe("study", "check", "mine").stdout  # `recipe render` is the remedy
    for command, code in (("render",), 0), (("render", "--check"), 1), (("study", "check", "mine"), 2):
        left = recipe(*command)
        assert left.returncode == code
        assert orphan in left.stdout + left.stderr
    assert len(recipe.json("check", "mine", "3.2-3b-m*", code=2)) == 3


def test_a_study_needs_no_paper_and_its_own_file_is_not_fetched(recipe, tmp_path):
    study = write_capitals(tmp_path)
    lines = [line for line in STUDY.splitlines() if not line.startswith(("paper:", "  source:"))]
    study.write_text(re.sub("learn.csv: {.*}", "learn.csv: {}", "\n".join(lines)))
    recipe("render")
    recipe.ok("study", "check", "capitals")
    missing = "recipe: data/capitals-raw/learn.csv: no such file"
    assert recipe.fails("data", "fetch", "capitals").stderr == (
        f"{missing}, and study.yaml gives neither url nor hub for it; copy it there, or run `recipe data prepare "
        "--study STUDY FOLDER`, where FOLDER contains the file\n"
    )
    assert recipe.fails("data", "prepare", "--study", "capitals").stderr == (
        f"{missing}; copy it there, or give its folder to `recipe data prepare --study STUDY`\n"
    )
    assert not (tmp_path / "data").exists()


def test_a_study_says_what_it_lacks(recipe, tmp_path):
    study = write_capitals(tmp_path)
    recipe.ok("render")
    study.write_text(
        STUDY.replace("capitals/first", "capitals/frist")
        .replace("unreported: [seed]", "unreported: [learning_rte]")
        .replace("country ~", "contry ~")
        .replace("key: capitals", "key: cities")
    )
    checked = recipe.fails("study", "check", "capitals")
    place = "recipes/capitals/study.yaml"
    sample = tmp_path / "recipes" / "capitals" / "sample"
    assert [line for line in checked.stdout.splitlines() if ": note: " not in line] == [
        f"{place}:23: error: published.capitals/frist: capitals/frist is unknown; did you mean capitals/first?",
        f"{place}:24: error: unreported.0: learning_rte is unknown; did you mean learning_rate?",
        f'{place}:18: error: data.sample: rows cannot be prepared: {sample}/learn.csv:2: question ("What is the '
        """capital of " ~ contry ~ "?"): 'contry' is undefined; the row's fields: country, capital""",
        f"{place}:22: warning: published: capitals/first is missing; add `capitals/first: {{}}` here or under "
        "ablations",
        f"{place}:15: warning: data.splits: capitals/first reads data/capitals/train.jsonl (datasets.0.path); the "
        "splits write data/cities/test.jsonl, data/cities/train.jsonl",
    ]


def test_a_benchmark_that_the_harness_lacks_is_found_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "_tasks", lambda _: SimpleNamespace(all_tasks=[]))
    study = write_capitals(tmp_path)
    with_benchmark = STUDY.replace("{metric: exact_match,", "{metric: benchmark, task: gsm8kk,")
    study.write_text(re.sub("{scores: .*}", "{}", with_benchmark))
    assert "counted answers by hand" in recipe.ok("results", "capitals").stdout  # also without runs and scores
    recipe.ok("render")
    for words in ("study", "check", "capitals"), ("reproduce", "capitals", "--rehearse", "--json"):
        done = recipe.fails(*words)
        assert "gsm8kk" in done.stdout + done.stderr


@pytest.mark.long
def test_a_study_of_another_kind_goes_to_the_end(recipe, tmp_path, tiny, fake_axolotl, monkeypatch):
    """Another task, CSV, accuracy, no validation rows, and not a line of Python."""
    monkeypatch.setattr(sys, "executable", str(fake_axolotl.with_name("python")))  # of the commands that it starts
    write_capitals(tmp_path)

    def done(*arguments: str | Path) -> str:
        result = recipe(*arguments)
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        return result.stdout

    assert done("render").split() == ["recipes/capitals/first.yaml"]
    done("study", "check", "capitals")
    raw = sorted((tmp_path / "recipes" / "capitals" / "sample").iterdir())
    done("data", "prepare", *raw, "--study", "capitals")
    rows = [orjson.loads(line) for line in (tmp_path / "data" / "capitals" / "test.jsonl").read_bytes().splitlines()]
    assert rows[0] == {"question": "What is the capital of France?", "answer": "Paris", "idx": 0}
    table = done("reproduce", "capitals", "--rehearse", "--set", f"base_model={tiny}")
    assert "capitals/first" in table
    assert "accuracy, %" in table
    scores = orjson.loads(done("evaluate", "latest", "--json"))
    assert scores["rows"] == 4
    assert 0 <= scores["accuracy"] <= 100
    assert "bleu4" not in scores
    (row,) = orjson.loads(done("results", "--json"))
    assert row["accuracy"] == scores["accuracy"]
    assert row["accuracy_published"] is None  # of a rehearsal
    done("report", "latest")
    assert "accuracy, %" in (tmp_path / "report.html").read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "real", "evaluated", "rows"),
    [
        ("loftq-gsm8k/llama-2-7b-loftq", True, "done", 12),
        ("peft-metamathqa/lora-rank32-dora", True, "done", 12),
        ("dora-commonsense/llama-2-7b-dora", True, "done", 12),  # beams, eight test sets
        ("tinker-tulu3/llama-3.2-1b-lora", True, None, None),  # a metric of the eval loss needs no predictions
        ("qlora-guanaco/llama-7b", False, "done", 0),  # nor does a benchmark, whose rows are on a hub
    ],
)
def test_the_studies_of_other_kinds_are_rehearsed(
    recipe, tiny, fake_axolotl, tmp_path, monkeypatch, name, real, evaluated, rows
):
    if not real:
        monkeypatch.setattr(sys, "executable", str(fake_axolotl.with_name("python")))
    study = studies.find(name.partition("/")[0])
    words = (study.folder.name, "--rehearse", "--set", f"base_model={tiny}", "--only", name)
    reproduced = recipe.json("reproduce", *words)
    (step,), (row,) = reproduced["steps"], reproduced["results"]
    assert step["recipe"] == name
    assert step["run"] == "done"
    assert step["evaluate"] == evaluated
    assert row["rows"] == rows
    score = row[study.first.name]
    assert row["recipe"] == name
    assert (score is None) == (rows == 0)
    assert 0 <= (score or 0) <= 100
    again = recipe.json("reproduce", *words)
    assert {again["steps"][0][key] for key in ("run", "evaluate")} == {"skipped"}
    if rows:  # it has all that a record needs, but for a GPU
        run = RunDir(tmp_path / row["run"])
        with pytest.raises(ValidationError) as raised:
            export_records.record_of_run(RunResult(run, run.read()))
        assert {error["loc"][0] for error in raised.value.errors()} == {"gpu"}
