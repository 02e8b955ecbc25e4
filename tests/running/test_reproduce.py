"""A study of two recipes with a tiny Llama, through the command, from data to its table."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
from cluster import Cluster
from conftest import SAMPLE, Recipe, recipe_config

from qlora_recipes.base import locks, yamlfiles
from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import compose, datafiles
from qlora_recipes.configs.compose import Composed, Request
from qlora_recipes.data import prepare, study
from qlora_recipes.data.declaration import Source, SourceFile
from qlora_recipes.running import reproduce
from qlora_recipes.runs import lookup
from qlora_recipes.runs.tasks import Outcome
from qlora_recipes.scores import evaluations

STUDY = study.find("haider2024")
TWO = ("llama-2-7b", "llama-3.2-3b")


def command(recipe: Path, profile: Path, *more: str | Path, names: Sequence[str] = TWO) -> list[str]:
    only = [word for name in names for word in ("--only", name)]
    words = [recipe, "reproduce", "haider2024", *only, "--bertscore", "none", *more, "--profile", profile, "--json"]
    return list(map(str, words))


def reproduced(place: Path, recipe: Path, profile: Path, *more: str, names: Sequence[str] = TWO) -> dict[str, Any]:
    more = "--profile", "rehearsal", *more  # of another model, only rehearsals are in the table
    done = subprocess.run(command(recipe, profile, *more, names=names), cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return orjson.loads(done.stdout)


def scores_of(place: Path) -> dict[str, Any]:
    """The scores and predictions of each recipe's one run."""
    found = {}
    for run in lookup.all_runs(place / "runs"):
        scored = evaluations.read_scores(run.path)
        if scored:
            found[run.read().recipe] = scored.scores, evaluations.read_predictions(run.path)
    return found


@dataclass
class Undisturbed:
    """The folder of a reproduction that nothing disturbed, what it printed, and what its runs scored."""

    place: Path
    printed: dict[str, Any]
    scores: dict[str, Any]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_profile: Path, stand_in: Path) -> Undisturbed:
    place = tmp_path_factory.mktemp("undisturbed")
    printed = reproduced(place, stand_in, tiny_profile)
    return Undisturbed(place, printed, scores_of(place))


def test_all_steps_are_done_and_the_table_is_there(undisturbed: Undisturbed) -> None:
    for row in undisturbed.printed["steps"]:
        assert (row["check"], row["run"], row["evaluate"], row["problem"]) == ("done", "done", "done", None)
        assert row["plan"].endswith("GiB")
    scored = {row["recipe"]: row for row in undisturbed.printed["results"] if row["bleu4"] is not None}
    assert set(scored) == {f"haider2024/{name}" for name in TWO}
    for recipe, (scores, rows) in undisturbed.scores.items():
        assert scored[recipe]["bleu4"] == scores["bleu4"]
        assert len(rows) == 12


