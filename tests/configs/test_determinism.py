import os
import subprocess
import sys

import pytest
from conftest import Recipe

from qlora_recipes.base.errors import UserError
from qlora_recipes.configs import determinism
from qlora_recipes.configs.compose import Request
from qlora_recipes.running import reproduce, sweep

SETTINGS = "from transformers import enable_full_determinism as on; on(42)"
CHECK = "from qlora_recipes.configs import determinism; print(len(determinism.in_force()))"


def test_the_environment_is_set_only_where_a_training_is_to_repeat() -> None:
    assert determinism.environment({determinism.KEY: True}) == {"PYTHONHASHSEED": "0"}
    assert determinism.environment({determinism.KEY: False}) == determinism.environment({}) == {}


@pytest.mark.parametrize(
    ("before", "seed", "problem"),
    [
        (f"{SETTINGS}; {CHECK}", "0", ""),
        (CHECK, "0", "torch deterministic algorithms: False"),
        (f"{SETTINGS}; {CHECK}", "random", "order of sets is random: True"),
        (f"{SETTINGS}; import torch; torch.backends.cudnn.benchmark = True; {CHECK}", "0", "cudnn benchmark: True"),
        (
            f"{SETTINGS}; import os; os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':0:0'; {CHECK}",
            "0",
            "CUBLAS_WORKSPACE_CONFIG: :0:0",
        ),
    ],
)
@pytest.mark.long
def test_a_process_in_which_a_setting_does_not_hold_is_stopped(before: str, seed: str, problem: str) -> None:
    environment = os.environ | {"PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", before], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is not bool(problem)
    assert f"asked for a training that repeats bit for bit, but {problem}" in done.stderr if problem else done.stdout


@pytest.mark.parametrize("option", [["--deterministic"], ["--profile", "deterministic"]])
def test_the_option_is_a_profile(recipe: Recipe, option: list[str]) -> None:
    shown = recipe("run", "haider2024/code-llama-7b", "--rehearse", "--dry-run", *option)
    assert shown.returncode == 0, shown.stderr
    assert "full_determinism: true" in shown.stdout
    assert "full_determinism" not in recipe("run", "haider2024/code-llama-7b", "--rehearse", "--dry-run").stdout


@pytest.mark.parametrize("words", ["sweep haider2024/code-llama-7b --set lora_r=8,16", "reproduce haider2024"])
def test_sweeps_and_reproductions_have_it_too(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        (request,) = (argument for argument in arguments if isinstance(argument, Request))
        raise UserError(f"asked for {request.profiles}")

    monkeypatch.setattr(sweep, "sweep", refuse)
    monkeypatch.setattr(reproduce, "reproduce", refuse)
    arguments = [*words.split(), "--rehearse", "--profile", "tensorboard"]
    assert "asked for ['tensorboard']" in recipe(*arguments).stderr
    assert "asked for ['tensorboard', 'deterministic']" in recipe(*arguments, "--deterministic").stderr
