"""Trials of sweeps, and comparisons of their runs, without training."""

import itertools
import re
import sys
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_study
from run_folders import a_run, configure, fields

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.files import sha256, write_json
from qlora_recipes.check import check
from qlora_recipes.config import compose
from qlora_recipes.config.compose import Request
from qlora_recipes.config.merging import Override
from qlora_recipes.data import studies
from qlora_recipes.evaluate import intervals
from qlora_recipes.metrics import registry
from qlora_recipes.results import sweep_results
from qlora_recipes.results.reports import report_figures
from qlora_recipes.run import rundir
from qlora_recipes.study.sweep import Grid, Sweep, Trial
from qlora_recipes.training.run_record import Summary

BASE = "haider2024/code-llama-7b"
BUILT_IN = sorted(file.stem for file in paths.SWEEPS.glob("*.yaml"))


@pytest.mark.parametrize("name", [next(iter(one.published)) for one in studies.load_all()])
@pytest.mark.parametrize("sweep", BUILT_IN)
def test_trials_of_built_in_sweeps_are_clean_over_a_recipe_of_each_study(sweep, name, place, prepared):
    (place / "data").symlink_to(prepared)
    configs = []
    for trial in Grid.from_file(paths.find_sweep_file(sweep)).trials():
        composed = compose.compose(Request(name, overrides=trial.overrides))
        findings = check.check_config(composed).findings
        wrong = [finding for finding in findings if finding.level == "error" and finding.rule != "not-prepared"]
        assert list(map(str, wrong)) == []  # only the first study's data is here
        configs.append(composed.config)
    assert all(a != b for a, b in itertools.combinations(configs, 2))


def test_a_table_has_columns_for_the_keys_that_not_all_names_show(tmp_path):
    (tmp_path / "s.yaml").write_text("_: [{lora_r: 64, lora_alpha: 128}, {lora_alpha: 16}]")
    grid = Grid.from_file(tmp_path / "s.yaml")
    sweep = Sweep(name=grid.name, recipe=BASE, rehearsal=False, keys=grid.keys(), trials=grid.trials())
    table = sweep_results.table_of(sweep, sweep_results.rows(sweep, tmp_path))
    assert [row["lora_r"] for row in table.rows] == ["64", None]
    assert "lora_alpha" not in table.rows[0]


def test_nothing_is_started_where_a_trial_is_wrong(tmp_path, recipe):
    done = recipe.fails("sweep", BASE, "--set", "lora_r=8,16", "--set", "lora_alpha=4,x", "--rehearse")
    assert done.stderr.count("[value:lora_alpha]") == 1
    assert "lora_r=8, lora_alpha=x; lora_r=16, lora_alpha=x: --set lora_alpha=x: " in done.stderr
    same = recipe("sweep", BASE, "--set", "lora_r=32,32.0", "--rehearse", "--dry-run")
    assert same.returncode == 2
    assert "lora_r=32.0" in same.stderr
    one_warns = ("--set", "evals_per_epoch=1,3", "--set", "num_epochs=1", "--rehearse", "--dry-run")
    forced = recipe("sweep", BASE, *one_warns, "--force", "tpyo")
    assert forced.returncode == 2
    assert "--force tpyo: " in forced.stderr
    assert forced.stderr.count(":evals_per_epoch]") == 1
    recipe.ok("sweep", BASE, *one_warns, "--force", "bad-row:datasets.0.path")
    assert not (tmp_path / "runs").exists()
    assert " targets" in recipe("sweep", BASE, "tragets").stderr


def test_what_does_not_fit_is_told_before_anything_starts(tmp_path, recipe, tiny_profile):
    (tmp_path / "llama-7b.yaml").write_text(paths.recipe_file(BASE).read_text())  # a part of a built-in recipe's name
    profile = ("--profile", tiny_profile, "--set", "warmup_steps=0", "--seeds", "2", "--gpu", "L4")
    words = ("sweep", "llama-7b.yaml", "--set", "micro_batch_size=1,4096", *profile)
    fits, _, not_fits, _ = recipe.json(*words, "--dry-run", code=1)["steps"]
    recipe.fails(*words)
    assert fits["problem"] is None
    assert not_fits["plan"] == "failed"
    assert "more than L4 (sm_89) has" in not_fits["problem"]
    assert not (tmp_path / "runs").exists()