def test_again_it_does_nothing(undisturbed: Undisturbed, tiny_profile: Path, stand_in: Path) -> None:
    place = undisturbed.place

    def files() -> dict[Path, int]:
        every = (file for file in place.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {file: file.stat().st_mtime_ns for file in every}

    before = files()
    again = reproduced(place, stand_in, tiny_profile)
    assert all(set(row.values()) == {row["recipe"], "skipped", None} for row in again["steps"])
    assert again["results"] == undisturbed.printed["results"]
    assert files() == before


@pytest.mark.long
def test_several_seeds_are_runs_of_their_own_and_one_result(
    undisturbed: Undisturbed, tiny_profile: Path, stand_in: Path
) -> None:
    place, one = undisturbed.place, ("--profile", "rehearsal", "--only", TWO[1], "--bertscore", "none")
    words = [stand_in, "reproduce", "haider2024", *one, "--seeds", "2", "--profile", tiny_profile, "--json"]
    done = subprocess.run([*map(str, words)], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = orjson.loads(done.stdout)
    recipe = f"haider2024/{TWO[1]}"
    steps = [(row["recipe"], row["run"], row["evaluate"]) for row in printed["steps"]]
    own, other = (f"{recipe}, seed {seed}" for seed in (42, 43))
    assert steps == [(own, "skipped", "skipped"), (other, "done", "done")]  # its own seed was run before
    (row,) = [row for row in printed["results"] if row["recipe"] == recipe]
    assert (row["runs"], row["bleu4_interval_method"]) == (2, "rows and 2 runs")
    (of_42,) = [row for row in undisturbed.printed["results"] if row["recipe"] == recipe]
    assert row["run"] == of_42["run"]
    new = next(run for run in lookup.all_runs(place / "runs") if run.read().overrides == ["seed=43"])
    mine = evaluations.read_scores(new.path)
    assert mine and row["bleu4"] == pytest.approx((of_42["bleu4"] + mine.scores["bleu4"]) / 2)
    shutil.rmtree(new.path)  # for the tests that count the runs there


def has_launch(runs: Path, launches: int) -> bool:
    return sum(len(run.read().launches) for run in lookup.all_runs(runs)) > launches


def evaluates(runs: Path) -> bool:
    return any(locks.is_held(run.path / ".evaluation.lock") for run in lookup.all_runs(runs))


def predicts(runs: Path) -> bool:
    parts = [run.path / "predictions.part.jsonl" for run in lookup.all_runs(runs)]
    return any(part.exists() and part.stat().st_size for part in parts)


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[bytes] | None", said: Path) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), said.read_text()
        time.sleep(0.01)


@pytest.mark.long
def test_killed_while_it_trains_or_evaluates_it_ends_with_the_same_scores(
    undisturbed: Undisturbed, tiny_profile: Path, stand_in: Path, tmp_path: Path
) -> None:
    """Quicker ones are in test_sweep, of trainings, and in test_evaluate."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    runs, said = tmp_path / "runs", tmp_path / "said"
    held = {"STAND_IN_STEP": "0.02", "STAND_IN_HOLD": "3"}  # of sixteen steps
    moments = (
        (held, partial(has_launch, runs, 0), signal.SIGKILL),
        (held, partial(has_launch, runs, 1), signal.SIGTERM),
        ({}, partial(evaluates, runs), signal.SIGTERM),
        ({}, partial(predicts, runs), signal.SIGKILL),
    )
    for hold, holds, by in moments:
        with said.open("w") as stream:
            env = os.environ | hold
            process = subprocess.Popen(
                command(stand_in, tiny_profile, "--profile", "rehearsal", names=TWO[:1]),
                cwd=tmp_path,
                env=env,
                stdout=stream,
                stderr=stream,
            )
        wait_until(holds, process, said)
        (run,) = lookup.all_runs(runs)
        time.sleep(chance.uniform(0, 0.3 if hold else 0))
        process.send_signal(by)
        process.wait(120)
        wait_until(lambda path=run.path: not any(map(locks.is_held, path.rglob("*lock"))), None, said)
        if hold:
            assert run.read().state == "interrupted"
        else:
            assert run.read().state == "finished" and evaluations.read_scores(run.path) is None
    assert len(run.read().launches) == 3
    printed = reproduced(tmp_path, stand_in, tiny_profile, names=TWO[:1])
    assert [row["problem"] for row in printed["steps"]] == [None]
    recipe = f"haider2024/{TWO[0]}"
    assert scores_of(tmp_path) == {recipe: undisturbed.scores[recipe]}


@pytest.mark.long
def test_on_slurm_it_comes_to_the_same_table(
    undisturbed: Undisturbed, tiny_profile: Path, stand_in: Path, tmp_path: Path, slurm: Cluster
) -> None:
    submitted = reproduced(tmp_path, stand_in, tiny_profile, "--on", "slurm")
    assert all(row["run"].startswith("queued (job ") for row in submitted["steps"])
    slurm.wait_until_empty()
    again = reproduced(tmp_path, stand_in, tiny_profile, "--on", "slurm")
    assert all((row["run"], row["evaluate"]) == ("skipped", "skipped") for row in again["steps"])
    assert scores_of(tmp_path) == undisturbed.scores
    here = {"run", "tokens_per_second", "train_seconds"}  # a run's name, and what its machine measured
    for one, other in zip(again["results"], undisturbed.printed["results"], strict=True):
        assert one.keys() == other.keys() >= here
        assert {key: one[key] for key in one.keys() - here} == {key: other[key] for key in other.keys() - here}
    (shown,) = (tmp_path / "runs" / "slurm").glob("*/slurm-results.log")
    for name in TWO:
        assert f"haider2024/{name}" in shown.read_text()


@pytest.mark.long
def test_a_changed_setting_is_run_anew_and_a_recipe_that_fails_does_not_stop_the_others(
    undisturbed: Undisturbed, tiny_profile: Path, stand_in: Path
) -> None:
    """A warm-up longer than the training of one recipe has that one refused; a rehearsal would cap it."""
    before = {run.path for run in lookup.all_runs(undisturbed.place / "runs")}
    words = command(stand_in, tiny_profile, "--set", "warmup_steps=20", "--set", "lora_r=4")
    done = subprocess.run(words, cwd=undisturbed.place, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    first, second = orjson.loads(done.stdout)["steps"]
    assert first["check"] == "failed" and "warmup_steps" in first["problem"] and first["run"] is None
    assert (second["run"], second["evaluate"], second["problem"]) == ("done", "done", None)
    (new,) = (run for run in lookup.all_runs(undisturbed.place / "runs") if run.path not in before)
    record = new.read()
    assert (record.recipe, record.state) == (second["recipe"], "finished")
    assert "lora_r=4" in record.overrides


def test_a_dry_run_says_what_would_be_done_and_for_how_long_and_writes_nothing(
    recipe: Recipe, tmp_path: Path, tiny: Path
) -> None:
    small = {"base_model": str(tiny), "revision_of_model": None, "special_tokens": None}
    (tmp_path / "small.yaml").write_text(yamlfiles.write_yaml(small))
    words = ("reproduce", "haider2024", "--dry-run", "--only", "llama-3.2-3b", "--profile", "small.yaml", "--json")
    words += ("--set", "num_epochs=5")
    done = recipe(*words, "--gpu", "T4", "--set", "lora_rr=1", "--set", "bf16=true")
    assert done.returncode == 0
    outline = orjson.loads(done.stdout)
    fetched, prepared = outline["data"]
    assert re.search("data/codereviewer-raw: .* 847 MB .* https://zenodo.org/", fetched)
    assert re.search("data/codereviewer: .* diff", prepared)
    (row,) = outline["recipes"]
    assert (row["training"], row["epochs"], row["test rows"]) == ("refused", 5, 5000)
    assert row["steps"] is None and any("--set lora_rr=1: error" in note for note in outline["notes"])
    (refused,) = [note for note in outline["notes"] if ": bf16: T4 (sm_75) " in note]
    assert refused.startswith("haider2024/llama-3.2-3b: ")
    row = orjson.loads(recipe(*words, "--gpu", "T4").stdout)["recipes"][0]
    assert (row["steps"], row["fits"]) == (73587, "T4: yes")
    packed = orjson.loads(recipe(*words, "--gpu", "T4", "--profile", "packed").stdout)["recipes"][0]
    assert packed["training"] == "new"  # the profile is laid for that card
    both = orjson.loads(recipe(*words, "--gpu", "T4", "--seeds", "2").stdout)
    total = f" {2 * row['hours']:.1f} "
    assert any(total in note for note in both["notes"])
    assert 0 < row["needs GiB"] < 1 and row["hours"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["small.yaml"]


def test_a_dry_run_of_several_seeds_lists_each(recipe: Recipe, tmp_path: Path) -> None:
    words = ("reproduce", "haider2024", "--dry-run", "--rehearse", "--only", "3.2-3b", "--seeds", "3")
    rows = orjson.loads(recipe(*words, "--json").stdout)["recipes"]
    assert [row["recipe"] for row in rows] == [f"haider2024/llama-3.2-3b, seed {seed}" for seed in (42, 43, 44)]
    twice = recipe(*words, "--set", "seed=7")
    assert (twice.returncode, "--seeds: " in twice.stderr) == (2, True)
    assert recipe(*words[:-1], "0").returncode == 2


def test_of_several_seeds_the_first_that_ended_speaks() -> None:
    outcomes = [Outcome("a", seed=1), Outcome("a", seed=2, run=Path("2")), Outcome("a", seed=3, run=Path("3"))]
    assert reproduce.speakers([*outcomes, Outcome("b")]) == {"a": Path("2"), "b": None}


@pytest.mark.long
def test_what_a_recipe_starts_from_is_still_to_be_fetched_and_no_reason_to_refuse_it(recipe: Recipe) -> None:
    done = recipe("reproduce", "loftq-gsm8k", "--only", "llama-2-7b-loftq", "--dry-run", "--json")
    outlined = orjson.loads(done.stdout)
    assert not any("lora_model_dir" in note for note in outlined["notes"])
    assert outlined["data"][0].startswith("data/gsm8k-raw: ")


def test_a_dry_run_of_rehearsals_counts_their_few_steps(recipe: Recipe, tmp_path: Path) -> None:
    done = recipe("reproduce", "haider2024", "--dry-run", "--rehearse")
    assert done.returncode == 0
    head, *rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("recipe", "haider"))]
    assert head == ["recipe", "training", "epochs", "steps", "test", "rows"]
    epochs = {name: recipe_config(name)["num_epochs"] for name in STUDY.published}
    assert {row[0]: row[1:] for row in rows} == {
        name: ["new", str(count), str(4 * count), "12"] for name, count in epochs.items()
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["haider2024", "--gpu", "T4"], "--gpu: "),
        (["other"], "other: "),
        (["haider2024", "--only", "lama-2"], "--only lama-2: "),
        (["haider2024", "--only", "llama-2"], "haider2024/all-linear/llama-2-7b, haid"),
        (["haider2024", "--jobs", "3"], "--jobs 3: "),
        (["haider2024", "--rehearse", "--profile", "nowhere"], "nowhere: "),
        (["haider2024", "--rehearse", "--set", "lora_rr=3"], "lora_rr: "),
    ],
)
def test_a_wrong_request_starts_nothing(recipe: Recipe, tmp_path: Path, words: list[str], says: str) -> None:
    done = recipe("reproduce", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert lookup.all_runs(tmp_path / "runs") == []


@pytest.fixture
def published_data(tmp_path: Path) -> Iterator[study.Study]:
    """The study with the shipped sample, zipped and on a server of this machine, as its data."""
    archive = tmp_path / "server" / "Comment_Generation.zip"
    archive.parent.mkdir()
    files = {}
    with zipfile.ZipFile(archive, "w") as stream:
        for file in SAMPLE.glob("msg-*.jsonl"):
            stream.write(file, f"Comment_Generation/{file.name}")
            files[file.name] = SourceFile(rows=datafiles.count_rows(file))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(archive.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    sources = {archive.name: Source(url=url, files=files)}
    yield STUDY.model_copy(update={"data": STUDY.data.model_copy(update={"sources": sources})})
    server.shutdown()
    server.server_close()


def composed(*recipes: str, **more: Any) -> list[Composed]:
    return [compose.compose(Request(f"haider2024/{recipe}", **more)) for recipe in recipes]


def test_data_is_fetched_and_prepared_in_the_forms_that_recipes_read_and_only_once(
    published_data: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reproduce.have_data(published_data, composed("llama-2-7b"))
    assert sorted(file.name for file in Path("data").iterdir()) == ["codereviewer", "codereviewer-raw"]
    both = composed("llama-2-7b", "as-released/llama-3-8b")
    reproduce.have_data(published_data, both)
    assert "<add>" in Path("data/codereviewer-tagged/train.jsonl").read_text()
    before = {file: file.stat().st_mtime_ns for file in Path("data").rglob("*.jsonl")}
    reproduce.have_data(published_data, both)
    assert before == {file: file.stat().st_mtime_ns for file in Path("data").rglob("*.jsonl")}


def test_an_adapter_that_a_recipe_starts_from_is_fetched_beside_its_rows(
    published_data: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [(_, archive)] = published_data.data.sources.items()
    (tmp_path / "server" / "adapter_config.json").write_text("{}")
    url = str(archive.url).replace("Comment_Generation.zip", "adapter_config.json")
    published_data.data.sources["init/adapter_config.json"] = Source(url=url)
    reproduce.have_data(published_data, composed("llama-2-7b"))
    assert not Path("data/codereviewer-raw/init").exists()
    start = composed("llama-2-7b", overrides=["lora_model_dir=data/codereviewer-raw/init"])
    (line, _) = reproduce._outlined_data(published_data, start)
    assert line.startswith("data/codereviewer-raw: ") and line.endswith(" https://zenodo.org/records/6900648")
    reproduce.have_data(published_data, start)
    assert Path("data/codereviewer-raw/init/adapter_config.json").read_text() == "{}"
    (there,) = reproduce._outlined_data(published_data, start)
    assert there.startswith("data/codereviewer: ")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: (data / "valid.jsonl").write_text(""), "valid.jsonl .*manifest.json"),
        (lambda data: (data / "manifest.json").unlink(), "manifest.json .*train.jsonl"),
        (lambda data: (data / "manifest.json").write_text('{"splits": null}'), "manifest.json .*train.jsonl"),
        (lambda data: change(data, "train", fields={"input": "oldf"}), r"train\.jsonl .*format"),
        (lambda data: change(data, "train", is_the_study_file=False), r"train\.jsonl .*file"),
        (lambda data: change(data, "test", left_out={}), "test-subset-1.jsonl"),
    ],
)
def test_data_that_is_not_the_studys_is_refused_and_left_as_it_is(
    published_data: study.Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], object],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    reproduce.have_data(published_data, composed("llama-2-7b"))
    folder = Path("data/codereviewer")
    spoil(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=says):
        reproduce.have_data(published_data, composed("llama-2-7b"))
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_data_that_another_process_is_preparing_is_waited_for(
    published_data: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/codereviewer")
    folder.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        with locks.held(folder / prepare.PREPARE_LOCK, ""):
            waiting = pool.submit(reproduce.have_data, published_data, composed("llama-2-7b"))
            assert not wait([waiting], timeout=0.5).done
        waiting.result()
    assert (folder / "train.jsonl").is_file()


def change(folder: Path, split: str, **values: object) -> None:
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    manifest["splits"][split] |= values
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))


def test_a_rehearsal_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reproduce.have_data(STUDY, composed("llama-2-7b", rehearse=True))
    assert not Path("data").exists()


def test_a_mirror_is_taken_where_a_model_is_gated() -> None:
    shared = Request("", mirror=True)
    mirrored = {name: reproduce.request_for(shared, name).mirror for name in STUDY.published}
    assert mirrored.pop("haider2024/code-llama-7b") is False
    assert set(mirrored.values()) == {True}


def test_without_a_gpu_nothing_is_fetched_or_started(recipe: Recipe, tmp_path: Path) -> None:
    done = recipe("reproduce", "haider2024")
    assert done.returncode == 2
    assert "no-gpu" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_judge_that_is_not_there_is_told_before_anything_starts(
    recipe: Recipe, tmp_path: Path, tiny_profile: Path
) -> None:
    _, *words = command(Path("recipe"), tiny_profile, "--set", "lora_r=8", "--bertscore", "some/nowhere")
    done = recipe(*words)
    assert done.returncode == 1
    assert "some/nowhere" in done.stderr
    assert lookup.all_runs(tmp_path / "runs") == []


def test_the_recipes_of_a_study() -> None:
    assert reproduce.chosen(STUDY, []) == list(STUDY.published)
    beside = "haider2024/all-linear/llama-2-7b"
    assert reproduce.chosen(STUDY, ["all-linear/llama-2-7b", beside]) == [beside]
    with pytest.raises(UserError, match=r"nothing: .* haider2024"):
        reproduce.chosen(STUDY, ["nothing"])
