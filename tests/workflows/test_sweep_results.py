"""What a sweep's members are, and how they compare, without training."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import Recipe, recipe_config
from run_folders import a_run
from scipy import stats

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.base.files import sha256, write_json
from qlora_recipes.checks import check
from qlora_recipes.configs import compose
from qlora_recipes.configs.compose import Request
from qlora_recipes.data import study
from qlora_recipes.runs.records import Summary
from qlora_recipes.workflows import sweep_results
from qlora_recipes.workflows.sweep import Sweep, SweepMember, find_sweep_file, read_members, varying

BASE = "haider2024/code-llama-7b"
SHIPPED = sorted(file.stem for file in (paths.RECIPES / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("name", [next(iter(one.published)) for one in study.every()])
@pytest.mark.parametrize("sweep", SHIPPED)
def test_members_of_shipped_sweeps_are_clean_over_a_recipe_of_each_study(
    sweep: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(prepared)
    configs = []
    for member in read_members(find_sweep_file(sweep), [])[1]:
        composed = compose.compose(Request(name, overrides=member.overrides))
        found = check.examine(composed).findings
        wrong = [finding for finding in found if finding.level == "error" and finding.rule != "not-prepared"]
        assert list(map(str, wrong)) == []  # only the first study's data is here
        configs.append(composed.config)
    assert all(a != b for a, b in itertools.combinations(configs, 2))


def test_members_are_those_of_axolotl(tmp_path: Path) -> None:
    """In another order, since Axolotl's is by chance."""
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    content = {"_": [{"lora_r": 8, "lora_alpha": 4}, {"lora_r": 16, "lora_alpha": 8}], "learning_rate": [1e-4, 2e-4]}
    (tmp_path / "s.yaml").write_text(yamlfiles.write_yaml(content))
    _, members = read_members(tmp_path / "s.yaml", [])
    theirs = generate_sweep_configs(recipe_config(BASE), content)
    ours = [recipe_config(BASE) | member.values for member in members]
    assert sorted(map(strings, ours)) == sorted(map(strings, theirs))


def strings(content: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((key, str(value)) for key, value in content.items())


def test_values_come_from_the_command_line_too() -> None:
    name, members = read_members(None, ["lora_target_modules=[q_proj],[q_proj, v_proj]", "num_epochs=1"])
    assert name == "lora_target_modules"
    assert [(m.name, m.values) for m in members] == [
        ("lora_target_modules=[q_proj]", {"lora_target_modules": ["q_proj"], "num_epochs": 1}),
        ("lora_target_modules=[q_proj, v_proj]", {"lora_target_modules": ["q_proj", "v_proj"], "num_epochs": 1}),
    ]
    assert varying(members) == ["lora_target_modules"]


@pytest.mark.parametrize(
    ("text", "sets", "says"),
    [
        ("lora_r: 16", [], "s.yaml:1: lora_r: "),
        ("a: [1]\nlora_r: []", [], "s.yaml:2: lora_r: "),
        ("_: [1]", [], "_: "),
        ("_:\n- {name: a, lora_r: 1}\n- {name: a, lora_r: 2}", [], "called a"),
        ("[", [], "s.yaml: "),
        ("{}", ["lora_r"], "--set lora_r: "),
    ],
)
def test_what_is_no_sweep_is_refused_with_its_place(tmp_path: Path, text: str, sets: list[str], says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_members(tmp_path / "s.yaml", sets)
    assert says in str(error.value)


def test_nothing_is_started_where_a_member_is_wrong(tmp_path: Path, recipe: Recipe) -> None:
    done = recipe("sweep", BASE, "--set", "lora_r=8,16", "--set", "lora_alpha=4,x", "--rehearse")
    assert done.returncode == 2
    assert done.stderr.count("[value:lora_alpha]") == 1
    assert "lora_r=8, lora_alpha=x; lora_r=16, lora_alpha=x: --set lora_alpha=x: " in done.stderr
    same = recipe("sweep", BASE, "--set", "lora_r=32,32.0", "--rehearse", "--dry-run")
    assert (same.returncode, "lora_r=32.0" in same.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()
    assert " targets" in recipe("sweep", BASE, "tragets").stderr


def test_what_does_not_fit_is_told_before_anything_starts(tmp_path: Path, recipe: Recipe, tiny_profile: Path) -> None:
    profile = ("--profile", tiny_profile, "--set", "warmup_steps=0", "--dry-run", "--gpu", "L4", "--json")
    done = recipe("sweep", BASE, "--set", "micro_batch_size=1,4096", *profile)
    assert done.returncode == 1, done.stderr
    fits, not_fits = orjson.loads(done.stdout)["steps"]
    assert (fits["problem"], not_fits["plan"]) == (None, "failed")
    assert "more than L4 (sm_89) has" in not_fits["problem"]
    assert not (tmp_path / "runs").exists()


def a_sweep(runs: Path, finished: dict[str, list[tuple[float, float, float]]], seeds: bool = False) -> Sweep:
    """A sweep over lora_r; for each member the BLEU-4, eval loss and memory of each of its seeds' runs."""
    members = []
    for i, (name, of_seeds) in enumerate(finished.items()):
        for seed, (bleu4, loss, memory) in enumerate(of_seeds):
            digest = f"{name}-{seed}"
            members.append(
                SweepMember(name=name, values={"lora_r": 8 << i}, seed=seed if seeds else None, digest=digest)
            )
            summary = Summary(
                eval_loss_per_token=loss,
                peak_memory=memory,
                memory_kind="GPU, reserved",
                train_seconds=60,
                trainable_parameters=240 << i,
                parameters=48_000,
            )
            a_run(runs, BASE, f"2026-{digest}", bleu4, digest=digest, summary=summary)
    return Sweep(name="ranks", recipe=BASE, rehearsal=False, keys=["lora_r"], members=members)


def test_members_compare_by_what_their_runs_measured(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)], "bad": [(9.0, 1.3, 7.5)]})
    sweep.members.append(SweepMember(name="not yet", values={"lora_r": 1}, digest="none"))
    rows = {row.member.name: row for row in sweep_results.rows(sweep, tmp_path)}
    assert [name for name, row in rows.items() if row.pareto] == ["low", "high"]
    high = sweep_results.record(rows["high"])
    assert (high["bleu4"], high["bleu4_low"], high["bleu4_high"], high["peak_memory_gib"]) == (5.5, 5.4, 5.6, 8.0)
    assert (high["trainable"], high["trainable_share"]) == (480, 0.01)
    assert rows["not yet"].scores["bleu4"] == (None, None)


