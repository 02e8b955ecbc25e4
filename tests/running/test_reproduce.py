"""A study of two recipes with a tiny Llama, through the command, from data to its table."""

import os
import random
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import orjson
import pytest
from cluster import Cluster
from conftest import RECIPE

from qlora_recipes.base import locks, paths
from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import compose, datafiles
from qlora_recipes.configs.compose import Composed, Request
from qlora_recipes.data import codereviewer, study
from qlora_recipes.running import reproduce
from qlora_recipes.runs import lookup
from qlora_recipes.scores import evaluations

STUDY = study.find("haider2024")
TWO = ("llama-2-7b", "llama-3.2-3b")


def command(profile: Path, *more: str | Path) -> list[str]:
    only = [word for name in TWO for word in ("--only", name)]
    words = [RECIPE, "reproduce", "haider2024", *only, "--profile", profile, "--bertscore", "none", "--json", *more]
    return list(map(str, words))


def reproduced(place: Path, profile: Path, *more: str | Path, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(command(profile, *more), cwd=place, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
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
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_profile: Path) -> Undisturbed:
    place = tmp_path_factory.mktemp("undisturbed")
    printed = reproduced(place, tiny_profile)
    return Undisturbed(place, printed, scores_of(place))


def test_all_steps_are_done_and_the_table_is_there(undisturbed: Undisturbed) -> None:
    for row in undisturbed.printed["steps"]:
        assert (row["check"], row["run"], row["evaluate"], row["problem"]) == ("done", "done", "done", None)
        assert row["plan"].endswith("GiB")
    scored = {row["recipe"]: row for row in undisturbed.printed["results"] if row["bleu4"] is not None}
    assert set(scored) == {f"haider2024/{name}" for name in TWO}
    for recipe, (scores, rows) in undisturbed.scores.items():
        assert scored[recipe]["bleu4"] == scores["bleu4"]
        assert len(rows) == 26


def test_again_it_does_nothing(undisturbed: Undisturbed, tiny_profile: Path) -> None:
    place = undisturbed.place

    def files() -> dict[Path, int]:
        every = (file for file in place.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {file: file.stat().st_mtime_ns for file in every}

    before = files()
    again = reproduced(place, tiny_profile)
    assert all(set(row.values()) == {row["recipe"], "skipped", None} for row in again["steps"])
    assert again["results"] == undisturbed.printed["results"]
    assert files() == before


def test_killed_at_random_moments_it_ends_with_the_same_scores(
    undisturbed: Undisturbed, tiny_profile: Path, tmp_path: Path
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    runs = tmp_path / "runs"
    for kill in range(int(os.environ.get("KILLS", "4"))):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command(tiny_profile), cwd=tmp_path, **silent)
        while kill == 0 and not any(run.read().launches for run in lookup.all_runs(runs)):
            assert process.poll() is None  # the first kill meets a training, however slow the machine is today
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(0, 4 if kill == 0 else 12))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
    printed = reproduced(tmp_path, tiny_profile)
    assert [row["problem"] for row in printed["steps"]] == [None, None]
    assert scores_of(tmp_path) == undisturbed.scores
    launches = [len(folder.read().launches) for folder in lookup.all_runs(runs)]
    assert sum(launches) > 2  # of two recipes: at least one training was killed, and went on or was begun anew


def test_on_slurm_it_comes_to_the_same_table(
    undisturbed: Undisturbed, tiny_profile: Path, tmp_path: Path, slurm: Cluster
) -> None:
    submitted = reproduced(tmp_path, tiny_profile, "--on", "slurm")
    assert all(row["run"].startswith("queued (job ") for row in submitted["steps"])
    slurm.wait_until_empty()
    again = reproduced(tmp_path, tiny_profile, "--on", "slurm")
    assert all((row["run"], row["evaluate"]) == ("skipped", "skipped") for row in again["steps"])
    assert scores_of(tmp_path) == undisturbed.scores
    here = {"run", "tokens_per_second"}  # a run's name, and what its machine measured
    for one, other in zip(again["results"], undisturbed.printed["results"], strict=True):
        assert one.keys() == other.keys() >= here
        assert {key: one[key] for key in one.keys() - here} == {key: other[key] for key in other.keys() - here}
    (shown,) = (tmp_path / "runs" / "slurm").glob("*/slurm-results.log")
    for name in TWO:
        assert f"haider2024/{name}" in shown.read_text()


def test_a_changed_setting_is_run_anew_and_a_recipe_that_fails_does_not_stop_the_others(
    undisturbed: Undisturbed, tiny_profile: Path
) -> None:
    """A warm-up longer than the training of one recipe has that one refused."""
    before = len(lookup.all_runs(undisturbed.place / "runs"))
    printed = reproduced(undisturbed.place, tiny_profile, "--set", "warmup_steps=20", "--set", "lora_r=4", code=1)
    first, second = printed["steps"]
    assert first["check"] == "failed" and "warmup_steps" in first["problem"] and first["run"] is None
    assert (second["run"], second["evaluate"], second["problem"]) == ("done", "done", None)
    assert len(lookup.all_runs(undisturbed.place / "runs")) == before + 1
    (row,) = [row for row in printed["results"] if row["recipe"] == second["recipe"]]
    assert "lora_r: 4 instead of 32" in row["differs"]  # the run that was asked for, not the plain one before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["other"], "other: no study of that name"),
        (["haider2024", "--only", "llama-2"], "--only llama-2: no recipe of the study; did you mean llama-2-7b"),
        (["haider2024", "--jobs", "3"], "--jobs 3: one GPU a job, and this machine has 0"),
        (["haider2024", "--rehearse", "--profile", "nowhere"], "nowhere: no profile of that name"),
        (["haider2024", "--rehearse", "--set", "lora_rr=3"], "lora_rr: no key of Axolotl's"),
    ],
)
def test_a_wrong_request_starts_nothing(tmp_path: Path, words: list[str], says: str) -> None:
    done = subprocess.run([RECIPE, "reproduce", *words], cwd=tmp_path, capture_output=True, text=True)
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
        for file in paths.SAMPLE.glob("msg-*.jsonl"):
            stream.write(file, f"Comment_Generation/{file.name}")
            files[file.name] = study.SourceFile(rows=datafiles.count_rows(file))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(archive.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    yield STUDY.model_copy(update={"data": STUDY.data.model_copy(update={"url": url, "files": files})})
    server.shutdown()
    server.server_close()


def composed(*recipes: str, **more: Any) -> list[Composed]:
    return [compose.compose(Request(f"haider2024/{recipe}", **more)) for recipe in recipes]


def test_data_is_fetched_and_prepared_in_the_forms_that_recipes_read_and_only_once(
    published_data: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reproduce._have_data(published_data, composed("llama-2-7b"))
    assert sorted(file.name for file in Path("data").iterdir()) == ["codereviewer", "codereviewer-raw"]
    both = composed("llama-2-7b", "as-released/llama-3-8b")
    reproduce._have_data(published_data, both)
    assert "<add>" in Path("data/codereviewer-tagged/train.jsonl").read_text()
    capsys.readouterr()
    reproduce._have_data(published_data, both)
    assert capsys.readouterr().err.count("is the study's") == 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: (data / "valid.jsonl").write_text(""), "valid.jsonl is not as manifest.json says"),
        (lambda data: (data / "manifest.json").unlink(), "manifest.json knows no train.jsonl"),
        (lambda data: change(data, "train", instruction="Other."), "another input format or instruction"),
        (lambda data: change(data, "train", is_the_study_file=False), "made of another file than the study's"),
        (lambda data: change(data, "test", left_out={}), "test-subset-1.jsonl is missing"),
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
    reproduce._have_data(published_data, composed("llama-2-7b"))
    folder = Path("data/codereviewer")
    spoil(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=says):
        reproduce._have_data(published_data, composed("llama-2-7b"))
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_data_that_another_process_is_preparing_is_waited_for(
    published_data: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/codereviewer")
    folder.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        with locks.held(folder / codereviewer.LOCK, ""):
            waiting = pool.submit(reproduce._have_data, published_data, composed("llama-2-7b"))
            assert not wait([waiting], timeout=0.5).done
        waiting.result()
    assert (folder / "train.jsonl").is_file()


def change(folder: Path, split: str, **values: object) -> None:
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    manifest["splits"][split] |= values
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))


