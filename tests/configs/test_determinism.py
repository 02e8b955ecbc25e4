import os
import subprocess
import sys

import pytest

from qlora_recipes.configs import determinism

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
    assert problem in done.stderr if problem else done.stdout