def a_sweep(
    runs: Path, finished: dict[str, list[tuple[float, float, float]]], seeds: bool = False, of: str = BASE
) -> Sweep:
    """A sweep over lora_r, of which a recipe's own value is the third; for each trial the BLEU-4, eval loss and memory
    of each of its seeds' runs."""
    trials = []
    for i, (name, of_seeds) in enumerate(finished.items()):
        for seed, (bleu4, loss, memory) in enumerate(of_seeds):
            digest = f"{name}-{seed}"
            trials.append(Trial(name=name, settings={"lora_r": 8 << i}, seed=seed if seeds else None, digest=digest))
            summary = Summary(
                eval_loss_per_token=loss,
                peak_memory=memory,
                memory_kind="GPU, reserved",
                train_seconds=60,
                trainable_parameters=240 << i,
                eval_tokens={"count": 100, "sha256": "a" * 64},
            )
            changed = {} if i == 2 else {"lora_r": 8 << i}
            folder = a_run(runs, of, f"2026-{digest}", bleu4, digest=digest, summary=summary, set=changed)
            run = folder.read()
            run.overrides = [Override("lora_r", 8 << i)]
            folder.write(run)
    return Sweep(name="ranks", recipe=of, rehearsal=False, keys=["lora_r"], trials=trials)


def test_trials_compare_by_what_their_runs_measured(tmp_path):
    sweep = a_sweep(tmp_path, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)], "bad": [(9.0, 1.3, 7.5)]})
    sweep.trials.append(Trial(name="not yet", settings={"lora_r": 1}, digest="none"))
    rows = {row.trial.name: row for row in sweep_results.rows(sweep, tmp_path)}
    assert [name for name, row in rows.items() if row.pareto] == ["low", "high"]
    high = sweep_results.record(rows["high"])
    assert fields(high, "bleu4", "bleu4_low", "bleu4_high") == [5.5, 5.4, 5.6]
    assert fields(high, "peak_memory_gib", "trainable") == [8.0, 480]
    assert rows["not yet"].scores["bleu4"] == (None, None)


def score_tokens(runs: Path, letters: dict[str, str]) -> None:
    """Record the tokens behind the eval loss of runs: a letter for each digest."""
    for folder in rundir.all_runs(runs):
        run = folder.read()
        run.summary.eval_tokens = {"count": 100, "sha256": letters[str(run.digest)] * 64}
        folder.write(run)


def test_trials_with_unknown_tokens_are_not_compared(tmp_path):
    sweep = a_sweep(tmp_path, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    for folder in rundir.all_runs(tmp_path):
        run = folder.read()
        run.summary.eval_tokens = None
        folder.write(run)
    rows = sweep_results.rows(sweep, tmp_path)
    assert [(row.pareto, row.compared_loss, row.other_tokens) for row in rows] == [(False, None, "unknown")] * 2
    assert [*sweep_results.notes(rows)] == [OTHER_TOKENS]


def without_best(labels: str) -> str:
    """Note on sweeps without a best trial."""
    return (
        "no eval loss on validation rows separate from the test rows, or eval losses over different or unknown tokens: "
        f"{labels}; add `--set val_set_size=0.05`, or test_datasets with other rows"
    )


def test_trials_with_other_tokens_have_neither_front_nor_best(tmp_path, recipe):
    runs = tmp_path / "runs"
    sweep = a_sweep(runs, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)], "other": [(9.0, 0.1, 7.5)]})
    sweep.write(runs)
    score_tokens(runs, {"low-0": "a", "high-0": "a", "other-0": "a"})
    assert [row["pareto"] for row in recipe.json("results", "ranks")] == [True, False, True]
    score_tokens(runs, {"low-0": "a", "high-0": "a", "other-0": "b"})
    rows = recipe.json("results", "ranks")
    assert [row["pareto"] for row in rows] == [False] * 3
    assert [row["eval_tokens"] for row in rows] == [["a" * 64], ["a" * 64], ["b" * 64]]
    table = recipe("results", "ranks").stdout
    assert re.findall(r" (aaaaaaaa|bbbbbbbb) ", table) == ["aaaaaaaa", "aaaaaaaa", "bbbbbbbb"]
    assert recipe("results", "haider2024").stdout.splitlines()[-1] == without_best(f"ranks/{BASE}")