@pytest.mark.parametrize("name", ["llama-3.2-1b-lora", "llama-3.1-8b-qlora"])
def test_members_stand_beside_the_published_scores_of_their_settings(tmp_path: Path, name: str) -> None:
    _, members = read_members(find_sweep_file("rate-and-rank"), [])
    recipe = f"tinker-tulu3/{name}"
    sweep = Sweep(name="rate-and-rank", recipe=recipe, rehearsal=False, keys=varying(members), members=members)
    of_study = study.find("tinker-tulu3")
    published = [row.published["nll"] for row in sweep_results.rows(sweep, tmp_path)]
    assert min(published) == of_study.published[of_study.origin(recipe)].scores["nll"].value and len(published) == 16


def test_test_rows_choose_no_member(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    (test := tmp_path / "test.jsonl").write_text("{}\n")
    write_json(tmp_path / "manifest.json", {"splits": {"test": {"sha256": sha256(test), "constants": {}}}})
    for config in tmp_path.rglob("config.yaml"):
        cfg = yamlfiles.read_yaml(config)
        cfg["test_datasets"][0]["path"] = str(test)
        config.write_text(yamlfiles.write_yaml(cfg))
    assert not any(row.pareto for row in sweep_results.rows(sweep, tmp_path))


def test_scores_over_seeds_have_students_interval(tmp_path: Path) -> None:
    values = [5.0, 5.3, 5.1]
    sweep = a_sweep(tmp_path, {"low": [(bleu4, 1.0, 7.0) for bleu4 in values]}, seeds=True)
    (row,) = sweep_results.rows(sweep, tmp_path)
    assert row.seeds == [0, 1, 2]
    mean, within = row.scores["bleu4"]
    assert mean == pytest.approx(np.mean(values))
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (within.low, within.high) == pytest.approx(expected)
    assert within.method == row.scores["eval_loss"][1].method


def test_results_of_a_sweep_in_every_form(tmp_path: Path, recipe: Recipe) -> None:
    runs = tmp_path / "runs"
    sweep = a_sweep(runs, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    sweep.file(runs).parent.mkdir(parents=True)
    sweep.write(runs)
    table = recipe("results", "ranks")
    assert re.findall(r"Pareto.*: (.*)", table.stdout) == ["low; high"]
    rows = orjson.loads(recipe("results", "ranks", "--json").stdout)
    assert [row["values"] for row in rows] == [{"lora_r": 8}, {"lora_r": 16}]
    wrong = recipe("results", "rnaks")
    assert (wrong.returncode, " ranks" in wrong.stderr) == (2, True)
    sweep.model_copy(update={"rehearsal": True}).write(runs)
    several = recipe("results", "ranks")
    assert (several.returncode, f" ranks/{BASE}/rehearsal" in several.stderr) == (2, True)
    assert recipe("results", f"ranks/{BASE}/rehearsal").returncode == 0
