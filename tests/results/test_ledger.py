"""Records of the ledger, of a study of the tests': made of runs, read back, refused, and what tables make of them."""

import platform
import re
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import pytest
import recorded_runs
import small_study
from conftest import Recipe
from recorded_runs import HOST, RTX_4090, a_run, recorded

from qlora_recipes.base import paths
from qlora_recipes.base.errors import UserError
from qlora_recipes.configs.datafiles import DataFile
from qlora_recipes.data import ledger, study
from qlora_recipes.runs.rundir import Job, RunDir

PLAIN, WIDE = small_study.PLAIN, small_study.WIDE
RESULTS = Path("recipes", "sums2030", "results")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recorded_runs.study_here(monkeypatch, tmp_path)
    return tmp_path


def exported(recipe: Recipe, *words: str) -> tuple[Path, dict[str, Any]]:
    done = recipe("results", "--export", *words)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip())
    return file, orjson.loads(file.read_bytes())


def refused(recipe: Recipe, run: str = "latest") -> str:
    before = {*Path().glob("*.json")}
    done = recipe("results", "--export", run)
    assert (done.returncode, done.stdout, {*Path().glob("*.json")}) == (2, "", before)
    return done.stderr


def test_a_record_is_exported_added_and_tabulated(recipe: Recipe) -> None:
    a_run("one", 67.0)
    file, content = exported(recipe, "latest")
    assert re.fullmatch(r"plain-rtx-4090-[0-9a-f]{7}\.json", str(file))
    assert exported(recipe, "one")[0] == file  # of the same run: no second record
    assert (content["recipe"], content["changed"], content["rehearsal"], content["seed"]) == (PLAIN, {}, False, 42)
    assert content["machine"] | {"gpus": 1, "gpu": RTX_4090["name"], "driver": "580.95.05"} == content["machine"]
    assert content["training"]["curve"] == [[1, 3.0], [2, 2.0], [3, 1.6], [4, 1.2]]
    assert content["evaluation"]["scores"]["accuracy"]["interval"] == [66.5, 67.5]
    assert content["evaluation"]["scores"].keys() == {"accuracy", "perplexity", "chrf"}
    made_by = {"engine": "transformers", "batch_size": None, "batch_tokens": 8192}
    assert content["evaluation"] | made_by == content["evaluation"]
    assert content["data"] == [{"name": "train.jsonl", "sha256": "e" * 64, "rows": 109}]

    assert "no record in any ledger" in recipe("results", "--ledger").stderr
    RESULTS.mkdir()
    file.rename(RESULTS / file.name)
    a_run("two", 69.0, training={"tokens_per_second": 6000.0, "train_seconds": 7200.0, "peak_memory": 20.0})
    recorded(RunDir(Path("runs", PLAIN, "two")))
    printed = recipe("results", "--ledger", "--md").stdout
    assert "| recipe | hardware | records | accuracy, % | range | published | perplexity |" in printed
    assert (
        f"| {PLAIN} | RTX 4090 | 2 | 68.00 | 67.00 to 69.00 | 67.40 ± 1.00 | 3.00 | 20.00 | – | 6500 | 1.08 |"
        in printed
    )
    rows = orjson.loads(recipe("results", "--ledger", "--json", "--study", "sums2030").stdout)
    assert [(row["is_the_recipes"], row["evaluation"]["scores"]["accuracy"]["value"]) for row in rows] == [
        (True, 67.0), (True, 69.0),
    ]  # fmt: skip
    assert recipe("results", "--ledger", "--csv").stdout.splitlines()[1].startswith(f"sums2030,{PLAIN},RTX 4090,2,68.0")
    assert recipe("results", "--ledger", "--study", "haider2024", "--json").stdout.strip() == "[]"


def test_records_of_another_axolotl_are_counted_under_their_table(recipe: Recipe) -> None:
    for name, number in {"one": "0.20.1", "two": version("axolotl")}.items():
        recorded(a_run(name, 67.0), {"packages.axolotl": number})
    done = recipe("results", "--ledger", "--study", "sums2030")
    assert f"1 of the 2 records: made with Axolotl 0.20.1, and {version('axolotl')} is installed\n" in done.stderr