def test_perplexities_rank_only_over_the_same_tokens(tmp_path):
    sweep = a_sweep(tmp_path, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    for letter, best in (("a", ["high", "low"]), ("b", [])):
        score_tokens(tmp_path, {"low-0": "a", "high-0": letter})
        rows = sweep_results.rows(sweep, tmp_path)
        for row in rows:
            row.columns |= registry.columns({"perplexity": None})
        assert [row.trial.name for row in sweep_results.ranking(rows, "perplexity")] == best


OTHER_TOKENS = "Trials with other or unknown tokens are not comparable, so there is neither a front nor a best trial."
BY_SEED = "Held-out rows differ by seed; trials are compared seed by seed."


@pytest.mark.parametrize(
    ("tokens", "planned", "notes"),
    [
        pytest.param("aaaa", None, [], id="same tokens"),
        pytest.param("aabb", None, [OTHER_TOKENS], id="other tokens"),
        pytest.param("abab", None, [BY_SEED], id="other tokens by seed"),
        pytest.param("aaaa", 7.0, [], id="planned memory"),
    ],
)
def test_notes_on_a_sweep(tmp_path, tokens, planned, notes):
    of_seeds = [(5.0, 1.0, 7.0), (5.0, 3.0, 7.0)]
    sweep = a_sweep(tmp_path, {"low": of_seeds, "high": of_seeds}, seeds=True)
    sweep.trials[0].planned_gib = planned
    score_tokens(tmp_path, dict(zip(["low-0", "low-1", "high-0", "high-1"], tokens, strict=True)))
    shown = sweep_results.notes(sweep_results.rows(sweep, tmp_path))
    assert [*shown] == notes


CHANCE = "There is no interval, so the difference can be chance; `recipe sweep --seeds 3` gives one."
ON_TEST_ROWS = "The best of several scores on test rows is too high; select by eval loss."


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ([], [f"best by eval_loss: high, 1.1; next: low, 1.2. {CHANCE}"]),
        (
            ["--by", "bleu4"],
            [
                "best by bleu4: bad, 9; next: high, 5.5, which is outside the best one's 95 % interval, 8.9 to 9.1.",
                ON_TEST_ROWS,
            ],
        ),
    ],
)
def test_a_sweep_says_its_best_trial_and_how_sure_that_is(tmp_path, recipe, words, notes):
    sweep = a_sweep(tmp_path / "runs", {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)], "bad": [(9.0, 1.3, 7.5)]})
    sweep.write(tmp_path / "runs")
    done = recipe.ok("results", "ranks", *words)
    assert done.stdout.splitlines()[-len(notes) :] == notes
    assert [row["trial"] for row in recipe.json("results", "ranks") if row["best"]] == ["high"]
    wrong = recipe.fails("results", "ranks", "--by", "blue4").stderr
    assert wrong == "recipe: --by blue4: no metric of the sweep; did you mean bleu4?\n"


