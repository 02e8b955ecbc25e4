"""A step of rows that share sequences, as the profile packed has them, beside the same step of the rows alone."""

from pathlib import Path
from typing import Any

import pytest
from axolotl.integrations.base import BasePlugin
from conftest import train_runs

from qlora_recipes.base import yamlfiles
from qlora_recipes.config.compose import Request, compose
from qlora_recipes.run.rundir import PLUGIN

pytestmark = pytest.mark.long  # three trainings of a step

ROWS = 8
NAME = "haider2024/llama-2-7b"
ALONE = {"micro_batch_size": 2, "gradient_accumulation_steps": ROWS // 2}  # a step is all rows
TOGETHER = {"micro_batch_size": 1, "gradient_accumulation_steps": ROWS}


class Leaking(BasePlugin):
    """Has a packed batch keep its mask, which is 1 for the first row and 2 for the second: attention takes any but 0
    for one sequence."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        trainer.args.sample_packing_drop_attention_mask = False


def config(tiny: Path, tiny_profile: Path, profiles: list[str], change: dict[str, Any]) -> yamlfiles.Config:
    """A training of one step in fp32, of adapters that add nothing yet, without dropout."""
    composed = compose(Request(NAME, profiles=[str(tiny_profile), *profiles])).config
    composed |= {"base_model": str(tiny), "bf16": False, "plugins": [PLUGIN], "save_strategy": "no", "num_epochs": 1}
    composed |= {"lora_dropout": 0.0, "special_tokens": {"pad_token": "</s>"}, "warmup_steps": 0}
    composed["datasets"][0]["split"] = f"train[:{ROWS}]"
    gone = ("test_datasets", "evals_per_epoch", "saves_per_epoch")
    return {key: value for key, value in (composed | change).items() if key not in gone}


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_profile: Path) -> dict[str, dict[str, float]]:
    """Metrics that the trainer logged for the step: rows alone, packed, and packed without being kept apart."""
    folder = tmp_path_factory.mktemp("packing")
    configs = {
        "alone": config(tiny, tiny_profile, [], ALONE),
        "packed": config(tiny, tiny_profile, ["packed"], TOGETHER),
        "leaking": config(
            tiny, tiny_profile, ["packed"], TOGETHER | {"plugins": [PLUGIN, f"{Path(__file__).stem}.Leaking"]}
        ),
    }
    runs = train_runs(folder, configs, plugins=__file__)
    return {name: next(record for record in run.read_metrics() if "loss" in record) for name, run in runs.items()}


def test_loss_and_gradient_are_those_of_the_rows_alone(stepped):
    alone, packed = stepped["alone"], stepped["packed"]
    print(stepped)
    assert alone["max_steps"] == packed["max_steps"] == 1
    assert packed["tokens"] % 2048 == 0 and packed["tokens"] < ROWS * 2048  # several rows in each sequence
    for key in ("loss", "grad_norm"):
        assert packed[key] == pytest.approx(alone[key], rel=2e-6)


def test_rows_that_see_each_other_have_another_loss_and_gradient(stepped):
    for key in ("loss", "grad_norm"):
        assert stepped["leaking"][key] != pytest.approx(stepped["alone"][key], rel=2e-5)