def test_a_rehearsal_is_exported_marked_and_shown_only_among_rehearsals(recipe: Recipe) -> None:
    training = {"memory_kind": "resident", "peak_memory": 2.3}
    a_run("real", 67.0)
    a_run("tried", 1.0, rehearsal=True, training=training, set={"lora_r": 4, "base_model": "/srv/stand-in"})
    file, content = exported(recipe, "tried")
    assert re.fullmatch(r"plain-cpu-rehearsal-[0-9a-f]{7}\.json", str(file))
    assert (content["rehearsal"], content["machine"]["gpus"], content["changed"]["base_model"]) == (True, 0, "…")
    RESULTS.mkdir()
    file.rename(RESULTS / file.name)
    assert recipe("results", "--ledger").stdout == ""
    recorded(RunDir(Path("runs", PLAIN, "real")))
    real, tried = recipe("results", "--ledger").stdout, recipe("results", "--ledger", "--rehearse").stdout
    assert "67.00" in real and "Xeon" not in real
    assert "1.00" in tried and "RTX" not in tried and tried.startswith("Records of rehearsals")
    assert "published" not in tried
    (listed,) = [row for row in orjson.loads(recipe("list", "--json").stdout) if row["recipe"] == PLAIN]
    assert (listed["records"], listed["measured_accuracy"]) == (1, 67.0)


def test_the_projects_own_ledger_takes_no_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"memory_kind": "resident", "peak_memory": 2.3}
    recorded(a_run("tried", 1.0, rehearsal=True, training=training))
    assert ledger.records(small_study.read(), rehearsal=True, strict=True)
    monkeypatch.setattr(paths, "RECIPES", tmp_path / "recipes")
    with pytest.raises(UserError, match="rehearsal: the ledger holds none"):
        ledger.records(small_study.read(), strict=True)


def test_nothing_private_gets_out(recipe: Recipe, place: Path) -> None:
    planted = {
        "hub_token": "hf_abcdefghijklmnopqrstuvwx12",
        "hub_model_id": "mmuster/secret",
        "wandb_entity": "mmuster",
        "chat_template_jinja": "/home/mmuster/template.jinja",
        "lora_target_modules": ["q_proj", "/home/mmuster/x"],
        "special_tokens": {"pad_token": "ghp_16C7e42F292c6912E7"},
        "lora_r": 64,
        "optimizer": "adamw_torch",
        "datasets": [{"path": "/home/mmuster/data/train.jsonl", "type": "alpaca"}],
    }
    folder = a_run(
        "one", 67.0, set=planted, settings={"adapter": "/home/mmuster/a", "data": "/home/mmuster/test.jsonl"}
    )
    run = folder.read()
    run.profiles = ["/home/mmuster/mine.yaml", "zero2"]
    run.cwd, run.recipe_file = "/home/mmuster/work", "/home/mmuster/r.yaml"
    run.data = [DataFile(path="/home/mmuster/data/train.jsonl", sha256="a" * 64, bytes=9)]
    run.differences = [d for d in run.differences if not d.key.startswith("datasets")]  # which a manifest would know
    run.launches[0].host, run.launches[0].command = HOST, ["/home/mmuster/.venv/bin/axolotl"]
    folder.write(run)
    folder.add_job(Job(place="slurm", id="1", step="run", user="mmuster", script="/home/mmuster/s.sh"))
    file, content = exported(recipe, "one")
    text = file.read_text()
    for word in ("mmuster", "home", "hf_", "ghp_", "secret", HOST, "hub_", "wandb", str(place)):
        assert word not in text, word
    assert content["profiles"] == ["zero2"]
    assert (
        content["changed"] | {"lora_r": 64, "optimizer": "adamw_torch", "chat_template_jinja": "…"}
        == content["changed"]
    )
    assert (content["changed"]["lora_target_modules"], content["changed"]["special_tokens.pad_token"]) == ("…", "…")
    assert "differs in" in recipe("results", "--export", "one").stderr