def test_a_variant_starts_from_a_trial(tmp_path, recipe):
    sweep = a_sweep(tmp_path / "runs", {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    sweep.write(tmp_path / "runs")
    said = recipe.ok("results", "ranks").stderr
    assert said == f"next: recipe new best --from ranks/{BASE}/best\n"
    recipe.ok(*said.split()[2:])
    assert recipe.json("diff", "best") == [{"key": "lora_r", BASE: 32, "best": 16}]
    recipe.ok("new", "narrow", "--from", "ranks/low", "--set", "lora_alpha=4")
    changes = [{"key": "lora_r", BASE: 32, "narrow": 8}, {"key": "lora_alpha", BASE: 16, "narrow": 4}]
    assert recipe.json("diff", "narrow") == changes
    assert recipe.fails("new", "x", "--from", "ranks/lo w").stderr == (
        f"recipe: lo w: no trial of ranks/{BASE} of that name; did you mean low?\n"
    )


def test_trials_are_compared_seed_by_seed_if_the_seed_holds_out_the_rows(tmp_path):
    finished = {"low": [(5.0, 1.0, 7.0), (5.0, 3.0, 7.0)], "high": [(5.0, 0.9, 8.0)], "worse": [(5.0, 1.1, 8.5)]}
    sweep = a_sweep(tmp_path, finished, seeds=True)  # only one trial has its second run
    score_tokens(tmp_path, {"low-0": "a", "low-1": "b", "high-0": "a", "worse-0": "a"})
    rows = sweep_results.rows(sweep, tmp_path)
    assert [row.scores["eval_loss"].value for row in rows] == [2.0, 0.9, 1.1]  # a mean over the repeats
    assert [row.compared_loss for row in rows] == [1.0, 0.9, 1.1]
    assert [row.pareto for row in rows] == [True, True, False]


def published_beside(runs: Path, name: str, grid: Grid, profiles: list[str]) -> list[float | None]:
    """Published losses beside the trials of a sweep, which all have a run."""
    trials = grid.trials()
    for i, trial in enumerate(trials):
        trial.digest = f"{len(list(runs.rglob('run.json')))}"
        folder = a_run(runs, name, f"2026-{trial.digest}-{i}", 5.0, digest=trial.digest)
        run = folder.read()
        run.differences = compose.compose(Request(name, profiles, trial.overrides)).differences
        folder.write(run)
    sweep = Sweep(name=grid.name, recipe=name, rehearsal=False, keys=grid.keys(), trials=trials)
    return [row.published.get("nll") for row in sweep_results.rows(sweep, runs)]


@pytest.mark.parametrize(
    ("sets", "profiles", "published"),
    [
        (["seed=1,2"], [], [0.7763, 0.7763]),
        (["lora_alpha=16,32"], [], [None, 0.7763]),
        (["base_model=Qwen/Qwen2.5-0.5B"], [], [None]),
        (["datasets.0.type=alpaca,input_output"], [], [None, 0.7763]),
        ([], ["packed"], [None]),
        ([], ["mlflow"], [0.7763]),
        ([], ["mirror"], [0.7763]),
    ],
)
def test_published_scores_stand_only_beside_their_settings(tmp_path, sets, profiles, published):
    grid = Grid.from_overrides(["learning_rate=0.001", "lora_r=128", *sets])
    assert published_beside(tmp_path, "tinker-tulu3/llama-3.2-1b-lora", grid, profiles) == published


@pytest.mark.parametrize("name", ["llama-3.2-1b-lora", "llama-3.1-8b-qlora"])
def test_trials_stand_beside_the_published_scores_of_their_settings(tmp_path, name):
    grid = Grid.from_file(paths.find_sweep_file("rate-and-rank"))
    study = studies.find("tinker-tulu3")
    published = published_beside(tmp_path, f"tinker-tulu3/{name}", grid, [])
    lowest = study.published[study.origin(f"tinker-tulu3/{name}")].scores["nll"]
    assert (len(published), min(published)) == (16, float(lowest.value))


def test_a_studys_recipes_compare_by_their_best_trials(tmp_path, recipe):
    """Best by eval loss, whatever their scores."""
    runs = tmp_path / "runs"
    a_sweep(runs, {"a": [(9.0, 1.3, 7.0)], "b": [(5.0, 1.1, 7.0)], "c": [(5.5, 1.2, 8.0)]}).write(runs)
    plain, unvalidated, unfinished = "haider2024/llama-2-7b", "haider2024/llama-3-8b", "haider2024/llama-3.1-8b"
    for name in (plain, unvalidated, unfinished):
        a_sweep(runs, {"a": [(6.0, 1.0, 7.0)], "b": [(6.5, 1.4, 7.0)]}, of=name).write(runs)
    a_run(runs, plain, "2025-plain", 4.9)
    for config in (runs / unvalidated).rglob("config.yaml"):
        config.write_text(yamlfiles.write_yaml(yamlfiles.read_yaml(config) | {"test_datasets": None}))
    (runs / unfinished / "2026-a-0" / "run.json").unlink()
    rows = {row["recipe"]: row for row in recipe.json("results", "haider2024")}
    assert [rows[name]["bleu4"] for name in (BASE, plain)] == [5.5, 4.9]  # of the runs with the recipe's own values
    tuned = {name: rows[name]["tuned"][0] for name in (BASE, plain, unvalidated, unfinished)}
    assert fields(tuned[BASE]["best"], "trial", "bleu4", "eval_loss") == ["b", 5.0, 1.1]
    assert [tuned[name]["best"]["trial"] for name in (plain, unfinished)] == ["a", "b"]
    assert tuned[unvalidated]["best"] is None
    assert fields(tuned[unfinished], "finished", "trials") == [1, 2]
    table = recipe("results", "haider2024").stdout
    shown = re.findall(r"^(haider\S+) +(\d of \d) +([ab]) +finished\S* +(\S+)", table, re.MULTILINE)
    assert shown == [(plain, "2 of 2", "a", "1.00"), (BASE, "3 of 3", "b", "1.10"), (unfinished, "1 of 2", "b", "1.40")]
    assert table.splitlines()[-1] == without_best(f"ranks/{unvalidated}")


def test_a_study_is_swept_and_again_nothing_is_done(recipe, tmp_path, tiny_profile, fake_axolotl, monkeypatch):
    published = {name: {"scores": {"perplexity": 3}} for name in (small_study.PLAIN, small_study.WIDE)}
    metrics = {"metrics": {"perplexity": {}}, "shown": [], "tolerances": {}, "decodings": {}}  # nothing is generated
    small_study.write(tmp_path, published=published, **metrics)
    monkeypatch.setattr(sys, "executable", str(fake_axolotl.with_name("python")))  # of the commands that it starts
    profiles = ("--profile", "rehearsal", "--profile", tiny_profile)
    words = ("sweep", "sums2030", "--set", "learning_rate=0.0001,0.0002", *profiles)
    for more, started in ((("--set", "lora_alpha=4,x"), 2), (("--dry-run",), 0)):
        assert recipe(*words, *more).returncode == started
        assert not (tmp_path / "runs").exists()
    _, swept, dry = recipe.json(*words), recipe.json(*words), recipe.json(*words, "--dry-run")
    folders = rundir.all_runs(tmp_path / "runs")
    assert sorted(folder.read().recipe for folder in folders) == sorted([*published, *published])
    assert {step["run"] for step in swept["steps"] + dry["steps"]} == {"skipped"}
    for tuned, trials in zip(swept["tuned"], batched(swept["results"], 2), strict=True):
        assert tuned["best"] == min(trials, key=lambda row: row["eval_loss"])
        assert tuned["finished"] == 2
    shown = recipe.json("results", "sums2030", "--rehearse")
    assert [row["tuned"] for row in shown] == [[tuned] for tuned in swept["tuned"]]
    single = recipe.json("sweep", "sums2030/plain", *words[2:])  # whose trials are those of the study
    assert [row["runs"] for row in single["results"]] == [row["runs"] for row in swept["results"][:2]]


def test_test_rows_choose_no_trial(tmp_path):
    sweep = a_sweep(tmp_path, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    test = tmp_path / "test.jsonl"
    test.write_text("{}\n")
    write_json(tmp_path / "manifest.json", {"splits": {"test": {"sha256": sha256(test)}}})
    for config in tmp_path.rglob("config.yaml"):
        cfg = yamlfiles.read_yaml(config)
        cfg["test_datasets"][0]["path"] = str(test)
        config.write_text(yamlfiles.write_yaml(cfg))
    rows = sweep_results.rows(sweep, tmp_path)
    figure = report_figures.sweep_figure(rows)
    assert [row.pareto for row in rows] == [False, False]
    assert [trace["name"] for trace in figure.traces] == ["not on the front"]
    assert figure.note == ""  # it explains the front


def test_scores_over_seeds_have_an_interval_of_rows_and_runs(tmp_path):
    values = [5.0, 5.3, 5.1]
    sweep = a_sweep(tmp_path, {"low": [(bleu4, 1.0, 7.0) for bleu4 in values]}, seeds=True)
    (row,) = sweep_results.rows(sweep, tmp_path)
    assert row.seeds == [0, 1, 2]
    mean, within = row.scores["bleu4"]
    assert mean == pytest.approx(np.mean(values))
    half = intervals.half_width(np.var(values, ddof=1) / 3, (0.1 / intervals.NORMAL) ** 2, 2, intervals.MANY)
    assert half > 0.1
    assert (within.low, within.high) == pytest.approx((mean - half, mean + half))
    assert within.method == "rows and 3 runs of one seed (Banerjee)"
    assert row.scores["eval_loss"] == (1.0, None)  # its spread over rows is unknown


def test_results_of_a_sweep_in_every_form(tmp_path, recipe):
    runs = tmp_path / "runs"
    sweep = a_sweep(runs, {"low": [(5.0, 1.2, 7.0)], "high": [(5.5, 1.1, 8.0)]})
    sweep.write(runs)
    assert re.findall(r"(?m)^(low|high) .* \*", recipe("results", "ranks").stdout) == ["low", "high"]
    assert [row["settings"] for row in recipe.json("results", "ranks")] == [{"lora_r": 8}, {"lora_r": 16}]
    sweep.model_copy(update={"rehearsal": True}).write(runs)
    assert recipe.ok("results", f"ranks/{BASE}/rehearsal").stdout.splitlines()[0] == (
        f"ranks: {BASE}. Rehearsals (small model, few rows; not comparable with any published score)"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("rnaks", "no run, sweep, study or recipe of that name; did you mean ranks?", id="unknown"),
        pytest.param(
            "ranks",
            f"ambiguous: ranks/{BASE} or ranks/{BASE}/rehearsal; give the full name, or a run folder",
            id="ambiguous",
        ),
    ],
)
def test_a_name_that_is_not_of_one_sweep(tmp_path, recipe, name, message):
    sweep = a_sweep(tmp_path / "runs", {"low": [(5.0, 1.2, 7.0)]})
    sweep.write(tmp_path / "runs")
    sweep.model_copy(update={"rehearsal": True}).write(tmp_path / "runs")
    assert recipe.fails("results", name).stderr == f"recipe: {name}: {message}\n"


def a_sweep_of_pairs(runs: Path, key: str, trials: dict[Any, tuple[float, float]]) -> None:
    """A sweep over a setting of a DPO recipe; for each value the reward accuracy and the eval loss of its run."""
    recipe = "start/dpo-qlora"
    sweep = Sweep(name="pairs", recipe=recipe, rehearsal=False, keys=[key], trials=[])
    for value, (accuracy, loss) in trials.items():
        pairs = {"count": 100, "sha256": "a" * 64}
        rewards = {"eval_reward_accuracy": accuracy, "eval_reward_margin": 1.0, "eval_pairs": pairs}
        summary = Summary(eval_loss=loss, peak_memory=7.0, memory_kind="GPU, reserved", **rewards)
        folder = a_run(runs, recipe, f"2026-{value}", 5.0, digest=str(value), summary=summary, set={key: value})
        for file in folder.path.rglob("scores*.json"):
            file.unlink()
        sweep.trials.append(Trial(name=f"{key}={value}", settings={key: value, "rl": "dpo"}, digest=str(value)))
    sweep.write(runs)


def test_losses_of_simpo_depend_on_the_batches_of_the_evaluation(tmp_path, recipe):
    a_sweep_of_pairs(tmp_path / "runs", "micro_batch_size", {1: (0.7, 0.5), 2: (0.75, 0.6)})
    for rl, notes in (("dpo", 0), ("simpo", 1)):
        for folder in rundir.all_runs(tmp_path / "runs"):
            configure(folder, rl=rl)
        note = OTHER_LOSSES.replace("rl_beta", "micro_batch_size")
        assert recipe.ok("results", "pairs").stdout.splitlines().count(note) == notes


OTHER_LOSSES = "rl_beta defines the loss: neither loss nor margin ranks trials; `--by reward_accuracy` does."
BY_REWARDS = (
    # Wilson's interval of 75 of 100
    "best by reward_accuracy: {0}=16, 75; next: {0}=8, 70, which is inside the best one's 95 % interval, "
    "65.696 to 82.455."
)


@pytest.mark.parametrize(
    ("key", "words", "best", "notes"),
    [
        ("lora_r", [], "lora_r=8", [f"best by eval_loss: lora_r=8, 0.5; next: lora_r=16, 0.6. {CHANCE}"]),
        ("rl_beta", [], None, [OTHER_LOSSES]),
        ("trl.beta", [], None, [OTHER_LOSSES.replace("rl_beta", "trl.beta")]),
        ("rl_beta", ["--by", "reward_accuracy"], "rl_beta=16", [OTHER_LOSSES, BY_REWARDS.format("rl_beta")]),
        ("lora_r", ["--by", "reward_accuracy"], "lora_r=16", [BY_REWARDS.format("lora_r")]),
    ],
)
def test_trials_of_pairs_rank_by_loss_or_by_rewards(tmp_path, recipe, key, words, best, notes):
    a_sweep_of_pairs(tmp_path / "runs", key, {8: (0.7, 0.5), 16: (0.75, 0.6)})
    shown = recipe.ok("results", "pairs", *words).stdout.splitlines()
    assert shown[shown.index("") + 1 :] == notes
    rows = recipe.json("results", "pairs", *words)
    assert [row["trial"] for row in rows if row["best"]] == [best] * (best is not None)
    assert [row["eval_loss"] for row in rows] == [0.5, 0.6]