def test_a_rehearsal_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reproduce._have_data(STUDY, composed("llama-2-7b", rehearse=True))
    assert not Path("data").exists()


def test_a_mirror_is_taken_where_a_model_is_gated() -> None:
    shared = Request("", mirror=True)
    mirrored = {name: reproduce._request(shared, name).mirror for name in STUDY.published}
    assert mirrored.pop("haider2024/code-llama-7b") is False
    assert set(mirrored.values()) == {True}


def test_without_a_gpu_nothing_is_fetched_or_started(tmp_path: Path) -> None:
    done = subprocess.run([RECIPE, "reproduce", "haider2024"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-gpu" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_judge_that_is_not_there_is_told_before_anything_starts(tmp_path: Path, tiny_profile: Path) -> None:
    words = command(tiny_profile, "--set", "lora_r=8", "--bertscore", "some/nowhere")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "some/nowhere cannot be loaded" in done.stderr
    assert lookup.all_runs(tmp_path / "runs") == []


def test_the_recipes_of_a_study() -> None:
    assert reproduce.chosen(STUDY, []) == list(STUDY.published)
    beside = "haider2024/all-linear/llama-2-7b"
    assert reproduce.chosen(STUDY, ["all-linear/llama-2-7b", beside]) == [beside]
    with pytest.raises(UserError, match="no recipe of the study"):
        reproduce.chosen(STUDY, ["nothing"])