@pytest.mark.parametrize("cpu", [HOST, "node7.example.org", "/proc/cpuinfo", "me@box", "x" * 101, ""])
def test_what_would_give_something_away_is_not_exported(recipe: Recipe, cpu: str) -> None:
    folder = a_run("one")
    run = folder.read()
    run.provenance["cpu"] = cpu
    folder.write(run)
    assert "machine.cpu" in refused(recipe)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"machine.cpu": "box of /home/me"}, "machine.cpu: a path"),
        ({"machine.cpu": "gpu7.example.com"}, "machine.cpu: the name or address of a host"),
        ({"machine.gpu": "me@box"}, "machine.gpu: an address"),
        ({"machine.driver": "10.0.0.7"}, "machine.driver: the name or address of a host"),
        ({"machine.host": "box"}, "machine.host: no such key"),
        ({"user": "me"}, "user: no such key"),
        ({"changed": {"hub_token": "hf_abcdefghijklmnopqrstuvwx12"}}, "changed.hub_token: an access token"),
        ({"changed": {"hf_abcdefghijklmnopqrstuvwx12": 1}}, "changed, a key: an access token"),
        ({"changed": {"model": "/home/me"}}, "changed.model"),
        ({"packages.torch": "2+0123456789abcdef0123456789abcdef01234567"}, "packages.torch: a long random text"),
        ({"evaluation.scores.accuracy.metric.markers": ["~/x"]}, "markers.0: a path"),
        ({"data.0.name": "mmuster.jsonl"}, "data.0.name: mmuster.jsonl is no file of the study's data"),
        ({"revision": "main"}, "revision"),
        ({"config_sha256": "hf_abc"}, "config_sha256"),
        ({"recipe": "sums2030/plane"}, "did you mean sums2030/plain"),
        ({"recipe": "haider2024/llama-2-7b"}, "is no recipe of sums2030"),
        ({"study": "haider2024"}, "is no recipe of sums2030"),
        ({"version": 2}, "version"),
        ({"recipe": "\x1b[31mred"}, "recipe: expected text"),
        ({"evaluation.scores.accuracy.metric": {"metric": "\x1b[31m"}}, "no metric is called  [31m"),
        ({"made": "yesterday"}, "made"),
        ({"training.seconds": -1}, "training.seconds"),
        ({"training.seconds": "600"}, "training.seconds"),
        ({"training.peak_gib": 30.0}, "training.peak_gib: more than the GPU has"),
        ({"training.peak_gib": -2.0}, "training.peak_gib"),
        ({"training.memory_kind": None}, "need each other"),
        ({"training.curve": [[2, 1.0], [1, 1.0]]}, "training.curve"),
        ({"training.curve": [[1, 1.0], [5, 1.0]]}, "training.curve"),
        ({"training.curve": [[1, -1.0]]}, "training.curve.0.1"),
        ({"training.trainable_parameters": 4_000_000_000}, "more parameters are trained than there are"),
        ({"machine.gpus": 0}, "machine: gpus, gpu and gpu_memory_gib do not agree"),
        ({"rehearsal": True}, "a rehearsal uses no GPU"),
        ({"evaluation.scores.accuracy.value": 68.0}, "accuracy: the score and its interval are not in order"),
        ({"evaluation.scores.accuracy.interval": [68.0, 66.0]}, "the score and its interval are not in order"),
        ({"evaluation.scores.perplexity.value": 0.5}, "perplexity: the score and its interval are not in order"),
        ({"evaluation.scores.perplexity.interval": [3.0, 3.1]}, "perplexity: it has no interval over rows"),
        ({"evaluation.scores.accuracy.metric": {"metric": "number"}}, "accuracy: is no metric of the study's"),
        ({"evaluation.scores.accuracy.metric": {"metric": "bleu9"}}, "accuracy: metric: no metric is called bleu9"),
        ({"evaluation.scores.bleu4": {"value": 1.0, "metric": {}}}, "scores.bleu4: is no metric of the study's"),
        ({"evaluation.scores": {}}, "accuracy is missing"),
        ({"evaluation.test_set": "test"}, "published scores are on test-subset-1, not test"),
        ({"evaluation.decoding.top_k": 1}, "evaluation.decoding: is not the study's"),
        ({"evaluation.rows": 0}, "evaluation.rows"),
    ],
)  # fmt: skip
def test_a_record_that_was_edited_is_refused_and_left_out(recipe: Recipe, change: dict[str, Any], says: str) -> None:
    recorded(a_run("good", 67.0))
    recorded(a_run("edited", 67.0), change)
    done = recipe("results", "--ledger", "--study", "sums2030", "--json")
    assert done.returncode == 0
    assert [row["file"] for row in orjson.loads(done.stdout)] == ["good.json"]
    assert says in done.stderr and "results/edited.json" in done.stderr and "good.json" not in done.stderr
    with pytest.raises(UserError, match=re.escape(says)):
        ledger.records(small_study.read(), strict=True)


def test_what_is_no_record_is_refused(recipe: Recipe) -> None:
    file = recorded(a_run("one"))
    text = file.read_text()
    for broken, says in (
        ("", "not a record"),
        (text[:99], "not a record"),
        ("[]", "keys with values"),
        ("[" * 100_000, "not a record"),
        ('{"cpu": "/home/me", ' + text[1:].replace('"cpu"', '"cpu":"x","cpu"'), "the key cpu occurs twice"),
        ("\xff", "not a record"),
        (text.replace("67.0", "NaN"), "finite"),
    ):
        file.write_text(broken, encoding="latin-1")
        done = recipe("results", "--ledger")
        assert (done.returncode, done.stdout) == (0, "") and says in done.stderr, broken[:30]


