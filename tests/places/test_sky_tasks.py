"""`--on sky` with SkyPilot itself, as far as no machine is needed: its schema, its prices, and what it refuses."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import sky_home
from conftest import RECIPE, SUPPORT, Recipe, finish, start
from run_folders import a_run
from sky_home import PRICES, SPOT, SkyPilot

from qlora_recipes.base import paths, yamlfiles
from qlora_recipes.base.yamlfiles import Config
from qlora_recipes.configs import gpus
from qlora_recipes.places import sky, sky_settings
from qlora_recipes.planning import fit
from qlora_recipes.running import run
from qlora_recipes.runs.rundir import RunDir
from qlora_recipes.runs.tasks import Command
from qlora_recipes.scores import evaluate
from qlora_recipes.scores.task import EvaluationRequest

pytestmark = pytest.mark.long
NAME = "haider2024/code-llama-7b"
CARD = "resources: {accelerators: A100}"


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyPilot]:
    with sky_home.running(tmp_path_factory.mktemp("sky")) as running:
        yield running


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's settings file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name, value in sky_home.SECRETS.items():
        monkeypatch.setenv(name, value)
    file = sky_settings.settings_file()
    file.parent.mkdir(parents=True)
    file.write_text(f"shared: true\n{CARD}\n")
    return file


def rendered(gpus: int, commands: list[Command], most: float | None = None) -> Config:
    place = sky.Sky(not gpus, None, ["yes"])
    place.most = most
    return place._task("code-llama-7b-0a1b2c", commands, gpus)


def commands_of(recipe: str, runs: Path) -> dict[str, list[Command]]:
    """What jobs are made of."""
    folder = RunDir(runs / recipe / "20260101-000000-abcdef0")
    train, score = run.command(folder, runs), evaluate.command(folder, EvaluationRequest(judge="none"), runs)
    return {"run or resume": [train], "evaluate": [score], "member of a sweep": [train, score]}


def test_every_task_of_every_recipe_is_valid(
    skypilot: SkyPilot, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where paths are awkward, and as SkyPilot understands it, it is what was asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache := str(tmp_path / "it's: a #cache"))
    settings.write_text(f"shared: true\nsecrets: [HF_TOKEN, JUDGE_KEY]\n{CARD}\n")
    runs = tmp_path / 'it\'s "mine": $runs'
    scripts = set()
    for name, count, most in itertools.product(paths.recipe_names(), (0, 1, 4), (None, 2.5)):
        for what, commands in commands_of(name, runs).items():
            task = rendered(count, commands, most)
            taken = skypilot.ask("understand", task=task)
            assert "error" not in taken, (name, what, taken)
            (resources,) = taken["resources"]
            assert resources["accelerators"] == ({"A100": count} if count else None)
            assert (resources["most"], taken["secrets"]) == (most, ["HF_TOKEN", "JUDGE_KEY"])
            assert (taken["envs"]["XDG_CACHE_HOME"], taken["run"]) == (cache, task["run"])
            assert "planted" not in yamlfiles.write_yaml(task)
            scripts.add(task["run"])
    assert len(scripts) == 3 * len(paths.recipe_names())
    for script in scripts:
        assert not subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr


def test_a_task_of_a_machine_of_its_own_is_valid(skypilot: SkyPilot, settings: Path, tmp_path: Path) -> None:
    settings.write_text("bucket: s3://mine/of a study\nresources: {accelerators: A100, use_spot: on}\n")
    folder = a_run(tmp_path / "it's mine", NAME, "20260101-000000-abcdef0", 5.0)
    task = rendered(1, [run.command(folder, tmp_path / "it's mine")])
    taken = skypilot.ask("understand", task=task)
    assert (taken["resources"][0]["spot"], taken["envs"]["QLORA_RECIPES_BUCKET"]) == (True, "s3://mine/of a study")
    assert task["workdir"] == str(paths.LOCK.parent)
    for script in (task["setup"], task["run"]):
        command = ["shellcheck", "-s", "bash", "-e", "SC2046", "-"]  # an option of make's that may be none
        checked = subprocess.run(
            [RECIPE.with_name(command[0]), *command[1:]], input=script, text=True, capture_output=True
        )
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ("resources: {accelerators: 'A100:8'}", [{"accelerators": {"A100": 8}}]),
        ("resources: {accelerators: [A100, H100]}", [{"accelerators": {"A100": 4}}, {"accelerators": {"H100": 4}}]),
        ("resources: {accelerators: {A100: 4, L4: 4}}", [{"accelerators": {"A100": 4}}, {"accelerators": {"L4": 4}}]),
        (
            "resources: {cpus: 8+, any_of: [{accelerators: A100, infra: lambda}, {accelerators: H100, use_spot: on}]}",
            [
                {"accelerators": {"A100": 4}, "infra": "lambda", "cpus": "8+", "spot": False},
                {"accelerators": {"H100": 4}, "infra": None, "cpus": "8+", "spot": True},
            ],
        ),
        (
            "resources: {ordered: [{accelerators: H100, infra: runpod/US}, {accelerators: A100, infra: lambda}]}",
            [{"accelerators": {"H100": 4}, "infra": "runpod/US"}, {"accelerators": {"A100": 4}, "infra": "lambda"}],
        ),
        (
            "resources: {accelerators: H100, any_of: [{infra: lambda}, {infra: kubernetes}]}",
            [{"accelerators": {"H100": 4}, "infra": "lambda"}, {"accelerators": {"H100": 4}, "infra": "kubernetes"}],
        ),
        (
            "resources: {accelerators: H100, use_spot: true, job_recovery: {max_restarts_on_errors: 2}, disk_size: 9, "
            "disk_tier: best, image_id: 'docker:debian:12', memory: 64+, ports: 6006, labels: {of: me}, "
            "autostop: {idle_minutes: 5, down: true}, max_hourly_cost: 1.5}\n"
            "setup: echo ready\nenvs: {A: '1'}\nsecrets: [HF_TOKEN]\nfile_mounts: {/data: TESTS}\nconfig: {docker: "
            "{run_options: [--ipc=host]}}",
            [{"accelerators": {"H100": 4}, "spot": True, "most": 1.5}],
        ),
    ],
)
def test_what_the_user_sets_is_valid_and_each_alternative_has_the_gpus_of_the_run(
    skypilot: SkyPilot, settings: Path, tmp_path: Path, written: str, understood: list[Config]
) -> None:
    settings.write_text(f"shared: true\n{written.replace('TESTS', str(SUPPORT))}\n")
    commands = commands_of(NAME, tmp_path)["run or resume"]
    for most in (None, 9.0):
        taken = skypilot.ask("understand", task=rendered(4, commands, most))
        assert "error" not in taken, taken
        limits = {"most": most} | understood[0] if most else understood[0]
        assert by_card(taken["resources"], understood[0]) == by_card([limits, *understood[1:]], understood[0])
    without = skypilot.ask("understand", task=rendered(0, commands))
    assert "error" not in without and {one["accelerators"] for one in without["resources"]} == {None}


def by_card(resources: list[Config], keys: Config) -> list[Any]:
    """The values of some keys in each of several resources, sorted: SkyPilot keeps only the order of `ordered`."""
    return sorted(orjson.dumps({key: one.get(key) for key in sorted(keys)}) for one in resources)


@pytest.mark.parametrize(
    ("resources", "infra", "card", "hourly"),
    [
        ({"accelerators": {"A10": 1, "H100": 1, "L4": 1}}, "RunPod", "L4:1", PRICES["runpod"]["L4"]),
        ({"accelerators": "A100"}, "Lambda", "A100:1", PRICES["lambda"]["A100"]),
        ({"accelerators": "A100:4"}, "Lambda", "A100:4", PRICES["lambda"]["A100:4"]),
        ({"accelerators": "H100"}, "RunPod", "H100:1", PRICES["runpod"]["H100"]),
        ({"accelerators": "H100", "infra": "lambda"}, "Lambda", "H100:1", PRICES["lambda"]["H100"]),
        ({"accelerators": "H100", "use_spot": True}, "RunPod", "H100:1", SPOT["H100"]),
        ({"any_of": [{"accelerators": "A100"}, {"accelerators": "L4"}]}, "RunPod", "L4:1", PRICES["runpod"]["L4"]),
        ({"ordered": [{"accelerators": "A100"}, {"accelerators": "L4"}]}, "Lambda", "A100:1", PRICES["lambda"]["A100"]),
        ({"instance_type": "1x_A10"}, "Lambda", "A10:1", PRICES["lambda"]["A10"]),
        ({"accelerators": "A100", "max_hourly_cost": 1.29}, "Lambda", "A100:1", PRICES["lambda"]["A100"]),
    ],
)
def test_the_price_is_the_catalogues(
    skypilot: SkyPilot, resources: Config, infra: str, card: str, hourly: float
) -> None:
    offer = skypilot.ask("check", task={"name": "x", "run": "true", "resources": resources})
    assert (offer.get("infra", "").split()[0:1], offer.get("gpus"), offer.get("hourly")) == ([infra], card, hourly), (
        offer
    )


@pytest.mark.parametrize(
    ("resources", "says"),
    [
        ({"accelerators": "H100", "max_hourly_cost": 2}, r"Max hourly cost limit \(\$2/hr\) may be too restrictive"),
        ({"accelerators": "A1"}, "'A1' is ambiguous. Please choose one of .*'A10', 'A100'"),
        ({"accelerators": "A100:2"}, r"Did you mean: \['A100:4'\]"),
        ({"accelerators": "B300"}, "No resource satisfying .*'B300': 1.*To fix.*/sky gpus list`"),
        ({"accelerators": "A10", "use_spot": True}, "Spot instances are not supported in Lambda"),
        ({"infra": "lambda/mars"}, "Invalid region 'mars'.*'us-east-1'"),
        ({"acelerators": "A100"}, "Instead of 'acelerators', did you mean 'accelerators'"),
    ],
)
def test_what_cannot_be_rented_is_refused_with_what_is_near(skypilot: SkyPilot, resources: Config, says: str) -> None:
    answer = skypilot.ask("check", task={"name": "x", "run": "true", "resources": resources})
    assert re.search(says, answer["error"], re.DOTALL), answer


def rented(place: Path, skypilot: SkyPilot, *words: str | Path, code: int = 2) -> str:
    """What the command says that would rent a machine, which nobody is there to agree to; nothing is left of it."""
    given = ("run", NAME, *words, "--on", "sky")
    said = finish(start(place, *given, **skypilot.env), code)
    assert not (place / "runs").exists()
    assert skypilot.ask("states") == {}
    return said


def test_the_cheapest_card_that_holds_a_recipe_is_offered_at_what_the_plan_comes_to(
    skypilot: SkyPilot, settings: Path, tmp_path: Path, sample: Path, recipe: Recipe
) -> None:
    """L4 and A10 are cheaper, and too small."""
    settings.write_text("shared: true\n")
    profile = tmp_path / "few.yaml"
    data = {"type": "alpaca", "path": str(sample / "train.jsonl")}
    profile.write_text(yamlfiles.write_yaml({"datasets": [data | {"split": "train[:64]"}], "test_datasets": [data]}))
    changed = ("--profile", profile, "--set", "micro_batch_size=16", "--set", "num_epochs=400")
    (planned,) = orjson.loads(recipe("plan", NAME, *changed, "--gpu", "A100", "--json").stdout)
    hours, price = planned["work"]["hours"], PRICES["lambda"]["A100"]
    assert hours > 1 and fit.usable_gib(gpus.find("A10")) < planned["memory"]["needed"] / 2**30 < fit.usable_gib(
        gpus.find("A100")
    )
    said = rented(tmp_path, skypilot, *changed, "--force", "no-access:base_model")
    offer = f"Lambda (us-east-1), 1x_A100, A100:1: {price:.2f} USD an hour; by plan {hours:,.1f} hours of training, "
    assert f"{offer}{hours * price:,.2f} USD\n" in said
    assert "nobody is there to agree to that price; --yes does" in said


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("resorces: {cpus: 1}", "Instead of 'resorces', did you mean 'resources'"),
        ("resources: {acelerators: A100}", "Instead of 'acelerators', did you mean 'accelerators'"),
        ("resources: {accelerators: H100, max_hourly_cost: 1}", r"\(\$1/hr\) may be too restrictive"),
        (
            "resources: {accelerators: H100}",
            r"RunPod \(US\), 1x_H100, H100:1: 2.39 USD an hour; .*nobody is there to agree",
        ),
    ],
)
def test_what_is_wrong_or_not_agreed_to_starts_nothing_and_keeps_no_secret(
    skypilot: SkyPilot, settings: Path, tmp_path: Path, tiny_profile: Path, written: str, says: str
) -> None:
    settings.write_text(f"shared: true\nsecrets: [HF_TOKEN, JUDGE_KEY]\n{written}\n")
    assert re.search(says, rented(tmp_path, skypilot, "--profile", tiny_profile), re.DOTALL)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [settings]
    kept = sky_home.with_secrets(Path(skypilot.env["HOME"]))
    assert {file.name.partition("-")[0] for file in kept} <= {"requests.db"}  # where its server keeps what it is asked