def test_one_run_counts_once(recipe: Recipe) -> None:
    first = recorded(a_run("one"))
    (RESULTS / "other.json").write_bytes(first.read_bytes())
    done = recipe("results", "--ledger", "--json")
    assert len(orjson.loads(done.stdout)) == 1
    assert "other.json: is of the same run as one.json; delete one" in done.stderr


def test_a_variant_stands_behind_no_number_of_the_recipes(recipe: Recipe) -> None:
    recorded(a_run("plain", 67.0))
    recorded(a_run("other-seed", 68.0, set={"seed": 43}))
    recorded(a_run("tracked", 69.0, set={"use_tensorboard": True}))
    recorded(a_run("changed", 99.0, set={"lora_r": 64}))
    recorded(a_run("other-rows", 97.0, set={"test_datasets": [{"path": "mine.jsonl", "type": "alpaca"}]}))
    recorded(a_run("variant", 98.0, set={"lora_alpha": 64}, variant_of=PLAIN, named="mine"))
    printed = recipe("results", "--ledger", "--md").stdout
    of_recipe, apart = printed.split("**Records of variants")
    assert f"| {PLAIN} | RTX 4090 | 3 | 68.00 |" in of_recipe and "9.00 |" not in of_recipe.replace("69.00", "")
    assert "| recipe | hardware | accuracy, % | perplexity |" in apart
    assert "99.00" in apart and "97.00" in apart and "98.00" in apart
    assert "lora_r: 64" in apart and "lora_alpha: 64" in apart and "mine" not in apart
    (listed,) = [row for row in orjson.loads(recipe("list", "--json").stdout) if row["recipe"] == PLAIN]
    assert (listed["records"], listed["measured_accuracy"]) == (3, 68.0)
    assert "measured (records)" in (table := recipe("list").stdout) and "68.00 (3)" in table
    for file in RESULTS.iterdir():
        file.unlink()
    assert "measured" not in recipe("list").stdout


def test_a_record_of_the_recipe_as_it_was_stands_behind_no_number(recipe: Recipe) -> None:
    recorded(a_run("one", 67.0))
    file = Path("recipes", f"{PLAIN}.yaml")
    file.write_text(f"# another comment\n{file.read_text()}")
    assert "Measured by" in recipe("results", "--ledger").stdout
    file.write_text(file.read_text().replace("lora_r: 32", "lora_r: 16"))
    printed = recipe("results", "--ledger").stdout
    assert "Measured by" not in printed and "the recipe, since" in printed


def test_machines_have_rows_of_their_own_in_the_studys_order(recipe: Recipe) -> None:
    two = {"gradient_accumulation_steps": 2}
    recorded(a_run("wide", 70.0, recipe=WIDE))
    recorded(a_run("two-gpus", 67.2, gpus=[RTX_4090] * 2, gpus_used=2, set=two))
    recorded(a_run("t4", 66.0, gpus=[RTX_4090 | {"name": "Tesla T4"}]))
    recorded(a_run("one", 67.0))
    rows = ledger.summary(small_study.read(), [record for _, record in ledger.records(small_study.read())])
    of_plain = {"RTX 4090", "2 x RTX 4090", "Tesla T4"}
    assert [row["recipe"] for row in rows] == [PLAIN, PLAIN, PLAIN, WIDE]
    assert {row["hardware"] for row in rows[:3]} == of_plain
    assert {(row["accuracy_low"], row["accuracy_high"]) for row in rows} >= {(66.5, 67.5), (65.5, 66.5)}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"state": "failed"}, "the run is failed"),
        ({"settings": {"limit": 100}}, "it is not evaluated on all rows"),
        ({"settings": {"engine": "elsewhere"}}, "its predictions were made elsewhere"),
        ({"settings": {"test_set": None}}, "it is not evaluated on all rows"),
        ({"decoding": small_study.GREEDY}, "it is not evaluated on all rows"),
        ({"settings": {"adapter_sha256": None}}, "which adapter"),
        ({"set": {"base_model": "me/other"}}, "another base model or other data"),
        ({"set": {"datasets.0.path": "mine.jsonl"}}, "another base model or other data"),
        ({"gpus": [RTX_4090, RTX_4090 | {"name": "Tesla T4"}]}, "does not say which"),
        ({"gpus": []}, "there was no GPU"),
        ({"axolotl_arguments": ["--learning-rate=1"]}, "arguments beside its config"),
        ({"training": {"peak_memory": 30.0}}, "more than the GPU has"),
        ({"named": "mine"}, "is no recipe of a study"),
    ],
)
def test_a_run_that_no_ledger_takes_is_not_exported(recipe: Recipe, more: dict[str, Any], says: str) -> None:
    a_run("one", **more)
    assert says in refused(recipe)


def test_a_run_without_an_evaluation_is_not_exported(recipe: Recipe) -> None:
    folder = a_run("one")
    (folder.path / "scores.json").unlink()
    assert "it is not evaluated; `recipe evaluate" in refused(recipe)
    assert "no run of that name" in refused(recipe, "other")
    (old := a_run("two").path / "scores.json").write_text(re.sub('"version":[0-9]+', '"version":0', old.read_text()))
    assert "scored by an earlier version" in refused(recipe, "two")


def test_changed_files_of_the_project_are_recorded(recipe: Recipe) -> None:
    folder = a_run("one")
    run = folder.read()
    run.provenance["git"]["dirty"] = True
    folder.write(run)
    assert "had been changed when it ran" in recipe("results", "--export", "one").stderr
    assert exported(recipe, "one")[1]["revision"] == "a" * 40 + "+"


def test_a_long_curve_is_thinned_to_means_over_the_same_steps(recipe: Recipe) -> None:
    folder = a_run("one", training={"step": 1003})
    lines = [{"step": step, "loss": float(step), "step_seconds": 1.0} for step in range(1, 1004)]
    folder.metrics.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    curve = exported(recipe, "one")[1]["training"]["curve"]
    assert len(curve) == 50 and curve[-1][0] == 1003
    assert curve[0] == [20, 10.5]


@pytest.mark.long
def test_real_rehearsals_go_from_training_to_a_row_of_two_records(recipe: Recipe, place: Path, tiny: Path) -> None:
    RESULTS.mkdir()
    of_tiny = ("--set", f"base_model={tiny}", "--set", "bf16=false", "--set", "num_epochs=1")
    for seed in (42, 43):
        trained = recipe("run", PLAIN, "--rehearse", *of_tiny, "--set", f"seed={seed}", "--set", "wandb_entity=mmuster")
        assert trained.returncode == 0, trained.stderr
        evaluated = recipe("evaluate", "latest", "--max-new-tokens", "8")
        assert evaluated.returncode == 0, evaluated.stderr
        file, content = exported(recipe, "latest")
        assert (content["seed"], content["rehearsal"], content["evaluation"]["rows"]) == (seed, True, 12)
        assert content["machine"]["memory_gib"] > 0 and content["training"]["peak_gib"] > 0
        text = file.read_text()
        for private in (str(place), str(tiny), tiny.name, "mmuster", platform.node(), "/home", "/tmp"):
            assert private not in text, private
        file.rename(RESULTS / file.name)
    (row,) = ledger.summary(small_study.read(), [record for _, record in ledger.records(small_study.read(), True)])
    assert (row["recipe"], row["records"], row["peak_gib"] > 0, row["tokens_per_second"] > 0) == (PLAIN, 2, True, True)
    assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]
    assert recipe("results", "--ledger").stdout == ""
    assert f"| {PLAIN} |" in recipe("results", "--ledger", "--rehearse", "--md").stdout


def test_every_shipped_record_is_right_and_of_a_recipe_that_there_is_or_was() -> None:
    for folder in sorted(file.parent for file in paths.RECIPES.glob("*/study.yaml")):
        for file, record in ledger.records(study.load(folder), strict=True):
            recipe = paths.RECIPES / f"{record.recipe}.yaml"
            is_todays = record.recipe_sha256 == sha256(recipe.read_bytes()).hexdigest()
            assert is_todays or record.recipe_sha256 in former(recipe), file


def former(recipe: Path) -> Iterator[str]:
    """The hashes of a recipe's file in all commits of the checkout."""

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", "-C", recipe.parent, *words], capture_output=True)
        if done.returncode:
            pytest.skip("without its commits, a checkout does not know how recipes were")
        return done.stdout

    if git("rev-parse", "--is-shallow-repository").strip() == b"true":
        pytest.skip("a shallow clone does not know how recipes were")
    for commit in git("log", "--format=%H", "--", recipe.name).decode().split():
        yield sha256(git("show", f"{commit}:./{recipe.name}")).hexdigest()


def test_how_a_recipe_was_is_known_from_the_commits() -> None:
    recipe = paths.RECIPES / "haider2024" / "llama-2-7b.yaml"
    committed = subprocess.run(["git", "-C", recipe.parent, "show", f"HEAD:./{recipe.name}"], capture_output=True)
    assert sha256(committed.stdout).hexdigest() in former(recipe)
    assert "f" * 64 not in former(recipe)
